/* llm.h - an example LLM engine in one header, on the public API of modelopt_q.h.

   In exactly one file:

       #define MODELOPT_Q_IMPLEMENTATION
       #include "modelopt_q.h"
       #define LLM_IMPLEMENTATION
       #include "llm.h"

   A whole chat (examples/chat.c shows it with the bundled demo model, whose scenes are system turns):

       llm_desc desc = {0};
       desc.path = "demo-model";
       llm *bot = llm_open(&desc, &err);
       if (!bot) { puts(err.text); return 1; }
       llm_say(bot, "system", "red book at kitchen table; Ana at bathroom cupboard; robot at garage rack");
       llm_say(bot, "user", "can you give the red book to Ana?");
       for (const char *piece; (piece = llm_next(bot, &err)); ) fputs(piece, stdout);
       if (err.code != MOQ_OK) puts(err.text);
       llm_close(bot);

   What else there is, each in a line:

       llm_step(bot, 2000);                            work for 2 ms of a frame; 1: llm_piece(bot) is new, -1: the turn has ended
       llm *ana = llm_join(bot, &err);                 another conversation of the same model (desc.slots); llm_fork: with all that was said
       llm_step_all(bot, 3000);                        the same for all of them: their tokens go through the layers together
       llm_set_grammar(bot, grammar, 200, &err);       answers that always are documents of a JSON Schema; llm_grammar_create
       llm_set_sampling(bot, &sampling);               temperature, top_k, penalties, bias; llm_set_stops: where an answer ends
       llm_save(bot, "bot.state", &err);               go on later: llm_load; nothing is computed again
       desc.endless = 1;                               forget the oldest turns when the context is full, instead of ending
       desc.draft = 4;                                 guess tokens and check them in one pass: faster, the same answer
       llm_plan(&desc, &memory, &err);                 bytes before anything is allocated; desc.max_memory: refuse more
       llm_cancel(bot);                                from any thread

   Zero is the default of every field. What is opened is closed by one call. The rules of modelopt_q.h on errors, memory
   and threads hold here too: one llm belongs to one thread at a time; only llm_cancel may be called from another.

   Contents: search for the tag.
       >>llm-api        this interface
       >>llm-base       memory, text and token buffers
       >>llm-unicode    character classes, normalization forms, lower case
       >>llm-pattern    the regular expressions of pre-tokenizers
       >>llm-tokenizer  tokenizer.json: BPE of bytes, BPE with byte fallback, Unigram
       >>llm-normalizer what happens to a text first
       >>llm-encode     text to ids and back
       >>llm-open       opening a tokenizer
       >>llm-chat       chat templates and the frames they mean
       >>llm-frame      writing frames
       >>llm-families   the architectures: names and switches
       >>llm-keys       the model description; reading keys; rotary embeddings
       >>llm-config     config.json -> model description
       >>llm-model      weights of a family, prepared on a backend
       >>llm-layers     the blocks of a layer, the KV cache, and the whole model
       >>llm-forward    the decoder
       >>llm-sample     sampling, penalties, log-probabilities
       >>llm-grammar    grammars: automata over bytes with a stack
       >>llm-gbnf       grammars written by hand
       >>llm-values     numbers with bounds and strings with patterns
       >>llm-schema     reading JSON Schemas
       >>llm-structure  JSON Schemas as grammars
       >>llm-lexicon    the vocabulary as a tree of bytes
       >>llm-guide      a grammar on a vocabulary: where a document stands
       >>llm-mask       which tokens may come next, and choosing among them
       >>llm-session    conversations: opening, saying, framing
       >>llm-answer     from logits to tokens and from tokens to text
       >>llm-step       passes of many conversations, within a time
       >>llm-state      forking a conversation; saving and loading one
       >>llm-plan       what a model will take
       >>llm-calibrate  running samples for moq_quantize and moq_calibrate (with MOQ_QUANTIZE)
*/
#ifndef LLM_H
#define LLM_H

/* beside this file, or in the folder above as in the repository */
#ifndef MODELOPT_Q_H
#if defined(__has_include)
#if __has_include("modelopt_q.h")
#include "modelopt_q.h"
#else
#include "../modelopt_q.h"
#endif
#else
#include "modelopt_q.h"
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------
   >>llm-api         this interface
   ------------------------------------------------------------------------------------------------ */

#ifndef LLM_API
#define LLM_API extern
#endif

/* ---- tokenizer: usable alone ---- */

typedef struct llm_tokenizer llm_tokenizer;

/* From tokenizer.json (and tokenizer_config.json, generation_config.json for the special ids) of a checkpoint. */
LLM_API llm_tokenizer *llm_tokenizer_open(const moq_checkpoint *ck, moq_error *err);
LLM_API void llm_tokenizer_close(llm_tokenizer *t);
LLM_API int32_t llm_vocab(const llm_tokenizer *t);                         /* largest id + 1 */
LLM_API int32_t llm_token_find(const llm_tokenizer *t, const char *text);  /* id of exactly this token, -1: none */
LLM_API int llm_is_end(const llm_tokenizer *t, int32_t id);                /* does this token end a turn? */

enum {
    LLM_SPECIAL = 1, /* encode: control tokens written in the text become their ids; decode: they are printed */
    LLM_BOS = 2      /* encode: put the tokens that the post-processor puts around a text (usually one BOS) */
};

/* Text to ids; bytes that are no UTF-8 become U+FFFD. Fills at most `capacity` ids and returns the number needed;
   SIZE_MAX when out of memory. */
LLM_API size_t llm_encode(const llm_tokenizer *t, const char *text, size_t bytes, uint32_t flags, int32_t *ids, size_t capacity);

/* Ids to text, NUL-terminated when it fits; returns the bytes needed without the NUL. Unknown ids decode to nothing. */
LLM_API size_t llm_decode(const llm_tokenizer *t, const int32_t *ids, size_t count, uint32_t flags, char *text, size_t capacity);

/* ---- chat frames ---- */

/* Roles are "system", "user", "assistant", "tool", and what else the template has a place for. Templates that write whatever role they are
   given (ChatML, Llama 3 and others) take any name, a misspelled one too; the rest refuse what they do not know. The first messages may be settings
   instead: "date", for templates that write the current one, in their own format ("2025-06-30" for gpt-oss, "30 Jun 2025" for Llama 3);
   "thinking" with "on", "off", "low", "medium" or "high", for templates that know such a switch (Qwen3, SmolLM3, Nemotron 3,
   DeepSeek-V3.1, gpt-oss).
   Descriptions of tools belong into the system text, written as the model's maker shows it. */
typedef struct llm_message {
    const char *role;
    const char *text;
} llm_message;

/* The folder's own frame around messages, as ids. `open_answer`: end with the opening of an assistant turn. Message texts are encoded as
   plain text: control tokens in them stay text. Returns the number of ids needed, SIZE_MAX on failure (MOQ_E_TEMPLATE:
   the folder's chat template is none of the known ones). */
LLM_API size_t llm_frame(const llm_tokenizer *t, const llm_message *messages, size_t count, int open_answer, int32_t *ids, size_t capacity, moq_error *err);

/* ---- engine ---- */

enum {
    LLM_TOP = 8,   /* alternatives of a token's log-probability, at most */
    LLM_DRAFT = 15 /* tokens guessed at once, at most */
};

typedef struct llm_bias {
    int32_t id;
    float add;          /* to the token's logit; -INFINITY forbids it */
} llm_bias;

/* In the order in which they apply: repetition_penalty, presence and frequency, bias; then unless greedy temperature, top_k, top_p,
   min_p, typical_p, each on what the one before left, renormalized. One random number per token (one more for each that a grammar
   refuses), drawn from the seed by our own generator: equal logits give equal tokens on every machine, with any number of threads and any backend. */
typedef struct llm_sampling {
    float temperature;  /* 0: greedy */
    int32_t top_k;      /* the k likeliest; 0: off */
    float top_p;        /* the likeliest that together have this share; 0 or 1: off */
    float min_p;        /* those with at least this share of the likeliest one's probability; 0: off */
    uint64_t seed;      /* same seed, same text, whatever the threads */
    float typical_p;    /* those whose surprise is nearest to the entropy, with this share (Meister et al. 2022); 0 or 1: off */
    float repetition_penalty; /* positive logits of tokens that were there are divided by it, others multiplied (Keskar et al. 2019); 0 or 1: off */
    float presence_penalty;   /* subtracted from the logits of tokens that the answer has */
    float frequency_penalty;  /* the same times how often it has them */
    int32_t penalty_window;   /* penalties look at so many of the newest tokens; 0: all */
    const llm_bias *bias;     /* [bias_count] stay the caller's and must live as long as the setting */
    int32_t bias_count;
} llm_sampling;

/* A token of an answer with natural logarithms of probabilities, of the model's own logits: before penalties, bias and temperature. */
typedef struct llm_token {
    int32_t id;
    float logprob;
    int32_t top_count;             /* likeliest first; ties: the lower id */
    int32_t top_id[LLM_TOP];
    float top_logprob[LLM_TOP];
} llm_token;

/* The sum of x [count], activations in the memory of `be` (rows of hidden values, or of logits), over all ranks of a model, in place: the same bits on
   every rank, for example always added from rank 0 on (without a device: be->download_act, add, be->upload_act). Work that was queued on `be` comes
   before, later work after it. Every rank calls it equally often, with equal counts; `user` may differ and say which one calls. What fails must fail on
   every rank: the failure comes out at the end of the pass, until which later calls are made all the same.
   One that only queues work where that of `be` is queued (moq_cuda_stream) and waits for nothing on the host says so by llm_desc.all_reduce_queues: a
   step of one token is then recorded with its sums and repeated, without a call. It is called in every pass that is not, and for the recording; what
   must differ from sum to sum lies in device memory. At the end of each pass that went well here, when the device is done, it is called with x NULL and
   count 0 and says whether the sums since the last such call went well; it must not wait for other ranks then. */
typedef moq_result (*llm_all_reduce_fn)(void *user, moq_backend *be, void *x, size_t count, moq_error *err);

typedef struct llm_desc {
    const char *path;            /* checkpoint folder, or NULL with: */
    const moq_checkpoint *checkpoint; /* one that is already open; stays the caller's and must outlive the llm */
    moq_backend *backend;        /* stays the caller's; NULL: a CPU backend of its own, made from the next four */
    int32_t threads;
    moq_act act;
    const char *kernel;
    moq_parallel parallel;
    const char *kv;              /* KV cache: NULL or "auto" as the checkpoint says; "wide" as activations, F32 on a CPU; "bf16" wide in half the bytes,
                                    as PyTorch keeps it for BF16 models (CUDA, and caches of latent attention: "wide"); or a name of moq_kv_format.
                                    The scales are the checkpoint's; where it has none they are 1, those of "int8" 1/8: keys and values up to 15.9,
                                    which few models' exceed by much */
    const char *head;            /* an output layer that is stored unquantized: NULL or "stored" as it is, "int8" or "fp8" quantized while opening,
                                    see llm_make_head. Halves what it reads for each token; logits change by what moq eval --against says */
    const char *weights;         /* NULL or "mapped": products read most formats where the file is mapped, and opening takes no time; "copied": from copies
                                    that a CPU backend makes while opening, in the order in which a token reads them and in large pages, while
                                    the file's pages go back to the system. Faster where the memory's speed decides, to the same bits, by 5 to 10 % on AMD's
                                    processors and hardly on Intel's; takes as much memory of the program's own as the products read. Experts stay mapped */
    int32_t context;             /* tokens of one sequence; 0: what config.json says, at most 4096 */
    int32_t slots;               /* conversations that the KV cache has room for; 0: 1 */
    int32_t chunk;               /* rows of one pass through the model: prompt tokens, or tokens of many answers; 0: what suits the backend (its
                                    pass_rows), 256 on a CPU. Memory grows with it: see llm_plan */
    uint64_t max_memory;         /* llm_open refuses with the numbers of llm_plan when these would need more bytes. 0: more than the machine has beside
                                    the mapped weights, on a CPU and without an allocator of the caller's; UINT64_MAX: no limit */
    int32_t endless;             /* 1: when the context is full, the oldest turns (raw text: half of the tokens) are forgotten and the rest
                                    is run again; system turns at the beginning (raw text: the first `keep` tokens) stay */
    int32_t keep;
    int32_t draft;               /* speculative decoding: guess so many tokens at once from what the conversation says (prompt lookup), or by
                                    llm_set_draft; the answer stays the same, token for token, as far as a row's result does not depend on
                                    the other rows of a pass: on the CPU, where MOQ_ACT_AUTO means MOQ_ACT_WIDE then, F32 may be summed in another
                                    order, and nothing else differs. MOQ_ACT_STORED makes percents of a last bit. 0: off */
    int32_t logprobs;            /* keep an llm_token for each token of the answer, with so many alternatives (1 .. LLM_TOP); 0: off */
    llm_sampling sampling;
    int32_t no_tokenizer;        /* 1: token ids only; tokenizer.json is not read */
    int32_t ranks;               /* tensor parallelism: so many models, each on a backend and a thread of its own, are one. Each holds its share of the
                                    heads, of the columns of every MLP and expert and of an output layer that is not the embedding, and all_reduce
                                    sums what they compute. All are opened from the same folder and are given the same calls; each gives the whole
                                    answer. A step then makes one pass, whatever its time; who cancels one rank lets all_reduce fail on the others.
                                    Inputs rounded with a scale per token are rounded in each share for itself. Latent attention, state-space layers
                                    and experts between projections cannot be divided (MOQ_E_UNSUPPORTED), nor what cuts through heads or groups of a
                                    weight (MOQ_E_SHAPE). After an error or a cancel every rank needs llm_reset; each saves a state of its own.
                                    0 or 1: off */
    int32_t rank;                /* which of them this is: 0 .. ranks - 1 */
    llm_all_reduce_fn all_reduce;
    void *all_reduce_user;
    int32_t all_reduce_queues;   /* 1: it only queues work and may be recorded, see llm_all_reduce_fn */
    moq_allocator allocator;
    moq_log_fn log;
    void *log_user;
    moq_progress_fn progress;
    void *progress_user;
} llm_desc;

typedef struct llm_info {
    const char *model_type;
    int32_t layers, hidden, vocab, context, slots;
    uint64_t weight_bytes;       /* of the checkpoint's tensors, also with ranks; what follows is of this rank's part */
    uint64_t memory_bytes;       /* allocated beyond them: prepared weights, KV cache, activations */
    uint64_t token_bytes;        /* codes and scales that the products of one generated token read; of experts, as many as are chosen */
    uint64_t token_products;     /* their multiplications: elements of those weights */
    moq_kv_format kv;
    const char *head;            /* scheme of the output layer as it runs: "bf16", "w8a16" */
} llm_info;

typedef struct llm_stats {
    uint64_t prompt_tokens, generated_tokens;
    uint64_t guessed_tokens;     /* of the generated ones: taken from a guess */
    double prompt_seconds, generate_seconds;
} llm_stats;

/* What a desc will take, in bytes. */
typedef struct llm_memory {
    uint64_t mapped_bytes;       /* the checkpoint's tensors: mapped, so the system may drop what is not in use and read it again */
    uint64_t weight_bytes;       /* beyond them: repacked and copied weights, scales */
    uint64_t cache_bytes;        /* KV cache and states of all slots */
    uint64_t run_bytes;          /* activations, the backend's scratch, logits, text buffers; a caller's backend: without its scratch */
    uint64_t tokenizer_bytes;
    uint64_t total_bytes;        /* of all of these */
    int32_t context, slots, chunk; /* as they will be */
    int32_t max_context;         /* positions that the model was made for */
} llm_memory;

typedef struct llm llm;          /* one conversation; those of one model share everything but their slot of the KV cache */

/* What llm_open with this desc will allocate, found out without allocating it. Nothing grows afterwards, except by what is said. */
LLM_API moq_result llm_plan(const llm_desc *desc, llm_memory *out, moq_error *err);

LLM_API llm *llm_open(const llm_desc *desc, moq_error *err);
/* Another conversation of the same model in a free slot (llm_desc.slots), without words. It belongs to the same thread. */
LLM_API llm *llm_join(llm *m, moq_error *err);
/* The same with all that `m` holds, cache included: both go on from here, each for itself. */
LLM_API llm *llm_fork(llm *m, moq_error *err);
/* The slot becomes free; with its last conversation the model goes. */
LLM_API void llm_close(llm *m);
LLM_API const llm_info *llm_get_info(const llm *m);
LLM_API const llm_tokenizer *llm_get_tokenizer(const llm *m); /* NULL with no_tokenizer */
LLM_API const moq_checkpoint *llm_get_checkpoint(const llm *m);
LLM_API moq_backend *llm_get_backend(const llm *m);
LLM_API const llm_stats *llm_get_stats(const llm *m);         /* since open or the last llm_reset */
LLM_API int32_t llm_get_slot(const llm *m);                   /* of the KV cache: 0 after llm_open */

/* What llm_desc.head makes of an output layer: every row gets one F32 scale, amax / 127 (int8) or amax / 448 (fp8), and its nearest codes, ties
   to even. codes: [rows, cols] bytes, scales: [rows], both the caller's and kept by *out; both NULL: only shape and scheme, over no memory.
   MOQ_E_ARG: no such name; MOQ_E_UNSUPPORTED: the layer is quantized already, or a value is not finite. */
LLM_API moq_result llm_make_head(const moq_linear *stored, const char *name, uint8_t *codes, float *scales, moq_linear *out, moq_error *err);
/* From the next token on; NULL: greedy. The random numbers begin again from s->seed, also with the same settings. MOQ_E_ARG for what llm_open would
   refuse in llm_desc.sampling: nothing changes then. */
LLM_API moq_result llm_set_sampling(llm *m, const llm_sampling *s);
/* The answer ends before the first of these strings, of which nothing is shown. They are copied; count 0: none; empty ones are left out. */
LLM_API moq_result llm_set_stops(llm *m, const char *const *stops, int32_t count, moq_error *err);
/* Guess up to `tokens` (at most llm_desc.draft) at once, by a smaller model with the same vocabulary, opened by itself and used for nothing
   else, or, NULL, from the conversation. The draft must outlive this. Models with a running state cannot draft and cannot be drafted for. */
LLM_API moq_result llm_set_draft(llm *m, llm *draft, int32_t tokens, moq_error *err);

/* ---- conversation ---- */

/* Add a turn. An error is kept and comes out of the next llm_next, which also refuses roles that the model's frame has no place for
   (MOQ_E_TEMPLATE; see llm_message for frames that take any role). */
LLM_API moq_result llm_say(llm *m, const char *role, const char *text);
/* Add raw text without a frame (text completion). */
LLM_API moq_result llm_say_raw(llm *m, const char *text);
/* The next piece of the answer: whole UTF-8 characters, valid until the next call; NULL at the end of the turn (err->code MOQ_OK) or on an error
   (MOQ_E_STATE: nothing was said since llm_open or llm_reset). */
LLM_API const char *llm_next(llm *m, moq_error *err);
/* Work for about `max_microseconds`: 1 = a piece is ready (llm_piece), 0 = more time needed, -1 = the turn ended or failed (llm_next says which).
   The unit of work is one layer of one token, or more where the time allows as measured: no call takes longer than its time and one unit.
   The output layer is computed in slices, of a million products and more. Choosing a token, and on a GPU the whole output layer, is one unit.
   How many tokens go through the layers together depends on the time, and last bits of their logits on that; where inputs are rounded to 8 or 4
   bits (MOQ_ACT_STORED, and MOQ_ACT_AUTO of such folders) a last bit may become another token. MOQ_ACT_WIDE is for answers that must be repeated. */
LLM_API int llm_step(llm *m, int64_t max_microseconds);
/* The same for all conversations of the model at once, whose tokens go through the layers together. Returns how many have a piece ready
   (llm_ready), 0 = more time needed, -1 = every turn has ended. A conversation waits until its piece is taken. */
LLM_API int llm_step_all(llm *m, int64_t max_microseconds);
LLM_API int llm_ready(const llm *m);                          /* 1: llm_piece has something new, 0: not yet, -1: the turn has ended (llm_next says how) */
LLM_API const char *llm_piece(llm *m);
/* The tokens of the answer so far, with llm_desc.logprobs; valid until the next call. */
LLM_API const llm_token *llm_get_tokens(const llm *m, size_t *count);
LLM_API void llm_cancel(llm *m);                              /* any thread: the current answer ends with MOQ_E_CANCELLED */
LLM_API void llm_reset(llm *m);                               /* forget the conversation */

/* ---- saved conversations ---- */

/* What `m` holds, so that it goes on after llm_load exactly as it would have: text, tokens, cache, random numbers, stop strings. Settings of sampling are
   not in it: set them before llm_load, for llm_set_sampling starts the random numbers anew. A state fits the same model with the same KV format on
   the same kind of backend; any other, or a damaged one, is refused, with the reason, and nothing changes. How products are computed may differ: threads,
   kernels, `act`, `head`, `weights`. What was computed stays as it was, the choice of the next token, or the logits it is chosen from, too; what follows
   is computed the new way. */
LLM_API moq_result llm_save(llm *m, const char *path, moq_error *err);
LLM_API moq_result llm_load(llm *m, const char *path, moq_error *err);
/* The same in memory. Returns the bytes needed and fills `bytes` when they fit; SIZE_MAX on failure. */
LLM_API size_t llm_copy_state(llm *m, void *bytes, size_t capacity, moq_error *err);
LLM_API moq_result llm_set_state(llm *m, const void *bytes, size_t count, moq_error *err);

/* ---- structured output ---- */

/* What an answer must be: documents of a JSON Schema, or texts of a GBNF grammar. Immutable; may be shared between threads. */
typedef struct llm_grammar llm_grammar;

typedef struct llm_grammar_desc {
    const char *schema;      /* a JSON Schema as text, or */
    const char *gbnf;        /* a grammar in the GBNF notation of llama.cpp, whose texts begin with the rule root */
    size_t bytes;            /* of the text; 0: it ends with NUL */
    int32_t compact;         /* 1: documents without any space; 0: one space may follow a comma or a colon */
    moq_allocator allocator;
} llm_grammar_desc;

/* NULL and MOQ_E_GRAMMAR (nothing can satisfy it) or MOQ_E_UNSUPPORTED (a keyword that cannot be enforced), with the JSON pointer or
   the line. Known keywords: type, enum, const, properties, required, additionalProperties, min/maxProperties, items, prefixItems,
   min/maxItems, min/maxLength, pattern, format, minimum, maximum, exclusiveMinimum, exclusiveMaximum, anyOf, oneOf (branches that
   exclude each other), allOf, $ref within the schema; annotations and x-... are passed over. */
LLM_API llm_grammar *llm_grammar_create(const llm_grammar_desc *desc, moq_error *err);
LLM_API void llm_grammar_destroy(llm_grammar *g);
LLM_API int64_t llm_grammar_shortest(const llm_grammar *g);    /* bytes of its shortest text */

/* From the next answer on, answers are texts of `g`, at most max_tokens long (0: what the context leaves). As the limit comes near, the
   answer is led to its end: it is always complete. Refused when even the shortest text does not fit, and while an answer is
   being written. `g` must outlive its use. NULL: answers are free again, and max_tokens does not limit those. */
LLM_API moq_result llm_set_grammar(llm *m, const llm_grammar *g, int32_t max_tokens, moq_error *err);

/* ---- tokens: for tools, scoring and calibration ---- */

/* Run `count` tokens at positions pos, pos + 1, ... of a slot (positions before pos must have been run). logits: [count, vocab] F32 of
   every token, or NULL; last: [vocab] of the last token, or NULL. */
LLM_API moq_result llm_forward(llm *m, int32_t slot, const int32_t *tokens, int32_t count, int32_t pos, float *logits, float *last, moq_error *err);
/* Choose a token from logits [vocab]; `state` is the generator's state, start it from llm_sampling.seed. `scratch` [vocab] floats and ints may be NULL when greedy.
   Filters (top_k, top_p, min_p, typical_p) want 27 KB of stack. */
LLM_API int32_t llm_sample(const llm_sampling *s, const float *logits, int32_t vocab, uint64_t *state, float *scratch, int32_t *index);
/* What s says of penalties and bias, on logits [vocab] in place; tokens [count] are what was read and written, from index `answer` on the
   answer. counts: [vocab] scratch. */
LLM_API void llm_penalize(const llm_sampling *s, const int32_t *tokens, size_t count, size_t answer, float *logits, int32_t vocab, int32_t *counts);
/* Log-probability of `id` and of the `top` likeliest tokens. */
LLM_API void llm_logprobs(const float *logits, int32_t vocab, int32_t id, int32_t top, llm_token *out);

#ifdef MOQ_QUANTIZE
/* ---- calibration: what moq_quantize and moq_calibrate run ---- */

/* Rows of tokens for a calibration. */
typedef struct llm_samples {
    const int32_t *const *rows;  /* [count] pointers to the tokens of each row */
    const int32_t *lengths;      /* [count] tokens of each row */
    int32_t count;
    int32_t batch;               /* rows of a batch: averages are taken over batches; 0: 1 */
    int32_t logits;              /* 1: compute the output layer for every token too, so that it is observed */
    uint64_t max_memory;         /* bytes; 0: no limit. What is between two layers, 8 * hidden bytes a token, goes to a file when it takes more than
                                    a quarter, and pages of the source are given back after each layer */
    const char *scratch;         /* path beside which that file is made; it has no name while it is used */
    moq_progress_fn progress;    /* MOQ_STAGE_CALIBRATE in tokens, times layers when they run one by one; a non-zero return cancels */
    void *progress_user;
} llm_samples;

/* A moq_forward_fn; data: llm_samples. Runs layer by layer where the observer takes it so (see moq_takes_layers): of the weights one
   layer is in memory. */
LLM_API moq_result llm_calibrate(void *data, const moq_checkpoint *source, moq_backend *watch, moq_error *err);
#endif

#ifdef __cplusplus
}
#endif
#endif /* LLM_H */

#if defined(LLM_IMPLEMENTATION) && !defined(LLM_IMPLEMENTED)
#define LLM_IMPLEMENTED

/* ------------------------------------------------------------------------------------------------
   >>llm-base        memory, text and token buffers
   Pure functions over the public allocator of modelopt_q.h; a failed allocation leaves every structure usable.
   ------------------------------------------------------------------------------------------------ */

#include <float.h>
#include <limits.h>
#include <string.h>

#if defined(__GNUC__)
#define LLMI_UNUSED __attribute__((unused))
#else
#define LLMI_UNUSED
#endif

#define LLMI_COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define LLMI_REPLACEMENT 0xfffdu /* stands for bytes that are no UTF-8 */

/* ---- arena: everything an object keeps, freed in one call ---- */

typedef struct llmi_block {
    struct llmi_block *next;
    size_t bytes, used; /* of the whole block, header included */
} llmi_block;

typedef struct llmi_arena {
    moq_allocator a;
    llmi_block *head;
    size_t next_bytes;
} llmi_arena;

/* An empty arena over `a` (NULL: the default allocator); nothing is allocated yet. */
static llmi_arena llmi_arena_make(const moq_allocator *a)
{
    llmi_arena r;
    memset(&r, 0, sizeof r);
    if (a) r.a = *a;
    r.next_bytes = 4096;
    return r;
}

/* Zeroed memory for `count` items of `size` bytes, aligned to 64 when it is a block of its own and to 16 otherwise;
   NULL when out of memory or when the product overflows. */
static void *llmi_take(llmi_arena *r, size_t count, size_t size)
{
    const size_t header = 64;
    if (size && count > SIZE_MAX / 4 / size) return NULL;
    size_t bytes = count * size;
    llmi_block *b = r->head;
    if (b) {
        size_t at = (b->used + 15) & ~(size_t)15;
        if (at <= b->bytes && bytes <= b->bytes - at) {
            b->used = at + bytes;
            return (char *)b + at;
        }
    }
    size_t total = header + bytes < r->next_bytes ? r->next_bytes : header + bytes;
    b = (llmi_block *)moq_allocate(&r->a, total);
    if (!b) return NULL;
    if (r->next_bytes < ((size_t)1 << 20)) r->next_bytes *= 2;
    b->bytes = total;
    b->used = header + bytes;
    b->next = r->head;
    r->head = b;
    return (char *)b + header;
}

/* A NUL-terminated copy. */
static char *llmi_take_text(llmi_arena *r, const char *s, size_t bytes)
{
    char *p = (char *)llmi_take(r, bytes + 1, 1);
    if (p && bytes) memcpy(p, s, bytes);
    return p;
}

/* Frees every block; the arena can be used again. */
static void llmi_arena_drop(llmi_arena *r)
{
    for (llmi_block *b = r->head, *next; b; b = next) {
        next = b->next;
        moq_release(&r->a, b, b->bytes);
    }
    r->head = NULL;
}

/* MOQ_E_NOMEM with the sentence that goes with it. */
LLMI_UNUSED static moq_result llmi_nomem(moq_error *err, const char *what)
{
    return moq_fail(err, MOQ_E_NOMEM, what, "out of memory: the allocator returned NULL");
}

/* ---- growable bytes and ids; zero-filled but for the allocator is empty ---- */

typedef struct llmi_bytes {
    moq_allocator a;
    char *data;
    size_t count, capacity;
} llmi_bytes;

typedef struct llmi_ids {
    moq_allocator a;
    int32_t *data;
    size_t count, capacity; /* in ids */
} llmi_ids;

/* A larger copy of `count` items of `size` bytes with room for `need` in all; *capacity is updated. NULL: the old one stays. */
static void *llmi_grow(const moq_allocator *a, void *data, size_t count, size_t *capacity, size_t need, size_t size)
{
    size_t want = *capacity ? *capacity * 2 : 256;
    if (need > SIZE_MAX / 4 / size) return NULL;
    if (want < need) want = need;
    void *p = moq_allocate(a, want * size);
    if (!p) return NULL;
    if (count) memcpy(p, data, count * size);
    moq_release(a, data, *capacity * size);
    *capacity = want;
    return p;
}

/* Empty bytes over `a` (NULL: the default allocator). */
LLMI_UNUSED static llmi_bytes llmi_bytes_make(const moq_allocator *a)
{
    llmi_bytes b;
    memset(&b, 0, sizeof b);
    if (a) b.a = *a;
    return b;
}

/* Appends; 0 when out of memory, and then nothing is appended. */
static int llmi_bytes_add(llmi_bytes *b, const char *s, size_t bytes)
{
    if (bytes > SIZE_MAX / 4) return 0;
    if (b->capacity - b->count < bytes) {
        char *p = (char *)llmi_grow(&b->a, b->data, b->count, &b->capacity, b->count + bytes, 1);
        if (!p) return 0;
        b->data = p;
    }
    if (bytes) memcpy(b->data + b->count, s, bytes);
    b->count += bytes;
    return 1;
}

/* Room for `bytes` in all; 0 when out of memory. */
static int llmi_bytes_reserve(llmi_bytes *b, size_t bytes)
{
    char *p = bytes > b->capacity ? (char *)llmi_grow(&b->a, b->data, b->count, &b->capacity, bytes, 1) : b->data;
    if (p) b->data = p;
    return p != NULL || bytes <= b->capacity;
}

/* Frees the bytes; the buffer can be used again. */
static void llmi_bytes_drop(llmi_bytes *b)
{
    moq_release(&b->a, b->data, b->capacity);
    b->data = NULL;
    b->count = b->capacity = 0;
}

/* An empty list of ids over `a` (NULL: the default allocator). */
LLMI_UNUSED static llmi_ids llmi_ids_make(const moq_allocator *a)
{
    llmi_ids v;
    memset(&v, 0, sizeof v);
    if (a) v.a = *a;
    return v;
}

/* Appends; 0 when out of memory, and then nothing is appended. */
static int llmi_ids_add(llmi_ids *v, const int32_t *ids, size_t count)
{
    if (count > SIZE_MAX / 16) return 0;
    if (v->capacity - v->count < count) {
        int32_t *p = (int32_t *)llmi_grow(&v->a, v->data, v->count, &v->capacity, v->count + count, sizeof *p);
        if (!p) return 0;
        v->data = p;
    }
    if (count) memcpy(v->data + v->count, ids, count * sizeof *ids);
    v->count += count;
    return 1;
}

/* Room for `count` ids in all; 0 when out of memory. */
static int llmi_ids_reserve(llmi_ids *v, size_t count)
{
    int32_t *p = count > v->capacity ? (int32_t *)llmi_grow(&v->a, v->data, v->count, &v->capacity, count, sizeof *p) : v->data;
    if (p) v->data = p;
    return p != NULL || count <= v->capacity;
}

/* Frees the ids; the list can be used again. */
static void llmi_ids_drop(llmi_ids *v)
{
    moq_release(&v->a, v->data, v->capacity * sizeof *v->data);
    v->data = NULL;
    v->count = v->capacity = 0;
}

/* ---- UTF-8 ---- */

/* The character that starts at s (n >= 1 bytes): its length, and its code point in *cp. Bytes that are no UTF-8 give
   U+FFFD for each maximal part that could have begun a character, as the Unicode standard recommends (chapter 3.9).
   *cut (may be NULL) is 1 when the text ended inside a character. */
static size_t llmi_utf8_get(const char *s, size_t n, uint32_t *cp, int *cut)
{
    uint8_t b = (uint8_t)s[0], lo = 0x80, hi = 0xbf;
    size_t need = b < 0x80 ? 1 : b >= 0xc2 && b <= 0xdf ? 2 : b >= 0xe0 && b <= 0xef ? 3 : b >= 0xf0 && b <= 0xf4 ? 4 : 0;
    if (cut) *cut = 0;
    *cp = need == 1 ? b : LLMI_REPLACEMENT;
    if (need < 2) return 1;
    if (b == 0xe0) lo = 0xa0; /* shorter forms exist below */
    if (b == 0xed) hi = 0x9f; /* surrogates */
    if (b == 0xf0) lo = 0x90;
    if (b == 0xf4) hi = 0x8f; /* above U+10FFFF */
    uint32_t v = b & (0x7fu >> need);
    for (size_t i = 1; i < need; i++, lo = 0x80, hi = 0xbf) {
        if (i >= n) {
            if (cut) *cut = 1;
            return i;
        }
        uint8_t c = (uint8_t)s[i];
        if (c < lo || c > hi) return i;
        v = v << 6 | (c & 0x3fu);
    }
    *cp = v;
    return need;
}

/* Writes a code point as UTF-8; returns 1 to 4. */
static size_t llmi_utf8_put(uint32_t cp, char out[4])
{
    if (cp < 0x80) { out[0] = (char)cp; return 1; }
    size_t n = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    for (size_t i = n; i-- > 1; cp >>= 6) out[i] = (char)(0x80 | (cp & 0x3f));
    out[0] = (char)((0xf00u >> n & 0xffu) | cp);
    return n;
}

/* ---- map: byte strings to numbers, open addressing, at most half full ---- */

typedef struct llmi_slot {
    const char *name; /* borrowed: must outlive the map */
    uint32_t bytes;
    int32_t value;
    uint32_t hash;    /* upper half of the hash, to skip most comparisons */
} llmi_slot;

typedef struct llmi_map {
    llmi_slot *slots;
    size_t mask, count, limit;
} llmi_map;

/* The 128-bit product of a and b, its halves folded by xor. */
static uint64_t llmi_fold(uint64_t a, uint64_t b)
{
    uint64_t al = a & 0xffffffffu, ah = a >> 32, bl = b & 0xffffffffu, bh = b >> 32;
    uint64_t m = ah * bl + (al * bl >> 32), k = al * bh + (m & 0xffffffffu);
    return (ah * bh + (m >> 32) + (k >> 32)) ^ (a * b);
}

/* Every input byte reaches every bit: names made to collide in byte-wise hashes do not collide here. */
static uint64_t llmi_hash(const char *s, size_t n)
{
    uint64_t h = 0x9e3779b97f4a7c15u ^ (uint64_t)n;
    for (size_t i = 0; i < n; i += 8) {
        uint64_t w = 0;
        size_t m = n - i < 8 ? n - i : 8;
        memcpy(&w, s + i, m);
        h = llmi_fold(h ^ w, 0xbf58476d1ce4e5b9u) + 0x94d049bb133111ebu;
    }
    return llmi_fold(h, h ^ 0xd6e8feb86659fd93u) ^ h >> 29;
}

/* Room for `count` names; 0 when out of memory. */
static int llmi_map_make(llmi_map *m, llmi_arena *r, size_t count)
{
    size_t capacity = 16;
    while (capacity / 2 < count) capacity *= 2;
    memset(m, 0, sizeof *m);
    m->slots = (llmi_slot *)llmi_take(r, capacity, sizeof *m->slots);
    if (!m->slots) return 0;
    m->mask = capacity - 1;
    m->limit = capacity / 2;
    return 1;
}

/* The slot of a name: the one that holds it, or the free one where it belongs. There is always a free one. */
static llmi_slot *llmi_map_slot(const llmi_map *m, const char *name, size_t bytes, uint64_t hash)
{
    size_t i = (size_t)hash & m->mask;
    uint32_t high = (uint32_t)(hash >> 32);
    for (; m->slots[i].name; i = (i + 1) & m->mask) {
        const llmi_slot *s = &m->slots[i];
        if (s->hash == high && s->bytes == bytes && memcmp(s->name, name, bytes) == 0) break;
    }
    return &m->slots[i];
}

/* The entry of a name, or NULL. */
static const llmi_slot *llmi_map_find(const llmi_map *m, const char *name, size_t bytes)
{
    if (!m->slots) return NULL;
    const llmi_slot *s = llmi_map_slot(m, name, bytes, llmi_hash(name, bytes));
    return s->name ? s : NULL;
}

/* Adds a name; returns the entry that was there already, or NULL when it is new. */
static const llmi_slot *llmi_map_add(llmi_map *m, const char *name, size_t bytes, int32_t value)
{
    uint64_t hash = llmi_hash(name, bytes);
    llmi_slot *s = llmi_map_slot(m, name, bytes, hash);
    if (s->name || m->count >= m->limit) return s;
    s->name = name;
    s->bytes = (uint32_t)bytes;
    s->value = value;
    s->hash = (uint32_t)(hash >> 32);
    m->count++;
    return NULL;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-unicode     character classes, normalization forms, lower case
   Pure: tables are unpacked into the tokenizer's own memory, every function is linear in its text.
   ------------------------------------------------------------------------------------------------ */

/* Unicode 16 in 91 printable characters, made by tools/unicode_tables.py. Numbers are base 45, low digit first. */
/* Runs of one class from U+0000 on. */
static const char *const llmi_class_text[] = {
    "&=hlk liR%gng-6hl`l36flfl&>fpfmAfl oZl.glYAf[f-3l-!34l3#w8.w#.w3(.s/(.'.(.)/+.(.)0(.(.s(.'/'.(.).'.(/A'0D'4.'4.'4.w#.w$.'4.'.).w93 (.(/'.+.u",
    "3b!A37@.o@'q)>q!:l:q-La#s:l'.!:0f'$m'f) ' (.-- -$3@'/)0w'1'.l'.(/-P!3Mw-lL!w7(.w .wM -C!:k 3Fg!n LJfGfHfHfG&#F7$Dg&-nglgmL&f hF<:F%L1R%iBGFS",
    "#fAL! lL ;HlJBR%CmAk)!AGF:L7!Fw!L&A&)R%F=L$;lh:!GmF2J:L$:I:K!k+ F5I!f F&%F4lF &#L$FF:L4 L=FS!IAL.AL!F%HgR%f:F+I F#!B!F2 F! A#D!GAL!!H!IA&#G$",
    "B CH!R%Bm_ mAfG!I F $B!F2 F! B B B!G K$H!I#G&!D A&!R%HCGf&%I F$ C F2 F! B E!GAL# I I!A&+BH!R%fl&!AL  I F#!B!F2 F! B E!GAL!!H!I&!I$B CH!R%lA_",
    " &%GA F #C D#B A B#B#C#F'$K#I J!A& G&)R%[q#%KF# C F3 F,!GAL! I J&!H C!A!BH!R%&!f_!lAIfF# C F3 F% E!GAL! I J&!H& B BH!R% BG&'JF$ C FFHAL! I J",
    "Al$CG_!CH!R%_$lF  I F.#F4 F$ A!F!#G$L  G L#& R%!Hf&'FMGBL!$lF :L#fR%g&BB A E F4 A F%GBL$A!E : L! R%!D&<Ank+lfnHq R%_%lGlGlGiHF# FA$L0fHEL& L",
    "A q#Gq  mjog&BFHL0AR%k F JDIAIBL!CJF(L'AGR%Jm-C '%'!3Hf:0FX( D!F! A D!FF D!F= D!F! A D!F+ FV! D!Fa!!Ik$_0#F,q%& -t!!3 !fFn/lfF- F6g#Fi!hUF#&",
    "!F.J&$F/Ig&$F.H&'F( C H&'FQ!L<h:hlAG!R%& _%& k&I GR%& F@:FR!&!EHF>GA%Fd!&%F; L'$L'$l#gR%F:!E&&FI$F6& R%Y#q>F3K!gFR!L% L9!GR%& R%& k!:k !L;&N",
    "KFLL-F# gR%k!q%L$q$hIF:L(BR%FIL)&#iFAL0#jR%#CR%F:@ g3$'.%-H!)k#&#IfL1DGF GBIA%3I@]!3(:3>@BL^!wi!3#wN3#-#3 !- !3#-#3#-#3 !- !3# ' ' ' '3#-#3)",
    "!3#9#3#9#3#9#2 /+4l.n0 /+4n1!/+ n3#,n!0 /+4m&-k4&#k+ahlk(lf`k%&-Y:!_ ng:_%ng @(#q=&+L=&+m'o'm.)/).l'n,q 'l'l'l+l.+.D.m/(p'1o.l_,X@'.VYm$qZ)i",
    "q9gqi&&2q&&1_Y!ql!_2qj/k)_:qNgq;k%qv)k2q]!iq<gqX)!q< qY#-M3M'.)/t+.'/'3 ;).wN.q sI'.%iYg3C .%.!FU!&!:f&)GF3&$F! F! F! F! F! F! F! F! L<kL:k<",
    "mk'&>q6 qw!&'qm%&6q, hl:ASk%mk'lX$L f>mU:Afm Ft!!Hm;AfFx!f<A%FH F|! m]q%F<qC&$lF,q; _%q:_#l_+q<_%qD_+q}'Fa[$q^!Fva,:F];#qT!&$FE@ gFv&:hF,R%B",
    "&0w3AJfL%f:w);HFd!X%Hk &#q3@$mw!/w;:3#s(.u:msAs/w%,.,.w!+.'.(.!'. . .t'&1<'.A;.F!GCGDGF3KoG#_ o& FQ!i&#HFOL.&#gR%& L.F hAfBGR%F8L#gF3L(&&fF9",
    "#JFLL)k( :R%$gEG:F$R%E FFL)&$CGF#H!R%!iF,:F nAIFOGAIBHEHAGA&4B:gF&KgA;H&%F !F !F &$F! F! 3Hl=3$:m$3n!F@L#fH!R%& FVh&&'F3$FN&pW%FP)!FZ#&C3!&'",
    "2%AGF%lF( E A B B F]#q-&,F{(gq,F^!!FS!&!l&<F'oL,k%& L,hak4bh k)lfn flg$E Fx#$hlk liR%gng-6hl`l36flflk!F%:FJ;F;#F !F !F !C#q! q!&(m!F' F6 F/ ",
    "B F+!F)&>Fl#%h$_J#q$XR!]q-Zn q(#l&LqJG&s#F9#FN&+G_7$F<]&$F0SF#S%FCK%F: fFA$F#fW&G-E3EFl!!R%& -A$3A$FE&#FQ!&&f-& -+ -! ( 3& 3+ 3! /#FQ!&'Ft'&",
    "$F2&%F#&4@  @G @$&c!F !A FI B#A!F3 f_#F3m_!F;&#_$&MF/ B%^F2_ #fF6%f&^!FU!$ZB_,!_KAI H%JD C F9!I$G_$&!k$&!F9ZfF9[&<F#lF8H$^k!&$FS!#k!F2!_#F/%",
    "_#F.&!i&'_!&n!Fg!&T!-P!&(3P!&!_ FAJ&#R%& R%D:A-2#Kf:32&#m&g%_; FG Hf!B&,C&T!JF9_%A&#F2L&]j&2F.Ji&CF1_!&0F3&$IFR!L+k!$_0R%GBHA&$JFJL&g iG&(F5",
    "&!R%& IFAL) R%iAHA&#F@GgA&$IFML)DiJfHR%AfAh _0&&F. F5L'k GBG&[!F! A D F+ F%f& FLL'%R%& J F#!B!F2 F! B E HAL!!H!I!A& G%EH!L!#K&&F% A!A FC AL$",
    " G!G J KAGAg g&#H&9FR!L.DjR%g fGC&:FML0BfA&#R%&j$FLL!!L$k3DH&>FML-hA&&R%& k(&/FHL(Af& R%& R0&8F7!L+$R%ZhlF!&}$FIL+f&T#-<3<R%_$&'F#!A!F# B F4",
    "L  H!JAGAHh&$R%&d!F#!FDL!!L!AfAG&7AL%FEL!AJk#G&#AL&FKL,hAj&(Fg!&!k%&z$F=f&)R%& F$ FBL# L#Aj&%R%_/#gF:!L2 L)&g!F! B FCL #G H L!AG&#R%& F  B F",
    "<K H KA&!R%&s'F/Jg&!HAGF( F>L!#Kk(R%G&s!A&+_1q9&(fFa6&V#X`# j&&FZ%&e^!FQ#g&(Fp9&,GF L+&%Fn|!%Fv.&ya$F:L.R%&cIFh.&!F; R%$gFm! R%& F:!Kf&%FML!",
    "jo=fl&%R% _! F1%F/&f+<FE;hR%&]%-<3<_3i&U#Fi!$GALT!&!J@(&^!;f:G&&H&)FZQ$&#Fb=&FF%&dc%= @! ; F`'&+A&9C!A&)D&#Fo)&WV!F[#%F(#F$&!F%!lHf&`{!qY&R%",
    "& qj+&j!LK!L3&$qe#&Y!q`&&%qD!qY!KnL &#L#mL!q:JqZ!&1q`!Il&k#_0&'_0&'qu!&$_5&x#-636-63! 3.-636' (!'!(!+ -#1 . 3! 3&-636( +!-# -! 36( + , '#-! ",
    "36-636-636-636-636-636-638!-5l35l3 -5l35l3 -5l35l3 -5l35l3 -5l35l3 '.!ROq[-LT!oLOq#Gq)Gmj&+K L+&c:3%A30& 3 &l%L! L-!L! H K%@[!&=G&a#FJ#L!@!!",
    "R%$Al&}'F:G&-FIJR%%l&X,F7:JR%&m%F:HAR%$f&i,F! D B F+ F[%!_$L!&F->3>L!:$R%$g&_3_X!l[l]&j!_Jl_+&X%D F7 B A!A F% D A A& A$A A A C B A!A A A A A",
    " B A!D F! D D A F% F-%C E F-&Q!m&x&qI$qT#&'q+!q+ q+ qB&%_(qe$&U!q9&(qI$q$&!m&)q &^$qr7$q-#q(#qh#$q}!& q'$l&+q'$qU!&#q%& qE&#q:!q'$m&[!qd(&'q",
    ")!q(#q%%qU!&!q+!q&& q$&!qV$ qz!R%&s8FYT7&<FXR#& Fu%!Fzv#&)F{o$&+Fp/&oY!Fz-&`DFmd#%FQS#&n!",
    NULL};

/* Canonical combining classes: gap, length, class of each run. */
static const char *const llmi_ccc_text[] = {
    "S37U& !W& %y% !W& !u% &y% #g% %y% #g% -y% &! %y% )U& !`& !U& $y% $U& #y%!$U& %y% !U& !W& #y% !U& !X& #Y& !X& #Y& !X& /U&U'&U&y&!y% %U& !y% $",
    "U& !{% !y% 'U& 'y% #U& !y% #U& !{% !S& !U& !, !- !. !/ !0 !1 !2 !3 !4 #5 !6 !7 !8!!9!!: !;!!U& !y%!!4l!)U& !A !B !CS!!= !> !@ !A !B !C !D !E",
    " #U& #y% &U& !y% #U& !y%2!F[#(U&#%U& !y% !U&##U&!!y% #U& !y%F!GA!U& !y% #U& !y% #U& $y% !U& #y% !U& !y% $U& !y% !U& !y% !U& !y% !U& !y% #U&j",
    "$(U& !y% !U&E%U&!+U&!$U&!&U&N$y%o#0U&!!y% #U& !y% #U& !y% $U& $y% != !> !@ $U& !y% #U& #y% &U&`!!(2!+$!U& !y% #U&^#!(2!+e#!(2!+e#!(2!+e#!(2!",
    "+v#!+v#!+(!x! !Q#[#!(2!+v#!+s#!+d##^# !+/%b#c##m#0%q#p!#y%=!y%!!y%!!u%Z!!x# !y#!!{#&%y##!y#!#U& !+!#U&b!!y%g#!(!#+v!!y%}1$U&S7!+B!+g$!+,!U&h",
    "%!S&X$!{% !U& !y%x%!U& !y%k!!+6)U&#!y%S!&U& 'y% #U& !y%m#!(1!+I!U& !y% (U&Y!#+^!!(-#+g!!(b$$U&!!! &y% #U& %y% !U&!(!%!y%'!U&$#U&c%#U& !y% (U",
    "& !y% #U& !Y& !s% !y% !g% HU&&!U& !X& !y% !U& !y%P2#U& #! %U& $! #U&%!U&$#! !U& !y% !U& #! %y% !U&Zh!$U&V$!+V#CU&_.!w% !S& !W& !{% #}%`##)_y",
    "0!U&%,U&C#U&t!#U&V'!+Y%!+=4U&]!$y%H!+U#!(.!+_&!U&!#U& !y%##U&&#U&!!U&W!!+f&!+gP,!<T3(U& (y% #U&m7!y%Q&!y%_$&U&bH!y%!!U&K!U& !! !y%%!+o$!U& !",
    "y%jA!+[!!+]!!+ !(i!$U&S!#+b!!(p!!++!(a#!+ !(|$!( !+u!!(2!+:(U&$&U&j%!+$!(r#!+ !(k&!+ !(u#!+m#!+ !(j#!+x>!+n{+&!_!(U&T^,!!Xm##u% $!$!Q& &u%))",
    "y%#&U& #y%A%U&^$$U&Ur!(U&!3U&#(U&!#U&!&U&XT!(y%d#'U& !(",
    NULL};

/* Canonical decompositions: difference to the last code point * 2 + never recomposed, differences of the first and second part. */
static const char *const llmi_decomposition_text[] = {
    "i)y#VE# ## ## ## ,# %%%^!#%q!# ## ## .#)1# ## ## .%,+##&# ## ## ## ,'.1# ## ## .#)/'2!# ## ## ## ,# %%%^!#%q!# ## ## .#)1# ## ## .%,+##&# ##",
    " ## ## ,'.1# ## ## .#)/% 0#f#(#d! #c!%#d! #c!h!#d! #_!q!#d! #c!##d! #c!,#d! #c!,#d! #a! #d! 'a!1#d! #c!%#d! #c!##d! #c!f!#d! #c!Z!#d! #_!5#d",
    "! #c!)#d! #c!##d! #c!d!#d! #a!m!#d! 'a!##d! #c!##d! #c!%#d! #c!h!#d! #c!e!)#+#d! #a!n!#d! %a!o!#d! #c!p!#d! #c!X!#d! ,_!7#d! #c!p!#d! #c!X!#",
    "d! )a!1#d! #c!%#d! #c!,#d! ']!5#d! #c!p!#d! #c!X!#d! #a!7#d! #c!##d! #c!n!#d! #c!X!#d! #a!Y!#d! #c!X!#d! 'a!3#d! #c!##d! #c!%#d! #c!)#d! #c!",
    "##d! #c!^!#d! #_!o!#d! #_! #d! #c!.##/#d! #c!.#d! #c!,#d! h!y!A#d! >V! #d! ^!^#@#d! #R! #d! #V! #d! #V! #d! #k%1#d! #c!&#d! #c!8#d! #c!9#d! ",
    "%f#)#d! #_0 ## #o1 #d! 'R(2#d! #Z! #d! #Z![!#d! #w2k!## #^#2#r+ #h: )i!7#d! 'T!!#d! #x$##d! #a! #d! #= #d! #U)>#d! #c!%#d! #Z!$#d! #c!%#d! #",
    "Z!$#d! #c!%#d! #V!$#d! #c!%#d! #]!$#d! #c!%#d! #]!$#d! #c!%#d! #g!M#d! #a! #d! '{!V!#d! 0q!+#d! #Z!d!#d! #Q&i!#d! #e! #d! #a('#d! #x5&## #x6",
    " #d! }-s>^E$# &G $7XEW#g$WE7`> 0w%XE#UD $dCWE#mCXE#% #% %. %. #) #f! W!W#0#: #:/#) #% #% #G W!F0#: #-/#. #) ,4 # 0|!}#1# 2%$/);0,K/#$!#8.87 ",
    "d!d! Q!&-# 2%$/)j!0,Z!/#$!#8.S!X#4## ^$Y%3#d! >o! #d! #c!%#d! 'X!$#d! '[(%## #n) #d! #a! #d! 'a!(#d! #c!)#d! #V! #d! 'j( ## #`) #d! #w!(#d! ",
    "#c!)#d! #c!'#d! #Z!&#d! 'Z! #d! Y/W7fH# ##f! #e!##j!!w'X' %J EE k<k<SD22 '' m!_! $# $# $, $, $# $4 $) u%s't&# U!Do!X!$# &< s$v&p&(. k!g! $# ",
    "$, (A c,m.i.' R!# U!Do!X!$# e#}%y'c#_#T!## #!U!h&p&n&`&b&n&00 # #% J#)In&h&o%## #!U!_'i'U&% ,#'+#&My1R2}676 -, -, -, =X!$7X#|#& %$y#:&# 5z# ",
    "Hf!e#76 -, -, -, =X!$w%m'b&rr#rr#ft#%% %% %% %% )) v!v! %% '% ## %' WBZv'sS'#d! #a!_!#d! #c![!#d! #c!>#d! #g%U##d! #Z(.#d! #c![!#d! #c!>#d! ",
    "#c!5#d! #c!.#d! #r(}!## #!### #V+|!#d! #c!'#d! #R6w!## #e7##d! #a!&#d! #a!'#d! #c![!#d! #c!X!#d! #c!b!#d! #c!0#d! #a!%#d! #i%S##d! #]( #d! #",
    "c!h!#d! #c!>#d! #a!=#d! #{h(a!## #bj(P##d! #c!(#d! #a!{!#d! #c!.#d! #c![!#d! #a!Z!#d! #c![!#d! #c!>#d! #c!(#d! #k%{!#d! #c!0#d! #x$1## #!###",
    " #Z- #d! #c!.#d! #_! #d! #c![!#d! #]j(a!## #qk(P##d! #a!w!#d! #c![!#d! #],Z!## #, ## #P`( ## #}k( #d! #c![!#d! #c!>#d! #c!(#d! #a!3#d! #c!:#",
    "d! #c!&#d! #u,{!## ##0## #^.+#d! #c!d!#d! #a!i!#d! #c!##d! #c!0#d! #c!!#d! #c![!#d! #a!Z!#d! #c!##d! #a!!#d! #a!+#d! #c!f!#d! #c!>#d! #F #:u",
    "!#'%#% %n-&,U0[!#d! #c!V!#d! #_%1#d! #c!!#d! #c!4#d! #c!-#d! #ch(!## #Pg(!## #!!## #!4## #!-## #{f('## #co(^!#d! #c!V!#d! #c!-#d! #g%$#d! #c",
    "!!#d! #c!4#d! #c!-#d! #Ui(!## #^p(0#d! #c!W!#d! #V! #d! #c!V!#d! #g%1#d! #c!!#d! #c!4#d! #c!-#d! #ji(!## #{a(!## #!!## #!4## #!-## #!d!## #r",
    "0 #d! #c!V!#d! #|/1## #!!## #!4## #!-## #!d!## #Z1i!#d! #c!j!#d! #c!V!#d! #c!-#d! 0mGC# ##qy'J## #!### #!y### #W{'S## ##g{'J## #!### #!y### ",
    "#zy'S## ##[z'J## #!### 'p{'G# ##Q|'J## #!### 'iz'G# ##xz'J## #!### #!y### #_|'S## ##n|'J## #!### #!y### #W{'S## ##g{'J## #!### #!y### #{|'S#",
    "# ##]}'J## #!### #!y### #l{'S## ##{{'J## #!### 'b}'G# ##q}'J## #!### 'R|'G# ##b|'J## #!### #!y### %v}'Q#%YP(J% #% y##k|'S## ##z|'J## #!### #",
    "!y### #aP(S## ##pP(J## #!### #!y### #aP(z#$+UE#4VE$1UE#6VE$3UE#8VE$5UE#CVE$<UE#/VE$2UE#(VE$,UE'dx'YH## ## ## ## ## ## ## ## ## ## ## ## ## #",
    "# ## #E ## ## ## ## ## ## ## ## ## ## ## ## ## ## ## #X# ## ## ## ## ## ## ## ## ## ## ## ## ## ## ## #mP(t## $#pP(y##oP( #+ %,&#uS('#YU(t##",
    " $# ($7UE#8YH&t!XH'xESH#ct('#kP( #3 %4&#[T('#rU(R$$;UE#AVE$=UE#>YH#aU(R$# ## y##vS(n## $#E($j#UE'v!SH#E #W#n## $# ($@UE%rX(VE# ## y##TV(n## ",
    "$#.($X!UE#E}E# ##)R##. #o!n## $# ($P!UE#IQF#uDJ$kCUE$sF '|w(YH#VP( #, %+&#kU('#dW(R$$HUE#^!VE$V!UE#W!YH$mDXH(Xz( $# R/jW( +^I $d& {%U^)mG#% ",
    "I% b!o# #) #$ a#X# ,, '' S!S! %% Y!Q! '0 '% %' Q!_l) %em) 8J #kl) #% #im) ## '< ## '' ## 0' ## '0 ## '' ## j!Y! #. ## #% X#S# ## #K ## 0d! #",
    "# ## ## p#la$lG$# k{!v^!mGxa!ta!_f-%% %% %% %% %% %% %% %% %% %% %% '' %% %% 00 # #%'!# #%'!# #%'!# #%'!# #Q!`#!6x$ >> %% %% %% %% %% %% %% ",
    "%% %% %% %% '' %% %% 00 # #%'!# #%'!# #%'!# #%'!# #Q!`#!'[$ ## ## ## )8 ojU!qS9z].$pd+ $[S, $v8 $zj( $V[) $wd! $fV5 $  $ss3 $w]0 ${Z1 $qM $s",
    "X# $oW& $n^# $ip! $w2 $V0 $az! $lr+ $[F $kM $aE $]V% $z_$ $QW# $[S5 $_[! $R|& $ot! $aS& $cR' $_b2 $pp% $}h& $wK $Zs+ $bw( $dk! $[e, $eT# $|k",
    "! $bc! $^i( $rg2 ${: $U/ $nh% ${h! $av! $SZ! $j^# $gh! $v$ $Xz! $b`# $ZS! ${> $we+ $u, $}Q! $Tj! $^w$ $my# $o|% $fm. $zi! $Rd( $wQ! $hj$ $yl",
    "! $YR& $Vk# $tp1 $]K $te$ $}M $r/ $qj$ $r- $|S' $oR3 $Zj- $Vu- $B $oX, $`L $ij! $oo% $ns# $|], $zu! $^`) $ca1 $ne$ $dR! $bz% $r7 $to) $Uk+ $",
    "Vd, $SQ% $`e% $vs( $aw! $[}& $pe, $cW! $kr( $Ua$ $kl! $}u( $WT+ $}x) $hc# $}R) $sy( $Xg% $ft+ $SB $]% $gr& $TW& ${b! $dU# $hs! $Ty1 $u0 $S_!",
    " $]b! $zq! $_k# $a_# $cY( $zX! $hR! $e# $|[5 $fT& $bX! $oS+ $pa. $bF $}% $l@ $xn# $e: $}G $t_! $bR! $Z> $dq$ $[k# $hv# $xF $uf2 $Z' $z9 $ST(",
    " $uR' $p7 $ZT- $`/ $TK $^S# $eX% ${Y# $Q[+ $|Q# $T[! $s6 $U= $w{% $V) $`v# $n( $Pi% $VY! $n$ $[+ $e`4 $dn, $`S' $S]! $jl/ $vm% $g< $Ru# $l$ ",
    "$ca# $XU! $q|! $oU! $jq$ $wy# $du$ $rc0 $VR. $mT3 $_^& $`& $a`! $d1 $ra! ${0 ${E $wW! $oy' $V{3 $mZ% ${Y/ $ws3 $U]$ $`[% $_c) $uQ. $l5 $nq! ",
    "$Vy# $Xw) $u]3 $l7 $wT# $Ve# $P0 $b1 $ZS! $Uu! $W7 $Ud# $Za# $G $f[# $x]! $iT3 $o{' $tq' $zg( $nB $tb% $jY% $yd! $|; $Uz/ $kj! $wS& $zt! $t$",
    " $e2 $qf# $f: $_s' $c_1 $y[/ $_b. $[# $lX$ $hR! $|j' $Rd) $Ze% $|l! $U[, $xr! $`i$ $VZ$ $Qu, $dd$ $YV! (l@ &ej$ (YY& $wc) $[L $v= $h! $0 $x!",
    " $uh( $jq' $TE &Rl! &rZ! (r_! $s) +cP# $< $|! $rV! $Q[$ $if! $Y|3 $z/ $i% $y2 $Y! $w% $V< $o% $a% $}6 $m% $gM $6 $YR! $d+ $p! $e% $]I $i' $t",
    "( $Z8 $][! $[( $r- $V< $c) $a8 $eU! $p( $8 $! $2 $. $0 $V# $# $z( $y# $X0 $S; $M $g# $j/ $i' $p7 $Z' $  $[7 $rX! $|& $V2 $g# $Z4 $a# $gA $t&",
    " $xo! $m. $o# $jT0 $f}p# $rfh# (PV/ $gK $c$ $o7 $V6 $m# $i0 $]# $PA $X$ $Q$ $[$ $T> $|$ $e' $C $P. $u) $pL $0 $c' $Q$ $^/ $[& $T$ $|& $Q# $g",
    "' ${# $t3 $z$ $c# $j- $q. $[( $) $m# $SR! $y# $b3 $Z4 $B $x$ $Y- ${0 $uj! ${a! $d& $f& $i0 $m' $a# $R, $% $l( $E $U! $v$ $5 $l3 $j7 $R. $_) ",
    "$|+ $u' $o0 $w) $jH $}' $]K $]6 $S$ $C $Y/ $i# $}! $c# $& $D $b$ $l$ $}2 $y: $|/ $U/ $v+ $tP! $k% $U& $z& $l! $: $V# $_C $nV! $v]Y# $- $lz# ",
    "$xfv# $}U! $f! ${P}# $tn# $}k) $`[p# $`$ R$vwIyd!&U!'936$ #$vQb!!$ #$zRb!7$ #$ )$# $# $# $# $# $# &% $# $# $# $# &% &% $# &% $# &% $# $# $# ",
    "$# $L&$(.$6 $4 _b&idg!ngg!%% A6 v&Z'w%## P:p9t9# U!_2e2t1# 5% <Y-`-s,## zdR!odR!reR!$# $04$ #$ #$ #$ #y$P%;$# $#4$# $!#$# {bn!v|W#kol#$+ $4 ",
    "$|{d# $Xod# $f$ $< $W$ $`& $b! $f$ $R! $rU( $lql# $Zfe# $0 $C $I $oVe# $ocl# $_[( $p! $tWe# $_We# $< $`C $qC $4 $foZ$ $llZ$ $> $ia( $Rd( $8 ",
    "$|! $, $^d( $xg( $% $Y! $O $8 $# $E $Z# $2 $4 $U! $6 $% $  $  $Wze# $wk^# ${Z( $M $qUf# $WUf# $. $M $s' $h% $C $d! $k# $r$ $W! $}# $C $f! $ ",
    " $M $G $2 $A $U1 $S. $V. $t) $j! $`U! $ir! $t. $p! $U! $s& $d( $! $f& $Z_g# $T[g# $, $A $K $2 $w# $Zkg# ${# $Phg# $T# $: $g$ $_' $i|) $> $VU",
    "+ $c# $  $myg# $psg# $M $A $: $hRh# $|Qh# $0 $jH $^G $r[+ $h_+ $> $n$ $[# $glh# $bdh# $gdh# $jbh# $& $E $g% $# $zh+ $Vj+ $z! $M $|! $nl+ $Yo",
    "r# $Qnr# $on+ $' $' $K $Pw[$ $ot[$ $Q`i# $  $nf`# $ru) $  $bp+ $gzv# $]z- $gSy# $4 $br+ $gt+ $]# $6 $h! $R' $xz+ $_! $S}+ $awi# $Sui# $r& $)",
    " $% $$ $R# $K $l! $= $8 $T# $K $) $W! $8 ${# $r$ $j! $h& $[Zj# $S[j# $x# $u% $Y! $_% $w^j# $S[j# $U% $Z! ${f, $go, $M $b! $o! $`m, $|v, $^! ",
    "$R|j# $rvj# $_. $s( $az, $k}, $_P- $k! $Rr& $' $pc& $d% $kk' $Sb1 $}y) $) $. $q# $7 $sck# $uiv# $g^- $X& $U+ $]# $q]k# $^]k# $z% $y, $]g- $`",
    "i- $_% $W$ $e) $j^k# $][k# $Qv- $Wy- $Upk# $vmk# $Py- $az- $P# $Y! $# $xPl# $qe( $kj( $W}k# $Xdl# $V_l# $> $h% $t( $t! $i# $b# $t! $A $< $qY",
    "l# $^^l# $W- $u# $Ue. $]i. $( $r_l# $xhl# $k2 $k^l# $V# $t[l# $U& $X! $& $ts. $yu. $]# $- $c# $|[]# $XU]# $Pll# $Uhl# $qvl# $fpl# $< $Y! $l[",
    "m# $eYm# $M $zfm# $z+ $mfm# $E $ia/ $qb/ $Wb/ $  $bi/ $M $M $K $S$ $tj/ $un/ $rTn# $jSn# $oWn# $dUn# $t[c# $nTc# $Vrn# $Q! $Z' $nj|# $: $yx/",
    " $Qwn# $! $r! $W! $}wn# $# $  $z! $hz/ $d}/ $v|/ $j$ $lb}# $m^o# $s# $w# $UV0 $`v}# $Rjo# $Zoo# $z! $kno# $T% $g`0 $^d0 $6 $, $|Vp# $^/ $  $",
    "W^p# $mb0 $b{P$ $U`p# $' $qj0 $YUQ$ $o]p# $Uq0 $Ur0 $+ $^! $RPq# $myp# $[s0 $qw0 $m# $}# $Q{0 $l]R$ $b! $_]R$ $vcR$ $oYq# $X_q# $|]q# $g% $8",
    " $_kq# $[$ $gjq# $dpq# $poq# $k|d# $U^t# $gb1 $l$ $oc1 $_f1 $dr+ $qq{# $> $VX/ $4 $emd# $' $sd$ $kP5 $Uq1 $- $G $VU. $RV. $% $6 $v! $Xfr# $Y",
    "fr# $g# $U$ $^$ $U' $w' $x! $}% $i- $^& $% $C $afr# $r/ $n' $pfT$ $lU2 $% $j! $mSt# $VPt# $mvr# $TQU$ $) $wVU$ $w. $ZdU$ $ac2 $: $8 $% $w# $",
    "e! $|& ${! $q' $k$ $}# $Y! $_l2 $bp2 $d! $]p2 $ht2 $' $uys# $mts# $0 $dw2 $px2 $h^7 $im[$ $X) $s[W$ $4 $|V3 $d$ $}' $Q+ $Sgt# $Zct# $O $P% $",
    "T% ${vt# $wUA $_mU# $@ $_# $buU# $ZkU# $e% $gSv# $Y! $Ysu# $V% $d! ${{u# $f{u# $o. $S( $# $S% ${2 $[! $Ycv# $jQv# $[Y5 $Z[5 $jav# $Wi[$ $id5",
    " $]d0 $jh0 $o|v# $f+ $xj]$ $2 $uj5 $tfw# $y}]$ $VV^$ $Skw# $  $`! $jvw# $_nw# $wm5 $Qq5 $l& $Y! $o# $ks5 $mh_$ $rfx# $d/ $c) $^]6 $b! $n`6 $",
    "V_y# $]n`$ $rp`$ $t- $v& $Rdy# $Sk6 $wm6 $, $0 $6 $0 $n! $eWz# ",
    NULL};

/* Compatibility decompositions: gap, (length - 1) * 2 + step of the first part, parts - 1, differences of the parts. */
static const char *const llmi_compat_text[] = {
    "j$  d!( ! gE!  y#% !x#(#$ G  !H&   SL# !RLp!   E   s#! #r#[a(_#  #  $  #% %j# !OuS)  !d!d!- !]!d$  !d! ) !_<Z$X!  };h! #S#JaC  # d!   #d!   ",
    " !R!U#  ! d!  !d!   !_!c!  ! d!  !d! G !w!B  ! d!  !d! X%  )   o8   j8   2   S9   %   .   X9   %B !{$}>  ! #  ! '  ! `!  ! m!  ! 2#  r;   `8",
    "   0   ,   R:_$ !{=k#+ ! P$o!  mK   .   H#  f!   -;  - $ 0!  w!   ^!$  Fv) !P6g>]& !m)s,  !f!   !n&   !i& |N !WQ#T|!v# !p&p&K !g!T!  ! 2Q!  ",
    "]%a# #d([+pV$! ##  k)  Y/_i!  zX%   z&   w&!$ %   m0 1 h0!  #   s6   p6   % $ %   %   6 $ P8   pr'   oZ( $ %   Z8 $ %   [8!  )   %   x+   s+",
    "   j7 $ es'   }Z( $ )   R[(   ir'   d8   a[( & id' $ G   ^I   4 $ ' $ uG   > $ ,/  [&E  u7   }7   V8   w1   X2   ^8   e8   %   ) & '   |v'  ",
    " ot'   U#   ]w'   Qu'   Q#   ! ( %   ' $ 6   k+ $ x+   _q' $ [q'   i9 & r9   S/w% !}HfY$e' !x#t$! !    ! T#a! ! Q#$2  '  bS)& !aS)b!.  >  ! ",
    "`E  #  ^x$)  =$ !yT)]T)  #  ]T)! !''  #  '% !|T)|T)! !!yC) !b!iB  ! _!  !_!`!/ $wT)hS)&_V)(  xT)2  C   i##- `#   =   rj)   zi) $ L   S$ 5 r#",
    "   =   rj)   zi) $ L!  g#   )   6   4   b7   S8 ( '   % $ '- !g!XQ){! #AP$yQ)  #  C   _!  !w%K! #c$J(  #  .   b/! !{+Q!   Z$ % a!   d!   g) ",
    "# w+   '   d!!  _!  ! v!#& % #  # !#g!  ##1u!  ! 2!  .$   $$ R!!  h! $ c!!  0   h! ( Ya!   ka!! #i!9:   jJ   ;   c!   <   ap(%  ji) $ d! $ )",
    "' #h#ZT)e!  #  %  $  1WT) $#  % (#! %  #& #  #)    #( %  #%    #%    #%    !-    S!  ! wS)  #  E  ! <   <  ! ;  #     $   U!  !;A   A  ! @  ",
    "#      9 $ 3   4   [!  ! d!  #  d!  ! <   <  ! ;  #     $   d!  !;A   A  ! @  #      9 $ 3   4+ #p#eR)b#l$ !mk)n7  #  gk)! !''  #  'd.3 pk) ",
    " !1rk)  ! #  ! #  ! #  ! #  ! #  ! #  ! #  ! #  ! #  !#3  #5#Rl)  # #   # #   # #   # #   # #   # #   # #   # #   $ 10v#  $  #   $  #   $  #",
    "   $  #   $  #   $  #   $  #   $  #   $  #   $ #3  3!4(  #1%$  # #   # #   # #   # #   # #   # #   # #   # #   # #   ##3   #5X#+  # #   # # ",
    "  # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #  V",
    "! U! V! 0   ]$X@ $mk)`h){k){k)^# #Wk)Wk)Qk)  !''  #   g-  P#   Ja&  gb-r'  Zt1w!  lT/.  nm6   t!   >   4   W!   |!   0   K   W!   o>   p!   ",
    ".   Q!   K   M   a#   M   8   y'   X%   [!   ,   `!   4   Y!   <   U!   _#   G   Y!   lD   Y$   e6   Q!   2   8   G   b$   Y7   V#   `&   Q!",
    "   I   O   c#   '   T2   6   :   <   W&   2   ,   Y&   6   <   2   q#   E   G   j$   v;   R#   M   yC   ,   p$   C   <   M   r!   ,   x-   S",
    "!   d!   WP!   {#   Q!   k#   S!   4   0   _#   ,   d!   |R!   x5   :   ,   )   2   G   %   l$   l+   ,   S1   6   Z#   0   4   2   R%   0  ",
    " V,   0   X#   E   T#   i,   0   E   i0   l&   .   T)   x$   R#   u2   z&   h;   Y!   i#   ]#   Q$   8   .   f!   b$   6   b1   0   4   4   ",
    "C   A   )   h$   )   .   lN   `!   w6   :   Q!   k.   <   W$   R#   Y;   A   A   j!   n!   w)   :   }#   Q-   b!   ^+   M   ,   t+   X)   j&",
    "   .   ,   hL   4   {'   w'   '   T#   o%   <   )   0   a%   h!   .   >   d(   ]#   )   V)   '   I   Y-   V#   0   U$   6   '   6   `!   j3 ",
    "  t3   6   p!   O   2   6   )   t!   )   E   ,   <   Y!   A   2   m#   A   )M  r_KX!  hU.!  _y) $ 'V# !}P7ZZ.  ! ## !sZ.BU# !z!s#T!$ nP)   h",
    "(   e( $ j( & i( - l(   x' & J   U! 5 R! L h$   L $ a$ $ z(   )   %   ,   )   %   b)   k)   % $ l)   % $ %   )   % + %   '   )   6   0   , $",
    " `( & x' $ z!   ' $ 4   %   6   '$  y[1   Z'   u&   aZ#   ^Z#   j!   g!   fy+   }u+   v#   R!   {u#   d8   [V#V# #{w5kQ)J  # %   # #   # %  ",
    " # #   # #   # %   # %   # #   # %   # #   # #   # #   # #   $ Fz`%zk)  $ %    $ #    $ %    $ #    $ #    $ %    $ %    $ #    $ %    $ #  ",
    "  $ #    $ #    $ #    $ -<   ' !+V]%zb%Qf%v!  &   .4Xd%! # jc1[a%  # Z'   # u&   # aZ#   # WT#   # cC   # vI   # sI   # rE   # nZ!   # QP& ",
    "  # ua#   # {R!   # c]!   # bt,   # uv0   # Tr$   # v;   # v.   # Wl%   # Vc+   # Vp(   # ll'   # Xx%   # ws+   # cN   # pc!   # or!   # s{'",
    "   # sS,   # wl1   # mh0   # fm+   # {p,   # iw.   # 4    wh7   c_#   Vt!   oj&) #[WBtsC[!  !_!i!  ! #  ! #  ! #  ! #  ! #  ! #  ! #  ! #  !",
    "#3  ! #  ! #  ! #  ! #  ! #   W[% $ % & %   % $ % + %  !Fb`% $!%  &!%   !%  $!%  +!%   %( gc%F+  $$<m(W&  !! !  jc1   Z'   u&   aZ#   WT#   ",
    "cC   vI   sI   rE   nZ!   QP&   ua#   {R!   c]!   bt,   uv0   Tr$   v;   v.   Wl%   Vc+   Vp(   ll'   Xx%   ws+   `y+   nW!   yP(   `y/   k}",
    "1   x;   td'   iy,   Qe4   u>   dh'   yc(   j!   g!   cP%   Xh#   W)   UU#   W#   s{'   sS,   wl1   mh0   te!  !kf8y`%  ! #  ! #  ! #  !#3  ",
    "! #  ! #  ! #  ! #  ! #  ! #  ! #  ! #  ! #  !#3 3!(VP<  #1UP<ar7  # #   # #   !Q!a#  #^!8o{;  ! Z!  #T!$i!   |Y.   %   %   % $ %   %   %   ",
    "%   %   %   %   %   %   %   %   %   '   %   % - %   '   '   '   ' + '   %   % - % ( %! %i$l[.|Y.s|({z(  $ [!m#Q%  % 2'/o!  # 4I  %%W#2M3  # ",
    "t!Y#  #%]$Z#  &%CP$d$T#U[.  $ }#(   #%3>  # 4r!  ##y$6  $ S$q!^#  $ )r!_#  $ q$'3  $  .L  $% X$R$  $  d!c%  $ b$b!   & a$#p#S#c%  ! r$  &  n",
    "#o!j$Z!  &  Z#c%e!8  %  >h#   $%q$-^!  &     2  & n$Q#V$k!-  $ %y#_#  #%A|#  #%DE  $ EE[#  $%y${!l$  % h$GEo#  %%3Z#c$V$  #)4Y#  #  0  $)}$_",
    "#6  #0 R$  #% _#  ! P%  !%m!  #)7i!  ##a!(  & 5g#%P%m!  $   4  % ! t!1  &'#}$[#i!j!  $  <Z#  #  )  # !g#  &'2$s! m$  $ %I,  & 5h#De!n$  # j$",
    "V#  %'j#^#S$Q$  # L$  $  >w!  # l$/  $ k$T#T!  %  4$m$  $ ! 2  %'#y$_#T#  $ !W$y!  ! P%  % {$2 S#  # a%1  #  2  $'y$P$n!  #  o#  # b!Z!  # t",
    "!c!  % 22-P%  $#P$c#:  ! m#  &  _!}$4   #%t#b#  %   T#3  $ l$T#j!  $'  m$  #  j!  #%}$2  $)f!y!n$  ! p!  $#P!Q#E  % x!m#b%1  !#Z!  & I;S!m$2",
    "  #'U#  5!l_.rW2  #1be>hW2  # #   # #   # #   # #   # #   # #   # #   # #   # #   ##3   # #   # #   # #   # #   #c#[!Yc>  !(E  !i!9  #f!:E  ",
    "!<7  !#<  !96  #  v#  #  #  !X!R!  !bu9|p:  !z{!sc$  !W^$xs&  !u[$^1  $P:ie$r{5f`4  !WZ<n|9  !$   !lH   !mH   !$   !c!#  !%   !-   #[!b!Xy5 ",
    " $2%7niA  !,]!  !$   !lH   ! f!  !mH   !$   !i!I  #j!Y#U!  #_!    #-    #<    !sIl!  !mH   !3   !0   !+#  !2   !lH   !mH   !5   !2   #% X$  ",
    "#5    !6l#  #$m#   #% #  #5    !6j#  #$k#   #%{g)w#  $   j#  !]!eh)  #Y!DF  #_!    #-    #z!E'  %   jj)uW.  &     p_.  !$G  !$   !lH   !mH  ",
    " !']!  !$   !lH   !mH   !$   !_!   !j!#  !$   !lH   !mH   !$   !_!   !`!tH  !_!   $KkJ4qj)  !a!}#  !f!=  ! #  $c!`h)$i#  # vg)p#  !f!}!  !]!",
    "e#  !f!R!  !c!D  !f!`!  !_!i!  ! %  !d!r!  !#/  ! #  # #i#  ! 4  !#N  # 0,  # .   !]!q!  $d!V!#h#  #c!h!c!  ! %  !j!d!  !c!)  !)J  #!dh)d!  ",
    "#L   3!BjV3  #1Xq;gn;  # #   # #   # #   # #   # #   # #   # #   # #   # #   ##3   # #   # #   # #   # #   # #   # #   # #   # #   # #   ##3",
    "   # #   #_#V#hn;Pg0  ZO   %o%  V[LP$  {QM   P#[5  szL   ZQ!   hoM   rpM}R, !pYN,  ! '  ! '  # -&  #  ' #!<>. !{[!}[!  ! D  ! .  !68  !53)  ",
    "y%   F $ ' & 0   8   %   ae!H !Zd!{% # W( ' 6 ' ' ' % ' - ' , ' - ' z! ' % ' g! ' ! ' ' ' # # . # ! # % # - # C # / ' S! ' . ' ) ' $ # 4 ' #",
    " #!W!`& ' J ' & # K #!  D' m! # W! # ! # %  !!d! # ) # - # ) ' 0 # }& ###c!Ye! ##  r( ##  [' ##  n& ##  ! ##  % %#  2 %#  }& ' t&  #s& ]!  #",
    "  #  #  S!  #  )  #  #  !g!s!  ! #  ! #  ! Q!  ! )  ! #  !%_!  ! #  ! #  ! Q!  ! )  ! #  !#_!  ! U!  ! )  ! #  !#]!  ! S!  !#T!  ! U!  !#T! ",
    " ! #  ! S!  !,T!  ! #  ! #  ! Q!  !%R!  ! S!  !#T!  ! #  ! #  ! Q!  !#R! $! S!  !#T!  ! U!  !#T!  ! U!  !0T!  ! #  ! #  ! Q!  ! )  ! #  !#]!",
    "  ! S!  ! )  ! #  !#i!  ! ,  ! #  ! #  ! O  ! #  ! )  ! #  !#_!  ! #  ! #  ! Q!  ! )  ! #  !#_!  ! #  ! #  ! Q!  ! )  ! #  !#_!  ! #  ! #  !",
    " Q!  ! )  ! #  !#_!  ! U!  ! )  ! #  !'_!  ! #  ! #  ! Q!  ! )  ! # $!V!p!  !S!   #Sj!k!0  # #   # #   # #   # #   # #b!  #Vj!'t#  #  #  #  ",
    "I  #  #  #  '  #  #  !g!i!  ! #  ! I  ! #  ! '  ! #  !%T!  ! #  ! I  ! #  ! '  ! #  !#T!  ! #  ! I  ! #  ! '  ! #  !O!  ! #  !#!  ! #  !#i! ",
    " ! ^!  ! #  ! )  ! #  !#+  ! )  ! #  !#i!  ! `!  !#J  ! #  ! I  ! #  ! '  ! #  !'p!  !#t#  ! #  ! I  ! #  ! '  ! #  # 6_!  #  #  #  #  #  Q!",
    "  #  %  !g!s!  ! #  ! #  ! Q!  ! %  !%X!  ! #  ! #  ! Q!  ! %  !#$  !#R!  ! S!  !#T!  ! U!  !#T!  ! U!  !,T!  ! #  ! #  ! Q!  !%R!  ! #  ! Q",
    "!  !#T!  ! #  ! #  ! Q!  !#R!  !#S!  !#T!  ! U!  !#T!  ! U!  !0T!  ! #  ! #  ! Q!  !#R!  ! S!  !#T!  ! #  ! #  ! O  ! #  !#T!  ! #  ! #  ! Q",
    "!  ! %  !#X!  ! #  ! #  ! Q!  !#T!  ! #  ! #  ! Q!  ! %  !#X!  ! U!  ! z!  !'P$  ! #  ! #  ! Q!  ! %  # <$  #  %  !g!@  ! %  !%$  ! %  !#$  ",
    "! %  !2$  ! %  !#$  ! %  !A& $! #  !%   ! %  !)$  ! %  #506  # #   # #   !3/  ! #  !%!  ! #  !#!  ! #  !/!  ! #  !#!  ! #  !/!  ! #  !!!  ! ",
    "#  !%!  ! #  !0!  ! #  !#!  ! #  !$_!  ! #  ! #  ! Q!  ! J  !!  $!%   !#S!  ! #  !%!  ! #  !#!  ! #  !/!  ! #  !#!  ! #  !/!  ! #  !!!  ! # ",
    " !%!  ! #  !0!  ! #  !#!  ! #  !$_!  ! #  ! #  ! Q!  ! J  !!  $!%   !$+  ! #  ! #  ! Q! $!!%  !'$  !(T!  ! #  ! #  !#$  ! #  ! # $!'Q! #!D.4",
    " #'a!9 ## #T!  #  U!  # #   # Q!T!  #  #  #  # ##% !  ## ^!  #  !  #.R!]!  # !#  #  [! ## U!Z!  #  ! ##  U! ##%R!R!  # S!S! ##!R!   # !, ## ",
    "U!Z! ##  Q!  #%R!) ## #( ###Q!R!  #  S!  #  ,  #%T!+ ## U!   #  )  ## (  #  ,  #  ! ##0P!(  ##Q!R!  #  S!  #%R!   #  ,  #  ! ## !]! ## %U! #",
    "# Q!R!  ##R!!  #  U!  #  ,  # !]!  #  S!  # %T!  #  U!# # $P!  #%U!$  #  U!  #!R!   #  ) ## !(  #  )  # U!#  #  ! ##) (  #g!P!,  #%$   #  ! ",
    " # %#  #  !  # Q!#  #  !  #% #  # R!!  # S!   #0P!   #%!#  #!    #%    #>!   # U!   #.R!   # !   # U!   #+    #&    #)R!   #(S!]!  #%R!S!  #",
    "7S!,  #6    #'T!]!  #!%^!  #!$+  #!U!   ##T!   #% R!  #V!#^!  ##!   #S!    #(U!   #T!R!   #Y!S!+  #5T!   #(U!   #$P!,  #I$ K #DS!R'  #<    $",
    "X! ^'bi!  $ !Z!N  $`!N^!$  $BQ!9O  $(DA!  $2E%'  $AD-$  #HE,  3   yi!yd!Si!fi!dk!d!uj!^k!jk!dk!d!fk!ij!^k!`k!  (3 Sj!uh!^!]!    $,R'kh!S!5  ",
    "fh! $ ZT. $ mS.   V!   `! $ _T.  #TU.]o!{g!8 !     {R)   ! # pP) $ d#   n$   % $ fQ. $ + $ / $ & ( '#  rR.   % '!p#_C % u#   [#   ZT.   UT.!",
    "  <   !   ,   _!   hS) $ XS)   n$   % $ fQ.   gU.   ' $ )   %   A   %   !!  b! $ f#   Y!% !c![H  !pi!   !oi!#! ! #! ! #  !pi!   !oi!#  !pi! ",
    "  !oi!#  !pi!   !oi!#  !pi!   !oi!#  !pi!    a! #!.# #! # #!f!  #!e!# '!j!! # i! ' # # # ' # ' # ' # ' # ' # # # # # # # # # ' # ' # ' # ' #",
    " ' # ' # ' # ' # ' 0 ' # ' # ' # ' # ' # ' # # # # # ' # ##-}!zi! ##  # ##  # #!  %W% ui! $ ua,   tm! $ 6   9   U-   3   k$   %   %   %   % ",
    "  k#   %   %   k!   i#   }$   %   %   % $ %   %   %   %   %   %   %   %   %   %   %   %   '   %   % - %   '   '   '   ' + '   %   % - %   % ",
    "  ) $ }$   ]y( $ [%   h(   e( $ j( & i( - l(   x' & J   U! 5 R!$- h$#- ##- ##& #$$ c[%   4  !Y'oF   |&   !   ]T)!  fT! ( XJ   TQ!   z!du<V! ",
    "Tg+ V! 0 V! h# / 0!F % V! h# V! 0   h#!$ %#  '#$ '#( '!1 % ( 0!  %!/ %!7 % V! h# V! 0 $ h#!( %#1 '!/ %!V! 2 $ h#!( %!+ %!  %$/ )!V! 2 V! h# ",
    "V! 0 V! h# V! 0 V! h# V! 0 V! h# V! 0 V! h# V! 0 V! h# V! 0   V)   n-#D b1   3 / 8   ho( T! Vo(   xm(   rn(   '   %   :   +   ! D S#   3 / 8",
    "   ho( T! Vo(   xm(   rn(   '   %   :   +   ! D S#   3 / 8   ho( T! Vo(   xm(   rn(   '   %   :   +   ! D S#   3 / 8   ho( T! Vo(   xm(   rn",
    "(   '   %   :   +   ! D S#   3 / 8   ho( T! Vo(   xm(   rn(   '   %   :   +   ! $ [!#5 uL 5 3 5 3 5 3 5 3Wt#$ fg!   )   '!  U!   N   +   6  ",
    " I ( /   H   .   2   9   <   D   ' $ 5   '   %   .   %   %   _#   b$   T!   Y#!  V$   )!  Y!#  V!!  ^! ( /   H   .   2   9   <!  = $ 5   '! ",
    " 2!  )'  =%  #!  ^!!  -!  %   H   .!  (   <!  =#  -!  2!  )!  p&!  _$!  V$   )!  Y!#  V!   6   I   /!$ %   H   .   2   9   <!  = $ 5   '!  2",
    "   %   %   _#!  ]#!$ c&   )   ' $ S!   N   +   6   I!& -   H   .   2   9   <   D   ' $ 5   '   %   .   %   %&  F   )   '!  U!   N   +   6   ",
    "I!& -   H   .   2   9   <   D   ' $ 5   '   %   .   %   %y. !ph![C 5! $& #DMYj!  # #   # #   # #   # #   # #   # #   # #   # #   # #   # #  ",
    " # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   # #   #[U./[U.   QT.   A  !@@  !KO!V! N  !F(  !,   !.F ",
    " ! A  #&&ZS.  !0;< !5   ! #G !3.f# !kX.XV.  !g#m%   %/  Xi.   Ts!   uy!  !fw)V!   sh(   To#   S`.   b_.   on#   Y{&   Yt#   Xz#   ix%   q`$ ",
    "  Zi$   UT&   p{%   yy,   jR#   v{&   fS/   mX!   jt'   WW$   i)   pb&   4   vr2   _r.   x|$   pe!   ju$   iq,   hy,   rw&   S-   cq+   Wp' ",
    "  zx!   !   Yk$   ct)   WH   PS1% #Wk:{t/[S.  # }`'   # v&   # t]$   # Sa&   # um$   # dX&   # _T+   # Zo% (  kP.   l{#",
    NULL};

/* Lower case: gap, (length - 1) * 2 + (every second one only), difference. */
static const char *const llmi_lower_text[] = {
    "e!U!d![#Od!!.d!DR!#$&##1##P!#! a& &#$ `+ $#! W+  #!#U+  ## h$  })  Q+  #! U+  Y+! b+  ^+  #$ b+  f+! h+ &#! p+  #! p+# #! p+  #!#n+ $#! r+  ",
    "#$ #( %  #! %  #! % 3##3## % $#! ^%  f# J#! s&!3#( tn,  #! Z(  nn,# #! n)  S$  W$ +#d'$#$ #) W&' p!!%n!! w#!#u#!Cd!!2d!F 2)9#& n## #! /  ##%",
    "s& Aj$ b!d!S!D#+X!#! A /##U###n!V#Yd!n!wW(! wW(& wW(R2h$^bI ,2tS! #'x!o|##%o|#U(_$#+ dh(!U##+01),1,01)01),1-(1)01:01)01)01)#1 #]$  3-'u$  3-",
    "#1 #d%.#1 #|%  /-#o& #k&  3l' Sd($ j])  XW)' [!P!AC5 #X4U!W!yKT#V#S! #! el,  gs$  rk,#&#! Tn,  ql,  Zn,  Xn,! ## #)#no, Y##)$#% #S`1P!#5=#P$",
    "/#$a!#,$#! ^yE +#% #! TsL#$#$5#! `tL  vtL  ntL  YtL  `tL! UrL  XsL  [rL  [L 1#! U#  ^tL  l{E $#! yuL 1#! kQM: #yP-U!d!V=r!t!Q$j!t!f$6r!!>r!!",
    ".r!!#r!`JZ#w#g$Md!xc!b!d!cu,b!d!d!S!Y!me1f!h!",
    NULL};

/* Marks newer than Unicode 9, and letters that were marks: gap, length. */
static const char *const llmi_new_marks_text[] = {
    "eP!!c$+M,m'!k&'y!!x$!Z!!R%!.!^!#h!!{'!5!SR!!i&!]12W.#$!n&&Wf3!o%!pn.%e!&R(#s!%j!-T!%Y&!##q!!y##y#!%#h#!i&!s#+!!#!!%!&!!0#r#!m71e&'!##%!!!#V$",
    "(#($!>,K(!%)!+-Q!2r0'$!!#!(!!f!&!#!&q(%+#!!S!($&9!xm#!'1sn&4`t!!R!+R#!-#sP.Q!#9_X#!j$(`)!a!%^-%n&#",
    NULL};

/* Order as in the generator; PAIRS: upper and lower case letters in turn. */
enum {
    LLMI_CLASS_OTHER, LLMI_CLASS_LU, LLMI_CLASS_LL, LLMI_CLASS_LT, LLMI_CLASS_LM, LLMI_CLASS_LO, LLMI_CLASS_M, LLMI_CLASS_ND, LLMI_CLASS_NL,
    LLMI_CLASS_NO, LLMI_CLASS_PC, LLMI_CLASS_P, LLMI_CLASS_S, LLMI_CLASS_PAIRS
};
#define LLMI_CLASS_END 0x32400u /* code points with a class of their own, but for U+E0100..E01EF */
#define LLMI_CCC_END 0x2fa20u   /* no combining class and no decomposition from here on */
#define LLMI_DECOMPOSITIONS 2200
#define LLMI_COMPAT_RUNS 2200
#define LLMI_COMPAT_PARTS 4200
#define LLMI_LONGEST_COMPAT 18  /* U+FDFA */
#define LLMI_LOWER_RUNS 250
#define LLMI_NOT_INERT 255      /* in the table of combining classes: class 0, but normalization may change it */

/* What a character means to normalization: U+11382 U+113C9 -> `whole`, never recomposed when `excluded`. */
typedef struct llmi_pair { uint32_t whole, first, second; int32_t excluded; } llmi_pair;

/* Characters first, first + step, ..: what becomes of them. */
typedef struct llmi_char_run { uint32_t first, last, step; int32_t at, parts; } llmi_char_run;

typedef struct llmi_unicode {
    uint8_t *classes;     /* [LLMI_CLASS_END] */
    uint8_t *ccc;         /* [LLMI_CCC_END]; NULL when the tokenizer does not normalize */
    llmi_pair *pairs;     /* sorted by `whole` */
    int32_t pair_count;
    uint16_t *compose;    /* hash of (first, second) -> index of the pair + 1, open addressing */
    llmi_char_run *compat; /* parts [at, at + parts); `step` is added to the first part; NULL when no normalizer needs it */
    int32_t *compat_parts;
    llmi_char_run *lower;  /* every `step`-th character has a lower case at distance `at` */
    int32_t compat_count, lower_count;
} llmi_unicode;

#define LLMI_COMPOSE_MASK 4095u

/* ---- unpacking ---- */

typedef struct llmi_packed { const char *const *rows; const char *at; } llmi_packed;

/* Index of the next character in the generator's alphabet, which skips four that mean something to C; -1 at the end. */
static int llmi_packed_next(llmi_packed *p)
{
    if (!*p->at) {
        if (!*p->rows || !p->rows[1]) return -1;
        p->at = *++p->rows;
    }
    int c = *p->at++;
    return c - 0x20 - (c > '"') - (c > '*') - (c > '?') - (c > '\\');
}

/* A number in base 45, low digit first; digits of 45 and above say that more follow. */
static uint32_t llmi_packed_number(llmi_packed *p)
{
    uint32_t v = 0, unit = 1;
    for (;;) {
        int d = llmi_packed_next(p);
        if (d < 45) return v + (d < 0 ? 0 : (uint32_t)d * unit);
        v += (uint32_t)(d - 45) * unit;
        unit *= 45;
    }
}

/* The last value plus a difference, written with its sign in the lowest bit. */
static uint32_t llmi_packed_signed(llmi_packed *p, uint32_t last)
{
    uint32_t v = llmi_packed_number(p);
    return last + (v & 1 ? 0u - (v + 1) / 2 : v / 2);
}

/* Expand the runs into one class per character: 205 kB that make a lookup one load. 0: out of memory. */
static int llmi_unicode_make(llmi_unicode *u, llmi_arena *r)
{
    llmi_packed p = {llmi_class_text, llmi_class_text[0]};
    memset(u, 0, sizeof *u);
    u->classes = (uint8_t *)llmi_take(r, LLMI_CLASS_END, 1);
    if (!u->classes) return 0;
    for (uint32_t c = 0; c < LLMI_CLASS_END;) {
        int code = llmi_packed_next(&p), kind = code / 6;
        if (code < 0) break;
        uint32_t n = code % 6 < 5 ? (uint32_t)(code % 6) + 1 : llmi_packed_number(&p) + 6;
        if (kind == LLMI_CLASS_PAIRS) n *= 2;
        for (uint32_t i = 0; i < n && c < LLMI_CLASS_END; i++, c++)
            u->classes[c] = (uint8_t)(kind != LLMI_CLASS_PAIRS ? kind : i % 2 ? LLMI_CLASS_LL : LLMI_CLASS_LU);
    }
    return 1;
}

/* Where the search for a pair begins. */
static uint32_t llmi_compose_hash(uint32_t first, uint32_t second)
{
    return (uint32_t)(llmi_fold((uint64_t)first << 32 | second, 0x9e3779b97f4a7c15u) >> 7) & LLMI_COMPOSE_MASK;
}

/* The list of decompositions, the hash of those that compose again, and the marks of all characters that are not inert:
   those that form C never keeps, and those that join what stands before them. */
static void llmi_unpack_pairs(llmi_unicode *u)
{
    llmi_packed p = {llmi_decomposition_text, llmi_decomposition_text[0]};
    llmi_pair d = {0, 0, 0, 0};
    while ((*p.at || p.rows[1]) && u->pair_count < LLMI_DECOMPOSITIONS) {
        uint32_t step = llmi_packed_number(&p);
        d.whole += step / 2;
        d.excluded = (int32_t)(step & 1);
        d.first = llmi_packed_signed(&p, d.first);
        d.second = llmi_packed_signed(&p, d.second);
        u->pairs[u->pair_count++] = d;
        if (d.excluded && u->ccc[d.whole] == 0) u->ccc[d.whole] = LLMI_NOT_INERT;
        if (d.excluded) continue;
        if (u->ccc[d.second] == 0) u->ccc[d.second] = LLMI_NOT_INERT;
        uint32_t i = llmi_compose_hash(d.first, d.second);
        while (u->compose[i]) i = (i + 1) & LLMI_COMPOSE_MASK;
        u->compose[i] = (uint16_t)u->pair_count;
    }
}

/* The tables of normalization; only tokenizers that ask for it pay for them. */
static int llmi_unicode_normalization(llmi_unicode *u, llmi_arena *r)
{
    if (u->ccc) return 1;
    llmi_packed p = {llmi_ccc_text, llmi_ccc_text[0]};
    u->pairs = (llmi_pair *)llmi_take(r, LLMI_DECOMPOSITIONS, sizeof *u->pairs);
    u->compose = (uint16_t *)llmi_take(r, LLMI_COMPOSE_MASK + 1, sizeof *u->compose);
    u->ccc = (uint8_t *)llmi_take(r, LLMI_CCC_END, 1);
    if (!u->pairs || !u->compose || !u->ccc) return 0;
    for (uint32_t c = 0; *p.at || p.rows[1];) {
        c += llmi_packed_number(&p);
        uint32_t n = llmi_packed_number(&p), value = llmi_packed_number(&p);
        for (; n > 0 && c < LLMI_CCC_END; n--) u->ccc[c++] = (uint8_t)value;
    }
    for (uint32_t c = 0x1161; c <= 0x11c2; c++) u->ccc[c] = LLMI_NOT_INERT; /* Hangul vowels and tails join what is before */
    llmi_unpack_pairs(u);
    return 1;
}

/* The tables of the compatibility forms. 0: out of memory. */
static int llmi_unicode_compat(llmi_unicode *u, llmi_arena *r)
{
    if (u->compat) return 1;
    llmi_packed p = {llmi_compat_text, llmi_compat_text[0]};
    uint32_t last[LLMI_LONGEST_COMPAT] = {0}, at = 0;
    int32_t used = 0;
    llmi_char_run *run = (llmi_char_run *)llmi_take(r, LLMI_COMPAT_RUNS, sizeof *run);
    u->compat_parts = (int32_t *)llmi_take(r, LLMI_COMPAT_PARTS, sizeof *u->compat_parts);
    u->compat = run;
    if (!run || !u->compat_parts) return 0;
    for (; (*p.at || p.rows[1]) && u->compat_count < LLMI_COMPAT_RUNS; run++, u->compat_count++) {
        run->first = at + llmi_packed_number(&p);
        uint32_t more = llmi_packed_number(&p), n = llmi_packed_number(&p) + 1;
        run->step = more & 1;
        run->last = run->first + more / 2;
        run->at = used;
        if (n > LLMI_LONGEST_COMPAT || used + (int32_t)n > LLMI_COMPAT_PARTS) break;
        for (uint32_t i = 0; i < n; i++) u->compat_parts[used++] = (int32_t)(last[i] = llmi_packed_signed(&p, last[i]));
        last[0] += run->step * (more / 2);
        run->parts = (int32_t)n;
        at = run->last + 1;
    }
    return 1;
}

/* The table of lower case. 0: out of memory. */
static int llmi_unicode_lower(llmi_unicode *u, llmi_arena *r)
{
    if (u->lower) return 1;
    llmi_packed p = {llmi_lower_text, llmi_lower_text[0]};
    uint32_t at = 0;
    llmi_char_run *run = (llmi_char_run *)llmi_take(r, LLMI_LOWER_RUNS, sizeof *run);
    u->lower = run;
    if (!run) return 0;
    for (; (*p.at || p.rows[1]) && u->lower_count < LLMI_LOWER_RUNS; run++, u->lower_count++) {
        run->first = at + llmi_packed_number(&p);
        uint32_t more = llmi_packed_number(&p);
        run->step = 1 + (more & 1);
        run->last = run->first + more / 2 * run->step;
        run->at = (int32_t)llmi_packed_signed(&p, 0);
        at = run->last + 1;
    }
    return 1;
}

/* The run that a character is in, or NULL. */
static const llmi_char_run *llmi_find_run(const llmi_char_run *runs, int32_t count, uint32_t c)
{
    int32_t lo = 0, hi = count;
    while (lo < hi) {
        int32_t mid = (lo + hi) / 2;
        if (runs[mid].last < c) lo = mid + 1;
        else hi = mid;
    }
    return lo < count && runs[lo].first <= c ? &runs[lo] : NULL;
}

/* The class of any code point; beyond the table only the variation selectors have one. */
static int llmi_class(const llmi_unicode *u, uint32_t c)
{
    if (c < LLMI_CLASS_END) return u->classes[c];
    return c >= 0xe0100 && c <= 0xe01ef ? LLMI_CLASS_M : LLMI_CLASS_OTHER;
}

/* Unicode's White_Space: the same 25 characters for \s, for Rust's is_whitespace and for stripping. */
static int llmi_is_space(uint32_t c)
{
    if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13);
    return c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f
        || c == 0x3000;
}

#define LLMI_BIT(x) (1u << LLMI_CLASS_##x)
#define LLMI_LETTERS (LLMI_BIT(LU) | LLMI_BIT(LL) | LLMI_BIT(LT) | LLMI_BIT(LM) | LLMI_BIT(LO))
#define LLMI_NUMBERS (LLMI_BIT(ND) | LLMI_BIT(NL) | LLMI_BIT(NO))
#define LLMI_WORD (LLMI_LETTERS | LLMI_BIT(M) | LLMI_BIT(ND) | LLMI_BIT(NL) | LLMI_BIT(PC))
#define LLMI_EVERY ((1u << LLMI_CLASS_PAIRS) - 1)

/* Letters by property that have another class: circled and squared letters. */
static const uint32_t llmi_word_extra[] = {0x24b6, 0x24e9, 0x1f130, 0x1f149, 0x1f150, 0x1f169, 0x1f170, 0x1f189};

/* ---- normalization forms C and D (Unicode standard annex 15) ---- */

/* Canonical combining class; 0: a character that marks attach to. */
static int llmi_ccc(const llmi_unicode *u, uint32_t c)
{
    int v = c < LLMI_CCC_END ? u->ccc[c] : 0;
    return v == LLMI_NOT_INERT ? 0 : v;
}

/* Canonical decomposition of one character, at most 4; second parts never decompose further. Returns how many. */
static int llmi_decompose(const llmi_unicode *u, uint32_t c, int32_t out[8])
{
    uint32_t tail[8];
    int tails = 0, n = 0;
    if (c >= 0xac00 && c <= 0xd7a3) {
        uint32_t s = c - 0xac00;
        out[n++] = (int32_t)(0x1100 + s / 588);
        out[n++] = (int32_t)(0x1161 + s % 588 / 28);
        if (s % 28) out[n++] = (int32_t)(0x11a7 + s % 28);
        return n;
    }
    while (c >= 0xc0 && c < LLMI_CCC_END && tails < 6) {
        int32_t lo = 0, hi = u->pair_count;
        while (lo < hi) {
            int32_t mid = (lo + hi) / 2;
            if (u->pairs[mid].whole < c) lo = mid + 1;
            else hi = mid;
        }
        if (lo == u->pair_count || u->pairs[lo].whole != c) break;
        if (u->pairs[lo].second) tail[tails++] = u->pairs[lo].second;
        c = u->pairs[lo].first;
    }
    out[n++] = (int32_t)c;
    while (tails > 0) out[n++] = (int32_t)tail[--tails];
    return n;
}

/* The character made of two, or 0. */
static uint32_t llmi_compose(const llmi_unicode *u, uint32_t a, uint32_t b)
{
    if (a >= 0x1100 && a <= 0x1112 && b >= 0x1161 && b <= 0x1175) return 0xac00 + ((a - 0x1100) * 21 + b - 0x1161) * 28;
    if (a >= 0xac00 && a <= 0xd7a3 && (a - 0xac00) % 28 == 0 && b > 0x11a7 && b <= 0x11c2) return a + b - 0x11a7;
    for (uint32_t i = llmi_compose_hash(a, b); u->compose[i]; i = (i + 1) & LLMI_COMPOSE_MASK) {
        const llmi_pair *p = &u->pairs[u->compose[i] - 1];
        if (p->first == a && p->second == b) return p->whole;
    }
    return 0;
}

/* Sort a run of marks by combining class, stable: few by insertion, a hostile crowd by counting. 0: out of memory. */
static int llmi_order_marks(const llmi_unicode *u, int32_t *c, size_t n, const moq_allocator *a)
{
    if (n <= 16) {
        for (size_t i = 1; i < n; i++) {
            int32_t v = c[i];
            size_t j = i;
            for (; j > 0 && llmi_ccc(u, (uint32_t)c[j - 1]) > llmi_ccc(u, (uint32_t)v); j--) c[j] = c[j - 1];
            c[j] = v;
        }
        return 1;
    }
    size_t first[257] = {0};
    int32_t *copy = (int32_t *)moq_allocate(a, n * sizeof *copy);
    if (!copy) return 0;
    memcpy(copy, c, n * sizeof *copy);
    for (size_t i = 0; i < n; i++) first[llmi_ccc(u, (uint32_t)c[i]) + 1]++;
    for (int k = 0; k < 256; k++) first[k + 1] += first[k];
    for (size_t i = 0; i < n; i++) c[first[llmi_ccc(u, (uint32_t)copy[i])]++] = copy[i];
    moq_release(a, copy, n * sizeof *copy);
    return 1;
}

/* Join starters with what follows, in place; returns the new length. */
static size_t llmi_compose_all(const llmi_unicode *u, int32_t *c, size_t n)
{
    size_t used = 0, starter = n; /* n: none yet */
    int last = 0;
    for (size_t i = 0; i < n; i++) {
        int k = llmi_ccc(u, (uint32_t)c[i]);
        if (starter < used && (starter + 1 == used || (last != 0 && last < k))) {
            uint32_t whole = llmi_compose(u, (uint32_t)c[starter], (uint32_t)c[i]);
            if (whole) {
                c[starter] = (int32_t)whole;
                continue;
            }
        }
        if (k == 0) starter = used;
        last = k;
        c[used++] = c[i];
    }
    return used;
}

/* Is every character of a text one that neither form C nor a neighbour can change? */
static int llmi_is_inert(const llmi_unicode *u, const char *s, size_t n)
{
    for (size_t i = 0; i < n;) {
        uint32_t c;
        if ((uint8_t)s[i] < 0xcc) { i++; continue; } /* below U+0300, and the rest of characters already looked at */
        i += llmi_utf8_get(s + i, n - i, &c, NULL);
        if (c < LLMI_CCC_END && u->ccc[c]) return 0;
    }
    return 1;
}

/* Appends the decomposition of one character: canonical, or with `compat` full. 0: out of memory. */
static int llmi_add_decomposed(const llmi_unicode *u, uint32_t cp, int compat, llmi_ids *out)
{
    int32_t parts[8], more[LLMI_LONGEST_COMPAT];
    int n = llmi_decompose(u, cp, parts), ok = 1;
    if (!compat) return llmi_ids_add(out, parts, (size_t)n);
    for (int i = 0; i < n && ok; i++) {
        const llmi_char_run *run = llmi_find_run(u->compat, u->compat_count, (uint32_t)parts[i]);
        if (!run) { ok = llmi_ids_add(out, &parts[i], 1); continue; }
        memcpy(more, u->compat_parts + run->at, (size_t)run->parts * sizeof *more);
        if (run->step) more[0] += parts[i] - (int32_t)run->first;
        ok = llmi_ids_add(out, more, (size_t)run->parts);
    }
    return ok;
}

/* Is it ASCII, which no form changes? */
static int llmi_is_ascii(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if ((uint8_t)s[i] >= 0x80) return 0;
    return 1;
}

/* Appends form C (`compose`) or D of valid UTF-8, with `compat` KC or KD. 0: out of memory. */
static int llmi_normalize(const llmi_unicode *u, const char *s, size_t n, int compose, int compat, llmi_bytes *out)
{
    if (compat ? llmi_is_ascii(s, n) : compose && llmi_is_inert(u, s, n)) return llmi_bytes_add(out, s, n);
    llmi_ids c = llmi_ids_make(&out->a);
    int ok = 1;
    for (size_t i = 0; i < n && ok;) {
        uint32_t cp;
        i += llmi_utf8_get(s + i, n - i, &cp, NULL);
        ok = llmi_add_decomposed(u, cp, compat, &c);
    }
    for (size_t i = 0, j; i < c.count && ok; i = j + 1) {
        for (j = i; j < c.count && llmi_ccc(u, (uint32_t)c.data[j]); j++) {}
        if (j - i > 1) ok = llmi_order_marks(u, c.data + i, j - i, &out->a);
    }
    if (ok && compose) c.count = llmi_compose_all(u, c.data, c.count);
    for (size_t i = 0; i < c.count && ok; i++) {
        char text[4];
        ok = llmi_bytes_add(out, text, llmi_utf8_put((uint32_t)c.data[i], text));
    }
    llmi_ids_drop(&c);
    return ok;
}

/* ---- marks and lower case ---- */

/* A mark (general category M) of Unicode 9, which is what the package strips as an accent. */
static int llmi_is_accent(const llmi_unicode *u, uint32_t c)
{
    if (c < 0x300 || (llmi_class(u, c) != LLMI_CLASS_M && c != 0x1cf2 && c != 0x1cf3)) return 0;
    llmi_packed p = {llmi_new_marks_text, llmi_new_marks_text[0]};
    int odd = 0;
    for (uint32_t at = 0; !odd && at <= c && (*p.at || p.rows[1]);) {
        uint32_t from = at + llmi_packed_number(&p);
        at = from + llmi_packed_number(&p);
        odd = c >= from && c < at;
    }
    return odd == (llmi_class(u, c) != LLMI_CLASS_M);
}

/* Appends a text without its marks. 0: out of memory. */
static int llmi_strip_accents(const llmi_unicode *u, const char *s, size_t n, llmi_bytes *out)
{
    int ok = 1;
    for (size_t i = 0, m; i < n && ok; i += m) {
        uint32_t c;
        m = llmi_utf8_get(s + i, n - i, &c, NULL);
        if (!llmi_is_accent(u, c)) ok = llmi_bytes_add(out, s + i, m);
    }
    return ok;
}

/* Appends a text in lower case, character by character: a sigma at the end of a word is like any other. 0: out of memory. */
static int llmi_lower(const llmi_unicode *u, const char *s, size_t n, llmi_bytes *out)
{
    int ok = 1;
    for (size_t i = 0, m; i < n && ok; i += m) {
        uint32_t c;
        char text[4];
        m = llmi_utf8_get(s + i, n - i, &c, NULL);
        const llmi_char_run *run = llmi_find_run(u->lower, u->lower_count, c);
        if (c == 0x130) ok = llmi_bytes_add(out, "i\xcc\x87", 3); /* the only one that becomes two */
        else if (!run || (c - run->first) % run->step) ok = llmi_bytes_add(out, s + i, m);
        else ok = llmi_bytes_add(out, text, llmi_utf8_put((uint32_t)((int32_t)c + run->at), text));
    }
    return ok;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-pattern     the regular expressions of pre-tokenizers
   Alternatives in order, greedy, characters not bytes; what is not known is refused by name; matching is linear in the text.
   ------------------------------------------------------------------------------------------------ */

/* A set of characters. The first 128 are a bitmap, negation included. */
typedef struct llmi_set {
    uint32_t ascii[4];
    uint32_t classes;    /* bit per class */
    uint32_t first, count; /* ranges of the program: pairs low, high */
    uint8_t negate, space, no_space, dot; /* space: white space is in; no_space: all but white space; dot: all but \n */
} llmi_set;

enum { LLMI_OP_SET, LLMI_OP_LOOP, LLMI_OP_LOOK, LLMI_OP_SPLIT, LLMI_OP_JUMP, LLMI_OP_LINE_END, LLMI_OP_TEXT_END, LLMI_OP_TEXT_START, LLMI_OP_ACCEPT };

/* Jumps are relative, so a block can be moved and copied. */
typedef struct llmi_op {
    uint8_t op;
    uint8_t flag;      /* LOOK: negative; LOOP: possessive */
    uint16_t set;
    int32_t x, y;      /* LOOP: least, most (-1: no end); SPLIT: first and second choice; JUMP: x */
} llmi_op;

#define LLMI_MAX_OPS 2000
#define LLMI_MAX_SETS 400
#define LLMI_MAX_RANGES 1000
#define LLMI_MAX_REPEAT 1000

typedef struct llmi_regex {
    llmi_op *ops;
    llmi_set *sets;
    uint32_t *ranges;
    int32_t op_count;
    uint32_t set_count, range_count; /* range_count: numbers, two for each */
} llmi_regex;

/* Compiler state. `what` names the first construct that is not supported, or what is wrong with a pattern that is malformed. */
typedef struct llmi_rx {
    llmi_regex *x;
    const llmi_unicode *u;
    const char *s, *end;
    const char *what;
    int ignore_case, depth, malformed;
} llmi_rx;

/* What is wrong with brackets that have no partner, which the patterns of schemas are searched for before they are wrapped. */
#define LLMI_RX_NO_SET_END "a [ lacks its ] (a ] right after [ or [^ stands for itself)"
#define LLMI_RX_NO_GROUP_END "a ( lacks its )"
#define LLMI_RX_NO_GROUP "a ) lacks its ("
#define LLMI_RX_NO_ESCAPED "nothing follows the \\ at the end"

/* Remember the first thing that is not known and stop reading; always 0. */
static int llmi_rx_fail(llmi_rx *c, const char *what)
{
    if (!c->what) c->what = what;
    c->s = c->end;
    return 0;
}

/* The same for a pattern that is none; `what` is a sentence. */
static int llmi_rx_wrong(llmi_rx *c, const char *what)
{
    if (!c->what) c->malformed = 1;
    return llmi_rx_fail(c, what);
}

/* Characters lo to hi are in the set. */
static int llmi_rx_range(llmi_rx *c, llmi_set *set, uint32_t lo, uint32_t hi)
{
    if (c->x->range_count + 2 > LLMI_MAX_RANGES) return llmi_rx_fail(c, "too many ranges");
    c->x->ranges[c->x->range_count++] = lo;
    c->x->ranges[c->x->range_count++] = hi;
    set->count++;
    return 1;
}

/* A range, and under (?i) its letters of the other case. Simple case folding adds U+017F to s and U+212A to k. */
static int llmi_rx_letters(llmi_rx *c, llmi_set *set, uint32_t lo, uint32_t hi)
{
    if (!llmi_rx_range(c, set, lo, hi)) return 0;
    if (!c->ignore_case) return 1;
    if (hi >= 0x80) return llmi_rx_fail(c, "(?i) with characters beyond ASCII");
    for (uint32_t v = lo; v <= hi; v++) {
        uint32_t l = v | 0x20;
        if (l < 'a' || l > 'z') continue;
        if (!llmi_rx_range(c, set, v ^ 0x20, v ^ 0x20)) return 0;
        if (l == 's' && !llmi_rx_range(c, set, 0x17f, 0x17f)) return 0;
        if (l == 'k' && !llmi_rx_range(c, set, 0x212a, 0x212a)) return 0;
    }
    return 1;
}

/* Membership by classes and ranges; the bitmap of the first 128 is made from it. */
static int llmi_set_has_slow(const llmi_regex *x, const llmi_unicode *u, const llmi_set *set, uint32_t c)
{
    int in = (set->classes >> llmi_class(u, c) & 1) || (set->dot && c != '\n');
    if (set->space || set->no_space) in |= llmi_is_space(c) ? set->space : set->no_space;
    for (uint32_t i = 0; i < set->count && !in; i++) in = c >= x->ranges[set->first + 2 * i] && c <= x->ranges[set->first + 2 * i + 1];
    return in != set->negate;
}

/* A new instruction, zeroed. Past the limit the last one is overwritten: the pattern is refused anyway. */
static llmi_op *llmi_rx_emit(llmi_rx *c, int op)
{
    if (c->x->op_count >= LLMI_MAX_OPS) {
        llmi_rx_fail(c, "too long a pattern");
        c->x->op_count--; /* keep a valid place to write to */
    }
    llmi_op *o = &c->x->ops[c->x->op_count++];
    memset(o, 0, sizeof *o);
    o->op = (uint8_t)op;
    return o;
}

/* A new empty set; its ranges are those added until the next set begins. */
static llmi_set *llmi_rx_set(llmi_rx *c)
{
    if (c->x->set_count >= LLMI_MAX_SETS) {
        llmi_rx_fail(c, "too many characters");
        c->x->set_count--;
    }
    llmi_set *s = &c->x->sets[c->x->set_count++];
    memset(s, 0, sizeof *s);
    s->first = c->x->range_count;
    return s;
}

/* The set is complete: make its bitmap and the instruction that matches one character of it. */
static void llmi_rx_set_done(llmi_rx *c, llmi_set *set)
{
    for (uint32_t i = 0; i < 128; i++)
        if (llmi_set_has_slow(c->x, c->u, set, i)) set->ascii[i >> 5] |= 1u << (i & 31);
    llmi_rx_emit(c, LLMI_OP_SET)->set = (uint16_t)(set - c->x->sets);
}

/* \p{..} after the p. 0 and a message when the property is unknown. */
static int llmi_rx_property(llmi_rx *c, llmi_set *set, int negative)
{
    static const struct { const char *name; uint32_t classes; } known[] = {
        {"L", LLMI_LETTERS}, {"Letter", LLMI_LETTERS}, {"N", LLMI_NUMBERS}, {"Number", LLMI_NUMBERS}, {"M", LLMI_BIT(M)}, {"Mark", LLMI_BIT(M)},
        {"Lu", LLMI_BIT(LU)}, {"Ll", LLMI_BIT(LL)}, {"Lt", LLMI_BIT(LT)}, {"Lm", LLMI_BIT(LM)}, {"Lo", LLMI_BIT(LO)}, {"Nd", LLMI_BIT(ND)},
        {"Nl", LLMI_BIT(NL)}, {"No", LLMI_BIT(NO)}, {"P", LLMI_BIT(P) | LLMI_BIT(PC)}, {"Punctuation", LLMI_BIT(P) | LLMI_BIT(PC)},
        {"Pc", LLMI_BIT(PC)}, {"S", LLMI_BIT(S)}, {"Symbol", LLMI_BIT(S)},
    };
    const char *from = c->s;
    size_t n = 1;
    if (c->s < c->end && *c->s == '{') {
        from++;
        if (from < c->end && *from == '^') { negative = !negative; from++; }
        for (n = 0; from + n < c->end && from[n] != '}' && from[n] != ')'; n++) {}
        c->s = from + n;
    }
    if (c->s >= c->end || *c->s == ')') return llmi_rx_wrong(c, "\\p lacks its name, or \\p{ its }");
    c->s++;
    for (size_t i = 0; i < LLMI_COUNT(known); i++) {
        if (strlen(known[i].name) != n || memcmp(known[i].name, from, n) != 0) continue;
        set->classes |= negative ? LLMI_EVERY & ~known[i].classes : known[i].classes;
        return 1;
    }
    return llmi_rx_fail(c, "a Unicode property other than L, N, M, P, S and their kinds");
}

/* Value of a hexadecimal digit, or -1. */
static int llmi_hex(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* \xHH, \x{H...}, \uHHHH after the letter. */
static uint32_t llmi_rx_code(llmi_rx *c, int digits)
{
    uint32_t v = 0;
    int braces = digits == 2 && c->s < c->end && *c->s == '{', n = 0;
    if (braces) c->s++;
    for (; n < (braces ? 6 : digits) && c->s < c->end && llmi_hex(*c->s) >= 0; n++) v = v * 16 + (uint32_t)llmi_hex(*c->s++);
    if (n == 0 || v > 0x10ffff || (braces && (c->s >= c->end || *c->s++ != '}'))) llmi_rx_wrong(c, "\\x or \\u lacks the number of a character");
    return v;
}

/* One escape after the backslash: 1 and a code point, or 0 when it was a class and went into the set (or failed). */
static int llmi_rx_escape(llmi_rx *c, llmi_set *set, uint32_t *cp)
{
    static const char names[] = "rntfve", codes[] = "\r\n\t\f\v\033";
    if (c->s >= c->end) return llmi_rx_wrong(c, LLMI_RX_NO_ESCAPED);
    char e = *c->s;
    if ((uint8_t)e >= 0x80) {
        c->s += llmi_utf8_get(c->s, (size_t)(c->end - c->s), cp, NULL);
        return 1;
    }
    c->s++;
    if (e == 's') { set->space = 1; return 0; }
    if (e == 'S') { set->no_space = 1; return 0; }
    if (e == 'd' || e == 'D') { set->classes |= e == 'd' ? LLMI_BIT(ND) : LLMI_EVERY & ~LLMI_BIT(ND); return 0; }
    if (e == 'w') {
        set->classes |= LLMI_WORD;
        for (size_t i = 0; i < LLMI_COUNT(llmi_word_extra); i += 2) llmi_rx_range(c, set, llmi_word_extra[i], llmi_word_extra[i + 1]);
        return llmi_rx_range(c, set, 0xb2, 0xb3) && llmi_rx_range(c, set, 0xb9, 0xb9) && llmi_rx_range(c, set, 0xbc, 0xbe) && 0;
    }
    if (e == 'p' || e == 'P') { llmi_rx_property(c, set, e == 'P'); return 0; }
    if (e == 'x' || e == 'u') { *cp = llmi_rx_code(c, e == 'x' ? 2 : 4); return 1; }
    const char *at = strchr(names, e);
    *cp = at ? (uint8_t)codes[at - names] : (uint8_t)e;
    if (!at && ((e >= '0' && e <= '9') || (e >= 'a' && e <= 'z') || (e >= 'A' && e <= 'Z'))) return llmi_rx_fail(c, "an escape such as \\b or \\1");
    return 1;
}

/* [...] after the bracket. */
static void llmi_rx_bracket(llmi_rx *c, llmi_set *set)
{
    uint8_t negate = 0;
    uint32_t last = 0;
    int have = 0, first = 1; /* have: `last` may begin a range */
    if (c->s < c->end && *c->s == '^') { negate = 1; c->s++; }
    for (;; first = 0) {
        uint32_t cp = 0;
        int is_char = 1;
        if (c->s >= c->end) { llmi_rx_wrong(c, LLMI_RX_NO_SET_END); return; }
        if (*c->s == ']' && !first) break;
        if (*c->s == '[' || (*c->s == '&' && c->end - c->s > 1 && c->s[1] == '&')) { llmi_rx_fail(c, "a set within a set"); return; }
        int dash = *c->s == '-' && have && c->end - c->s > 1 && c->s[1] != ']';
        if (dash) c->s++;
        if (*c->s == '\\') {
            c->s++;
            is_char = llmi_rx_escape(c, set, &cp);
        } else {
            c->s += llmi_utf8_get(c->s, (size_t)(c->end - c->s), &cp, NULL);
        }
        if (dash && !is_char) { llmi_rx_fail(c, "a range that ends in a class"); return; }
        if (dash && cp < last) { llmi_rx_wrong(c, "a range such as [z-a] ends before it begins"); return; }
        if (is_char && !llmi_rx_letters(c, set, dash ? last : cp, cp)) return;
        have = is_char && !dash;
        last = cp;
    }
    c->s++;
    set->negate = negate; /* \S in [^\S\n] joins the others first, then all is negated */
}

static int llmi_rx_alternatives(llmi_rx *c);

/* (...) after the parenthesis; returns the least number of characters it matches. */
static int llmi_rx_group(llmi_rx *c)
{
    int look = 0, saved = c->ignore_case, start = c->x->op_count;
    if (c->s < c->end && *c->s == '?') {
        size_t left = (size_t)(c->end - c->s);
        if (left >= 3 && c->s[1] == 'i' && c->s[2] == ':') { c->ignore_case = 1; c->s += 3; }
        else if (left >= 2 && c->s[1] == ':') c->s += 2;
        else if (left >= 2 && (c->s[1] == '!' || c->s[1] == '=')) { look = c->s[1] == '!' ? 2 : 1; c->s += 2; }
        else return llmi_rx_fail(c, "a group other than (?:..), (?i:..), (?=..) and (?!..)");
    }
    if (++c->depth > 60) return llmi_rx_fail(c, "groups nested too deeply");
    int least = llmi_rx_alternatives(c);
    c->depth--;
    c->ignore_case = saved;
    if (c->s >= c->end || *c->s != ')') return llmi_rx_wrong(c, LLMI_RX_NO_GROUP_END);
    c->s++;
    if (!look) return least;
    if (c->x->op_count != start + 1 || c->x->ops[start].op != LLMI_OP_SET) return llmi_rx_fail(c, "a look ahead at more than one character");
    c->x->ops[start].op = LLMI_OP_LOOK;
    c->x->ops[start].flag = look == 2;
    return 0;
}

/* One item without its quantifier; returns the least number of characters it matches. */
static int llmi_rx_item(llmi_rx *c)
{
    uint32_t cp = 0;
    char k = *c->s;
    if (k == '(') { c->s++; return llmi_rx_group(c); }
    if (k == '$') { c->s++; llmi_rx_emit(c, LLMI_OP_LINE_END); return 0; }
    if (k == '\\' && c->end - c->s > 1 && (c->s[1] == 'z' || c->s[1] == 'A')) {
        llmi_rx_emit(c, c->s[1] == 'z' ? LLMI_OP_TEXT_END : LLMI_OP_TEXT_START);
        c->s += 2;
        return 0;
    }
    if (k == '^') return llmi_rx_fail(c, "^ after the beginning");
    if (k == '*' || k == '+' || k == '?' || k == '{') return llmi_rx_wrong(c, "a quantifier (* + ? {) has nothing before it to repeat");
    llmi_set *set = llmi_rx_set(c);
    if (k == '[') { c->s++; llmi_rx_bracket(c, set); }
    else if (k == '.') { c->s++; set->dot = 1; }
    else if (k == '\\') {
        c->s++;
        if (llmi_rx_escape(c, set, &cp)) llmi_rx_letters(c, set, cp, cp);
    } else {
        c->s += llmi_utf8_get(c->s, (size_t)(c->end - c->s), &cp, NULL);
        llmi_rx_letters(c, set, cp, cp);
    }
    llmi_rx_set_done(c, set);
    return 1;
}

/* A decimal number, or `otherwise` when there is none; it stops growing beyond the limit. */
static int llmi_rx_decimal(llmi_rx *c, int otherwise)
{
    int v = 0;
    if (c->s >= c->end || *c->s < '0' || *c->s > '9') return otherwise;
    for (; c->s < c->end && *c->s >= '0' && *c->s <= '9'; c->s++) v = v > LLMI_MAX_REPEAT ? v : v * 10 + (*c->s - '0');
    return v;
}

/* * + ? {n} {n,} {n,m}: 1 when there is one. most -1: no end. */
static int llmi_rx_quantifier(llmi_rx *c, int *least, int *most)
{
    char k = c->s < c->end ? *c->s : 0;
    if (k != '*' && k != '+' && k != '?' && k != '{') return 0;
    c->s++;
    *least = k == '+';
    *most = k == '?' ? 1 : -1;
    if (k != '{') return 1;
    *least = llmi_rx_decimal(c, 0);
    *most = *least;
    if (c->s < c->end && *c->s == ',') { c->s++; *most = llmi_rx_decimal(c, -1); }
    if (c->s >= c->end || *c->s != '}') return llmi_rx_wrong(c, "a { begins none of {n}, {n,} and {n,m}");
    if (*least > LLMI_MAX_REPEAT || *most > LLMI_MAX_REPEAT) return llmi_rx_fail(c, "too many repetitions");
    if (*most >= 0 && *most < *least) return llmi_rx_wrong(c, "in {n,m} m is below n");
    c->s++;
    return 1;
}

/* Append a block again; jumps inside it are relative and stay right. */
static void llmi_rx_copy(llmi_rx *c, const llmi_op *block, int n)
{
    for (int i = 0; i < n; i++) *llmi_rx_emit(c, 0) = block[i];
}

/* Repeat the block [start, end of program): copies for the required ones, then a loop or nested choices. */
static void llmi_rx_repeat(llmi_rx *c, int start, int least, int most)
{
    llmi_op block[64];
    int n = c->x->op_count - start, copies = most < 0 ? 0 : most - least;
    if (n > (int)LLMI_COUNT(block)) { llmi_rx_fail(c, "a quantifier after a long group"); return; }
    memcpy(block, c->x->ops + start, (size_t)n * sizeof *block);
    c->x->op_count = start;
    for (int i = 0; i < least; i++) llmi_rx_copy(c, block, n);
    if (most < 0) {
        llmi_op *split = llmi_rx_emit(c, LLMI_OP_SPLIT);
        split->x = 1;
        split->y = n + 2;
        llmi_rx_copy(c, block, n);
        llmi_rx_emit(c, LLMI_OP_JUMP)->x = -(n + 1);
    }
    for (int i = 0; i < copies; i++) {
        llmi_op *split = llmi_rx_emit(c, LLMI_OP_SPLIT);
        split->x = 1;
        split->y = (copies - i) * (n + 1);
        llmi_rx_copy(c, block, n);
    }
}

/* Items with their quantifiers up to | or ); returns the least number of characters. A quantifier on a single set becomes one
   LOOP instruction, which is what nearly every pre-tokenizer consists of. */
static int llmi_rx_sequence(llmi_rx *c)
{
    int total = 0, least, most;
    while (c->s < c->end && *c->s != '|' && *c->s != ')') {
        int start = c->x->op_count, width = llmi_rx_item(c);
        while (!c->what && llmi_rx_quantifier(c, &least, &most)) {
            int interval = c->s[-1] == '}', one = c->x->op_count == start + 1 && c->x->ops[start].op == LLMI_OP_SET;
            int possessive = !interval && c->s < c->end && *c->s == '+';
            if (c->s < c->end && *c->s == '?') { llmi_rx_fail(c, "a lazy quantifier"); break; }
            if (possessive) c->s++;
            if (one) {
                llmi_op *o = &c->x->ops[start];
                o->op = LLMI_OP_LOOP;
                o->x = least;
                o->y = most;
                o->flag = (uint8_t)possessive;
            } else if (possessive || (most < 0 && width == 0)) {
                llmi_rx_fail(c, "this quantifier after a group");
            } else {
                llmi_rx_repeat(c, start, least, most);
            }
            width *= least;
        }
        total = total + width > LLMI_MAX_REPEAT ? LLMI_MAX_REPEAT : total + width;
    }
    return total;
}

/* a|b|c: SPLIT a, (JUMP end) SPLIT b, (JUMP end) c. */
static int llmi_rx_alternatives(llmi_rx *c)
{
    int start = c->x->op_count, least = llmi_rx_sequence(c);
    if (c->s >= c->end || *c->s != '|') return least;
    c->s++;
    if (++c->depth > 200) return llmi_rx_fail(c, "too many alternatives");
    llmi_rx_emit(c, LLMI_OP_JUMP);
    int jump = llmi_rx_emit(c, LLMI_OP_JUMP) ? c->x->op_count - 1 : 0, n = jump - start;
    if (c->what) return 0;
    memmove(c->x->ops + start + 1, c->x->ops + start, (size_t)(n - 1) * sizeof *c->x->ops);
    memset(&c->x->ops[start], 0, sizeof c->x->ops[start]);
    c->x->ops[start].op = LLMI_OP_SPLIT;
    c->x->ops[start].x = 1;
    c->x->ops[start].y = n + 1;
    int other = llmi_rx_alternatives(c);
    c->depth--;
    c->x->ops[jump].x = c->x->op_count - jump;
    return other < least ? other : least;
}

/* Compile; NULL with a message. `literal`: every character stands for itself. */
static llmi_regex *llmi_regex_make(const char *pattern, size_t bytes, int literal, const llmi_unicode *u, llmi_arena *r, moq_error *err)
{
    llmi_rx c;
    llmi_regex full, *x = (llmi_regex *)llmi_take(r, 1, sizeof *x);
    llmi_arena scratch = llmi_arena_make(&r->a);
    memset(&c, 0, sizeof c);
    memset(&full, 0, sizeof full);
    full.ops = (llmi_op *)llmi_take(&scratch, LLMI_MAX_OPS, sizeof *full.ops);
    full.sets = (llmi_set *)llmi_take(&scratch, LLMI_MAX_SETS, sizeof *full.sets);
    full.ranges = (uint32_t *)llmi_take(&scratch, LLMI_MAX_RANGES, sizeof *full.ranges);
    int ok = x && full.ops && full.sets && full.ranges;
    c.x = &full;
    c.u = u;
    c.s = pattern;
    c.end = pattern + bytes;
    while (ok && literal && c.s < c.end) {
        uint32_t cp;
        llmi_set *set = llmi_rx_set(&c);
        c.s += llmi_utf8_get(c.s, (size_t)(c.end - c.s), &cp, NULL);
        llmi_rx_range(&c, set, cp, cp);
        llmi_rx_set_done(&c, set);
    }
    if (ok && !literal) llmi_rx_alternatives(&c);
    if (ok && c.s < c.end) llmi_rx_wrong(&c, LLMI_RX_NO_GROUP);
    if (ok) llmi_rx_emit(&c, LLMI_OP_ACCEPT);
    if (ok && c.what) {
        if (c.malformed) moq_fail(err, MOQ_E_TOKENIZER, "tokenizer.json", "the pattern '%q' is malformed: %s", pattern, c.what);
        else moq_fail(err, MOQ_E_UNSUPPORTED, "tokenizer.json", "the pattern '%q' holds %s, which the matcher does not know", pattern, c.what);
        x = NULL;
    } else if (ok) {
        *x = full;
        x->ops = (llmi_op *)llmi_take(r, (size_t)full.op_count, sizeof *x->ops);
        x->sets = (llmi_set *)llmi_take(r, full.set_count, sizeof *x->sets);
        x->ranges = (uint32_t *)llmi_take(r, full.range_count, sizeof *x->ranges);
        ok = x->ops && x->sets && x->ranges;
        if (ok) memcpy(x->ops, full.ops, (size_t)full.op_count * sizeof *x->ops);
        if (ok) memcpy(x->sets, full.sets, full.set_count * sizeof *x->sets);
        if (ok) memcpy(x->ranges, full.ranges, full.range_count * sizeof *x->ranges);
    }
    llmi_arena_drop(&scratch);
    if (!ok) llmi_nomem(err, "tokenizer.json");
    return ok ? x : NULL;
}

/* ---- matching: backtracking with a list of open choices ----
   Ordinary patterns look at each character a few times. When a pattern needs more, every (instruction, position) that has
   been tried is remembered: what failed once fails again, wherever the match began, so the work stays linear. */

#define LLMI_NO_MATCH SIZE_MAX

typedef struct llmi_choice { int32_t pc; size_t at, low; } llmi_choice; /* positions at, one character less, ... low */

typedef struct llmi_matcher {
    const llmi_regex *x;
    const llmi_unicode *u;
    const char *s;
    size_t n;
    llmi_choice *stack;
    size_t count, capacity;
    uint8_t *memo;        /* a bit for each position, instruction and entry (0: taken up as a choice, 1: passed by) */
    size_t memo_bytes;
    uint64_t steps;
    int failed;           /* out of memory */
    moq_allocator a;
} llmi_matcher;

/* Begin to search a text; what was remembered of the last one is forgotten. */
static void llmi_matcher_set(llmi_matcher *m, const llmi_regex *x, const char *s, size_t n)
{
    moq_release(&m->a, m->memo, m->memo_bytes);
    m->memo = NULL;
    m->memo_bytes = 0;
    m->x = x;
    m->s = s;
    m->n = n;
    m->steps = 0;
}

/* Frees the matcher's memory. */
static void llmi_matcher_drop(llmi_matcher *m)
{
    llmi_matcher_set(m, NULL, NULL, 0);
    moq_release(&m->a, m->stack, m->capacity * sizeof *m->stack);
    m->stack = NULL;
}

/* A choice to come back to when the present one fails. */
static void llmi_push(llmi_matcher *m, int32_t pc, size_t at, size_t low)
{
    if (m->count == m->capacity) {
        llmi_choice *p = (llmi_choice *)llmi_grow(&m->a, m->stack, m->count, &m->capacity, m->count + 1, sizeof *p);
        if (!p) { m->failed = 1; return; }
        m->stack = p;
    }
    llmi_choice *c = &m->stack[m->count++];
    c->pc = pc;
    c->at = at;
    c->low = low;
}

/* 1 when this was tried before; marks it. Always 0 until the memo is in use. */
static int llmi_tried(llmi_matcher *m, int32_t pc, int inside, size_t at)
{
    if (!m->memo) return 0;
    size_t bit = at * (size_t)(2 * m->x->op_count) + (size_t)(2 * pc + inside);
    int old = m->memo[bit >> 3] >> (bit & 7) & 1;
    m->memo[bit >> 3] = (uint8_t)(m->memo[bit >> 3] | 1u << (bit & 7));
    return old;
}

/* A match ended here: what succeeded at this very position must not look like a failure to the next one. */
static void llmi_forget(llmi_matcher *m, size_t at)
{
    size_t width = (size_t)(2 * m->x->op_count);
    for (size_t bit = at * width; m->memo && bit < (at + 1) * width; bit++) m->memo[bit >> 3] = (uint8_t)(m->memo[bit >> 3] & ~(1u << (bit & 7)));
}

/* Count work; when it is out of proportion to the text, start to remember. 64 looks at each character are more than any
   pattern of a published tokenizer needs. */
static void llmi_count_step(llmi_matcher *m, uint64_t steps)
{
    m->steps += steps;
    if (m->memo || m->steps < 64 * ((uint64_t)m->n + 64)) return;
    size_t width = (size_t)(2 * m->x->op_count);
    m->memo_bytes = m->n < SIZE_MAX / 2 / width ? (m->n + 1) * width / 8 + 1 : SIZE_MAX;
    m->memo = (uint8_t *)moq_allocate(&m->a, m->memo_bytes);
    if (!m->memo) { m->failed = 1; m->memo_bytes = 0; }
}

/* Length of the character at `at` when it is in the set, else 0. */
static size_t llmi_step_in(const llmi_matcher *m, int set, size_t at)
{
    const llmi_set *x = &m->x->sets[set];
    uint32_t c;
    if (at >= m->n) return 0;
    c = (uint8_t)m->s[at];
    if (c < 128) return x->ascii[c >> 5] >> (c & 31) & 1;
    size_t n = llmi_utf8_get(m->s + at, m->n - at, &c, NULL);
    return llmi_set_has_slow(m->x, m->u, x, c) ? n : 0;
}

/* A LOOP at `at`: where to go on, or LLMI_NO_MATCH. Shorter ends become choices. */
static size_t llmi_match_loop(llmi_matcher *m, int32_t pc, size_t at)
{
    const llmi_op *o = &m->x->ops[pc];
    size_t from = at, n, low;
    int count = 0;
    for (; count < o->x; count++, at += n)
        if ((n = llmi_step_in(m, o->set, at)) == 0) return LLMI_NO_MATCH;
    low = at;
    if (o->y < 0 && m->memo) {
        for (;; at += n) {
            if (llmi_tried(m, pc, 1, at)) return LLMI_NO_MATCH;
            n = llmi_step_in(m, o->set, at);
            if (n == 0) return at;
            if (!o->flag) llmi_push(m, pc + 1, at, at);
            if (m->failed) return LLMI_NO_MATCH;
        }
    }
    for (; (o->y < 0 || count < o->y) && (n = llmi_step_in(m, o->set, at)) != 0; count++) at += n;
    llmi_count_step(m, at - from);
    if (at > low && !o->flag) {
        size_t back = at - 1;
        while (back > low && ((uint8_t)m->s[back] & 0xc0) == 0x80) back--;
        llmi_push(m, pc + 1, back, low);
    }
    return at;
}

/* Follow one choice until it accepts (its end) or fails (LLMI_NO_MATCH). */
static size_t llmi_match_run(llmi_matcher *m, int32_t pc, size_t at)
{
    for (;;) {
        const llmi_op *o = &m->x->ops[pc];
        size_t n;
        switch (o->op) {
        case LLMI_OP_SET:
            n = llmi_step_in(m, o->set, at);
            if (n == 0) return LLMI_NO_MATCH;
            at += n;
            break;
        case LLMI_OP_LOOP:
            at = llmi_match_loop(m, pc, at);
            if (at == LLMI_NO_MATCH) return at;
            break;
        case LLMI_OP_LOOK:
            if ((llmi_step_in(m, o->set, at) != 0) == o->flag) return LLMI_NO_MATCH;
            break;
        case LLMI_OP_SPLIT:
            if (llmi_tried(m, pc, 1, at)) return LLMI_NO_MATCH;
            llmi_count_step(m, 1);
            llmi_push(m, pc + o->y, at, at);
            if (m->failed) return LLMI_NO_MATCH;
            pc += o->x - 1;
            break;
        case LLMI_OP_JUMP:
            pc += o->x - 1;
            break;
        case LLMI_OP_LINE_END:
            if (at < m->n && m->s[at] != '\n') return LLMI_NO_MATCH;
            break;
        case LLMI_OP_TEXT_END:
            if (at < m->n) return LLMI_NO_MATCH;
            break;
        case LLMI_OP_TEXT_START:
            if (at > 0) return LLMI_NO_MATCH;
            break;
        default:
            return at;
        }
        pc++;
    }
}

/* The end of the match that begins exactly at `start`, or LLMI_NO_MATCH (m->failed: out of memory). */
static size_t llmi_match(llmi_matcher *m, size_t start)
{
    m->count = 0;
    llmi_push(m, 0, start, start);
    while (m->count > 0 && !m->failed) {
        llmi_choice c = m->stack[--m->count];
        if (c.at > c.low) {
            size_t back = c.at - 1;
            while (back > c.low && ((uint8_t)m->s[back] & 0xc0) == 0x80) back--;
            llmi_push(m, c.pc, back, c.low);
        }
        if (llmi_tried(m, c.pc, 0, c.at)) continue;
        llmi_count_step(m, 4);
        size_t end = llmi_match_run(m, c.pc, c.at);
        if (end == LLMI_NO_MATCH) continue;
        llmi_forget(m, end);
        return end;
    }
    return LLMI_NO_MATCH;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-tokenizer   tokenizer.json: BPE of bytes, BPE with byte fallback, Unigram
   Same ids as the Hugging Face tokenizers package; a definition it cannot follow exactly is refused by name. A tokenizer never changes after opening.
   ------------------------------------------------------------------------------------------------ */

#ifndef MOQ_MAX_VOCAB
#define MOQ_MAX_VOCAB 4194304 /* largest token id + 1 */
#endif
#define LLMI_MAX_ADDED_BYTES 4096 /* one added token */
#define LLMI_MAX_ENDS 32
#define LLMI_MAX_AROUND 16        /* ids that a post-processor puts before or after a text */
#define LLMI_MAX_STEPS 32         /* of a normalizer, pre-tokenizer or decoder */
#define LLMI_TOKENIZER "tokenizer.json"

/* An id: its text as the file writes it, and what it shows when decoded. `special`: decoding leaves it out. */
typedef struct llmi_token {
    const char *text, *shown;
    uint32_t bytes, shown_bytes;
    uint8_t present, special, in_vocab, added;
} llmi_token;

/* Neighbours left, right -> id; `rank` is the place in the list of merges. */
typedef struct llmi_merge { uint64_t pair; int32_t rank, id; } llmi_merge;
#define LLMI_NO_PAIR UINT64_MAX

/* What Unigram looks for in a text. The token of this id may show another text, when it is an added token as well. */
typedef struct llmi_piece { const char *text; uint32_t bytes; int32_t id; } llmi_piece;

typedef struct llmi_added { int32_t id; uint8_t single_word, lstrip, rstrip, normalized, special; } llmi_added;

/* Trie of added tokens: (node, byte) -> node. Two roots: tokens found in the raw text (0) and in the normalized text (1). */
typedef struct llmi_edge { uint64_t key; uint32_t to; } llmi_edge;
typedef struct llmi_trie {
    llmi_edge *edges;  /* open addressing; key 0: free, else node * 256 + byte + 1 */
    size_t mask;
    int32_t *leaf;     /* [nodes] added token + 1 */
    uint32_t nodes;
    uint8_t first[2][256];
} llmi_trie;

/* Replacements compiled by SentencePiece: a double array (Aoe 1989, as in Darts) of texts -> places in `texts`, each ended by a zero. */
typedef struct llmi_charsmap { const uint32_t *units; const char *texts; size_t unit_count, bytes; } llmi_charsmap;

/* What happens to a text before BPE, and to tokens after it. */
enum {
    LLMI_NFD, LLMI_NFC, LLMI_NFKD, LLMI_NFKC, /* bit 0: compose, bit 1: compatibility */
    LLMI_STRIP_ACCENTS, LLMI_LOWERCASE, LLMI_NMT, LLMI_PRECOMPILED, LLMI_PREPEND, LLMI_REPLACE, LLMI_STRIP,
    LLMI_SPLIT, LLMI_BYTES, LLMI_METASPACE, LLMI_BYTE_FALLBACK, LLMI_FUSE
};
enum { LLMI_REMOVED, LLMI_ISOLATED, LLMI_WITH_PREVIOUS, LLMI_WITH_NEXT, LLMI_CONTIGUOUS };
enum { LLMI_NEVER, LLMI_FIRST, LLMI_ALWAYS };

typedef struct llmi_stage {
    int32_t kind;
    int32_t behavior, invert, prefix;  /* SPLIT, BYTES and METASPACE: put a space (replacement) in front */
    int32_t left, right;               /* STRIP */
    const llmi_regex *pattern;         /* SPLIT, REPLACE; NULL: `from` is literal */
    const llmi_charsmap *map;          /* PRECOMPILED */
    const char *from, *to;             /* REPLACE from -> to, PREPEND to, METASPACE to, STRIP from */
} llmi_stage;

typedef struct llmi_stages { llmi_stage list[LLMI_MAX_STEPS]; int32_t count; } llmi_stages;

struct llm_tokenizer {
    moq_allocator a;
    llmi_arena r;
    llmi_unicode u;
    llmi_token *tokens;       /* [count] */
    int32_t count;            /* largest id + 1 */
    llmi_map names;
    llmi_merge *merges;       /* open addressing */
    size_t merge_mask;
    double *scores;           /* [count] logarithms of Unigram probabilities; NULL: BPE */
    double unk_score;
    llmi_piece *pieces;       /* Unigram: in the order of their bytes */
    int32_t first[257];       /* where the pieces that begin with a byte lie in `pieces` */
    int32_t byte_ids[256];    /* of single bytes, by byte-level letter or by <0xXX>; -1: none */
    int32_t unk;              /* -1: none */
    uint8_t byte_level, byte_fallback, ignore_merges, fuse_unk;
    llmi_stages normalizer, splitter, decoder;
    llmi_added *added;
    llmi_trie trie;
    int32_t before[LLMI_MAX_AROUND], after[LLMI_MAX_AROUND];
    int32_t before_count, after_count;
    int32_t ends[LLMI_MAX_ENDS];
    int32_t end_count;
    const char *bos, *eos;    /* texts for the chat template, "" when there is none */
    const char *frame_text;   /* the chat template; NULL: none */
};

/* ---- bytes as letters ----
   Byte-level vocabularies write byte b as a printable character: itself for 33..126, 161..172, 174..255, else U+0100 and up in order. */

/* The character that stands for a byte. */
static uint32_t llmi_byte_letter(uint32_t b)
{
    if ((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174) return b;
    return b < 33 ? 0x100 + b : b < 161 ? 0x100 + 33 + (b - 127) : 0x143;
}

/* The byte of a letter, or -1. */
static int llmi_letter_byte(uint32_t c)
{
    if (c < 0x100) return llmi_byte_letter(c) == c ? (int)c : -1;
    if (c < 0x121) return (int)(c - 0x100);
    return c < 0x143 ? (int)(c - 0x121 + 127) : c == 0x143 ? 173 : -1;
}

/* ---- reading tokenizer.json ---- */

/* Reader state: `code` is the first failure, after which nothing more is read. */
typedef struct llmi_reader { llm_tokenizer *t; moq_result code; moq_error *err; } llmi_reader;

#define LLMI_REFUSE(rd, result, ...) do { if ((rd)->code >= 0) (rd)->code = moq_fail((rd)->err, result, LLMI_TOKENIZER, __VA_ARGS__); } while (0)

/* The reader stops for want of memory. */
static void llmi_reader_nomem(llmi_reader *rd)
{
    if (rd->code >= 0) rd->code = llmi_nomem(rd->err, LLMI_TOKENIZER);
}

/* A member that is there and not null: the package writes null for what is not set. */
static const moq_json *llmi_member(const moq_json *v, const char *key)
{
    const moq_json *m = moq_json_find(v, key);
    return m && m->type != MOQ_JSON_NULL ? m : NULL;
}

/* A boolean member, or `otherwise`. */
static int llmi_flag(const moq_json *v, const char *key, int otherwise)
{
    moq_json_bool(moq_json_find(v, key), &otherwise);
    return otherwise;
}

/* A text member, or `otherwise`; borrowed from the document. */
static const char *llmi_word(const moq_json *v, const char *key, const char *otherwise)
{
    const char *s = moq_json_string(llmi_member(v, key));
    return s ? s : otherwise;
}

/* A text that outlives the document. */
static const char *llmi_keep(llmi_reader *rd, const char *s)
{
    const char *p = llmi_take_text(&rd->t->r, s, strlen(s));
    if (!p) llmi_reader_nomem(rd);
    return p ? p : "";
}

/* A token id, or -1 after an error. */
static int32_t llmi_read_id(llmi_reader *rd, const moq_json *v, const char *token)
{
    int64_t id;
    if (!moq_json_int(v, &id) || id < 0 || id > INT32_MAX) {
        LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "token '%q' has the id '%q'; an integer from 0 was expected", token, v && v->text ? v->text : "(none)");
        return -1;
    }
    if (id >= MOQ_MAX_VOCAB) {
        LLMI_REFUSE(rd, MOQ_E_LIMIT, "token '%q' has the id %lld; MOQ_MAX_VOCAB is %d", token, (long long)id, (int)MOQ_MAX_VOCAB);
        return -1;
    }
    return (int32_t)id;
}

/* An id gets its text, which must outlive the tokenizer. */
static void llmi_set_token(llm_tokenizer *t, int32_t id, const char *text, uint32_t bytes)
{
    t->tokens[id].text = text;
    t->tokens[id].bytes = bytes;
    t->tokens[id].present = 1;
}

/* The ids of added tokens count, too. */
static void llmi_count_added(llmi_reader *rd, const moq_json *added)
{
    for (const moq_json *e = moq_json_first(added); e && rd->code >= 0; e = moq_json_next(added, e)) {
        int32_t id = llmi_read_id(rd, moq_json_find(e, "id"), llmi_word(e, "content", ""));
        if (id >= rd->t->count) rd->t->count = id + 1;
    }
}

/* Sizes first: the largest id and the bytes of all texts, so that everything is taken in three pieces. */
static size_t llmi_measure_vocab(llmi_reader *rd, const moq_json *vocab, const moq_json *added)
{
    size_t bytes = 0;
    if (!vocab || vocab->type != MOQ_JSON_OBJECT || vocab->count == 0) LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "model.vocab is not an object of tokens");
    if (rd->code < 0) return 0;
    if (vocab->count > MOQ_MAX_VOCAB)
        LLMI_REFUSE(rd, MOQ_E_LIMIT, "the vocabulary has %u tokens; MOQ_MAX_VOCAB is %d", vocab->count, (int)MOQ_MAX_VOCAB);
    for (const moq_json *e = moq_json_first(vocab); e && rd->code >= 0; e = moq_json_next(vocab, e)) {
        int32_t id = llmi_read_id(rd, e, e->key);
        if (id >= rd->t->count) rd->t->count = id + 1;
        bytes += (size_t)e->key_bytes + 1;
    }
    llmi_count_added(rd, added);
    return bytes;
}

/* The texts move into one block of the arena, so that the document can be freed after opening. */
static void llmi_read_vocab(llmi_reader *rd, const moq_json *vocab, const moq_json *added)
{
    llm_tokenizer *t = rd->t;
    size_t bytes = llmi_measure_vocab(rd, vocab, added);
    if (rd->code < 0) return;
    char *text = (char *)llmi_take(&t->r, bytes, 1);
    t->tokens = (llmi_token *)llmi_take(&t->r, (size_t)t->count, sizeof *t->tokens);
    if (!text || !t->tokens || !llmi_map_make(&t->names, &t->r, (size_t)vocab->count + (added ? added->count : 0))) {
        llmi_reader_nomem(rd);
        return;
    }
    for (const moq_json *e = moq_json_first(vocab); e; e = moq_json_next(vocab, e)) {
        int32_t id = llmi_read_id(rd, e, e->key);
        if (t->tokens[id].present) {
            LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "tokens '%q' and '%q' both have the id %d", t->tokens[id].text, e->key, (int)id);
            return;
        }
        memcpy(text, e->key, e->key_bytes);
        llmi_set_token(t, id, text, e->key_bytes);
        t->tokens[id].in_vocab = 1;
        llmi_map_add(&t->names, text, e->key_bytes, id);
        text += (size_t)e->key_bytes + 1;
    }
}

/* The slot of a pair: the one that holds it, or the free one where it belongs. */
static llmi_merge *llmi_merge_slot(const llm_tokenizer *t, uint64_t pair)
{
    size_t i = (size_t)llmi_fold(pair, 0x9e3779b97f4a7c15u) & t->merge_mask;
    while (t->merges[i].pair != LLMI_NO_PAIR && t->merges[i].pair != pair) i = (i + 1) & t->merge_mask;
    return &t->merges[i];
}

/* What two neighbours become, or NULL. */
static const llmi_merge *llmi_find_merge(const llm_tokenizer *t, int32_t left, int32_t right)
{
    const llmi_merge *m = llmi_merge_slot(t, (uint64_t)(uint32_t)left << 32 | (uint32_t)right);
    return m->pair == LLMI_NO_PAIR ? NULL : m;
}

/* The two parts of a merge, "a b" or ["a", "b"]; 0 when they are not two. */
static int llmi_merge_parts(const moq_json *e, const char *part[2], size_t bytes[2])
{
    if (e->type == MOQ_JSON_STRING) {
        const char *gap = (const char *)memchr(e->text, ' ', e->text_bytes);
        if (!gap) return 0;
        part[0] = e->text;
        bytes[0] = (size_t)(gap - e->text);
        part[1] = gap + 1;
        bytes[1] = e->text_bytes - bytes[0] - 1;
        return memchr(gap + 1, ' ', bytes[1]) == NULL;
    }
    if (e->type != MOQ_JSON_ARRAY || e->count != 2) return 0;
    for (int i = 0; i < 2; i++) {
        const moq_json *p = moq_json_at(e, (size_t)i);
        if (p->type != MOQ_JSON_STRING) return 0;
        part[i] = p->text;
        bytes[i] = p->text_bytes;
    }
    return 1;
}

/* One merge. Both parts and the joined text must be tokens: only then can every rank be reached. */
static void llmi_read_merge(llmi_reader *rd, const moq_json *e, int32_t rank, llmi_bytes *whole)
{
    llm_tokenizer *t = rd->t;
    const char *part[2];
    size_t bytes[2];
    if (!llmi_merge_parts(e, part, bytes)) {
        LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "merge %d is not a pair of two texts", (int)rank);
        return;
    }
    whole->count = 0;
    if (!llmi_bytes_add(whole, part[0], bytes[0]) || !llmi_bytes_add(whole, part[1], bytes[1])) { llmi_reader_nomem(rd); return; }
    const llmi_slot *a = llmi_map_find(&t->names, part[0], bytes[0]), *b = llmi_map_find(&t->names, part[1], bytes[1]);
    const llmi_slot *ab = llmi_map_find(&t->names, whole->data, whole->count);
    if (!a || !b || !ab) {
        const char *what = !a ? "left" : !b ? "right" : "joined";
        LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "merge %d: its %s part is not in the vocabulary", (int)rank, what);
        return;
    }
    llmi_merge *m = llmi_merge_slot(t, (uint64_t)(uint32_t)a->value << 32 | (uint32_t)b->value);
    m->pair = (uint64_t)(uint32_t)a->value << 32 | (uint32_t)b->value;
    m->rank = rank; /* a pair listed twice keeps its last place */
    m->id = ab->value;
}

/* The list in its order, which is the rank. Old files carry a version line in front. */
static void llmi_read_merges(llmi_reader *rd, const moq_json *list)
{
    llm_tokenizer *t = rd->t;
    size_t capacity = 16;
    int32_t rank = 0;
    if (!list || list->type != MOQ_JSON_ARRAY) LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "model.merges is missing; BPE needs the list of merges");
    if (rd->code < 0) return;
    while (capacity / 2 < list->count) capacity *= 2;
    t->merges = (llmi_merge *)llmi_take(&t->r, capacity, sizeof *t->merges);
    if (!t->merges) { llmi_reader_nomem(rd); return; }
    t->merge_mask = capacity - 1;
    for (size_t i = 0; i < capacity; i++) t->merges[i].pair = LLMI_NO_PAIR;
    llmi_bytes whole = llmi_bytes_make(&t->a);
    for (const moq_json *e = moq_json_first(list); e && rd->code >= 0; e = moq_json_next(list, e)) {
        if (rank == 0 && e->type == MOQ_JSON_STRING && strncmp(e->text, "#version", 8) == 0) continue;
        llmi_read_merge(rd, e, rank++, &whole);
    }
    llmi_bytes_drop(&whole);
}

/* Ids of the tokens that stand for one byte. */
static void llmi_read_bytes(llmi_reader *rd)
{
    static const char hex[] = "0123456789ABCDEF";
    llm_tokenizer *t = rd->t;
    for (uint32_t b = 0; b < 256; b++) {
        char text[8] = {'<', '0', 'x', 0, 0, '>', 0, 0};
        size_t n = 6;
        text[3] = hex[b >> 4];
        text[4] = hex[b & 15];
        if (!t->byte_fallback) n = llmi_utf8_put(llmi_byte_letter(b), text);
        const llmi_slot *s = llmi_map_find(&t->names, text, n);
        t->byte_ids[b] = s ? s->value : -1;
        if (!s && t->byte_fallback) LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "byte_fallback is set but the token %s is not in the vocabulary", text);
    }
}

/* Does a come before b among the things of `in`? */
typedef int (*llmi_order)(const void *in, int32_t a, int32_t b);

/* Merge sort from the bottom up; returns where the result is: `list` or `spare`, both [n]. */
static int32_t *llmi_sort_ids(const void *in, int32_t *list, int32_t *spare, size_t n, llmi_order before)
{
    for (size_t width = 1; width < n; width *= 2) {
        for (size_t from = 0; from < n; from += 2 * width) {
            size_t mid = from + width < n ? from + width : n, end = mid + width < n ? mid + width : n;
            for (size_t i = from, j = mid, k = from; k < end; k++)
                spare[k] = j >= end || (i < mid && !before(in, list[j], list[i])) ? list[i++] : list[j++];
        }
        int32_t *other = list;
        list = spare;
        spare = other;
    }
    return list;
}

/* By bytes of the text, the shorter of equals first. */
static int llmi_text_before(const void *in, int32_t a, int32_t b)
{
    const llm_tokenizer *t = (const llm_tokenizer *)in;
    const llmi_token *x = &t->tokens[a], *y = &t->tokens[b];
    int c = memcmp(x->text, y->text, x->bytes < y->bytes ? x->bytes : y->bytes);
    return c ? c < 0 : x->bytes < y->bytes;
}

/* Put the pieces of Unigram in order, so that all that begin a text lie one after the other. */
static void llmi_order_pieces(llmi_reader *rd, size_t vocab)
{
    llm_tokenizer *t = rd->t;
    size_t n = 0;
    int32_t *list = (int32_t *)moq_allocate(&t->a, vocab * 2 * sizeof *list), at = 0;
    t->pieces = (llmi_piece *)llmi_take(&t->r, vocab, sizeof *t->pieces);
    if (!list || !t->pieces) {
        moq_release(&t->a, list, vocab * 2 * sizeof *list);
        llmi_reader_nomem(rd);
        return;
    }
    for (size_t i = 0; i < vocab; i++)
        if (t->tokens[i].bytes) list[n++] = (int32_t)i;
    const int32_t *sorted = llmi_sort_ids(t, list, list + vocab, n, llmi_text_before);
    for (size_t i = 0; i < n; i++) {
        t->pieces[i].text = t->tokens[sorted[i]].text;
        t->pieces[i].bytes = t->tokens[sorted[i]].bytes;
        t->pieces[i].id = sorted[i];
    }
    moq_release(&t->a, list, vocab * 2 * sizeof *list);
    for (int b = 0; b < 256; b++) {
        t->first[b] = at;
        while (at < (int32_t)n && (uint8_t)t->pieces[at].text[0] == b) at++;
    }
    t->first[256] = at;
}

/* Room for the ids of a list of pieces and for those of the added tokens. 0 after an error. */
static int llmi_take_pieces(llmi_reader *rd, const moq_json *vocab, const moq_json *added)
{
    llm_tokenizer *t = rd->t;
    if (!vocab || vocab->type != MOQ_JSON_ARRAY || vocab->count == 0)
        LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "model.vocab is not a list of pairs of a piece and its score");
    else if (vocab->count > MOQ_MAX_VOCAB)
        LLMI_REFUSE(rd, MOQ_E_LIMIT, "the vocabulary has %u tokens; MOQ_MAX_VOCAB is %d", vocab->count, (int)MOQ_MAX_VOCAB);
    if (rd->code < 0) return 0;
    t->count = (int32_t)vocab->count;
    llmi_count_added(rd, added);
    if (rd->code < 0) return 0;
    t->tokens = (llmi_token *)llmi_take(&t->r, (size_t)t->count, sizeof *t->tokens);
    t->scores = (double *)llmi_take(&t->r, (size_t)t->count, sizeof *t->scores);
    if (!t->tokens || !t->scores || !llmi_map_make(&t->names, &t->r, (size_t)vocab->count + (added ? added->count : 0))) llmi_reader_nomem(rd);
    return rd->code >= 0;
}

/* A score as the package reads it: all digits as one integer, rounded, then divided by a power of ten, which may be off by one unit in
   the last place, and that decides between segmentations whose sums are equal. Exact where the number is longer. 0: not a number. */
static int llmi_read_score(const moq_json *v, double *out)
{
    uint64_t digits = 0;
    double power = 1, exact;
    int after = 0, known = 1;
    if (!moq_json_float(v, &exact) || !(exact <= 1e30 && exact >= -1e30)) return 0;
    for (const char *s = v->text + (*v->text == '-'); *s && known; s++) {
        known = *s == '.' || (*s >= '0' && *s <= '9' && digits < UINT64_MAX / 10 && power < 1e22);
        if (*s == '.') { after = 1; continue; }
        digits = digits * 10 + (uint64_t)(*s - '0');
        if (after) power *= 10;
    }
    *out = !known ? exact : *v->text == '-' ? -((double)digits / power) : (double)digits / power;
    return 1;
}

/* Unigram: a list of pairs, piece and score; the place in the list is the id. */
static void llmi_read_pieces(llmi_reader *rd, const moq_json *vocab, const moq_json *added)
{
    llm_tokenizer *t = rd->t;
    int32_t id = 0;
    double least = 0;
    if (!llmi_take_pieces(rd, vocab, added)) return;
    for (const moq_json *e = moq_json_first(vocab); e; e = moq_json_next(vocab, e), id++) {
        const moq_json *piece = moq_json_at(e, 0);
        double *score = &t->scores[id];
        if (!moq_json_string(piece) || e->count != 2 || !llmi_read_score(moq_json_at(e, 1), score)) {
            LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "entry %d of model.vocab is not a pair of a piece and a score", (int)id);
            return;
        }
        char *text = llmi_take_text(&t->r, piece->text, piece->text_bytes);
        if (!text) { llmi_reader_nomem(rd); return; }
        llmi_set_token(t, id, text, piece->text_bytes);
        t->tokens[id].in_vocab = 1;
        if (llmi_map_add(&t->names, text, piece->text_bytes, id)) {
            LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "the piece '%q' is in model.vocab twice", text);
            return;
        }
        if (id == 0 || *score < least) least = *score;
    }
    t->unk_score = least - 10; /* as SentencePiece does */
    llmi_order_pieces(rd, vocab->count);
}

/* Unigram's part of the key "model". */
static void llmi_read_unigram(llmi_reader *rd, const moq_json *model, const moq_json *added)
{
    llm_tokenizer *t = rd->t;
    const moq_json *unk = llmi_member(model, "unk_id");
    int64_t id = -1;
    t->byte_fallback = (uint8_t)llmi_flag(model, "byte_fallback", 0);
    t->fuse_unk = 1;
    llmi_read_pieces(rd, llmi_member(model, "vocab"), added);
    if (rd->code < 0) return;
    if (unk && (!moq_json_int(unk, &id) || id < 0 || id >= t->count || !t->tokens[id].present))
        LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "model.unk_id is no id of the vocabulary");
    t->unk = unk ? (int32_t)id : -1;
    llmi_read_bytes(rd);
}

/* The key "model". What would change ids without being followed here is refused: dropout, prefixes and suffixes of subwords. */
static void llmi_read_model(llmi_reader *rd, const moq_json *model, const moq_json *added)
{
    llm_tokenizer *t = rd->t;
    const char *type = llmi_word(model, "type", moq_json_find(model, "merges") ? "BPE" : "(none)"), *unk = llmi_word(model, "unk_token", NULL);
    double dropout = 0;
    if (!model || model->type != MOQ_JSON_OBJECT) LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "the key 'model' is missing");
    else if (strcmp(type, "Unigram") == 0) { llmi_read_unigram(rd, model, added); return; }
    else if (strcmp(type, "BPE") != 0) LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED, "model type '%q'; BPE and Unigram are known", type);
    if (llmi_word(model, "continuing_subword_prefix", "")[0]) LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED, "model.continuing_subword_prefix is set");
    if (llmi_word(model, "end_of_word_suffix", "")[0]) LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED, "model.end_of_word_suffix is set");
    if (moq_json_float(llmi_member(model, "dropout"), &dropout) && dropout != 0)
        LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED, "model.dropout is %g; ids would be random", dropout);
    t->byte_fallback = (uint8_t)llmi_flag(model, "byte_fallback", 0);
    t->ignore_merges = (uint8_t)llmi_flag(model, "ignore_merges", 0);
    t->fuse_unk = (uint8_t)llmi_flag(model, "fuse_unk", 0);
    llmi_read_vocab(rd, llmi_member(model, "vocab"), added);
    llmi_read_merges(rd, llmi_member(model, "merges"));
    if (rd->code < 0) return;
    llmi_read_bytes(rd);
    const llmi_slot *s = unk ? llmi_map_find(&t->names, unk, strlen(unk)) : NULL;
    if (unk && !s) LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "unk_token '%q' is not in the vocabulary", unk);
    t->unk = s ? s->value : -1;
}

/* ---- the stages ---- */

/* A new stage at the end; past the limit the last one is overwritten and the file refused. */
static llmi_stage *llmi_add_stage(llmi_reader *rd, llmi_stages *s, int kind)
{
    if (s->count >= LLMI_MAX_STEPS) {
        LLMI_REFUSE(rd, MOQ_E_LIMIT, "a sequence of more than %d steps", LLMI_MAX_STEPS);
        s->count--;
    }
    llmi_stage *x = &s->list[s->count++];
    memset(x, 0, sizeof *x);
    x->kind = kind;
    x->from = x->to = "";
    return x;
}

/* A compiled pattern, or NULL with the error kept. */
static const llmi_regex *llmi_read_regex(llmi_reader *rd, const char *pattern, int literal)
{
    const llmi_regex *x = rd->code < 0 ? NULL : llmi_regex_make(pattern, strlen(pattern), literal, &rd->t->u, &rd->t->r, rd->err);
    if (!x && rd->code >= 0) rd->code = rd->err ? rd->err->code : MOQ_E_UNSUPPORTED;
    return x;
}

/* {"String": ".."} or {"Regex": ".."} into a stage; a literal is compiled only for splitting. */
static void llmi_read_pattern(llmi_reader *rd, const moq_json *v, llmi_stage *x, int compile)
{
    const char *text = llmi_word(v, "String", NULL), *regex = llmi_word(v, "Regex", NULL);
    if (!text && !regex) LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "a pattern without 'String' or 'Regex'");
    else if (regex || compile) x->pattern = llmi_read_regex(rd, regex ? regex : text, !regex);
    if (text) x->from = llmi_keep(rd, text);
    if (text && !*text) LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "a pattern that is an empty text");
}

/* Metaspace writes spaces as a visible character and may put one in front. Files before prepend_scheme say add_prefix_space. */
static void llmi_read_metaspace(llmi_reader *rd, const moq_json *v, llmi_stages *out)
{
    llmi_stage *x = llmi_add_stage(rd, out, LLMI_METASPACE);
    const char *scheme = llmi_word(v, "prepend_scheme", "always");
    x->to = llmi_keep(rd, llmi_word(v, "replacement", "\xe2\x96\x81"));
    x->prefix = strcmp(scheme, "never") == 0 || !llmi_flag(v, "add_prefix_space", 1) ? LLMI_NEVER :
                strcmp(scheme, "first") == 0 ? LLMI_FIRST : LLMI_ALWAYS;
    x->behavior = LLMI_WITH_NEXT;
    if (llmi_flag(v, "split", 1)) x->pattern = llmi_read_regex(rd, x->to, 1);
}

/* Normalizers without settings, and the tables they need. 0: the type is none of them. */
static int llmi_read_plain_normalizer(llmi_reader *rd, const char *type)
{
    static const struct { const char *type; int kind; } known[] = {
        {"NFC", LLMI_NFC}, {"NFD", LLMI_NFD}, {"NFKC", LLMI_NFKC}, {"NFKD", LLMI_NFKD}, {"StripAccents", LLMI_STRIP_ACCENTS}, {"Lowercase", LLMI_LOWERCASE},
        {"Nmt", LLMI_NMT}};
    llm_tokenizer *t = rd->t;
    for (size_t i = 0; i < LLMI_COUNT(known); i++) {
        if (strcmp(known[i].type, type) != 0) continue;
        int kind = known[i].kind, ok = 1;
        llmi_add_stage(rd, &t->normalizer, kind);
        if (kind <= LLMI_NFKC) ok = llmi_unicode_normalization(&t->u, &t->r);
        if (kind == LLMI_NFKD || kind == LLMI_NFKC) ok = ok && llmi_unicode_compat(&t->u, &t->r);
        if (kind == LLMI_LOWERCASE) ok = llmi_unicode_lower(&t->u, &t->r);
        if (!ok) llmi_reader_nomem(rd);
        return 1;
    }
    return 0;
}

/* Four bytes, the lowest first. */
static uint32_t llmi_little(const uint8_t *b)
{
    return b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

/* Six bits of base64; -1: none. */
static int llmi_base64_digit(int c)
{
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

/* Base64 with its padding into out, which has room for 3/4 of it. Returns the bytes; SIZE_MAX: it is not base64. */
static size_t llmi_base64(const char *s, size_t n, uint8_t *out)
{
    size_t used = 0;
    uint32_t bits = 0;
    if (n % 4) return SIZE_MAX;
    size_t pad = n && s[n - 1] == '=' ? 1u + (s[n - 2] == '=') : 0;
    for (size_t i = 0; i < n - pad; i++) {
        int d = llmi_base64_digit(s[i]);
        if (d < 0) return SIZE_MAX;
        bits = bits << 6 | (uint32_t)d;
        if (i % 4) out[used++] = (uint8_t)(bits >> (6 - 2 * (i % 4)));
    }
    return used;
}

/* The map of a Precompiled normalizer: base64 of the bytes of the double array (32 bits), its units, and texts that end with zeros. */
static const llmi_charsmap *llmi_read_charsmap(llmi_reader *rd, const char *text)
{
    size_t n = strlen(text);
    llmi_charsmap *map = rd->code < 0 ? NULL : (llmi_charsmap *)llmi_take(&rd->t->r, 1, sizeof *map);
    uint8_t *data = map ? (uint8_t *)llmi_take(&rd->t->r, n / 4 * 3 + 1, 1) : NULL; /* one zero more ends the last text */
    if (!data) { llmi_reader_nomem(rd); return NULL; }
    size_t bytes = llmi_base64(text, n, data), units = bytes != SIZE_MAX && bytes >= 4 ? llmi_little(data) : SIZE_MAX;
    if (units == SIZE_MAX || units % 4 || units < 4 || units > bytes - 4) {
        LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "precompiled_charsmap is not base64 of a double array and its texts");
        return NULL;
    }
    uint32_t *unit = (uint32_t *)llmi_take(&rd->t->r, units / 4, sizeof *unit);
    if (!unit) { llmi_reader_nomem(rd); return NULL; }
    for (size_t i = 0; i < units / 4; i++) unit[i] = llmi_little(data + 4 + 4 * i);
    map->units = unit;
    map->unit_count = units / 4;
    map->texts = (const char *)data + 4 + units;
    map->bytes = bytes - 4 - units;
    for (size_t i = 0, m; i < map->bytes; i += m) {
        uint32_t c;
        m = llmi_utf8_get(map->texts + i, map->bytes - i, &c, NULL);
        if (c == LLMI_REPLACEMENT && m != 3) LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "the texts of precompiled_charsmap are not UTF-8");
    }
    return map;
}

/* The key "normalizer"; sequences are flattened, which keeps their order. */
static void llmi_read_normalizer(llmi_reader *rd, const moq_json *v)
{
    llmi_stages *out = &rd->t->normalizer;
    const char *type = llmi_word(v, "type", "(none)");
    if (!v || rd->code < 0) return;
    if (strcmp(type, "Sequence") == 0) {
        const moq_json *list = llmi_member(v, "normalizers");
        for (const moq_json *e = moq_json_first(list); e; e = moq_json_next(list, e)) llmi_read_normalizer(rd, e);
    } else if (llmi_read_plain_normalizer(rd, type)) {
        return;
    } else if (strcmp(type, "Precompiled") == 0) {
        llmi_add_stage(rd, out, LLMI_PRECOMPILED)->map = llmi_read_charsmap(rd, llmi_word(v, "precompiled_charsmap", ""));
    } else if (strcmp(type, "Prepend") == 0) {
        llmi_add_stage(rd, out, LLMI_PREPEND)->to = llmi_keep(rd, llmi_word(v, "prepend", ""));
    } else if (strcmp(type, "Replace") == 0) {
        llmi_stage *x = llmi_add_stage(rd, out, LLMI_REPLACE);
        llmi_read_pattern(rd, llmi_member(v, "pattern"), x, 0);
        x->to = llmi_keep(rd, llmi_word(v, "content", ""));
    } else if (strcmp(type, "Strip") == 0) {
        llmi_stage *x = llmi_add_stage(rd, out, LLMI_STRIP);
        x->left = llmi_flag(v, "strip_left", 1);
        x->right = llmi_flag(v, "strip_right", 1);
    } else {
        LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED,
                    "normalizer '%q'; known are NFC, NFD, NFKC, NFKD, Lowercase, Nmt, Precompiled, Prepend, Replace, Strip, StripAccents, Sequence", type);
    }
}

/* What happens to the matches of a Split. */
static int llmi_behavior(llmi_reader *rd, const char *name)
{
    static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
    for (size_t i = 0; i < LLMI_COUNT(names); i++)
        if (strcmp(names[i], name) == 0) return (int)i;
    LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED, "split behavior '%q'", name);
    return LLMI_ISOLATED;
}

/* Pre-tokenizers that are a fixed pattern. */
static const struct { const char *type, *pattern; int behavior, invert; } llmi_fixed_splits[] = {
    {"Whitespace", "\\w+|[^\\w\\s]+", LLMI_REMOVED, 1},
    {"WhitespaceSplit", "\\s", LLMI_REMOVED, 0},
    {"Punctuation", "[\\p{P}$+<=>^`|~]", LLMI_ISOLATED, 0},
    {"Digits", "\\p{N}+", LLMI_ISOLATED, 0},
    {"Digits, each", "\\p{N}", LLMI_ISOLATED, 0},
    {"ByteLevel", "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", LLMI_ISOLATED, 0}, /* of GPT-2 */
};

/* A pre-tokenizer that is a known pattern; 0 when the type is none of them. */
static int llmi_read_fixed_split(llmi_reader *rd, const char *type, const char *behavior)
{
    for (size_t i = 0; i < LLMI_COUNT(llmi_fixed_splits); i++) {
        if (strcmp(llmi_fixed_splits[i].type, type) != 0) continue;
        llmi_stage *x = llmi_add_stage(rd, &rd->t->splitter, LLMI_SPLIT);
        x->pattern = llmi_read_regex(rd, llmi_fixed_splits[i].pattern, 0);
        x->behavior = behavior ? llmi_behavior(rd, behavior) : llmi_fixed_splits[i].behavior;
        x->invert = llmi_fixed_splits[i].invert;
        return 1;
    }
    return 0;
}

/* The key "pre_tokenizer". ByteLevel turns text into byte letters, so nothing may look at characters after it. */
static void llmi_read_splitter(llmi_reader *rd, const moq_json *v)
{
    llmi_stages *out = &rd->t->splitter;
    const char *type = llmi_word(v, "type", "(none)");
    if (!v || rd->code < 0) return;
    if (rd->t->byte_level) LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED, "pre-tokenizer '%q' after ByteLevel, which must be the last", type);
    if (strcmp(type, "Sequence") == 0) {
        const moq_json *list = llmi_member(v, "pretokenizers");
        for (const moq_json *e = moq_json_first(list); e; e = moq_json_next(list, e)) llmi_read_splitter(rd, e);
    } else if (strcmp(type, "Split") == 0) {
        llmi_stage *x = llmi_add_stage(rd, out, LLMI_SPLIT);
        llmi_read_pattern(rd, llmi_member(v, "pattern"), x, 1);
        x->behavior = llmi_behavior(rd, llmi_word(v, "behavior", "(none)"));
        x->invert = llmi_flag(v, "invert", 0);
    } else if (strcmp(type, "ByteLevel") == 0) {
        llmi_add_stage(rd, out, LLMI_BYTES)->prefix = llmi_flag(v, "add_prefix_space", 1);
        if (llmi_flag(v, "use_regex", 1)) llmi_read_fixed_split(rd, type, NULL);
        rd->t->byte_level = 1;
    } else if (strcmp(type, "Metaspace") == 0) {
        llmi_read_metaspace(rd, v, out);
    } else if (!llmi_read_fixed_split(rd, llmi_flag(v, "individual_digits", 0) ? "Digits, each" : type, llmi_word(v, "behavior", NULL))) {
        LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED,
                    "pre-tokenizer '%q'; known are Split, ByteLevel, Digits, Metaspace, Punctuation, Whitespace, Sequence", type);
    }
}

/* The key "decoder"; sequences are flattened. */
static void llmi_read_decoder(llmi_reader *rd, const moq_json *v)
{
    llmi_stages *out = &rd->t->decoder;
    const char *type = llmi_word(v, "type", "(none)");
    if (!v || rd->code < 0) return;
    if (strcmp(type, "Sequence") == 0) {
        const moq_json *list = llmi_member(v, "decoders");
        for (const moq_json *e = moq_json_first(list); e; e = moq_json_next(list, e)) llmi_read_decoder(rd, e);
    } else if (strcmp(type, "ByteLevel") == 0) {
        llmi_add_stage(rd, out, LLMI_BYTES);
    } else if (strcmp(type, "ByteFallback") == 0) {
        llmi_add_stage(rd, out, LLMI_BYTE_FALLBACK);
    } else if (strcmp(type, "Fuse") == 0) {
        llmi_add_stage(rd, out, LLMI_FUSE);
    } else if (strcmp(type, "Metaspace") == 0) {
        llmi_read_metaspace(rd, v, out);
    } else if (strcmp(type, "Replace") == 0) {
        llmi_stage *x = llmi_add_stage(rd, out, LLMI_REPLACE);
        llmi_read_pattern(rd, llmi_member(v, "pattern"), x, 0);
        if (x->pattern) LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED, "a decoder that replaces a regular expression");
        x->to = llmi_keep(rd, llmi_word(v, "content", ""));
    } else if (strcmp(type, "Strip") == 0) {
        llmi_stage *x = llmi_add_stage(rd, out, LLMI_STRIP);
        int64_t start = 0, stop = 0;
        x->from = llmi_keep(rd, llmi_word(v, "content", " "));
        int known = moq_json_int(moq_json_find(v, "start"), &start) && moq_json_int(moq_json_find(v, "stop"), &stop);
        if (!known || start < 0 || start > 1000 || stop != 0)
            LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED, "decoder Strip with start %lld and stop %lld; stop must be 0", (long long)start, (long long)stop);
        x->left = (int32_t)start;
    } else {
        LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED, "decoder '%q'; known are ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip, Sequence", type);
    }
}

/* The decoder's order must be one that single tokens can follow: nothing but Strip after Fuse. */
static void llmi_check_decoder(llmi_reader *rd)
{
    const llmi_stages *d = &rd->t->decoder;
    int fused = 0;
    for (int32_t i = 0; i < d->count; i++) {
        if (fused && d->list[i].kind != LLMI_STRIP && d->list[i].kind != LLMI_FUSE)
            LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED, "a decoder with a step other than Strip after Fuse");
        if (!fused && d->list[i].kind == LLMI_STRIP) LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED, "a decoder with Strip before Fuse");
        fused |= d->list[i].kind == LLMI_FUSE;
    }
}

/* ---- post-processors: ids around a text ---- */

/* One id that goes before or after every text. */
static void llmi_add_around(llmi_reader *rd, int after, const moq_json *v)
{
    llm_tokenizer *t = rd->t;
    int32_t id = llmi_read_id(rd, v, "of the post-processor"), *count = after ? &t->after_count : &t->before_count;
    if (rd->code < 0) return;
    if (*count >= LLMI_MAX_AROUND) LLMI_REFUSE(rd, MOQ_E_LIMIT, "the post-processor adds more than %d tokens", LLMI_MAX_AROUND);
    else (after ? t->after : t->before)[(*count)++] = id;
}

/* The template for a single text: what stands before the sequence goes before, the rest after. */
static void llmi_read_template(llmi_reader *rd, const moq_json *v)
{
    const moq_json *single = llmi_member(v, "single"), *known = llmi_member(v, "special_tokens");
    int after = 0;
    for (const moq_json *e = moq_json_first(single); e && rd->code >= 0; e = moq_json_next(single, e)) {
        const char *name = llmi_word(llmi_member(e, "SpecialToken"), "id", NULL);
        if (!name) { after = 1; continue; }
        const moq_json *ids = llmi_member(llmi_member(known, name), "ids");
        if (!ids) LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "the post-processor uses '%q', which its special_tokens do not define", name);
        for (const moq_json *id = moq_json_first(ids); id; id = moq_json_next(ids, id)) llmi_add_around(rd, after, id);
    }
}

/* The key "post_processor". ByteLevel only trims offsets, which nobody asks for here. */
static void llmi_read_post(llmi_reader *rd, const moq_json *v)
{
    const char *type = llmi_word(v, "type", "(none)");
    if (!v || rd->code < 0) return;
    if (strcmp(type, "Sequence") == 0) {
        const moq_json *list = llmi_member(v, "processors");
        for (const moq_json *e = moq_json_first(list); e; e = moq_json_next(list, e)) llmi_read_post(rd, e);
    } else if (strcmp(type, "TemplateProcessing") == 0) {
        llmi_read_template(rd, v);
    } else if (strcmp(type, "RobertaProcessing") == 0 || strcmp(type, "BertProcessing") == 0) {
        llmi_add_around(rd, 0, moq_json_at(llmi_member(v, "cls"), 1));
        llmi_add_around(rd, 1, moq_json_at(llmi_member(v, "sep"), 1));
    } else if (strcmp(type, "ByteLevel") != 0) {
        LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED,
                    "post-processor '%q'; known are TemplateProcessing, ByteLevel, BertProcessing, RobertaProcessing, Sequence", type);
    }
}

/* ------------------------------------------------------------------------------------------------
   >>llm-normalizer  what happens to a text before it is cut
   Pure and linear in the text, but for the size of what replaces it; an empty text stays empty.
   ------------------------------------------------------------------------------------------------ */

/* Append s with every `from` replaced by `to`. 0: out of memory. */
static int llmi_replace_literal(const char *s, size_t n, const char *from, const char *to, llmi_bytes *out)
{
    size_t m = strlen(from), done = 0;
    for (size_t i = 0; m > 0 && i + m <= n;) {
        const char *p = (const char *)memchr(s + i, from[0], n - i - m + 1);
        if (!p) break;
        i = (size_t)(p - s);
        if (memcmp(p, from, m) != 0) { i++; continue; }
        if (!llmi_bytes_add(out, s + done, i - done) || !llmi_bytes_add(out, to, strlen(to))) return 0;
        done = i += m;
    }
    return llmi_bytes_add(out, s + done, n - done);
}

/* Append s with every match replaced by `to`. 0: out of memory. */
static int llmi_replace_pattern(llmi_matcher *m, const llmi_regex *x, const char *s, size_t n, const char *to, llmi_bytes *out)
{
    size_t done = 0;
    llmi_matcher_set(m, x, s, n);
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        size_t end = llmi_match(m, i);
        if (m->failed) return 0;
        if (end == LLMI_NO_MATCH || end == i) { i += llmi_utf8_get(s + i, n - i, &cp, NULL); continue; }
        if (!llmi_bytes_add(out, s + done, i - done) || !llmi_bytes_add(out, to, strlen(to))) return 0;
        done = i = end;
    }
    return llmi_bytes_add(out, s + done, n - done);
}

/* White space at the end of s[from, n): where it begins. */
static size_t llmi_space_before(const char *s, size_t from, size_t n)
{
    while (n > from) {
        uint32_t cp;
        size_t i = n - 1;
        while (i > from && ((uint8_t)s[i] & 0xc0) == 0x80) i--;
        llmi_utf8_get(s + i, n - i, &cp, NULL);
        if (!llmi_is_space(cp)) break;
        n = i;
    }
    return n;
}

/* White space at the start of s[i, n): where it ends. */
static size_t llmi_space_after(const char *s, size_t i, size_t n)
{
    while (i < n) {
        uint32_t cp;
        size_t m = llmi_utf8_get(s + i, n - i, &cp, NULL);
        if (!llmi_is_space(cp)) break;
        i += m;
    }
    return i;
}

/* Control characters vanish and odd spaces become one, as SentencePiece's rules of machine translation say. 0: out of memory. */
static int llmi_nmt(const char *s, size_t n, llmi_bytes *out)
{
    int ok = 1;
    for (size_t i = 0, m; i < n && ok; i += m) {
        uint32_t c;
        m = llmi_utf8_get(s + i, n - i, &c, NULL);
        if ((c >= 1 && c <= 8) || c == 0xb || (c >= 0xe && c <= 0x1f) || c == 0x7f || c == 0x8f || c == 0x9f) continue;
        int space = (c >= 9 && c <= 0xd) || c == 0x1680 || (c >= 0x200b && c <= 0x200f) || c == 0x2028 || c == 0x2029 || c == 0x2581 ||
                    c == 0xfeff || c == 0xfffd;
        ok = space ? llmi_bytes_add(out, " ", 1) : llmi_bytes_add(out, s + i, m);
    }
    return ok;
}

/* ---- replacements compiled by SentencePiece ---- */

/* What the shortest beginning of s that is in the map becomes; NULL: none is. The fields of a unit: label in bits 0..7, has a value 8,
   offset from bit 10 on, shifted by 8 more when bit 9 is set; bit 31 marks a value. */
static const char *llmi_charsmap_find(const llmi_charsmap *map, const char *s, size_t n)
{
    size_t at = 0;
    uint32_t unit = map->unit_count ? map->units[0] : 0;
    at ^= (size_t)(unit >> 10) << ((unit & 0x200u) >> 6);
    for (size_t i = 0; i < n && s[i]; i++) {
        at ^= (uint8_t)s[i];
        if (at >= map->unit_count) return NULL;
        unit = map->units[at];
        if ((unit & 0x800000ffu) != (uint8_t)s[i]) return NULL;
        at ^= (size_t)(unit >> 10) << ((unit & 0x200u) >> 6);
        if (!(unit & 0x100u)) continue;
        if (at >= map->unit_count) return NULL;
        size_t place = map->units[at] & 0x7fffffffu;
        return place < map->bytes ? map->texts + place : NULL;
    }
    return NULL;
}

/* How a character joins its neighbours in a grapheme cluster (Unicode standard annex 29). */
enum { LLMI_JOINS_NOT, LLMI_JOINS_CONTROL, LLMI_JOINS_BEFORE, LLMI_JOINS_AFTER, LLMI_JOINS_L, LLMI_JOINS_V, LLMI_JOINS_T, LLMI_JOINS_LV };

/* Characters outside general category M that extend a cluster, marks that do not, controls, and what joins the character after it;
   pairs first, last. Unicode 17, as in the package. */
static const uint32_t llmi_extending[] = {0xe33, 0xe33, 0xeb3, 0xeb3, 0x1acf, 0x1add, 0x1ae0, 0x1aeb, 0x200c, 0x200d, 0xff9e, 0xff9f, 0x10efa, 0x10efb,
    0x11b60, 0x11b67, 0x1e6e3, 0x1e6e3, 0x1e6e6, 0x1e6e6, 0x1e6ee, 0x1e6ef, 0x1e6f5, 0x1e6f5, 0x1f3fb, 0x1f3ff, 0xe0020, 0xe007f};
static const uint32_t llmi_lone_marks[] = {0x102b, 0x102c, 0x1038, 0x1038, 0x1062, 0x1064, 0x1067, 0x106d, 0x1083, 0x1083, 0x1087, 0x108c, 0x108f, 0x108f,
    0x109a, 0x109c, 0x1a61, 0x1a61, 0x1a63, 0x1a64, 0xaa7b, 0xaa7b, 0xaa7d, 0xaa7d, 0x11720, 0x11721};
static const uint32_t llmi_controls[] = {0, 0x1f, 0x7f, 0x9f, 0xad, 0xad, 0x61c, 0x61c, 0x180e, 0x180e, 0x200b, 0x200b, 0x200e, 0x200f, 0x2028, 0x202e,
    0x2060, 0x206f, 0xfeff, 0xfeff, 0xfff0, 0xfffb};
static const uint32_t llmi_leading[] = {0x600, 0x605, 0x6dd, 0x6dd, 0x70f, 0x70f, 0x890, 0x891, 0x8e2, 0x8e2, 0xd4e, 0xd4e, 0x110bd, 0x110bd, 0x110cd, 0x110cd,
    0x111c2, 0x111c3, 0x113d1, 0x113d1, 0x1193f, 0x1193f, 0x11941, 0x11941, 0x11a84, 0x11a89, 0x11d46, 0x11d46, 0x11f02, 0x11f02};

/* Is c in one of `count` ranges, given as pairs? */
static int llmi_in_ranges(const uint32_t *ranges, size_t count, uint32_t c)
{
    for (size_t i = 0; i < count; i += 2)
        if (c >= ranges[i] && c <= ranges[i + 1]) return 1;
    return 0;
}

/* How a character joins its neighbours. */
static int llmi_joins(const llmi_unicode *u, uint32_t c)
{
    if (c < 0x300) return llmi_in_ranges(llmi_controls, 6, c) ? LLMI_JOINS_CONTROL : LLMI_JOINS_NOT;
    if (c >= 0xac00 && c <= 0xd7a3) return (c - 0xac00) % 28 ? LLMI_JOINS_T : LLMI_JOINS_LV;
    if ((c >= 0x1100 && c <= 0x115f) || (c >= 0xa960 && c <= 0xa97c)) return LLMI_JOINS_L;
    if ((c >= 0x1160 && c <= 0x11a7) || (c >= 0xd7b0 && c <= 0xd7c6)) return LLMI_JOINS_V;
    if ((c >= 0x11a8 && c <= 0x11ff) || (c >= 0xd7cb && c <= 0xd7fb)) return LLMI_JOINS_T;
    if (llmi_in_ranges(llmi_leading, LLMI_COUNT(llmi_leading), c)) return LLMI_JOINS_AFTER;
    if (llmi_in_ranges(llmi_extending, LLMI_COUNT(llmi_extending), c)) return LLMI_JOINS_BEFORE;
    if (llmi_class(u, c) == LLMI_CLASS_M) return llmi_in_ranges(llmi_lone_marks, LLMI_COUNT(llmi_lone_marks), c) ? LLMI_JOINS_NOT : LLMI_JOINS_BEFORE;
    return llmi_in_ranges(llmi_controls, LLMI_COUNT(llmi_controls), c) ? LLMI_JOINS_CONTROL : LLMI_JOINS_NOT;
}

/* Do two neighbours of these kinds stand in one cluster? Syllables: L before L, V, syllable; V before V, T; T before T.
   A whole syllable with a tail acts as T here; it begins like LV. */
static int llmi_is_joined(int a, int b, int b_is_syllable)
{
    if (a == LLMI_JOINS_CONTROL || b == LLMI_JOINS_CONTROL) return 0;
    if (b == LLMI_JOINS_BEFORE || a == LLMI_JOINS_AFTER) return 1;
    if (a == LLMI_JOINS_L) return b == LLMI_JOINS_L || b == LLMI_JOINS_V || b_is_syllable;
    if (a == LLMI_JOINS_V || a == LLMI_JOINS_LV) return b == LLMI_JOINS_V || (b == LLMI_JOINS_T && !b_is_syllable);
    return a == LLMI_JOINS_T && b == LLMI_JOINS_T && !b_is_syllable;
}

/* Bytes of the cluster at s. Emoji sequences, flags and Indic conjuncts are not looked for: their parts are too long to be replaced
   as one cluster, and a part of them that carries a short mark of its own does not occur. */
static size_t llmi_cluster(const llmi_unicode *u, const char *s, size_t n)
{
    uint32_t c;
    size_t at = llmi_utf8_get(s, n, &c, NULL);
    if (c == '\r' && n > 1 && s[1] == '\n') return 2;
    for (int kind = -1; at < n;) {
        if (c < 0x300 && (uint8_t)s[at] < 0xcc) break; /* the next one is below U+0300, too */
        if (kind < 0) kind = llmi_joins(u, c);
        size_t m = llmi_utf8_get(s + at, n - at, &c, NULL);
        int next = llmi_joins(u, c);
        if (!llmi_is_joined(kind, next, c >= 0xac00 && c <= 0xd7a3)) break;
        kind = next;
        at += m;
    }
    return at;
}

/* Appends a text with its replacements. Clusters below six bytes are looked up as a whole, of which a beginning counts for all of it;
   others character by character. This is what the package does, and so do vocabularies made with it. 0: out of memory. */
static int llmi_precompiled(const llmi_unicode *u, const llmi_charsmap *map, const char *s, size_t n, llmi_bytes *out)
{
    int ok = 1;
    for (size_t i = 0, size; i < n && ok; i += size) {
        size = llmi_cluster(u, s + i, n - i);
        const char *to = size < 6 ? llmi_charsmap_find(map, s + i, size) : NULL;
        if (to) { ok = llmi_bytes_add(out, to, strlen(to)); continue; }
        for (size_t k = 0, m; k < size && ok; k += m) {
            uint32_t c;
            m = llmi_utf8_get(s + i + k, size - k, &c, NULL);
            to = llmi_charsmap_find(map, s + i + k, m);
            ok = to ? llmi_bytes_add(out, to, strlen(to)) : llmi_bytes_add(out, s + i + k, m);
        }
    }
    return ok;
}

/* ---- the stages ---- */

/* Append what one stage makes of s. An empty text stays empty: nothing is put in front of it. 0: out of memory. */
static int llmi_normalize_stage(const llmi_unicode *u, llmi_matcher *m, const llmi_stage *x, const char *s, size_t n, llmi_bytes *out)
{
    size_t from = 0;
    switch (x->kind) {
    case LLMI_NFD:
    case LLMI_NFC:
    case LLMI_NFKD:
    case LLMI_NFKC:
        return llmi_normalize(u, s, n, x->kind & 1, x->kind >> 1 & 1, out);
    case LLMI_STRIP_ACCENTS:
        return llmi_strip_accents(u, s, n, out);
    case LLMI_LOWERCASE:
        return llmi_lower(u, s, n, out);
    case LLMI_NMT:
        return llmi_nmt(s, n, out);
    case LLMI_PRECOMPILED:
        return llmi_precompiled(u, x->map, s, n, out);
    case LLMI_PREPEND:
        return n == 0 || (llmi_bytes_add(out, x->to, strlen(x->to)) && llmi_bytes_add(out, s, n));
    case LLMI_STRIP:
        if (x->left) from = llmi_space_after(s, 0, n);
        if (x->right) n = llmi_space_before(s, from, n);
        return llmi_bytes_add(out, s + from, n - from);
    default:
        return x->pattern ? llmi_replace_pattern(m, x->pattern, s, n, x->to, out) : llmi_replace_literal(s, n, x->from, x->to, out);
    }
}

/* ------------------------------------------------------------------------------------------------
   >>llm-encode      text to ids and back: added tokens, normalizer, pre-tokenizer, merges, decoder
   The stages run in the order of the tokenizers package; every step is linear in the text, merging n log n.
   ------------------------------------------------------------------------------------------------ */

/* Text of which some may hold control tokens (`special`) and some may not, such as what a user said. */
typedef struct llmi_part { const char *text; size_t bytes; int special; } llmi_part;

typedef struct llmi_symbol { int32_t id, before, after; } llmi_symbol; /* id -1: merged away */
typedef struct llmi_candidate { uint64_t key; int32_t id; } llmi_candidate; /* key: rank, then position */

/* The best segmentation that ends at a byte: its score, its last piece. start -1: there is none. */
typedef struct llmi_lattice { double score; int32_t id, start; } llmi_lattice;

/* Everything one call needs; nothing in the tokenizer changes. */
typedef struct llmi_coder {
    const llm_tokenizer *t;
    moq_allocator a;
    llmi_bytes text;          /* valid UTF-8 */
    llmi_ids ranges;          /* pairs: where control tokens may stand */
    llmi_bytes normal, spare; /* one segment after its normalizer */
    llmi_bytes split;         /* the same after a pre-tokenizer that changes text */
    llmi_ids found[2];        /* triples: id or -1, start, end */
    llmi_ids pieces, next;    /* pairs: start, end */
    llmi_ids spans;           /* triples: start, end, is a match */
    llmi_matcher m;
    llmi_symbol *symbols;
    llmi_candidate *heap;
    llmi_lattice *lattice;    /* Unigram: the best way to each byte */
    size_t lattice_capacity;
    size_t symbol_capacity, heap_capacity, heap_count;
    llmi_ids out;
} llmi_coder;

/* An empty coder; nothing is allocated until there is text. */
static void llmi_coder_make(llmi_coder *c, const llm_tokenizer *t)
{
    memset(c, 0, sizeof *c);
    c->t = t;
    c->a = c->m.a = t->a;
    c->m.u = &t->u;
    c->text = c->normal = c->spare = c->split = llmi_bytes_make(&t->a);
    c->ranges = c->found[0] = c->found[1] = c->pieces = c->next = c->spans = c->out = llmi_ids_make(&t->a);
}

/* Frees everything one call took. */
static void llmi_coder_drop(llmi_coder *c)
{
    llmi_bytes *texts[] = {&c->text, &c->normal, &c->spare, &c->split};
    llmi_ids *lists[] = {&c->ranges, &c->found[0], &c->found[1], &c->pieces, &c->next, &c->spans, &c->out};
    for (size_t i = 0; i < LLMI_COUNT(texts); i++) llmi_bytes_drop(texts[i]);
    for (size_t i = 0; i < LLMI_COUNT(lists); i++) llmi_ids_drop(lists[i]);
    llmi_matcher_drop(&c->m);
    moq_release(&c->a, c->symbols, c->symbol_capacity * sizeof *c->symbols);
    moq_release(&c->a, c->heap, c->heap_capacity * sizeof *c->heap);
    moq_release(&c->a, c->lattice, c->lattice_capacity * sizeof *c->lattice);
}

/* Append a pair of positions; texts stay below 2^29 bytes, so they fit. */
static int llmi_add2(llmi_ids *v, size_t a, size_t b)
{
    int32_t x[2];
    x[0] = (int32_t)a;
    x[1] = (int32_t)b;
    return llmi_ids_add(v, x, 2);
}

/* Append a triple. */
static int llmi_add3(llmi_ids *v, int32_t a, size_t b, size_t c)
{
    int32_t x[3];
    x[0] = a;
    x[1] = (int32_t)b;
    x[2] = (int32_t)c;
    return llmi_ids_add(v, x, 3);
}

/* ---- normalizer ---- */

/* c->normal = normalizer(s). */
static int llmi_run_normalizer(llmi_coder *c, const char *s, size_t n)
{
    const llmi_stages *list = &c->t->normalizer;
    c->normal.count = 0;
    if (!llmi_bytes_add(&c->normal, s, n)) return 0;
    for (int32_t i = 0; i < list->count; i++) {
        llmi_bytes t = c->spare;
        t.count = 0;
        int ok = llmi_normalize_stage(&c->t->u, &c->m, &list->list[i], c->normal.data, c->normal.count, &t);
        c->spare = c->normal;
        c->normal = t;
        if (!ok) return 0;
    }
    return 1;
}

/* ---- added tokens ---- */

/* The slot of an edge: the one that holds it, or the free one where it belongs. */
static llmi_edge *llmi_trie_edge(const llmi_trie *t, uint32_t node, uint8_t byte)
{
    uint64_t key = (uint64_t)node * 256 + byte + 1;
    size_t i = (size_t)llmi_fold(key, 0x9e3779b97f4a7c15u) & t->mask;
    while (t->edges[i].key && t->edges[i].key != key) i = (i + 1) & t->mask;
    return &t->edges[i];
}

/* The longest added token at s: its index + 1, or 0. */
static int32_t llmi_trie_find(const llmi_trie *t, int root, const char *s, size_t n, size_t *bytes)
{
    int32_t best = 0;
    uint32_t node = (uint32_t)root;
    if (!t->edges || !t->first[root][(uint8_t)s[0]]) return 0;
    for (size_t i = 0; i < n; i++) {
        const llmi_edge *e = llmi_trie_edge(t, node, (uint8_t)s[i]);
        if (!e->key) break;
        node = e->to;
        if (t->leaf[node]) { best = t->leaf[node]; *bytes = i + 1; }
    }
    return best;
}

/* Word characters as Rust's regular expressions know them, for tokens that must stand alone. */
static int llmi_is_word(const llmi_unicode *u, uint32_t c)
{
    int in = (int)((uint32_t)LLMI_WORD >> llmi_class(u, c) & 1u) || c == 0x200c || c == 0x200d; /* joiners too */
    for (size_t i = 0; i < LLMI_COUNT(llmi_word_extra) && !in; i += 2) in = c >= llmi_word_extra[i] && c <= llmi_word_extra[i + 1];
    return in;
}

/* Does a word go on across one end of [start, end)? */
static int llmi_within_word(const llmi_unicode *u, const char *s, size_t n, size_t start, size_t end)
{
    uint32_t cp;
    size_t i = start;
    if (end < n) {
        llmi_utf8_get(s + end, n - end, &cp, NULL);
        if (llmi_is_word(u, cp)) return 1;
    }
    if (i == 0) return 0;
    for (i--; i > 0 && ((uint8_t)s[i] & 0xc0) == 0x80; i--) {}
    llmi_utf8_get(s + i, start - i, &cp, NULL);
    return llmi_is_word(u, cp);
}

/* May a control token stand at [start, end) of the text? *cursor walks along the ranges. */
static int llmi_is_allowed(const llmi_ids *ranges, size_t *cursor, size_t start, size_t end)
{
    while (*cursor < ranges->count && (size_t)ranges->data[*cursor + 1] < end) *cursor += 2;
    return *cursor < ranges->count && (size_t)ranges->data[*cursor] <= start;
}

/* Cut a text at its added tokens: leftmost, then longest. Control tokens that may not stand there are skipped, as the
   reference does: what they cover is not searched again. `base`: where s lies in the whole text, for c->ranges;
   SIZE_MAX: it is no longer that text, and control tokens need one range that covers everything. */
static int llmi_find_added(llmi_coder *c, int root, const char *s, size_t n, size_t base, llmi_ids *out)
{
    const llm_tokenizer *t = c->t;
    size_t done = 0, cursor = 0, bytes = 0, total = c->text.count;
    out->count = 0;
    for (size_t i = 0; i < n;) {
        int32_t index = llmi_trie_find(&t->trie, root, s + i, n - i, &bytes);
        if (index == 0) { i++; continue; }
        const llmi_added *x = &t->added[index - 1];
        size_t start = i, end = i + bytes;
        i = end;
        size_t from = base == SIZE_MAX ? 0 : base + start, to = base == SIZE_MAX ? total : base + end;
        if (x->special && !llmi_is_allowed(&c->ranges, &cursor, from, to)) continue;
        if (x->single_word && llmi_within_word(&t->u, s, n, start, end)) continue;
        if (x->lstrip) start = llmi_space_before(s, done, start);
        if (x->rstrip) end = llmi_space_after(s, end, n);
        if (done < start && !llmi_add3(out, -1, done, start)) return 0;
        if (!llmi_add3(out, x->id, start, end)) return 0;
        done = end;
    }
    return done == n || llmi_add3(out, -1, done, n);
}

/* ---- pre-tokenizer ---- */

/* All matches of a pattern in s[start, end) and what lies between, as triples. */
static int llmi_find_spans(llmi_coder *c, const llmi_stage *x, const char *s, size_t start, size_t end)
{
    size_t n = end - start, done = 0;
    int hit = !x->invert;
    c->spans.count = 0;
    llmi_matcher_set(&c->m, x->pattern, s + start, n);
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        size_t to = llmi_match(&c->m, i);
        if (c->m.failed) return 0;
        if (to == LLMI_NO_MATCH || to == i) {
            if (to == i && done < i && !llmi_add3(&c->spans, (int32_t)(start + done), start + i, (size_t)!hit)) return 0;
            if (to == i) done = i;
            i += llmi_utf8_get(s + start + i, n - i, &cp, NULL);
            continue;
        }
        if (done < i && !llmi_add3(&c->spans, (int32_t)(start + done), start + i, (size_t)!hit)) return 0;
        if (!llmi_add3(&c->spans, (int32_t)(start + i), start + to, (size_t)hit)) return 0;
        done = i = to;
    }
    return done == n || llmi_add3(&c->spans, (int32_t)(start + done), end, (size_t)!hit);
}

/* c->spans become pieces: matches stay alone, vanish, or join a neighbour. */
static int llmi_join_spans(llmi_coder *c, int behavior)
{
    int32_t *v = c->spans.data;
    size_t count = c->spans.count / 3, used = 0;
    int before = 0;
    if (behavior == LLMI_WITH_NEXT) {
        for (size_t i = 0; i < count; i++) {
            if (used > 0 && v[3 * used - 1] && !v[3 * i + 2]) { /* a match takes along what comes right after it */
                v[3 * used - 2] = v[3 * i + 1];
                v[3 * used - 1] = 0;
                continue;
            }
            memmove(v + 3 * used, v + 3 * i, 3 * sizeof *v);
            used++;
        }
        count = used;
    }
    for (size_t i = 0; i < count; i++) {
        int hit = v[3 * i + 2];
        int joins = behavior == LLMI_CONTIGUOUS ? hit == before : behavior == LLMI_WITH_PREVIOUS ? hit && !before : 0;
        before = hit;
        if (behavior == LLMI_REMOVED && hit) continue;
        if (joins && i > 0) {
            c->next.data[c->next.count - 1] = v[3 * i + 1];
            continue;
        }
        if (!llmi_add2(&c->next, (size_t)v[3 * i], (size_t)v[3 * i + 1])) return 0;
    }
    return 1;
}

/* Every piece is cut by the pattern as a text of its own: no look ahead crosses a border. */
static int llmi_split_pieces(llmi_coder *c, const llmi_stage *x, const char *s)
{
    c->next.count = 0;
    for (size_t i = 0; i < c->pieces.count; i += 2) {
        if (!llmi_find_spans(c, x, s, (size_t)c->pieces.data[i], (size_t)c->pieces.data[i + 1])) return 0;
        if (!llmi_join_spans(c, x->behavior)) return 0;
    }
    llmi_ids t = c->pieces;
    c->pieces = c->next;
    c->next = t;
    return 1;
}

/* Write every piece anew with its prefix, and for Metaspace with visible spaces; *s and *n become the new text. */
static int llmi_prefix_pieces(llmi_coder *c, const llmi_stage *x, int at_start, const char **s)
{
    const char *prefix = x->kind == LLMI_BYTES ? " " : x->to;
    size_t bytes = strlen(prefix);
    llmi_bytes out = c->spare;
    int ok = 1;
    out.count = 0;
    for (size_t i = 0; i < c->pieces.count && ok; i += 2) {
        const char *p = *s + c->pieces.data[i];
        size_t n = (size_t)(c->pieces.data[i + 1] - c->pieces.data[i]), from = out.count;
        int has = n >= bytes && memcmp(p, prefix, bytes) == 0, wanted = x->kind == LLMI_BYTES ? x->prefix : x->prefix == LLMI_ALWAYS;
        if (x->kind == LLMI_METASPACE && x->prefix == LLMI_FIRST) wanted = at_start && i == 0;
        if (n > 0 && p[0] == ' ') has = 1;
        if (wanted && !has) ok = llmi_bytes_add(&out, prefix, bytes);
        if (ok) ok = x->kind == LLMI_BYTES ? llmi_bytes_add(&out, p, n) : llmi_replace_literal(p, n, " ", x->to, &out);
        c->pieces.data[i] = (int32_t)from;
        c->pieces.data[i + 1] = (int32_t)out.count;
    }
    c->spare = c->split;
    c->split = out;
    *s = out.data;
    return ok;
}

/* ---- merges ---- */

/* A binary heap with the smallest key on top. 0: out of memory. */
static int llmi_heap_push(llmi_coder *c, uint64_t key, int32_t id)
{
    if (c->heap_count == c->heap_capacity) {
        llmi_candidate *p = (llmi_candidate *)llmi_grow(&c->a, c->heap, c->heap_count, &c->heap_capacity, c->heap_count + 1, sizeof *p);
        if (!p) return 0;
        c->heap = p;
    }
    size_t i = c->heap_count++;
    for (; i > 0 && c->heap[(i - 1) / 2].key > key; i = (i - 1) / 2) c->heap[i] = c->heap[(i - 1) / 2];
    c->heap[i].key = key;
    c->heap[i].id = id;
    return 1;
}

/* Takes the candidate of the lowest rank, and of these the leftmost. */
static llmi_candidate llmi_heap_pop(llmi_coder *c)
{
    llmi_candidate top = c->heap[0], last = c->heap[--c->heap_count];
    size_t i = 0, n = c->heap_count;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= n) break;
        if (child + 1 < n && c->heap[child + 1].key < c->heap[child].key) child++;
        if (c->heap[child].key >= last.key) break;
        c->heap[i] = c->heap[child];
        i = child;
    }
    c->heap[i] = last;
    return top;
}

/* The pair that begins at symbol i becomes a candidate when there is a merge for it. */
static int llmi_offer(llmi_coder *c, int32_t i)
{
    const llmi_symbol *s = &c->symbols[i];
    if (s->after < 0) return 1;
    const llmi_merge *m = llmi_find_merge(c->t, s->id, c->symbols[s->after].id);
    return !m || llmi_heap_push(c, (uint64_t)(uint32_t)m->rank << 32 | (uint32_t)i, m->id);
}

/* Merge symbols [0, n): always the lowest rank, then the leftmost; what remains goes to the output. */
static int llmi_merge_symbols(llmi_coder *c, size_t n)
{
    c->heap_count = 0;
    for (size_t i = 0; i < n; i++) {
        c->symbols[i].before = (int32_t)i - 1;
        c->symbols[i].after = i + 1 < n ? (int32_t)i + 1 : -1;
    }
    for (size_t i = 0; i + 1 < n; i++)
        if (!llmi_offer(c, (int32_t)i)) return 0;
    while (c->heap_count > 0) {
        llmi_candidate top = llmi_heap_pop(c);
        int32_t at = (int32_t)(uint32_t)top.key;
        llmi_symbol *s = &c->symbols[at];
        if (s->id < 0 || s->after < 0) continue;
        llmi_symbol *next = &c->symbols[s->after];
        const llmi_merge *m = llmi_find_merge(c->t, s->id, next->id);
        if (!m || m->id != top.id) continue; /* one of the two has changed since */
        s->id = m->id;
        next->id = -1;
        s->after = next->after;
        if (s->after >= 0) c->symbols[s->after].before = at;
        if (s->before >= 0 && !llmi_offer(c, s->before)) return 0;
        if (!llmi_offer(c, at)) return 0;
    }
    for (int32_t i = 0; n > 0 && i >= 0; i = c->symbols[i].after)
        if (!llmi_ids_add(&c->out, &c->symbols[i].id, 1)) return 0;
    return 1;
}

/* Id of a text in the model's own vocabulary, without the tokens added to it; -1: none. */
static int32_t llmi_vocab_id(const llm_tokenizer *t, const char *s, size_t n)
{
    const llmi_slot *x = llmi_map_find(&t->names, s, n);
    return x && t->tokens[x->value].in_vocab ? x->value : -1;
}

/* The whole piece as one token, for ignore_merges; -1: none. */
static int32_t llmi_whole_piece(const llm_tokenizer *t, const char *s, size_t n)
{
    if (!t->byte_level) return llmi_vocab_id(t, s, n);
    char text[512];
    size_t m = 0;
    for (size_t i = 0; i < n; i++) {
        if (m + 4 > sizeof text) return -1;
        m += llmi_utf8_put(llmi_byte_letter((uint8_t)s[i]), text + m);
    }
    return llmi_vocab_id(t, text, m);
}

/* Symbols of one piece: bytes, or characters with bytes or the unknown token where a character is not in the vocabulary.
   Unknown bytes and characters without any of these vanish. */
static size_t llmi_first_symbols(llmi_coder *c, const char *s, size_t n)
{
    const llm_tokenizer *t = c->t;
    size_t used = 0;
    int unknown = 0; /* the last symbol is a run of unknowns */
    for (size_t i = 0, m; i < n; i += m) {
        uint32_t cp;
        int32_t id;
        m = t->byte_level ? 1 : llmi_utf8_get(s + i, n - i, &cp, NULL);
        id = t->byte_level ? t->byte_ids[(uint8_t)s[i]] : llmi_vocab_id(t, s + i, m);
        if (id < 0 && t->byte_fallback) {
            for (size_t k = 0; k < m; k++) c->symbols[used++].id = t->byte_ids[(uint8_t)s[i + k]];
            continue;
        }
        int joins = id < 0 && unknown && t->fuse_unk;
        unknown = id < 0 && t->unk >= 0;
        if (id < 0) id = t->unk;
        if (id >= 0 && !joins) c->symbols[used++].id = id;
    }
    return used;
}

/* A way to a byte, if it is better than the one known. */
static void llmi_lattice_offer(llmi_lattice *to, double score, int32_t id, size_t start)
{
    if (to->start >= 0 && !(score > to->score)) return;
    to->score = score;
    to->id = id;
    to->start = (int32_t)start;
}

/* What the best segmentation of Unigram gives for s[start, end): its id, its bytes, or the unknown token. 0: out of memory. */
static int llmi_add_unigram(llmi_coder *c, const char *s, size_t start, size_t end)
{
    const llm_tokenizer *t = c->t;
    const llmi_slot *slot = llmi_map_find(&t->names, s + start, end - start);
    int ok = 1;
    if (slot && t->tokens[slot->value].in_vocab) return llmi_ids_add(&c->out, &slot->value, 1);
    if (!t->byte_fallback) return t->unk < 0 || llmi_ids_add(&c->out, &t->unk, 1);
    for (size_t i = start; i < end && ok; i++) ok = llmi_ids_add(&c->out, &t->byte_ids[(uint8_t)s[i]], 1);
    return ok;
}

/* The part of the pieces [*lo, *hi), which agree in their first `depth` bytes, that goes on with this byte. */
static void llmi_narrow(const llm_tokenizer *t, int32_t *lo, int32_t *hi, uint32_t depth, uint8_t byte)
{
    int32_t ends[2];
    for (int k = 0; k < 2; k++) { /* the first that is not below, the first that is above */
        int32_t from = *lo, to = *hi;
        while (from < to) {
            int32_t mid = from + (to - from) / 2;
            int c = (uint8_t)t->pieces[mid].text[depth];
            if (c < byte + k) from = mid + 1;
            else to = mid;
        }
        ends[k] = from;
    }
    *lo = ends[0];
    *hi = ends[1];
}

/* Every piece that begins at s[at] is a way on from there; a character that no piece covers alone is unknown. */
static void llmi_lattice_step(llmi_coder *c, const char *s, size_t n, size_t at, size_t width)
{
    const llm_tokenizer *t = c->t;
    double so_far = c->lattice[at].score;
    int32_t lo = t->first[(uint8_t)s[at]], hi = t->first[(uint8_t)s[at] + 1];
    int alone = 0;
    for (uint32_t m = 1; lo < hi; m++) {
        int32_t id = t->pieces[lo].id;
        if (t->pieces[lo].bytes == m) {
            llmi_lattice_offer(&c->lattice[at + m], t->scores[id] + so_far, id, at);
            alone |= m == width;
            lo++;
        }
        if (at + m >= n) break;
        llmi_narrow(t, &lo, &hi, m, (uint8_t)s[at + m]);
    }
    if (!alone) llmi_lattice_offer(&c->lattice[at + width], t->unk_score + so_far, t->unk, at);
}

/* Viterbi over all pieces that begin at each character (Kudo 2018): the segmentation with the largest sum of scores, of equals the one
   found first. Neighbours that are unknown become one. */
static int llmi_encode_unigram(llmi_coder *c, const char *s, size_t n)
{
    const llm_tokenizer *t = c->t;
    if (c->lattice_capacity < n + 1) {
        llmi_lattice *p = (llmi_lattice *)llmi_grow(&c->a, c->lattice, 0, &c->lattice_capacity, n + 1, sizeof *p);
        if (!p) return 0;
        c->lattice = p;
    }
    for (size_t i = 0; i <= n; i++) c->lattice[i].start = -1;
    c->lattice[0].score = 0;
    for (size_t at = 0, width; at < n; at += width) {
        uint32_t cp;
        width = llmi_utf8_get(s + at, n - at, &cp, NULL);
        llmi_lattice_step(c, s, n, at, width);
    }
    c->next.count = 0; /* ends, last first */
    for (size_t end = n; end > 0; end = (size_t)c->lattice[end].start) {
        int joins = c->lattice[end].id == t->unk && c->next.count && c->lattice[c->next.data[c->next.count - 1]].id == t->unk;
        int32_t at = (int32_t)end;
        if (!joins && !llmi_ids_add(&c->next, &at, 1)) return 0;
    }
    size_t start = 0;
    for (size_t i = c->next.count; i-- > 0; start = (size_t)c->next.data[i])
        if (!llmi_add_unigram(c, s, start, (size_t)c->next.data[i])) return 0;
    return 1;
}

/* One piece of the pre-tokenizer: merges never cross its borders. */
static int llmi_encode_piece(llmi_coder *c, const char *s, size_t n)
{
    if (c->t->scores) return llmi_encode_unigram(c, s, n);
    int32_t id = c->t->ignore_merges ? llmi_whole_piece(c->t, s, n) : -1;
    if (id >= 0) return llmi_ids_add(&c->out, &id, 1);
    if (c->symbol_capacity < n) {
        llmi_symbol *p = (llmi_symbol *)llmi_grow(&c->a, c->symbols, 0, &c->symbol_capacity, n, sizeof *p);
        if (!p) return 0;
        c->symbols = p;
    }
    return llmi_merge_symbols(c, llmi_first_symbols(c, s, n));
}

/* ---- encode ---- */

/* Normalized text without added tokens. */
static int llmi_encode_plain(llmi_coder *c, const char *s, size_t n, int at_start)
{
    const llmi_stages *list = &c->t->splitter;
    c->pieces.count = 0;
    if (n == 0) return 1;
    if (!llmi_add2(&c->pieces, 0, n)) return 0;
    for (int32_t i = 0; i < list->count; i++) {
        const llmi_stage *x = &list->list[i];
        if ((x->kind == LLMI_METASPACE || x->prefix) && !llmi_prefix_pieces(c, x, at_start, &s)) return 0;
        if (x->pattern && !llmi_split_pieces(c, x, s)) return 0;
    }
    for (size_t i = 0; i < c->pieces.count; i += 2)
        if (!llmi_encode_piece(c, s + c->pieces.data[i], (size_t)(c->pieces.data[i + 1] - c->pieces.data[i]))) return 0;
    return 1;
}

/* A stretch [start, end) of the text between raw added tokens. */
static int llmi_encode_segment(llmi_coder *c, size_t start, size_t end)
{
    const char *s = c->text.data + start;
    size_t n = end - start;
    if (!llmi_run_normalizer(c, s, n)) return 0;
    int same = c->normal.count == n && memcmp(c->normal.data, s, n) == 0;
    llmi_ids *found = &c->found[1];
    if (!llmi_find_added(c, 1, c->normal.data, c->normal.count, same ? start : SIZE_MAX, found)) return 0;
    for (size_t i = 0; i < found->count; i += 3) {
        const int32_t *x = found->data + i;
        if (x[0] >= 0) {
            if (!llmi_ids_add(&c->out, x, 1)) return 0;
        } else if (!llmi_encode_plain(c, c->normal.data + x[1], (size_t)(x[2] - x[1]), start == 0 && x[1] == 0)) {
            return 0;
        }
    }
    return 1;
}

/* Append text as valid UTF-8, every maximal part that is none as U+FFFD. */
static int llmi_add_valid(llmi_bytes *out, const char *s, size_t n)
{
    size_t done = 0;
    for (size_t i = 0, m; i < n; i += m) {
        uint32_t cp;
        m = 1;
        if ((uint8_t)s[i] < 0x80) continue;
        m = llmi_utf8_get(s + i, n - i, &cp, NULL);
        if (cp != LLMI_REPLACEMENT || (m == 3 && memcmp(s + i, "\xef\xbf\xbd", 3) == 0)) continue;
        if (!llmi_bytes_add(out, s + done, i - done) || !llmi_bytes_add(out, "\xef\xbf\xbd", 3)) return 0;
        done = i + m;
    }
    return llmi_bytes_add(out, s + done, n - done);
}

/* The ids of parts written one after the other, into c->out. 0: out of memory. */
static int llmi_encode_parts(llmi_coder *c, const llmi_part *parts, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        size_t from = c->text.count, last = c->ranges.count;
        if (!llmi_add_valid(&c->text, parts[i].text, parts[i].bytes) || c->text.count > INT32_MAX / 4) return 0;
        if (!parts[i].special) continue;
        if (last && (size_t)c->ranges.data[last - 1] == from) c->ranges.data[last - 1] = (int32_t)c->text.count;
        else if (!llmi_add2(&c->ranges, from, c->text.count)) return 0;
    }
    llmi_ids *found = &c->found[0];
    if (!llmi_find_added(c, 0, c->text.data, c->text.count, 0, found)) return 0;
    for (size_t i = 0; i < found->count; i += 3) {
        const int32_t *x = found->data + i;
        if (x[0] >= 0 ? !llmi_ids_add(&c->out, x, 1) : !llmi_encode_segment(c, (size_t)x[1], (size_t)x[2])) return 0;
    }
    return 1;
}

LLM_API size_t llm_encode(const llm_tokenizer *t, const char *text, size_t bytes, uint32_t flags, int32_t *ids, size_t capacity)
{
    llmi_coder c;
    llmi_part part;
    size_t need = SIZE_MAX;
    if (!t || (bytes && !text)) return SIZE_MAX;
    part.text = text ? text : "";
    part.bytes = bytes;
    part.special = (flags & LLM_SPECIAL) != 0;
    llmi_coder_make(&c, t);
    int around = (flags & LLM_BOS) != 0;
    int ok = !around || llmi_ids_add(&c.out, t->before, (size_t)t->before_count);
    ok = ok && llmi_encode_parts(&c, &part, 1);
    ok = ok && (!around || llmi_ids_add(&c.out, t->after, (size_t)t->after_count));
    if (ok) {
        need = c.out.count;
        size_t n = need < capacity ? need : capacity;
        if (ids && n) memcpy(ids, c.out.data, n * sizeof *ids);
    }
    llmi_coder_drop(&c);
    return need;
}

/* ---- decode ---- */

/* What a token shows, in the place of another than the first token, into out. */
static int llmi_show_token(const llm_tokenizer *t, const llmi_token *x, llmi_bytes *out, llmi_bytes *spare)
{
    out->count = 0;
    if (!llmi_bytes_add(out, x->text, x->bytes)) return 0;
    for (int32_t i = 0; i < t->decoder.count; i++) {
        const llmi_stage *d = &t->decoder.list[i];
        llmi_bytes from = *out;
        int ok = 1;
        *out = *spare;
        out->count = 0;
        if (d->kind == LLMI_BYTES) {
            for (size_t k = 0, m; k < from.count && ok; k += m) {
                uint32_t cp;
                m = llmi_utf8_get(from.data + k, from.count - k, &cp, NULL);
                int b = llmi_letter_byte(cp);
                char byte = (char)b;
                if (b >= 0) { ok = llmi_bytes_add(out, &byte, 1); continue; }
                out->count = 0; /* not written in byte letters: an added token, shown as it is */
                ok = llmi_bytes_add(out, from.data, from.count);
                break;
            }
        } else if (d->kind == LLMI_REPLACE || d->kind == LLMI_METASPACE) {
            int meta = d->kind == LLMI_METASPACE;
            ok = llmi_replace_literal(from.data, from.count, meta ? d->to : d->from, meta ? " " : d->to, out);
        } else if (d->kind == LLMI_BYTE_FALLBACK && from.count == 6 && memcmp(from.data, "<0x", 3) == 0 && from.data[5] == '>' &&
                   llmi_hex(from.data[3]) >= 0 && llmi_hex(from.data[4]) >= 0) {
            char byte = (char)(llmi_hex(from.data[3]) * 16 + llmi_hex(from.data[4]));
            ok = llmi_bytes_add(out, &byte, 1);
        } else {
            ok = llmi_bytes_add(out, from.data, from.count);
        }
        *spare = from;
        if (!ok) return 0;
    }
    return 1;
}

typedef struct llmi_sink { char *text; size_t capacity, count; } llmi_sink;

/* Copy what fits, count all. */
static void llmi_sink_add(llmi_sink *k, const char *s, size_t n)
{
    if (k->count < k->capacity) memcpy(k->text + k->count, s, n < k->capacity - k->count ? n : k->capacity - k->count);
    k->count += n;
}

/* The first token of a text under Metaspace: the space in front was never there. */
static void llmi_sink_first(llmi_sink *k, const llmi_token *x, const char *space)
{
    size_t n = strlen(space), done = 0;
    for (size_t i = 0; i + n <= x->bytes;) {
        if (memcmp(x->text + i, space, n) != 0) { i++; continue; }
        llmi_sink_add(k, x->text + done, i - done);
        done = i += n;
    }
    llmi_sink_add(k, done ? x->text + done : x->shown, done ? x->bytes - done : x->shown_bytes);
}

LLM_API size_t llm_decode(const llm_tokenizer *t, const int32_t *ids, size_t count, uint32_t flags, char *text, size_t capacity)
{
    llmi_sink k = {text, text ? capacity : 0, 0};
    const llmi_stage *meta = NULL, *strip = NULL;
    int first = 1;
    if (!t || !ids) count = 0;
    for (int32_t i = 0; t && i < t->decoder.count; i++) {
        const llmi_stage *d = &t->decoder.list[i];
        if (d->kind == LLMI_METASPACE && d->prefix != LLMI_NEVER) meta = d;
        if (d->kind == LLMI_STRIP && !strip) strip = d;
    }
    int32_t left = strip ? strip->left : 0; /* characters that may still be taken from the front */
    for (size_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= t->count) continue;
        const llmi_token *x = &t->tokens[ids[i]];
        const char *s = x->shown;
        size_t n = x->shown_bytes, m = strip ? strlen(strip->from) : 0;
        if (!x->present || (x->special && !(flags & LLM_SPECIAL))) continue;
        if (!first && t->decoder.count == 0) llmi_sink_add(&k, " ", 1);
        if (first && meta) { first = 0; llmi_sink_first(&k, x, meta->to); continue; }
        first = 0;
        for (; left > 0 && m > 0 && n >= m && memcmp(s, strip->from, m) == 0; left--, s += m, n -= m) {}
        if (n > 0) left = 0;
        llmi_sink_add(&k, s, n);
    }
    if (k.capacity > k.count) k.text[k.count] = 0;
    return k.count;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-open        added tokens, end tokens, and opening a tokenizer
   All that encoding and decoding need is settled here once; after a failure nothing stays allocated.
   ------------------------------------------------------------------------------------------------ */

/* Walk along the bytes and add what is missing; of two tokens with one text the first stays. */
static void llmi_trie_add(llmi_trie *t, int root, const char *s, size_t n, int32_t index)
{
    uint32_t node = (uint32_t)root;
    if (n == 0) return;
    t->first[root][(uint8_t)s[0]] = 1;
    for (size_t i = 0; i < n; i++) {
        llmi_edge *e = llmi_trie_edge(t, node, (uint8_t)s[i]);
        if (!e->key) {
            e->key = (uint64_t)node * 256 + (uint8_t)s[i] + 1;
            e->to = t->nodes++;
        }
        node = e->to;
    }
    if (!t->leaf[node]) t->leaf[node] = index + 1;
}

/* One entry of added_tokens. A text that is in the vocabulary keeps the vocabulary's id, as in the package. */
static void llmi_read_added_token(llmi_reader *rd, const moq_json *e, int32_t index)
{
    llm_tokenizer *t = rd->t;
    llmi_added *x = &t->added[index];
    const moq_json *content = moq_json_find(e, "content");
    size_t bytes = content ? content->text_bytes : 0;
    if (!moq_json_string(content) || bytes == 0) { LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "added token %d is an empty text", (int)index); return; }
    if (bytes > LLMI_MAX_ADDED_BYTES) {
        LLMI_REFUSE(rd, MOQ_E_LIMIT, "added token %d has %llu bytes; the limit is %d", (int)index, (unsigned long long)bytes, LLMI_MAX_ADDED_BYTES);
        return;
    }
    x->id = llmi_read_id(rd, moq_json_find(e, "id"), content->text);
    x->single_word = (uint8_t)llmi_flag(e, "single_word", 0);
    x->lstrip = (uint8_t)llmi_flag(e, "lstrip", 0);
    x->rstrip = (uint8_t)llmi_flag(e, "rstrip", 0);
    x->special = (uint8_t)llmi_flag(e, "special", 0);
    x->normalized = (uint8_t)llmi_flag(e, "normalized", !x->special);
    if (rd->code < 0) return;
    const llmi_slot *s = llmi_map_find(&t->names, content->text, bytes);
    if (s) {
        x->id = s->value; /* the vocabulary's own id counts */
    } else if (t->tokens[x->id].present) {
        LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "tokens '%q' and '%q' both have the id %d", t->tokens[x->id].text, content->text, (int)x->id);
        return;
    } else {
        char *text = llmi_take_text(&t->r, content->text, bytes);
        if (!text) { llmi_reader_nomem(rd); return; }
        llmi_set_token(t, x->id, text, (uint32_t)bytes);
        llmi_map_add(&t->names, text, bytes, x->id);
    }
    if (t->tokens[x->id].added) LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "added token %d, '%q', is in the list twice", (int)index, content->text);
    t->tokens[x->id].added = 1;
    t->tokens[x->id].special = x->special;
}

/* All nodes of the trie come from the bytes of the tokens, so its tables are sized first. */
static void llmi_make_trie(llmi_reader *rd, size_t bytes, size_t count)
{
    llm_tokenizer *t = rd->t;
    llmi_coder c;
    size_t capacity = 64, nodes = bytes + 2;
    while (capacity / 2 < nodes) capacity *= 2;
    t->trie.edges = (llmi_edge *)llmi_take(&t->r, capacity, sizeof *t->trie.edges);
    t->trie.leaf = (int32_t *)llmi_take(&t->r, nodes, sizeof *t->trie.leaf);
    if (!t->trie.edges || !t->trie.leaf) { llmi_reader_nomem(rd); return; }
    t->trie.mask = capacity - 1;
    t->trie.nodes = 2;
    llmi_coder_make(&c, t);
    for (size_t i = 0; i < count && rd->code >= 0; i++) {
        const llmi_added *x = &t->added[i];
        llmi_token *token = &t->tokens[x->id];
        const char *s = token->text;
        size_t n = token->bytes;
        if (x->normalized) {
            if (!llmi_run_normalizer(&c, s, n)) { llmi_reader_nomem(rd); break; }
            token->text = s = llmi_take_text(&t->r, c.normal.data, c.normal.count); /* decoding shows it normalized, too */
            token->bytes = (uint32_t)(n = c.normal.count);
            if (!s) { llmi_reader_nomem(rd); break; }
        }
        if (t->trie.nodes + n > nodes) LLMI_REFUSE(rd, MOQ_E_LIMIT, "added tokens that grow when they are normalized");
        else llmi_trie_add(&t->trie, x->normalized, s, n, (int32_t)i);
    }
    llmi_coder_drop(&c);
}

/* The key "added_tokens": entries first, then the trie, whose size is bounded by their bytes. */
static void llmi_read_added(llmi_reader *rd, const moq_json *list)
{
    llm_tokenizer *t = rd->t;
    size_t count = list ? list->count : 0, bytes = 0, each = 0, times = 3; /* marks decompose to at most 3 times their bytes */
    int32_t index = 0;
    if (rd->code < 0 || count == 0) return;
    if (list->type != MOQ_JSON_ARRAY) { LLMI_REFUSE(rd, MOQ_E_TOKENIZER, "added_tokens is not a list"); return; }
    t->added = (llmi_added *)llmi_take(&t->r, count, sizeof *t->added);
    if (!t->added) { llmi_reader_nomem(rd); return; }
    for (const moq_json *e = moq_json_first(list); e && rd->code >= 0; e = moq_json_next(list, e)) {
        llmi_read_added_token(rd, e, index);
        if (rd->code >= 0) bytes += t->tokens[t->added[index].id].bytes;
        index++;
    }
    for (int32_t i = 0; i < t->normalizer.count; i++) {
        int kind = t->normalizer.list[i].kind;
        each += strlen(t->normalizer.list[i].to);
        if (kind == LLMI_NFKD || kind == LLMI_NFKC || kind == LLMI_PRECOMPILED) times = 12; /* U+FDFA: 3 bytes to 33 */
    }
    if (rd->code >= 0) llmi_make_trie(rd, bytes * (times + (each != 0)) + count * each, count);
}

/* Settle what every token shows once, so that decoding only copies. */
static void llmi_read_shown(llmi_reader *rd)
{
    llm_tokenizer *t = rd->t;
    llmi_bytes out = llmi_bytes_make(&t->a), spare = llmi_bytes_make(&t->a), all = llmi_bytes_make(&t->a);
    int ok = 1;
    for (int32_t i = 0; i < t->count && ok; i++) {
        llmi_token *x = &t->tokens[i];
        if (!x->present) continue;
        ok = llmi_show_token(t, x, &out, &spare);
        x->shown_bytes = (uint32_t)out.count;
        ok = ok && llmi_bytes_add(&all, out.data, out.count);
    }
    char *text = ok ? llmi_take_text(&t->r, all.data, all.count) : NULL;
    for (int32_t i = 0; i < t->count && text; text += t->tokens[i++].shown_bytes) t->tokens[i].shown = text;
    if (!ok || (t->count && !t->tokens[0].shown)) llmi_reader_nomem(rd);
    llmi_bytes_drop(&out);
    llmi_bytes_drop(&spare);
    llmi_bytes_drop(&all);
}

/* All of tokenizer.json. Added tokens come late, because some are matched as the normalizer leaves them. */
static void llmi_read_tokenizer(llmi_reader *rd, const moq_json *root)
{
    llm_tokenizer *t = rd->t;
    const moq_json *added = llmi_member(root, "added_tokens");
    if (!llmi_unicode_make(&t->u, &t->r)) llmi_reader_nomem(rd);
    if (rd->code >= 0) llmi_read_model(rd, llmi_member(root, "model"), added);
    llmi_read_normalizer(rd, llmi_member(root, "normalizer"));
    llmi_read_splitter(rd, llmi_member(root, "pre_tokenizer"));
    llmi_read_decoder(rd, llmi_member(root, "decoder"));
    llmi_check_decoder(rd);
    llmi_read_post(rd, llmi_member(root, "post_processor"));
    if (t->byte_level && t->byte_fallback) LLMI_REFUSE(rd, MOQ_E_UNSUPPORTED, "byte_fallback together with the pre-tokenizer ByteLevel");
    llmi_read_added(rd, added);
    if (rd->code >= 0) llmi_read_shown(rd);
}

/* ---- the other files: end tokens and the chat template ---- */

/* One more id that ends a turn; known ones and foreign ones are ignored. */
static void llmi_add_end_id(llm_tokenizer *t, int32_t id)
{
    if (id < 0 || id >= t->count || t->end_count >= LLMI_MAX_ENDS) return;
    for (int32_t i = 0; i < t->end_count; i++)
        if (t->ends[i] == id) return;
    t->ends[t->end_count++] = id;
}

/* eos_token_id: a number or a list of numbers. */
static void llmi_read_end_ids(llm_tokenizer *t, const moq_json *v)
{
    int64_t id;
    if (moq_json_int(v, &id) && id >= 0 && id < t->count) llmi_add_end_id(t, (int32_t)id);
    for (const moq_json *e = v && v->type == MOQ_JSON_ARRAY ? moq_json_first(v) : NULL; e; e = moq_json_next(v, e))
        if (moq_json_int(e, &id) && id >= 0 && id < t->count) llmi_add_end_id(t, (int32_t)id);
}

/* Control tokens that end a turn where the chat template writes them. */
static void llmi_read_known_ends(llm_tokenizer *t)
{
    static const char *const known[] = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "</s>", "<end_of_turn>", "<|return|>",
                                        "<|end_of_turn|>", "<|call|>", "<|end_of_text|>",
                                        "<\357\275\234end\342\226\201of\342\226\201sentence\357\275\234>"};
    for (size_t i = 0; i < LLMI_COUNT(known) && t->frame_text; i++) {
        int32_t id = llm_token_find(t, known[i]);
        if (id >= 0 && t->tokens[id].special && strstr(t->frame_text, known[i])) llmi_add_end_id(t, id);
    }
}

/* bos_token and its like: a text, or an object with the text as "content". */
static const char *llmi_read_named(llmi_reader *rd, const moq_json *config, const char *key)
{
    const moq_json *v = llmi_member(config, key);
    const char *s = moq_json_string(v) ? moq_json_string(v) : llmi_word(v, "content", "");
    return *s ? llmi_keep(rd, s) : "";
}

/* chat_template of tokenizer_config.json: a text, or a list of which the one named "default" counts. */
static void llmi_read_frame_text(llmi_reader *rd, const moq_json *config)
{
    const moq_json *v = llmi_member(config, "chat_template");
    const char *s = moq_json_string(v);
    for (const moq_json *e = v && v->type == MOQ_JSON_ARRAY ? moq_json_first(v) : NULL; e && !s; e = moq_json_next(v, e))
        if (moq_json_is(moq_json_find(e, "name"), "default")) s = moq_json_string(moq_json_find(e, "template"));
    if (s && !rd->t->frame_text) rd->t->frame_text = llmi_keep(rd, s);
}

/* A file that may be absent: NULL then, and after an error, which is kept. */
static moq_json_doc *llmi_read_optional(llmi_reader *rd, const moq_checkpoint *ck, const char *name)
{
    moq_error e;
    memset(&e, 0, sizeof e);
    moq_json_doc *doc = rd->code < 0 ? NULL : moq_read_json(ck, name, MOQ_JSON_CONFIG, &e);
    if (!doc && rd->code >= 0 && e.code != MOQ_E_NOTFOUND) {
        rd->code = e.code < 0 ? e.code : MOQ_E_IO;
        if (rd->err) *rd->err = e;
    }
    return doc;
}

/* The files beside tokenizer.json. chat_template.jinja counts before the template in tokenizer_config.json. */
static void llmi_read_neighbours(llmi_reader *rd, const moq_checkpoint *ck)
{
    llm_tokenizer *t = rd->t;
    moq_error e;
    size_t bytes = 0;
    char *jinja = moq_read_text(ck, "chat_template.jinja", &bytes, &e);
    if (jinja) t->frame_text = llmi_keep(rd, jinja);
    moq_release(moq_get_allocator(ck), jinja, bytes + 1);
    moq_json_doc *doc = llmi_read_optional(rd, ck, "tokenizer_config.json");
    if (doc) {
        const moq_json *root = moq_json_root(doc);
        t->bos = llmi_read_named(rd, root, "bos_token");
        t->eos = llmi_read_named(rd, root, "eos_token");
        llmi_read_frame_text(rd, root);
        if (*t->eos) llmi_add_end_id(t, llm_token_find(t, t->eos));
    }
    moq_json_destroy(doc);
    doc = llmi_read_optional(rd, ck, "generation_config.json");
    if (doc) llmi_read_end_ids(t, moq_json_find(moq_json_root(doc), "eos_token_id"));
    moq_json_destroy(doc);
    llmi_read_end_ids(t, moq_json_find(moq_get_config(ck), "eos_token_id"));
    llmi_read_known_ends(t);
}

/* Every id must have a row in the embedding, but those of added special tokens, which no plain text becomes: a tokenizer that is shared with a
   model for pictures has one for these (Gemma 3 1B). A pass refuses them, and no answer ends with them. */
static void llmi_check_rows(llmi_reader *rd, const moq_checkpoint *ck)
{
    llm_tokenizer *t = rd->t;
    int32_t kept = 0;
    int64_t rows;
    if (rd->code < 0 || !moq_json_int(moq_json_find(moq_get_config(ck), "vocab_size"), &rows) || t->count <= rows) return;
    for (int32_t i = t->count - 1; i >= 0 && i >= rows; i--) {
        const llmi_token *x = &t->tokens[i];
        if (!x->present || (x->added && x->special)) continue;
        rd->code = moq_fail(rd->err, MOQ_E_MISMATCH, LLMI_TOKENIZER, "token '%q' has the id %d, but config.json has vocab_size %lld; the two are not of one model",
                            x->text ? x->text : "", (int)i, (long long)rows);
        return;
    }
    for (int32_t i = 0; i < t->end_count; i++)
        if (t->ends[i] < rows) t->ends[kept++] = t->ends[i];
    t->end_count = kept;
}

/* What to do about a tokenizer that was refused, where the sentence does not say it yet. */
static void llmi_advise(moq_error *err)
{
    const char *advice = !err || strchr(err->text, ';') ? "" : err->code == MOQ_E_TOKENIZER ? "; copy the file again, or save it anew with the model's own tokenizer" :
                         err->code == MOQ_E_UNSUPPORTED ? "; encode elsewhere and run ids, with llm_desc.no_tokenizer" : "";
    size_t n = strlen(advice), m = err ? strlen(err->text) : 0;
    if (n && m + n < sizeof err->text) memcpy(err->text + m, advice, n + 1);
}

/* Without the file: is there the other one, of SentencePiece alone? */
static void llmi_no_tokenizer(const moq_checkpoint *ck, moq_error *err)
{
    moq_error e;
    size_t bytes = 0;
    char *other = moq_read_text(ck, "tokenizer.model", &bytes, &e);
    int there = other || e.code == MOQ_E_LIMIT;
    if (other) moq_release(moq_get_allocator(ck), other, bytes + 1);
    moq_fail(err, MOQ_E_NOTFOUND, LLMI_TOKENIZER, "is missing%s; without it texts can neither be read nor written: download it from where the "
             "model comes from, or copy it from a folder of the same model, or run ids with llm_desc.no_tokenizer",
             there ? " (there is only tokenizer.model, which is not read)" : "");
}

LLM_API llm_tokenizer *llm_tokenizer_open(const moq_checkpoint *ck, moq_error *err)
{
    if (!ck) {
        moq_fail(err, MOQ_E_ARG, "llm_tokenizer_open", "no checkpoint was given");
        return NULL;
    }
    const moq_allocator *a = moq_get_allocator(ck);
    llm_tokenizer *t = (llm_tokenizer *)moq_allocate(a, sizeof *t);
    if (!t) {
        llmi_nomem(err, LLMI_TOKENIZER);
        return NULL;
    }
    llmi_reader rd = {t, MOQ_OK, err};
    if (a) t->a = *a;
    t->r = llmi_arena_make(a);
    t->unk = -1;
    t->bos = t->eos = "";
    moq_json_doc *doc = moq_read_json(ck, LLMI_TOKENIZER, MOQ_JSON_STRICT, err);
    if (!doc && err && err->code == MOQ_E_NOTFOUND) llmi_no_tokenizer(ck, err);
    if (doc) llmi_read_tokenizer(&rd, moq_json_root(doc));
    if (doc && rd.code >= 0) llmi_read_neighbours(&rd, ck);
    if (doc) llmi_check_rows(&rd, ck);
    moq_json_destroy(doc);
    if (doc && rd.code >= 0) return t;
    llmi_advise(err);
    llm_tokenizer_close(t);
    return NULL;
}

LLM_API void llm_tokenizer_close(llm_tokenizer *t)
{
    if (!t) return;
    moq_allocator a = t->a;
    llmi_arena_drop(&t->r);
    moq_release(&a, t, sizeof *t);
}

LLM_API int32_t llm_vocab(const llm_tokenizer *t) { return t ? t->count : 0; }

LLM_API int32_t llm_token_find(const llm_tokenizer *t, const char *text)
{
    const llmi_slot *s = t && text ? llmi_map_find(&t->names, text, strlen(text)) : NULL;
    return s ? s->value : -1;
}

LLM_API int llm_is_end(const llm_tokenizer *t, int32_t id)
{
    for (int32_t i = 0; t && i < t->end_count; i++)
        if (t->ends[i] == id) return 1;
    return 0;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-chat        chat templates and the frames they mean
   The folder's own chat template is recognised by what it says and its frame is written exactly; an unknown one is refused, never guessed.
   ------------------------------------------------------------------------------------------------ */

/* ---- a template in one spelling ----
   Templates of one frame differ in quotes, spaces and ways to name a member. The canonical spelling: as Jinja trims white
   space around tags (with the newline after a tag and blanks before it removed, as Hugging Face renders), no blanks or
   dashes in tags, "double" quotes with escapes resolved, joined literals one literal, x["y"] written x.y. */

#define LLMI_QUOTE '\005' /* a double quote within a literal */

typedef struct llmi_spelling { llmi_bytes out; int ok; } llmi_spelling;

/* Append to the spelling. */
static void llmi_spell(llmi_spelling *p, const char *s, size_t n)
{
    if (p->ok) p->ok = llmi_bytes_add(&p->out, s, n);
}

/* The literal that begins at s[i] with its quote; returns the position after it. */
static size_t llmi_spell_literal(llmi_spelling *p, const char *s, size_t i, size_t n)
{
    char quote = s[i++];
    if (p->ok && p->out.count >= 2 && memcmp(p->out.data + p->out.count - 2, "\"+", 2) == 0) p->out.count -= 2;
    else llmi_spell(p, "\"", 1);
    for (; i < n && s[i] != quote; i++) {
        char c = s[i];
        if (c == '\\' && i + 1 < n) {
            c = s[++i];
            c = c == 'n' ? '\n' : c == 't' ? '\t' : c == 'r' ? '\r' : c;
        }
        if (c == '"') c = LLMI_QUOTE;
        llmi_spell(p, &c, 1);
    }
    llmi_spell(p, "\"", 1);
    return i + 1;
}

/* x["name"] -> x.name, once the closing bracket is reached. */
static void llmi_spell_member(llmi_spelling *p)
{
    size_t n = p->out.count, from;
    if (!p->ok || n < 4 || p->out.data[n - 1] != '"') return;
    for (from = n - 2; from > 0 && p->out.data[from] != '"'; from--) {}
    if (from == 0 || p->out.data[from - 1] != '[') return;
    p->out.data[from - 1] = '.';
    memmove(p->out.data + from, p->out.data + from + 1, n - from - 2);
    p->out.count = n - 2;
}

/* The tag at s[i] ("{{", "{%" or "{#"); returns the position after it. */
static size_t llmi_spell_tag(llmi_spelling *p, const char *s, size_t i, size_t n)
{
    char kind = s[i + 1], end = kind == '{' ? '}' : kind;
    int dash = 0;
    if (kind != '#') llmi_spell(p, s + i, 2);
    for (i += 2; i + 1 < n && !(s[i] == end && s[i + 1] == '}');) {
        char c = s[i];
        if (kind == '#') { dash = s[i++] == '-'; continue; }
        if (c == '\'' || c == '"') { i = llmi_spell_literal(p, s, i, n); dash = 0; continue; }
        if (c == ']') {
            size_t before = p->out.count;
            llmi_spell_member(p);
            if (p->out.count == before) llmi_spell(p, "]", 1);
        } else if (c != ' ' && c != '\t' && c != '\n' && c != '\r' && c != '-' && c != '+') {
            llmi_spell(p, &c, 1);
        } else if (c == '+' && p->ok && p->out.data[p->out.count - 1] != '%') {
            llmi_spell(p, "+", 1);
        }
        dash = c == '-';
        i++;
    }
    i += 2;
    if (kind != '#') { llmi_spell(p, &end, 1); llmi_spell(p, "}", 1); }
    if (dash) while (i < n && (s[i] == ' ' || s[i] == '\n' || s[i] == '\t' || s[i] == '\r')) i++;
    else if (kind != '{' && i < n && s[i] == '\n') i++;
    return i < n ? i : n;
}

/* Text outside tags, from s[i] to the next tag at `end`, with what that tag eats. */
static void llmi_spell_text(llmi_spelling *p, const char *s, size_t i, size_t end, size_t n)
{
    size_t to = end;
    if (end + 2 < n && s[end + 2] == '-') {
        while (to > i && (s[to - 1] == ' ' || s[to - 1] == '\n' || s[to - 1] == '\t' || s[to - 1] == '\r')) to--;
    } else if (end + 1 < n && s[end + 1] != '{') { /* blanks of an otherwise empty line */
        size_t k = to;
        while (k > i && (s[k - 1] == ' ' || s[k - 1] == '\t')) k--;
        if (k == 0 || (k > i && s[k - 1] == '\n') || (k == i && s[k - 1] == '\n')) to = k;
    }
    llmi_spell(p, s + i, to - i);
}

/* The whole template, NUL-terminated. 0: out of memory. */
static int llmi_spell_template(llmi_spelling *p, const char *s)
{
    size_t n = strlen(s);
    if (n > 0 && s[n - 1] == '\n') n--; /* Jinja drops one newline at the end */
    for (size_t i = 0; i < n;) {
        size_t at = i;
        while (at + 1 < n && !(s[at] == '{' && (s[at + 1] == '{' || s[at + 1] == '%' || s[at + 1] == '#'))) at++;
        if (at + 1 >= n) at = n;
        llmi_spell_text(p, s, i, at, n);
        i = at < n ? llmi_spell_tag(p, s, at, n) : n;
    }
    llmi_spell(p, "", 1);
    return p->ok;
}

/* ---- frames ---- */

/* Where a system message goes: a turn like others; refused; a head that is always there; a head when there is a text; a head when there
   is a message, even an empty one; before the first or the last user text. */
enum { LLMI_SYSTEM_TURN, LLMI_SYSTEM_NONE, LLMI_SYSTEM_START, LLMI_SYSTEM_HEAD, LLMI_SYSTEM_GIVEN, LLMI_SYSTEM_FIRST, LLMI_SYSTEM_LAST };
enum { LLMI_THINK_ON = 1, LLMI_THINK_OFF = 2, LLMI_THINK_LEVELS = 4 };
enum { LLMI_FRAME_TURNS, LLMI_DEEPSEEK3, LLMI_DEEPSEEK31, LLMI_NEMOTRON2, LLMI_SMOLLM3 };
enum { LLMI_THOUGHT_KEPT, LLMI_THOUGHT_QWEN3, LLMI_THOUGHT_NEMOTRON3 };
enum { LLMI_CUT_NEVER, LLMI_CUT_FIRST, LLMI_CUT_LAST };

typedef struct llmi_around { const char *before, *after; } llmi_around;

/* Answers of tools: those in a row stand between `open` and `shut`. json: as a JSON string; later: never as the first turn. */
typedef struct llmi_tools { const char *open, *before, *after, *between, *shut; int json, later; } llmi_tools;

/* One frame. In all texts \1 is the BOS text, \2 the EOS text, \3 the role, \4 the date, \6 the level of thinking; NULL: such a turn is refused. */
typedef struct llmi_frame {
    const char *start;              /* before everything */
    llmi_around system, user, assistant, other;
    llmi_around head;               /* of a leading system text under SYSTEM_START and SYSTEM_HEAD */
    llmi_tools tools;               /* open NULL: tools have turns like other roles */
    const char *open;               /* opening of an answer */
    const char *shut;               /* at the end when no answer is opened */
    const char *last;               /* after an answer that ends the text; NULL: as after others */
    const char *default_system;     /* a turn written when the first message is not of the system; need not end in NUL */
    size_t default_bytes;
    const char *short_system;       /* SmolLM3: the default of answers without thoughts, also in the template; */
    size_t short_bytes;
    int shut_system;                /* and whether its head ends with a mark: in the first release it does not */
    int where_system, needs_system;
    int trim, alternate, always_open; /* trim 1: every text, 2: answers only, 3: the head only */
    int thinking;                   /* THOUGHT_..: how reasoning of earlier answers is left out */
    int cut;                        /* answers begin after their first or last </think> */
    int switches;                   /* Nemotron: /think and /no_think in texts are obeyed and removed */
    int modes;                      /* THINK_..: what the setting "thinking" may say */
    const char *open_on, *open_off; /* openings of answers for THINK_ON and THINK_OFF */
    int writer;
    const char *date, *level;       /* defaults; NULL: the date must be given */
} llmi_frame;

/* Does the template hold this text? */
static int llmi_says(const char *spelled, const char *part) { return strstr(spelled, part) != NULL; }

/* Does the first literal that it writes, macros left aside, begin so? */
static int llmi_writes_first(const char *spelled, const char *mark)
{
    static const char end[] = "{%endmacro%}";
    for (const char *p = strstr(spelled, end); p; p = strstr(spelled, end)) spelled = p + sizeof end - 1;
    spelled = strstr(spelled, "{{\"");
    return spelled && strncmp(spelled + 3, mark, strlen(mark)) == 0;
}

/* What stands around a text. */
static llmi_around llmi_make_around(const char *before, const char *after)
{
    llmi_around a;
    a.before = before;
    a.after = after;
    return a;
}

/* All roles get one kind of turn. */
static void llmi_same_turns(llmi_frame *f, const char *before, const char *after)
{
    f->system = f->user = f->assistant = f->other = llmi_make_around(before, after);
}

/* Answers of tools. */
static void llmi_set_tools(llmi_frame *f, const char *open, const char *before, const char *after, const char *between, const char *shut)
{
    f->tools.open = open;
    f->tools.before = before;
    f->tools.after = after;
    f->tools.between = between;
    f->tools.shut = shut;
}

/* Answers of tools as Qwen3-Coder and Nemotron 3 write them, whose templates open the turn only after another message. */
static void llmi_set_line_tools(llmi_frame *f)
{
    llmi_set_tools(f, "<|im_start|>user\n", "<tool_response>\n", "\n</tool_response>\n", "", "<|im_end|>\n");
    f->tools.later = 1;
}

/* ChatML: SmolLM2, Qwen2, Qwen2.5, Qwen3 and many others. */
static int llmi_is_chatml(const char *s, llmi_frame *f)
{
    static const char opening[] = "\"<|im_start|>system\n";
    int plain = llmi_says(s, "\"<|im_start|>\"+message.role+\"\n\"+message.content+\"<|im_end|>\n\"");
    int content = llmi_says(s, "\"<|im_start|>\"+message.role+\"\n\"+content+\"<|im_end|>\n\"");
    if ((!plain && !content) || llmi_says(s, "custom_instructions") || llmi_says(s, "strftime_now") || llmi_says(s, "<think></think>")) return 0;
    /* whoever looks closer at turns, writes something before them, or a BOS token only sometimes, means another frame */
    int bos = strncmp(s, "{{bos_token}}", 13) == 0;
    if (llmi_says(s, "raise_exception") || !llmi_writes_first(s, "<|im_start|>") || (!bos && llmi_says(s, "bos_token"))) return 0;
    if (bos) f->start = "\1";
    llmi_same_turns(f, "<|im_start|>\3\n", "<|im_end|>\n");
    f->open = llmi_says(s, "\"<|im_start|>assistant\n<think>\n\"") ? "<|im_start|>assistant\n<think>\n" : "<|im_start|>assistant\n";
    if (llmi_says(s, "\"\n</tool_response>\n\"")) llmi_set_line_tools(f);
    else if (llmi_says(s, "<tool_response>"))
        llmi_set_tools(f, "<|im_start|>user", "\n<tool_response>\n", "\n</tool_response>", "", "<|im_end|>\n");
    f->thinking = llmi_says(s, "last_query_index") ? LLMI_THOUGHT_QWEN3 : LLMI_THOUGHT_KEPT;
    f->modes = f->thinking && llmi_says(s, "{{\"<think>\n\n</think>\n\n\"}}") ? LLMI_THINK_ON | LLMI_THINK_OFF : 0;
    f->open_on = f->open;
    f->open_off = "<|im_start|>assistant\n<think>\n\n</think>\n\n";
    for (const char *p = strstr(s, opening); p; p = strstr(p + 1, opening)) { /* a whole turn in one literal is the default */
        const char *from = p + sizeof opening - 1, *quote = strchr(from, '"'), *end = strstr(from, "<|im_end|>\n\"");
        if (!quote || !end || end > quote || end == from) continue;
        f->default_system = from;
        f->default_bytes = (size_t)(end - from);
        break;
    }
    return 1;
}

/* Llama 3; from 3.1 on a system turn with dates is always there. */
static int llmi_is_llama3(const char *s, llmi_frame *f)
{
    int dates = llmi_says(s, "Cutting Knowledge Date: December 2023");
    if (!llmi_says(s, "\"<|start_header_id|>\"+message.role+\"<|end_header_id|>\n\n\"+message.content|trim+\"<|eot_id|>\"")) return 0;
    if (dates && !llmi_says(s, "\"26 Jul 2024\"")) return 0;
    llmi_same_turns(f, "<|start_header_id|>\3<|end_header_id|>\n\n", "<|eot_id|>");
    f->start = llmi_says(s, "bos_token") ? "\1" : "";
    f->open = "<|start_header_id|>assistant<|end_header_id|>\n\n";
    f->trim = 1;
    if (dates) {
        f->where_system = LLMI_SYSTEM_START;
        f->head = llmi_make_around("<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: \4\n\n", "<|eot_id|>");
        f->date = "26 Jul 2024";
        f->other.before = NULL;
        if (llmi_says(s, "message.contentismappingormessage.contentisiterable%}{{message.content|tojson}}")) { /* texts are iterable */
            llmi_set_tools(f, "", "<|start_header_id|>ipython<|end_header_id|>\n\n", "<|eot_id|>", "", "");
            f->tools.json = 1;
        }
    }
    return 1;
}

/* Llama 4: like Llama 3 with other marks; only the text of the system is trimmed. */
static int llmi_is_llama4(const char *s, llmi_frame *f)
{
    if (!llmi_says(s, "{{\"<|header_start|>\"+message.role+\"<|header_end|>\n\n\"}}") || !llmi_says(s, "{{message.content}}") || !llmi_says(s, "{{\"<|eot|>\"}}") ||
        !llmi_says(s, "{{\"<|header_start|>system<|header_end|>\n\n\"}}") || !llmi_says(s, "system_message=messages[0].content|trim"))
        return 0;
    llmi_same_turns(f, "<|header_start|>\3<|header_end|>\n\n", "<|eot|>");
    f->start = llmi_says(s, "bos_token") ? "\1" : "";
    f->head = llmi_make_around("<|header_start|>system<|header_end|>\n\n", "<|eot|>");
    f->where_system = LLMI_SYSTEM_GIVEN;
    f->trim = 3;
    f->open = "<|header_start|>assistant<|header_end|>\n\n";
    f->other.before = NULL;
    if (llmi_says(s, "message.contentismappingormessage.contentisiterable%}{{message.content|tojson}}")) {
        llmi_set_tools(f, "", "<|header_start|>ipython<|header_end|>\n\n", "<|eot|>", "", "");
        f->tools.json = 1;
    }
    return 1;
}

/* Llama 2: the system text stands inside the first user turn, and each user turn begins with BOS. */
static int llmi_is_llama2(const char *s, llmi_frame *f)
{
    if (!llmi_says(s, "bos_token+\"[INST] \"+content.strip()+\" [/INST]\"") || !llmi_says(s, "\" \"+content.strip()+\" \"+eos_token")) return 0;
    f->user.before = "\1[INST] ";
    f->user.after = " [/INST]";
    f->assistant.before = " ";
    f->assistant.after = " \2";
    f->system.before = "<<SYS>>\n";
    f->system.after = "\n<</SYS>>\n\n";
    f->where_system = llmi_says(s, "\"<<SYS>>\n\"+system_message+\"\n<</SYS>>\n\n\"") ? LLMI_SYSTEM_FIRST : LLMI_SYSTEM_NONE;
    f->trim = f->alternate = 1;
    return 1;
}

/* Mistral: versions differ in blanks around [INST] and in where the system text goes. */
static int llmi_is_mistral(const char *s, llmi_frame *f)
{
    static const struct { const char *says, *before, *after; } users[] = {
        {"\" [INST] \"+message.content+\" [/INST]\"", " [INST] ", " [/INST]"},
        {"\"[INST] \"+message.content+\" [/INST]\"", "[INST] ", " [/INST]"},
        {"\"[INST] \"+message.content+\"[/INST]\"", "[INST] ", "[/INST]"},
        {"\"[INST]\"+message.content+\"[/INST]\"", "[INST]", "[/INST]"},
    }, answers[] = {
        {"\" \"+message.content|trim+eos_token", " ", "\2"},
        {"\" \"+message.content+\" \"+eos_token", " ", " \2"},
        {"\" \"+message.content+eos_token", " ", "\2"},
        {"message.content+eos_token+\" \"", "", "\2 "},
        {"message.content+eos_token", "", "\2"},
    };
    size_t u = 0, a = 0;
    while (u < LLMI_COUNT(users) && !llmi_says(s, users[u].says)) u++;
    while (a < LLMI_COUNT(answers) && !llmi_says(s, answers[a].says)) a++;
    if (u == LLMI_COUNT(users) || a == LLMI_COUNT(answers) || !llmi_says(s, "{{bos_token}}")) return 0;
    if (llmi_says(s, "[SYSTEM_PROMPT]") && !llmi_says(s, "{{\"[SYSTEM_PROMPT]\"+system_message+\"[/SYSTEM_PROMPT]\"}}")) return 0;
    f->start = "\1";
    f->user.before = users[u].before;
    f->user.after = users[u].after;
    f->assistant.before = answers[a].before;
    f->assistant.after = answers[a].after;
    f->trim = a == 0 ? 2 : 0;
    f->alternate = a != 1; /* the first template of version 3 takes turns as they come */
    f->system = llmi_make_around("", "\n\n");
    if (llmi_says(s, "[SYSTEM_PROMPT]")) { /* from version 7 on; the default names the current date, so a text is asked for */
        f->alternate = llmi_says(s, "!=(loop.index0%2==0)");
        f->head = f->system = llmi_make_around("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]");
        if (!llmi_says(s, "{{\"[SYSTEM_PROMPT]\"+message.content+\"[/SYSTEM_PROMPT]\"}}")) f->system.before = NULL;
        f->where_system = LLMI_SYSTEM_HEAD;
        f->needs_system = 1;
        return 1;
    }
    f->where_system = !llmi_says(s, "system_message+\"\n\n\"+message.content") ? LLMI_SYSTEM_NONE :
                      llmi_says(s, "ifloop.lastandsystem_message") ? LLMI_SYSTEM_LAST : LLMI_SYSTEM_FIRST;
    return 1;
}

/* Phi-3. Its control tokens take the newline after them (rstrip), which the tokenizer does by itself. */
static int llmi_is_phi3(const char *s, llmi_frame *f)
{
    f->start = strncmp(s, "{{bos_token}}", 13) == 0 ? "\1" : "";
    if (llmi_says(s, "\"<|user|>\n\"+message.content+\"<|end|>\n<|assistant|>\n\"") && llmi_says(s, "{{message.content+\"<|end|>\n\"}}")) {
        f->user.before = "<|user|>\n"; /* the first release: every user turn opens the answer */
        f->user.after = "<|end|>\n<|assistant|>\n";
        f->assistant.before = "";
        f->assistant.after = "<|end|>\n";
        f->where_system = LLMI_SYSTEM_NONE;
        return 1;
    }
    if (!llmi_says(s, "\"<|user|>\n\"+message.content+\"<|end|>\n\"") || !llmi_says(s, "\"<|assistant|>\n\"+message.content+\"<|end|>\n\"")) return 0;
    llmi_same_turns(f, "<|\3|>\n", "<|end|>\n");
    f->other.before = NULL;
    if (!llmi_says(s, "\"<|system|>\n\"+message.content+\"<|end|>\n\"")) f->where_system = LLMI_SYSTEM_NONE;
    f->open = "<|assistant|>\n";
    f->shut = llmi_says(s, "{%else%}{{eos_token}}{%endif%}") ? "\2" : "";
    return 1;
}

/* Zephyr and TinyLlama: each turn ends with EOS; the newline after it stands outside the tags. */
static int llmi_is_zephyr(const char *s, llmi_frame *f)
{
    int line = llmi_says(s, "\"<|user|>\n\"+message.content+eos_token}}\n");
    if (!llmi_says(s, "\"<|user|>\n\"+message.content+eos_token}}") || !llmi_says(s, "\"<|assistant|>\n\"+message.content+eos_token}}")) return 0;
    if (!llmi_says(s, "\"<|system|>\n\"+message.content+eos_token}}")) return 0;
    llmi_same_turns(f, "<|\3|>\n", line ? "\2\n" : "\2");
    f->other.before = NULL;
    int fresh = (line && llmi_says(s, "{{\"<|assistant|>\"}}\n")) || llmi_says(s, "{{\"<|assistant|>\n\"}}");
    f->open = fresh ? "<|assistant|>\n" : "<|assistant|>";
    return 1;
}

/* Gemma 2 knows no system text; Gemma 3 writes it in front of the first user text. */
static int llmi_is_gemma(const char *s, llmi_frame *f)
{
    int two = llmi_says(s, "\"<start_of_turn>\"+role+\"\n\"+message.content|trim+\"<end_of_turn>\n\"");
    int three = llmi_says(s, "\"<start_of_turn>\"+role+\"\n\"+(first_user_prefixifloop.firstelse\"\")") &&
                llmi_says(s, "first_user_prefix=messages[0].content+\"\n\n\"");
    if (!two && !three) return 0;
    f->start = "\1";
    f->user.before = "<start_of_turn>user\n";
    f->assistant.before = "<start_of_turn>model\n";
    f->user.after = f->assistant.after = "<end_of_turn>\n";
    f->open = "<start_of_turn>model\n";
    f->trim = f->alternate = 1;
    f->where_system = three ? LLMI_SYSTEM_FIRST : LLMI_SYSTEM_NONE;
    f->system.before = "";
    f->system.after = "\n\n";
    return 1;
}

/* <|role|>text: the demo model, which ends only answers, and Phi-4-mini. */
static int llmi_is_role_marks(const char *s, llmi_frame *f)
{
    static const char demo[] = "{%formessageinmessages%}<|{{message.role}}|>{{message.content}}{%ifmessage.role==\"assistant\"%}<|end|>"
                               "{%endif%}{%endfor%}{%ifadd_generation_prompt%}<|assistant|>{%endif%}";
    static const char short_demo[] = "{%forminmessages%}<|{{m.role}}|>{{m.content}}{%ifm.role==\"assistant\"%}<|end|>{%endif%}{%endfor%}"
                                     "{%ifadd_generation_prompt%}<|assistant|>{%endif%}";
    int phi = llmi_says(s, "{{\"<|\"+message.role+\"|>\"+message.content+\"<|end|>\"}}");
    if (strcmp(s, demo) != 0 && strcmp(s, short_demo) != 0 && !phi) return 0;
    llmi_same_turns(f, "<|\3|>", phi ? "<|end|>" : "");
    f->assistant.after = "<|end|>";
    f->open = "<|assistant|>";
    f->shut = phi && llmi_says(s, "{%else%}{{eos_token}}{%endif%}") ? "\2" : "";
    return 1;
}

/* Phi-4. The first release opened an answer after every user text. */
static int llmi_is_phi4(const char *s, llmi_frame *f)
{
    if (!llmi_says(s, "\"<|im_start|>system<|im_sep|>\"+message.content+\"<|im_end|>\"")) return 0;
    llmi_same_turns(f, "<|im_start|>\3<|im_sep|>", "<|im_end|>");
    f->other.before = NULL;
    if (llmi_says(s, "\"<|im_start|>user<|im_sep|>\"+message.content+\"<|im_end|><|im_start|>assistant<|im_sep|>\"")) {
        f->user.after = "<|im_end|><|im_start|>assistant<|im_sep|>";
        f->assistant.before = "";
        return llmi_says(s, "{{message.content+\"<|im_end|>\"}}");
    }
    f->open = "<|im_start|>assistant<|im_sep|>";
    return llmi_says(s, "\"<|im_start|>user<|im_sep|>\"+message.content+\"<|im_end|>\"") &&
           llmi_says(s, "\"<|im_start|>assistant<|im_sep|>\"+message.content+\"<|im_end|>\"");
}

/* gpt-oss ("harmony"): the text of the system is the template's own, the caller's is the developer's. */
static int llmi_is_harmony(const char *s, llmi_frame *f)
{
    if (!llmi_says(s, "\"<|start|>assistant<|channel|>final<|message|>\"+message.content+\"<|end|>\"") ||
        !llmi_says(s, "model_identity=\"You are ChatGPT, a large language model trained by OpenAI.\"") || !llmi_says(s, "reasoning_effort=\"medium\"") ||
        !llmi_says(s, "\"Knowledge cutoff: 2024-06\n\"") || !llmi_says(s, "strftime_now(\"%Y-%m-%d\")") ||
        !llmi_says(s, "\"# Instructions\n\n\"}}{{developer_message}}{{\"\n\n\"}}"))
        return 0;
    f->start = "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: \4\n\n"
               "Reasoning: \6\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>";
    f->head = llmi_make_around("<|start|>developer<|message|># Instructions\n\n", "\n\n<|end|>");
    f->where_system = LLMI_SYSTEM_HEAD;
    f->user = llmi_make_around("<|start|>user<|message|>", "<|end|>");
    f->assistant = llmi_make_around("<|start|>assistant<|channel|>final<|message|>", "<|end|>");
    f->last = "<|return|>";
    f->open = "<|start|>assistant";
    f->date = NULL;
    f->level = "medium";
    f->modes = LLMI_THINK_LEVELS;
    return 1;
}

#define LLMI_DEEPSEEK(name) "<\357\275\234" name "\357\275\234>"
#define LLMI_DEEPSEEK_EOS LLMI_DEEPSEEK("end\342\226\201of\342\226\201sentence")
#define LLMI_DEEPSEEK_TOOL(name) LLMI_DEEPSEEK("tool\342\226\201" name)

/* DeepSeek: V3 and R1; V3.1, where thinking is a switch; V2. */
static int llmi_is_deepseek(const char *s, llmi_frame *f)
{
    f->start = "\1";
    f->where_system = LLMI_SYSTEM_START;
    f->head = llmi_make_around("", "");
    if (llmi_says(s, "\"User: \"+message.content+\"\n\n\"") && llmi_says(s, "\"Assistant: \"+message.content+eos_token") &&
        llmi_says(s, "{{message.content+\"\n\n\"}}")) {
        f->user = llmi_make_around("User: ", "\n\n");
        f->assistant = llmi_make_around("Assistant: ", "\2");
        f->system = llmi_make_around("", "\n\n");
        f->where_system = LLMI_SYSTEM_TURN;
        f->open = "Assistant:";
        return 1;
    }
    int new_one = llmi_says(s, "\"" LLMI_DEEPSEEK("Assistant")
                               "\"}}{%ifmessage.prefixisdefinedandmessage.prefixandthinking%}{{\"<think>\"}}{%else%}{{\"</think>\"}}");
    int plain = llmi_says(s, "\"" LLMI_DEEPSEEK("Assistant") "\"+message.content+\"" LLMI_DEEPSEEK_EOS "\"");
    int cut = llmi_says(s, "\"" LLMI_DEEPSEEK("Assistant") "\"+content+\"" LLMI_DEEPSEEK_EOS "\"") && llmi_says(s, "content.split(\"</think>\")[1]");
    if ((!plain && !cut && !new_one) || !llmi_says(s, "\"" LLMI_DEEPSEEK("User") "\"+message.content") || !llmi_says(s, "{{ns.system_prompt}}")) return 0;
    f->user.before = LLMI_DEEPSEEK("User");
    f->assistant.before = "";
    f->writer = new_one ? LLMI_DEEPSEEK31 : LLMI_DEEPSEEK3;
    f->cut = new_one ? LLMI_CUT_FIRST : cut ? LLMI_CUT_LAST : LLMI_CUT_NEVER;
    f->modes = new_one ? LLMI_THINK_ON | LLMI_THINK_OFF : 0;
    f->open_on = LLMI_DEEPSEEK("Assistant") "<think>";
    f->open_off = LLMI_DEEPSEEK("Assistant") "</think>";
    f->open = new_one ? f->open_off : llmi_says(s, "\"" LLMI_DEEPSEEK("Assistant") "<think>\n\"") ?
              LLMI_DEEPSEEK("Assistant") "<think>\n" : LLMI_DEEPSEEK("Assistant");
    if (new_one || llmi_says(s, "\"\n" LLMI_DEEPSEEK_TOOL("output\342\226\201begin") "\"+message.content"))
        llmi_set_tools(f, "", "", "", "", "");
    return 1;
}

/* Nemotron: Nano v2 with its own control tokens; those made from Llama 3. */
static int llmi_is_nemotron(const char *s, llmi_frame *f)
{
    static const char header[] = "<|start_header_id|>\3<|end_header_id|>\n\n";
    if (llmi_says(s, "\"<SPECIAL_11>User\n\"+(content|default(\"\",true)).replace(\"/think\",\"\").replace(\"/no_think\",\"\").strip()+\"\n\"")) {
        if (!llmi_says(s, "\"<SPECIAL_11>User\n<TOOL_RESPONSE>[\"") || !llmi_says(s, "last_turn_assistant_content")) return 0;
        f->writer = LLMI_NEMOTRON2;
        f->where_system = LLMI_SYSTEM_START;
        f->user.before = f->assistant.before = "";
        f->switches = 1;
        llmi_set_tools(f, "<SPECIAL_11>User\n<TOOL_RESPONSE>[", "", "", ", ", "]</TOOL_RESPONSE>\n\n");
        return 1;
    }
    int next = llmi_says(s, "{{bos~system_start_header~system_token~system_end_header}}") && llmi_says(s, "bos=\"<|begin_of_text|>\"") &&
               llmi_says(s, "{{system_content+\"\n\n\"}}");
    int first = llmi_says(s, "{{bos_token}}") && llmi_says(s, "system_message=messages[0].content|trim") &&
                llmi_says(s, "{{\"<|start_header_id|>system<|end_header_id|>\n\n\"}}{{system_message}}{{\"<|eot_id|>\"}}") &&
                llmi_says(s, "\"<|start_header_id|>\"+message.role+\"<|end_header_id|>\n\n\"+content|trim+\"<|eot_id|>\"");
    if ((!first && !next) || !llmi_says(s, "content=message.content.split(\"</think>\")[1].lstrip()")) return 0;
    llmi_same_turns(f, header, "<|eot_id|>");
    f->start = next ? "<|begin_of_text|>" : "\1";
    f->head = llmi_make_around("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>");
    f->where_system = LLMI_SYSTEM_START;
    f->open = "<|start_header_id|>assistant<|end_header_id|>\n\n";
    f->cut = LLMI_CUT_LAST;
    f->trim = first;
    f->switches = next;
    if (!next) return 1;
    f->system.before = f->other.before = NULL;
    llmi_set_tools(f, "<|start_header_id|>tool<|end_header_id|>\n\n<TOOL_RESPONSE>[", "", "", ", ", "]</TOOL_RESPONSE><|eot_id|>");
    return 1;
}

/* Nemotron 3: ChatML with a head that is always there; answers begin with a thought, which may be empty. */
static int llmi_is_nemotron3(const char *s, llmi_frame *f)
{
    if (!llmi_says(s, "\"<think></think>\"~c.split(\"</think>\")[1]") || !llmi_says(s, "{{\"<|im_start|>system\n\"+system_message}}") ||
        !llmi_says(s, "content=\"<think></think>\"~content") || !llmi_says(s, "loop.index0<ns.last_user_idx") ||
        !llmi_says(s, "\"<|im_start|>assistant\n\"~(content|default(\"\",true)|string|trim)~\"<|im_end|>\n\""))
        return 0;
    llmi_same_turns(f, "<|im_start|>\3\n", "<|im_end|>\n");
    f->head = f->system;
    f->where_system = LLMI_SYSTEM_START;
    f->thinking = LLMI_THOUGHT_NEMOTRON3;
    f->modes = LLMI_THINK_ON | LLMI_THINK_OFF;
    f->open_on = "<|im_start|>assistant\n<think>\n";
    f->open_off = "<|im_start|>assistant\n<think></think>";
    f->open = llmi_says(s, "enable_thinking=enable_thinkingifenable_thinkingisdefinedelseFalse") ? f->open_off : f->open_on;
    if (llmi_says(s, "\"\n</tool_response>\n\"")) llmi_set_line_tools(f);
    return 1;
}

/* SmolLM3: the head tells date and mode; the default texts are taken out of the template. */
static int llmi_is_smollm3(const char *s, llmi_frame *f)
{
    static const char thinks[] = "{%elifreasoning_mode==\"/think\"%}{{\"", other[] = "\"}}{%else%}{{\"";
    const char *from = strstr(s, thinks), *middle = from ? strstr(from, other) : NULL, *end = middle ? strstr(middle, "\"}}{%endif%}") : NULL;
    if (!end || !llmi_says(s, "Knowledge Cutoff Date: June 2025\n") || !llmi_says(s, "\"Today Date: \"~today~\"\n\"") || !llmi_says(s, "/system_override") ||
        !llmi_says(s, "\"<|im_start|>assistant\n<think>\n\n</think>\n\"+content.lstrip(\"\n\")+\"<|im_end|>\n\""))
        return 0;
    f->default_system = from + sizeof thinks - 1;
    f->default_bytes = (size_t)(middle - f->default_system);
    f->short_system = middle + sizeof other - 1;
    f->short_bytes = (size_t)(end - f->short_system);
    f->shut_system = llmi_says(s, "{%endif%}{{\"<|im_end|>\n\"}}{%endif%}");
    llmi_same_turns(f, "<|im_start|>\3\n", "<|im_end|>\n");
    f->system.before = f->other.before = NULL;
    f->where_system = LLMI_SYSTEM_START;
    f->writer = LLMI_SMOLLM3;
    llmi_set_tools(f, "", "<|im_start|>user\n", "<|im_end|>\n", "", "");
    f->date = NULL;
    f->modes = LLMI_THINK_ON | LLMI_THINK_OFF;
    f->open = f->open_on = "<|im_start|>assistant\n";
    f->open_off = "<|im_start|>assistant\n<think>\n\n</think>\n";
    return 1;
}

static const struct { const char *name; int (*is)(const char *spelled, llmi_frame *f); } llmi_frames[] = {
    {"Nemotron", llmi_is_nemotron}, {"Nemotron 3", llmi_is_nemotron3}, {"SmolLM3", llmi_is_smollm3}, {"Llama 4", llmi_is_llama4},
    {"Phi-4", llmi_is_phi4}, {"gpt-oss", llmi_is_harmony}, {"DeepSeek", llmi_is_deepseek},
    {"ChatML", llmi_is_chatml}, {"Llama 3", llmi_is_llama3}, {"Llama 2", llmi_is_llama2}, {"Mistral", llmi_is_mistral},
    {"Phi-3", llmi_is_phi3}, {"Zephyr", llmi_is_zephyr}, {"Gemma", llmi_is_gemma}, {"role marks", llmi_is_role_marks},
};

/* The frame of a template; MOQ_E_TEMPLATE when it is none of the known ones. */
static moq_result llmi_find_frame(const char *spelled, llmi_frame *f, moq_error *err)
{
    for (size_t i = 0; i < LLMI_COUNT(llmi_frames); i++) {
        memset(f, 0, sizeof *f);
        f->start = f->open = f->shut = "";
        f->level = f->date = "";
        f->always_open = !llmi_says(spelled, "add_generation_prompt");
        if (llmi_frames[i].is(spelled, f)) return MOQ_OK;
    }
    return moq_fail(err, MOQ_E_TEMPLATE, "chat_template",
                    "the chat template is none of the known ones "
                    "(ChatML, Llama 2, Llama 3, Llama 4, SmolLM3, Mistral, Phi-3, Phi-4, Zephyr, Gemma, gpt-oss, DeepSeek, Nemotron, <|role|>); "
                    "say texts with llm_say_raw");
}

/* ------------------------------------------------------------------------------------------------
   >>llm-frame       writing frames
   Texts of messages are never control tokens; the ids are those of the whole rendered text.
   ------------------------------------------------------------------------------------------------ */

typedef struct llmi_pen {
    const llm_tokenizer *t;
    llmi_bytes parts;         /* llmi_part after llmi_part */
    llmi_arena r;             /* texts that had to be changed */
    const char *date, *level;
    int ok;
} llmi_pen;

/* One more part; the text is borrowed until the frame is encoded. */
static void llmi_pen_add(llmi_pen *p, const char *s, size_t n, int special)
{
    llmi_part part;
    if (n == 0) return;
    part.text = s;
    part.bytes = n;
    part.special = special;
    if (p->ok) p->ok = llmi_bytes_add(&p->parts, (const char *)&part, sizeof part);
}

/* A text of the template, where control tokens count. */
static void llmi_pen_frame_part(llmi_pen *p, const char *s, size_t n, const char *role)
{
    size_t done = 0;
    for (size_t i = 0; i < n; i++) {
        const char *put = s[i] == '\1' ? p->t->bos : s[i] == '\2' ? p->t->eos : s[i] == '\3' ? role : s[i] == '\4' ? p->date :
                          s[i] == '\6' ? p->level : s[i] == LLMI_QUOTE ? "\"" : NULL;
        if (!put) continue;
        llmi_pen_add(p, s + done, i - done, 1);
        llmi_pen_add(p, put, strlen(put), 1);
        done = i + 1;
    }
    llmi_pen_add(p, s + done, n - done, 1);
}

/* The same for a whole text. */
static void llmi_pen_frame(llmi_pen *p, const char *s, const char *role) { llmi_pen_frame_part(p, s, strlen(s), role); }

/* Python's str.strip: white space, and the four separators below the blank. */
static int llmi_is_strip(uint32_t c) { return llmi_is_space(c) || (c >= 0x1c && c <= 0x1f); }

/* Take white space from the ends of a text. */
static void llmi_trim(const char **s, size_t *n, int left, int right)
{
    uint32_t cp;
    while (left && *n > 0) {
        size_t m = llmi_utf8_get(*s, *n, &cp, NULL);
        if (!llmi_is_strip(cp)) break;
        *s += m;
        *n -= m;
    }
    while (right && *n > 0) {
        size_t i = *n - 1;
        while (i > 0 && ((uint8_t)(*s)[i] & 0xc0) == 0x80) i--;
        llmi_utf8_get(*s + i, *n - i, &cp, NULL);
        if (!llmi_is_strip(cp)) break;
        *n = i;
    }
}

/* Take newlines from the ends of a text. */
static void llmi_trim_lines(const char **s, size_t *n, int left, int right)
{
    for (; left && *n > 0 && **s == '\n'; (*n)--) (*s)++;
    while (right && *n > 0 && (*s)[*n - 1] == '\n') (*n)--;
}

/* The last place of a text in another, or NULL. */
static const char *llmi_find_last(const char *s, const char *part)
{
    const char *last = NULL;
    for (const char *p = strstr(s, part); p; p = strstr(p + 1, part)) last = p;
    return last;
}

/* An answer of Qwen3: its reasoning stays only after the last question. */
static void llmi_pen_thinking(llmi_pen *p, const llm_message *m, int after_query, int last)
{
    const char *end = llmi_find_last(m->text, "</think>"), *first = strstr(m->text, "</think>");
    const char *content = end ? end + 8 : m->text, *why = "";
    size_t n = strlen(content), why_bytes = 0;
    if (end) {
        why = m->text;
        why_bytes = (size_t)(first - m->text);
        for (const char *open = strstr(why, "<think>"); open && open < first; open = strstr(why, "<think>")) {
            why_bytes -= (size_t)(open + 7 - why);
            why = open + 7;
        }
        llmi_trim_lines(&why, &why_bytes, 1, 1);
        llmi_trim_lines(&content, &n, 1, 0);
    }
    if (after_query && (last || why_bytes)) {
        llmi_pen_frame(p, "<think>\n", "");
        llmi_pen_add(p, why, why_bytes, 0);
        llmi_pen_frame(p, "\n</think>\n\n", "");
        llmi_trim_lines(&content, &n, 1, 0);
    }
    llmi_pen_add(p, content, n, 0);
}

/* An answer of Nemotron 3: without a thought it gets an empty one; of earlier ones the thought is emptied. */
static void llmi_pen_thought(llmi_pen *p, const char *s, int earlier)
{
    const char *end = llmi_find_last(s, "</think>"), *begin = strstr(s, "<think>");
    int empty = (!begin && !end) || (earlier && begin && end);
    if (empty && end) s = end + 8;
    size_t n = strlen(s);
    if (empty) llmi_pen_frame(p, "<think></think>", "");
    llmi_trim(&s, &n, !empty, 1);
    llmi_pen_add(p, s, n, 0);
}

/* Index of the last user message; any: also one that is the answer of a tool. */
static size_t llmi_last_query(const llm_message *m, size_t count, int any)
{
    static const char open[] = "<tool_response>", shut[] = "</tool_response>";
    for (size_t i = count; i-- > 0;) {
        size_t n = strlen(m[i].text);
        if (strcmp(m[i].role, "user") != 0) continue;
        if (!any && strncmp(m[i].text, open, sizeof open - 1) == 0 && n >= sizeof shut - 1 && strcmp(m[i].text + n - (sizeof shut - 1), shut) == 0) continue;
        return i;
    }
    return count && !any ? count - 1 : 0;
}

/* A text as a JSON string, as Python's json.dumps(ensure_ascii=False) writes it. */
static void llmi_pen_json(llmi_pen *p, const char *s)
{
    static const char marks[] = "\"\\\b\f\n\r\t", letters[] = "\"\\bfnrt", hex[] = "0123456789abcdef";
    size_t n = strlen(s), done = 0;
    llmi_pen_add(p, "\"", 1, 0);
    for (size_t i = 0; i < n; i++) {
        const char *mark = strchr(marks, s[i]);
        char escape[8] = "\\u00";
        if (!mark && (uint8_t)s[i] >= 0x20) continue;
        escape[1] = mark ? letters[mark - marks] : 'u';
        escape[4] = hex[(uint8_t)s[i] >> 4];
        escape[5] = hex[s[i] & 15];
        const char *kept = llmi_take_text(&p->r, escape, mark ? 2 : 6);
        if (!kept) { p->ok = 0; return; }
        llmi_pen_add(p, s + done, i - done, 0);
        llmi_pen_add(p, kept, mark ? 2 : 6, 0);
        done = i + 1;
    }
    llmi_pen_add(p, s + done, n - done, 0);
    llmi_pen_add(p, "\"", 1, 0);
}

/* A tool's answer: answers in a row share one turn. */
static void llmi_pen_tool(llmi_pen *p, const llmi_tools *t, const llm_message *m, size_t i, size_t count)
{
    int follows = i > 0 && strcmp(m[i - 1].role, "tool") == 0, goes_on = i + 1 < count && strcmp(m[i + 1].role, "tool") == 0;
    llmi_pen_frame(p, follows ? t->between : t->open, "");
    llmi_pen_frame(p, t->before, "");
    if (t->json) llmi_pen_json(p, m[i].text);
    else llmi_pen_add(p, m[i].text, strlen(m[i].text), 0);
    llmi_pen_frame(p, t->after, "");
    if (!goes_on) llmi_pen_frame(p, t->shut, "");
}

/* Where an answer begins, its reasoning left out. */
static const char *llmi_cut_thought(const char *s, int cut)
{
    const char *end = cut == LLMI_CUT_NEVER ? NULL : cut == LLMI_CUT_FIRST ? strstr(s, "</think>") : llmi_find_last(s, "</think>");
    return end ? end + 8 : s;
}

/* A copy of a text without a word; what comes together by that is not looked at again. */
static const char *llmi_pen_remove(llmi_pen *p, const char *s, const char *word)
{
    size_t m = strlen(word);
    char *t = llmi_take_text(&p->r, s, strlen(s)), *to = t;
    if (!t) { p->ok = 0; return ""; }
    for (const char *hit = strstr(s, word); hit; hit = strstr(s, word)) {
        memcpy(to, s, (size_t)(hit - s));
        to += hit - s;
        s = hit + m;
    }
    memcpy(to, s, strlen(s) + 1);
    return t;
}

/* A text without its switches /think and /no_think, stripped. */
static const char *llmi_pen_clean(llmi_pen *p, const char *s, size_t *n)
{
    s = llmi_pen_remove(p, llmi_pen_remove(p, s, "/think"), "/no_think");
    *n = strlen(s);
    llmi_trim(&s, n, 1, 1);
    return s;
}

/* One turn; `system` is the text that goes in front of this user text, or NULL; `after` stands in the place of what follows others, or NULL. */
static void llmi_pen_turn(llmi_pen *p, const llmi_frame *f, const llmi_around *a, const llm_message *m, const char *system, const char *after)
{
    int answer = a == &f->assistant;
    const char *s = answer ? llmi_cut_thought(m->text, f->cut) : m->text;
    size_t n = strlen(s);
    if (s != m->text) llmi_trim(&s, &n, 1, 0);
    llmi_pen_frame(p, a->before, m->role);
    if (system) {
        llmi_pen_frame(p, f->system.before, "system");
        llmi_pen_add(p, system, strlen(system), 0);
    }
    int joined = system && *f->system.before; /* Llama 2 strips the system text and the user text as one */
    if (f->trim == 1 || (f->trim == 2 && answer)) llmi_trim(&s, &n, !joined, 1);
    if (system) {
        const char *gap = f->system.after;
        size_t bytes = strlen(gap);
        if (joined && n == 0) llmi_trim(&gap, &bytes, 0, 1);
        llmi_pen_frame_part(p, gap, bytes, "system");
    }
    llmi_pen_add(p, s, n, 0);
    llmi_pen_frame(p, after ? after : a->after, m->role);
}

/* What stands around the text of a role. */
static const llmi_around *llmi_find_around(const llmi_frame *f, const char *role)
{
    if (strcmp(role, "user") == 0) return &f->user;
    if (strcmp(role, "assistant") == 0) return &f->assistant;
    return strcmp(role, "system") == 0 ? &f->system : &f->other;
}

/* Refuse what the template would refuse, and roles that it would drop without a word: a lost message is a wrong answer. */
static moq_result llmi_check_messages(const llmi_frame *f, const llm_message *m, size_t count, moq_error *err)
{
    size_t turn = 0, first = count > 0 && m[0].role && strcmp(m[0].role, "system") == 0;
    for (size_t i = 0; i < count; i++) {
        if (!m[i].role || !m[i].text) return moq_fail(err, MOQ_E_ARG, "llm_frame", "message %llu has no role or no text", (unsigned long long)i);
        size_t n = strlen(m[i].role);
        if (n == 0 || n > 64 || strspn(m[i].role, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") != n)
            return moq_fail(err, MOQ_E_ARG, "llm_frame", "message %llu has the role '%q'; letters, digits, _ and - were expected",
                            (unsigned long long)i, m[i].role);
        int system = strcmp(m[i].role, "system") == 0, leads = system && i == 0 && f->where_system > LLMI_SYSTEM_NONE;
        if (leads) continue;
        const llmi_around *a = llmi_find_around(f, m[i].role);
        if (f->tools.open && strcmp(m[i].role, "tool") == 0 && f->tools.later && i == first)
            return moq_fail(err, MOQ_E_TEMPLATE, "chat_template",
                                "this model's frame has no place for a tool's answer before a turn of the user or the model; say something first");
        if (f->tools.open && strcmp(m[i].role, "tool") == 0) { turn++; continue; }
        if (f->last && a == &f->assistant && (strstr(m[i].text, "<|channel|>analysis<|message|>") || strstr(m[i].text, "<|channel|>final<|message|>")))
            return moq_fail(err, MOQ_E_TEMPLATE, "chat_template", "message %llu holds channel marks; give only the final text of an answer", (unsigned long long)i);
        if ((system && (f->where_system == LLMI_SYSTEM_NONE || f->alternate)) || !a->before)
            return moq_fail(err, MOQ_E_TEMPLATE, "chat_template",
                                "this model's frame has no place for the role '%q' (message %llu); put its text into a turn of the user",
                            m[i].role, (unsigned long long)i);
        if (f->alternate && a != (turn % 2 ? &f->assistant : &f->user))
            return moq_fail(err, MOQ_E_TEMPLATE, "chat_template", "this model's roles must alternate user, assistant, ...; message %llu is '%q'",
                            (unsigned long long)i, m[i].role);
        turn++;
    }
    if (f->writer == LLMI_NEMOTRON2 && turn == 0)
        return moq_fail(err, MOQ_E_TEMPLATE, "chat_template", "this model's frame needs a message beside the system's");
    if (f->needs_system && (count == 0 || strcmp(m[0].role, "system") != 0))
        return moq_fail(err, MOQ_E_TEMPLATE, "chat_template", "this model's own system text names the current date; begin with a system message");
    return MOQ_OK;
}

/* The settings before the first message, and how many they are. */
static moq_result llmi_read_settings(llmi_pen *p, llmi_frame *f, const llm_message *m, size_t count, size_t *used, moq_error *err)
{
    static const struct { const char *text; int mode; } modes[] = {
        {"on", LLMI_THINK_ON}, {"off", LLMI_THINK_OFF}, {"low", LLMI_THINK_LEVELS}, {"medium", LLMI_THINK_LEVELS}, {"high", LLMI_THINK_LEVELS}};
    p->date = f->date;
    p->level = f->level;
    for (*used = 0; *used < count && m[*used].role && m[*used].text; (*used)++) {
        const char *text = m[*used].text;
        size_t i = 0;
        if (strcmp(m[*used].role, "date") == 0) { p->date = text; continue; }
        if (strcmp(m[*used].role, "thinking") != 0) break;
        while (i < LLMI_COUNT(modes) && strcmp(modes[i].text, text) != 0) i++;
        if (i == LLMI_COUNT(modes) || !(modes[i].mode & f->modes))
            return moq_fail(err, MOQ_E_TEMPLATE, "chat_template", "thinking cannot be '%q' in this model's frame%s", text,
                            f->modes & LLMI_THINK_LEVELS ? "; known: low, medium, high" : f->modes ? "; known: on, off" : ", which has no such switch");
        if (modes[i].mode == LLMI_THINK_LEVELS) p->level = text;
        else f->open = modes[i].mode == LLMI_THINK_ON ? f->open_on : f->open_off;
    }
    if (p->date) return MOQ_OK;
    return moq_fail(err, MOQ_E_TEMPLATE, "chat_template",
                    "this model's frame has the current date; begin with a message of the role 'date', such as 2025-06-30");
}

/* A leading system text of its own turn. Nemotron: a text that is there is followed by an empty line, and switches in it are obeyed. */
static void llmi_pen_head(llmi_pen *p, llmi_frame *f, const char *system)
{
    const char *s = system ? system : "";
    size_t n = strlen(s);
    if ((f->where_system == LLMI_SYSTEM_HEAD && n == 0 && !f->needs_system) || (f->where_system == LLMI_SYSTEM_GIVEN && !system)) return;
    if (f->trim == 1 || f->trim == 3) llmi_trim(&s, &n, 1, 1);
    if (f->switches && (strstr(s, "/no_think") || strstr(s, "/think"))) {
        const char *word = strstr(s, "/no_think") ? "/no_think" : "/think";
        if (word[1] == 'n') f->open = "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n\n</think>\n\n";
        s = llmi_pen_remove(p, s, word);
        n = strlen(s);
        llmi_trim(&s, &n, 1, 1);
    }
    llmi_pen_frame(p, f->head.before, "system");
    llmi_pen_add(p, s, n, 0);
    if (f->switches && system && *system) llmi_pen_frame(p, "\n\n", "system");
    llmi_pen_frame(p, f->head.after, "system");
}

/* Turn after turn. */
static void llmi_pen_turns(llmi_pen *p, llmi_frame *f, const llm_message *m, size_t count, int open)
{
    int leads = count > 0 && f->where_system > LLMI_SYSTEM_NONE && strcmp(m[0].role, "system") == 0;
    const char *system = leads ? m[0].text : NULL;
    size_t from = leads ? 1 : 0, query = f->thinking ? llmi_last_query(m, count, f->thinking == LLMI_THOUGHT_NEMOTRON3) : 0;
    if (f->where_system >= LLMI_SYSTEM_START && f->where_system <= LLMI_SYSTEM_GIVEN) {
        llmi_pen_head(p, f, system);
        system = NULL;
    }
    if (f->default_system && count > 0 && strcmp(m[0].role, "system") != 0) {
        llmi_pen_frame(p, f->system.before, "system");
        llmi_pen_frame_part(p, f->default_system, f->default_bytes, "system");
        llmi_pen_frame(p, f->system.after, "system");
    }
    for (size_t i = from; i < count; i++) {
        const llmi_around *a = llmi_find_around(f, m[i].role);
        int here = a == &f->user && (f->where_system == LLMI_SYSTEM_LAST ? i + 1 == count : i == from);
        int ends = a == &f->assistant && i + 1 == count && !open && !f->always_open;
        if (f->tools.open && strcmp(m[i].role, "tool") == 0) {
            llmi_pen_tool(p, &f->tools, m, i, count);
        } else if (f->thinking && a == &f->assistant) {
            llmi_pen_frame(p, a->before, m[i].role);
            if (f->thinking == LLMI_THOUGHT_QWEN3) llmi_pen_thinking(p, &m[i], i > query, i + 1 == count);
            else llmi_pen_thought(p, m[i].text, i < query);
            llmi_pen_frame(p, a->after, m[i].role);
        } else {
            llmi_pen_turn(p, f, a, &m[i], here ? system : NULL, ends ? f->last : NULL);
        }
    }
    llmi_pen_frame(p, open || f->always_open ? f->open : f->shut, "");
}

/* DeepSeek: what opens an answer depends on whether a tool or a user spoke before it. */
static void llmi_pen_deepseek(llmi_pen *p, const llmi_frame *f, const llm_message *m, size_t count, int open)
{
    int v3 = f->writer == LLMI_DEEPSEEK3, tool = 0, asked = 0, outputs = 0;
    for (size_t i = 0; i < count; i++) {
        const char *s = m[i].text;
        if (i == 0 && strcmp(m[i].role, "system") == 0) {
            llmi_pen_add(p, s, strlen(s), 0);
        } else if (strcmp(m[i].role, "user") == 0) {
            llmi_pen_frame(p, f->user.before, "");
            llmi_pen_add(p, s, strlen(s), 0);
            tool = 0;
            asked = 1;
        } else if (strcmp(m[i].role, "tool") == 0) {
            if (v3) llmi_pen_frame(p, outputs ? "\n" : LLMI_DEEPSEEK_TOOL("outputs\342\226\201begin"), "");
            llmi_pen_frame(p, LLMI_DEEPSEEK_TOOL("output\342\226\201begin"), "");
            llmi_pen_add(p, s, strlen(s), 0);
            llmi_pen_frame(p, LLMI_DEEPSEEK_TOOL("output\342\226\201end"), "");
            tool = outputs = 1;
            asked = 0;
        } else {
            if (v3) llmi_pen_frame(p, tool ? LLMI_DEEPSEEK_TOOL("outputs\342\226\201end") : LLMI_DEEPSEEK("Assistant"), "");
            else if (asked) llmi_pen_frame(p, LLMI_DEEPSEEK("Assistant") "</think>", "");
            if (!tool) s = llmi_cut_thought(s, f->cut);
            llmi_pen_add(p, s, strlen(s), 0);
            llmi_pen_frame(p, LLMI_DEEPSEEK_EOS, "");
            tool = asked = 0;
        }
    }
    if (v3 && tool) llmi_pen_frame(p, LLMI_DEEPSEEK_TOOL("outputs\342\226\201end"), "");
    if (open && !tool && (v3 || asked)) llmi_pen_frame(p, f->open, "");
}

/* Nemotron Nano v2: switches may stand in every text, and an answer at the end is gone on with. */
static void llmi_pen_nemotron(llmi_pen *p, const llmi_frame *f, const llm_message *m, size_t count, int open)
{
    int leads = count > 0 && strcmp(m[0].role, "system") == 0, think = 1;
    const char *last = "", *s = "";
    size_t n = 0, last_bytes = 0;
    for (size_t i = 0; i < count; i++) {
        if (strcmp(m[i].role, "user") != 0 && strcmp(m[i].role, "system") != 0) continue;
        if (strstr(m[i].text, "/think")) think = 1;
        else if (strstr(m[i].text, "/no_think")) think = 0;
    }
    if (leads) s = llmi_pen_clean(p, m[0].text, &n);
    llmi_pen_frame(p, "<SPECIAL_10>System\n", "");
    llmi_pen_add(p, s, n, 0);
    llmi_pen_frame(p, "\n\n", "");
    m += leads;
    count -= (size_t)leads;
    if (count && strcmp(m[count - 1].role, "assistant") == 0) {
        last = m[--count].text;
        last_bytes = strlen(last);
        llmi_trim(&last, &last_bytes, 1, 1);
    }
    for (size_t i = 0; i < count; i++) {
        if (strcmp(m[i].role, "tool") == 0) { llmi_pen_tool(p, &f->tools, m, i, count); continue; }
        int user = strcmp(m[i].role, "user") == 0;
        s = user ? llmi_pen_clean(p, m[i].text, &n) : llmi_cut_thought(m[i].text, LLMI_CUT_FIRST);
        const char *again = user || s == m[i].text ? NULL : strstr(s, "</think>");
        if (!user) n = again ? (size_t)(again - s) : strlen(s);
        if (!user) llmi_trim(&s, &n, 1, 1);
        llmi_pen_frame(p, user ? "<SPECIAL_11>User\n" : "<SPECIAL_11>Assistant\n", "");
        llmi_pen_add(p, s, n, 0);
        llmi_pen_frame(p, user ? "\n" : "\n<SPECIAL_12>\n\n", "");
    }
    if (!open && last_bytes == 0) return;
    llmi_pen_frame(p, think ? "<SPECIAL_11>Assistant\n<think>\n\n" : "<SPECIAL_11>Assistant\n<think></think>", "");
    llmi_pen_add(p, last, last_bytes, 0);
    if (!open) llmi_pen_frame(p, "\n<SPECIAL_12>\n\n", "");
}

/* SmolLM3: switches in the system text win over the setting; every answer of a conversation without thoughts begins with an empty one. */
static void llmi_pen_smollm3(llmi_pen *p, const llmi_frame *f, const llm_message *m, size_t count, int open)
{
    int leads = count > 0 && strcmp(m[0].role, "system") == 0, think = f->open == f->open_on;
    const char *s = leads ? m[0].text : "";
    int own = strstr(s, "/system_override") != NULL;
    if (strstr(s, "/no_think")) think = 0;
    else if (strstr(s, "/think")) think = 1;
    s = llmi_pen_remove(p, llmi_pen_remove(p, s, "/no_think"), "/think");
    size_t n = strlen(s);
    llmi_trim(&s, &n, 0, 1);
    llmi_pen_frame(p, "<|im_start|>system\n", "");
    if (own) {
        const char *kept = llmi_take_text(&p->r, s, n);
        if (!kept) { p->ok = 0; return; }
        s = llmi_pen_remove(p, kept, "/system_override");
        n = strlen(s);
        llmi_trim(&s, &n, 0, 1);
        llmi_pen_add(p, s, n, 0);
    } else {
        llmi_pen_frame(p, "## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: \4\nReasoning Mode: ", "");
        llmi_pen_frame(p, think ? "/think\n\n## Custom Instructions\n\n" : "/no_think\n\n## Custom Instructions\n\n", "");
        llmi_pen_add(p, s, n, 0);
        if (n) llmi_pen_frame(p, "\n\n", "");
        else llmi_pen_frame_part(p, think ? f->default_system : f->short_system, think ? f->default_bytes : f->short_bytes, "");
    }
    if (own || f->shut_system) llmi_pen_frame(p, "<|im_end|>\n", "");
    for (size_t i = (size_t)leads; i < count; i++) {
        const llmi_around *a = llmi_find_around(f, m[i].role);
        int answer = a == &f->assistant;
        if (strcmp(m[i].role, "tool") == 0) { llmi_pen_tool(p, &f->tools, m, i, count); continue; }
        s = m[i].text;
        n = strlen(s);
        llmi_pen_frame(p, answer && !think ? f->open_off : a->before, m[i].role);
        if (answer) llmi_trim_lines(&s, &n, 1, 0);
        llmi_pen_add(p, s, n, 0);
        llmi_pen_frame(p, a->after, m[i].role);
    }
    if (open) llmi_pen_frame(p, think ? f->open_on : f->open_off, "");
}

/* The whole conversation in the order of the template. */
static void llmi_pen_all(llmi_pen *p, llmi_frame *f, const llm_message *m, size_t count, int open)
{
    llmi_pen_frame(p, f->start, "");
    if (f->writer == LLMI_FRAME_TURNS) llmi_pen_turns(p, f, m, count, open);
    else if (f->writer == LLMI_NEMOTRON2) llmi_pen_nemotron(p, f, m, count, open);
    else if (f->writer == LLMI_SMOLLM3) llmi_pen_smollm3(p, f, m, count, open);
    else llmi_pen_deepseek(p, f, m, count, open);
}

LLM_API size_t llm_frame(const llm_tokenizer *t, const llm_message *messages, size_t count, int open_answer, int32_t *ids, size_t capacity,
                         moq_error *err)
{
    llmi_frame f;
    llmi_spelling spelled;
    llmi_pen pen;
    llmi_coder c;
    size_t need = SIZE_MAX, set = 0;
    if (!t || (count && !messages)) {
        moq_fail(err, MOQ_E_ARG, "llm_frame", "the tokenizer or the messages are missing");
        return SIZE_MAX;
    }
    if (!t->frame_text) {
        moq_fail(err, MOQ_E_TEMPLATE, "chat_template",
                 "there is none (chat_template.jinja, or chat_template in tokenizer_config.json); say texts with llm_say_raw");
        return SIZE_MAX;
    }
    spelled.out = llmi_bytes_make(&t->a);
    spelled.ok = pen.ok = 1;
    pen.t = t;
    pen.parts = llmi_bytes_make(&t->a);
    pen.r = llmi_arena_make(&t->a);
    llmi_coder_make(&c, t);
    int ok = llmi_spell_template(&spelled, t->frame_text);
    if (ok && llmi_find_frame(spelled.out.data, &f, err) >= 0 && llmi_read_settings(&pen, &f, messages, count, &set, err) >= 0 &&
        llmi_check_messages(&f, messages + set, count - set, err) >= 0) {
        llmi_pen_all(&pen, &f, messages + set, count - set, open_answer);
        ok = pen.ok && llmi_encode_parts(&c, (const llmi_part *)(const void *)pen.parts.data, pen.parts.count / sizeof(llmi_part));
        if (ok) need = c.out.count;
    }
    if (!ok) llmi_nomem(err, "chat_template");
    if (need != SIZE_MAX && need > 0 && ids && capacity) memcpy(ids, c.out.data, (need < capacity ? need : capacity) * sizeof *ids);
    llmi_coder_drop(&c);
    llmi_bytes_drop(&pen.parts);
    llmi_arena_drop(&pen.r);
    llmi_bytes_drop(&spelled.out);
    return need;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-families    the architectures: names and switches
   Tables only: what a family calls its tensors, which keys it reads differently, which parts it has.
   ------------------------------------------------------------------------------------------------ */

/* To add a family:
     1. A row in llmi_families. If its tensors or experts are named in a new way, a row of names beside it.
     2. Where it departs from the plain decoder, a switch in the row: read in >>llm-config, obeyed in >>llm-model (which tensors)
        and >>llm-forward (which calls). What a row leaves open is found out from the tensors (fused projections, biases).
     3. Norms under other names than those of its row, in llmi_knows_norm: one that is not known there is refused.
     4. A golden folder with logits of its reference implementation in tests.

   Every layer is two blocks, and a family may leave one of them out in some layers (Nemotron-H has one block a layer):

       x += post(mix(norm(x)))     mix:  attention, latent attention, or a state-space mixer
       x += post(feed(norm(x)))    feed: an MLP, or a mixture of experts */

/* Which layers have a sliding window. The families use the same keys with different meanings:
   Llama writes no window; Mistral, Mixtral and Phi-3 mean every layer; Qwen2 and Qwen3 mean it only with a second key, and then
   for the layers from max_window_layers on, or for those that layer_types names; Qwen3-MoE has the second key but no list;
   Gemma and gpt-oss name the layers, or mean all but every sixth or second; Llama 4 cuts the text into chunks that do not see each other. */
enum {
    LLMI_WINDOW_NONE = 0, /* sliding_window is ignored */
    LLMI_WINDOW_ALL,      /* every layer when sliding_window is a number */
    LLMI_WINDOW_FLAG,     /* every layer, only with use_sliding_window */
    LLMI_WINDOW_LAYERS,   /* only with use_sliding_window, and by layer_types or from max_window_layers on */
    LLMI_WINDOW_TYPES,    /* by layer_types, or all layers but every pattern-th */
    LLMI_WINDOW_CHUNKS    /* no window: chunks of attention_chunk_size, by layer_types, or in layers with rope */
};

/* Switches of a family. */
enum {
    LLMI_QK_NORM = 1,      /* an RMS norm over every head of q and k, before rope */
    LLMI_UNIT_NORM = 2,    /* norm weights are stored as w and mean 1 + w */
    LLMI_SCALED_EMBED = 4, /* embeddings are multiplied by sqrt(hidden) */
    LLMI_SINKS = 8,        /* a logit per head that takes part in the softmax and has no value */
    LLMI_NO_ROPE = 16,     /* positions come from elsewhere */
    LLMI_LATENT = 32,      /* latent attention: keys and values pass through a narrow middle */
    LLMI_CLAMPED = 64,     /* MOQ_SWIGLU_CLAMP whatever hidden_act says */
    LLMI_LOCAL_ROPE = 128, /* layers with a window have a rope of their own */
    LLMI_TIED = 256,       /* a config.json that is silent means a tied head */
    LLMI_SOME_ROPE = 512,  /* every fourth layer has no rope, or those that no_rope_layers says */
    LLMI_LLAMA4 = 1024     /* layers without rope scale q with the position; heads of the others are normed after rope, in neighbouring pairs */
};

/* Module names under the decoder's prefix, or under layers.N. */
typedef struct llmi_names {
    const char *embed, *embed_alias;    /* the table of words; its other name, NULL: none */
    const char *norm;                   /* before the head */
    const char *mix_norm, *feed_norm;   /* before each block */
    const char *mix_post, *feed_post;   /* after each block, NULL: none */
    const char *mix, *feed;             /* what holds q_proj and in_proj; what holds up_proj and the experts */
} llmi_names;

/* Are the weights of the chosen experts divided by their sum? */
enum { LLMI_NORM_IF = 0, LLMI_NORM_ALWAYS, LLMI_NORM_UNLESS }; /* only if norm_topk_prob says so; always; unless it says not */

/* How experts are named under a layer; gate NULL: not gated. */
typedef struct llmi_moe_names {
    const char *router, *experts; /* modules under the layer: "mlp.gate", "mlp.experts" */
    const char *gate, *up, *down; /* under experts.E, unless they are stacked */
    const char *count_key, *count_alias;
    int32_t renormalize;          /* LLMI_NORM_... */
    const char *stack;            /* one tensor of all experts that holds gate and up, beside one for `down`; NULL: none */
    int32_t halves;               /* there gate and up are two halves instead of rows in turn */
    moq_score score;              /* where scoring_func is silent */
    const char *bias;             /* a tensor added to the scores while choosing, where it is there; NULL: none */
    const char *shared, *shared_key; /* a dense MLP beside the experts and the key of its width; NULL: none */
    int32_t shared_each;          /* that key counts once for each of n_shared_experts */
    const char *dense_key;        /* width of the layers without experts; NULL: intermediate_size */
    int32_t on_input;             /* see moq_routing */
} llmi_moe_names;

/* A number that config.json may leave out. */
typedef struct llmi_default {
    const char *key;
    double value; /* of an activation: its moq_activation */
} llmi_default;

/* A family is one row: names and switches. */
typedef struct llmi_family {
    const char *model_type;
    int32_t window, pattern;            /* pattern: of LLMI_WINDOW_TYPES, where config.json is silent */
    uint32_t flags;
    double theta, eps;                  /* where config.json is silent */
    const char *eps_key;
    const llmi_names *names;
    const llmi_moe_names *moe;          /* NULL: dense */
    const llmi_default *defaults;       /* ends with a NULL key; NULL: none */
} llmi_family;

static const llmi_names llmi_names_plain = {
    "embed_tokens", NULL, "norm", "input_layernorm", "post_attention_layernorm", NULL, NULL, "self_attn", "mlp"};
static const llmi_names llmi_names_gemma = {
    "embed_tokens", NULL, "norm", "input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm",
    "self_attn", "mlp"};
static const llmi_names llmi_names_llama4 = {
    "embed_tokens", NULL, "norm", "input_layernorm", "post_attention_layernorm", NULL, NULL, "self_attn", "feed_forward"};
static const llmi_names llmi_names_nemotron = {
    "embeddings", "embedding", "norm_f", "norm", "norm", NULL, NULL, "mixer", "mixer"};

static const llmi_moe_names llmi_moe_mixtral = {
    "block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2", "num_local_experts", "num_experts", LLMI_NORM_ALWAYS, NULL, 0,
    MOQ_SCORE_SOFTMAX, NULL, NULL, NULL, 0, NULL, 0};
/* transformers 5 holds Mixtral's experts under these names, and ModelOpt writes them where it cannot go back to the published ones */
static const llmi_moe_names llmi_moe_mixtral_held = {
    "mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj", "num_local_experts", "num_experts", LLMI_NORM_ALWAYS, NULL, 0,
    MOQ_SCORE_SOFTMAX, NULL, NULL, NULL, 0, NULL, 0};
static const llmi_moe_names llmi_moe_qwen3 = {
    "mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj", "num_experts", "num_local_experts", LLMI_NORM_IF, NULL, 0,
    MOQ_SCORE_SOFTMAX, NULL, NULL, NULL, 0, NULL, 0};
/* softmax over the chosen logits is softmax over all of them, divided by the sum of the chosen */
static const llmi_moe_names llmi_moe_gpt_oss = {
    "mlp.router", "mlp.experts", NULL, NULL, "down_proj", "num_local_experts", "num_experts", LLMI_NORM_ALWAYS, "gate_up_proj", 0,
    MOQ_SCORE_SOFTMAX, NULL, NULL, NULL, 0, NULL, 0};
static const llmi_moe_names llmi_moe_deepseek2 = {
    "mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj", "n_routed_experts", "num_local_experts", LLMI_NORM_IF, NULL, 0,
    MOQ_SCORE_SOFTMAX, NULL, "mlp.shared_experts", "moe_intermediate_size", 1, NULL, 0};
static const llmi_moe_names llmi_moe_deepseek3 = {
    "mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj", "n_routed_experts", "num_local_experts", LLMI_NORM_UNLESS, NULL, 0,
    MOQ_SCORE_SIGMOID, "mlp.gate.e_score_correction_bias", "mlp.shared_experts", "moe_intermediate_size", 1, NULL, 0};
static const llmi_moe_names llmi_moe_nemotron = {
    "mixer.gate", "mixer.experts", NULL, "up_proj", "down_proj", "n_routed_experts", "num_local_experts", LLMI_NORM_UNLESS, NULL, 0,
    MOQ_SCORE_SIGMOID, "mixer.gate.e_score_correction_bias", "mixer.shared_experts", "moe_shared_expert_intermediate_size", 0, NULL, 0};
/* stacked as published, one by one as llm-compressor writes them */
static const llmi_moe_names llmi_moe_llama4 = {
    "feed_forward.router", "feed_forward.experts", "gate_proj", "up_proj", "down_proj", "num_local_experts", "num_experts", LLMI_NORM_IF,
    "gate_up_proj", 1, MOQ_SCORE_SIGMOID, NULL, "feed_forward.shared_expert", "intermediate_size", 0, "intermediate_size_mlp", 1};

/* Published folders leave out what equals the reference implementation's defaults: Gemma 3 that also sees nearly everything. */
static const llmi_default llmi_defaults_gemma3[] = {
    {"num_attention_heads", 8}, {"num_key_value_heads", 4}, {"head_dim", 256}, {"vocab_size", 262208}, {"hidden_size", 2304},
    {"intermediate_size", 9216}, {"num_hidden_layers", 26}, {"max_position_embeddings", 131072}, {"query_pre_attn_scalar", 256},
    {"sliding_window", 4096}, {"hidden_activation", MOQ_GELU_TANH_MUL}, {NULL, 0}};
static const llmi_default llmi_defaults_gemma2[] = {
    {"head_dim", 256}, {"query_pre_attn_scalar", 256}, {"max_position_embeddings", 8192}, {"sliding_window", 4096},
    {"hidden_activation", MOQ_GELU_TANH_MUL}, {"attn_logit_softcapping", 50}, {"final_logit_softcapping", 30}, {NULL, 0}};
static const llmi_default llmi_defaults_deepseek2[] = {{"n_shared_experts", 2}, {NULL, 0}};
static const llmi_default llmi_defaults_deepseek3[] = {
    {"n_group", 8}, {"topk_group", 4}, {"first_k_dense_replace", 3}, {"routed_scaling_factor", 2.5}, {NULL, 0}};
static const llmi_default llmi_defaults_nemotron[] = {{"mlp_hidden_act", MOQ_RELU2}, {"n_groups", 8}, {"num_experts_per_tok", 2}, {NULL, 0}};

#define LLMI_GEMMA (LLMI_UNIT_NORM | LLMI_SCALED_EMBED | LLMI_TIED)

static const llmi_family llmi_families[] = {
    /* model_type    window         pattern  flags                  theta      eps   eps_key         names              moe  defaults */
    {"llama",        LLMI_WINDOW_NONE,   0, 0,                       10000.0,   1e-6, "rms_norm_eps", &llmi_names_plain, NULL, NULL},
    {"llama4_text",  LLMI_WINDOW_CHUNKS, 0, LLMI_SOME_ROPE | LLMI_LLAMA4, 500000.0,  1e-5, "rms_norm_eps", &llmi_names_llama4, &llmi_moe_llama4, NULL},
    {"mistral",      LLMI_WINDOW_ALL,    0, 0,                       10000.0,   1e-6, "rms_norm_eps", &llmi_names_plain, NULL, NULL},
    {"smollm3",      LLMI_WINDOW_LAYERS, 0, LLMI_SOME_ROPE,          2000000.0, 1e-6, "rms_norm_eps", &llmi_names_plain, NULL, NULL},
    {"qwen2",        LLMI_WINDOW_LAYERS, 0, 0,                       10000.0,   1e-6, "rms_norm_eps", &llmi_names_plain, NULL, NULL},
    {"qwen3",        LLMI_WINDOW_LAYERS, 0, LLMI_QK_NORM,            10000.0,   1e-6, "rms_norm_eps", &llmi_names_plain, NULL, NULL},
    {"phi3",         LLMI_WINDOW_ALL,    0, 0,                       10000.0,   1e-5, "rms_norm_eps", &llmi_names_plain, NULL, NULL},
    {"mixtral",      LLMI_WINDOW_ALL,    0, 0,                       1000000.0, 1e-5, "rms_norm_eps", &llmi_names_plain, &llmi_moe_mixtral, NULL},
    {"qwen3_moe",    LLMI_WINDOW_FLAG,   0, LLMI_QK_NORM,            10000.0,   1e-6, "rms_norm_eps", &llmi_names_plain, &llmi_moe_qwen3, NULL},
    {"gemma2",       LLMI_WINDOW_TYPES,  2, LLMI_GEMMA,              10000.0,   1e-6, "rms_norm_eps", &llmi_names_gemma, NULL, llmi_defaults_gemma2},
    {"gemma3_text",  LLMI_WINDOW_TYPES,  6, LLMI_GEMMA | LLMI_QK_NORM | LLMI_LOCAL_ROPE, 1000000.0, 1e-6, "rms_norm_eps", &llmi_names_gemma, NULL, llmi_defaults_gemma3},
    {"gpt_oss",      LLMI_WINDOW_TYPES,  2, LLMI_SINKS | LLMI_CLAMPED, 150000.0, 1e-5, "rms_norm_eps", &llmi_names_plain, &llmi_moe_gpt_oss, NULL},
    {"deepseek_v2",  LLMI_WINDOW_NONE,   0, LLMI_LATENT,             10000.0,   1e-6, "rms_norm_eps", &llmi_names_plain, &llmi_moe_deepseek2, llmi_defaults_deepseek2},
    {"deepseek_v3",  LLMI_WINDOW_NONE,   0, LLMI_LATENT,             10000.0,   1e-6, "rms_norm_eps", &llmi_names_plain, &llmi_moe_deepseek3, llmi_defaults_deepseek3},
    {"nemotron_h",   LLMI_WINDOW_NONE,   0, LLMI_NO_ROPE,            10000.0,   1e-5, "layer_norm_epsilon", &llmi_names_nemotron, &llmi_moe_nemotron,
     llmi_defaults_nemotron}};

/* ------------------------------------------------------------------------------------------------
   >>llm-keys        the model description; reading keys of config.json; rotary embeddings
   Every number is read through a function that knows its range; errors name the file, the key and what was found.
   ------------------------------------------------------------------------------------------------ */

/* Keys are looked up in `text_config` first (models that also see or hear keep the decoder's description there), then in the
   file itself. Older and newer spellings of one thing are both read; where both stand, the newer wins. */

#include <math.h>

/* Limits on what a file may ask for, far above any model that exists. */
#ifndef LLM_MAX_LAYERS
#define LLM_MAX_LAYERS 4096 /* num_hidden_layers of a config.json */
#endif
#define LLMI_MAX_WIDTH 16777216 /* of anything that is a row of activations */
#define LLMI_MAX_ENDS 32        /* eos ids */
#define LLMI_NAME_BYTES 256     /* of a module name that the engine builds */

/* hidden_act: the function between the two halves of the MLP. gelu_new is the tanh approximation under an older name. */
typedef struct llmi_activation_name { const char *name; moq_activation kind; } llmi_activation_name;

static const llmi_activation_name llmi_activations[] = {
    {"silu", MOQ_SILU_MUL}, {"swish", MOQ_SILU_MUL}, {"gelu", MOQ_GELU_MUL},
    {"gelu_pytorch_tanh", MOQ_GELU_TANH_MUL}, {"gelu_new", MOQ_GELU_TANH_MUL}, {"relu2", MOQ_RELU2}};

/* What the two blocks of a layer are. */
enum { LLMI_MIX_NONE = 0, LLMI_MIX_ATTENTION, LLMI_MIX_LATENT, LLMI_MIX_STATE };
enum { LLMI_FEED_NONE = 0, LLMI_FEED_DENSE, LLMI_FEED_EXPERTS };

/* Nemotron-H names the one block of every layer: by a word in layers_block_type, by a letter in hybrid_override_pattern. */
typedef struct llmi_block_name { const char *name; char letter; int32_t mix, feed; } llmi_block_name;

static const llmi_block_name llmi_blocks[] = {
    {"linear_attention", 'M', LLMI_MIX_STATE, LLMI_FEED_NONE}, {"mamba", 'M', LLMI_MIX_STATE, LLMI_FEED_NONE},
    {"full_attention", '*', LLMI_MIX_ATTENTION, LLMI_FEED_NONE}, {"attention", '*', LLMI_MIX_ATTENTION, LLMI_FEED_NONE},
    {"mlp", '-', LLMI_MIX_NONE, LLMI_FEED_DENSE}, {"moe", 'E', LLMI_MIX_NONE, LLMI_FEED_EXPERTS}};

/* Keys that were looked up, each once, to tell a misspelled one from those of other programs. */
typedef struct llmi_names_asked { const char *name[128]; int32_t count; } llmi_names_asked;

typedef struct llmi_rope llmi_rope;

/* Turns the plain frequencies in inv [dims / 2] into those of a rope type; *scale multiplies cos and sin. */
typedef void (*llmi_rope_fn)(const llmi_rope *r, double *inv, double *scale);

/* Rotary embedding (Su et al. 2021): pair i of a head turns by pos * inv[i] radians, inv[i] = theta^(-2i / dims). The types
   stretch those frequencies so that a model can read further than it was trained to. Numbers that a type does not use keep
   their defaults. */
struct llmi_rope {
    llmi_rope_fn adjust;      /* NULL: default */
    const moq_json *spec;     /* the object that describes it, or NULL */
    int32_t dims;             /* values of a head that are rotated, even */
    double theta, factor;
    double original;          /* context that the model was trained on before scaling */
    double longest;           /* dynamic: the context that was asked for, at least `original` */
    double low, high;         /* llama3: low_freq_factor, high_freq_factor */
    double fast, slow;        /* yarn: beta_fast, beta_slow */
    double mscale, mscale_all, attention; /* 0: not said */
    int truncate;
    const moq_json *factors;  /* longrope: the list that applies to this context */
};

/* The description. Strings and JSON values belong to the checkpoint; every size is positive and small enough that products of
   two of them fit 64 bits with room to spare. */
typedef struct llmi_config {
    const llmi_family *family;
    /* the family's, or the same under the names that the folder has */
    const llmi_moe_names *moe;
    /* the text model's object, and the file's */
    const moq_json *keys, *root;
    int32_t layers, hidden, heads, kv_heads, head_dim, value_dim, inter, vocab, context;
    /* what the model was made for; context may be less or more */
    int64_t max_positions;
    double eps, part_eps; /* of the norms of the stream; of those inside a mixer: heads, narrow middles */
    moq_activation_desc activation;
    /* dims 0: none; local: of layers with a window where they have one of their own */
    llmi_rope rope, local;
    /* attention: scale of q.k, 0: 1 / sqrt(head_dim); caps of its scores and of the logits, 0: none */
    double attn_scale, attn_cap, logit_cap;
    /* window 0: none; else of layers from window_from on, of all but every pattern-th, or of those that layer_types (not NULL) names */
    int32_t window, window_from, pattern;
    const moq_json *layer_types;
    /* turned: no_rope_layers, 1 for a layer with rope (sic), or NULL: all but every turned_step-th.
       Llama 4: chunk 0: none; q of a layer without rope counts 1 + temper * ln(1 + floor((pos + 1) / temper_floor)), temper 0: 1 */
    int32_t chunk, turned_step, unit_heads;
    double temper, temper_floor;
    const moq_json *turned;
    /* experts_said: moe_layers, or NULL */
    const moq_json *experts_said;
    /* latent attention: widths of the middles (q_rank 0: none) and of the parts of a head without and with rope */
    int32_t q_rank, kv_rank, nope_dim, rope_dim;
    int interleaved;
    /* state-space mixers */
    int32_t ssm_heads, ssm_head_dim, ssm_state, ssm_groups, ssm_conv;
    double dt_min, dt_max;
    /* layers_block_type or hybrid_override_pattern, or NULL: every layer has both blocks */
    const moq_json *blocks;
    /* moe_hidden: what experts read and write; moe_narrow: that is not the stream itself (moe_latent_size).
       experts 0: dense; dense_layers is mlp_only_layers, or NULL; layers before dense_first are dense too */
    int32_t experts, top_k, moe_inter, moe_hidden, moe_narrow, renormalize, sparse_step, dense_first, shared_inter, groups, top_groups;
    double route_scale;
    moq_score score;
    const moq_json *dense_layers;
    /* a file that says nothing of ties is tied when it has no lm_head */
    int tied, tie_said;
    /* ids that end a turn, each once */
    int32_t ends[LLMI_MAX_ENDS];
    int32_t end_count;
    llmi_names_asked asked;
} llmi_config;

/* ---- reading keys ---- */

/* Where keys are looked up, and where complaints go. */
typedef struct llmi_keys {
    const moq_json *text, *root;
    const llmi_default *defaults; /* of the family, once it is known */
    llmi_names_asked *asked;      /* takes the names of what is looked up; NULL: nobody wants them */
    moq_error *err;
} llmi_keys;

/* The error is about config.json: name the file as the library does. Returns the code. */
static moq_result llmi_in_file(const char *file, moq_result code, moq_error *err)
{
    size_t n = strlen(file), m;
    if (!err || n + 3 > sizeof err->file) return code;
    m = strlen(err->text);
    if (m > sizeof err->text - n - 3) m = sizeof err->text - n - 3;
    memmove(err->text + n + 2, err->text, m);
    memcpy(err->text, file, n);
    memcpy(err->text + n, ": ", 2);
    err->text[n + 2 + m] = 0;
    memcpy(err->file, file, n + 1);
    return code;
}

static int llmi_was_asked(const llmi_names_asked *asked, const char *name)
{
    for (int32_t i = 0; i < asked->count; i++)
        if (strcmp(asked->name[i], name) == 0) return 1;
    return 0;
}

static void llmi_note_asked(llmi_names_asked *asked, const char *name)
{
    if (asked && asked->count < (int32_t)LLMI_COUNT(asked->name) && !llmi_was_asked(asked, name)) asked->name[asked->count++] = name;
}

/* A key of the text model, else of the file; null is absent. */
static const moq_json *llmi_key(const llmi_keys *k, const char *name)
{
    const moq_json *v = moq_json_find(k->text, name);
    llmi_note_asked(k->asked, name);
    if (!v || v->type == MOQ_JSON_NULL) v = moq_json_find(k->root, name);
    return v && v->type != MOQ_JSON_NULL ? v : NULL;
}

/* What a value is, for messages: `text` gets its spelling. */
static const char *llmi_show(const moq_json *v, char text[64])
{
    static const char *const kinds[] = {"null", "false", "true", "number", "string", "list", "object"};
    size_t n = v && v->text ? v->text_bytes : 0;
    if (n > 60) n = 60;
    if (n) memcpy(text, v->text, n);
    text[n] = 0;
    return v ? kinds[(int)v->type] : "absent";
}

/* An error about a key: one sentence that begins with file and key. */
#define LLMI_REFUSE_KEY(k, code, key, ...) llmi_in_file("config.json", moq_fail((k)->err, code, key, __VA_ARGS__), (k)->err)

/* The commonest of them: what was found, and what would be right. */
static moq_result llmi_bad_key(const llmi_keys *k, moq_result code, const char *key, const moq_json *v, const char *expected)
{
    char text[64];
    const char *kind = llmi_show(v, text);
    return LLMI_REFUSE_KEY(k, code, key, "found %s%s%q, expected %s", kind, text[0] ? " " : "", text, expected);
}

/* Finite: looked at as bits, so that it holds under -ffast-math. */
static int llmi_finite(double v)
{
    uint64_t bits;
    memcpy(&bits, &v, sizeof bits);
    return (bits >> 52 & 0x7ff) != 0x7ff;
}

/* What the family says of a key that the file leaves out; 0: nothing. */
static int llmi_default_of(const llmi_keys *k, const char *key, double *out)
{
    for (const llmi_default *d = k->defaults; d && d->key; d++)
        if (strcmp(d->key, key) == 0) { *out = d->value; return 1; }
    return 0;
}

/* A fallback that no key has: the key must be there. */
#define LLMI_REQUIRED INT64_MIN

/* An integer of lo..hi; absent: `fallback`, or an error when that is LLMI_REQUIRED. */
static moq_result llmi_key_int(const llmi_keys *k, const char *key, int64_t lo, int64_t hi, int64_t fallback, int64_t *out)
{
    char text[64];
    const char *kind;
    const moq_json *v = llmi_key(k, key);
    double said;
    *out = fallback;
    if (!v && llmi_default_of(k, key, &said)) { *out = (int64_t)said; return MOQ_OK; }
    if (!v && fallback != LLMI_REQUIRED) return MOQ_OK;
    if (v && moq_json_int(v, out) && *out >= lo && *out <= hi) return MOQ_OK;
    *out = 0;
    kind = llmi_show(v, text);
    return LLMI_REFUSE_KEY(k, MOQ_E_CONFIG, key, "found %s%s%q, expected a whole number of %lld to %lld", kind, text[0] ? " " : "", text,
                       (long long)lo, (long long)hi);
}

/* The same from 1 to hi, for what counts rows, columns, heads. */
static moq_result llmi_key_size(const llmi_keys *k, const char *key, int64_t hi, int64_t fallback, int32_t *out)
{
    int64_t v;
    moq_result r = llmi_key_int(k, key, 1, hi, fallback, &v);
    *out = (int32_t)v;
    return r;
}

/* true or false; numbers and strings are refused, so that "false" in quotes does not come out as true. */
static moq_result llmi_key_bool(const llmi_keys *k, const char *key, int fallback, int *out)
{
    const moq_json *v = llmi_key(k, key);
    *out = fallback;
    return !v || moq_json_bool(v, out) ? MOQ_OK : llmi_bad_key(k, MOQ_E_CONFIG, key, v, "true or false");
}

/* A finite number above zero in an object (`key` of v's parent); absent: fallback. */
static moq_result llmi_positive(const llmi_keys *k, const char *key, const moq_json *v, double fallback, double *out)
{
    double x = fallback;
    *out = fallback;
    if (!v || v->type == MOQ_JSON_NULL) return MOQ_OK;
    if (!moq_json_float(v, &x) || !llmi_finite(x) || x <= 0) return llmi_bad_key(k, MOQ_E_CONFIG, key, v, "a finite number above 0");
    *out = x;
    return MOQ_OK;
}

/* ---- rope ---- */

/* Position interpolation (Chen et al. 2023): every position counts as pos / factor. */
static void llmi_rope_linear(const llmi_rope *r, double *inv, double *scale)
{
    (void)scale;
    for (int32_t i = 0; i < r->dims / 2; i++) inv[i] /= r->factor;
}

/* Llama 3.1: wavelengths beyond original / low are stretched by factor, those under original / high are kept, and the
   share between them falls linearly in original / wavelength. */
static void llmi_rope_llama3(const llmi_rope *r, double *inv, double *scale)
{
    (void)scale;
    for (int32_t i = 0; i < r->dims / 2; i++) {
        /* how often pair i goes round within the original context */
        double turns = r->original * inv[i] / 6.283185307179586, keep;
        keep = turns < r->low ? 0 : turns >= r->high ? 1 : (turns - r->low) / (r->high - r->low);
        inv[i] = inv[i] * keep + inv[i] / r->factor * (1 - keep);
    }
}

/* The dimension whose wave turns `turns` times within the original context. */
static double llmi_yarn_dim(const llmi_rope *r, double turns)
{
    return r->dims * log(r->original / (turns * 6.283185307179586)) / (2 * log(r->theta));
}

/* Attention gets a little sharper as the context grows: 0.1 m ln(factor) + 1, applied to both q and k. */
static double llmi_yarn_mscale(double factor, double mscale) { return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1; }

/* YaRN (Peng et al. 2023): fast dimensions are kept, slow ones stretched, a linear ramp over dimensions between. */
static void llmi_rope_yarn(const llmi_rope *r, double *inv, double *scale)
{
    double lo = llmi_yarn_dim(r, r->fast), hi = llmi_yarn_dim(r, r->slow);
    if (r->truncate) { lo = floor(lo); hi = ceil(hi); }
    if (lo < 0) lo = 0;
    if (hi > r->dims - 1) hi = r->dims - 1;
    if (!(hi > lo)) hi = lo + 0.001;
    /* dimensions up to lo turn often enough that their phase carries position: kept; from hi on they never come round: stretched */
    for (int32_t i = 0; i < r->dims / 2; i++) {
        double stretch = (i - lo) / (hi - lo);
        stretch = stretch < 0 ? 0 : stretch > 1 ? 1 : stretch;
        inv[i] = inv[i] * (1 - stretch) + inv[i] / r->factor * stretch;
    }
    if (r->attention > 0) *scale = r->attention;
    else if (r->mscale > 0 && r->mscale_all > 0) *scale = llmi_yarn_mscale(r->factor, r->mscale) / llmi_yarn_mscale(r->factor, r->mscale_all);
    else *scale = llmi_yarn_mscale(r->factor, 1);
}

/* LongRoPE (Ding et al. 2024): a divisor of its own for every frequency. */
static void llmi_rope_longrope(const llmi_rope *r, double *inv, double *scale)
{
    int32_t i = 0;
    for (const moq_json *e = moq_json_first(r->factors); e && i < r->dims / 2; e = moq_json_next(r->factors, e), i++) {
        double f = 1;
        moq_json_float(e, &f);
        inv[i] /= f;
    }
    /* sqrt(1 + ln factor / ln original), from the same paper */
    if (r->attention > 0) *scale = r->attention;
    else *scale = r->factor <= 1 || r->original <= 1 ? 1 : sqrt(1 + log(r->factor) / log(r->original));
}

/* NTK-aware scaling that grows with the text: theta times (factor * length / original - (factor - 1)) ^ (dims / (dims - 2)). Keys in the
   cache cannot be turned again, so the length is the context that was asked for; up to the original one nothing changes. */
static void llmi_rope_dynamic(const llmi_rope *r, double *inv, double *scale)
{
    double grown = r->factor * r->longest / r->original - (r->factor - 1);
    (void)scale;
    for (int32_t i = 1; i < r->dims / 2; i++) inv[i] *= pow(grown, -2.0 * i / (r->dims - 2));
}

/* "su" is the first name of longrope. */
typedef struct llmi_rope_kind { const char *name; llmi_rope_fn adjust; } llmi_rope_kind;

static const llmi_rope_kind llmi_rope_kinds[] = {
    {"default", NULL}, {"linear", llmi_rope_linear}, {"llama3", llmi_rope_llama3}, {"yarn", llmi_rope_yarn},
    {"longrope", llmi_rope_longrope}, {"su", llmi_rope_longrope}, {"dynamic", llmi_rope_dynamic}};

/* inv [dims / 2]: radians per position; the return value multiplies cos and sin. */
static float llmi_rope_table(const llmi_rope *r, double *inv)
{
    double scale = 1;
    for (int32_t i = 0; i < r->dims / 2; i++) inv[i] = pow(r->theta, -2.0 * i / r->dims);
    if (r->adjust) r->adjust(r, inv, &scale);
    return (float)scale;
}

/* Keys in the cache cannot be turned again, so the choice is made once, by the context that was asked for.
   longrope: the short list within the original context, the long one beyond; dims / 2 finite positive numbers each. */
static moq_result llmi_read_longrope(const llmi_keys *k, const llmi_config *c, llmi_rope *r)
{
    const char *key = c->context > r->original ? "long_factor" : "short_factor";
    r->factors = moq_json_find(r->spec, key);
    if (!r->factors || r->factors->type != MOQ_JSON_ARRAY || (int64_t)r->factors->count != r->dims / 2)
        return llmi_bad_key(k, MOQ_E_CONFIG, key, r->factors, "a list with one number for every rotated pair");
    for (const moq_json *e = moq_json_first(r->factors); e; e = moq_json_next(r->factors, e)) {
        double x;
        moq_result code = llmi_positive(k, key, e, 1, &x);
        if (code < 0) return code;
    }
    return MOQ_OK;
}

/* A number of a rope description and where it goes. */
typedef struct llmi_rope_key { const char *name; double fallback; size_t offset; } llmi_rope_key;

/* Numbers of a rope description; 0 stands for "not said". attention_factor replaces what a type would compute; beta_fast, beta_slow and
   mscale are YaRN's, low and high Llama 3's. */
static moq_result llmi_read_rope_numbers(const llmi_keys *k, llmi_rope *r)
{
    static const llmi_rope_key keys[] = {
        {"factor", 0, offsetof(llmi_rope, factor)},         {"low_freq_factor", 1, offsetof(llmi_rope, low)},
        {"high_freq_factor", 4, offsetof(llmi_rope, high)}, {"beta_fast", 32, offsetof(llmi_rope, fast)},
        {"beta_slow", 1, offsetof(llmi_rope, slow)},        {"attention_factor", 0, offsetof(llmi_rope, attention)},
        {"original_max_position_embeddings", 0, offsetof(llmi_rope, original)}};
    for (size_t i = 0; i < LLMI_COUNT(keys); i++) {
        double v;
        moq_result code = llmi_positive(k, keys[i].name, moq_json_find(r->spec, keys[i].name), keys[i].fallback, &v);
        if (code < 0) return code;
        memcpy((char *)r + keys[i].offset, &v, sizeof v);
    }
    moq_json_float(moq_json_find(r->spec, "mscale"), &r->mscale);
    moq_json_float(moq_json_find(r->spec, "mscale_all_dim"), &r->mscale_all);
    if (!llmi_finite(r->mscale) || !llmi_finite(r->mscale_all))
        return llmi_bad_key(k, MOQ_E_CONFIG, "mscale", moq_json_find(r->spec, "mscale"), "a finite number");
    r->truncate = 1;
    moq_json_bool(moq_json_find(r->spec, "truncate"), &r->truncate);
    return MOQ_OK;
}

/* The type's name is rope_type, or type in older files; without one the frequencies are the plain ones. */
static moq_result llmi_find_rope(const llmi_keys *k, llmi_rope *r)
{
    const moq_json *type = moq_json_find(r->spec, "rope_type");
    char text[64];
    if (!type || type->type == MOQ_JSON_NULL) type = moq_json_find(r->spec, "type");
    r->adjust = NULL;
    if (!type || type->type == MOQ_JSON_NULL) return MOQ_OK;
    for (size_t i = 0; i < LLMI_COUNT(llmi_rope_kinds); i++)
        if (moq_json_is(type, llmi_rope_kinds[i].name)) { r->adjust = llmi_rope_kinds[i].adjust; return MOQ_OK; }
    llmi_show(type, text);
    return LLMI_REFUSE_KEY(k, MOQ_E_UNSUPPORTED, "rope_type", "'%q' is not implemented; known: default, linear, llama3, yarn, longrope, dynamic", text);
}

/* What the type found by llmi_find_rope needs of the numbers. */
static moq_result llmi_check_rope(const llmi_keys *k, const llmi_config *c, llmi_rope *r)
{
    double own = 0;
    moq_result code = llmi_positive(k, "original_max_position_embeddings", llmi_key(k, "original_max_position_embeddings"), 0, &own);
    if (code < 0) return code;
    if (r->original <= 0) r->original = own > 0 ? own : (double)c->max_positions;
    if (r->adjust == llmi_rope_dynamic) r->original = (double)c->max_positions; /* whatever else is said */
    r->longest = c->context > r->original ? c->context : r->original;
    if (r->adjust == llmi_rope_llama3 && r->high < r->low)
        return llmi_bad_key(k, MOQ_E_CONFIG, "high_freq_factor", moq_json_find(r->spec, "high_freq_factor"), "low_freq_factor or more");
    if (r->adjust == llmi_rope_longrope && own > 0) r->factor = 0; /* Phi-3 says it by two lengths, which win over a factor */
    if (r->factor <= 0 && (r->adjust == llmi_rope_longrope || r->adjust == llmi_rope_yarn)) r->factor = (double)c->max_positions / r->original;
    if (r->factor <= 0 && r->adjust) return llmi_bad_key(k, MOQ_E_CONFIG, "factor", NULL, "a finite number above 0");
    return r->adjust == llmi_rope_longrope ? llmi_read_longrope(k, c, r) : MOQ_OK;
}

/* One description: its theta, or `theta`; its share of a head, or the file's. */
static moq_result llmi_read_rope_spec(const llmi_keys *k, const llmi_config *c, const moq_json *spec, const moq_json *theta, double theta_else,
                                      llmi_rope *r)
{
    const moq_json *own = moq_json_find(spec, "rope_theta"), *part = moq_json_find(spec, "partial_rotary_factor");
    double share;
    moq_result code;
    r->spec = spec;
    if (!own || own->type == MOQ_JSON_NULL) own = theta;
    if (!part || part->type == MOQ_JSON_NULL) part = llmi_key(k, "partial_rotary_factor");
    if ((code = llmi_positive(k, "rope_theta", own, theta_else, &r->theta)) < 0) return code;
    if ((code = llmi_positive(k, "partial_rotary_factor", part, 1, &share)) < 0) return code;
    if (share > 1) return llmi_bad_key(k, MOQ_E_CONFIG, "partial_rotary_factor", part, "a number up to 1");
    /* the fraction is cut, not rounded, as the reference implementations do */
    r->dims = c->rope_dim > 0 ? c->rope_dim : (int32_t)(c->head_dim * share);
    if (r->dims < 2 || r->dims % 2)
        return llmi_bad_key(k, MOQ_E_CONFIG, "head_dim", llmi_key(k, "head_dim"), "head_dim * partial_rotary_factor to be even");
    if ((code = llmi_find_rope(k, r)) < 0 || (code = llmi_read_rope_numbers(k, r)) < 0) return code;
    return llmi_check_rope(k, c, r);
}

/* rope_parameters (transformers 5: theta and type in one object, or one such object for every type of layer), or rope_theta and
   rope_scaling, with rope_local_base_freq for the layers that have a window. */
static moq_result llmi_read_rope(const llmi_keys *k, llmi_config *c)
{
    const moq_json *spec = llmi_key(k, "rope_parameters"), *local = NULL, *local_theta = llmi_key(k, "rope_local_base_freq");
    int typed = c->family->window == LLMI_WINDOW_TYPES;
    moq_result code;
    if (c->family->flags & LLMI_NO_ROPE) return MOQ_OK;
    if (!spec) spec = llmi_key(k, "rope_scaling");
    /* its published folders all stretch their context, and transformers does so where a folder is silent; null is said */
    if (!spec && (c->family->flags & LLMI_CLAMPED) && !moq_json_find(k->text, "rope_scaling") && !moq_json_find(k->text, "rope_parameters"))
        return llmi_bad_key(k, MOQ_E_CONFIG, "rope_scaling", NULL, "an object, or null for none");
    if (spec && spec->type != MOQ_JSON_OBJECT) return llmi_bad_key(k, MOQ_E_CONFIG, "rope_parameters", spec, "an object or null");
    for (const moq_json *e = moq_json_first(spec); e; e = moq_json_next(spec, e)) {
        if (e->type != MOQ_JSON_OBJECT) continue;
        local = typed ? moq_json_find(spec, "sliding_attention") : NULL;
        spec = typed ? moq_json_find(spec, "full_attention") : NULL;
        if (!local || !spec || local->type != MOQ_JSON_OBJECT || spec->type != MOQ_JSON_OBJECT)
            return llmi_bad_key(k, MOQ_E_UNSUPPORTED, "rope_parameters", e, "one description for all layers");
        break;
    }
    code = llmi_read_rope_spec(k, c, spec, llmi_key(k, "rope_theta"), c->family->theta, &c->rope);
    if (code < 0 || !typed || (!local && !local_theta && !(c->family->flags & LLMI_LOCAL_ROPE))) return code;
    return llmi_read_rope_spec(k, c, local, local_theta, 10000.0, &c->local);
}

/* ------------------------------------------------------------------------------------------------
   >>llm-config      config.json -> model description
   Every number that sizes memory or divides is checked here; the sections below trust it. Reads no tensor.
   ------------------------------------------------------------------------------------------------ */

/* model_type decides; `architectures` is not looked at, because quantizers rename it more often. */
static moq_result llmi_read_family(const llmi_keys *k, llmi_config *c)
{
    char known[512];
    size_t n = 0;
    const moq_json *type = llmi_key(k, "model_type");
    if (!moq_json_string(type)) return llmi_bad_key(k, MOQ_E_CONFIG, "model_type", type, "the name of an architecture");
    known[0] = 0;
    for (size_t i = 0; i < LLMI_COUNT(llmi_families); i++) {
        const char *name = llmi_families[i].model_type;
        if (moq_json_is(type, name)) { c->family = &llmi_families[i]; return MOQ_OK; }
        if (n + strlen(name) + 3 > sizeof known) continue;
        if (n) { memcpy(known + n, ", ", 2); n += 2; }
        memcpy(known + n, name, strlen(name) + 1);
        n += strlen(name);
    }
    return LLMI_REFUSE_KEY(k, MOQ_E_UNSUPPORTED, "model_type", "architecture '%q' is unknown; known: %s. A folder of any other is run elsewhere; it can be "
                           "quantized by recipes that need no data, as w4a16_nvfp4 or mxfp8, or with a calibration file", moq_json_string(type), known);
}

/* Latent attention: every head has its own keys and values, made from a narrow middle; a head is nope | rope. */
static moq_result llmi_read_latent(const llmi_keys *k, llmi_config *c)
{
    int64_t rank;
    moq_result code;
    /* q_lora_rank null or 0: q comes straight from the stream (DeepSeek-V2-Lite) */
    if ((code = llmi_key_int(k, "q_lora_rank", 0, LLMI_MAX_WIDTH / 4, 0, &rank)) < 0) return code;
    if ((code = llmi_key_size(k, "kv_lora_rank", LLMI_MAX_WIDTH / 4, LLMI_REQUIRED, &c->kv_rank)) < 0) return code;
    if ((code = llmi_key_size(k, "qk_nope_head_dim", 32768, LLMI_REQUIRED, &c->nope_dim)) < 0) return code;
    if ((code = llmi_key_size(k, "qk_rope_head_dim", 32768, LLMI_REQUIRED, &c->rope_dim)) < 0) return code;
    if ((code = llmi_key_size(k, "v_head_dim", 65536, LLMI_REQUIRED, &c->value_dim)) < 0) return code;
    c->q_rank = (int32_t)rank;
    c->kv_heads = c->heads;
    c->head_dim = c->nope_dim + c->rope_dim;
    return llmi_key_bool(k, "rope_interleave", 1, &c->interleaved);
}

/* head h of q reads kv head h / (heads / kv_heads), so one must divide the other. head_dim is hidden / heads unless it is said:
   Qwen3 and others chose it freely. */
static moq_result llmi_read_plain_heads(const llmi_keys *k, llmi_config *c)
{
    const char *key = llmi_key(k, "head_dim") || !llmi_key(k, "attention_head_dim") ? "head_dim" : "attention_head_dim";
    double said;
    moq_result code;
    if ((code = llmi_key_size(k, "num_key_value_heads", 65536, c->heads, &c->kv_heads)) < 0) return code;
    if (c->heads % c->kv_heads)
        return LLMI_REFUSE_KEY(k, MOQ_E_CONFIG, "num_attention_heads", "%d is no multiple of num_key_value_heads %d; one of the two is wrong",
                           c->heads, c->kv_heads);
    if (!llmi_key(k, key) && !llmi_default_of(k, key, &said) && c->hidden % c->heads)
        return LLMI_REFUSE_KEY(k, MOQ_E_CONFIG, "hidden_size", "%d is no multiple of num_attention_heads %d and there is no head_dim",
                           c->hidden, c->heads);
    code = llmi_key_size(k, key, 65536, c->hidden / c->heads, &c->head_dim);
    c->value_dim = c->head_dim;
    return code;
}

/* A cap: null is none, which an absent key need not be. */
static moq_result llmi_read_cap(const llmi_keys *k, const char *key, double *out)
{
    const moq_json *own = moq_json_find(k->text, key), *v = llmi_key(k, key);
    double none = 0;
    if (!own) own = moq_json_find(k->root, key);
    if (!own) llmi_default_of(k, key, &none);
    return llmi_positive(k, key, v, none, out);
}

/* Heads, and what the scores of attention are multiplied by. */
static moq_result llmi_read_heads(const llmi_keys *k, llmi_config *c)
{
    const moq_json *v = llmi_key(k, "query_pre_attn_scalar");
    double q = 0;
    moq_result code;
    if ((code = llmi_key_size(k, "num_attention_heads", 65536, LLMI_REQUIRED, &c->heads)) < 0) return code;
    code = c->family->flags & LLMI_LATENT ? llmi_read_latent(k, c) : llmi_read_plain_heads(k, c);
    if (code < 0) return code;
    if ((int64_t)c->heads * (c->head_dim + c->value_dim) * 3 > 2 * (int64_t)LLMI_MAX_WIDTH)
        return llmi_bad_key(k, MOQ_E_CONFIG, "head_dim", llmi_key(k, "head_dim"), "num_attention_heads * head_dim of a possible size");
    /* Gemma says what stands under the root: 1 / sqrt(query_pre_attn_scalar) takes the place of 1 / sqrt(head_dim) */
    llmi_default_of(k, "query_pre_attn_scalar", &q);
    if ((code = llmi_positive(k, "query_pre_attn_scalar", v, q, &q)) < 0) return code;
    c->attn_scale = q > 0 ? 1 / sqrt(q) : 0;
    if ((code = llmi_read_cap(k, "attn_logit_softcapping", &c->attn_cap)) < 0) return code;
    if (c->family->flags & LLMI_QK_NORM) c->attn_cap = 0; /* Gemma 3 norms heads instead; its reference implementation passes over the key */
    return llmi_read_cap(k, "final_logit_softcapping", &c->logit_cap);
}

/* The blocks of a layer, as layers_block_type or hybrid_override_pattern says; 0: an unknown one. */
static int llmi_find_block(const moq_json *blocks, int32_t layer, int32_t *mix, int32_t *feed)
{
    const char *letters = moq_json_string(blocks);
    const moq_json *name = letters ? NULL : moq_json_at(blocks, (size_t)layer);
    for (size_t i = 0; i < LLMI_COUNT(llmi_blocks); i++) {
        const llmi_block_name *b = &llmi_blocks[i];
        if (letters ? letters[layer] != b->letter : !moq_json_is(name, b->name)) continue;
        *mix = b->mix;
        *feed = b->feed;
        return 1;
    }
    return 0;
}

/* Only families without rope name their blocks. The list also says how many layers there are where num_hidden_layers does not. */
static moq_result llmi_read_blocks(const llmi_keys *k, llmi_config *c, int64_t *count)
{
    const moq_json *list;
    const char *key = "layers_block_type";
    *count = LLMI_REQUIRED;
    if (!(c->family->flags & LLMI_NO_ROPE)) return MOQ_OK;
    list = llmi_key(k, key);
    if (!list) list = llmi_key(k, key = "hybrid_override_pattern");
    if (list && list->type == MOQ_JSON_ARRAY) *count = (int64_t)list->count;
    else if (moq_json_string(list)) *count = (int64_t)strlen(moq_json_string(list));
    else return llmi_bad_key(k, MOQ_E_CONFIG, key, list, "a list or a string that names the block of every layer");
    c->blocks = list;
    return MOQ_OK;
}

/* Every layer has a block that is known here. */
static moq_result llmi_check_blocks(const llmi_keys *k, const llmi_config *c, int64_t count)
{
    int32_t mix, feed;
    if (!c->blocks) return MOQ_OK;
    if (count < c->layers) return llmi_bad_key(k, MOQ_E_CONFIG, "layers_block_type", c->blocks, "a block for every layer");
    for (int32_t i = 0; i < c->layers; i++)
        if (!llmi_find_block(c->blocks, i, &mix, &feed))
            return LLMI_REFUSE_KEY(k, MOQ_E_UNSUPPORTED, "layers_block_type", "the block of layer %d is unknown; known: mamba (M), attention (*), mlp (-), moe (E)", i);
    return MOQ_OK;
}

/* Layers are limited first of all: a thousand million of them must fail before anything is allocated. */
static moq_result llmi_read_sizes(const llmi_keys *k, llmi_config *c)
{
    const char *inter = c->moe && c->moe->dense_key ? c->moe->dense_key : "intermediate_size";
    int64_t layers, listed;
    moq_result code;
    if (!llmi_key(k, inter)) inter = "intermediate_size";
    if ((code = llmi_read_blocks(k, c, &listed)) < 0) return code;
    if ((code = llmi_key_int(k, "num_hidden_layers", 1, INT32_MAX, listed, &layers)) < 0) return code;
    if (layers > LLM_MAX_LAYERS)
        return LLMI_REFUSE_KEY(k, MOQ_E_LIMIT, "num_hidden_layers", "%lld is over LLM_MAX_LAYERS (%d); raise it if you trust the file",
                           (long long)layers, LLM_MAX_LAYERS);
    c->layers = (int32_t)layers;
    if ((code = llmi_check_blocks(k, c, listed)) < 0) return code;
    if ((code = llmi_key_size(k, "hidden_size", LLMI_MAX_WIDTH / 4, LLMI_REQUIRED, &c->hidden)) < 0) return code;
    if ((code = llmi_key_size(k, inter, LLMI_MAX_WIDTH / 4, LLMI_REQUIRED, &c->inter)) < 0) return code;
    if ((code = llmi_key_size(k, "vocab_size", LLMI_MAX_WIDTH, LLMI_REQUIRED, &c->vocab)) < 0) return code;
    return llmi_read_heads(k, c);
}

/* Only families without a gate take relu2: between gate and up it would be a function of its own. */
static moq_result llmi_find_activation(const llmi_keys *k, const llmi_config *c, const char *key, const moq_json *v, moq_activation own, moq_activation *out)
{
    char text[64];
    for (size_t i = 0; i < LLMI_COUNT(llmi_activations); i++)
        if (moq_json_is(v, llmi_activations[i].name) && (llmi_activations[i].kind == MOQ_RELU2) == (own == MOQ_RELU2)) {
            *out = llmi_activations[i].kind;
            return MOQ_OK;
        }
    llmi_show(v, text);
    return LLMI_REFUSE_KEY(k, MOQ_E_UNSUPPORTED, key, "'%q' is not implemented for a '%s'; known: %s", text, c->family->model_type,
                           own == MOQ_RELU2 ? "relu2" : "silu, gelu, gelu_pytorch_tanh");
}

/* Absent means SiLU, but for what the family says. Gemma has two keys, of which the first counts; Nemotron-H, which has a default of
   mlp_hidden_act, means that one. gpt-oss writes silu and means its own clamped function. */
static moq_result llmi_read_activation(const llmi_keys *k, llmi_config *c)
{
    static const char *const keys[] = {"mlp_hidden_act", "hidden_activation", "hidden_act", "mlp_hidden_act"};
    const char *key = NULL;
    double limit, alpha, kind = MOQ_SILU_MUL;
    moq_result code;
    for (size_t i = llmi_default_of(k, keys[0], &kind) ? 0 : 1; i < LLMI_COUNT(keys) && !key; i++)
        if (llmi_key(k, keys[i])) key = keys[i];
    /* g = min(g, limit), u = clamp(u, +-limit): g * sigmoid(alpha g) * (u + 1), whatever the name of the function */
    if (c->family->flags & LLMI_CLAMPED) {
        if ((code = llmi_positive(k, "swiglu_limit", llmi_key(k, "swiglu_limit"), 7, &limit)) < 0) return code;
        if ((code = llmi_positive(k, "swiglu_alpha", llmi_key(k, "swiglu_alpha"), 1.702, &alpha)) < 0) return code;
        c->activation.kind = MOQ_SWIGLU_CLAMP;
        c->activation.limit = (float)limit;
        c->activation.alpha = (float)alpha;
        c->activation.beta = 1;
        return MOQ_OK;
    }
    for (size_t i = 1; i < LLMI_COUNT(keys); i++) llmi_default_of(k, keys[i], &kind);
    c->activation.kind = (moq_activation)(int)kind;
    return key ? llmi_find_activation(k, c, key, llmi_key(k, key), (moq_activation)(int)kind, &c->activation.kind) : MOQ_OK;
}

/* true, false, or the numbers 1 and 0 that some files write instead. */
static moq_result llmi_key_switch(const llmi_keys *k, const char *key, int fallback, int *out)
{
    int64_t v;
    if (!moq_json_int(llmi_key(k, key), &v)) return llmi_key_bool(k, key, fallback, out);
    *out = v != 0;
    return MOQ_OK;
}

/* A list with an entry for every layer, or absent. */
static moq_result llmi_key_list(const llmi_keys *k, const char *key, int32_t layers, const moq_json **out)
{
    const moq_json *v = *out = llmi_key(k, key);
    if (!v || (v->type == MOQ_JSON_ARRAY && (int64_t)v->count >= layers)) return MOQ_OK;
    return llmi_bad_key(k, MOQ_E_CONFIG, key, v, "a list with one entry for every layer");
}

/* Layers without rope. no_rope_layers says 1 for a layer that has it; an empty list means that it is not said. */
static moq_result llmi_read_turns(const llmi_keys *k, llmi_config *c)
{
    const moq_json *list = llmi_key(k, "no_rope_layers");
    if (!(c->family->flags & LLMI_SOME_ROPE)) return MOQ_OK;
    if (list && list->count) return llmi_key_list(k, "no_rope_layers", c->layers, &c->turned);
    return llmi_key_size(k, "no_rope_layer_interval", INT32_MAX, 4, &c->turned_step);
}

/* Llama 4: chunks, norms of heads, how layers without rope scale q. */
static moq_result llmi_read_chunks(const llmi_keys *k, llmi_config *c)
{
    int64_t chunk;
    int on;
    moq_result code;
    if ((code = llmi_key_int(k, "attention_chunk_size", 1, INT64_MAX, 8192, &chunk)) < 0) return code;
    /* the whole context in one chunk: nothing to cut */
    c->chunk = chunk < c->context ? (int32_t)chunk : 0;
    if ((code = llmi_key_list(k, "layer_types", c->layers, &c->layer_types)) < 0) return code;
    for (const moq_json *e = moq_json_first(c->layer_types); e; e = moq_json_next(c->layer_types, e))
        if (!moq_json_is(e, "full_attention") && !moq_json_is(e, "chunked_attention"))
            return llmi_bad_key(k, MOQ_E_UNSUPPORTED, "layer_types", e, "full_attention or chunked_attention");
    if ((code = llmi_key_switch(k, "use_qk_norm", 1, &on)) < 0) return code;
    c->unit_heads = on;
    if ((code = llmi_key_switch(k, "attn_temperature_tuning", 1, &on)) < 0) return code;
    if ((code = llmi_positive(k, "attn_scale", llmi_key(k, "attn_scale"), 0.1, &c->temper)) < 0) return code;
    if (!on) c->temper = 0;
    return llmi_positive(k, "floor_scale", llmi_key(k, "floor_scale"), 8192, &c->temper_floor);
}

/* Does this layer turn q and k? */
static int llmi_layer_turns(const llmi_config *c, int32_t layer)
{
    int64_t v = 1;
    if (c->family->flags & LLMI_NO_ROPE) return 0;
    if (c->turned) return moq_json_int(moq_json_at(c->turned, (size_t)layer), &v) && v != 0;
    return c->turned_step == 0 || (layer + 1) % c->turned_step != 0;
}

/* Chunks of a layer, 0: it sees everything. */
static int32_t llmi_layer_chunk(const llmi_config *c, int32_t layer)
{
    if (c->family->window != LLMI_WINDOW_CHUNKS) return 0;
    if (c->layer_types) return moq_json_is(moq_json_at(c->layer_types, (size_t)layer), "chunked_attention") ? c->chunk : 0;
    return llmi_layer_turns(c, layer) ? c->chunk : 0;
}

/* See >>llm-families for what the keys mean in which family. */
static moq_result llmi_read_window(const llmi_keys *k, llmi_config *c)
{
    const llmi_family *f = c->family;
    int on = 1;
    int64_t window = 0, from = 0;
    moq_result code = MOQ_OK;
    if (f->window == LLMI_WINDOW_NONE) return MOQ_OK;
    if (f->window == LLMI_WINDOW_CHUNKS) return llmi_read_chunks(k, c);
    if ((f->window == LLMI_WINDOW_FLAG || f->window == LLMI_WINDOW_LAYERS) && (code = llmi_key_bool(k, "use_sliding_window", 0, &on)) < 0) return code;
    if (!on) return MOQ_OK;
    if ((code = llmi_key_int(k, "sliding_window", 0, INT64_MAX, 0, &window)) < 0) return code;
    /* a window wider than any position is none */
    c->window = window > INT32_MAX ? 0 : (int32_t)window;
    if (f->window != LLMI_WINDOW_LAYERS && f->window != LLMI_WINDOW_TYPES) return MOQ_OK;
    if ((code = llmi_key_list(k, "layer_types", c->layers, &c->layer_types)) < 0) return code;
    if (!c->layer_types && f->window == LLMI_WINDOW_TYPES) {
        const char *key = llmi_key(k, "sliding_window_pattern") ? "sliding_window_pattern" : "_sliding_window_pattern";
        return llmi_key_size(k, key, INT32_MAX, f->pattern, &c->pattern);
    }
    if (!c->layer_types) {
        code = llmi_key_int(k, "max_window_layers", 0, INT32_MAX, 28, &from);
        c->window_from = (int32_t)from;
        return code;
    }
    for (const moq_json *e = moq_json_first(c->layer_types); e; e = moq_json_next(c->layer_types, e))
        if (!moq_json_is(e, "full_attention") && !moq_json_is(e, "sliding_attention"))
            return llmi_bad_key(k, MOQ_E_UNSUPPORTED, "layer_types", e, "full_attention or sliding_attention");
    return MOQ_OK;
}

/* Is this one of the layers that sliding_window is meant for? */
static int llmi_layer_slides(const llmi_config *c, int32_t layer)
{
    if (c->layer_types) return moq_json_is(moq_json_at(c->layer_types, (size_t)layer), "sliding_attention");
    if (c->family->flags & LLMI_SOME_ROPE) return !llmi_layer_turns(c, layer); /* SmolLM3: positions or a window */
    return c->pattern > 0 ? (layer + 1) % c->pattern != 0 : layer >= c->window_from;
}

/* The window of a layer, 0: it sees everything. */
static int32_t llmi_layer_window(const llmi_config *c, int32_t layer) { return llmi_layer_slides(c, layer) ? c->window : 0; }

/* DeepSeek's routing: scores by scoring_func, groups of experts unless topk_method is greedy, weights times a factor. */
static moq_result llmi_read_routing(const llmi_keys *k, llmi_config *c)
{
    const llmi_moe_names *n = c->moe;
    const moq_json *score = llmi_key(k, "scoring_func");
    int64_t layers_apart;
    double scale = 1;
    moq_result code;
    /* V2 folders say softmax and group_limited_greedy, V3 sigmoid and noaux_tc; a folder that is silent means its family's */
    c->score = n->score;
    if (moq_json_is(score, "softmax")) c->score = MOQ_SCORE_SOFTMAX;
    else if (moq_json_is(score, "sigmoid")) c->score = MOQ_SCORE_SIGMOID;
    else if (score) return llmi_bad_key(k, MOQ_E_UNSUPPORTED, "scoring_func", score, "softmax or sigmoid");
    if ((code = llmi_key_size(k, "n_group", c->experts, 1, &c->groups)) < 0) return code;
    if ((code = llmi_key_size(k, "topk_group", c->groups, c->groups, &c->top_groups)) < 0) return code;
    if (c->top_groups > c->groups) c->top_groups = c->groups;
    llmi_default_of(k, "routed_scaling_factor", &scale);
    if (c->experts % c->groups)
        return LLMI_REFUSE_KEY(k, MOQ_E_CONFIG, "n_group", "%d groups do not divide %d experts; one of the two is wrong", c->groups, c->experts);
    const moq_json *method = llmi_key(k, "topk_method"); /* a silent V2 folder means greedy */
    if (moq_json_is(method, "greedy") || (!method && n->score == MOQ_SCORE_SOFTMAX)) c->groups = c->top_groups = 1;
    /* every published folder writes 1; anything else would need a list of layers that nobody has defined */
    if ((code = llmi_key_int(k, "moe_layer_freq", 1, 1, 1, &layers_apart)) < 0) return code;
    return llmi_positive(k, "routed_scaling_factor", llmi_key(k, "routed_scaling_factor"), scale, &c->route_scale);
}

/* Experts that see every token are one dense MLP beside the others. */
static moq_result llmi_read_shared(const llmi_keys *k, llmi_config *c)
{
    const llmi_moe_names *n = c->moe;
    int64_t shared = 1;
    int32_t width;
    moq_result code;
    if (!n->shared) return MOQ_OK;
    if ((code = llmi_key_int(k, "n_shared_experts", 0, 1024, 1, &shared)) < 0) return code;
    if ((code = llmi_key_size(k, n->shared_key, LLMI_MAX_WIDTH / 4, c->moe_inter, &width)) < 0) return code;
    /* a folder that does not count them has one */
    /* either the width of each of them, or of all together */
    if (!n->shared_each) shared = shared > 0;
    if (shared * width > LLMI_MAX_WIDTH / 4) return llmi_bad_key(k, MOQ_E_CONFIG, "n_shared_experts", llmi_key(k, "n_shared_experts"), "a possible number");
    c->shared_inter = (int32_t)(shared * width);
    return MOQ_OK;
}

/* Every layer holds experts unless decoder_sparse_step (Llama 4: interleave_moe_layer_step), mlp_only_layers or first_k_dense_replace
   say otherwise, or moe_layers lists them. The count has two
   spellings, which transformers 5 exchanged; norm_topk_prob divides the chosen weights by their sum, as Mixtral always does. */
static moq_result llmi_read_moe(const llmi_keys *k, llmi_config *c)
{
    const llmi_moe_names *n = c->moe;
    const char *key, *step = llmi_key(k, "interleave_moe_layer_step") ? "interleave_moe_layer_step" : "decoder_sparse_step";
    int64_t experts, dense;
    int32_t width = c->inter;
    int renormalize;
    moq_result code;
    if (!n) return MOQ_OK;
    key = llmi_key(k, n->count_key) || !llmi_key(k, n->count_alias) ? n->count_key : n->count_alias;
    if ((code = llmi_key_int(k, key, 0, 65536, c->blocks ? 0 : LLMI_REQUIRED, &experts)) < 0) return code;
    c->experts = (int32_t)experts;
    if (experts == 0) return MOQ_OK; /* every layer is dense; llm-model refuses it when there are router tensors */
    if ((code = llmi_key_size(k, "num_experts_per_tok", 65536, LLMI_REQUIRED, &c->top_k)) < 0) return code;
    if (c->top_k > c->experts)
        return LLMI_REFUSE_KEY(k, MOQ_E_CONFIG, "num_experts_per_tok", "%d is more than %s %d; one of the two is wrong", c->top_k, key, c->experts);
    if (n->dense_key && (code = llmi_key_size(k, "intermediate_size", LLMI_MAX_WIDTH / 4, width, &width)) < 0) return code;
    if ((code = llmi_key_size(k, "moe_intermediate_size", LLMI_MAX_WIDTH / 4, width, &c->moe_inter)) < 0) return code;
    if ((code = llmi_key_size(k, "moe_latent_size", LLMI_MAX_WIDTH / 4, c->hidden, &c->moe_hidden)) < 0) return code;
    c->moe_narrow = llmi_key(k, "moe_latent_size") != NULL;
    if ((code = llmi_key_size(k, step, INT32_MAX, 1, &c->sparse_step)) < 0) return code;
    if ((code = llmi_key_int(k, "first_k_dense_replace", 0, INT32_MAX, 0, &dense)) < 0) return code;
    if ((code = llmi_key_bool(k, "norm_topk_prob", n->renormalize == LLMI_NORM_UNLESS, &renormalize)) < 0) return code;
    c->renormalize = n->renormalize == LLMI_NORM_ALWAYS || renormalize;
    c->dense_layers = llmi_key(k, "mlp_only_layers");
    c->experts_said = llmi_key(k, "moe_layers");
    c->dense_first = (int32_t)dense;
    if ((code = llmi_read_routing(k, c)) < 0) return code;
    return llmi_read_shared(k, c);
}

/* Does a list of layers name this one? */
static int llmi_names_layer(const moq_json *list, int32_t layer)
{
    int64_t v;
    for (const moq_json *e = moq_json_first(list); e; e = moq_json_next(list, e))
        if (moq_json_int(e, &v) && v == layer) return 1;
    return 0;
}

/* Does this layer hold experts? */
static int llmi_layer_is_moe(const llmi_config *c, int32_t layer)
{
    if (!c->experts || layer < c->dense_first) return 0;
    if (c->experts_said) return llmi_names_layer(c->experts_said, layer);
    return (layer + 1) % c->sparse_step == 0 && !llmi_names_layer(c->dense_layers, layer);
}

/* The two blocks of a layer. */
static void llmi_layer_blocks(const llmi_config *c, int32_t layer, int32_t *mix, int32_t *feed)
{
    /* both blocks, unless the family names one */
    *mix = c->family->flags & LLMI_LATENT ? LLMI_MIX_LATENT : LLMI_MIX_ATTENTION;
    *feed = llmi_layer_is_moe(c, layer) ? LLMI_FEED_EXPERTS : LLMI_FEED_DENSE;
    if (c->blocks) llmi_find_block(c->blocks, layer, mix, feed);
}

/* Sizes of the state-space mixers, where there is one. Steps are kept inside time_step_limit, [least, most] with the most often infinite,
   and above time_step_min, as the reference implementation has it. */
static moq_result llmi_read_state(const llmi_keys *k, llmi_config *c)
{
    const moq_json *limit = llmi_key(k, "time_step_limit"), *least = moq_json_at(limit, 0), *most = moq_json_at(limit, 1);
    const moq_json *act = llmi_key(k, "mamba_hidden_act");
    int32_t mix = 0, feed = 0, any = 0;
    double shortest;
    moq_result code;
    for (int32_t i = 0; i < c->layers; i++) {
        llmi_layer_blocks(c, i, &mix, &feed);
        any |= mix == LLMI_MIX_STATE;
        if (feed == LLMI_FEED_EXPERTS && !c->experts) return llmi_bad_key(k, MOQ_E_CONFIG, c->moe->count_key, NULL, "the number of experts");
    }
    if (!any) return MOQ_OK;
    if ((code = llmi_key_size(k, "mamba_num_heads", 65536, LLMI_REQUIRED, &c->ssm_heads)) < 0) return code;
    if ((code = llmi_key_size(k, "mamba_head_dim", 65536, LLMI_REQUIRED, &c->ssm_head_dim)) < 0) return code;
    if ((code = llmi_key_size(k, "ssm_state_size", 65536, LLMI_REQUIRED, &c->ssm_state)) < 0) return code;
    if ((code = llmi_key_size(k, "n_groups", c->ssm_heads, LLMI_REQUIRED, &c->ssm_groups)) < 0) return code;
    if ((code = llmi_key_size(k, "conv_kernel", 1024, 4, &c->ssm_conv)) < 0) return code;
    if (c->ssm_heads % c->ssm_groups)
        return LLMI_REFUSE_KEY(k, MOQ_E_CONFIG, "n_groups", "%d does not divide mamba_num_heads %d; one of the two is wrong", c->ssm_groups, c->ssm_heads);
    if ((int64_t)c->ssm_heads * c->ssm_head_dim * 2 + 2 * (int64_t)c->ssm_groups * c->ssm_state > LLMI_MAX_WIDTH)
        return llmi_bad_key(k, MOQ_E_CONFIG, "mamba_num_heads", llmi_key(k, "mamba_num_heads"), "mamba_num_heads * mamba_head_dim of a possible size");
    if (act && !moq_json_is(act, "silu") && !moq_json_is(act, "swish")) return llmi_bad_key(k, MOQ_E_UNSUPPORTED, "mamba_hidden_act", act, "silu");
    if (least && (!moq_json_float(least, &c->dt_min) || !llmi_finite(c->dt_min))) return llmi_bad_key(k, MOQ_E_CONFIG, "time_step_limit", least, "a finite number");
    if (most && !moq_json_float(most, &c->dt_max)) return llmi_bad_key(k, MOQ_E_CONFIG, "time_step_limit", most, "a number");
    if (!llmi_finite(c->dt_max)) c->dt_max = 0;
    if ((code = llmi_positive(k, "time_step_min", llmi_key(k, "time_step_min"), 0.001, &shortest)) < 0) return code;
    if (c->dt_min < shortest) c->dt_min = shortest;
    return MOQ_OK;
}

/* One id that ends a turn, each once. */
static moq_result llmi_add_end(const llmi_keys *k, llmi_config *c, const char *key, const moq_json *v, int strict)
{
    int64_t id;
    if (!moq_json_int(v, &id) || id < 0 || id >= c->vocab) return strict ? llmi_bad_key(k, MOQ_E_CONFIG, key, v, "an id below vocab_size") : MOQ_OK;
    for (int32_t i = 0; i < c->end_count; i++)
        if (c->ends[i] == id) return MOQ_OK;
    if (c->end_count < LLMI_MAX_ENDS) c->ends[c->end_count++] = (int32_t)id;
    return MOQ_OK;
}

/* eos_token_id: one id, a list of ids, or null. strict: ids out of range are an error. */
static moq_result llmi_read_ends(const llmi_keys *k, llmi_config *c, const moq_json *v, int strict)
{
    moq_result code = MOQ_OK;
    if (!v || v->type == MOQ_JSON_NULL) return MOQ_OK;
    if (v->type != MOQ_JSON_ARRAY) return llmi_add_end(k, c, "eos_token_id", v, strict);
    for (const moq_json *e = moq_json_first(v); e && code >= 0; e = moq_json_next(v, e)) code = llmi_add_end(k, c, "eos_token_id", e, strict);
    return code;
}

/* Models that make vectors of texts have the architecture of one that speaks, and say here that a token also sees the later ones: true, false, 1 or 0.
   Other values, as "vision", are not about text. */
static moq_result llmi_check_causal(const llmi_keys *k)
{
    static const char *const keys[] = {"use_bidirectional_attention", "is_causal"};
    for (int i = 0; i < 2; i++) {
        const moq_json *v = moq_json_find(k->text, keys[i]);
        int64_t n;
        int on = moq_json_int(v, &n) && (n == 0 || n == 1) ? (int)n : i;
        moq_json_bool(v, &on);
        if (on != i)
            return LLMI_REFUSE_KEY(k, MOQ_E_UNSUPPORTED, keys[i], "%s: every token sees the whole text, as in models that make embeddings; this engine runs "
                                   "models that write text, in which a token sees those before it", on ? "true" : "false");
    }
    return MOQ_OK;
}

/* The tokenizer puts BOS in front; here it is only checked. */
static moq_result llmi_read_bos(const llmi_keys *k, const llmi_config *c)
{
    int64_t id;
    const moq_json *v = llmi_key(k, "bos_token_id");
    if (!v || v->type == MOQ_JSON_ARRAY || (moq_json_int(v, &id) && id >= 0 && id < c->vocab)) return MOQ_OK;
    return llmi_bad_key(k, MOQ_E_CONFIG, "bos_token_id", v, "an id below vocab_size");
}

/* Norm epsilon, positions, ties, ends. */
static moq_result llmi_read_rest(const llmi_keys *k, llmi_config *c)
{
    moq_result code;
    if ((code = llmi_positive(k, c->family->eps_key, llmi_key(k, c->family->eps_key), c->family->eps, &c->eps)) < 0) return code;
    c->part_eps = c->family->flags & LLMI_LATENT ? 1e-6 : c->eps; /* the reference implementations of DeepSeek say nothing to these norms */
    c->tie_said = llmi_key(k, "tie_word_embeddings") != NULL;
    if ((code = llmi_key_bool(k, "tie_word_embeddings", (c->family->flags & LLMI_TIED) != 0, &c->tied)) < 0) return code;
    if ((code = llmi_read_bos(k, c)) < 0 || (code = llmi_check_causal(k)) < 0) return code;
    return llmi_read_ends(k, c, llmi_key(k, "eos_token_id"), 1);
}

/* generation_config.json may name more ends of a turn; nothing else in it matters here. */
static moq_result llmi_read_generation(const moq_checkpoint *ck, llmi_config *c, moq_error *err)
{
    moq_error local;
    llmi_keys k;
    moq_json_doc *doc = moq_read_json(ck, "generation_config.json", MOQ_JSON_CONFIG, &local);
    if (!doc && local.code == MOQ_E_NOTFOUND) return MOQ_OK;
    if (!doc) {
        if (err) *err = local;
        return local.code;
    }
    k.text = k.root = moq_json_root(doc);
    k.defaults = NULL;
    k.asked = NULL;
    k.err = err;
    llmi_read_ends(&k, c, moq_json_find(k.root, "eos_token_id"), 0);
    moq_json_destroy(doc);
    return MOQ_OK;
}

/* DeepSeek sharpens the scores of a stretched context here: 1 / sqrt(head_dim) times the square of YaRN's scale for mscale_all_dim. */
static void llmi_scale_latent(llmi_config *c)
{
    double m;
    if (!(c->family->flags & LLMI_LATENT) || c->rope.adjust != llmi_rope_yarn || c->rope.mscale_all <= 0) return;
    m = llmi_yarn_mscale(c->rope.factor, c->rope.mscale_all);
    c->attn_scale = m * m / sqrt((double)c->head_dim);
}

/* The whole description. `context`: as asked for, 0: what the file says, at most 4096. The result points into the checkpoint. */
static moq_result llmi_config_read(const moq_checkpoint *ck, int32_t context, llmi_config *c, moq_error *err)
{
    llmi_keys k;
    moq_result code;
    memset(c, 0, sizeof *c);
    k.root = moq_get_config(ck);
    k.text = moq_json_find(k.root, "text_config");
    if (!k.text || k.text->type != MOQ_JSON_OBJECT) k.text = k.root;
    k.defaults = NULL;
    k.asked = &c->asked;
    k.err = err;
    if (k.root->count == 0)
        return moq_fail(err, MOQ_E_NOTFOUND, "config.json", "says nothing; the engine needs it to know the architecture of '%q'", moq_get_name(ck));
    c->keys = k.text;
    c->root = k.root;
    if ((code = llmi_read_family(&k, c)) < 0) return code;
    c->moe = c->family->moe;
    k.defaults = c->family->defaults;
    if ((code = llmi_read_sizes(&k, c)) < 0) return code;
    if ((code = llmi_key_int(&k, "max_position_embeddings", 1, INT64_MAX, 4096, &c->max_positions)) < 0) return code;
    c->context = context > 0 ? context : c->max_positions < 4096 ? (int32_t)c->max_positions : 4096;
    if ((code = llmi_read_activation(&k, c)) < 0 || (code = llmi_read_window(&k, c)) < 0 || (code = llmi_read_moe(&k, c)) < 0) return code;
    if ((code = llmi_read_turns(&k, c)) < 0) return code;
    if ((code = llmi_read_state(&k, c)) < 0) return code;
    if ((code = llmi_read_rope(&k, c)) < 0) return code;
    /* Llama 4 is published as it was trained: pairs are neighbours */
    if (c->family->flags & LLMI_LLAMA4) c->interleaved = 1;
    llmi_scale_latent(c);
    if ((code = llmi_read_rest(&k, c)) < 0) return code;
    return llmi_read_generation(ck, c, err);
}

/* ---- misspelled keys ---- */

/* Keys that configurations do have and that look like others: of other families, or of this one where it does not ask for them. Token ids
   of many kinds differ in one letter. */
static int llmi_is_a_key(const char *key)
{
    static const char *const keys[] = {
        "n_group", "n_groups", "o_groups", "k_groups", "q_groups", "v_groups", "qk_nope_head_dim", "qk_rope_head_dim", "hidden_sizes", "layer_type",
        "mamba_headdim", "o_lora_rank", "partial_rotary_factors", "router_scaling_factor", "sliding_windows", "swiglu_limits", "sliding_window_pattern",
        "_sliding_window_pattern"};
    size_t n = strlen(key);
    for (size_t i = 0; i < LLMI_COUNT(keys); i++)
        if (strcmp(key, keys[i]) == 0) return 1;
    return n > 9 && strcmp(key + n - 9, "_token_id") == 0;
}

/* The first key of `object` that is a slip of `name`, and of nothing else that is read; NULL: none. */
static const char *llmi_find_slip(const llmi_names_asked *asked, const moq_json *object, const char *name)
{
    for (const moq_json *e = moq_json_first(object); e; e = moq_json_next(object, e))
        if (e->key && moq_is_slip(e->key, name) && !llmi_is_a_key(e->key) && !llmi_was_asked(asked, e->key)) return e->key;
    return NULL;
}

/* Rope descriptions are read with their own names. */
static const llmi_names_asked llmi_rope_names = {
    {"rope_theta", "rope_type", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor",
     "original_max_position_embeddings", "mscale", "mscale_all_dim", "short_factor", "long_factor", "full_attention", "sliding_attention"}, 16};

/* ------------------------------------------------------------------------------------------------
   >>llm-model       weights of a family, prepared on a backend
   Asks the checkpoint for every module by name, checks its shape against config.json, and hands it to the backend once.
   ------------------------------------------------------------------------------------------------ */

/* Names that are looked for, under the prefix that llmi_find_prefix found ("model." mostly), as the family's llmi_names say:

       embed  norm  lm_head (without the prefix)
       layers.N.  mix_norm  feed_norm, and where the family has them mix_post  feed_post
       layers.N.  mix.{q,k,v}_proj or mix.qkv_proj, mix.o_proj, mix.{q,k}_norm, mix.sinks
                  latent: mix.{q_a,q_b,kv_b}_proj, mix.kv_a_proj_with_mqa, mix.{q,kv}_a_layernorm
                  state-space: mix.{in,out}_proj, mix.conv1d, mix.{A_log,D,dt_bias}, mix.norm
       layers.N.  feed.{gate,up}_proj or feed.gate_up_proj, feed.down_proj
       layers.N.  the router and the experts as the family's llmi_moe_names say

   Biases, scales, rotations and low-rank branches come with each moq_linear: this section never sees a scheme. Projections of
   one input are prepared as one weight, so that the input is rounded once and one launch does the work of three. */

/* How a layer turns q and k: by config's rope, by its local rope, not at all. Tables of LLMI_TURN_NONE scale q instead. */
enum { LLMI_TURN_ROPE = 0, LLMI_TURN_LOCAL, LLMI_TURN_NONE, LLMI_TURNS };

/* One decoder layer, all in the backend's memory; what its blocks do not have is NULL. */
typedef struct llmi_layer {
    int32_t mix, feed;                 /* LLMI_MIX_..., LLMI_FEED_... */
    const float *mix_norm, *feed_norm; /* [hidden] */
    const float *mix_post, *feed_post; /* [hidden], of what the block computed */
    const float *q_norm, *k_norm;      /* [head_dim] of each head; latent: [q_rank], [kv_rank] */
    const float *sinks;                /* [heads] */
    moq_weight *in, *out;              /* attention: [q | k | v] rows from hidden; latent: [q or its middle | kv middle | rope part of k];
                                          state-space: [z | x | B | C | dt]. out: back to hidden */
    moq_weight *q_b, *kv_b;            /* latent: from the middles to the heads */
    moq_latent *latent;                /* instead of kv_b, where attention runs over the middles */
    int32_t absorbed;                  /* it does; also when planning, which makes no `latent` */
    moq_weight *gate_up, *down;        /* dense: [gate | up] rows, or up alone; beside experts: the shared ones */
    moq_weight *router;
    moq_weight *narrow, *widen;        /* around experts that read fewer values than hidden */
    moq_experts *experts;
    moq_kv_cache *kv;
    moq_ssm *ssm;
    int32_t window, chunk;             /* what attention sees, 0: everything */
    int32_t turn;                      /* LLMI_TURN_... */
} llmi_layer;

/* A block of backend memory, for closing. */
typedef struct llmi_held {
    struct llmi_held *next;
    void *data;
} llmi_held;

/* What goes through the decoder at once, and how far it has come; see >>llm-forward. */
typedef struct llmi_pass {
    int32_t rows, wanted;   /* the last `wanted` rows want logits */
    int32_t max_pos;
    int32_t next;           /* the layer that runs next; before the first: LLMI_PASS_EMBED; after the last: the output layer */
    int32_t head;           /* wanted rows whose logits are there */
    int32_t cut;            /* of the next block of wanted rows: logits [0, cut) are there */
    int32_t computed;       /* logits of the one wanted row are on the backend already */
    const void *add;        /* [rows, hidden] what the last block computed and the stream has not yet got, or NULL */
    int32_t sends;          /* logits go to memory that the device writes, see moq_backend.send_act */
    int32_t picks;          /* they stay where they are: the device chooses the largest one of each row */
} llmi_pass;

/* A kind of weight and what it takes, so that planning prepares one of each kind only. */
typedef struct llmi_kind {
    struct llmi_kind *next;
    uint64_t key, bytes;
} llmi_kind;

/* A model on a backend: weights, KV cache of all slots, and the activations of one chunk. Nothing is allocated after opening. */
typedef struct llmi_model {
    const moq_checkpoint *ck;
    moq_backend *be;
    /* log and progress; its strings only while opening */
    const llm_desc *desc;
    /* host memory, and the list of backend memory to release */
    llmi_arena arena;
    llmi_held *held;
    llmi_config c;
    /* where the decoder's tensors are: "model.", the table of words there, and the module of the head */
    const char *prefix, *embed_name, *head_name;

    llmi_layer *layers;
    /* tables of vocab rows; head may be embed */
    moq_weight *embed, *head;
    /* [hidden] */
    const float *final_norm;
    /* rope and local rope: [dims / 2] radians per position; scales multiply cos and sin */
    const float *inv_freq[2];
    float rope_scale[2];
    /* a layer keeps a running state: sequences only go forward */
    int stateful;
    /* layers are opened and closed by whoever runs them */
    int one_by_one;
    /* this is part `rank` of `ranks`: sizes in `c` are those of the part; the first sum that failed */
    int32_t rank, ranks;
    moq_error unsummed;
    /* of the last layer, for llm_info; moq_kv_desc.bf16 */
    moq_kv_format kv;
    int32_t kv_bf16;
    /* bytes on the backend beyond the checkpoint's; of these weights, and caches and states */
    uint64_t memory, weight_memory, cache_memory;
    /* what the products of one generated token read, and how many there are; the output layer's scheme */
    uint64_t token_bytes, token_products;
    char head_scheme[32];
    /* planning: weights are released as soon as their bytes are known, what is large is only counted, in `planned` */
    int dry;
    int copied; /* llm_desc.weights says so, and the backend can */
    uint64_t planned;
    llmi_kind *kinds;

    /* sequences in the cache; tokens of a pass; rows of logits computed at once; logits of a row that are worth a call of their own */
    int32_t slots, chunk, head_rows, head_cut;
    /* [slots] tokens that each sequence holds */
    int32_t *length;
    /* [3, chunk] ids, positions, slots before they are uploaded */
    int32_t *host;
    /* [chunk] where the logits of each row go, or NULL */
    float **out;
    llmi_pass pass;
    /* bytes of one activation */
    size_t elem;
    /* [chunk, hidden] the residual stream, its norm, what a block adds to it */
    void *x, *h, *d;
    /* [chunk, rows of layer.in], [chunk, cols of layer.out] */
    void *in, *att;
    /* latent: [chunk, largest middle], [chunk, heads * head_dim] twice, [chunk, heads * (nope + value)], [chunk, heads * value];
       over the middles: k [chunk, heads * (rank + rope)] is what q becomes, kv_b [chunk, heads * rank] what is attended, v [chunk, rank + rope] */
    void *middle, *q, *k, *kv_b, *v;
    /* 1: a layer whose attention runs over the middles; 2: one with wide keys and values */
    int latent_ways;
    /* 1: some layer is quantized, so that its inputs may be rounded */
    int rounds;
    /* [chunk, 2 * inter], [chunk, inter], [chunk, hidden] of the shared experts */
    void *gate_up, *mid, *shared;
    /* [chunk, moe_hidden] what narrow experts read and write */
    void *expert_in, *expert_out;
    /* [chunk, experts], [head_rows, vocab] */
    void *route, *logits;
    /* ranks: logits that this one computes, 0: all; [head_rows, head_part] these, and behind them a row of zeros */
    int32_t head_part;
    void *part;
    /* of rope and local rope: [chunk, dims / 2, 2] cos, sin; of layers without: [chunk, head_dim / 2, 2] factor, 0, or NULL */
    float *table[LLMI_TURNS];
    /* [chunk, head_dim] the last of them before it is uploaded */
    float *temper;
    /* [chunk] ids, positions and slots where the backend reads them */
    int32_t *ids, *pos, *slot;
    /* [chunk] the choices of a pass that picks, there and on the host */
    int32_t *best, *picked;
    /* a recorded pass of one row that wants logits, NULL: none; it serves positions up to step_most; passes like it so far; 1: not to be had */
    moq_graph *step;
    int32_t step_most, steps;
    int no_step;
} llmi_model;

/* ---- names ---- */

/* Names are built from our own words and small numbers, so they fit; a longer one would be cut and then not found. */
static void llmi_name_add(char *out, const char *s)
{
    size_t n = strlen(out), m = strlen(s);
    if (m > LLMI_NAME_BYTES - 1 - n) m = LLMI_NAME_BYTES - 1 - n;
    memcpy(out + n, s, m);
    out[n + m] = 0;
}

/* v >= 0 in decimal. */
static void llmi_name_number(char *out, int32_t v)
{
    char digits[12];
    int i = 11;
    digits[i] = 0;
    do { digits[--i] = (char)('0' + v % 10); v /= 10; } while (v);
    llmi_name_add(out, digits + i);
}

/* "self_attn", "q_proj" -> "self_attn.q_proj" */
static const char *llmi_join(char out[LLMI_NAME_BYTES], const char *block, const char *tail)
{
    out[0] = 0;
    llmi_name_add(out, block);
    llmi_name_add(out, ".");
    llmi_name_add(out, tail);
    return out;
}

/* "model.layers.3.mlp.down_proj"; layer < 0: "model.norm". */
static const char *llmi_name(const llmi_model *m, char out[LLMI_NAME_BYTES], int32_t layer, const char *tail)
{
    out[0] = 0;
    llmi_name_add(out, m->prefix);
    if (layer >= 0) {
        llmi_name_add(out, "layers.");
        llmi_name_number(out, layer);
        llmi_name_add(out, ".");
    }
    llmi_name_add(out, tail);
    return out;
}

/* Where a text model lies inside a folder that may hold more than that (an image encoder beside it). The head has no prefix of
   the decoder. When nothing fits, the usual place stays, and the error names what is missing there. */
static void llmi_find_prefix(llmi_model *m)
{
    static const char *const places[][2] = {{"model.", "lm_head"}, {"language_model.model.", "language_model.lm_head"},
                                            {"model.language_model.", "lm_head"}, {"backbone.", "lm_head"}, {"", "lm_head"}};
    const llmi_names *n = m->c.family->names;
    char name[LLMI_NAME_BYTES];
    for (size_t i = 0; i < LLMI_COUNT(places); i++)
        for (int alias = 0; alias < (n->embed_alias ? 2 : 1); alias++) {
            m->prefix = places[i][0];
            m->head_name = places[i][1];
            m->embed_name = alias ? n->embed_alias : n->embed;
            if (moq_has_linear(m->ck, llmi_name(m, name, -1, m->embed_name))) return;
        }
    m->prefix = places[0][0];
    m->head_name = places[0][1];
    m->embed_name = n->embed;
}

/* Mixtral's experts may stand under another name. */
static void llmi_find_mixture(llmi_model *m)
{
    char name[LLMI_NAME_BYTES];
    if (m->c.moe == &llmi_moe_mixtral && moq_has_linear(m->ck, llmi_name(m, name, 0, llmi_moe_mixtral_held.router))) m->c.moe = &llmi_moe_mixtral_held;
}

/* A finding: worth knowing, no error. */
static void llmi_tell(const llmi_model *m, const moq_error *finding)
{
    if (m->desc->log) m->desc->log(m->desc->log_user, MOQ_LOG_WARNING, finding->code, finding->text);
}

/* Of a name that neither object has, what may be meant for it. */
static void llmi_tell_slip(const llmi_model *m, const llmi_names_asked *asked, const char *name, const moq_json *object, const moq_json *other)
{
    moq_error finding;
    const char *key = moq_json_find(object, name) || moq_json_find(other, name) ? NULL : llmi_find_slip(asked, object, name);
    if (!key) return;
    moq_fail(&finding, MOQ_E_CONFIG, key, "nothing reads this key; is %s meant? Without it a default counts", name);
    llmi_in_file("config.json", MOQ_E_CONFIG, &finding);
    llmi_tell(m, &finding);
}

/* Keys that are left out mean something too, so a misspelled one goes unnoticed; what else is not read is no business of ours. */
static void llmi_tell_slips(const llmi_model *m)
{
    static const char *const ropes[] = {"rope_parameters", "rope_scaling"};
    const moq_json *keys = m->c.keys, *root = m->c.root;
    if (!m->desc->log || !keys) return;
    for (int32_t i = 0; i < m->c.asked.count; i++) {
        llmi_tell_slip(m, &m->c.asked, m->c.asked.name[i], keys, root);
        if (root != keys) llmi_tell_slip(m, &m->c.asked, m->c.asked.name[i], root, keys);
    }
    for (int32_t i = 0; i < llmi_rope_names.count; i++)
        for (size_t k = 0; k < LLMI_COUNT(ropes); k++)
            llmi_tell_slip(m, &llmi_rope_names, llmi_rope_names.name[i], moq_json_find(keys, ropes[k]), NULL);
}

/* ---- backend memory ---- */

/* Zeroed memory for count * size bytes, released by llmi_model_close; NULL and an error when there is none. */
static void *llmi_alloc(llmi_model *m, uint64_t count, size_t size, moq_error *err)
{
    llmi_held *held = (llmi_held *)llmi_take(&m->arena, 1, sizeof *held);
    if (!held || count > SIZE_MAX / 2 / size) {
        llmi_nomem(err, "activations");
        return NULL;
    }
    held->data = m->be->alloc(m->be, (size_t)count * size, err);
    if (!held->data) return NULL;
    held->next = m->held;
    m->held = held;
    m->memory += count * size;
    return held->data;
}

/* What decides how many bytes a backend makes of these layers. */
static uint64_t llmi_kind_of(const moq_linear *w, int32_t count)
{
    uint64_t h = (uint64_t)count;
    for (int32_t i = 0; i < count; i++) {
        const moq_linear *l = &w[i];
        const int64_t shape[] = {l->rows, l->cols, l->row_step, l->codes.dtype, l->packing.bits, l->packing.along_rows, l->packing.awq_order,
                                 (int64_t)l->bias.count, (int64_t)l->pre_quant_scale.count, (int64_t)l->lora_a.count, (int64_t)l->zeros.count,
                                 (int64_t)l->group_index.count, l->hadamard_size, l->scheme.weight.elem, l->scheme.weight.group_rows,
                                 l->scheme.weight.group_cols, l->scheme.weight.scale, l->scheme.weight.has_global, l->scheme.input.elem,
                                 l->scheme.input.group_cols, l->scheme.input.dynamic, l->scheme.requantize_fp8, l->requant_scale > 0, l->input_scale > 0};
        h = llmi_fold(h ^ llmi_hash((const char *)shape, sizeof shape), 0x9e3779b97f4a7c15u);
    }
    return h;
}

/* Planning: was this kind prepared before? Then its bytes count again. */
static int llmi_known_kind(llmi_model *m, uint64_t key)
{
    const llmi_kind *k = m->dry ? m->kinds : NULL;
    while (k && k->key != key) k = k->next;
    if (!k) return 0;
    m->weight_memory += k->bytes;
    m->planned += k->bytes;
    return 1;
}

/* Counts what a prepared weight takes beyond the checkpoint's own bytes, and remembers it when planning. */
static moq_result llmi_count_weight(llmi_model *m, uint64_t key, uint64_t bytes, moq_error *err)
{
    llmi_kind *k;
    m->memory += bytes;
    m->weight_memory += bytes;
    if (!m->dry) return MOQ_OK;
    k = (llmi_kind *)llmi_take(&m->arena, 1, sizeof *k);
    if (!k) return llmi_nomem(err, "plan");
    m->planned += bytes;
    k->key = key;
    k->bytes = bytes;
    k->next = m->kinds;
    m->kinds = k;
    return MOQ_OK;
}

/* Bytes that a product with this layer reads: codes, scales, zero points and the low-rank branch. */
static uint64_t llmi_product_bytes(const moq_linear *w)
{
    const moq_coding *c = &w->scheme.weight;
    uint64_t rows = (uint64_t)w->rows, cols = (uint64_t)w->cols, groups = 0;
    uint64_t down = c->group_rows > 0 ? (rows + (uint64_t)c->group_rows - 1) / (uint64_t)c->group_rows : 1;
    uint64_t across = c->group_cols > 0 ? (cols + (uint64_t)c->group_cols - 1) / (uint64_t)c->group_cols : 1;
    if (w->scales.data) groups = down * across;
    return rows * cols * w->packing.bits / 8 + groups * (uint64_t)moq_dtype_bits(w->scales.dtype) / 8 +
           (w->zeros.data ? groups * w->zero_packing.bits / 8 : 0) +
           (w->lora_a.data ? (rows + cols) * w->scheme.lora_rank * (uint64_t)moq_dtype_bits(w->lora_a.dtype) / 8 : 0);
}

/* Adds the layers of a weight to what one token reads; of experts `share` of `of` are chosen. */
static void llmi_count_token(llmi_model *m, const moq_linear *w, int32_t count, int32_t share, int32_t of)
{
    uint64_t bytes = 0, products = 0;
    for (int32_t i = 0; i < count; i++) {
        bytes += llmi_product_bytes(&w[i]);
        products += (uint64_t)w[i].rows * (uint64_t)w[i].cols;
    }
    m->token_bytes += bytes / (uint64_t)of * (uint64_t)share;
    m->token_products += products / (uint64_t)of * (uint64_t)share;
}

/* A weight that products read, in memory of its own if llm_desc.weights says so. */
static moq_result llmi_copy_weight(llmi_model *m, const moq_linear *w, int32_t parts, moq_weight *weight, moq_error *err)
{
    uint64_t bytes;
    if (!m->copied) return MOQ_OK;
    bytes = m->be->copy_bytes(m->be, w, parts);
    m->memory += bytes;
    m->weight_memory += bytes;
    if (m->dry) m->planned += bytes;
    return m->dry ? MOQ_OK : m->be->copy_weight(m->be, weight, err);
}

/* Attention may round where layers of this model do; another model on the same backend is no reason. */
static void llmi_note_rounds(llmi_model *m, const moq_linear *w, int32_t count)
{
    for (int32_t i = 0; i < count; i++) m->rounds |= w[i].scheme.weight.scale != MOQ_NONE;
}

/* `parts` layers of one input, prepared as one. Planning leaves *out NULL. */
static moq_result llmi_make_weight(llmi_model *m, const moq_linear *w, int32_t parts, moq_weight **out, moq_error *err)
{
    uint64_t key = m->dry ? llmi_kind_of(w, parts) : 0;
    moq_result code;
    llmi_count_token(m, w, parts, 1, 1);
    llmi_note_rounds(m, w, parts);
    if (llmi_known_kind(m, key)) return MOQ_OK;
    *out = m->be->prepare_linear(m->be, w, parts, err);
    if (!*out) return err->code != MOQ_OK ? err->code : moq_fail(err, MOQ_E_BACKEND, "backend", "the call failed without a reason");
    code = llmi_count_weight(m, key, m->be->weight_bytes(m->be, *out), err);
    if (!m->dry) return code;
    m->be->release_weight(m->be, *out);
    *out = NULL;
    return code;
}

/* The same for products. */
static moq_result llmi_prepare_weight(llmi_model *m, const moq_linear *w, int32_t parts, moq_weight **out, moq_error *err)
{
    moq_result code = llmi_make_weight(m, w, parts, out, err);
    return code < 0 ? code : llmi_copy_weight(m, w, parts, *out, err);
}

/* The code of a failed backend call. Public entries pass an error of their own, cleared: it is never NULL here. */
static moq_result llmi_code(moq_error *err, moq_result otherwise)
{
    return err->code != MOQ_OK ? err->code : moq_fail(err, otherwise, "backend", "the call failed without a reason");
}

/* ---- tensors ---- */

/* What a layer must look like: rows and cols, and the keys of config.json that say so. cut: the folder's layer has as many times the rows or
   the columns as there are ranks. */
typedef struct llmi_shape {
    int64_t rows, cols;
    const char *rows_key, *cols_key;
    int cut;
} llmi_shape;

enum { LLMI_CUT_NONE = 0, LLMI_CUT_ROWS, LLMI_CUT_COLS };

static llmi_shape llmi_shape_of(int64_t rows, const char *rows_key, int64_t cols, const char *cols_key)
{
    llmi_shape s;
    s.rows = rows;
    s.cols = cols;
    s.rows_key = rows_key;
    s.cols_key = cols_key;
    s.cut = LLMI_CUT_NONE;
    return s;
}

/* The same for a layer that is divided among the ranks. */
static llmi_shape llmi_cut_shape(int cut, int64_t rows, const char *rows_key, int64_t cols, const char *cols_key)
{
    llmi_shape s = llmi_shape_of(rows, rows_key, cols, cols_key);
    s.cut = cut;
    return s;
}

/* The first tensor that is not there ends the search, so a folder of 31 of 32 layers names layer 31. */
static moq_result llmi_absent(const llmi_model *m, const char *tensor, moq_error *err)
{
    int untied = m->c.tie_said && !m->c.tied && strncmp(tensor, m->head_name, strlen(m->head_name)) == 0;
    return moq_fail(err, MOQ_E_MISSING, tensor,
                    "the tensor is absent, but config.json describes a '%s' of %d layers%s; the folder is incomplete, download it again%s",
                    m->c.family->model_type, m->c.layers, untied ? " and says tie_word_embeddings false" : "",
                    untied ? " (or write true, if the embedding is the output layer)" : "");
}

/* The same for the weight of a module. */
static moq_result llmi_missing(const llmi_model *m, const char *module, moq_error *err)
{
    char name[LLMI_NAME_BYTES] = "";
    llmi_name_add(name, module);
    llmi_name_add(name, ".weight");
    return llmi_absent(m, name, err);
}

/* This rank's columns of a layer, `count` of them. What is summed over the ranks gets its bias once. */
static moq_result llmi_cut_cols(const llmi_model *m, moq_linear *w, int64_t count, moq_error *err)
{
    moq_error cut;
    if (m->ranks == 1) return MOQ_OK;
    if (m->rank > 0) memset(&w->bias, 0, sizeof w->bias);
    if (moq_slice_cols(w, m->rank * count, count, w, &cut) >= 0) return MOQ_OK;
    return moq_fail(err, cut.code, "llm_desc.ranks", "take fewer than %d, or open the model whole: %s", m->ranks, cut.text);
}

/* The layer of a module, which must be there and have this shape; of a layer that is divided this rank's part. */
static moq_result llmi_find(const llmi_model *m, const char *name, llmi_shape s, moq_linear *out, moq_error *err)
{
    moq_error local;
    moq_result code = moq_find_linear(m->ck, name, out, &local);
    int64_t part = s.cut == LLMI_CUT_ROWS ? s.rows : s.cols;
    if (s.cut == LLMI_CUT_ROWS) s.rows *= m->ranks;
    if (s.cut == LLMI_CUT_COLS) s.cols *= m->ranks;
    if (code == MOQ_E_NOTFOUND) return llmi_missing(m, name, err);
    if (code < 0) {
        if (err) *err = local;
        return code;
    }
    if (out->rows == s.rows && out->cols == s.cols) {
        if (s.cut == LLMI_CUT_ROWS && m->ranks > 1) return moq_slice_rows(out, m->rank * part, part, 1, out, err);
        return s.cut == LLMI_CUT_COLS ? llmi_cut_cols(m, out, part, err) : MOQ_OK;
    }
    return moq_fail(err, MOQ_E_MISMATCH, out->tensor ? out->tensor : name,
                    "the layer has shape [%lld, %lld], but %s and %s of config.json ask for [%lld, %lld]; take both files from one model", (long long)out->rows,
                    (long long)out->cols, s.rows_key, s.cols_key, (long long)s.rows, (long long)s.cols);
}

/* One prepared layer; block NULL: `tail` is the whole name under the layer. */
static moq_result llmi_prepare(llmi_model *m, int32_t layer, const char *block, const char *tail, llmi_shape s, moq_weight **out, moq_error *err)
{
    char name[LLMI_NAME_BYTES], module[LLMI_NAME_BYTES];
    moq_linear w;
    moq_result code;
    if (block) tail = llmi_join(module, block, tail);
    code = llmi_find(m, llmi_name(m, name, layer, tail), s, &w, err);
    return code < 0 ? code : llmi_prepare_weight(m, &w, 1, out, err);
}

/* The parts of a layer that holds them all, one below the other, each divided among the ranks. */
static moq_result llmi_cut_fused(const llmi_model *m, const moq_linear *all, const llmi_shape *shapes, int32_t parts, moq_linear *out, moq_error *err)
{
    moq_result code = MOQ_OK;
    int64_t first = 0;
    for (int32_t i = 0; i < parts && code >= 0; i++) {
        code = moq_slice_rows(all, first + m->rank * shapes[i].rows, shapes[i].rows, 1, &out[i], err);
        first += m->ranks * shapes[i].rows;
    }
    return code;
}

/* `parts` layers of one input as one; where the folder holds them fused already (`fused` is there), that one. */
static moq_result llmi_prepare_parts(llmi_model *m, int32_t layer, const char *block, const char *fused, const char *const *tails,
                                     const llmi_shape *shapes, int32_t parts, moq_weight **out, moq_error *err)
{
    char name[LLMI_NAME_BYTES], module[LLMI_NAME_BYTES];
    moq_linear w[3];
    moq_result code;
    if (fused && moq_has_linear(m->ck, llmi_name(m, name, layer, llmi_join(module, block, fused)))) {
        llmi_shape all = shapes[0];
        moq_linear whole;
        for (int32_t i = 1; i < parts; i++) all.rows += shapes[i].rows;
        if (m->ranks == 1) return llmi_prepare(m, layer, block, fused, all, out, err);
        all.rows *= m->ranks;
        all.cut = LLMI_CUT_NONE;
        if ((code = llmi_find(m, name, all, &whole, err)) < 0 || (code = llmi_cut_fused(m, &whole, shapes, parts, w, err)) < 0) return code;
        return llmi_prepare_weight(m, w, parts, out, err);
    }
    for (int32_t i = 0; i < parts; i++)
        if ((code = llmi_find(m, llmi_name(m, name, layer, llmi_join(module, block, tails[i])), shapes[i], &w[i], err)) < 0) return code;
    return llmi_prepare_weight(m, w, parts, out, err);
}

/* A tensor of `count` values. */
static moq_result llmi_find_values(const llmi_model *m, int32_t layer, const char *tail, uint64_t count, const moq_tensor **out, moq_error *err)
{
    char name[LLMI_NAME_BYTES];
    uint64_t values = 1;
    const moq_tensor *t = *out = moq_find_tensor(m->ck, llmi_name(m, name, layer, tail));
    float probe;
    if (!t) return llmi_absent(m, name, err);
    for (uint32_t i = 0; i < t->rank; i++) values *= t->shape[i];
    if (values != count)
        return moq_fail(err, MOQ_E_SHAPE, t->name, "%llu values are needed here, found %llu; compare config.json", (unsigned long long)count,
                        (unsigned long long)values);
    if (values && moq_to_f32(t->dtype, t->data, 1, &probe)) return MOQ_OK;
    return moq_fail(err, MOQ_E_DTYPE, t->name, "dtype %s is no number here; expected BF16, F16 or F32", moq_dtype_name(t->dtype));
}

/* A vector [count] as F32 on the backend, `plus` added to each value; ranks > 1: it is divided, and this is a part. */
static moq_result llmi_load_vector(llmi_model *m, int32_t layer, const char *tail, int32_t count, int32_t ranks, float plus, const float **out, moq_error *err)
{
    const moq_tensor *t;
    float *host, *device;
    moq_result code = llmi_find_values(m, layer, tail, (uint64_t)count * (uint64_t)ranks, &t, err);
    if (code < 0) return code;
    device = (float *)llmi_alloc(m, (uint64_t)count, sizeof *device, err);
    if (!device) return llmi_code(err, MOQ_E_NOMEM);
    host = (float *)moq_allocate(&m->arena.a, (size_t)count * sizeof *host);
    if (!host) return llmi_nomem(err, t->name);
    moq_to_f32(t->dtype, (const uint8_t *)t->data + (ranks > 1 ? (size_t)m->rank * (size_t)count * (size_t)moq_dtype_bits(t->dtype) / 8 : 0), (size_t)count, host);
    for (int32_t i = 0; i < count; i++) host[i] += plus;
    m->be->upload(m->be, device, host, (size_t)count * sizeof *host);
    moq_release(&m->arena.a, host, (size_t)count * sizeof *host);
    *out = device;
    return MOQ_OK;
}

/* The weight of a norm module [count]; Gemma stores what is to be added to 1. */
static moq_result llmi_load_norm(llmi_model *m, int32_t layer, const char *module, int32_t count, const float **out, moq_error *err)
{
    char tail[LLMI_NAME_BYTES];
    return llmi_load_vector(m, layer, llmi_join(tail, module, "weight"), count, 1, m->c.family->flags & LLMI_UNIT_NORM ? 1.0f : 0.0f, out, err);
}

/* ---- embedding and head ---- */

/* Tables are often padded to a round number of rows.
   Cut a table of words to vocab_size rows; fewer rows than that are an error. */
static moq_result llmi_cut_vocab(const llmi_model *m, moq_linear *w, moq_error *err)
{
    moq_error finding;
    const char *name = w->tensor ? w->tensor : w->name;
    if (w->cols != m->c.hidden)
        return moq_fail(err, MOQ_E_MISMATCH, name,
                            "the table has %lld columns, hidden_size of config.json is %d; take both files from one model", (long long)w->cols, m->c.hidden);
    if (w->rows == m->c.vocab) return MOQ_OK;
    if (w->rows < m->c.vocab)
        return moq_fail(err, MOQ_E_MISMATCH, name,
                            "the table has %lld rows, vocab_size of config.json is %d; take both files from one model", (long long)w->rows, m->c.vocab);
    moq_fail(&finding, MOQ_E_MISMATCH, name, "the table has %lld rows, vocab_size of config.json is %d; the rest is not used",
             (long long)w->rows, m->c.vocab);
    llmi_tell(m, &finding);
    return moq_slice_rows(w, 0, m->c.vocab, 1, w, err);
}

/* Bit for bit the same table? Then one prepared copy serves as embedding and head. */
static int llmi_same_codes(const moq_linear *a, const moq_linear *b)
{
    size_t bytes = (size_t)(a->codes.count * (uint64_t)moq_dtype_bits(a->codes.dtype) / 8);
    if (a->codes.dtype != b->codes.dtype || a->codes.count != b->codes.count || moq_scheme_is_quantized(&a->scheme)) return 0;
    return a->codes.data == b->codes.data || memcmp(a->codes.data, b->codes.data, bytes) == 0;
}

/* Embedding and head are linear layers like all others, quantized or not. */
static moq_result llmi_prepare_table(llmi_model *m, moq_linear *w, moq_weight **out, moq_error *err)
{
    moq_result code = llmi_cut_vocab(m, w, err);
    return code < 0 ? code : llmi_make_weight(m, w, 1, out, err);
}

/* One row, fetched twice in pieces: scale = amax / largest code; code = nearest. codes: [cols]. 0: a value is not finite. */
static int llmi_encode_row(const moq_linear *w, int64_t row, int fp8, uint8_t *codes, float *scale)
{
    float x[512], amax = 0;
    moq_linear part = *w;
    *scale = 1;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t first = 0; first < w->cols; first += part.cols) {
            part.col_first = w->col_first + first;
            part.cols = w->cols - first < (int64_t)LLMI_COUNT(x) ? w->cols - first : (int64_t)LLMI_COUNT(x);
            moq_dequantize(&part, row, 1, x);
            for (int64_t i = 0; pass == 0 && i < part.cols; i++) {
                float a = fabsf(x[i]);
                if (!(a <= FLT_MAX)) return 0;
                amax = a > amax ? a : amax;
            }
            for (int64_t i = 0; pass == 1 && i < part.cols; i++)
                codes[first + i] = fp8 ? moq_e4m3_encode(x[i] / *scale) : (uint8_t)(int8_t)rintf(x[i] / *scale);
        }
        /* a row of zeros, or of values so small that they have no scale, keeps 1 */
        if (amax / (fp8 ? 448.0f : 127.0f) >= FLT_MIN) *scale = amax / (fp8 ? 448.0f : 127.0f);
    }
    return 1;
}

LLM_API moq_result llm_make_head(const moq_linear *stored, const char *name, uint8_t *codes, float *scales, moq_linear *out, moq_error *err)
{
    if (!stored || !name || !out || (codes && !scales)) return moq_fail(err, MOQ_E_ARG, "llm_make_head", "stored, name and out must be given, and scales with codes");
    int fp8 = strcmp(name, "fp8") == 0;
    const char *tensor = stored->tensor ? stored->tensor : stored->name;
    moq_linear w = *stored;
    if (!fp8 && strcmp(name, "int8") != 0) return moq_fail(err, MOQ_E_ARG, "llm_desc.head", "'%q' is not known; there are stored, int8 and fp8", name);
    if (moq_scheme_is_quantized(&stored->scheme) || stored->experts > 0)
        return moq_fail(err, MOQ_E_UNSUPPORTED, tensor, "the layer is quantized already and stays as it is; leave llm_desc.head out");
    if ((stored->bias.data && (stored->row_first != 0 || stored->row_step > 1)) || (stored->pre_quant_scale.data && stored->col_first != 0))
        return moq_fail(err, MOQ_E_UNSUPPORTED, tensor, "a slice with a bias or a pre_quant_scale cannot be a head; give the whole layer");
    memset(&w.scheme, 0, sizeof w.scheme);
    w.scheme.weight.elem = fp8 ? MOQ_F8_E4M3 : MOQ_I8;
    w.scheme.weight.group_rows = 1;
    w.scheme.weight.group_cols = MOQ_ALL;
    w.scheme.weight.scale = MOQ_F32;
    w.scheme.input.elem = w.scheme.input.scale = MOQ_NONE;
    memset(&w.packing, 0, sizeof w.packing);
    w.packing.bits = w.packing.word_bits = 8;
    w.packing.row_stride = w.cols;
    w.packing.col_stride = 1;
    w.row_first = w.col_first = 0;
    w.row_step = 1;
    w.codes.data = codes;
    w.codes.dtype = w.scheme.weight.elem;
    w.codes.count = (uint64_t)w.rows * (uint64_t)w.cols;
    w.scales.data = scales;
    w.scales.dtype = MOQ_F32;
    w.scales.count = (uint64_t)w.rows;
    w.scale_row_stride = 1;
    w.scale_col_stride = 0;
    for (int64_t r = 0; codes && r < w.rows; r++)
        if (!llmi_encode_row(stored, r, fp8, codes + r * w.cols, &scales[r]))
            return moq_fail(err, MOQ_E_UNSUPPORTED, tensor, "row %lld holds a value that is not finite and has no scale; leave llm_desc.head out", (long long)r);
    *out = w;
    return MOQ_OK;
}

/* The output layer as llm_desc.head wants it, from w [vocab, hidden]. */
static moq_result llmi_narrow_head(llmi_model *m, moq_linear *w, moq_error *err)
{
    const char *name = m->desc->head;
    uint64_t bytes = (uint64_t)w->rows * ((uint64_t)w->cols + sizeof(float));
    moq_error finding;
    float *scales = NULL;
    uint8_t *codes = NULL;
    moq_linear narrow;
    moq_result code;
    if (!name || strcmp(name, "stored") == 0) return MOQ_OK;
    if ((code = llm_make_head(w, name, NULL, NULL, &narrow, &finding)) == MOQ_E_UNSUPPORTED) {
        llmi_tell(m, &finding);
        return MOQ_OK;
    }
    if (code < 0) {
        if (err) *err = finding;
        return code;
    }
    m->memory += bytes;
    m->weight_memory += bytes;
    if (m->dry) {
        /* nothing is computed with it: what is stored is at least as large as codes and scales are */
        m->planned += bytes;
        narrow.codes.data = narrow.scales.data = w->codes.data;
    } else {
        scales = (float *)llmi_take(&m->arena, (size_t)w->rows, sizeof *scales);
        codes = (uint8_t *)llmi_take(&m->arena, (size_t)w->rows * (size_t)w->cols, 1);
        if (!scales || !codes) return llmi_nomem(err, "the quantized output layer");
        if ((code = llm_make_head(w, name, codes, scales, &narrow, err)) < 0) return code;
    }
    *w = narrow;
    return MOQ_OK;
}

/* This rank's share of the output layer, where it can be divided into equal ones of whole groups. */
static moq_result llmi_divide_head(llmi_model *m, moq_linear *w, moq_error *err)
{
    int32_t part = m->c.vocab / m->ranks, group = w->scheme.weight.group_rows;
    if (m->ranks == 1 || !m->be->copy_heads || m->c.vocab % (64 * m->ranks) != 0 || (group > 1 && part % group != 0)) return MOQ_OK;
    m->head_part = part;
    return moq_slice_rows(w, (int64_t)m->rank * part, part, 1, w, err);
}

/* The output layer of its own. */
static moq_result llmi_prepare_output(llmi_model *m, moq_linear *w, moq_error *err)
{
    moq_result code = llmi_cut_vocab(m, w, err);
    if (code < 0 || (code = llmi_divide_head(m, w, err)) < 0 || (code = llmi_narrow_head(m, w, err)) < 0) return code;
    moq_scheme_name(&w->scheme, m->head_scheme, sizeof m->head_scheme);
    return llmi_prepare_weight(m, w, 1, &m->head, err);
}

/* The embedding as output layer: one prepared table serves both, unless the output layer is to be quantized. */
static moq_result llmi_share_head(llmi_model *m, const moq_linear *embed, moq_error *err)
{
    moq_linear head = *embed;
    uint64_t bytes = m->token_bytes, products = m->token_products;
    moq_result code;
    if (m->desc->head && strcmp(m->desc->head, "stored") != 0 && !moq_scheme_is_quantized(&embed->scheme)) return llmi_prepare_output(m, &head, err);
    m->head = m->embed;
    moq_scheme_name(&embed->scheme, m->head_scheme, sizeof m->head_scheme);
    if (head.rows > m->c.vocab && (code = moq_slice_rows(&head, 0, m->c.vocab, 1, &head, err)) < 0) return code;
    if ((code = llmi_copy_weight(m, &head, 1, m->head, err)) < 0) return code;
    llmi_count_token(m, embed, 1, 1, 1);
    /* rows beyond vocab_size are not read */
    m->token_bytes = bytes + (m->token_bytes - bytes) / (uint64_t)embed->rows * (uint64_t)m->c.vocab;
    m->token_products = products + (uint64_t)m->c.vocab * (uint64_t)embed->cols;
    return MOQ_OK;
}

/* The output layer: lm_head where it is there, else the embedding, unless config.json says that they are not tied. */
static moq_result llmi_prepare_head(llmi_model *m, const moq_linear *embed, moq_error *err)
{
    moq_linear head;
    moq_error finding;
    moq_result code;
    int there = moq_has_linear(m->ck, m->head_name);
    /* said to be untied and yet without a head: something was lost */
    if (!there && m->c.tie_said && !m->c.tied) return llmi_missing(m, m->head_name, err);
    if (!there) return llmi_share_head(m, embed, err);
    if ((code = moq_find_linear(m->ck, m->head_name, &head, err)) < 0) return code;
    if (m->c.tied && llmi_same_codes(&head, embed)) return llmi_share_head(m, embed, err);
    if (m->c.tied) {
        moq_fail(&finding, MOQ_E_MISMATCH, head.tensor, "tie_word_embeddings of config.json is true, but this tensor holds other values; it is used");
        llmi_tell(m, &finding);
    }
    return llmi_prepare_output(m, &head, err);
}

/* What comes before the first and after the last layer. */
static moq_result llmi_prepare_ends(llmi_model *m, moq_error *err)
{
    char name[LLMI_NAME_BYTES];
    moq_linear embed, table;
    moq_error local;
    moq_result code = moq_find_linear(m->ck, llmi_name(m, name, -1, m->embed_name), &embed, &local);
    if (code == MOQ_E_NOTFOUND) return llmi_missing(m, name, err);
    if (code < 0) {
        if (err) *err = local;
        return code;
    }
    table = embed;
    if ((code = llmi_prepare_table(m, &table, &m->embed, err)) < 0) return code;
    /* one row of the embedding is looked up: no product */
    m->token_bytes = m->token_products = 0;
    if ((code = llmi_prepare_head(m, &embed, err)) < 0) return code;
    return llmi_load_norm(m, -1, m->c.family->names->norm, m->c.hidden, &m->final_norm, err);
}

/* ------------------------------------------------------------------------------------------------
   >>llm-layers      the blocks of a layer, the KV cache, and the whole model
   A layer asks for its tensors in the order in which it computes; llmi_model_close also closes what a failed open left half done.
   ------------------------------------------------------------------------------------------------ */

/* Attention's projections. q_proj decides whether head_dim of config.json is right. */
static moq_result llmi_prepare_attention(llmi_model *m, int32_t layer, llmi_layer *l, moq_error *err)
{
    static const char *const tails[] = {"q_proj", "k_proj", "v_proj"};
    const llmi_config *c = &m->c;
    const char *mix = c->family->names->mix;
    char tail[LLMI_NAME_BYTES];
    llmi_shape s[3];
    int64_t q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
    moq_result code = MOQ_OK;
    s[0] = llmi_cut_shape(LLMI_CUT_ROWS, q, "num_attention_heads * head_dim", c->hidden, "hidden_size");
    s[1] = s[2] = llmi_cut_shape(LLMI_CUT_ROWS, kv, "num_key_value_heads * head_dim", c->hidden, "hidden_size");
    if ((code = llmi_prepare_parts(m, layer, mix, "qkv_proj", tails, s, 3, &l->in, err)) < 0) return code;
    s[0] = llmi_cut_shape(LLMI_CUT_COLS, c->hidden, "hidden_size", q, "num_attention_heads * head_dim");
    if ((code = llmi_prepare(m, layer, mix, "o_proj", s[0], &l->out, err)) < 0) return code;
    if (c->family->flags & LLMI_SINKS) code = llmi_load_vector(m, layer, llmi_join(tail, mix, "sinks"), c->heads, m->ranks, 0, &l->sinks, err);
    if (code < 0 || !(c->family->flags & LLMI_QK_NORM)) return code;
    if ((code = llmi_load_norm(m, layer, llmi_join(tail, mix, "q_norm"), c->head_dim, &l->q_norm, err)) < 0) return code;
    return llmi_load_norm(m, layer, llmi_join(tail, mix, "k_norm"), c->head_dim, &l->k_norm, err);
}

/* What a layer's cache holds: as the checkpoint says, or as the caller wants it. */
static moq_result llmi_find_cache(const llmi_model *m, int32_t layer, moq_kv *kv, moq_error *err)
{
    char name[LLMI_NAME_BYTES];
    const char *said = m->desc->kv;
    moq_kv_format forced = MOQ_KV_WIDE;
    int as_stored = !said || strcmp(said, "auto") == 0;
    moq_result code;
    if (!as_stored && strcmp(said, "bf16") != 0 && !moq_kv_format_find(said, &forced))
        return moq_fail(err, MOQ_E_ARG, "llm_desc.kv", "'%q' is no KV cache format; give auto, wide, bf16, fp8, fp8_affine, int8, nvfp4, nvfp4_affine, "
                        "nvfp4_rotate or mxfp4", said);
    code = moq_find_kv(m->ck, llmi_name(m, name, layer, m->c.family->names->mix), kv, err);
    if (code < 0) return code;
    /* a forced format keeps the scales that the checkpoint has; wide has none */
    if (!as_stored && forced == MOQ_KV_WIDE) memset(kv, 0, sizeof *kv);
    if (!as_stored) kv->format = forced;
    return MOQ_OK;
}

/* kv_b. Where the backend can, and the cache is not quantized (its scales are those of wide keys and values), it is taken apart: attention
   then runs over the narrow middles, which are all that the cache holds. */
static moq_result llmi_prepare_kv_b(llmi_model *m, int32_t layer, llmi_layer *l, llmi_shape s, moq_error *err)
{
    const llmi_config *c = &m->c;
    moq_backend *be = m->be;
    char name[LLMI_NAME_BYTES], module[LLMI_NAME_BYTES];
    moq_latent_desc d;
    moq_linear w;
    moq_kv kv;
    size_t bytes;
    moq_result code = llmi_find(m, llmi_name(m, name, layer, llmi_join(module, c->family->names->mix, "kv_b_proj")), s, &w, err);
    if (code < 0 || (code = llmi_find_cache(m, layer, &kv, err)) < 0) return code;
    d.name = w.name;
    d.kv_b = &w;
    d.heads = c->heads;
    d.nope = c->nope_dim;
    bytes = be->latent_create && kv.format == MOQ_KV_WIDE ? be->latent_bytes(be, &d) : 0;
    l->absorbed = bytes > 0;
    m->latent_ways |= l->absorbed ? 1 : 2;
    if (!l->absorbed) return llmi_prepare_weight(m, &w, 1, &l->kv_b, err);
    m->memory += bytes;
    m->weight_memory += bytes;
    if (m->dry) m->planned += bytes;
    else if (!(l->latent = be->latent_create(be, &d, err))) return llmi_code(err, MOQ_E_BACKEND);
    return MOQ_OK;
}

/* Latent attention (DeepSeek-V2): in = [q_a | kv_a] where q has a middle too, else [q | kv_a]; kv_a ends with the one rope part
   that all heads share. */
static moq_result llmi_prepare_latent(llmi_model *m, int32_t layer, llmi_layer *l, moq_error *err)
{
    /* the middles of q and of kv read the same stream: one weight, so that the input is rounded once */
    static const char *const tails[2][2] = {{"q_proj", "kv_a_proj_with_mqa"}, {"q_a_proj", "kv_a_proj_with_mqa"}};
    const llmi_config *c = &m->c;
    const char *mix = c->family->names->mix;
    char tail[LLMI_NAME_BYTES];
    llmi_shape s[2];
    int64_t q = (int64_t)c->heads * c->head_dim;
    moq_result code;
    s[0] = llmi_shape_of(c->q_rank ? c->q_rank : q, c->q_rank ? "q_lora_rank" : "num_attention_heads * (nope + rope)", c->hidden, "hidden_size");
    /* the last qk_rope_head_dim rows of kv_a make the one rotated part that all heads share */
    s[1] = llmi_shape_of((int64_t)c->kv_rank + c->rope_dim, "kv_lora_rank + qk_rope_head_dim", c->hidden, "hidden_size");
    if ((code = llmi_prepare_parts(m, layer, mix, NULL, tails[c->q_rank > 0], s, 2, &l->in, err)) < 0) return code;
    if (c->q_rank) {
        s[0] = llmi_shape_of(q, "num_attention_heads * (nope + rope)", c->q_rank, "q_lora_rank");
        if ((code = llmi_load_norm(m, layer, llmi_join(tail, mix, "q_a_layernorm"), c->q_rank, &l->q_norm, err)) < 0) return code;
        if ((code = llmi_prepare(m, layer, mix, "q_b_proj", s[0], &l->q_b, err)) < 0) return code;
    }
    if ((code = llmi_load_norm(m, layer, llmi_join(tail, mix, "kv_a_layernorm"), c->kv_rank, &l->k_norm, err)) < 0) return code;
    /* rows of kv_b: for every head its part of the key without rope, then its value */
    s[0] = llmi_shape_of((int64_t)c->heads * (c->nope_dim + c->value_dim), "num_attention_heads * (nope + v)", c->kv_rank, "kv_lora_rank");
    if ((code = llmi_prepare_kv_b(m, layer, l, s[0], err)) < 0) return code;
    s[0] = llmi_shape_of(c->hidden, "hidden_size", (int64_t)c->heads * c->value_dim, "num_attention_heads * v_head_dim");
    return llmi_prepare(m, layer, mix, "o_proj", s[0], &l->out, err);
}

/* A tensor of the mixer as the backend wants it. */
static moq_result llmi_state_view(const llmi_model *m, int32_t layer, const char *tail, int64_t count, moq_view *out, moq_error *err)
{
    char module[LLMI_NAME_BYTES];
    const moq_tensor *t;
    moq_result code = llmi_find_values(m, layer, llmi_join(module, m->c.family->names->mix, tail), (uint64_t)count, &t, err);
    if (code < 0) return code;
    out->data = t->data;
    out->dtype = t->dtype;
    out->count = (uint64_t)count;
    return MOQ_OK;
}

/* The tensors and sizes of a mixer; a convolution without bias is possible. */
static moq_result llmi_describe_state(const llmi_model *m, int32_t layer, moq_ssm_desc *d, moq_error *err)
{
    const llmi_config *c = &m->c;
    int64_t inner = (int64_t)c->ssm_heads * c->ssm_head_dim, width = inner + 2 * (int64_t)c->ssm_groups * c->ssm_state;
    char name[LLMI_NAME_BYTES], module[LLMI_NAME_BYTES];
    moq_result code;
    memset(d, 0, sizeof *d);
    d->slots = m->slots;
    d->heads = c->ssm_heads;
    d->head_dim = c->ssm_head_dim;
    d->state = c->ssm_state;
    d->groups = c->ssm_groups;
    d->conv = c->ssm_conv;
    d->dt_min = (float)c->dt_min;
    d->dt_max = (float)c->dt_max;
    d->eps = (float)c->eps;
    if ((code = llmi_state_view(m, layer, "conv1d.weight", width * c->ssm_conv, &d->conv_weight, err)) < 0) return code;
    /* use_conv_bias is not asked: the tensor is there or it is not */
    if (moq_find_tensor(m->ck, llmi_name(m, name, layer, llmi_join(module, c->family->names->mix, "conv1d.bias"))) &&
        (code = llmi_state_view(m, layer, "conv1d.bias", width, &d->conv_bias, err)) < 0)
        return code;
    if ((code = llmi_state_view(m, layer, "dt_bias", c->ssm_heads, &d->dt_bias, err)) < 0) return code;
    if ((code = llmi_state_view(m, layer, "A_log", c->ssm_heads, &d->a_log, err)) < 0) return code;
    if ((code = llmi_state_view(m, layer, "D", c->ssm_heads, &d->d, err)) < 0) return code;
    return llmi_state_view(m, layer, "norm.weight", inner, &d->norm, err);
}

/* Counts a cache or a state. 1: planning, and the description is a possible one, so it need not be made. */
static int llmi_plan_cache(llmi_model *m, uint64_t bytes)
{
    m->memory += bytes;
    m->cache_memory += bytes;
    if (m->dry) m->planned += bytes;
    return m->dry && bytes > 0;
}

/* A Mamba-2 mixer: two projections, and between them what the backend does in one call. */
static moq_result llmi_prepare_state(llmi_model *m, int32_t layer, llmi_layer *l, moq_error *err)
{
    const llmi_config *c = &m->c;
    const char *mix = c->family->names->mix;
    char name[LLMI_NAME_BYTES];
    moq_ssm_desc d;
    int64_t inner = (int64_t)c->ssm_heads * c->ssm_head_dim, bc = 2 * (int64_t)c->ssm_groups * c->ssm_state;
    llmi_shape s = llmi_shape_of(2 * inner + bc + c->ssm_heads, "the sizes of the mixer", c->hidden, "hidden_size");
    moq_result code = llmi_prepare(m, layer, mix, "in_proj", s, &l->in, err);
    if (code < 0 || (code = llmi_describe_state(m, layer, &d, err)) < 0) return code;
    llmi_name(m, name, layer, mix);
    d.name = llmi_take_text(&m->arena, name, strlen(name));
    if (!d.name) return llmi_nomem(err, name);
    if (!llmi_plan_cache(m, m->be->ssm_bytes(m->be, &d))) {
        l->ssm = m->be->ssm_create(m->be, &d, err);
        if (!l->ssm) return llmi_code(err, MOQ_E_BACKEND);
    }
    m->stateful = 1;
    return llmi_prepare(m, layer, mix, "out_proj", llmi_shape_of(c->hidden, "hidden_size", inner, "mamba_num_heads * mamba_head_dim"), &l->out, err);
}

/* A dense MLP under `block`: gate and up share their input; an activation without a gate has up alone. */
static moq_result llmi_prepare_mlp(llmi_model *m, int32_t layer, const char *block, int32_t inter, llmi_layer *l, moq_error *err)
{
    static const char *const tails[] = {"gate_proj", "up_proj"};
    const llmi_config *c = &m->c;
    const char *key = inter == c->inter ? "intermediate_size" : "the shared experts' size";
    /* relu2 is the one activation here that multiplies nothing */
    int gated = c->activation.kind != MOQ_RELU2;
    llmi_shape s[2];
    moq_result code;
    s[0] = s[1] = llmi_cut_shape(LLMI_CUT_ROWS, inter, key, c->hidden, "hidden_size");
    code = gated ? llmi_prepare_parts(m, layer, block, "gate_up_proj", tails, s, 2, &l->gate_up, err)
                 : llmi_prepare(m, layer, block, "up_proj", s[0], &l->gate_up, err);
    if (code < 0) return code;
    return llmi_prepare(m, layer, block, "down_proj", llmi_cut_shape(LLMI_CUT_COLS, c->hidden, "hidden_size", inter, key), &l->down, err);
}

/* The three layers of expert `e`, into place e of three lists of `experts` layers. */
static moq_result llmi_find_expert(const llmi_model *m, int32_t layer, int32_t e, moq_linear *list, moq_error *err)
{
    const llmi_config *c = &m->c;
    const llmi_moe_names *n = c->moe;
    const char *const parts[] = {n->gate, n->up, n->down};
    char name[LLMI_NAME_BYTES];
    for (int32_t i = 0; i < 3; i++) {
        llmi_shape s = i < 2 ? llmi_cut_shape(LLMI_CUT_ROWS, c->moe_inter, "the experts' intermediate size", c->moe_hidden, "the experts' hidden size")
                             : llmi_cut_shape(LLMI_CUT_COLS, c->moe_hidden, "the experts' hidden size", c->moe_inter, "the experts' intermediate size");
        moq_result code;
        if (!parts[i]) continue;
        llmi_name(m, name, layer, n->experts);
        llmi_name_add(name, ".");
        llmi_name_number(name, e);
        llmi_name_add(name, ".");
        llmi_name_add(name, parts[i]);
        if ((code = llmi_find(m, name, s, &list[i * c->experts + e], err)) < 0) return code;
    }
    return MOQ_OK;
}

/* The same for all experts of two stacks: gate_up, whose rows are gate, up, gate, up and so on, or all gates and then all ups, and down. */
static moq_result llmi_find_stacks(const llmi_model *m, int32_t layer, moq_linear *list, moq_error *err)
{
    const llmi_config *c = &m->c;
    const llmi_moe_names *n = c->moe;
    char name[LLMI_NAME_BYTES], module[LLMI_NAME_BYTES];
    int64_t all = (int64_t)c->moe_inter * m->ranks; /* of the stored experts */
    llmi_shape up = llmi_shape_of(2 * all, "twice the experts' intermediate size", c->moe_hidden, "the experts' hidden size");
    llmi_shape down = llmi_shape_of(c->moe_hidden, "the experts' hidden size", all, "the experts' intermediate size");
    int64_t step = n->halves ? 1 : 2, first = m->rank * c->moe_inter * step;
    moq_linear stack[2], w;
    moq_result code = llmi_find(m, llmi_name(m, name, layer, llmi_join(module, n->experts, n->stack)), up, &stack[0], err);
    if (code >= 0) code = llmi_find(m, llmi_name(m, name, layer, llmi_join(module, n->experts, n->down)), down, &stack[1], err);
    if (code < 0) return code;
    if (stack[0].experts != c->experts || stack[1].experts != c->experts)
        return moq_fail(err, MOQ_E_MISMATCH, name,
                            "stacks of %d and %d experts, %s of config.json is %d; take both files from one model", stack[0].experts, stack[1].experts,
                        n->count_key, c->experts);
    /* slices are views: nothing is copied, whatever the storage (BF16 [in, out], MXFP4 blocks, NVFP4 [in / 2, out]) */
    for (int32_t e = 0; e < c->experts; e++) {
        if ((code = moq_slice_expert(&stack[0], e, &w, err)) < 0) return code;
        if ((code = moq_slice_rows(&w, first, c->moe_inter, step, &list[e], err)) < 0) return code;
        if ((code = moq_slice_rows(&w, first + (n->halves ? all : 1), c->moe_inter, step, &list[c->experts + e], err)) < 0) return code;
        if ((code = moq_slice_expert(&stack[1], e, &list[2 * (size_t)c->experts + (size_t)e], err)) < 0) return code;
        if ((code = llmi_cut_cols(m, &list[2 * (size_t)c->experts + (size_t)e], c->moe_inter, err)) < 0) return code;
    }
    return MOQ_OK;
}

/* How the router's logits choose. The bias, where there is one, takes part in choosing only. */
static moq_result llmi_describe_routing(const llmi_model *m, int32_t layer, moq_routing *r, moq_error *err)
{
    const llmi_config *c = &m->c;
    const llmi_moe_names *n = c->moe;
    char name[LLMI_NAME_BYTES];
    const moq_tensor *t;
    moq_result code;
    r->experts = c->experts;
    r->top_k = c->top_k;
    r->score = c->score;
    r->renormalize = c->renormalize;
    r->groups = c->groups;
    r->top_groups = c->top_groups;
    r->scale = (float)c->route_scale;
    r->on_input = n->on_input;
    if (!n->bias || !moq_find_tensor(m->ck, llmi_name(m, name, layer, n->bias))) return MOQ_OK;
    if ((code = llmi_find_values(m, layer, n->bias, (uint64_t)c->experts, &t, err)) < 0) return code;
    r->bias.data = t->data;
    r->bias.dtype = t->dtype;
    r->bias.count = (uint64_t)c->experts;
    return MOQ_OK;
}

/* The experts as one weight; list: all their layers. Planning leaves l->experts NULL. */
static moq_result llmi_prepare_mixture(llmi_model *m, const moq_moe *moe, int32_t count, const moq_linear *list, llmi_layer *l, moq_error *err)
{
    uint64_t key = m->dry ? llmi_kind_of(list, count) : 0;
    moq_result code;
    /* an activation without a gate leaves the first third of the list empty */
    llmi_count_token(m, moe->gate ? list : moe->up, moe->gate ? count : count / 3 * 2, moe->routing.top_k, moe->routing.experts);
    llmi_note_rounds(m, list, count);
    if (llmi_known_kind(m, key)) return MOQ_OK;
    l->experts = m->be->prepare_moe(m->be, moe, err);
    if (!l->experts) return llmi_code(err, MOQ_E_BACKEND);
    code = llmi_count_weight(m, key, m->be->moe_bytes ? m->be->moe_bytes(m->be, l->experts) : 0, err);
    if (!m->dry) return code;
    m->be->release_moe(m->be, l->experts);
    l->experts = NULL;
    return code;
}

/* Are the experts of a layer stacked? Families that know both ways are asked for what is there. */
static int llmi_is_stacked(const llmi_model *m, int32_t layer)
{
    const llmi_moe_names *n = m->c.moe;
    char name[LLMI_NAME_BYTES], module[LLMI_NAME_BYTES];
    return n->stack && (!n->gate || moq_has_linear(m->ck, llmi_name(m, name, layer, llmi_join(module, n->experts, n->stack))));
}

/* Router and experts. The lists live only during prepare_moe: the backend keeps what it needs. */
static moq_result llmi_prepare_experts(llmi_model *m, int32_t layer, llmi_layer *l, moq_error *err)
{
    const llmi_config *c = &m->c;
    const llmi_moe_names *n = c->moe;
    char name[LLMI_NAME_BYTES];
    size_t bytes = (size_t)c->experts * 3 * sizeof(moq_linear);
    llmi_shape s = llmi_shape_of(c->experts, n->count_key, c->hidden, "hidden_size");
    int stacked = llmi_is_stacked(m, layer);
    moq_moe moe;
    moq_result code = llmi_prepare(m, layer, NULL, n->router, s, &l->router, err);
    moq_linear *list;
    if (code < 0) return code;
    memset(&moe, 0, sizeof moe);
    if ((code = llmi_describe_routing(m, layer, &moe.routing, err)) < 0) return code;
    list = (moq_linear *)moq_allocate(&m->arena.a, bytes);
    if (!list) return llmi_nomem(err, "experts");
    if (stacked) code = llmi_find_stacks(m, layer, list, err);
    for (int32_t e = 0; e < c->experts && code >= 0 && !stacked; e++) code = llmi_find_expert(m, layer, e, list, err);
    if (code >= 0) {
        llmi_name(m, name, layer, n->experts);
        moe.name = llmi_take_text(&m->arena, name, strlen(name));
        moe.activation = c->activation;
        moe.gate = n->gate || stacked ? list : NULL;
        moe.up = list + c->experts;
        moe.down = list + 2 * (size_t)c->experts;
        code = moe.name ? llmi_prepare_mixture(m, &moe, (int32_t)(bytes / sizeof *list), list, l, err) : llmi_nomem(err, name);
    }
    moq_release(&m->arena.a, list, bytes);
    return code;
}

/* A layer of experts, what narrows and widens around them, and the dense MLP of those that see every token. */
static moq_result llmi_prepare_moe(llmi_model *m, int32_t layer, llmi_layer *l, moq_error *err)
{
    const llmi_config *c = &m->c;
    const llmi_moe_names *n = c->moe;
    llmi_shape in = llmi_shape_of(c->moe_hidden, "moe_latent_size", c->hidden, "hidden_size");
    llmi_shape out = llmi_shape_of(c->hidden, "hidden_size", c->moe_hidden, "moe_latent_size");
    moq_result code = llmi_prepare_experts(m, layer, l, err);
    if (code >= 0 && c->moe_narrow) {
        if ((code = llmi_prepare(m, layer, c->family->names->feed, "fc1_latent_proj", in, &l->narrow, err)) < 0) return code;
        code = llmi_prepare(m, layer, c->family->names->feed, "fc2_latent_proj", out, &l->widen, err);
    }
    return code < 0 || !m->c.shared_inter ? code : llmi_prepare_mlp(m, layer, n->shared, m->c.shared_inter, l, err);
}

/* The entries of the table that only some layers need. */
static moq_result llmi_check_layer(const llmi_model *m, int32_t layer, const llmi_layer *l, moq_error *err)
{
    const moq_backend *be = m->be;
    char name[LLMI_NAME_BYTES];
    const char *lacks = NULL;
    if (l->mix == LLMI_MIX_STATE && (!be->ssm_create || !be->ssm_release || !be->ssm_bytes || !be->ssm)) lacks = "ssm";
    if (l->mix == LLMI_MIX_LATENT && !be->copy_heads) lacks = "copy_heads";
    if (l->feed == LLMI_FEED_EXPERTS && (!be->prepare_moe || !be->moe || !be->release_moe)) lacks = "moe";
    if (l->feed == LLMI_FEED_EXPERTS && m->c.shared_inter && !be->add) lacks = "add";
    if (!lacks) return MOQ_OK;
    return moq_fail(err, MOQ_E_UNSUPPORTED, llmi_name(m, name, layer, l->mix ? m->c.family->names->mix : m->c.family->names->feed),
                    "backend %s has no '%s', which this layer needs; use the CPU backend", be->name, lacks);
}

/* The norms around a block. */
static moq_result llmi_prepare_norms(llmi_model *m, int32_t layer, const char *before, const char *after, const float **norm, const float **post,
                                     moq_error *err)
{
    moq_result code = llmi_load_norm(m, layer, before, m->c.hidden, norm, err);
    return code < 0 || !after ? code : llmi_load_norm(m, layer, after, m->c.hidden, post, err);
}

/* The second block. */
static moq_result llmi_prepare_feed(llmi_model *m, int32_t layer, llmi_layer *l, moq_error *err)
{
    char name[LLMI_NAME_BYTES];
    const llmi_config *c = &m->c;
    const llmi_moe_names *n = c->moe;
    const llmi_names *names = c->family->names;
    moq_result code = llmi_prepare_norms(m, layer, names->feed_norm, names->feed_post, &l->feed_norm, &l->feed_post, err);
    if (code < 0) return code;
    if (l->feed == LLMI_FEED_EXPERTS) return llmi_prepare_moe(m, layer, l, err);
    /* Mixtures may be dense in some layers: then the plain names are used. */
    /* a router without experts means that the key is wrong, not that the layer is dense */
    if (n && !c->experts && moq_has_linear(m->ck, llmi_name(m, name, layer, n->router)))
        return llmi_in_file("config.json", moq_fail(err, MOQ_E_CONFIG, n->count_key,
                            "0 experts, but the folder has the router '%q'; take config.json and weights from one model", name), err);
    return llmi_prepare_mlp(m, layer, names->feed, c->inter, l, err);
}

/* How the first block of a layer is prepared. */
typedef moq_result (*llmi_mix_fn)(llmi_model *m, int32_t layer, llmi_layer *l, moq_error *err);

/* One layer in the order in which it computes, so that the first missing tensor is the first one needed. */
static moq_result llmi_prepare_layer(llmi_model *m, int32_t layer, llmi_layer *l, moq_error *err)
{
    static const llmi_mix_fn mixes[] = {NULL, llmi_prepare_attention, llmi_prepare_latent, llmi_prepare_state};
    const llmi_config *c = &m->c;
    const llmi_names *names = c->family->names;
    moq_result code;
    llmi_layer_blocks(c, layer, &l->mix, &l->feed);
    if ((code = llmi_check_layer(m, layer, l, err)) < 0) return code;
    l->window = llmi_layer_window(c, layer);
    l->chunk = llmi_layer_chunk(c, layer);
    /* layers with a window may turn by another rope than those that see everything */
    l->turn = !llmi_layer_turns(c, layer) ? LLMI_TURN_NONE : c->local.dims > 0 && llmi_layer_slides(c, layer) ? LLMI_TURN_LOCAL : LLMI_TURN_ROPE;
    if (l->mix) {
        if ((code = llmi_prepare_norms(m, layer, names->mix_norm, names->mix_post, &l->mix_norm, &l->mix_post, err)) < 0) return code;
        if ((code = mixes[l->mix](m, layer, l, err)) < 0) return code;
    }
    return l->feed ? llmi_prepare_feed(m, layer, l, err) : MOQ_OK;
}

/* Layers after the last that config.json declares: extra prediction layers of some models. Told, not used. */
static void llmi_tell_unused(const llmi_model *m)
{
    char name[LLMI_NAME_BYTES];
    size_t n, count = moq_tensor_count(m->ck);
    moq_error finding;
    if (!m->desc->log) return;
    llmi_name(m, name, m->c.layers, "");
    n = strlen(name);
    for (size_t i = 0; i < count; i++) {
        const moq_tensor *t = moq_get_tensor(m->ck, i);
        if (strncmp(t->name, name, n) != 0) continue;
        moq_fail(&finding, MOQ_E_MISMATCH, name, "tensors with this prefix are not used: num_hidden_layers of config.json is %d", m->c.layers);
        llmi_tell(m, &finding);
        return;
    }
}

/* Is `tail`, a module under layers.N that ends with "norm", one that this family computes? */
static int llmi_knows_norm(const llmi_config *c, const char *tail)
{
    static const char *const parts[] = {"q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm", "norm"};
    static const uint32_t flags[] = {LLMI_QK_NORM, LLMI_QK_NORM, LLMI_LATENT, LLMI_LATENT, LLMI_NO_ROPE};
    const llmi_names *n = c->family->names;
    const char *const own[] = {n->mix_norm, n->feed_norm, n->mix_post, n->feed_post};
    char name[LLMI_NAME_BYTES];
    for (size_t i = 0; i < LLMI_COUNT(own); i++)
        if (own[i] && strcmp(tail, own[i]) == 0) return 1;
    for (size_t i = 0; i < LLMI_COUNT(parts); i++)
        if ((c->family->flags & flags[i]) && strcmp(tail, llmi_join(name, n->mix, parts[i])) == 0) return 1;
    return 0;
}

/* A norm that stands in a layer and is not computed means that model_type names another architecture than the weights have: everything else
   may fit, and what came out would be wrong. */
static moq_result llmi_check_norms(const llmi_model *m, moq_error *err)
{
    static const char end[] = "norm.weight";
    char start[LLMI_NAME_BYTES], tail[LLMI_NAME_BYTES];
    size_t n = strlen(llmi_name(m, start, 0, "")) - 2; /* "model.layers.0." without "0." */
    for (size_t i = 0; i < moq_tensor_count(m->ck); i++) {
        const char *name = moq_get_tensor(m->ck, i)->name, *at = name + n;
        size_t bytes = strlen(name);
        int32_t layer = 0;
        if (strncmp(name, start, n) != 0 || bytes < n + sizeof end || strcmp(name + bytes + 1 - sizeof end, end) != 0) continue;
        for (; *at >= '0' && *at <= '9' && layer < m->c.layers; at++) layer = layer * 10 + (*at - '0');
        if (layer >= m->c.layers) continue;
        bytes -= (size_t)(at - name) + 1 + strlen(".weight");
        if (*at != '.' || bytes >= sizeof tail) continue;
        memcpy(tail, at + 1, bytes);
        tail[bytes] = 0;
        if (!llmi_knows_norm(&m->c, tail))
            return moq_fail(err, MOQ_E_UNSUPPORTED, name, "a '%s', which config.json says this is, has no such norm; the weights are of another "
                            "architecture, or config.json is", m->c.family->model_type);
    }
    return MOQ_OK;
}

/* ---- KV cache ---- */

/* This rank's part of a view of `count` elements a rank; one element for all stays. */
static void llmi_cut_view(const llmi_model *m, moq_view *v, int64_t count)
{
    if (!v->data || v->count != (uint64_t)(count * m->ranks)) return;
    v->data = (const uint8_t *)v->data + m->rank * count * moq_dtype_bits(v->dtype) / 8;
    v->count = (uint64_t)count;
}

/* INT8 codes end at 127. Scales of the other formats are amax / 448, which becomes amax / 127; without one, 1 would leave whole numbers only:
   1/8 costs trained models next to nothing. */
static moq_result llmi_fit_int8(llmi_model *m, moq_view *scale, moq_error *err)
{
    uint64_t n = scale->data ? scale->count : 1;
    float *s = (float *)llmi_take(&m->arena, (size_t)n, sizeof *s);
    if (!s) return llmi_nomem(err, "scales of the KV cache");
    s[0] = 0.125f;
    if (scale->data && !moq_to_f32(scale->dtype, scale->data, n, s)) return moq_fail(err, MOQ_E_DTYPE, "llm_desc.kv", "scales of a KV cache are numbers");
    for (uint64_t i = 0; scale->data && i < n; i++) s[i] *= 448.0f / 127;
    scale->data = s;
    scale->dtype = MOQ_F32;
    scale->count = n;
    return MOQ_OK;
}

/* A cache that was made INT8 by llm_desc.kv, in a checkpoint that says another. */
static moq_result llmi_fit_cache(llmi_model *m, moq_kv *kv, moq_error *err)
{
    moq_error finding;
    moq_result code;
    if (!kv->k_scale.data && !kv->v_scale.data && m->kv != MOQ_KV_INT8 && !m->dry) { /* told once */
        moq_fail(&finding, MOQ_E_MISSING, "llm_desc.kv", "the checkpoint has no scales of keys and values; int8 takes 1/8, and cuts off beyond 15.9");
        llmi_tell(m, &finding);
    }
    code = llmi_fit_int8(m, &kv->k_scale, err);
    return code < 0 ? code : llmi_fit_int8(m, &kv->v_scale, err);
}

/* The cache of a layer that attends. */
static moq_result llmi_make_kv(llmi_model *m, int32_t layer, llmi_layer *l, moq_error *err)
{
    const llmi_config *c = &m->c;
    char name[LLMI_NAME_BYTES];
    moq_kv_desc d;
    moq_result code;
    if (l->mix != LLMI_MIX_ATTENTION && l->mix != LLMI_MIX_LATENT) return MOQ_OK;
    memset(&d, 0, sizeof d);
    if ((code = llmi_find_cache(m, layer, &d.kv, err)) < 0) return code;
    if (d.kv.format == MOQ_KV_INT8 && moq_get_info(m->ck)->kv != MOQ_KV_INT8 && (code = llmi_fit_cache(m, &d.kv, err)) < 0) return code;
    if (m->ranks > 1) {
        llmi_cut_view(m, &d.kv.k_scale, c->kv_heads);
        llmi_cut_view(m, &d.kv.v_scale, c->kv_heads);
        llmi_cut_view(m, &d.kv.k_bias, (int64_t)c->kv_heads * c->head_dim);
        llmi_cut_view(m, &d.kv.v_bias, (int64_t)c->kv_heads * c->value_dim);
    }
    llmi_name(m, name, layer, c->family->names->mix);
    d.name = llmi_take_text(&m->arena, name, strlen(name)); /* a backend may keep it for its messages */
    if (!d.name) return llmi_nomem(err, name);
    d.slots = m->slots;
    d.capacity = c->context;
    d.shared = l->absorbed;
    d.kv_heads = l->absorbed ? 1 : c->kv_heads;
    /* latent attention: rank + rope numbers a token, or heads * (head_dim + value_dim) */
    d.head_dim = l->absorbed ? c->kv_rank + c->rope_dim : c->head_dim;
    d.value_dim = l->absorbed ? c->kv_rank : c->value_dim;
    d.bf16 = m->desc->kv && strcmp(m->desc->kv, "bf16") == 0;
    m->kv = d.kv.format;
    m->kv_bf16 = d.bf16;
    if (m->dry && llmi_plan_cache(m, m->be->kv_bytes(m->be, &d))) return MOQ_OK;
    l->kv = m->be->kv_create(m->be, &d, err);
    if (!l->kv) return llmi_code(err, MOQ_E_NOMEM);
    if (!m->dry) llmi_plan_cache(m, m->be->kv_bytes(m->be, &d));
    return MOQ_OK;
}

/* ---- all of it ---- */

/* Entries of the table that the decoder calls; found out here, not in the middle of an answer. */
#define LLMI_ENTRIES(X)                                                                                        \
    X(alloc) X(release) X(upload) X(upload_act) X(download_act) X(sync) X(reserve) X(prepare_linear)           \
    X(release_weight) X(weight_bytes) X(linear) X(embed) X(kv_create) X(kv_release) X(kv_bytes) X(kv_append)   \
    X(attention) X(norm) X(rope_table) X(rope) X(activation)

/* Never a silent fall-back: what the backend cannot do is said with the entry's name. */
static moq_result llmi_check_backend(const llmi_model *m, moq_error *err)
{
    const moq_backend *be = m->be;
    const char *lacks = NULL;
#define LLMI_X(entry) if (!be->entry) lacks = #entry;
    LLMI_ENTRIES(LLMI_X)
#undef LLMI_X
    return lacks ? moq_fail(err, MOQ_E_UNSUPPORTED, be->name, "this backend has no '%s', which the model needs; use the CPU backend", lacks) : MOQ_OK;
}

/* Frequencies are computed in double and rounded once; the backend makes cos and sin for every chunk from them. */
static moq_result llmi_make_rope(llmi_model *m, const llmi_rope *r, int which, moq_error *err)
{
    int32_t n = r->dims / 2;
    double *inv;
    float *host, *device;
    if (n == 0) return MOQ_OK;
    inv = (double *)llmi_take(&m->arena, (size_t)n, sizeof *inv);
    host = (float *)llmi_take(&m->arena, (size_t)n, sizeof *host);
    if (!inv || !host) return llmi_nomem(err, "rope");
    device = (float *)llmi_alloc(m, (uint64_t)n, sizeof *device, err);
    m->table[which] = device ? (float *)llmi_alloc(m, (uint64_t)m->chunk * (uint64_t)r->dims, sizeof *device, err) : NULL;
    if (!m->table[which]) return llmi_code(err, MOQ_E_NOMEM);
    m->rope_scale[which] = llmi_rope_table(r, inv);
    for (int32_t i = 0; i < n; i++) host[i] = (float)inv[i];
    m->be->upload(m->be, device, host, (size_t)n * sizeof *host);
    m->inv_freq[which] = device;
    return MOQ_OK;
}

/* The factors of q in layers without rope: they are turned by no angle and scaled, so that a backend needs nothing new. */
static moq_result llmi_make_temper(llmi_model *m, moq_error *err)
{
    uint64_t values = (uint64_t)m->chunk * (uint64_t)m->c.head_dim;
    if (m->c.temper <= 0) return MOQ_OK;
    m->temper = (float *)llmi_take(&m->arena, (size_t)values, sizeof *m->temper);
    if (!m->temper) return llmi_nomem(err, "rope");
    m->table[LLMI_TURN_NONE] = (float *)llmi_alloc(m, values, sizeof(float), err);
    return m->table[LLMI_TURN_NONE] ? MOQ_OK : llmi_code(err, MOQ_E_NOMEM);
}

typedef struct llmi_want { void **out; uint64_t width; size_t size; } llmi_want; /* rows of chunk; width 0: not needed */

static uint64_t llmi_larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* Rows of one call of the output layer. The logits of a whole chunk would be far larger than everything else: about a million of them at a time. A device
   reads the weights anew for each call, in more time than it takes to multiply: there those of all conversations go together, up to 64. */
static int32_t llmi_head_rows(const llmi_model *m)
{
    int32_t rows = (1 << 20) / m->c.vocab, together = m->be->pass_rows > 0 ? m->slots : 1;
    if (together > 64) together = 64;
    if (rows < together) rows = together;
    return rows < 1 ? 1 : rows > m->chunk ? m->chunk : rows;
}

/* Activations of one chunk: taken once, here. */
static moq_result llmi_make_buffers(llmi_model *m, moq_error *err)
{
    const llmi_config *c = &m->c;
    uint64_t heads = (uint64_t)c->heads, kv = (uint64_t)c->kv_heads, dim = (uint64_t)c->head_dim, hidden = (uint64_t)c->hidden;
    uint64_t rows = (uint64_t)m->chunk, value = (uint64_t)c->value_dim, inner = (uint64_t)c->ssm_heads * (uint64_t)c->ssm_head_dim;
    uint64_t state_in = 2 * inner + 2 * (uint64_t)c->ssm_groups * (uint64_t)c->ssm_state + (uint64_t)c->ssm_heads;
    uint64_t inter = llmi_larger((uint64_t)c->inter, (uint64_t)c->shared_inter), latent = c->kv_rank ? 1 : 0;
    uint64_t attention_in = latent ? (c->q_rank ? (uint64_t)c->q_rank : heads * dim) + (uint64_t)c->kv_rank + (uint64_t)c->rope_dim : (heads + 2 * kv) * dim;
    uint64_t narrow = c->moe_narrow ? (uint64_t)c->moe_hidden : 0, key = (uint64_t)c->kv_rank + (uint64_t)c->rope_dim;
    /* layers that are opened one by one, behind an observer, have wide keys and values */
    uint64_t part, narrow_kv = m->latent_ways & 1, wide = latent && (m->one_by_one || m->latent_ways & 2);
    void *ids = NULL, *best = NULL;
    llmi_want want[] = {
        {&m->x, hidden, m->elem},   {&m->h, hidden, m->elem},      {&m->d, hidden, m->elem},
        {&m->in, llmi_larger(attention_in, state_in), m->elem},    {&m->att, llmi_larger(heads * value, inner), m->elem},
        {&m->middle, latent * llmi_larger((uint64_t)c->q_rank, (uint64_t)c->kv_rank), m->elem},
        {&m->q, latent * heads * dim, m->elem}, {&m->k, llmi_larger(wide * heads * dim, narrow_kv * heads * key), m->elem},
        {&m->kv_b, heads * llmi_larger(wide * ((uint64_t)c->nope_dim + value), narrow_kv * (uint64_t)c->kv_rank), m->elem},
        {&m->v, llmi_larger(wide * heads * value, narrow_kv * key), m->elem},
        {&m->gate_up, 2 * inter, m->elem},      {&m->mid, inter, m->elem}, {&m->shared, c->shared_inter ? hidden : 0, m->elem},
        {&m->expert_in, narrow, m->elem},       {&m->expert_out, narrow, m->elem},
        {&m->route, (uint64_t)c->experts + 1, m->elem},
        {&ids, 3, sizeof(int32_t)},             {&best, (uint64_t)(m->be->send_act != NULL), sizeof(int32_t)}};
    for (size_t i = 0; i < LLMI_COUNT(want); i++) {
        if (want[i].width == 0) continue;
        if (m->dry) m->planned += rows * want[i].width * want[i].size;
        else if (!(*want[i].out = llmi_alloc(m, rows * want[i].width, want[i].size, err))) return llmi_code(err, MOQ_E_NOMEM);
    }
    m->ids = (int32_t *)ids;
    m->pos = m->ids ? m->ids + m->chunk : NULL; /* as in m->host, so that one copy takes all three */
    m->slot = m->ids ? m->pos + m->chunk : NULL;
    m->best = (int32_t *)best;
    m->head_rows = llmi_head_rows(m);
    part = ((uint64_t)m->head_rows + 1) * (uint64_t)m->head_part;
    m->head_cut = ((1 << 20) / c->hidden + 64) / 64 * 64; /* about a million products */
    if (m->dry) m->planned += (uint64_t)m->head_rows * (uint64_t)c->vocab * m->elem;
    else if (!(m->logits = llmi_alloc(m, (uint64_t)m->head_rows * (uint64_t)c->vocab, m->elem, err))) return llmi_code(err, MOQ_E_NOMEM);
    if (m->dry) m->planned += part * m->elem;
    else if (part && !(m->part = llmi_alloc(m, part, m->elem, err))) return llmi_code(err, MOQ_E_NOMEM);
    m->length = (int32_t *)llmi_take(&m->arena, (size_t)m->slots, sizeof *m->length);
    m->host = (int32_t *)llmi_take(&m->arena, (size_t)m->chunk * (m->be->send_act ? 4 : 3), sizeof *m->host);
    m->picked = m->host && m->be->send_act ? m->host + 3 * (size_t)m->chunk : NULL;
    m->out = (float **)llmi_take(&m->arena, (size_t)m->chunk, sizeof *m->out);
    return m->length && m->host && m->out ? MOQ_OK : llmi_nomem(err, "slots");
}

/* Tells the caller how far it is; a non-zero answer stops the work. */
static moq_result llmi_progress(const llmi_model *m, moq_stage stage, int64_t done, int64_t total, moq_error *err)
{
    const llm_desc *d = m->desc;
    if (!d->progress || !d->progress(d->progress_user, stage, (uint64_t)done, (uint64_t)total)) return MOQ_OK;
    return moq_fail(err, MOQ_E_CANCELLED, NULL, "stopped by the caller");
}

/* Weights and cache of one layer. */
static moq_result llmi_open_layer(llmi_model *m, int32_t layer, moq_error *err)
{
    moq_result code = llmi_prepare_layer(m, layer, &m->layers[layer], err);
    return code < 0 ? code : llmi_make_kv(m, layer, &m->layers[layer], err);
}

/* Also of one that was opened halfway. Blocks taken since `mark` go too. */
static void llmi_close_layer(llmi_model *m, int32_t layer, const llmi_held *mark)
{
    moq_backend *be = m->be;
    llmi_layer *l = &m->layers[layer];
    moq_weight *weights[] = {l->in, l->out, l->q_b, l->kv_b, l->gate_up, l->down, l->router, l->narrow, l->widen};
    if (m->step) be->release_graph(be, m->step); /* it reads every layer */
    m->step = NULL;
    for (size_t j = 0; j < LLMI_COUNT(weights); j++)
        if (weights[j]) be->release_weight(be, weights[j]);
    if (l->latent) be->latent_release(be, l->latent);
    if (l->experts) be->release_moe(be, l->experts);
    if (l->kv) be->kv_release(be, l->kv);
    if (l->ssm) be->ssm_release(be, l->ssm);
    memset(l, 0, sizeof *l);
    for (; m->held != mark; m->held = m->held->next) be->release(be, m->held->data);
}

/* Weights first, then the KV cache of each layer, then activations: what is largest fails first. */
static moq_result llmi_prepare_all(llmi_model *m, moq_error *err)
{
    moq_result code;
    if ((code = llmi_prepare_ends(m, err)) < 0) return code;
    m->layers = (llmi_layer *)llmi_take(&m->arena, (size_t)m->c.layers, sizeof *m->layers);
    if (!m->layers) return llmi_nomem(err, "layers");
    for (int32_t i = 0; i < m->c.layers && !m->one_by_one; i++) {
        if ((code = llmi_progress(m, MOQ_STAGE_PREPARE, i, m->c.layers, err)) < 0) return code;
        if ((code = llmi_open_layer(m, i, err)) < 0) return code;
        if (m->copied && !m->dry) moq_forget_pages(m->ck);
    }
    if (!m->one_by_one) llmi_tell_unused(m);
    if ((code = llmi_make_rope(m, &m->c.rope, LLMI_TURN_ROPE, err)) < 0 || (code = llmi_make_rope(m, &m->c.local, LLMI_TURN_LOCAL, err)) < 0) return code;
    if ((code = llmi_make_temper(m, err)) < 0 || (code = llmi_make_buffers(m, err)) < 0) return code;
    /* a backend that is the caller's keeps the scratch that it has while one plans */
    if ((!m->dry || !m->desc->backend) && (code = m->be->reserve(m->be, m->chunk, err)) < 0) return code;
    return llmi_progress(m, MOQ_STAGE_PREPARE, m->c.layers, m->c.layers, err);
}

/* Sizes of config.json become those of this rank's part. */
static moq_result llmi_divide(llmi_model *m, moq_error *err)
{
    llmi_config *c = &m->c;
    const struct { const char *key; int32_t *size; } sizes[] = {
        {"num_attention_heads", &c->heads}, {"num_key_value_heads", &c->kv_heads}, {"intermediate_size", &c->inter},
        {"the experts' intermediate size", &c->moe_inter}, {"the shared experts' size", &c->shared_inter}};
    m->ranks = m->desc->ranks > 1 ? m->desc->ranks : 1;
    m->rank = m->ranks > 1 ? m->desc->rank : 0;
    if (m->ranks == 1) return MOQ_OK;
    m->no_step = !m->desc->all_reduce_queues;
    if (m->rank < 0 || m->rank >= m->ranks) return moq_fail(err, MOQ_E_ARG, "llm_desc.rank", "%d is outside 0..%d", m->rank, m->ranks - 1);
    if (!m->desc->all_reduce) return moq_fail(err, MOQ_E_ARG, "llm_desc.all_reduce", "%d ranks need a function that sums over them", m->ranks);
    if (c->kv_rank || c->ssm_heads || c->moe_narrow)
        return moq_fail(err, MOQ_E_UNSUPPORTED, "llm_desc.ranks", "a '%s' with %s cannot be divided among ranks; open it whole", c->family->model_type,
                        c->kv_rank ? "latent attention" : c->ssm_heads ? "state-space layers" : "experts between projections");
    for (size_t i = 0; i < LLMI_COUNT(sizes); i++) {
        if (*sizes[i].size % m->ranks != 0)
            return moq_fail(err, MOQ_E_SHAPE, "llm_desc.ranks", "%s is %d, no multiple of %d ranks; take fewer", sizes[i].key, *sizes[i].size, m->ranks);
        *sizes[i].size /= m->ranks;
    }
    return MOQ_OK;
}

/* Reads, checks and prepares; what was made stays in *m also after a failure, for llmi_model_close. */
static moq_result llmi_model_open(llmi_model *m, const moq_checkpoint *ck, moq_backend *be, const llm_desc *desc, moq_error *err)
{
    moq_result code;
    m->ck = ck;
    m->be = be;
    m->desc = desc;
    m->arena = llmi_arena_make(&desc->allocator);
    m->elem = (size_t)moq_dtype_bits(be->act) / 8;
    m->copied = desc->weights && strcmp(desc->weights, "copied") == 0 && be->copy_weight && be->copy_bytes;
    code = llmi_config_read(ck, desc->context, &m->c, err);
    llmi_tell_slips(m);
    if (code < 0 || (code = llmi_divide(m, err)) < 0) return code;
    m->slots = desc->slots > 0 ? desc->slots : 1;
    m->chunk = desc->chunk > 0 ? desc->chunk : be->pass_rows > 0 ? be->pass_rows : 256;
    if (m->chunk > m->c.context) m->chunk = m->c.context;
    if (m->c.context > m->c.max_positions) {
        moq_error finding;
        moq_fail(&finding, MOQ_E_CONFIG, "llm_desc.context", "%d tokens are more than the %lld that the model was made for: what it writes past those is seldom of "
                 "use, and the memory for all is taken; lower it to %lld", m->c.context, (long long)m->c.max_positions, (long long)m->c.max_positions);
        llmi_tell(m, &finding);
    }
    llmi_find_prefix(m);
    llmi_find_mixture(m);
    if ((code = llmi_check_backend(m, err)) < 0 || (code = llmi_check_norms(m, err)) < 0) return code;
    return llmi_prepare_all(m, err);
}

/* Also closes what a failed open left half done. */
static void llmi_model_close(llmi_model *m)
{
    moq_backend *be = m->be;
    for (int32_t i = 0; m->layers && i < m->c.layers; i++) llmi_close_layer(m, i, m->held);
    if (m->head && m->head != m->embed) be->release_weight(be, m->head);
    if (m->embed) be->release_weight(be, m->embed);
    for (llmi_held *h = m->held; h; h = h->next) be->release(be, h->data);
    llmi_arena_drop(&m->arena);
}

/* ------------------------------------------------------------------------------------------------
   >>llm-forward     the decoder
   Calls the backend's table and nothing else; allocates nothing. Work is cut into chunks of at most `chunk` tokens.
   ------------------------------------------------------------------------------------------------ */

/* One chunk of n tokens; every matrix is row-major, one row a token:

       x [n, hidden]             the residual stream: embedding, then what each block adds
       d [n, hidden]             what the last block computed and x has not yet got: the next norm adds it first
       h [n, hidden]             norm of x
       in [n, ...]               h times the fused projections of the first block: q | k | v, normed per head (Qwen3) and rotated in place
       att [n, heads * value]    attention of q over the slot's keys and values, these n included; out of the state-space mixer
       gate_up [n, 2 inter]      -> mid [n, inter] -> d; or router logits [n, experts] -> experts -> d, plus the shared ones

   Row i of the chunk sees position pos + i and everything before it, so cutting a text into chunks changes nothing but the order
   of the work. */

/* Element i of activations. */
static void *llmi_act(const llmi_model *m, void *base, int64_t i) { return (char *)base + i * (int64_t)m->elem; }

/* y = norm(x += add) over `rows` rows of the residual stream; add may be NULL. */
static void llmi_norm(const llmi_model *m, void *x, const void *add, const float *weight, int32_t rows, void *y)
{
    moq_norm_desc n;
    memset(&n, 0, sizeof n);
    n.x = x;
    n.add = add;
    n.y = y;
    n.weight = weight;
    n.rows = rows;
    n.cols = m->c.hidden;
    n.eps = (float)m->c.eps;
    m->be->norm(m->be, &n);
}

/* `groups` pieces of cols values at x [rows, x_stride], each on its own; weight [cols]; y may be x. */
static void llmi_part_norm(const llmi_model *m, void *x, int64_t x_stride, void *y, int64_t y_stride, int32_t groups, int32_t cols,
                           const float *weight, int32_t rows)
{
    moq_norm_desc n;
    memset(&n, 0, sizeof n);
    n.x = x;
    n.y = y;
    n.weight = weight;
    n.x_stride = x_stride;
    n.y_stride = y_stride;
    n.rows = rows;
    n.cols = cols;
    n.groups = groups;
    n.eps = (float)m->c.part_eps;
    m->be->norm(m->be, &n);
}

/* Rotary embedding of heads of dim values at x [rows, stride], in place, from value `first` of each on; the table belongs to the chunk. */
static void llmi_rotate(const llmi_model *m, const llmi_layer *l, void *x, int32_t heads, int32_t dim, int32_t first, int64_t stride, int32_t rows)
{
    const llmi_config *c = &m->c;
    int32_t dims = l->turn == LLMI_TURN_NONE ? dim : l->turn == LLMI_TURN_LOCAL ? c->local.dims : c->rope.dims;
    moq_rope_desc r;
    if (dims == 0 || !m->table[l->turn]) return;
    memset(&r, 0, sizeof r);
    r.x = x;
    r.stride = stride;
    r.rows = rows;
    r.heads = heads;
    r.head_dim = dim;
    r.first = first;
    r.dims = dims;
    r.interleaved = c->interleaved;
    r.table = m->table[l->turn];
    m->be->rope(m->be, &r);
}

/* att = attention of q over what the cache holds. */
static void llmi_attend(const llmi_model *m, const llmi_layer *l, const moq_batch *b, const void *q, int64_t q_stride)
{
    const llmi_config *c = &m->c;
    moq_attention_desc a;
    memset(&a, 0, sizeof a);
    a.cache = l->kv;
    a.q = q;
    a.y = l->latent ? m->kv_b : m->att;
    a.q_stride = q_stride;
    a.y_stride = (int64_t)c->heads * (l->latent ? c->kv_rank : c->value_dim);
    a.heads = c->heads;
    a.window = l->window;
    a.chunk = l->chunk;
    /* keys over the middles are longer than heads are */
    a.scale = l->latent && c->attn_scale == 0 ? 1 / sqrtf((float)c->head_dim) : (float)c->attn_scale;
    a.softcap = (float)c->attn_cap;
    a.sinks = l->sinks;
    a.wide = !m->rounds;
    m->be->attention(m->be, b, &a);
}

/* Heads of a row [heads | kv_heads | kv_heads] * head_dim normed and turned, keys and values into the cache, where the backend does it in one
   call. 0: it does not, or these heads want something else. */
static int llmi_enter_heads(const llmi_model *m, const llmi_layer *l, const moq_batch *b, void *q, void *k, const void *v, int64_t stride)
{
    const llmi_config *c = &m->c;
    moq_heads_desc h;
    if (!m->be->kv_enter || (l->turn == LLMI_TURN_NONE ? m->table[LLMI_TURN_NONE] != NULL : c->unit_heads)) return 0;
    memset(&h, 0, sizeof h);
    h.cache = l->kv;
    h.q = q;
    h.k = k;
    h.v = v;
    h.q_stride = h.k_stride = h.v_stride = stride;
    h.heads = c->heads;
    h.q_norm = l->q_norm;
    h.k_norm = l->k_norm;
    h.eps = (float)c->part_eps;
    h.table = m->table[l->turn];
    h.dims = !h.table ? 0 : l->turn == LLMI_TURN_LOCAL ? c->local.dims : c->rope.dims;
    h.interleaved = c->interleaved;
    m->be->kv_enter(m->be, b, &h);
    return 1;
}

/* att = attention of h; q, k and v lie side by side in a row of in: [heads | kv_heads | kv_heads] * head_dim. */
static void llmi_attention(const llmi_model *m, const llmi_layer *l, const moq_batch *b)
{
    const llmi_config *c = &m->c;
    int64_t q_width = (int64_t)c->heads * c->head_dim, kv_width = (int64_t)c->kv_heads * c->head_dim, stride = q_width + 2 * kv_width;
    void *q = m->in, *k = llmi_act(m, m->in, q_width), *v = llmi_act(m, m->in, q_width + kv_width);
    m->be->linear(m->be, l->in, m->h, b->rows, m->in);
    if (llmi_enter_heads(m, l, b, q, k, v, stride)) {
        llmi_attend(m, l, b, q, stride);
        return;
    }
    if (l->q_norm) llmi_part_norm(m, q, stride, q, stride, c->heads, c->head_dim, l->q_norm, b->rows);
    if (l->k_norm) llmi_part_norm(m, k, stride, k, stride, c->kv_heads, c->head_dim, l->k_norm, b->rows);
    llmi_rotate(m, l, q, c->heads, c->head_dim, 0, stride, b->rows);
    if (l->turn != LLMI_TURN_NONE) llmi_rotate(m, l, k, c->kv_heads, c->head_dim, 0, stride, b->rows);
    /* Llama 4 norms the heads that it has turned, without weights */
    if (c->unit_heads && l->turn != LLMI_TURN_NONE) {
        llmi_part_norm(m, q, stride, q, stride, c->heads, c->head_dim, NULL, b->rows);
        llmi_part_norm(m, k, stride, k, stride, c->kv_heads, c->head_dim, NULL, b->rows);
    }
    m->be->kv_append(m->be, l->kv, b, k, stride, v, stride);
    llmi_attend(m, l, b, q, stride);
}

/* y[r][h] = x[r][h] for every head: width values, `step` apart; x_step 0 repeats one. */
static void llmi_copy_heads(const llmi_model *m, const void *x, int64_t x_stride, int64_t x_step, void *y, int64_t y_step, int32_t width, int32_t rows)
{
    moq_copy_desc d;
    d.x = x;
    d.y = y;
    d.x_stride = x_stride;
    d.y_stride = y_step * m->c.heads;
    d.x_step = x_step;
    d.y_step = y_step;
    d.rows = rows;
    d.heads = m->c.heads;
    d.width = width;
    m->be->copy_heads(m->be, &d);
}

/* The rest of latent attention over the middles: q [heads, nope | rope] and the rotated part `turned` of the key; the normed middle is in v
   already. In the cache stands [middle | rotated part] once for all heads, q becomes [K^T nope | rope], the result V times what it attends. */
static void llmi_attend_latent(const llmi_model *m, const llmi_layer *l, const moq_batch *b, void *q, int64_t q_stride, const void *turned, int64_t stride)
{
    const llmi_config *c = &m->c;
    moq_backend *be = m->be;
    int64_t key = c->kv_rank + c->rope_dim;
    moq_copy_desc d = {q, m->k, q_stride, key * c->heads, c->head_dim, key, b->rows, c->heads, c->rope_dim};
    moq_copy_desc one = {turned, llmi_act(m, m->v, c->kv_rank), stride, key, 0, 0, b->rows, 1, c->rope_dim};
    be->latent_query(be, l->latent, &d);
    d.x = llmi_act(m, q, c->nope_dim);
    d.y = llmi_act(m, m->k, c->kv_rank);
    be->copy_heads(be, &d);
    be->copy_heads(be, &one);
    be->kv_append(be, l->kv, b, m->v, key, m->v, key);
    llmi_attend(m, l, b, m->k, key * c->heads);
    d.x = m->kv_b;
    d.y = m->att;
    d.x_stride = (int64_t)c->kv_rank * c->heads;
    d.x_step = c->kv_rank;
    d.y_stride = (int64_t)c->value_dim * c->heads;
    d.y_step = c->value_dim;
    be->latent_value(be, l->latent, &d);
}

/* att = latent attention of h. The middles are normed and widened to the heads; a key is [nope of its head | rope part of all]. */
static void llmi_latent(const llmi_model *m, const llmi_layer *l, const moq_batch *b)
{
    const llmi_config *c = &m->c;
    moq_backend *be = m->be;
    int64_t q_width = (int64_t)c->heads * c->head_dim, first = c->q_rank ? c->q_rank : q_width, stride = first + c->kv_rank + c->rope_dim;
    int64_t head = c->nope_dim + c->value_dim, q_stride = c->q_rank ? q_width : stride;
    void *q = c->q_rank ? m->q : m->in, *middle = llmi_act(m, m->in, first), *turned = llmi_act(m, middle, c->kv_rank);
    be->linear(be, l->in, m->h, b->rows, m->in);
    if (c->q_rank) {
        llmi_part_norm(m, m->in, stride, m->middle, c->q_rank, 1, c->q_rank, l->q_norm, b->rows);
        be->linear(be, l->q_b, m->middle, b->rows, q);
    }
    llmi_rotate(m, l, q, c->heads, c->head_dim, c->nope_dim, q_stride, b->rows);
    llmi_rotate(m, l, turned, 1, c->rope_dim, 0, stride, b->rows);
    if (l->latent) {
        llmi_part_norm(m, middle, stride, m->v, c->kv_rank + c->rope_dim, 1, c->kv_rank, l->k_norm, b->rows);
        llmi_attend_latent(m, l, b, q, q_stride, turned, stride);
        return;
    }
    llmi_part_norm(m, middle, stride, m->middle, c->kv_rank, 1, c->kv_rank, l->k_norm, b->rows);
    be->linear(be, l->kv_b, m->middle, b->rows, m->kv_b);
    llmi_copy_heads(m, m->kv_b, head * c->heads, head, m->k, c->head_dim, c->nope_dim, b->rows);
    llmi_copy_heads(m, turned, stride, 0, llmi_act(m, m->k, c->nope_dim), c->head_dim, c->rope_dim, b->rows);
    llmi_copy_heads(m, llmi_act(m, m->kv_b, c->nope_dim), head * c->heads, head, m->v, c->value_dim, c->value_dim, b->rows);
    be->kv_append(be, l->kv, b, m->k, q_width, m->v, (int64_t)c->heads * c->value_dim);
    llmi_attend(m, l, b, q, q_stride);
}

/* att = state-space mixer of h. */
static void llmi_state(const llmi_model *m, const llmi_layer *l, const moq_batch *b)
{
    m->be->linear(m->be, l->in, m->h, b->rows, m->in);
    m->be->ssm(m->be, l->ssm, b, m->in, m->att);
}

/* The first block of a layer: from h to att. */
typedef void (*llmi_mixing_fn)(const llmi_model *m, const llmi_layer *l, const moq_batch *b);

static const llmi_mixing_fn llmi_mixings[] = {NULL, llmi_attention, llmi_latent, llmi_state};

/* y = dense MLP of h. */
static void llmi_mlp(const llmi_model *m, const llmi_layer *l, int32_t inter, int32_t rows, void *y)
{
    moq_backend *be = m->be;
    if (be->mlp) {
        be->mlp(be, l->gate_up, &m->c.activation, l->down, m->h, rows, m->gate_up, m->mid, y);
        return;
    }
    be->linear(be, l->gate_up, m->h, rows, m->gate_up);
    be->activation(be, &m->c.activation, m->gate_up, rows, inter, m->mid);
    be->linear(be, l->down, m->mid, rows, y);
}

/* d = the second block of h. */
static void llmi_feed(const llmi_model *m, const llmi_layer *l, int32_t rows)
{
    moq_backend *be = m->be;
    if (!l->experts) {
        llmi_mlp(m, l, m->c.inter, rows, m->d);
        return;
    }
    be->linear(be, l->router, m->h, rows, m->route);
    if (l->narrow) {
        be->linear(be, l->narrow, m->h, rows, m->expert_in);
        be->moe(be, l->experts, m->expert_in, m->route, rows, m->expert_out);
        be->linear(be, l->widen, m->expert_out, rows, m->d);
    } else {
        be->moe(be, l->experts, m->h, m->route, rows, m->d);
    }
    if (!l->gate_up) return;
    llmi_mlp(m, l, m->c.shared_inter, rows, m->shared);
    be->add(be, m->d, m->shared, (size_t)rows * (size_t)m->c.hidden);
}

/* ---- passes ---- */

/* Rows of any number of sequences go through the decoder together, each at its own position. What is wanted stands last, so that the
   output layer reads neighbours. A pass runs unit by unit (the embedding, each layer, blocks of the output layer or, where the
   backend offers it, slices of these), so that a caller with little time can stop between two of them and go on later; nothing else may use the
   model's activations until then. */

enum { LLMI_PASS_EMBED = -1 };

/* Forget what was collected. */
static void llmi_pass_clear(llmi_model *m)
{
    memset(&m->pass, 0, sizeof m->pass);
    memset(&m->unsummed, 0, sizeof m->unsummed);
    m->pass.next = LLMI_PASS_EMBED;
}

/* One more row; out: [vocab] F32 for its logits, or NULL. Rows of one sequence come in order of their positions, rows that want logits
   after all that do not; the caller keeps to chunk rows. */
static void llmi_pass_add(llmi_model *m, int32_t slot, int32_t token, int32_t pos, float *out)
{
    llmi_pass *p = &m->pass;
    int32_t i = p->rows++;
    m->host[i] = token;
    m->host[m->chunk + i] = pos;
    m->host[2 * (size_t)m->chunk + (size_t)i] = slot;
    m->out[i] = out;
    p->wanted += out != NULL;
    if (pos > p->max_pos) p->max_pos = pos;
    /* what follows is being overwritten; a running state is of no use before the pass has ended */
    if (m->stateful) m->length[slot] = 0;
    else if (pos < m->length[slot]) m->length[slot] = pos;
}

/* Token ids, positions and slots to the backend, and what depends on positions alone. */
static void llmi_pass_upload(llmi_model *m)
{
    moq_backend *be = m->be;
    const llmi_config *c = &m->c;
    for (int32_t i = 0; m->temper && i < m->pass.rows; i++) {
        double factor = 1 + c->temper * log1p(floor((m->host[m->chunk + i] + 1) / c->temper_floor));
        for (int32_t d = 0; d < c->head_dim; d++) m->temper[(size_t)i * (size_t)c->head_dim + (size_t)d] = d % 2 ? 0 : (float)factor;
    }
    if (m->temper) be->upload(be, m->table[LLMI_TURN_NONE], m->temper, (size_t)m->pass.rows * (size_t)c->head_dim * sizeof *m->temper);
    be->upload(be, m->ids, m->host, (2 * (size_t)m->chunk + (size_t)m->pass.rows) * sizeof *m->host); /* a copy takes microseconds, of whatever size */
}

/* Angles of the positions. */
static void llmi_pass_angles(llmi_model *m)
{
    const llmi_config *c = &m->c;
    int32_t dims[2];
    dims[0] = c->rope.dims / 2;
    dims[1] = c->local.dims / 2;
    for (int i = 0; i < 2; i++)
        if (dims[i]) m->be->rope_table(m->be, m->pos, m->pass.rows, m->inv_freq[i], dims[i], m->rope_scale[i], m->table[i]);
}

/* Embedding and angles. */
static void llmi_pass_embed(llmi_model *m)
{
    float scale = m->c.family->flags & LLMI_SCALED_EMBED ? (float)sqrt((double)m->c.hidden) : 1.0f;
    m->be->embed(m->be, m->embed, m->ids, m->pass.rows, scale, m->x);
    llmi_pass_angles(m);
}

/* Sums over the ranks; the first error is kept for the end of the pass. */
static void llmi_reduce(llmi_model *m, void *x, size_t count)
{
    moq_error err;
    memset(&err, 0, sizeof err);
    if (m->desc->all_reduce(m->desc->all_reduce_user, m->be, x, count, &err) >= 0 || m->unsummed.code < 0) return;
    m->unsummed = err;
    if (err.code >= 0) moq_fail(&m->unsummed, MOQ_E_BACKEND, "llm_desc.all_reduce", "the call failed without a reason");
}

/* d, which a block made, becomes part of the stream, through its norm if it has one: the next norm adds it. Ranks without such a norm sum the stream
   itself, x + d of rank 0 + d of rank 1 + ..: an addition less, and products with their neighbours in one launch. */
static void llmi_pass_block(llmi_model *m, const float *post, int32_t rows)
{
    size_t count = (size_t)rows * (size_t)m->c.hidden;
    void *x = m->x;
    m->pass.add = m->d;
    if (m->ranks > 1 && !post) {
        m->pass.add = NULL;
        if (m->rank == 0) m->be->add(m->be, m->x, m->d, count);
        else { m->x = m->d; m->d = x; }
        llmi_reduce(m, m->x, count);
        return;
    }
    if (m->ranks > 1) llmi_reduce(m, m->d, count);
    if (post) llmi_norm(m, m->d, NULL, post, rows, m->d);
}

/* One layer. The stream ends as x + pass.add: the last addition belongs to the next norm. */
static void llmi_pass_layer(llmi_model *m, const llmi_layer *l)
{
    moq_backend *be = m->be;
    llmi_pass *p = &m->pass;
    moq_batch b;
    b.rows = p->rows;
    b.max_pos = p->max_pos;
    b.slot = m->slot;
    b.pos = m->pos;
    if (l->mix) {
        llmi_norm(m, m->x, p->add, l->mix_norm, b.rows, m->h);
        llmi_mixings[l->mix](m, l, &b);
        be->linear(be, l->out, m->att, b.rows, m->d);
        llmi_pass_block(m, l->mix_post, b.rows);
    }
    if (l->feed) {
        llmi_norm(m, m->x, p->add, l->feed_norm, b.rows, m->h);
        llmi_feed(m, l, b.rows);
        llmi_pass_block(m, l->feed_post, b.rows);
    }
}

/* Caps logits: cap * tanh(x / cap). */
static void llmi_cap(float *x, size_t n, double cap)
{
    for (size_t i = 0; i < n; i++) x[i] = (float)(cap * tanh((double)x[i] / cap));
}

/* Logits [n, vocab] of h: those of this rank among zeros, and the sum of all ranks is everybody's. */
static void llmi_pass_divided(llmi_model *m, const void *h, int32_t n)
{
    int32_t vocab = m->c.vocab, part = m->head_part;
    void *own = llmi_act(m, m->logits, (int64_t)m->rank * part);
    moq_copy_desc zeros = {llmi_act(m, m->part, (int64_t)m->head_rows * part), m->logits, 0, vocab, 0, part, n, m->ranks, part};
    moq_copy_desc rows = {m->part, own, part, vocab, 0, 0, n, 1, part};
    m->be->copy_heads(m->be, &zeros);
    m->be->linear(m->be, m->head, h, n, n > 1 ? m->part : own);
    if (n > 1) m->be->copy_heads(m->be, &rows);
    llmi_reduce(m, m->logits, (size_t)n * (size_t)vocab);
}

/* Logits [p->cut, p->cut + count) of wanted rows [p->head, p->head + n) on the backend. */
static void llmi_pass_logits(llmi_model *m, int32_t n, int32_t count)
{
    llmi_pass *p = &m->pass;
    int64_t hidden = m->c.hidden;
    int32_t first = p->rows - p->wanted;
    const void *h;
    if (p->head == 0 && p->cut == 0)
        llmi_norm(m, llmi_act(m, m->x, first * hidden), p->add ? llmi_act(m, m->d, first * hidden) : NULL, m->final_norm, p->wanted,
                  llmi_act(m, m->h, first * hidden));
    h = llmi_act(m, m->h, (first + p->head) * hidden);
    if (m->head_part) llmi_pass_divided(m, h, n);
    else if (count < m->c.vocab) m->be->linear_rows(m->be, m->head, h, n, p->cut, count, m->logits);
    else m->be->linear(m->be, m->head, h, n, m->logits);
}

/* They go to the host, but for rows whose conversation has left; whole rows whose places are neighbours travel together. Or the largest of each row is
   chosen, which is no part of the recorded step: one recording serves those who sample, too. */
static void llmi_pass_give(llmi_model *m, int32_t n, int32_t count)
{
    const llmi_pass *p = &m->pass;
    size_t vocab = (size_t)m->c.vocab;
    float **out = m->out + p->rows - p->wanted + p->head;
    if (p->picks && p->cut + count == m->c.vocab) m->be->argmax(m->be, m->logits, n, m->c.vocab, m->best + p->head);
    for (int32_t at = 0, run; at < n && !p->picks; at += run) {
        size_t values = (size_t)count;
        run = 1;
        if (!out[at]) continue;
        for (; count == m->c.vocab && at + run < n && out[at + run] == out[at] + (size_t)run * vocab; run++) values += vocab;
        (p->sends ? m->be->send_act : m->be->download_act)(m->be, out[at] + p->cut, llmi_act(m, m->logits, at * (int64_t)vocab + p->cut), values);
        if (m->c.logit_cap > 0) llmi_cap(out[at] + p->cut, values, m->c.logit_cap);
    }
}

/* Waits for what all blocks queued, here and not at the end of the pass: the time is that of the output layer. */
static void llmi_pass_wait(llmi_model *m)
{
    moq_error err;
    if (m->pass.picks) m->be->download(m->be, m->picked, m->best, (size_t)m->pass.wanted * sizeof *m->picked);
    else if (m->pass.sends && m->be->sync(m->be, &err) < 0 && m->unsummed.code >= 0) m->unsummed = err;
}

/* Can the next block of the output layer be computed in slices? */
static int llmi_pass_slices(const llmi_model *m) { return m->be->linear_rows != NULL && !m->pass.computed && !m->head_part; }

/* The next block of wanted rows, or `most` more logits of each: a multiple of 64. */
static void llmi_pass_head(llmi_model *m, int32_t most)
{
    llmi_pass *p = &m->pass;
    int32_t left = p->wanted - p->head, n = left < m->head_rows ? left : m->head_rows, count = m->c.vocab - p->cut;
    if (most < count && llmi_pass_slices(m)) count = most;
    if (!p->computed) llmi_pass_logits(m, n, count);
    llmi_pass_give(m, n, count);
    p->cut += count;
    if (p->cut < m->c.vocab) return;
    p->cut = 0;
    p->head += n;
    if (p->head == p->wanted) llmi_pass_wait(m);
}

/* Is there nothing left to run? */
static int llmi_pass_done(const llmi_model *m)
{
    return m->pass.next > m->c.layers || (m->pass.next == m->c.layers && m->pass.head == m->pass.wanted);
}

/* Record a pass of one row up to its logits. A recording serves every position up to a power of two, so a sequence needs few of them: the
   device reads the position itself, the limit only sets how attention is divided. 0: this backend does not record it. */
static int llmi_pass_record(llmi_model *m)
{
    llmi_pass *p = &m->pass;
    moq_backend *be = m->be;
    int32_t pos = p->max_pos, most = 255;
    while (most < pos) most = 2 * most + 1;
    if (m->step) be->release_graph(be, m->step);
    m->step = NULL;
    m->step_most = p->max_pos = most < m->c.context ? most : m->c.context - 1;
    m->no_step = be->capture_begin(be, NULL) != MOQ_OK;
    if (!m->no_step) {
        llmi_pass_embed(m);
        for (int32_t i = 0; i < m->c.layers; i++) llmi_pass_layer(m, &m->layers[i]);
        llmi_pass_logits(m, 1, m->c.vocab);
        m->step = be->capture_end(be, NULL);
        m->no_step = !m->step;
        if (m->step && m->unsummed.code < 0) { be->release_graph(be, m->step); m->step = NULL; } /* a sum is missing in it: not this time */
    }
    p->max_pos = pos;
    p->add = NULL;
    return m->step != NULL;
}

/* The pass of a token that is being generated, from a recording: hundreds of launches become one. The first such pass runs unrecorded: code
   that a device loads on first use would end up in the recording. 0: it is not that kind of pass, or nothing can be recorded. */
static int llmi_pass_replay(llmi_model *m)
{
    llmi_pass *p = &m->pass;
    moq_backend *be = m->be;
    if (p->rows != 1 || p->wanted != 1 || m->no_step) return 0;
    if (!be->capture_begin || !be->capture_end || !be->replay || !be->release_graph || m->steps == 0) { m->steps = 1; return 0; }
    llmi_pass_upload(m);
    if ((!m->step || p->max_pos > m->step_most) && !llmi_pass_record(m)) return 0;
    be->replay(be, m->step);
    p->computed = 1;
    p->next = m->c.layers;
    return 1;
}

/* One unit; of the output layer at most so many logits. */
static void llmi_pass_unit(llmi_model *m, int32_t most)
{
    llmi_pass *p = &m->pass;
    if (p->next == LLMI_PASS_EMBED && llmi_pass_replay(m)) return;
    if (p->next == LLMI_PASS_EMBED) llmi_pass_upload(m);
    if (p->next == LLMI_PASS_EMBED) llmi_pass_embed(m);
    else if (p->next < m->c.layers) llmi_pass_layer(m, &m->layers[p->next]);
    else llmi_pass_head(m, most);
    if (p->next < m->c.layers) p->next++;
}

/* The sequences hold their rows from now on; a device error of any call since the last one comes out here. */
static moq_result llmi_pass_end(llmi_model *m, moq_error *err)
{
    const int32_t *pos = m->host + m->chunk, *slot = m->host + 2 * (size_t)m->chunk;
    moq_result code = m->be->sync(m->be, err);
    if (code >= 0 && m->ranks > 1 && m->desc->all_reduce_queues) llmi_reduce(m, NULL, 0);
    if (code >= 0 && m->unsummed.code < 0) {
        if (err) *err = m->unsummed;
        code = m->unsummed.code;
    }
    for (int32_t i = 0; i < m->pass.rows && code >= 0; i++) m->length[slot[i]] = pos[i] + 1;
    llmi_pass_clear(m);
    return code;
}

/* Everything that a caller can get wrong, before anything runs. */
static moq_result llmi_check_run(const llmi_model *m, int32_t slot, const int32_t *tokens, int32_t count, int32_t pos, moq_error *err)
{
    if (slot < 0 || slot >= m->slots) return moq_fail(err, MOQ_E_ARG, "slot", "%d is outside 0..%d; see llm_desc.slots", slot, m->slots - 1);
    if (!tokens || count <= 0) return moq_fail(err, MOQ_E_ARG, "tokens", "there must be at least one token, found %d", tokens ? count : 0);
    if (pos < 0) return moq_fail(err, MOQ_E_ARG, "pos", "%d is negative", pos);
    if (pos > m->length[slot])
        return moq_fail(err, MOQ_E_STATE, "pos", "%d leaves a gap: slot %d holds %d tokens; run what is between first", pos, slot,
                        m->length[slot]);
    if (m->stateful && pos && pos != m->length[slot])
        return moq_fail(err, MOQ_E_STATE, "pos", "%d goes back: slot %d holds %d tokens and the state of this model only moves on; start again from 0",
                        pos, slot, m->length[slot]);
    if (count > m->c.context - pos)
        return moq_fail(err, MOQ_E_STATE, "context", "%d tokens from position %d do not fit into %d; open with a larger llm_desc.context",
                        count, pos, m->c.context);
    for (int32_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= m->c.vocab)
            return moq_fail(err, MOQ_E_ARG, "tokens", "id %d at index %d is outside the vocabulary of %d", tokens[i], i, m->c.vocab);
    return MOQ_OK;
}

/* Any number of tokens of one sequence, chunk by chunk, without stopping. After an error the slot holds what m->length says.
   logits: [count, vocab] or NULL; last: [vocab] or NULL. */
static moq_result llmi_run(llmi_model *m, int32_t slot, const int32_t *tokens, int32_t count, int32_t pos, float *logits, float *last,
                           moq_error *err)
{
    moq_result code = llmi_check_run(m, slot, tokens, count, pos, err);
    size_t vocab = (size_t)m->c.vocab;
    for (int32_t at = 0, n; at < count && code >= 0; at += n) {
        n = count - at < m->chunk ? count - at : m->chunk;
        llmi_pass_clear(m);
        for (int32_t i = at; i < at + n; i++)
            llmi_pass_add(m, slot, tokens[i], pos + i, logits ? logits + (size_t)i * vocab : i + 1 == count ? last : NULL);
        while (!llmi_pass_done(m)) llmi_pass_unit(m, m->c.vocab);
        code = llmi_pass_end(m, err);
        if (code >= 0 && count > m->chunk) code = llmi_progress(m, MOQ_STAGE_PREFILL, at + n, count, err);
    }
    if (code >= 0 && logits && last) memcpy(last, logits + (size_t)(count - 1) * vocab, vocab * sizeof *last);
    return code;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-sample      sampling
   Pure: the same logits, settings and state give the same token. Looks at NaN as bits, so that -ffast-math changes nothing.
   ------------------------------------------------------------------------------------------------ */

/* Penalties and bias first; then temperature, top_k, top_p, min_p and typical_p in this order, as Transformers does it; what is left is
   drawn with one random number. Sums are in double and run in a fixed order. */

/* SplitMix64 (Steele, Lea, Flood 2014): any seed is a good seed. A number in [0, 1) of 53 bits. */
static double llmi_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return (double)(z >> 11) * (1.0 / 9007199254740992.0);
}

/* Floats as integers of the same order, so that infinities sort and NaN (0 here) loses against everything. */
static uint32_t llmi_rank(float v)
{
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0;
    if ((u & 0x7fffffffu) == 0) u = 0; /* -0 equals 0 */
    return u >> 31 ? ~u : u | 0x80000000u;
}

/* Signed integers in the order of the floats, but for NaN and for -0, which is below 0: what has a higher rank is above here too. */
static int32_t llmi_ordered(float v)
{
    int32_t i;
    memcpy(&i, &v, sizeof i);
    return i ^ (i < 0 ? 0x7fffffff : 0);
}

/* The largest logit, the lowest index among equals; -1 when none is above -infinity. Blocks of 64 without a larger one are passed over. */
static int32_t llmi_greedy(const float *logits, int32_t n)
{
    uint32_t best = 0x007fffffu;   /* the rank of -infinity */
    int32_t at = -1, order = -0x7f800001; /* its order */
    for (int32_t i = 0, end; i < n; i = end) {
        int32_t most = order;
        end = n - i < 64 ? n : i + 64;
        if (end == i + 64) {
            for (int32_t k = 0; k < 64; k++) most = llmi_ordered(logits[i + k]) > most ? llmi_ordered(logits[i + k]) : most;
            if (most == order) continue;
        }
        for (; i < end; i++) {
            uint32_t r = llmi_rank(logits[i]);
            if (r > best) { best = r; at = i; order = llmi_ordered(logits[i]); }
        }
    }
    return at;
}

/* The `most` largest logits in falling order, the lower index first among equals; at [most]. Returns how many are above -infinity. */
static int32_t llmi_top(const float *logits, int32_t n, int32_t most, int32_t *at)
{
    uint32_t least = 0x007fffffu; /* the rank that the next one must exceed */
    int32_t count = 0;
    for (int32_t i = 0; i < n && most > 0; i++) {
        uint32_t r = llmi_rank(logits[i]);
        if (r <= least) continue;
        int32_t k = count < most ? count++ : most - 1;
        for (; k > 0 && llmi_rank(logits[at[k - 1]]) < r; k--) at[k] = at[k - 1];
        at[k] = i;
        if (count == most) least = llmi_rank(logits[at[most - 1]]);
    }
    return count;
}

/* Does a come before b? Larger logit first, then lower index: a total order, so every heap gives the same sequence. */
static int llmi_before(const float *logits, int32_t a, int32_t b)
{
    uint32_t x = llmi_rank(logits[a]), y = llmi_rank(logits[b]);
    return x != y ? x > y : a < b;
}

/* Restore the heap (parents before children) below `at`. */
static void llmi_sift(const float *logits, int32_t *heap, int32_t n, int32_t at)
{
    int32_t moving = heap[at];
    for (;;) {
        int32_t child = 2 * at + 1;
        if (child >= n) break;
        if (child + 1 < n && llmi_before(logits, heap[child + 1], heap[child])) child++;
        if (!llmi_before(logits, heap[child], moving)) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = moving;
}

/* Is a setting a number inside (0, limit)? NaN is not. */
static int llmi_is_on(float v, float limit) { return llmi_rank(v) > llmi_rank(0.0f) && llmi_rank(v) < llmi_rank(limit); }

/* Takes the first of heap[0, *left) out and puts it behind them. */
static int32_t llmi_pop(const float *logits, int32_t *heap, int32_t *left)
{
    int32_t top = heap[0];
    heap[0] = heap[--*left];
    if (*left > 0) llmi_sift(logits, heap, *left, 0);
    heap[*left] = top;
    return top;
}

/* exp((logit - max) / T) */
static float llmi_weight(float logit, float max, float temperature)
{
    return llmi_rank(logit) > 0x007fffffu ? (float)exp(((double)logit - (double)max) / (double)temperature) : 0.0f;
}

/* Those of everything; returns the sum. */
static double llmi_weights(const float *logits, int32_t n, float max, float temperature, float *weight)
{
    double total = 0;
    for (int32_t i = 0; i < n; i++) total += weight[i] = llmi_weight(logits[i], max, temperature);
    return total;
}

/* Logits in falling order, sorted no further than they are asked for: they lie in buckets by (max - logit) / T, and a bucket becomes a heap when
   its turn comes. What lies beyond the last bucket has no weight: as a float, exp(-104) is 0. */
#define LLMI_PER_UNIT 64
#define LLMI_BUCKETS (104 * LLMI_PER_UNIT)

typedef struct llmi_falling {
    const float *logits;
    double max, scale;    /* scale: LLMI_PER_UNIT / T */
    int32_t *index;       /* [n]; the k-th largest, counted from 0, comes to index[n - 1 - k] */
    int32_t n, now, left; /* `left` of bucket `now` have not come yet */
    int32_t end[LLMI_BUCKETS + 1]; /* of each bucket in index, where the one before it begins */
} llmi_falling;

/* The llmi_ordered of a float below all that are in the first `buckets`, or of -infinity: one bucket lower, because a logit at the edge of the last
   one may be rounded into it here and out of it there, and near 0 many floats lie between. */
static int32_t llmi_below(const llmi_falling *f, int32_t buckets)
{
    double least = f->max - (buckets + 1) / f->scale;
    return least > -3e38 ? llmi_ordered((float)least) - 1 : -0x7f800001;
}

/* The bucket of logit i, or `buckets` when it is in none of so many. */
static int32_t llmi_bucket(const llmi_falling *f, int32_t i, int32_t buckets, int32_t below)
{
    int32_t order = llmi_ordered(f->logits[i]);
    if (order <= below || order >= 0x7f800000) return buckets; /* NaN lies beyond the infinity of its sign */
    double d = (f->max - (double)f->logits[i]) * f->scale;
    return d < buckets ? (int32_t)d : buckets;
}

/* Fills as many of the first `buckets` as it takes to have `most` logits, or weights of more than `enough` together. Returns how many logits that are. */
static int32_t llmi_fall(llmi_falling *f, int32_t buckets, int32_t most, double enough)
{
    int32_t below = llmi_below(f, buckets), used = 0, seen = 0;
    double all = 0;
    memset(f->end, 0, sizeof f->end);
    for (int32_t i = 0, b; i < f->n; i++)
        if ((b = llmi_bucket(f, i, buckets, below)) < buckets) f->end[b]++;
    for (; used < buckets && seen < most && all <= enough * 1.000001; used++) {
        int32_t count = f->end[used];
        seen += count;
        if (count) all += count * exp(-(used + 1.0) / LLMI_PER_UNIT); /* each is heavier */
        f->end[used] = f->n - seen;
    }
    below = llmi_below(f, used);
    for (int32_t i = 0, b; i < f->n; i++)
        if ((b = llmi_bucket(f, i, used, below)) < used) f->index[f->end[b]++] = i;
    f->end[used] = f->n - seen;
    f->now = -1;
    f->left = 0;
    return seen;
}

/* The next of those that there are. */
static int32_t llmi_next(llmi_falling *f)
{
    while (f->left == 0) {
        f->now++;
        f->left = f->end[f->now] - f->end[f->now + 1];
        for (int32_t i = f->left / 2; i-- > 0;) llmi_sift(f->logits, f->index + f->end[f->now + 1], f->left, i);
    }
    return llmi_pop(f->logits, f->index + f->end[f->now + 1], &f->left);
}

/* Candidates come in falling order until a filter is satisfied: top_k counts, then top_p wants that share of what top_k left, then min_p compares
   with the largest. total: of the weights of everything, or negative: weight [n] is filled in for candidates alone. Returns how many are kept;
   *mass is their weight. */
static int32_t llmi_filter(const llm_sampling *s, llmi_falling *f, double total, float *weight, double *mass)
{
    int counts = s->top_k > 0 && s->top_k < f->n, shares = llmi_is_on(s->top_p, 1.0f);
    int32_t most = counts ? s->top_k : f->n, buckets = LLMI_BUCKETS, come = 0, kept = 0;
    float least = llmi_is_on(s->min_p, 2.0f) ? s->min_p : 0;
    double enough = shares && !counts ? (double)s->top_p * total : 1e300, sum = 0;
    if (!counts && least > 0) buckets = least < 1 ? (int32_t)(-log((double)least) * LLMI_PER_UNIT) + 2 : 1;
    int32_t there = llmi_fall(f, buckets < LLMI_BUCKETS ? buckets : LLMI_BUCKETS, most, enough);
    if (most > there) most = there;
    for (; counts && come < most; come++) {
        int32_t id = llmi_next(f);
        sum += weight[id] = llmi_weight(f->logits[id], (float)f->max, s->temperature);
    }
    if (counts && shares) enough = (double)s->top_p * sum;
    for (*mass = 0; kept < most && *mass < enough; kept++) {
        int32_t id = kept < come ? f->index[f->n - 1 - kept] : llmi_next(f);
        if (kept >= come && total < 0) weight[id] = llmi_weight(f->logits[id], (float)f->max, s->temperature);
        if (kept > 0 && weight[id] < least) break;
        *mass += weight[id];
    }
    return kept;
}

/* Locally typical sampling (Meister et al. 2022): of the `kept` candidates, those whose surprise -log p is nearest to the entropy H, until
   they have the share typical_p of the mass. Candidates stand in falling order of p, so the nearest ones are always neighbours of the
   place where the surprise crosses H: [first, end) grows to the side that is nearer. Returns its mass. */
static double llmi_typical(const float *weight, const int32_t *last, int32_t kept, double mass, double typical, int32_t *first, int32_t *end)
{
    double entropy = 0, taken = 0;
    int32_t low = 0;
    for (int32_t i = 0; i < kept; i++) {
        double p = (double)weight[last[-i]] / mass;
        if (p > 0) entropy -= p * log(p);
    }
    while (low < kept && -log((double)weight[last[-low]] / mass) < entropy) low++;
    for (*first = *end = low; taken < typical * mass && (*first > 0 || *end < kept);) {
        double before = *first > 0 ? entropy + log((double)weight[last[-(*first - 1)]] / mass) : HUGE_VAL;
        double after = *end < kept ? -log((double)weight[last[-*end]] / mass) - entropy : HUGE_VAL;
        int32_t at = *first > 0 && before <= after ? --*first : (*end)++;
        taken += weight[last[-at]];
    }
    return taken;
}

/* A temperature that is no positive number is greedy. */
static int llmi_is_greedy(const llm_sampling *s) { return !s || !llmi_is_on(s->temperature, 1e30f) || s->top_k == 1; }

/* Does it leave out tokens that the others make unlikely? */
static int llmi_filters(const llm_sampling *s)
{
    return s->top_k > 0 || llmi_is_on(s->top_p, 1.0f) || llmi_is_on(s->min_p, 2.0f) || llmi_is_on(s->typical_p, 1.0f);
}

/* -1 when no logit is a number above -infinity. */
LLM_API int32_t llm_sample(const llm_sampling *s, const float *logits, int32_t vocab, uint64_t *state, float *scratch, int32_t *index)
{
    int32_t best = vocab > 0 && logits ? llmi_greedy(logits, vocab) : -1, kept, first = 0;
    double total = -1, mass, at;
    if (best < 0 || llmi_is_greedy(s) || !state || !scratch || !index) return best;
    if (llmi_rank(logits[best]) >= 0xff800000u) return best; /* +infinity */
    int counts = s->top_k > 0 && s->top_k < vocab, filters = llmi_filters(s);
    if (!filters || (!counts && llmi_is_on(s->top_p, 1.0f))) total = llmi_weights(logits, vocab, logits[best], s->temperature, scratch);
    at = llmi_random(state);
    if (filters) {
        llmi_falling f;
        f.logits = logits;
        f.max = (double)logits[best];
        f.scale = LLMI_PER_UNIT / (double)s->temperature;
        f.index = index;
        f.n = vocab;
        kept = llmi_filter(s, &f, total, scratch, &mass);
        if (llmi_is_on(s->typical_p, 1.0f)) mass = llmi_typical(scratch, index + vocab - 1, kept, mass, (double)s->typical_p, &first, &kept);
        at *= mass;
        for (int32_t i = first; i < kept; i++)
            if ((at -= scratch[index[vocab - 1 - i]]) < 0) return index[vocab - 1 - i];
        return index[vocab - 1 - first]; /* rounding left nothing: the likeliest */
    }
    at *= total;
    for (int32_t i = 0; i < vocab; i++)
        if ((at -= scratch[i]) < 0) return i;
    return best;
}

/* Does llm_penalize change anything? */
static int llmi_penalizes(const llm_sampling *s)
{
    return llmi_is_on(s->repetition_penalty, 1e30f) || llmi_rank(s->presence_penalty) != llmi_rank(0.0f) ||
           llmi_rank(s->frequency_penalty) != llmi_rank(0.0f) || (s->bias && s->bias_count > 0);
}

/* counts [vocab]: occurrences, those in the prompt and those in the answer counted apart: a token of the prompt alone gets no presence
   and no frequency penalty. Ids outside of the vocabulary are ignored. */
LLM_API void llm_penalize(const llm_sampling *s, const int32_t *tokens, size_t count, size_t answer, float *logits, int32_t vocab, int32_t *counts)
{
    size_t first = 0;
    float repetition = llmi_is_on(s->repetition_penalty, 1e30f) ? s->repetition_penalty : 1.0f;
    if (s->penalty_window > 0 && count > (size_t)s->penalty_window) first = count - (size_t)s->penalty_window;
    /* -1: in the prompt only */
    for (size_t i = first; i < count; i++)
        if (tokens[i] >= 0 && tokens[i] < vocab) counts[tokens[i]] = 0;
    for (size_t i = first; i < count; i++) {
        int32_t id = tokens[i];
        if (id < 0 || id >= vocab) continue;
        if (i >= answer) counts[id] = counts[id] > 0 ? counts[id] + 1 : 1;
        else counts[id] = -1;
    }
    for (size_t i = first; i < count; i++) {
        int32_t id = tokens[i], n;
        if (id < 0 || id >= vocab || (n = counts[id]) == 0) continue;
        counts[id] = 0; /* each token once */
        logits[id] = logits[id] > 0 ? logits[id] / repetition : logits[id] * repetition;
        if (n > 0) logits[id] -= s->presence_penalty + s->frequency_penalty * (float)n;
    }
    for (int32_t i = 0; s->bias && i < s->bias_count; i++)
        if (s->bias[i].id >= 0 && s->bias[i].id < vocab) logits[s->bias[i].id] += s->bias[i].add;
}

/* log(sum of exp(logits)), summed from the largest on down in index order, in double. */
static double llmi_log_sum(const float *logits, int32_t n, int32_t best)
{
    double sum = 0;
    for (int32_t i = 0; i < n; i++)
        if (llmi_rank(logits[i]) > 0x007fffffu) sum += exp((double)logits[i] - (double)logits[best]);
    return (double)logits[best] + log(sum);
}

/* The `top` likeliest tokens in falling order, ties: the lower id first; all log-probabilities are of the logits as they are given. */
LLM_API void llm_logprobs(const float *logits, int32_t vocab, int32_t id, int32_t top, llm_token *out)
{
    int32_t best = llmi_greedy(logits, vocab);
    double total = best < 0 ? 0 : llmi_log_sum(logits, vocab, best);
    memset(out, 0, sizeof *out);
    out->id = id;
    out->logprob = best < 0 || id < 0 ? 0 : (float)((double)logits[id] - total);
    if (top > LLM_TOP) top = LLM_TOP;
    out->top_count = llmi_top(logits, vocab, top, out->top_id);
    for (int32_t i = 0; i < out->top_count; i++) out->top_logprob[i] = (float)((double)logits[out->top_id[i]] - total);
}

/* ------------------------------------------------------------------------------------------------
   >>llm-grammar     grammars: automata over bytes with a stack
   A grammar is a table of states, and rules call each other. Built back to front, so that every state knows where it goes on.
   ------------------------------------------------------------------------------------------------ */

/* A text belongs to the grammar when the root rule can be walked from its start to an END along its bytes. A rule that is called
   leaves a frame behind, where it goes on at its END: with frames grammars nest (JSON does) and stay small. Every frame has a
   counter, which makes "3 to 500 times" one state instead of 500. */
enum {
    LLMI_G_END,    /* of the rule: on to the frame below */
    LLMI_G_BYTES,  /* one byte in one of the ranges [least, most), each with its own next */
    LLMI_G_SPLIT,  /* next or other */
    LLMI_G_CALL,   /* rule other, then next */
    LLMI_G_REPEAT, /* rule other least..most times, then next */
    LLMI_G_LOOP,   /* states from other to a BUMP, least..most times, then next; like REPEAT without a frame for each time */
    LLMI_G_BUMP,   /* counts one and goes back to its LOOP, next */
    LLMI_G_KEYS,   /* members of an object with free names, least..most: a key by rule other, then KEY_END extra; or next */
    LLMI_G_KEY_END /* the name is complete and must be new in this object: its value by rule other, then KEYS next */
};

typedef struct llmi_gstate {
    uint8_t kind, in_key; /* in_key: inside the free name of a member */
    uint8_t any_text;     /* a LOOP over the characters of a JSON string, all of them */
    int32_t rule;         /* it belongs to */
    int32_t loop;         /* the LOOP whose body it is part of, -1: none */
    int32_t next, other, extra;
    int32_t least, most;  /* most -1: no end */
} llmi_gstate;

typedef struct llmi_grange { uint8_t lo, hi; int32_t next; } llmi_grange;
typedef struct llmi_grule { int32_t start, weight; } llmi_grule; /* weight: levels of nesting it adds */
typedef struct llmi_gname { int32_t owner; uint32_t at, bytes; } llmi_gname; /* names that a KEY_END refuses; at: in words */

#define LLMI_G_MOST_STATES 400000
#define LLMI_G_MOST_WORK 100000000 /* states looked at while a grammar is measured */
#define LLMI_G_DEEP_JSON 32    /* containers; beyond, only the shortest way out is taken */
#define LLMI_G_DEEP_TEXT 500   /* calls of rules of a GBNF grammar */
#define LLMI_FAR (1 << 29)     /* no way to the end */

struct llm_grammar {
    moq_allocator a;
    llmi_gstate *states;
    llmi_grange *ranges;
    llmi_grule *rules;
    llmi_gname *names;
    size_t state_count, state_capacity, range_count, range_capacity, rule_count, rule_capacity, name_count, name_capacity;
    llmi_bytes words, top;  /* top: ranges of a state that is being built */
    int32_t root, deepest;
    int32_t *rest;          /* [rest_count] least bytes from each state to its END (in a loop's body: to its BUMP) */
    size_t rest_count;
    /* while building */
    int32_t rule, loop;
    uint8_t in_key;
    int failed;             /* 1: out of memory, 2: too many states */
};

/* Room for one more item; 0 and `failed` when there is none. */
static int llmi_g_room(llm_grammar *g, void **data, size_t count, size_t *capacity, size_t size)
{
    if (count < *capacity) return 1;
    void *p = count < LLMI_G_MOST_STATES ? llmi_grow(&g->a, *data, count, capacity, count + 1, size) : NULL;
    if (p) { *data = p; return 1; }
    if (!g->failed) g->failed = count < LLMI_G_MOST_STATES ? 1 : 2;
    return 0;
}

/* A new state of the present rule; after a failure some index that exists. */
static int32_t llmi_g_state(llm_grammar *g, int kind, int32_t next, int32_t other)
{
    void *p = g->states;
    if (!llmi_g_room(g, &p, g->state_count, &g->state_capacity, sizeof *g->states)) return 0;
    g->states = (llmi_gstate *)p;
    llmi_gstate *s = &g->states[g->state_count];
    memset(s, 0, sizeof *s);
    s->kind = (uint8_t)kind;
    s->in_key = g->in_key;
    s->rule = g->rule;
    s->loop = g->loop;
    s->next = next;
    s->other = other;
    return (int32_t)g->state_count++;
}

/* A new rule, whose start is set when it is known. */
static int32_t llmi_g_rule(llm_grammar *g, int32_t weight)
{
    void *p = g->rules;
    if (!llmi_g_room(g, &p, g->rule_count, &g->rule_capacity, sizeof *g->rules)) return 0;
    g->rules = (llmi_grule *)p;
    g->rules[g->rule_count].start = 0;
    g->rules[g->rule_count].weight = weight;
    return (int32_t)g->rule_count++;
}

/* One of the byte ranges [0, count). */
static int32_t llmi_g_bytes(llm_grammar *g, const llmi_grange *r, size_t count)
{
    int32_t s = llmi_g_state(g, LLMI_G_BYTES, 0, 0);
    size_t first = g->range_count;
    for (size_t i = 0; i < count; i++) {
        void *p = g->ranges;
        if (!llmi_g_room(g, &p, g->range_count, &g->range_capacity, sizeof *g->ranges)) return 0;
        g->ranges = (llmi_grange *)p;
        g->ranges[g->range_count++] = r[i];
    }
    if (g->failed) return 0;
    g->states[s].least = (int32_t)first;
    g->states[s].most = (int32_t)g->range_count;
    return s;
}

/* A byte lo..hi. */
static int32_t llmi_g_byte(llm_grammar *g, int lo, int hi, int32_t next)
{
    llmi_grange r;
    r.lo = (uint8_t)lo;
    r.hi = (uint8_t)hi;
    r.next = next;
    return llmi_g_bytes(g, &r, 1);
}

/* Exactly these bytes. */
static int32_t llmi_g_text(llm_grammar *g, const char *s, size_t n, int32_t next)
{
    while (n-- > 0) next = llmi_g_byte(g, (uint8_t)s[n], (uint8_t)s[n], next);
    return next;
}

/* a or b; -1 stands for nothing. */
static int32_t llmi_g_either(llm_grammar *g, int32_t a, int32_t b)
{
    return a < 0 ? b : b < 0 || a == b ? a : llmi_g_state(g, LLMI_G_SPLIT, a, b);
}

/* A state with a counter. */
static int32_t llmi_g_counted(llm_grammar *g, int kind, int32_t least, int32_t most, int32_t next, int32_t other)
{
    int32_t s = llmi_g_state(g, kind, next, other);
    if (g->failed) return 0;
    g->states[s].least = least;
    g->states[s].most = most;
    return s;
}

/* A byte of a digit string: from '0' + lo to '0' + hi. */
static int32_t llmi_g_digit(llm_grammar *g, int lo, int hi, int32_t next) { return llmi_g_byte(g, '0' + lo, '0' + hi, next); }

/* ---- sets of characters ---- */

/* Sets are sorted pairs low, high of code points. */
typedef struct llmi_gset { llmi_ids pairs; } llmi_gset;

/* Adds lo..hi behind what is there; 0: out of memory. */
static int llmi_gset_add(llmi_gset *s, uint32_t lo, uint32_t hi)
{
    int32_t pair[2];
    pair[0] = (int32_t)lo;
    pair[1] = (int32_t)hi;
    return lo > hi || llmi_ids_add(&s->pairs, pair, 2);
}

static int llmi_gset_has(const llmi_gset *s, uint32_t c)
{
    for (size_t i = 0; i < s->pairs.count; i += 2)
        if ((int32_t)c >= s->pairs.data[i] && (int32_t)c <= s->pairs.data[i + 1]) return 1;
    return 0;
}

/* Sort the pairs and join those that touch. */
static void llmi_gset_tidy(llmi_gset *s)
{
    int32_t *p = s->pairs.data;
    size_t n = s->pairs.count, out = 0;
    for (size_t i = 2; i < n; i += 2) { /* insertion: pairs come nearly sorted */
        int32_t lo = p[i], hi = p[i + 1];
        size_t k = i;
        for (; k > 0 && p[k - 2] > lo; k -= 2) { p[k] = p[k - 2]; p[k + 1] = p[k - 1]; }
        p[k] = lo;
        p[k + 1] = hi;
    }
    for (size_t i = 0; i < n; i += 2) {
        if (out && p[i] <= p[out - 1] + 1) { if (p[i + 1] > p[out - 1]) p[out - 1] = p[i + 1]; continue; }
        p[out] = p[i];
        p[out + 1] = p[i + 1];
        out += 2;
    }
    s->pairs.count = out;
}

/* Everything that is not in a tidy set; surrogates are no characters and stay out. 0: out of memory. */
static int llmi_gset_negate(llmi_gset *s)
{
    llmi_gset out = {{{NULL, NULL, NULL}, NULL, 0, 0}};
    uint32_t from = 0;
    int ok = 1;
    out.pairs.a = s->pairs.a;
    for (size_t i = 0; i < s->pairs.count && ok; i += 2) {
        if ((uint32_t)s->pairs.data[i] > from) ok = llmi_gset_add(&out, from, (uint32_t)s->pairs.data[i] - 1);
        from = (uint32_t)s->pairs.data[i + 1] + 1;
    }
    ok = ok && llmi_gset_add(&out, from, 0x10ffff);
    llmi_ids_drop(&s->pairs);
    *s = out;
    return ok;
}

/* The states after the first bytes of the characters being built: next for the last byte, and shared full continuations. */
typedef struct llmi_gutf { llm_grammar *g; int32_t next, tail[4]; } llmi_gutf;

/* Any `n` continuation bytes, then next. */
static int32_t llmi_g_tail(llmi_gutf *u, int n)
{
    if (n == 0) return u->next;
    if (u->tail[n] < 0) {
        int32_t after = llmi_g_tail(u, n - 1);
        u->tail[n] = llmi_g_byte(u->g, 0x80, 0xbf, after);
    }
    return u->tail[n];
}

/* Code points lo..hi: split until every byte has a range of its own, independent of the bytes before it. */
static void llmi_g_code_points(llmi_gutf *u, uint32_t lo, uint32_t hi)
{
    static const uint32_t last[] = {0x7f, 0x7ff, 0xd7ff, 0xdfff, 0xffff};
    char a[4], b[4];
    if (lo > hi || (lo >= 0xd800 && hi <= 0xdfff)) return;
    for (size_t i = 0; i < LLMI_COUNT(last); i++)
        if (lo <= last[i] && hi > last[i]) {
            llmi_g_code_points(u, lo, last[i]);
            llmi_g_code_points(u, last[i] + 1, hi);
            return;
        }
    for (uint32_t m = 0x3f; m < 0x1fffff && hi > 0x7f; m = m << 6 | 0x3f) {
        if ((lo & ~m) == (hi & ~m)) break;
        if (lo & m) { llmi_g_code_points(u, lo, lo | m); llmi_g_code_points(u, (lo | m) + 1, hi); return; }
        if ((hi & m) != m) { llmi_g_code_points(u, lo, (hi & ~m) - 1); llmi_g_code_points(u, hi & ~m, hi); return; }
    }
    size_t n = llmi_utf8_put(lo, a);
    llmi_grange r;
    memset(&r, 0, sizeof r);
    llmi_utf8_put(hi, b);
    r.next = u->next;
    for (size_t k = n; k-- > 1;) {
        int full = (uint8_t)a[k] == 0x80 && (uint8_t)b[k] == 0xbf && (k + 1 == n || r.next == u->tail[n - 1 - k]);
        r.next = full ? llmi_g_tail(u, (int)(n - k)) : llmi_g_byte(u->g, (uint8_t)a[k], (uint8_t)b[k], r.next);
    }
    r.lo = (uint8_t)a[0];
    r.hi = (uint8_t)b[0];
    if (!llmi_bytes_add(&u->g->top, (const char *)&r, sizeof r)) u->g->failed = 1;
}

/* The ranges collected in `top` since `mark` become a state. */
static int32_t llmi_g_collect(llm_grammar *g, size_t mark)
{
    size_t bytes = g->top.count - mark, count = bytes / sizeof(llmi_grange);
    llmi_grange *r = (llmi_grange *)moq_allocate(&g->a, bytes + 1);
    int32_t s = 0;
    if (!r) g->failed = 1;
    else {
        if (bytes) memcpy(r, g->top.data + mark, bytes);
        s = llmi_g_bytes(g, r, count);
    }
    moq_release(&g->a, r, bytes + 1);
    g->top.count = mark;
    return s;
}

/* One character of a tidy set. */
static int32_t llmi_g_char(llm_grammar *g, const llmi_gset *set, int32_t next)
{
    llmi_gutf u = {g, 0, {-1, -1, -1, -1}};
    size_t mark = g->top.count;
    u.next = next;
    for (size_t i = 0; i < set->pairs.count && !g->failed; i += 2)
        llmi_g_code_points(&u, (uint32_t)set->pairs.data[i], (uint32_t)set->pairs.data[i + 1]);
    return llmi_g_collect(g, mark);
}

/* ---- characters inside JSON strings ---- */

static const char llmi_g_short[] = "\"\\\b\f\n\r\t", llmi_g_letter[] = "\"\\bfnrt";

/* Four hexadecimal digits of a character other than NUL and surrogates: pairs of those are written as the character itself. */
static int32_t llmi_g_hex4(llm_grammar *g, int32_t next)
{
    static const struct { uint8_t lo, hi; } hex[] = {{'0', '9'}, {'a', 'f'}, {'A', 'F'}};
    llmi_grange r[8];
    int32_t any[4], zero = -1;
    any[0] = next;
    for (int n = 1; n < 4; n++) { /* any n digits */
        for (int i = 0; i < 3; i++) { r[i].lo = hex[i].lo; r[i].hi = hex[i].hi; r[i].next = any[n - 1]; }
        any[n] = llmi_g_bytes(g, r, 3);
    }
    for (int n = 1; n <= 4; n++) { /* n digits that are not all 0 */
        int k = 0;
        if (zero >= 0) { r[k].lo = r[k].hi = '0'; r[k++].next = zero; }
        for (int i = 0; i < 3; i++) {
            r[k].lo = i ? hex[i].lo : '1';
            r[k].hi = n < 4 || i == 0 ? hex[i].hi : (uint8_t)(hex[i].lo + 2); /* a..c at the beginning, then e and f */
            r[k++].next = any[n - 1];
        }
        if (n == 4) {
            int32_t low = llmi_g_byte(g, '0', '7', any[2]);
            r[k].lo = 'e'; r[k].hi = 'f'; r[k++].next = any[3];
            r[k].lo = 'E'; r[k].hi = 'F'; r[k++].next = any[3];
            r[k].lo = r[k].hi = 'd'; r[k++].next = low;
            r[k].lo = r[k].hi = 'D'; r[k++].next = low;
        }
        if (n < 4) zero = llmi_g_bytes(g, r, (size_t)k);
        else {
            size_t mark = g->top.count;
            if (!llmi_bytes_add(&g->top, (const char *)r, (size_t)k * sizeof *r)) g->failed = 1;
            return llmi_g_collect(g, mark);
        }
    }
    return 0;
}

/* What may follow a backslash for the characters of a set. `any`: all of them, so every escape is right. */
static int32_t llmi_g_escapes(llm_grammar *g, const llmi_gset *set, int any, int32_t next)
{
    static const char hex[] = "0123456789abcdef";
    llmi_grange r[16];
    size_t mark = g->top.count, k = 0;
    for (size_t i = 0; i < sizeof llmi_g_short - 1; i++)
        if (llmi_gset_has(set, (uint8_t)llmi_g_short[i])) { r[k].lo = r[k].hi = (uint8_t)llmi_g_letter[i]; r[k++].next = next; }
    if (any) {
        int32_t four = llmi_g_hex4(g, next);
        r[k].lo = r[k].hi = '/'; r[k++].next = next;
        r[k].lo = r[k].hi = 'u'; r[k++].next = four;
    }
    if (!llmi_bytes_add(&g->top, (const char *)r, k * sizeof *r)) g->failed = 1;
    for (uint32_t c = 1; c < 0x20 && !any; c++) {
        char text[5];
        llmi_grange u;
        if (!llmi_gset_has(set, c) || strchr(llmi_g_short, (int)c)) continue;
        memcpy(text, "u00", 3);
        text[3] = hex[c >> 4];
        text[4] = hex[c & 15];
        memset(&u, 0, sizeof u);
        u.lo = u.hi = 'u';
        u.next = llmi_g_text(g, text + 1, 4, next);
        if (!llmi_bytes_add(&g->top, (const char *)&u, sizeof u)) g->failed = 1;
    }
    return g->top.count > mark ? llmi_g_collect(g, mark) : -1;
}

/* One character of a tidy set as JSON strings write it: as itself where JSON allows that, escaped where it must be. */
static int32_t llmi_g_json_char(llm_grammar *g, const llmi_gset *set, int any, int32_t next)
{
    llmi_gutf u = {g, 0, {-1, -1, -1, -1}};
    int32_t escaped = llmi_g_escapes(g, set, any, next);
    size_t mark = g->top.count;
    u.next = next;
    for (size_t i = 0; i < set->pairs.count && !g->failed; i += 2) {
        static const uint32_t cut[] = {0x20, 0x22, 0x5c}; /* from here on; the character itself is left out */
        uint32_t lo = (uint32_t)set->pairs.data[i], hi = (uint32_t)set->pairs.data[i + 1];
        if (lo < cut[0]) lo = cut[0];
        for (int k = 1; k < 3; k++)
            if (lo <= cut[k] && hi >= cut[k]) {
                if (lo < cut[k]) llmi_g_code_points(&u, lo, cut[k] - 1);
                lo = cut[k] + 1;
            }
        llmi_g_code_points(&u, lo, hi);
    }
    if (escaped >= 0) {
        llmi_grange r;
        memset(&r, 0, sizeof r);
        r.lo = r.hi = '\\';
        r.next = escaped;
        if (!llmi_bytes_add(&g->top, (const char *)&r, sizeof r)) g->failed = 1;
    }
    return llmi_g_collect(g, mark);
}

/* ---- the way to the end ---- */

static int32_t llmi_g_sum(int32_t a, int32_t b) { return a >= LLMI_FAR || b >= LLMI_FAR || a + b >= LLMI_FAR ? LLMI_FAR : a + b; }
static int32_t llmi_g_times(int32_t n, int32_t a)
{
    return n == 0 ? 0 : a >= LLMI_FAR || (int64_t)n * a >= LLMI_FAR ? LLMI_FAR : n * a;
}

/* What one time around costs: of a REPEAT, a LOOP or KEYS. */
static int32_t llmi_g_unit(const llm_grammar *g, const int32_t *rest, const llmi_gstate *s)
{
    if (s->kind == LLMI_G_LOOP) return rest[s->other];
    if (s->kind == LLMI_G_REPEAT) return rest[g->rules[s->other].start];
    const llmi_gstate *end = &g->states[s->extra], *later = &g->states[end->next]; /* later members: with a comma */
    return llmi_g_sum(rest[g->rules[later->other].start], rest[g->rules[end->other].start]);
}

/* From a state to the end of its rule when its frame has counted to `count`; rest [states] as below. */
static int32_t llmi_g_rest(const llm_grammar *g, const int32_t *rest, int32_t state, int32_t count)
{
    const llmi_gstate *s = &g->states[state];
    if (s->loop >= 0) return llmi_g_sum(rest[state], llmi_g_rest(g, rest, s->loop, count + 1));
    if (s->kind == LLMI_G_KEY_END) return llmi_g_sum(rest[g->rules[s->other].start], llmi_g_rest(g, rest, s->next, count + 1));
    if ((s->kind != LLMI_G_REPEAT && s->kind != LLMI_G_LOOP && s->kind != LLMI_G_KEYS) || rest[state] >= LLMI_FAR) return rest[state];
    return rest[state] - (count < s->least ? count : s->least) * (s->least ? llmi_g_unit(g, rest, s) : 0);
}

/* From a state to the end of its rule, or LLMI_FAR, as far as its successors are known. single [256]: what one byte costs. */
static int32_t llmi_g_cost(const llm_grammar *g, const int32_t *rest, int32_t state, const int32_t *single)
{
    const llmi_gstate *s = &g->states[state];
    int32_t best = LLMI_FAR;
    switch (s->kind) {
    case LLMI_G_END: case LLMI_G_BUMP: return 0;
    case LLMI_G_BYTES:
        for (int32_t i = s->least; i < s->most; i++) {
            const llmi_grange *r = &g->ranges[i];
            int32_t after = rest[r->next];
            for (int b = r->lo; b <= r->hi && after < best; b++)
                if (llmi_g_sum(after, single[b]) < best) best = after + single[b];
        }
        return best;
    case LLMI_G_SPLIT: return rest[s->next] < rest[s->other] ? rest[s->next] : rest[s->other];
    case LLMI_G_CALL: return llmi_g_sum(rest[g->rules[s->other].start], rest[s->next]);
    case LLMI_G_KEY_END: return llmi_g_rest(g, rest, state, 0);
    case LLMI_G_KEYS: /* the first member by its own rule */
        if (s->least == 0) return rest[s->next];
        best = llmi_g_sum(llmi_g_times(s->least - 1, llmi_g_unit(g, rest, s)), rest[s->next]);
        return llmi_g_sum(best, llmi_g_sum(rest[g->rules[s->other].start], rest[g->rules[g->states[s->extra].other].start]));
    default: return llmi_g_sum(llmi_g_times(s->least, llmi_g_unit(g, rest, s)), rest[s->next]);
    }
}

/* rest [states] from single [256]: the least costs that agree with each other, found by lowering them until nothing changes. Passes
   go up and down in turn, so that chains of rules are short whichever way they were written. 0: it would take too long. */
static int llmi_g_measure(const llm_grammar *g, const int32_t *single, int32_t *rest)
{
    size_t n = g->state_count, changed = 1, work = 0;
    for (size_t i = 0; i < n; i++) rest[i] = LLMI_FAR;
    for (int down = 1; changed; down = !down) {
        changed = 0;
        if ((work += n) > LLMI_G_MOST_WORK) return 0;
        for (size_t k = 0; k < n; k++) {
            size_t i = down ? n - 1 - k : k;
            int32_t cost = llmi_g_cost(g, rest, (int32_t)i, single);
            if (cost < rest[i]) { rest[i] = cost; changed = 1; }
        }
    }
    return 1;
}

/* Are all rules that `rule` may call before its first byte in `fine`? stack, seen [states]. */
static int llmi_g_begins_fine(const llm_grammar *g, int32_t rule, const uint8_t *fine, int32_t *stack, int32_t *seen)
{
    size_t n = 0;
    stack[n++] = g->rules[rule].start;
    while (n > 0) {
        int32_t at = stack[--n];
        const llmi_gstate *s = &g->states[at];
        int calls = s->kind == LLMI_G_CALL || s->kind == LLMI_G_REPEAT || s->kind == LLMI_G_KEYS, passes = 0;
        if (seen[at] == rule + 1 || g->rest[at] >= LLMI_FAR) continue;
        seen[at] = rule + 1;
        if (calls && !fine[s->other] && g->rest[g->rules[s->other].start] < LLMI_FAR) return 0;
        if (s->kind == LLMI_G_SPLIT || s->kind == LLMI_G_LOOP) stack[n++] = s->other;
        if (calls) passes = g->rest[g->rules[s->other].start] == 0; /* a byte costs at least 1, so this rule can be empty */
        if (s->kind == LLMI_G_SPLIT || passes || (s->kind >= LLMI_G_REPEAT && s->kind != LLMI_G_BUMP && s->least == 0)) stack[n++] = s->next;
    }
    return 1;
}

/* A rule that begins with itself, or -1: such a rule would call itself for ever. -2: out of memory; -3: it would take too long. */
static int32_t llmi_g_left_recursion(const llm_grammar *g)
{
    llmi_arena r = llmi_arena_make(&g->a);
    int32_t *stack = (int32_t *)llmi_take(&r, 2 * g->state_count + 2, sizeof *stack), *seen = (int32_t *)llmi_take(&r, g->state_count, sizeof *seen);
    uint8_t *fine = (uint8_t *)llmi_take(&r, g->rule_count, 1);
    int32_t found = stack && seen && fine ? -1 : -2, n = (int32_t)g->rule_count;
    size_t work = 0;
    for (int changed = found == -1, down = 1; changed; down = !down) {
        changed = 0;
        found = -1;
        if ((work += g->state_count) > LLMI_G_MOST_WORK) { found = -3; break; }
        memset(seen, 0, g->state_count * sizeof *seen);
        for (int32_t k = 0; k < n; k++) {
            int32_t i = down ? n - 1 - k : k;
            if (fine[i]) continue;
            if (llmi_g_begins_fine(g, i, fine, stack, seen)) { fine[i] = 1; changed = 1; }
            else if (found < 0 || i < found) found = i;
        }
    }
    llmi_arena_drop(&r);
    return found;
}

/* Give back everything; NULL is allowed. */
LLM_API void llm_grammar_destroy(llm_grammar *g)
{
    if (!g) return;
    moq_allocator a = g->a;
    moq_release(&a, g->states, g->state_capacity * sizeof *g->states);
    moq_release(&a, g->ranges, g->range_capacity * sizeof *g->ranges);
    moq_release(&a, g->rules, g->rule_capacity * sizeof *g->rules);
    moq_release(&a, g->names, g->name_capacity * sizeof *g->names);
    moq_release(&a, g->rest, g->rest_count * sizeof *g->rest);
    llmi_bytes_drop(&g->words);
    llmi_bytes_drop(&g->top);
    moq_release(&a, g, sizeof *g);
}

/* An empty grammar, or NULL. */
static llm_grammar *llmi_g_make(const moq_allocator *a)
{
    llm_grammar *g = (llm_grammar *)moq_allocate(a, sizeof *g);
    if (!g) return NULL;
    if (a) g->a = *a;
    g->words = llmi_bytes_make(a);
    g->top = llmi_bytes_make(a);
    g->loop = -1;
    return g;
}

/* The grammar is written: measure it and refuse what never ends or never begins. root_name and where are for errors. */
static moq_result llmi_g_finish(llm_grammar *g, const char *where, int32_t *recursive, moq_error *err)
{
    int32_t single[256];
    for (int i = 0; i < 256; i++) single[i] = 1;
    *recursive = -1;
    if (g->failed == 2)
        return moq_fail(err, MOQ_E_LIMIT, where, "needs more than %d states; give it smaller counts, lengths or fewer alternatives", LLMI_G_MOST_STATES);
    g->rest = g->failed ? NULL : (int32_t *)moq_allocate(&g->a, g->state_count * sizeof *g->rest);
    if (!g->rest) return llmi_nomem(err, where);
    g->rest_count = g->state_count;
    int measured = llmi_g_measure(g, single, g->rest);
    *recursive = measured ? llmi_g_left_recursion(g) : -1;
    if (*recursive == -2) return llmi_nomem(err, where);
    if (!measured || *recursive == -3)
        return moq_fail(err, MOQ_E_LIMIT, where, "its rules lead to each other in too many and too long ways; give it fewer rules");
    if (*recursive >= 0) return MOQ_E_GRAMMAR; /* the caller knows its name */
    if (g->rest[g->rules[g->root].start] >= LLMI_FAR)
        return moq_fail(err, MOQ_E_GRAMMAR, where,
                            "no finite text satisfies it: what it requires contains itself again without end; let one of its parts be left out or empty");
    return MOQ_OK;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-gbnf        grammars written by hand
   The GBNF notation of llama.cpp: name ::= alternatives. Anything else than that notation is refused with its line.
   ------------------------------------------------------------------------------------------------ */

/* A grammar is read forwards but built back to front: an alternative is first split into its items, then built from its end. */
typedef struct llmi_gbnf {
    llm_grammar *g;
    const char *text, *s, *end;
    moq_result code;
    moq_error *err;
    llmi_ids names;       /* of each rule: offset in text, bytes, line it was first used in, defined */
    llmi_ids items;       /* stack of item starts and ends, offsets in text */
    int depth;
} llmi_gbnf;

enum { LLMI_GBNF_RULE = 4, LLMI_GBNF_MOST_RULES = 4000 }; /* numbers of a rule in `names`; rules of a grammar */

static int llmi_gbnf_line(const llmi_gbnf *b, const char *at)
{
    int line = 1;
    for (const char *p = b->text; p < at; p++) line += *p == '\n';
    return line;
}

/* The first failure counts, and nothing is read after it. */
static int32_t llmi_gbnf_fail(llmi_gbnf *b, const char *what)
{
    if (b->code >= 0) {
        const char *at = b->s < b->end ? b->s : b->end;
        char rest[24];
        size_t n = 0;
        for (; at + n < b->end && n < sizeof rest - 1 && at[n] != '\n'; n++) rest[n] = at[n];
        rest[n] = 0;
        if (n) b->code = moq_fail(b->err, MOQ_E_GRAMMAR, "grammar", "line %d, before '%q': %s", llmi_gbnf_line(b, at), rest, what);
        else b->code = moq_fail(b->err, MOQ_E_GRAMMAR, "grammar", "line %d, at its end: %s", llmi_gbnf_line(b, at), what);
    }
    b->s = b->end;
    return 0;
}

static void llmi_gbnf_nomem(llmi_gbnf *b)
{
    if (b->code >= 0) b->code = llmi_nomem(b->err, "grammar");
    b->s = b->end;
}

/* Blanks and comments; lines: line ends too. */
static void llmi_gbnf_skip(llmi_gbnf *b, int lines)
{
    while (b->s < b->end) {
        char c = *b->s;
        if (c == '#') while (b->s < b->end && *b->s != '\n') b->s++;
        else if (c == ' ' || c == '\t' || c == '\r' || (lines && c == '\n')) b->s++;
        else break;
    }
}

static int llmi_gbnf_is_name(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_';
}

/* The rule of the name at s, made when it is new. */
static int32_t llmi_gbnf_rule(llmi_gbnf *b)
{
    const char *from = b->s;
    int32_t entry[LLMI_GBNF_RULE];
    while (b->s < b->end && llmi_gbnf_is_name(*b->s)) b->s++;
    size_t n = (size_t)(b->s - from);
    if (n == 0) return llmi_gbnf_fail(b, "the name of a rule was expected");
    for (size_t i = 0; i < b->names.count; i += LLMI_GBNF_RULE) {
        const int32_t *e = b->names.data + i;
        if ((size_t)e[1] == n && memcmp(b->text + e[0], from, n) == 0) return (int32_t)(i / LLMI_GBNF_RULE);
    }
    if (b->names.count >= (size_t)LLMI_GBNF_RULE * LLMI_GBNF_MOST_RULES) return llmi_gbnf_fail(b, "more rules than a grammar may have (4000)");
    entry[0] = (int32_t)(from - b->text);
    entry[1] = (int32_t)n;
    entry[2] = llmi_gbnf_line(b, from);
    entry[3] = 0;
    int32_t rule = llmi_g_rule(b->g, 1); /* in step with names: nothing else makes rules before all names are known */
    if (!llmi_ids_add(&b->names, entry, LLMI_GBNF_RULE)) llmi_gbnf_nomem(b);
    return rule;
}

/* One character of a literal or a class, escapes resolved. */
static uint32_t llmi_gbnf_char(llmi_gbnf *b)
{
    static const char names[] = "nrt\\\"[]-^/'", codes[] = "\n\r\t\\\"[]-^/'";
    uint32_t cp = 0;
    if (b->s >= b->end || *b->s == '\n') return (uint32_t)llmi_gbnf_fail(b, "a literal or a class is not closed");
    if (*b->s != '\\') {
        b->s += llmi_utf8_get(b->s, (size_t)(b->end - b->s), &cp, NULL);
        return cp;
    }
    if (++b->s >= b->end) return (uint32_t)llmi_gbnf_fail(b, "a backslash at the end");
    char e = *b->s++;
    const char *at = strchr(names, e);
    int digits = e == 'x' ? 2 : e == 'u' ? 4 : e == 'U' ? 8 : 0;
    if (e && at) return (uint8_t)codes[at - names];
    if (!digits) return (uint32_t)llmi_gbnf_fail(b, "an escape that is none of \\n \\r \\t \\\\ \\\" \\[ \\] \\xHH \\uHHHH \\UHHHHHHHH");
    for (int i = 0; i < digits; i++, b->s++) {
        int h = b->s < b->end ? llmi_hex(*b->s) : -1;
        if (h < 0) return (uint32_t)llmi_gbnf_fail(b, "too few hexadecimal digits");
        cp = cp << 4 | (uint32_t)h;
    }
    if (cp > 0x10ffff || (cp >= 0xd800 && cp <= 0xdfff)) return (uint32_t)llmi_gbnf_fail(b, "no character has this code");
    return cp;
}

/* [...] after the bracket, or `.`: the set. */
static void llmi_gbnf_class(llmi_gbnf *b, llmi_gset *set)
{
    int negate = b->s < b->end && *b->s == '^', ok = 1;
    b->s += negate;
    while (b->s < b->end && *b->s != ']') {
        uint32_t lo = llmi_gbnf_char(b), hi = lo;
        if (b->end - b->s > 1 && *b->s == '-' && b->s[1] != ']') { b->s++; hi = llmi_gbnf_char(b); }
        if (hi < lo) { llmi_gbnf_fail(b, "a range out of order"); return; }
        ok = ok && llmi_gset_add(set, lo, hi);
    }
    if (b->s >= b->end) { llmi_gbnf_fail(b, "[ without ]"); return; }
    b->s++;
    llmi_gset_tidy(set);
    if (negate) ok = ok && llmi_gset_negate(set);
    if (!ok) llmi_gbnf_nomem(b);
    else if (set->pairs.count == 0) llmi_gbnf_fail(b, "a class without characters");
}

/* * + ? {n} {n,} {n,m}: 1 when there is one. most -1: no end. */
static int llmi_gbnf_quantifier(llmi_gbnf *b, int32_t *least, int32_t *most)
{
    char k = b->s < b->end ? *b->s : 0;
    if (k != '*' && k != '+' && k != '?' && k != '{') return 0;
    b->s++;
    *least = k == '+';
    *most = k == '?' ? 1 : -1;
    if (k != '{') return 1;
    int64_t number[2] = {0, -1};
    int which = 0, digits = 0;
    for (; b->s < b->end && *b->s != '}'; b->s++) {
        if (*b->s == ',' && which == 0) { which = 1; digits = 0; continue; }
        if (*b->s == ' ') continue;
        if (*b->s < '0' || *b->s > '9') break;
        if (digits++ == 0) number[which] = 0;
        number[which] = number[which] * 10 + (*b->s - '0');
        if (number[which] > 1000000) { llmi_gbnf_fail(b, "a count over 1000000"); return 0; }
    }
    if (b->s >= b->end || *b->s != '}' || (which == 0 && digits == 0)) { llmi_gbnf_fail(b, "a malformed {n,m}"); return 0; }
    b->s++;
    if (which == 0) number[1] = number[0];
    if (number[1] >= 0 && number[1] < number[0]) { llmi_gbnf_fail(b, "{n,m} with m under n"); return 0; }
    *least = (int32_t)number[0];
    *most = (int32_t)number[1];
    return 1;
}

static int32_t llmi_gbnf_alternatives(llmi_gbnf *b, int nested, int32_t next);

/* Steps over one item without building it. */
static void llmi_gbnf_pass(llmi_gbnf *b)
{
    char k = *b->s, close = k == '"' ? '"' : k == '[' ? ']' : 0;
    if (close) {
        b->s++;
        while (b->s < b->end && *b->s != close) {
            if (*b->s == '\n') { llmi_gbnf_fail(b, "a literal or a class is not closed"); return; }
            b->s += *b->s == '\\' && b->end - b->s > 1 ? 2 : 1;
        }
        if (b->s >= b->end) llmi_gbnf_fail(b, "a literal or a class is not closed");
        else b->s++;
    } else if (k == '(') {
        if (++b->depth > 100) { llmi_gbnf_fail(b, "groups nested too deeply"); return; }
        b->s++;
        for (llmi_gbnf_skip(b, 1); b->s < b->end && *b->s != ')'; llmi_gbnf_skip(b, 1)) {
            if (*b->s == '|' || strchr("*+?{}, 0123456789", *b->s)) b->s++;
            else llmi_gbnf_pass(b);
        }
        if (b->s >= b->end) llmi_gbnf_fail(b, "( without )");
        else b->s++;
        b->depth--;
    } else if (k == '.') {
        b->s++;
    } else if (llmi_gbnf_is_name(k)) {
        llmi_gbnf_rule(b);
    } else {
        llmi_gbnf_fail(b, "this is no literal, class, group or name");
    }
}

/* One item at s, followed by `next`. */
static int32_t llmi_gbnf_item(llmi_gbnf *b, int32_t next)
{
    llmi_gset set = {{{NULL, NULL, NULL}, NULL, 0, 0}};
    char k = *b->s;
    set.pairs.a = b->g->a;
    if (k == '"') {
        size_t mark = b->g->words.count, n;
        for (b->s++; b->s < b->end && *b->s != '"';) {
            char put[4];
            if (!llmi_bytes_add(&b->g->words, put, llmi_utf8_put(llmi_gbnf_char(b), put))) llmi_gbnf_nomem(b);
        }
        b->s++;
        n = b->g->words.count - mark;
        while (n-- > 0) next = llmi_g_byte(b->g, (uint8_t)b->g->words.data[mark + n], (uint8_t)b->g->words.data[mark + n], next);
        b->g->words.count = mark;
    } else if (k == '[' || k == '.') {
        b->s++;
        if (k == '[') llmi_gbnf_class(b, &set);
        else if (!llmi_gset_negate(&set)) llmi_gbnf_nomem(b);
        next = llmi_g_char(b->g, &set, next);
    } else if (k == '(') {
        b->s++;
        next = llmi_gbnf_alternatives(b, 1, next);
        if (b->code >= 0 && (b->s >= b->end || *b->s != ')')) llmi_gbnf_fail(b, "( without )");
        else b->s++;
    } else {
        int32_t rule = llmi_gbnf_rule(b);
        next = llmi_g_state(b->g, LLMI_G_CALL, next, rule);
    }
    llmi_ids_drop(&set.pairs);
    return next;
}

/* An item with its quantifier: a class is counted in place, anything else becomes a rule of its own. */
static int32_t llmi_gbnf_counted(llmi_gbnf *b, int32_t least, int32_t most, int32_t next)
{
    llm_grammar *g = b->g;
    if ((*b->s == '[' || *b->s == '.') && g->loop < 0) {
        int32_t loop = llmi_g_counted(g, LLMI_G_LOOP, least, most, next, 0);
        g->loop = loop;
        int32_t bump = llmi_g_state(g, LLMI_G_BUMP, loop, 0), body = llmi_gbnf_item(b, bump);
        g->loop = -1;
        if (!g->failed) g->states[loop].other = body;
        return loop;
    }
    int32_t rule = llmi_g_rule(g, 1), outer = g->rule;
    g->rule = rule;
    int32_t last = llmi_g_state(g, LLMI_G_END, 0, 0), start = llmi_gbnf_item(b, last);
    g->rule = outer;
    if (!g->failed) g->rules[rule].start = start;
    return llmi_g_counted(g, LLMI_G_REPEAT, least, most, next, rule);
}

/* Items up to | or ) or, outside of groups, the end of the line, followed by `next`. */
static int32_t llmi_gbnf_sequence(llmi_gbnf *b, int nested, int32_t next)
{
    size_t mark = b->items.count, count;
    int32_t least, most;
    for (;;) {
        llmi_gbnf_skip(b, nested);
        if (b->s >= b->end || *b->s == '|' || *b->s == ')' || *b->s == '\n') break;
        int32_t at = (int32_t)(b->s - b->text);
        llmi_gbnf_pass(b);
        while (llmi_gbnf_quantifier(b, &least, &most)) {}
        if (!llmi_ids_add(&b->items, &at, 1)) llmi_gbnf_nomem(b);
    }
    const char *after = b->s;
    count = b->items.count - mark;
    for (size_t i = count; i-- > 0 && b->code >= 0 && !b->g->failed;) {
        b->s = b->text + b->items.data[mark + i];
        const char *start = b->s;
        llmi_gbnf_pass(b);
        const char *quantifier = b->s;
        int counted = llmi_gbnf_quantifier(b, &least, &most);
        if (counted && b->s < b->end && (*b->s == '*' || *b->s == '+' || *b->s == '?' || *b->s == '{')) llmi_gbnf_fail(b, "two quantifiers; use a group");
        if (b->code < 0) break;
        b->s = start;
        next = counted ? llmi_gbnf_counted(b, least, most, next) : llmi_gbnf_item(b, next);
        if (b->s != quantifier && b->code >= 0) llmi_gbnf_fail(b, "this item is malformed");
    }
    b->items.count = mark;
    if (b->code >= 0) b->s = after;
    return next;
}

/* a | b | c, each followed by `next`. A line may end after a |. */
static int32_t llmi_gbnf_alternatives(llmi_gbnf *b, int nested, int32_t next)
{
    int32_t all = -1;
    if (++b->depth > 100) return llmi_gbnf_fail(b, "groups nested too deeply");
    for (;;) {
        int32_t one = llmi_gbnf_sequence(b, nested, next);
        all = llmi_g_either(b->g, all, one);
        if (b->s < b->end && *b->s == '\n') { /* llama.cpp lets the next line begin with | */
            const char *line = b->s;
            llmi_gbnf_skip(b, 1);
            if (b->s >= b->end || *b->s != '|') { b->s = line; break; }
        }
        if (b->s >= b->end || *b->s != '|') break;
        b->s++;
        llmi_gbnf_skip(b, 1);
    }
    b->depth--;
    return all;
}

/* All names come first, so that rules are numbered like names: every line "name ::=". */
static void llmi_gbnf_names(llmi_gbnf *b)
{
    for (const char *p = b->text; p + 3 <= b->end; p++) {
        if (memcmp(p, "::=", 3) != 0) continue;
        const char *q = p;
        while (q > b->text && (q[-1] == ' ' || q[-1] == '\t')) q--;
        while (q > b->text && llmi_gbnf_is_name(q[-1])) q--;
        b->s = q;
        if (llmi_gbnf_is_name(*q)) llmi_gbnf_rule(b);
    }
    b->s = b->text;
}

/* One rule after the other. */
static void llmi_gbnf_read(llmi_gbnf *b)
{
    llm_grammar *g = b->g;
    size_t known;
    llmi_gbnf_names(b);
    known = b->names.count;
    for (llmi_gbnf_skip(b, 1); b->s < b->end && b->code >= 0 && !g->failed; llmi_gbnf_skip(b, 1)) {
        int32_t rule = llmi_gbnf_rule(b);
        llmi_gbnf_skip(b, 0);
        if (b->end - b->s < 3 || memcmp(b->s, "::=", 3) != 0) { llmi_gbnf_fail(b, "::= was expected"); break; }
        b->s += 3;
        if (b->names.data[rule * LLMI_GBNF_RULE + 3]++) { llmi_gbnf_fail(b, "this rule is defined a second time"); break; }
        llmi_gbnf_skip(b, 1);
        g->rule = rule;
        int32_t last = llmi_g_state(g, LLMI_G_END, 0, 0), start = llmi_gbnf_alternatives(b, 0, last);
        if (!g->failed) g->rules[rule].start = start;
        if (b->code >= 0 && b->s < b->end && *b->s != '\n') llmi_gbnf_fail(b, "a ) without (");
        if (b->code >= 0 && b->names.count != known) {
            const int32_t *e = b->names.data + known;
            b->code = moq_fail(b->err, MOQ_E_GRAMMAR, "grammar",
                                "line %d uses the rule '%.*s', which is not defined; add it, or correct its name", (int)e[2], (int)e[1], b->text + e[0]);
        }
    }
    for (size_t i = 0; i < g->state_count && b->code >= 0; i++) { /* "::=" in a literal looks like a definition, so uses are checked too */
        const llmi_gstate *s = &g->states[i];
        const int32_t *e = s->kind == LLMI_G_CALL && (size_t)s->other < known / LLMI_GBNF_RULE ? b->names.data + s->other * LLMI_GBNF_RULE : NULL;
        if (e && !e[3])
            b->code = moq_fail(b->err, MOQ_E_GRAMMAR, "grammar",
                                "line %d uses the rule '%.*s', which is not defined; add it, or correct its name", (int)e[2], (int)e[1], b->text + e[0]);
    }
    g->root = -1;
    for (size_t i = 0; i < b->names.count; i += LLMI_GBNF_RULE)
        if (b->names.data[i + 1] == 4 && memcmp(b->text + b->names.data[i], "root", 4) == 0) g->root = (int32_t)(i / LLMI_GBNF_RULE);
    if (b->code >= 0 && g->root < 0) b->code = moq_fail(b->err, MOQ_E_GRAMMAR, "grammar", "has no rule 'root'; that is where every text begins");
}

/* Compile GBNF text into g. */
static moq_result llmi_gbnf_compile(llm_grammar *g, const char *text, size_t bytes, moq_error *err)
{
    llmi_gbnf b;
    int32_t loop = -1;
    memset(&b, 0, sizeof b);
    b.g = g;
    b.text = b.s = text;
    b.end = text + bytes;
    b.err = err;
    b.names = llmi_ids_make(&g->a);
    b.items = llmi_ids_make(&g->a);
    g->deepest = LLMI_G_DEEP_TEXT;
    if (bytes > INT32_MAX / 2) b.code = moq_fail(err, MOQ_E_LIMIT, "grammar", "has %zu bytes", bytes);
    else llmi_gbnf_read(&b);
    if (b.code >= 0) b.code = llmi_g_finish(g, "grammar", &loop, err);
    if (loop >= 0) {
        const int32_t *e = loop < (int32_t)(b.names.count / LLMI_GBNF_RULE) ? b.names.data + loop * LLMI_GBNF_RULE : NULL;
        moq_fail(err, MOQ_E_GRAMMAR, "grammar", "the rule '%.*s' begins with itself (left recursion); write the repetition with * or + instead",
                 e ? (int)e[1] : 7, e ? text + e[0] : "(group)");
    }
    llmi_ids_drop(&b.names);
    llmi_ids_drop(&b.items);
    return b.code;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-values      numbers with bounds and strings with patterns, as states of a grammar
   Bounds are exact decimals, never floats: what an automaton lets through is inside them.
   ------------------------------------------------------------------------------------------------ */

#define LLMI_DEC_DIGITS 40

/* (-1)^minus * digits * 10^exponent, no zeros at either end; zero has no digits. */
typedef struct llmi_dec { int minus, count, exponent; char digit[LLMI_DEC_DIGITS]; } llmi_dec;

/* A JSON number; 0: more than LLMI_DEC_DIGITS digits, or an exponent beyond them. */
static int llmi_dec_read(llmi_dec *d, const char *s)
{
    int fraction = 0, e = 0, minus = 0;
    memset(d, 0, sizeof *d);
    if (*s == '-') { d->minus = 1; s++; }
    for (; (*s >= '0' && *s <= '9') || *s == '.'; s++) {
        if (*s == '.') { fraction = 1; continue; }
        if (fraction) d->exponent--;
        if (*s == '0' && d->count == 0) continue;
        if (d->count == LLMI_DEC_DIGITS) return 0;
        d->digit[d->count++] = *s;
    }
    if (*s == 'e' || *s == 'E') {
        s++;
        if (*s == '-' || *s == '+') minus = *s++ == '-';
        for (; *s >= '0' && *s <= '9'; s++) e = e > 1000 ? e : e * 10 + (*s - '0');
        d->exponent += minus ? -e : e;
    }
    for (; d->count && d->digit[d->count - 1] == '0'; d->count--) d->exponent++;
    if (d->count == 0) d->minus = d->exponent = 0;
    return d->count + d->exponent <= LLMI_DEC_DIGITS && d->exponent >= -LLMI_DEC_DIGITS;
}

/* -1, 0 or 1. */
static int llmi_dec_compare(const llmi_dec *a, const llmi_dec *b)
{
    int sign = a->minus ? -1 : 1, order = 0;
    if (a->count == 0 || b->count == 0) return a->count ? sign : b->count ? (b->minus ? 1 : -1) : 0;
    if (a->minus != b->minus) return sign;
    if (a->count + a->exponent != b->count + b->exponent) return a->count + a->exponent > b->count + b->exponent ? sign : -sign;
    for (int i = 0; !order && (i < a->count || i < b->count); i++)
        order = (i < a->count ? a->digit[i] : '0') - (i < b->count ? b->digit[i] : '0');
    return order > 0 ? sign : order < 0 ? -sign : 0;
}

/* A whole number of steps of 10^-places, as digits. */
typedef struct llmi_whole { int minus, count; char digit[2 * LLMI_DEC_DIGITS + 4]; } llmi_whole;

/* The magnitude plus (by 1) or minus (by -1) one. Zero minus one is -1. */
static void llmi_whole_step(llmi_whole *w, int by)
{
    int i = w->count - 1;
    if (by < 0 && w->count == 0) { w->minus = !w->minus; by = 1; }
    if (by > 0) {
        for (; i >= 0 && w->digit[i] == '9'; i--) w->digit[i] = '0';
        if (i >= 0) { w->digit[i]++; return; }
        memmove(w->digit + 1, w->digit, (size_t)w->count++);
        w->digit[0] = '1';
        return;
    }
    for (; w->digit[i] == '0'; i--) w->digit[i] = '9';
    w->digit[i]--;
    if (w->digit[0] == '0') memmove(w->digit, w->digit + 1, (size_t)--w->count);
}

/* The nearest step at or above (up) or at or below the bound; `steps` further inside when the bound itself is excluded. */
static llmi_whole llmi_whole_bound(const llmi_dec *d, int places, int up, int steps)
{
    llmi_whole w;
    int shift = d->exponent + places, keep = shift >= 0 ? d->count : d->count + shift, exact = shift >= 0 || d->count == 0;
    memset(&w, 0, sizeof w);
    w.minus = d->minus;
    for (int i = 0; i < keep; i++) w.digit[w.count++] = d->digit[i];
    for (int i = 0; i < shift && d->count; i++) w.digit[w.count++] = '0';
    if (!exact && w.minus != up) llmi_whole_step(&w, 1); /* away from zero */
    if (!exact && steps == 1) steps = 0;
    for (; steps > 0; steps--) {
        int outward = w.minus != up;
        if (w.count == 0) { w.minus = !up; outward = 1; }
        llmi_whole_step(&w, outward ? 1 : -1);
        if (w.count == 0) w.minus = 0;
    }
    if (w.count == 0) w.minus = 0;
    return w;
}

static int llmi_whole_compare(const llmi_whole *a, const llmi_whole *b)
{
    int sign = a->minus ? -1 : 1, order;
    if (a->minus != b->minus) return sign;
    order = a->count != b->count ? a->count - b->count : memcmp(a->digit, b->digit, (size_t)a->count);
    return order > 0 ? sign : order < 0 ? -sign : 0;
}

/* Numbers of n digits between two of n digits, the last `places` behind the point; free: states for any n digits. */
typedef struct llmi_gnum { llm_grammar *g; int32_t next; int n, places; char low[128], high[128]; int32_t any[128]; } llmi_gnum;

/* After i digits; at_low, at_high: they are those of the bound. */
static int32_t llmi_g_digits(llmi_gnum *x, int i, int at_low, int at_high)
{
    int left = x->n - i, may_end = left <= x->places, loose = !at_low && !at_high;
    llmi_grange r[3];
    size_t k = 0;
    if (left == 0) return x->next;
    if (loose && x->any[left] >= 0) return x->any[left];
    for (int z = i; at_low && may_end && z < x->n; z++) may_end = x->low[z] == '0'; /* what is left out counts as zeros */
    char lo = at_low ? x->low[i] : '0', hi = at_high ? x->high[i] : '9';
    if (at_low && at_high && lo == hi) {
        r[k].lo = r[k].hi = (uint8_t)lo;
        r[k++].next = llmi_g_digits(x, i + 1, 1, 1);
    } else {
        if (at_low) { r[k].lo = r[k].hi = (uint8_t)lo++; r[k++].next = llmi_g_digits(x, i + 1, 1, 0); }
        if (at_high) { r[k].lo = r[k].hi = (uint8_t)hi--; r[k++].next = llmi_g_digits(x, i + 1, 0, 1); }
        if (lo <= hi) { r[k].lo = (uint8_t)lo; r[k].hi = (uint8_t)hi; r[k++].next = llmi_g_digits(x, i + 1, 0, 0); }
    }
    int32_t s = llmi_g_bytes(x->g, r, k);
    if (left == x->places) s = llmi_g_byte(x->g, '.', '.', s);
    if (may_end && left <= x->places) s = llmi_g_either(x->g, x->next, s);
    if (loose) x->any[left] = s;
    return s;
}

/* The spelling of magnitudes a..b in steps of 10^-places, without sign, then next. -1: there is none. */
static int32_t llmi_g_magnitudes(llm_grammar *g, const llmi_whole *a, const llmi_whole *b, int places, int32_t next)
{
    llmi_gnum x;
    int32_t all = -1;
    int least = a->count > places + 1 ? a->count : places + 1, most = b->count > places + 1 ? b->count : places + 1;
    if (a->count > b->count || (a->count == b->count && memcmp(a->digit, b->digit, (size_t)a->count) > 0)) return -1;
    x.g = g;
    x.next = next;
    x.places = places;
    for (int i = 0; i < 128; i++) x.any[i] = -1;
    for (x.n = least; x.n <= most; x.n++) {
        memset(x.low, '0', sizeof x.low);
        memset(x.high, '9', sizeof x.high);
        if (x.n > places + 1) x.low[0] = '1';
        if (a->count == x.n || x.n == least) memcpy(x.low + (x.n - a->count), a->digit, (size_t)a->count);
        if (a->count < x.n && x.n == least) memset(x.low, '0', (size_t)(x.n - a->count));
        if (x.n == most) {
            memset(x.high, '0', (size_t)(x.n - b->count));
            memcpy(x.high + (x.n - b->count), b->digit, (size_t)b->count);
        }
        all = llmi_g_either(g, all, llmi_g_digits(&x, 0, 1, 1));
    }
    return all;
}

/* low..high in steps of 10^-places, then next. -1: there is none. There is no -0. */
static int32_t llmi_g_between(llm_grammar *g, const llmi_whole *low, const llmi_whole *high, int places, int32_t next)
{
    llmi_whole one, zero, a, b;
    int32_t all = -1;
    memset(&zero, 0, sizeof zero);
    one = zero;
    llmi_whole_step(&one, 1);
    if (!high->minus) {
        a = low->minus ? zero : *low;
        all = llmi_g_magnitudes(g, &a, high, places, next);
    }
    if (low->minus) {
        b = *low;
        a = high->minus ? *high : one;
        a.minus = b.minus = 0;
        int32_t s = llmi_g_magnitudes(g, &a, &b, places, next);
        if (s >= 0) all = llmi_g_either(g, all, llmi_g_byte(g, '-', '-', s));
    }
    return all;
}

/* Any number: up to 16 digits before and 15 behind the point and an exponent of up to two digits, so that every reader can hold it. */
static int32_t llmi_g_any_number(llm_grammar *g, int32_t next)
{
    llmi_grange sign[3];
    int32_t e = llmi_g_either(g, next, llmi_g_digit(g, 0, 9, next)), whole, tail = next;
    e = llmi_g_digit(g, 0, 9, e);
    sign[0].lo = sign[0].hi = '-';
    sign[1].lo = sign[1].hi = '+';
    sign[0].next = sign[1].next = e;
    e = llmi_g_either(g, e, llmi_g_bytes(g, sign, 2));
    sign[0].lo = sign[0].hi = 'e';
    sign[1].lo = sign[1].hi = 'E';
    sign[0].next = sign[1].next = e;
    e = llmi_g_either(g, next, llmi_g_bytes(g, sign, 2));
    for (int i = 0; i < 15; i++) tail = llmi_g_digit(g, 0, 9, i ? llmi_g_either(g, e, tail) : e);
    e = llmi_g_either(g, e, llmi_g_byte(g, '.', '.', tail));
    tail = e;
    for (int i = 0; i < 15; i++) tail = llmi_g_either(g, e, llmi_g_digit(g, 0, 9, tail));
    sign[0].lo = '1';
    sign[0].hi = '9';
    sign[0].next = tail;
    sign[1].lo = sign[1].hi = '0';
    sign[1].next = e;
    whole = llmi_g_bytes(g, sign, 2);
    return llmi_g_either(g, whole, llmi_g_byte(g, '-', '-', whole));
}

/* ---- patterns ---- */

/* Whole strings in place of "somewhere in the string": every alternative gets what its missing ^ and $ stand for. 0: out of memory. What lacks a
   partner would find one in that: it is looked for here, and `wrong` then says what it is. */
static int llmi_pattern_whole(llmi_bytes *out, const char *s, const char **wrong)
{
    static const char any[] = "[^\\x{10ffff}]*";
    const char *from = s, *set = NULL; /* set: where a ] stands for itself, in the set that is open */
    int depth = 0, ok = llmi_bytes_add(out, "(?:", 3);
    for (;; s++) {
        if (*s == '\\' && s[1]) { s++; continue; }
        if (*s == '\\') *wrong = LLMI_RX_NO_ESCAPED;
        else if (*s == ')' && !set && depth == 0) *wrong = LLMI_RX_NO_GROUP;
        else if (*s == 0 && (set || depth > 0)) *wrong = set ? LLMI_RX_NO_SET_END : LLMI_RX_NO_GROUP_END;
        if (*wrong) return ok;
        if (set) { if (*s == ']' && s != set) set = NULL; continue; }
        if (*s == '[') set = s + (s[1] == '^' ? 2 : 1);
        else if (*s == '(') depth++;
        else if (*s == ')') depth--;
        else if (*s == 0 || (*s == '|' && depth == 0)) {
            size_t n = (size_t)(s - from);
            int starts = n > 0 && *from == '^', ends = n > (size_t)starts && from[n - 1] == '$' && (n < 2 || from[n - 2] != '\\');
            ok = ok && (starts || llmi_bytes_add(out, any, sizeof any - 1)) && llmi_bytes_add(out, "(?:", 3) &&
                 llmi_bytes_add(out, from + starts, n - (size_t)starts - (size_t)ends) && llmi_bytes_add(out, ")", 1) &&
                 (ends || llmi_bytes_add(out, any, sizeof any - 1)) && llmi_bytes_add(out, *s ? "|" : ")", 1);
            if (*s == 0) return ok;
            from = s + 1;
        }
    }
}

/* The characters of a set of a pattern. Classes such as \d differ between readers beyond ASCII, so only ASCII is taken from them. */
static int llmi_pattern_set(const llmi_regex *x, const llmi_set *s, llmi_gset *out)
{
    int ok = 1, ascii = s->classes || s->space || s->no_space || (s->negate && s->dot);
    if (ascii) {
        for (uint32_t c = 9; c < 127 && ok; c++)
            if ((s->ascii[c >> 5] >> (c & 31) & 1) && (c >= 32 || c == '\t' || c == '\n' || c == '\r')) ok = llmi_gset_add(out, c, c);
        return ok;
    }
    for (uint32_t i = 0; i < s->count && ok; i++) ok = llmi_gset_add(out, x->ranges[s->first + 2 * i], x->ranges[s->first + 2 * i + 1]);
    if (s->dot) ok = ok && llmi_gset_add(out, '\n', '\n') && llmi_gset_add(out, '\r', '\r') && llmi_gset_add(out, 0x2028, 0x2029);
    llmi_gset_tidy(out);
    if (s->negate || s->dot) ok = ok && llmi_gset_negate(out);
    for (size_t i = 0; i < out->pairs.count; i += 2) /* NUL ends C strings: it is never written */
        if (out->pairs.data[i] == 0) out->pairs.data[i] = 1;
    return ok;
}

/* The states of a pattern when its characters are counted too: one for each instruction, times around it, and characters so far. */
typedef struct llmi_gpat { llm_grammar *g; const llmi_regex *x; int32_t *at; const int32_t *first; int32_t least, most, widest, dead; } llmi_gpat;

/* The state before instruction `op` with `times` around it and n characters; too many characters: no way. */
static int32_t llmi_gpat_at(const llmi_gpat *p, int32_t op, int32_t times, int32_t n)
{
    if (p->most >= 0 && n > p->most) return p->dead;
    return p->at[p->first[op] + times * (p->widest + 1) + (n < p->widest ? n : p->widest)];
}

/* The state in place goes on to these two. */
static void llmi_gpat_set(const llmi_gpat *p, int32_t state, int32_t a, int32_t b)
{
    if (p->g->failed) return;
    p->g->states[state].next = a;
    p->g->states[state].other = b;
}

/* What instruction `op` does with n characters before it. Refused instructions were found before. */
static void llmi_gpat_op(llmi_gpat *p, int32_t op, const llmi_gset *set, int32_t n, int32_t next)
{
    const llmi_op *o = &p->x->ops[op];
    int32_t here = llmi_gpat_at(p, op, 0, n), most = o->y < 0 ? o->x : o->y;
    switch (o->op) {
    case LLMI_OP_SET: {
        int32_t s = llmi_g_json_char(p->g, set, 0, llmi_gpat_at(p, op + 1, 0, n + 1));
        llmi_gpat_set(p, here, s, s);
        break;
    }
    case LLMI_OP_LOOP:
        for (int32_t k = 0; k <= most; k++) {
            int32_t on = k < most ? k + 1 : o->y < 0 ? k : -1, out = llmi_gpat_at(p, op + 1, 0, n), s;
            s = on < 0 ? p->dead : llmi_g_json_char(p->g, set, 0, llmi_gpat_at(p, op, on, n + 1));
            llmi_gpat_set(p, llmi_gpat_at(p, op, k, n), s, k >= o->x ? out : s);
        }
        break;
    case LLMI_OP_SPLIT: llmi_gpat_set(p, here, llmi_gpat_at(p, op + o->x, 0, n), llmi_gpat_at(p, op + o->y, 0, n)); break;
    case LLMI_OP_JUMP: llmi_gpat_set(p, here, llmi_gpat_at(p, op + o->x, 0, n), llmi_gpat_at(p, op + o->x, 0, n)); break;
    default: llmi_gpat_set(p, here, n >= p->least ? next : p->dead, p->dead);
    }
}

/* Without lengths to count, a loop over one set needs no copies. */
static void llmi_gpat_loop(llmi_gpat *p, int32_t op, const llmi_gset *set)
{
    llm_grammar *g = p->g;
    const llmi_op *o = &p->x->ops[op];
    int32_t loop = llmi_g_counted(g, LLMI_G_LOOP, o->x, o->y, llmi_gpat_at(p, op + 1, 0, 0), 0);
    g->loop = loop;
    int32_t bump = llmi_g_state(g, LLMI_G_BUMP, loop, 0), body = llmi_g_json_char(g, set, 0, bump);
    g->loop = -1;
    if (!g->failed) g->states[loop].other = body;
    llmi_gpat_set(p, llmi_gpat_at(p, op, 0, 0), loop, loop);
}

/* The name of the first instruction that has no meaning here, or NULL. */
static const char *llmi_pattern_refuses(const llmi_regex *x)
{
    for (int32_t i = 0; i < x->op_count; i++) {
        const llmi_op *o = &x->ops[i];
        if (o->op == LLMI_OP_LOOK) return "a look ahead";
        if (o->op == LLMI_OP_LINE_END) return "$ before the end";
        if (o->op == LLMI_OP_TEXT_END || o->op == LLMI_OP_TEXT_START) return "\\A or \\z";
        if (o->op == LLMI_OP_LOOP && o->flag) return "a possessive quantifier";
    }
    return NULL;
}

/* Strings of a compiled pattern with least..most characters (most -1: any), then next. */
static int32_t llmi_g_pattern(llm_grammar *g, const llmi_regex *x, int32_t least, int32_t most, int32_t next)
{
    llmi_gpat p;
    llmi_arena scratch = llmi_arena_make(&g->a);
    int32_t *first = (int32_t *)llmi_take(&scratch, (size_t)x->op_count, sizeof *first), plain = least == 0 && most < 0;
    int64_t total = 0;
    memset(&p, 0, sizeof p);
    p.g = g;
    p.x = x;
    p.least = least;
    p.most = most;
    p.widest = most < 0 ? least : most;
    p.dead = llmi_g_bytes(g, NULL, 0);
    for (int32_t i = 0; first && i < x->op_count; i++) {
        const llmi_op *o = &x->ops[i];
        first[i] = (int32_t)total;
        total += (int64_t)(o->op == LLMI_OP_LOOP && !plain ? (o->y < 0 ? o->x : o->y) + 1 : 1) * (p.widest + 1);
        if (total > LLMI_G_MOST_STATES) { g->failed = g->failed ? g->failed : 2; break; }
    }
    p.first = first;
    p.at = first && !g->failed ? (int32_t *)llmi_take(&scratch, (size_t)total, sizeof *p.at) : NULL;
    if (!p.at && !g->failed) g->failed = 1;
    for (int64_t i = 0; i < total && !g->failed; i++) p.at[i] = llmi_g_state(g, LLMI_G_SPLIT, 0, 0);
    for (int32_t i = 0; i < x->op_count && !g->failed; i++) {
        const llmi_op *o = &x->ops[i];
        llmi_gset set = {{{NULL, NULL, NULL}, NULL, 0, 0}};
        set.pairs.a = g->a;
        if ((o->op == LLMI_OP_SET || o->op == LLMI_OP_LOOP) && !llmi_pattern_set(x, &x->sets[o->set], &set)) g->failed = 1;
        if (plain && o->op == LLMI_OP_LOOP) llmi_gpat_loop(&p, i, &set);
        else
            for (int32_t n = 0; n <= p.widest && !g->failed; n++) llmi_gpat_op(&p, i, &set, n, next);
        llmi_ids_drop(&set.pairs);
    }
    int32_t start = g->failed ? 0 : p.at[0];
    llmi_arena_drop(&scratch);
    return start;
}

/* Formats that are enforced. What readers disagree on is left out: leap days and seconds, names without a dot. */
#define LLMI_DATE "[12][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
#define LLMI_TIME "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?(?:Z|[+-](?:0[0-9]|1[0-3]):[0-5][0-9])"
#define LLMI_OCTET "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
#define LLMI_HOST "[a-z][a-z0-9]{0,20}(?:-[a-z0-9]{1,20})?(?:\\.[a-z][a-z0-9]{0,20}){1,3}"
static const struct { const char *name, *pattern; } llmi_formats[] = {
    {"date", LLMI_DATE}, {"time", LLMI_TIME}, {"date-time", LLMI_DATE "T" LLMI_TIME},
    {"uuid", "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"},
    {"ipv4", LLMI_OCTET "\\." LLMI_OCTET "\\." LLMI_OCTET "\\." LLMI_OCTET},
    {"hostname", LLMI_HOST}, {"email", "[A-Za-z0-9]{1,30}(?:[._-][A-Za-z0-9]{1,20}){0,3}@" LLMI_HOST},
    {"uri", "https?://" LLMI_HOST "(?:/[A-Za-z0-9._~-]{1,40}){0,8}/?"}
};

/* ------------------------------------------------------------------------------------------------
   >>llm-schema      reading JSON Schemas
   A keyword is enforced, an annotation, or refused by its JSON pointer: none is passed over. Documents are checked here, too.
   ------------------------------------------------------------------------------------------------ */

/* What must hold at one place of the document: several schemas at once, as $ref, allOf and branches bring them together. `taken`:
   keywords of a part that are dealt with. */
#define LLMI_MOST_PARTS 32
#define LLMI_MOST_CHECKS 20000000
enum { LLMI_TAKEN_ANY = 1, LLMI_TAKEN_ONE = 2, LLMI_OPENING = 4 };
typedef struct llmi_claim { const moq_json *node; int32_t taken; } llmi_claim;
typedef struct llmi_view {
    llmi_claim part[LLMI_MOST_PARTS];
    int32_t count, merged;   /* merged: a combination the author did not write down as such; what contradicts itself there just never comes */
    const moq_json *nothing; /* the schema false */
} llmi_view;

/* A rule that is still to be built, or is. */
typedef struct llmi_job { struct llmi_job *next, *same; llmi_view view; int32_t rule; } llmi_job; /* same: of one hash */
#define LLMI_MOST_JOBS 20000
#define LLMI_JOB_HASHES 1024

/* The members of a large object by their names: $refs may go through "$defs" of 100,000 schemas. */
typedef struct llmi_members { struct llmi_members *next; const moq_json *object; llmi_map map; } llmi_members; /* values: from the root */
#define LLMI_MANY_MEMBERS 64

typedef struct llmi_schema {
    llm_grammar *g;
    const moq_json *root;
    llmi_arena r, fixed; /* fixed: what stays while r is put aside */
    llmi_members *members;
    llmi_unicode u;
    llmi_job *first, *last, *jobs[LLMI_JOB_HASHES];
    int32_t job_count;
    moq_result code;
    moq_error *err;
    moq_error wrong, never; /* the first contradiction; the first in a combination or by the schema false */
    char where[400];
    int32_t spaces, depth;
    const moq_json *list, *value; /* the enum that is being read, and which of its values */
    uint64_t checks;              /* values compared so far */
} llmi_schema;

enum { LLMI_T_NULL = 1, LLMI_T_BOOL = 2, LLMI_T_INT = 4, LLMI_T_FRACTION = 8, LLMI_T_STRING = 16, LLMI_T_ARRAY = 32, LLMI_T_OBJECT = 64, LLMI_T_ALL = 127 };
static const struct { const char *name; int32_t types; } llmi_types[] = {
    {"null", LLMI_T_NULL}, {"boolean", LLMI_T_BOOL}, {"integer", LLMI_T_INT}, {"number", LLMI_T_INT | LLMI_T_FRACTION},
    {"string", LLMI_T_STRING}, {"array", LLMI_T_ARRAY}, {"object", LLMI_T_OBJECT}
};

/* Keywords: the type that they imply where no type is given, 0 for those of every type; NULL or why it is refused. */
typedef struct llmi_keyword { const char *name; int32_t implies; const char *refusal; } llmi_keyword;
static const llmi_keyword llmi_keywords[] = {
    {"type", 0, NULL}, {"enum", 0, NULL}, {"const", 0, NULL}, {"anyOf", 0, NULL}, {"oneOf", 0, NULL}, {"allOf", 0, NULL}, {"$ref", 0, NULL},
    {"$defs", 0, NULL}, {"definitions", 0, NULL},
    {"properties", LLMI_T_OBJECT, NULL}, {"required", LLMI_T_OBJECT, NULL}, {"additionalProperties", LLMI_T_OBJECT, NULL},
    {"minProperties", LLMI_T_OBJECT, NULL}, {"maxProperties", LLMI_T_OBJECT, NULL},
    {"items", LLMI_T_ARRAY, NULL}, {"prefixItems", LLMI_T_ARRAY, NULL}, {"additionalItems", LLMI_T_ARRAY, NULL},
    {"minItems", LLMI_T_ARRAY, NULL}, {"maxItems", LLMI_T_ARRAY, NULL}, {"uniqueItems", LLMI_T_ARRAY, NULL},
    {"minLength", LLMI_T_STRING, NULL}, {"maxLength", LLMI_T_STRING, NULL}, {"pattern", LLMI_T_STRING, NULL}, {"format", LLMI_T_STRING, NULL},
    {"minimum", LLMI_T_INT | LLMI_T_FRACTION, NULL}, {"maximum", LLMI_T_INT | LLMI_T_FRACTION, NULL},
    {"exclusiveMinimum", LLMI_T_INT | LLMI_T_FRACTION, NULL}, {"exclusiveMaximum", LLMI_T_INT | LLMI_T_FRACTION, NULL},
    {"title", 0, NULL}, {"description", 0, NULL}, {"default", 0, NULL}, {"examples", 0, NULL}, {"$schema", 0, NULL}, {"$id", 0, NULL},
    {"$comment", 0, NULL}, {"deprecated", 0, NULL}, {"readOnly", 0, NULL}, {"writeOnly", 0, NULL}, {"contentMediaType", 0, NULL},
    {"contentEncoding", 0, NULL},
    {"not", 0, "list what is allowed with enum, or with the keywords of one type"},
    {"if", 0, "write the cases as branches of anyOf"}, {"then", 0, "write the cases as branches of anyOf"}, {"else", 0, "write the cases as branches of anyOf"},
    {"patternProperties", 0, "use additionalProperties for free names"}, {"propertyNames", 0, "declare the names in properties"},
    {"dependentRequired", 0, "write the cases as branches of anyOf"}, {"dependentSchemas", 0, "write the cases as branches of anyOf"},
    {"dependencies", 0, "write the cases as branches of anyOf"}, {"unevaluatedProperties", 0, "use additionalProperties"},
    {"unevaluatedItems", 0, "use items"}, {"contains", 0, "describe the elements with prefixItems and items"},
    {"minContains", 0, "describe the elements with prefixItems and items"}, {"maxContains", 0, "describe the elements with prefixItems and items"},
    {"multipleOf", 0, "use type integer, or list the values with enum"}, {"nullable", 0, "use a type such as [\"string\", \"null\"]"},
    {"$dynamicRef", 0, "use $ref"}, {"$recursiveRef", 0, "use $ref"}, {"$anchor", 0, "refer to it by its JSON pointer"},
};

/* ---- where things are ---- */

/* The JSON pointer of a value of the document, "#" for the root. */
static const char *llmi_schema_where(llmi_schema *c, const moq_json *v)
{
    const moq_json *at = c->root;
    size_t n = 0;
    c->where[n++] = '#';
    while (at && v && at != v) {
        const moq_json *e = moq_json_first(at);
        uint64_t index = 0;
        for (; e && !(v >= e && v < e + e->skip); e = moq_json_next(at, e)) index++;
        if (!e || n + 8 > sizeof c->where) break;
        c->where[n++] = '/';
        for (const char *k = e->key; k && *k && n + 8 < sizeof c->where; k++) {
            if (*k == '~' || *k == '/') { c->where[n++] = '~'; c->where[n++] = *k == '~' ? '0' : '1'; }
            else c->where[n++] = *k;
        }
        for (uint64_t ten = 1; !e->key; ten *= 10) {
            if (ten <= index / 10) continue;
            for (; ten && n + 8 < sizeof c->where; ten /= 10) c->where[n++] = (char)('0' + index / ten % 10);
            break;
        }
        at = e;
    }
    c->where[n] = 0;
    return c->where;
}

/* The schema is refused; the first reason counts. */
#define LLMI_SCHEMA_REFUSE(c, result, node, ...) \
    do { if ((c)->code >= 0) (c)->code = moq_fail((c)->err, result, llmi_schema_where(c, node), __VA_ARGS__); } while (0)

/* Nothing can satisfy this view. */
#define LLMI_SCHEMA_NEVER(c, view, node, ...) \
    do { \
        moq_error *never_ = (view)->merged ? &(c)->never : &(c)->wrong; \
        if (never_->code == MOQ_OK) moq_fail(never_, MOQ_E_GRAMMAR, llmi_schema_where(c, node), __VA_ARGS__); \
    } while (0)

static void llmi_schema_nomem(llmi_schema *c)
{
    if (c->code >= 0) c->code = llmi_nomem(c->err, "schema");
}

/* A step of a JSON pointer as the name that it means: ~0, ~1 and %HH are resolved. Returns its length, at most n. */
static size_t llmi_schema_step(const char *step, size_t n, char *name)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        char ch = step[i];
        if (ch == '~' && i + 1 < n) ch = step[++i] == '0' ? '~' : '/';
        else if (ch == '%' && i + 2 < n && llmi_hex(step[i + 1]) >= 0 && llmi_hex(step[i + 2]) >= 0) {
            ch = (char)(llmi_hex(step[i + 1]) * 16 + llmi_hex(step[i + 2]));
            i += 2;
        }
        name[count++] = ch;
    }
    return count;
}

/* The member of an object, or NULL; large objects are put into a map when they are first asked. */
static const moq_json *llmi_schema_member_of(llmi_schema *c, const moq_json *object, const char *name, size_t bytes)
{
    llmi_members *m = c->members;
    if (object->count < LLMI_MANY_MEMBERS) {
        const moq_json *e = moq_json_first(object);
        while (e && (e->key_bytes != bytes || memcmp(e->key, name, bytes) != 0)) e = moq_json_next(object, e);
        return e;
    }
    while (m && m->object != object) m = m->next;
    if (!m) {
        m = (llmi_members *)llmi_take(&c->fixed, 1, sizeof *m);
        if (!m || !llmi_map_make(&m->map, &c->fixed, object->count)) { llmi_schema_nomem(c); return NULL; }
        for (const moq_json *e = moq_json_first(object); e; e = moq_json_next(object, e)) llmi_map_add(&m->map, e->key, e->key_bytes, (int32_t)(e - c->root));
        m->object = object;
        m->next = c->members;
        c->members = m;
    }
    const llmi_slot *s = llmi_map_find(&m->map, name, bytes);
    return s ? c->root + s->value : NULL;
}

/* The value that a $ref of this document names, or NULL. */
static const moq_json *llmi_schema_resolve(llmi_schema *c, const char *ref)
{
    const moq_json *at = c->root;
    char name[1024];
    if (*ref++ != '#') return NULL;
    while (*ref == '/' && at) {
        size_t n = strcspn(++ref, "/"), bytes;
        uint64_t want = 0;
        if (n > sizeof name) return NULL;
        bytes = llmi_schema_step(ref, n, name);
        for (size_t i = 0; i < n; i++) want = ref[i] >= '0' && ref[i] <= '9' && want < 1000000 ? want * 10 + (uint64_t)(ref[i] - '0') : 1000000;
        if (at->type == MOQ_JSON_OBJECT) at = llmi_schema_member_of(c, at, name, bytes);
        else at = at->type == MOQ_JSON_ARRAY && n && want < at->count ? moq_json_at(at, (size_t)want) : NULL;
        ref += n;
    }
    return *ref ? NULL : at;
}

/* ---- keywords of one schema ---- */

/* What stands where a schema or a type should: indexed by moq_json_type. */
static const char *const llmi_json_kinds[] = {"null", "false", "true", "a number", "a text", "a list", "an object"};

/* A name that is no type is quoted, with the type that it may be a slip of. */
static void llmi_schema_no_type(llmi_schema *c, const moq_json *v)
{
    const char *name = moq_json_string(v), *meant = NULL;
    for (size_t i = 0; name && i < LLMI_COUNT(llmi_types); i++)
        if (moq_is_slip(name, llmi_types[i].name)) meant = llmi_types[i].name;
    LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, v, "%s%q%s is no type%s%s%s; types are null, boolean, integer, number, string, array, object, or a list of them",
                       name ? "'" : "", name ? name : v->type == MOQ_JSON_ARRAY && v->count == 0 ? "an empty list" : llmi_json_kinds[v->type], name ? "'" : "",
                       meant ? " (is '" : "", meant ? meant : "", meant ? "' meant?)" : "");
}

/* Types that a value of "type" names. */
static int32_t llmi_schema_types(llmi_schema *c, const moq_json *v)
{
    int32_t types = 0;
    if (!v) return LLMI_T_ALL;
    for (size_t i = 0; i < LLMI_COUNT(llmi_types); i++)
        if (moq_json_is(v, llmi_types[i].name)) return llmi_types[i].types;
    for (const moq_json *e = v->type == MOQ_JSON_ARRAY ? moq_json_first(v) : NULL; e; e = moq_json_next(v, e)) {
        if (e->type == MOQ_JSON_STRING) types |= llmi_schema_types(c, e);
        else llmi_schema_no_type(c, e);
    }
    if (!types) llmi_schema_no_type(c, v);
    return types;
}

/* Every keyword is known and well formed. Once for each use of a schema, so errors come before anything is built of it. */
static void llmi_schema_check(llmi_schema *c, const moq_json *node)
{
    static const char counts[] = " minLength maxLength minItems maxItems minProperties maxProperties ";
    for (const moq_json *e = moq_json_first(node); e && c->code >= 0; e = moq_json_next(node, e)) {
        size_t k = 0;
        int64_t count;
        int flag;
        while (k < LLMI_COUNT(llmi_keywords) && strcmp(llmi_keywords[k].name, e->key) != 0) k++;
        if (k == LLMI_COUNT(llmi_keywords)) {
            if (strncmp(e->key, "x-", 2) != 0)
                LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, e, "is no keyword of JSON Schema; a misspelt one would go unenforced. Remove it, or begin its name with x-");
            continue;
        }
        const char *why = llmi_keywords[k].refusal, *found = strstr(counts, e->key);
        if (why && strcmp(e->key, "nullable") == 0 && moq_json_bool(e, &flag) && !flag) why = NULL;
        if (why && strcmp(e->key, "multipleOf") == 0 && e->text && strcmp(e->text, "1") == 0 && moq_json_is(moq_json_find(node, "type"), "integer")) why = NULL;
        if (why) LLMI_SCHEMA_REFUSE(c, MOQ_E_UNSUPPORTED, e, "this keyword cannot be enforced; %s", why);
        if (found && found[-1] == ' ' && found[strlen(e->key)] == ' ' && (!moq_json_int(e, &count) || count < 0 || count > 1000000))
            LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, e, "must be a whole number of 0..1000000");
        if (strcmp(e->key, "$id") == 0 && node != c->root) LLMI_SCHEMA_REFUSE(c, MOQ_E_UNSUPPORTED, e, "a second $id; put everything under one");
        if (strcmp(e->key, "type") == 0) llmi_schema_types(c, e);
        if (llmi_keywords[k].implies == (LLMI_T_INT | LLMI_T_FRACTION)) {
            llmi_dec d;
            if (e->type != MOQ_JSON_NUMBER) LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, e, "must be a number");
            else if (!llmi_dec_read(&d, e->text)) LLMI_SCHEMA_REFUSE(c, MOQ_E_LIMIT, e, "has more than %d digits", LLMI_DEC_DIGITS);
        }
    }
}

/* {"x": "string"} is the slip of who means {"x": {"type": "string"}}. */
static void llmi_schema_no_schema(llmi_schema *c, const moq_json *node)
{
    const char *name = moq_json_string(node);
    for (size_t i = 0; name && i < LLMI_COUNT(llmi_types); i++)
        if (strcmp(name, llmi_types[i].name) == 0)
            LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, node, "the text '%s' is no schema; write {\"type\": \"%s\"}", name, name);
    LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, node, "%s%s%q%s is no schema; a schema is an object such as {\"type\": \"string\"}, or true for anything, false for nothing",
                       llmi_json_kinds[node->type], name ? " '" : "", name ? name : "", name ? "'" : "");
}

/* Adds a schema to what must hold. */
static void llmi_schema_add(llmi_schema *c, llmi_view *v, const moq_json *node)
{
    const moq_json *ref, *all;
    if (c->code < 0 || node->type == MOQ_JSON_TRUE) return;
    if (node->type == MOQ_JSON_FALSE) { v->nothing = node; return; }
    if (node->type != MOQ_JSON_OBJECT) { llmi_schema_no_schema(c, node); return; }
    for (int32_t i = 0; i < v->count; i++) {
        if (v->part[i].node != node) continue;
        if (v->part[i].taken) LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, node,
                            "refers to itself without anything in between; put it into properties or items"); /* also through a branch */
        return;
    }
    if (v->count == LLMI_MOST_PARTS) { LLMI_SCHEMA_REFUSE(c, MOQ_E_LIMIT, node, "more than %d schemas apply to one value; write them as one", LLMI_MOST_PARTS); return; }
    llmi_schema_check(c, node);
    int32_t at = v->count++;
    v->part[at].node = node;
    v->part[at].taken = LLMI_OPENING;
    if ((ref = moq_json_find(node, "$ref")) != NULL && c->code >= 0) {
        const moq_json *to = moq_json_string(ref) ? llmi_schema_resolve(c, ref->text) : NULL;
        if (!to)
            LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, ref, "'%q' names nothing in this schema; references are followed within it alone, as #/$defs/name",
                               ref->text ? ref->text : "");
        else llmi_schema_add(c, v, to);
        if (node->count == 1 && c->code >= 0) { /* says nothing of its own: what leads to one schema in two ways is one */
            memmove(&v->part[at], &v->part[at + 1], (size_t)(--v->count - at) * sizeof v->part[0]);
            return;
        }
    }
    all = moq_json_find(node, "allOf");
    for (const moq_json *e = moq_json_first(all); e; e = moq_json_next(all, e)) {
        v->merged |= all->count > 1;
        llmi_schema_add(c, v, e);
    }
    v->part[at].taken &= ~LLMI_OPENING;
}

/* The largest (or smallest) count that a keyword asks for over all parts; `otherwise` when none does. */
static int32_t llmi_schema_count(const llmi_view *v, const char *key, int largest, int32_t otherwise)
{
    int32_t best = otherwise;
    int64_t n;
    for (int32_t i = 0; i < v->count; i++)
        if (moq_json_int(moq_json_find(v->part[i].node, key), &n) && (best == otherwise || (largest ? n > best : n < best))) best = (int32_t)n;
    return best;
}

/* The first part with a keyword. */
static const moq_json *llmi_schema_first(const llmi_view *v, const char *key)
{
    const moq_json *found = NULL;
    for (int32_t i = 0; i < v->count && !found; i++) found = moq_json_find(v->part[i].node, key);
    return found;
}

/* ---- is a value valid? ---- */

static int llmi_schema_holds(llmi_schema *c, const moq_json *node, const moq_json *v);

/* Equal as JSON: numbers by value, objects in any order. */
static int llmi_json_equal(const moq_json *a, const moq_json *b)
{
    if (a->type != b->type) return 0;
    if (a->type == MOQ_JSON_STRING) return a->text_bytes == b->text_bytes && memcmp(a->text, b->text, a->text_bytes) == 0;
    if (a->type == MOQ_JSON_NUMBER) {
        llmi_dec x, y;
        return llmi_dec_read(&x, a->text) && llmi_dec_read(&y, b->text) ? llmi_dec_compare(&x, &y) == 0 : strcmp(a->text, b->text) == 0;
    }
    if (a->type < MOQ_JSON_ARRAY || a->count != b->count) return a->type < MOQ_JSON_ARRAY;
    const moq_json *y = moq_json_first(b);
    for (const moq_json *x = moq_json_first(a); x; x = moq_json_next(a, x)) {
        if (a->type == MOQ_JSON_OBJECT) y = moq_json_find(b, x->key);
        if (!y || !llmi_json_equal(x, y)) return 0;
        if (a->type == MOQ_JSON_ARRAY) y = moq_json_next(b, y);
    }
    return 1;
}

static int32_t llmi_json_types(const moq_json *v)
{
    static const int32_t types[] = {LLMI_T_NULL, LLMI_T_BOOL, LLMI_T_BOOL, 0, LLMI_T_STRING, LLMI_T_ARRAY, LLMI_T_OBJECT};
    llmi_dec d;
    if (v->type != MOQ_JSON_NUMBER) return types[v->type];
    return llmi_dec_read(&d, v->text) && d.exponent >= 0 ? LLMI_T_INT : LLMI_T_FRACTION;
}

/* The pattern for whole strings of a "pattern" or "format" keyword; NULL: none to be had, and the schema is refused. */
static const llmi_regex *llmi_schema_pattern(llmi_schema *c, const moq_json *v, int whole_end)
{
    llmi_bytes text = llmi_bytes_make(&c->g->a);
    const char *source = moq_json_string(v), *wrong = NULL;
    const llmi_regex *x = NULL;
    moq_error e;
    int ok = 1, format = v->key && strcmp(v->key, "format") == 0;
    e.code = MOQ_OK;
    for (size_t i = 0; format && source && i <= LLMI_COUNT(llmi_formats); i++) {
        if (i == LLMI_COUNT(llmi_formats)) {
            LLMI_SCHEMA_REFUSE(c, MOQ_E_UNSUPPORTED, v, "format '%q'; known are date, time, date-time, uuid, ipv4, hostname, email, uri", source);
        } else if (strcmp(llmi_formats[i].name, source) == 0) {
            ok = llmi_bytes_add(&text, "(?:", 3) && llmi_bytes_add(&text, llmi_formats[i].pattern, strlen(llmi_formats[i].pattern)) && llmi_bytes_add(&text, ")", 1);
            break;
        }
    }
    if (!source) LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, v, "must be a string");
    else if (!format) ok = llmi_pattern_whole(&text, source, &wrong);
    if (wrong) LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, v, "the pattern '%q' is malformed: %s", source, wrong);
    ok = ok && (!whole_end || llmi_bytes_add(&text, "\\z", 2)) && llmi_bytes_add(&text, "", 1);
    if (ok && c->code >= 0 && !c->u.classes && !llmi_unicode_make(&c->u, &c->r)) ok = 0;
    if (ok && c->code >= 0) x = llmi_regex_make(text.data, text.count - 1, 0, &c->u, &c->r, &e);
    if (!ok || e.code == MOQ_E_NOMEM) llmi_schema_nomem(c);
    else if (!x && e.code < 0) {
        const char *what = strrchr(e.text, '\''); /* behind the pattern, which is the wrapped one there */
        LLMI_SCHEMA_REFUSE(c, e.code == MOQ_E_TOKENIZER ? MOQ_E_GRAMMAR : MOQ_E_UNSUPPORTED, v, "the pattern '%q' %s", source ? source : "",
                           what && what[1] ? what + 2 : "is malformed");
    }
    const char *refused = x && !whole_end ? llmi_pattern_refuses(x) : NULL;
    if (refused) LLMI_SCHEMA_REFUSE(c, MOQ_E_UNSUPPORTED, v, "the pattern '%q' holds %s", source, refused);
    llmi_bytes_drop(&text);
    return c->code < 0 ? NULL : x;
}

/* Does the string match? */
static int llmi_schema_matches(llmi_schema *c, const moq_json *pattern, const moq_json *v)
{
    llmi_matcher m;
    const llmi_regex *x = llmi_schema_pattern(c, pattern, 1);
    memset(&m, 0, sizeof m);
    m.a = c->g->a;
    m.u = &c->u;
    if (!x) return 0;
    llmi_matcher_set(&m, x, v->text, v->text_bytes);
    int found = llmi_match(&m, 0) != LLMI_NO_MATCH;
    if (m.failed) llmi_schema_nomem(c);
    llmi_matcher_drop(&m);
    return found;
}

/* Keywords of numbers. */
static int llmi_schema_number_holds(const moq_json *node, const moq_json *v)
{
    static const struct { const char *key; int side, strict; } bounds[] = {
        {"minimum", -1, 0}, {"maximum", 1, 0}, {"exclusiveMinimum", -1, 1}, {"exclusiveMaximum", 1, 1}
    };
    llmi_dec x, b;
    for (size_t i = 0; i < LLMI_COUNT(bounds); i++) {
        const moq_json *e = moq_json_find(node, bounds[i].key);
        if (!e || !llmi_dec_read(&b, e->text)) continue;
        if (!llmi_dec_read(&x, v->text)) return 0;
        int order = llmi_dec_compare(&x, &b) * bounds[i].side;
        if (order > 0 || (bounds[i].strict && order == 0)) return 0;
    }
    return 1;
}

/* Is a count inside the two keywords? */
static int llmi_schema_count_holds(const moq_json *node, const char *least, const char *most, int64_t n)
{
    int64_t bound;
    if (moq_json_int(moq_json_find(node, least), &bound) && n < bound) return 0;
    return !moq_json_int(moq_json_find(node, most), &bound) || n <= bound;
}

/* Keywords of strings. */
static int llmi_schema_string_holds(llmi_schema *c, const moq_json *node, const moq_json *v)
{
    const moq_json *pattern = moq_json_find(node, "pattern"), *format = moq_json_find(node, "format");
    int64_t n = 0;
    for (uint32_t i = 0; i < v->text_bytes; i++) n += ((uint8_t)v->text[i] & 0xc0) != 0x80;
    return llmi_schema_count_holds(node, "minLength", "maxLength", n) && (!pattern || llmi_schema_matches(c, pattern, v)) &&
           (!format || llmi_schema_matches(c, format, v));
}

/* The schema of an array's element; NULL: any. */
static const moq_json *llmi_schema_element(const moq_json *node, size_t index)
{
    const moq_json *prefix = moq_json_find(node, "prefixItems"), *items = moq_json_find(node, "items");
    if (!prefix && items && items->type == MOQ_JSON_ARRAY) { prefix = items; items = moq_json_find(node, "additionalItems"); }
    return prefix && index < prefix->count ? moq_json_at(prefix, index) : items;
}

/* Keywords of arrays and objects. */
static int llmi_schema_inside_holds(llmi_schema *c, const moq_json *node, const moq_json *v)
{
    const moq_json *required = moq_json_find(node, "required"), *properties = moq_json_find(node, "properties"), *more = moq_json_find(node, "additionalProperties");
    size_t index = 0;
    int array = v->type == MOQ_JSON_ARRAY;
    if (!llmi_schema_count_holds(node, array ? "minItems" : "minProperties", array ? "maxItems" : "maxProperties", v->count)) return 0;
    for (const moq_json *e = moq_json_first(v); e; e = moq_json_next(v, e)) {
        const moq_json *declared = array ? llmi_schema_element(node, index++) : moq_json_find(properties, e->key);
        if (!declared && !array) declared = more;
        if (declared && !llmi_schema_holds(c, declared, e)) return 0;
    }
    for (const moq_json *e = array ? NULL : moq_json_first(required); e; e = moq_json_next(required, e))
        if (moq_json_string(e) && !moq_json_find(v, e->text)) return 0;
    return 1;
}

/* How many branches hold. */
static uint32_t llmi_schema_branches(llmi_schema *c, const moq_json *list, const moq_json *v)
{
    uint32_t n = 0;
    for (const moq_json *e = moq_json_first(list); e; e = moq_json_next(list, e)) n += llmi_schema_holds(c, e, v) != 0;
    return n;
}

/* Is the value valid under the schema? Used for the values of enum and const. */
static int llmi_schema_holds(llmi_schema *c, const moq_json *node, const moq_json *v)
{
    const moq_json *e = NULL, *ref, *all, *any, *one;
    int found = 0;
    if (node->type != MOQ_JSON_OBJECT) return node->type == MOQ_JSON_TRUE;
    if (++c->depth > 200) LLMI_SCHEMA_REFUSE(c, MOQ_E_LIMIT, node, "is nested too deeply to check the values of enum; nest it less, or leave enum out");
    if (c->code < 0) { c->depth--; return 0; }
    ref = moq_json_find(node, "$ref");
    ref = moq_json_string(ref) ? llmi_schema_resolve(c, ref->text) : NULL;
    all = moq_json_find(node, "allOf");
    any = moq_json_find(node, "anyOf");
    one = moq_json_find(node, "oneOf");
    const moq_json *list = moq_json_find(node, "enum"), *only = moq_json_find(node, "const");
    found = list && list == c->list && v == c->value; /* an enum's own values need no search */
    c->checks += 1 + (list && !found ? list->count : 0);
    if (c->checks > LLMI_MOST_CHECKS) LLMI_SCHEMA_REFUSE(c, MOQ_E_LIMIT, node, "takes too long to check; give it fewer values of enum, or fewer branches");
    for (e = moq_json_first(list); e && !found; e = moq_json_next(list, e)) found = llmi_json_equal(e, v);
    int32_t kind = llmi_json_types(v);
    int ok = (llmi_schema_types(c, moq_json_find(node, "type")) & kind) && (!list || found) && (!only || llmi_json_equal(only, v)) &&
             (!(kind & (LLMI_T_INT | LLMI_T_FRACTION)) || llmi_schema_number_holds(node, v)) &&
             (kind != LLMI_T_STRING || llmi_schema_string_holds(c, node, v)) &&
             (!(kind & (LLMI_T_ARRAY | LLMI_T_OBJECT)) || llmi_schema_inside_holds(c, node, v));
    ok = ok && (!ref || llmi_schema_holds(c, ref, v)) && (!all || llmi_schema_branches(c, all, v) == all->count) &&
         (!any || llmi_schema_branches(c, any, v) > 0) && (!one || llmi_schema_branches(c, one, v) == 1);
    c->depth--;
    return ok;
}

static int llmi_view_holds(llmi_schema *c, const llmi_view *view, const moq_json *v)
{
    int ok = !view->nothing;
    for (int32_t i = 0; i < view->count && ok; i++) ok = llmi_schema_holds(c, view->part[i].node, v);
    return ok;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-structure   JSON Schemas as grammars
   Every text of the grammar is a document that the schema accepts. The other way round it is narrower: members come in the order
   of "properties", numbers have at most 16 digits before and behind the point, and unmentioned members are not invented.
   ------------------------------------------------------------------------------------------------ */

/* The rule of a view: one that exists, or a new one in the queue. */
static int32_t llmi_schema_rule(llmi_schema *c, const llmi_view *v)
{
    uint64_t hash = 0;
    for (int32_t i = 0; i < v->count; i++) hash = llmi_fold(hash ^ (uint64_t)(v->part[i].node - c->root), 0x9e3779b97f4a7c15u + (uint64_t)v->part[i].taken);
    llmi_job **chain = &c->jobs[hash % LLMI_JOB_HASHES];
    for (const llmi_job *j = *chain; j; j = j->same) {
        int same = j->view.count == v->count && j->view.nothing == v->nothing;
        for (int32_t i = 0; i < v->count && same; i++)
            same = j->view.part[i].node == v->part[i].node && j->view.part[i].taken == v->part[i].taken;
        if (same) return j->rule;
    }
    if (++c->job_count > LLMI_MOST_JOBS) {
        const moq_json *at = v->count ? v->part[v->count - 1].node : c->root;
        LLMI_SCHEMA_REFUSE(c, MOQ_E_LIMIT, at, "leads to more than %d combinations of schemas; give it fewer branches that hold together", LLMI_MOST_JOBS);
        return 0;
    }
    llmi_job *j = (llmi_job *)llmi_take(&c->r, 1, sizeof *j);
    if (!j) { llmi_schema_nomem(c); return 0; }
    j->same = *chain;
    *chain = j;
    j->view = *v;
    j->rule = llmi_g_rule(c->g, 0);
    if (c->last) c->last->next = j;
    else c->first = j;
    c->last = j;
    return j->rule;
}

/* Types that a view's documents may have; made: of those, the ones that are written where no type is named. */
static int32_t llmi_view_types(llmi_schema *c, const llmi_view *v, int32_t *made)
{
    int32_t types = LLMI_T_ALL, implied = 0, named = 0;
    for (int32_t i = 0; i < v->count; i++) {
        const moq_json *type = moq_json_find(v->part[i].node, "type");
        named |= type != NULL;
        types &= llmi_schema_types(c, type);
        for (size_t k = 0; k < LLMI_COUNT(llmi_keywords); k++)
            if (llmi_keywords[k].implies && moq_json_find(v->part[i].node, llmi_keywords[k].name)) implied |= llmi_keywords[k].implies;
    }
    *made = named || !implied ? types : types & implied;
    return types;
}

/* The list of values that a view is limited to; NULL: none. One value for const. */
static const moq_json *llmi_view_values(const llmi_view *v)
{
    const moq_json *only = llmi_schema_first(v, "const");
    return only ? only : llmi_schema_first(v, "enum");
}

/* Iterate over the values of const or enum. */
static const moq_json *llmi_value_next(const moq_json *list, const moq_json *e)
{
    if (strcmp(list->key, "const") == 0) return e ? NULL : list;
    return e ? moq_json_next(list, e) : moq_json_first(list);
}

/* ---- texts ---- */

/* The value as JSON without spaces; 0: out of memory. */
static int llmi_json_write(llmi_bytes *out, const moq_json *v);

static int llmi_json_write_string(llmi_bytes *out, const char *s, size_t n)
{
    static const char hex[] = "0123456789abcdef";
    int ok = llmi_bytes_add(out, "\"", 1);
    for (size_t i = 0; i < n && ok; i++) {
        uint8_t b = (uint8_t)s[i];
        const char *at = b ? strchr(llmi_g_short, (char)b) : NULL;
        char esc[6];
        memcpy(esc, "\\u00", 4);
        esc[4] = hex[b >> 4];
        esc[5] = hex[b & 15];
        if (at) esc[1] = llmi_g_letter[at - llmi_g_short];
        ok = at ? llmi_bytes_add(out, esc, 2) : b < 0x20 ? llmi_bytes_add(out, esc, 6) : llmi_bytes_add(out, s + i, 1);
    }
    return ok && llmi_bytes_add(out, "\"", 1);
}

static int llmi_json_write(llmi_bytes *out, const moq_json *v)
{
    static const char *const words[] = {"null", "false", "true"};
    int array = v->type == MOQ_JSON_ARRAY, ok;
    if (v->type <= MOQ_JSON_TRUE) return llmi_bytes_add(out, words[v->type], strlen(words[v->type]));
    if (v->type == MOQ_JSON_NUMBER) return llmi_bytes_add(out, v->text, v->text_bytes);
    if (v->type == MOQ_JSON_STRING) return llmi_json_write_string(out, v->text, v->text_bytes);
    ok = llmi_bytes_add(out, array ? "[" : "{", 1);
    for (const moq_json *e = moq_json_first(v); e && ok; e = moq_json_next(v, e)) {
        ok = e == moq_json_first(v) || llmi_bytes_add(out, ",", 1);
        if (!array) ok = ok && llmi_json_write_string(out, e->key, e->key_bytes) && llmi_bytes_add(out, ":", 1);
        ok = ok && llmi_json_write(out, e);
    }
    return ok && llmi_bytes_add(out, array ? "]" : "}", 1);
}

/* Sorted texts: offsets in `data`, each ending with a NUL (which JSON never holds). */
typedef struct llmi_texts { llmi_bytes data; llmi_ids at; } llmi_texts;

/* One of the sorted texts [from, end), which agree in their first `same` bytes, then next. */
static int32_t llmi_g_one_of(llm_grammar *g, const llmi_texts *t, size_t from, size_t end, size_t same, int32_t next)
{
    const char *first = t->data.data + t->at.data[from], *last = t->data.data + t->at.data[end - 1];
    size_t common = same, mark = g->top.count, at = from;
    int32_t s;
    while (first[common] && first[common] == last[common]) common++;
    int ends = first[common] == 0;
    for (at += (size_t)ends; at < end && !g->failed;) {
        size_t group = at;
        llmi_grange r;
        memset(&r, 0, sizeof r);
        r.lo = r.hi = (uint8_t)t->data.data[t->at.data[at] + (int32_t)common];
        while (at < end && (uint8_t)t->data.data[t->at.data[at] + (int32_t)common] == r.lo) at++;
        r.next = llmi_g_one_of(g, t, group, at, common + 1, next);
        if (!llmi_bytes_add(&g->top, (const char *)&r, sizeof r)) g->failed = 1;
    }
    s = g->top.count > mark ? llmi_g_collect(g, mark) : -1;
    if (ends) s = llmi_g_either(g, next, s);
    return llmi_g_text(g, first + same, common - same, s);
}

/* By bytes. */
static int llmi_texts_before(const void *in, int32_t a, int32_t b)
{
    const char *s = ((const llmi_texts *)in)->data.data;
    return strcmp(s + a, s + b) < 0;
}

/* Put the texts in order; twice the same counts once. 0: out of memory. */
static int llmi_texts_sort(llmi_texts *t)
{
    size_t n = t->at.count, used = 0;
    int32_t *spare = (int32_t *)moq_allocate(&t->at.a, n * sizeof *spare);
    if (!spare) return 0;
    const int32_t *sorted = llmi_sort_ids(t, t->at.data, spare, n, llmi_texts_before);
    for (size_t i = 0; i < n; i++)
        if (used == 0 || strcmp(t->data.data + t->at.data[used - 1], t->data.data + sorted[i]) != 0) t->at.data[used++] = sorted[i];
    t->at.count = used;
    moq_release(&t->at.a, spare, n * sizeof *spare);
    return 1;
}

/* The values of enum or const that everything else allows. */
static int32_t llmi_schema_values(llmi_schema *c, const llmi_view *v, const moq_json *list, int32_t next)
{
    llmi_texts t;
    int32_t s = -1;
    t.data = llmi_bytes_make(&c->g->a);
    t.at = llmi_ids_make(&c->g->a);
    if (strcmp(list->key, "enum") == 0 && list->type != MOQ_JSON_ARRAY) LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, list, "enum must be a list of values");
    for (const moq_json *e = llmi_value_next(list, NULL); e && c->code >= 0; e = llmi_value_next(list, e)) {
        int32_t from = (int32_t)t.data.count;
        c->list = list;
        c->value = e;
        if (!llmi_view_holds(c, v, e)) continue;
        if (!llmi_json_write(&t.data, e) || !llmi_bytes_add(&t.data, "", 1) || t.data.count > INT32_MAX / 2 || !llmi_ids_add(&t.at, &from, 1)) llmi_schema_nomem(c);
    }
    c->list = c->value = NULL;
    if (c->code >= 0 && t.at.count && !llmi_texts_sort(&t)) llmi_schema_nomem(c);
    if (c->code >= 0 && t.at.count) s = llmi_g_one_of(c->g, &t, 0, t.at.count, 0, next);
    if (c->code >= 0 && s < 0) LLMI_SCHEMA_NEVER(c, v, list, "none of its values is allowed by the other keywords here");
    llmi_bytes_drop(&t.data);
    llmi_ids_drop(&t.at);
    return s;
}

/* ---- scalars ---- */

/* The tightest bound on one side over all parts; 0: none. */
static int llmi_view_bound(const llmi_view *v, int upper, llmi_dec *best, int *strict)
{
    int found = 0;
    for (int32_t i = 0; i < v->count; i++)
        for (int k = 0; k < 2; k++) {
            const moq_json *e = moq_json_find(v->part[i].node, upper ? (k ? "exclusiveMaximum" : "maximum") : k ? "exclusiveMinimum" : "minimum");
            llmi_dec d;
            if (!e || !llmi_dec_read(&d, e->text)) continue;
            int order = found ? llmi_dec_compare(&d, best) * (upper ? -1 : 1) : 1;
            if (order > 0) *strict = k;
            else if (order == 0) *strict |= k;
            if (order > 0) *best = d;
            found = 1;
        }
    return found;
}

/* Digits before the point. */
static int llmi_dec_before(const llmi_dec *d) { return d->count + d->exponent > 0 ? d->count + d->exponent : 0; }

/* Numbers inside all bounds. */
static int32_t llmi_schema_number(llmi_schema *c, const llmi_view *v, int integer, int32_t next)
{
    llmi_dec low, high;
    int low_strict = 0, high_strict = 0, before = 0, places = 0;
    int has_low = llmi_view_bound(v, 0, &low, &low_strict), has_high = llmi_view_bound(v, 1, &high, &high_strict);
    llmi_whole a, b;
    if (!integer && !has_low && !has_high) return llmi_g_any_number(c->g, next);
    if (has_low) before = llmi_dec_before(&low);
    if (has_high && llmi_dec_before(&high) > before) before = llmi_dec_before(&high);
    if (!has_low || !has_high) before = before + 3 > 12 ? before + 3 : integer ? 15 : 12;
    if (before < 1) before = 1;
    if (!integer) places = before < 14 ? 15 - before : 1; /* 15 digits in all are told apart by doubles */
    memset(&a, 0, sizeof a);
    a.count = before + places;
    memset(a.digit, '9', (size_t)a.count);
    b = a;
    a.minus = 1;
    if (has_low) a = llmi_whole_bound(&low, places, 1, low_strict ? 1 + (low.count > 15 && !integer) : 0);
    if (has_high) b = llmi_whole_bound(&high, places, 0, high_strict ? 1 + (high.count > 15 && !integer) : 0);
    int32_t s = llmi_whole_compare(&a, &b) > 0 ? -1 : llmi_g_between(c->g, &a, &b, places, next);
    if (s < 0) {
        const moq_json *at = llmi_schema_first(v, "minimum");
        if (!at) at = llmi_schema_first(v, "exclusiveMinimum");
        LLMI_SCHEMA_NEVER(c, v, at, "no %s lies between this and the upper bound", integer ? "integer" : "number with 15 digits");
    }
    return s;
}

/* Characters of a JSON string, least..most, then next. */
static int32_t llmi_schema_free_text(llm_grammar *g, int32_t least, int32_t most, int32_t next)
{
    llmi_gset any = {{{NULL, NULL, NULL}, NULL, 0, 0}};
    int32_t loop = llmi_g_counted(g, LLMI_G_LOOP, least, most, next, 0);
    any.pairs.a = g->a;
    g->loop = loop;
    int32_t bump = llmi_g_state(g, LLMI_G_BUMP, loop, 0);
    if (!llmi_gset_add(&any, 1, 0x10ffff)) g->failed = 1;
    int32_t body = llmi_g_json_char(g, &any, 1, bump);
    g->loop = -1;
    llmi_ids_drop(&any.pairs);
    if (g->failed) return 0;
    g->states[loop].other = body;
    g->states[loop].any_text = 1;
    return loop;
}

/* Strings: a pattern or a format, and lengths. */
static int32_t llmi_schema_string(llmi_schema *c, const llmi_view *v, int32_t next)
{
    const moq_json *form = NULL, *at = llmi_schema_first(v, "minLength");
    int32_t least = llmi_schema_count(v, "minLength", 1, 0), most = llmi_schema_count(v, "maxLength", 0, -1), s;
    for (int32_t i = 0; i < v->count; i++)
        for (int k = 0; k < 2; k++) {
            const moq_json *e = moq_json_find(v->part[i].node, k ? "format" : "pattern");
            if (e && form && !llmi_json_equal(e, form))
                LLMI_SCHEMA_REFUSE(c, MOQ_E_UNSUPPORTED, e, "a second pattern or format for the same string; join them in one pattern");
            if (e) form = e;
        }
    if (most >= 0 && least > most) {
        LLMI_SCHEMA_NEVER(c, v, at, "minLength %d is above maxLength %d", (int)least, (int)most);
        return -1;
    }
    int32_t close = llmi_g_byte(c->g, '"', '"', next);
    if (!form) s = llmi_schema_free_text(c->g, least, most, close);
    else {
        const llmi_regex *x = llmi_schema_pattern(c, form, 0);
        s = x ? llmi_g_pattern(c->g, x, least, most, close) : 0;
    }
    return llmi_g_byte(c->g, '"', '"', s);
}

/* ---- arrays and objects ---- */

/* A comma or colon, and where spaces are wanted one after it. */
static int32_t llmi_g_mark(const llmi_schema *c, char mark, int32_t next)
{
    int32_t after = c->spaces ? llmi_g_either(c->g, next, llmi_g_byte(c->g, ' ', ' ', next)) : next;
    return llmi_g_byte(c->g, (uint8_t)mark, (uint8_t)mark, after);
}

/* The view of an array's element. */
static void llmi_schema_element_view(llmi_schema *c, const llmi_view *v, size_t index, llmi_view *out)
{
    memset(out, 0, sizeof *out);
    for (int32_t i = 0; i < v->count; i++) {
        const moq_json *e = llmi_schema_element(v->part[i].node, index);
        if (e) llmi_schema_add(c, out, e);
    }
    out->merged |= v->merged && out->count > 1;
}

/* '[' elements ']' with the first ones by prefixItems. */
static int32_t llmi_schema_array(llmi_schema *c, const llmi_view *v, int32_t next)
{
    llm_grammar *g = c->g;
    int32_t least = llmi_schema_count(v, "minItems", 1, 0), most = llmi_schema_count(v, "maxItems", 0, -1), prefix = 0, rule, outer = g->rule;
    llmi_view item;
    int unique = 0;
    for (int32_t i = 0; i < v->count; i++) {
        const moq_json *p = moq_json_find(v->part[i].node, "prefixItems"), *items = moq_json_find(v->part[i].node, "items");
        if (!p && items && items->type == MOQ_JSON_ARRAY) p = items;
        if (p && (int32_t)p->count > prefix) prefix = (int32_t)p->count;
        if (moq_json_bool(moq_json_find(v->part[i].node, "uniqueItems"), &unique) && unique && (most < 0 || most > 1))
            LLMI_SCHEMA_REFUSE(c, MOQ_E_UNSUPPORTED, moq_json_find(v->part[i].node, "uniqueItems"),
                               "cannot be enforced for more than one element; use an object with one member for each");
    }
    for (int32_t i = 0; i <= prefix && c->code >= 0; i++) { /* false ends the array */
        llmi_schema_element_view(c, v, (size_t)i, &item);
        if (item.nothing && (most < 0 || most > i)) most = i;
    }
    if (most >= 0 && least > most) {
        LLMI_SCHEMA_NEVER(c, v, llmi_schema_first(v, "minItems"), "minItems %d is above the %d elements that are possible", (int)least, (int)most);
        return -1;
    }
    int32_t close = llmi_g_byte(g, ']', ']', next), after = close;
    if (most < 0 || most > prefix) {
        llmi_schema_element_view(c, v, (size_t)prefix, &item);
        int32_t value = llmi_schema_rule(c, &item);
        g->rule = rule = llmi_g_rule(g, 0);
        int32_t last = llmi_g_state(g, LLMI_G_END, 0, 0), start = llmi_g_mark(c, ',', llmi_g_state(g, LLMI_G_CALL, last, value));
        g->rule = outer;
        if (g->failed) return 0;
        g->rules[rule].start = start;
        if (prefix == 0) { /* the first element has no comma */
            int32_t more = llmi_g_counted(g, LLMI_G_REPEAT, least > 1 ? least - 1 : 0, most < 0 ? -1 : most - 1, close, rule);
            after = llmi_g_state(g, LLMI_G_CALL, more, value);
            if (least == 0) after = llmi_g_either(g, close, after);
        } else {
            after = llmi_g_counted(g, LLMI_G_REPEAT, least > prefix ? least - prefix : 0, most < 0 ? -1 : most - prefix, close, rule);
        }
    }
    for (int32_t i = prefix; i-- > 0 && c->code >= 0;) { /* after: what follows i + 1 elements; becomes what follows i */
        int32_t here = i >= least ? close : -1;
        if (most < 0 || most > i) {
            llmi_schema_element_view(c, v, (size_t)i, &item);
            int32_t call = llmi_g_state(g, LLMI_G_CALL, after, llmi_schema_rule(c, &item));
            here = llmi_g_either(g, here, i ? llmi_g_mark(c, ',', call) : call);
        }
        after = here < 0 ? llmi_g_bytes(g, NULL, 0) : here;
    }
    return llmi_g_byte(g, '[', '[', after);
}

/* A member of objects: its name and what must hold of it. */
typedef struct llmi_member_view { const char *name; uint32_t bytes; int32_t required, rule; } llmi_member_view;

/* The view of a member by name. */
static void llmi_schema_member_view(llmi_schema *c, const llmi_view *v, const char *name, llmi_view *out)
{
    memset(out, 0, sizeof *out);
    for (int32_t i = 0; i < v->count; i++) {
        const moq_json *e = moq_json_find(moq_json_find(v->part[i].node, "properties"), name);
        if (!e) e = moq_json_find(v->part[i].node, "additionalProperties");
        if (e) llmi_schema_add(c, out, e);
    }
    out->merged |= v->merged && out->count > 1;
}

/* The names of properties and required over all parts, in the order they are met; *count of them. */
static llmi_member_view *llmi_schema_members(llmi_schema *c, const llmi_view *v, int32_t *count)
{
    size_t most = 0;
    *count = 0;
    for (int32_t i = 0; i < v->count; i++) {
        const moq_json *p = moq_json_find(v->part[i].node, "properties"), *r = moq_json_find(v->part[i].node, "required");
        if (p && p->type != MOQ_JSON_OBJECT) LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, p, "must be an object of schemas");
        if (r && r->type != MOQ_JSON_ARRAY) LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, r, "must be a list of names");
        most += (size_t)(p ? p->count : 0) + (r ? r->count : 0);
    }
    llmi_member_view *m = (llmi_member_view *)llmi_take(&c->r, most + 1, sizeof *m);
    llmi_map map;
    if (!m || !llmi_map_make(&map, &c->r, most + 1)) { llmi_schema_nomem(c); return NULL; }
    for (int k = 0; k < 2; k++)
        for (int32_t i = 0; i < v->count && c->code >= 0; i++) {
            const moq_json *list = moq_json_find(v->part[i].node, k ? "required" : "properties");
            for (const moq_json *e = moq_json_first(list); e && c->code >= 0; e = moq_json_next(list, e)) {
                const char *name = k ? moq_json_string(e) : e->key;
                uint32_t bytes = k ? e->text_bytes : e->key_bytes;
                if (!name) { LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, e, "must be the name of a member"); break; }
                const llmi_slot *s = llmi_map_add(&map, name, bytes, *count);
                int32_t at = s ? s->value : (*count)++;
                m[at].name = name;
                m[at].bytes = bytes;
                m[at].required |= k;
            }
        }
    return m;
}

/* Which schema do members without a declaration follow? 0: there are none. */
static int llmi_schema_free_members(llmi_schema *c, const llmi_view *v, int32_t declared, llmi_view *out)
{
    int asked = 0;
    memset(out, 0, sizeof *out);
    for (int32_t i = 0; i < v->count; i++) {
        const moq_json *e = moq_json_find(v->part[i].node, "additionalProperties");
        asked |= e != NULL;
        if (e) llmi_schema_add(c, out, e);
    }
    return !out->nothing && (asked || declared == 0);
}

/* Free members least..most, then next; `comma`: others came before. `names` are taken by declared members. */
static int32_t llmi_schema_keys(llmi_schema *c, const llmi_view *value, const llmi_member_view *m, int32_t declared, int32_t least, int32_t most, int comma,
                                int32_t next)
{
    llm_grammar *g = c->g;
    int32_t rule[3], end[3], key_end, keys[2], outer = g->rule, called = llmi_schema_rule(c, value);
    llmi_gset letters = {{{NULL, NULL, NULL}, NULL, 0, 0}};
    letters.pairs.a = g->a;
    if (!llmi_gset_add(&letters, 0x20, 0x21) || !llmi_gset_add(&letters, 0x23, 0x5b) || !llmi_gset_add(&letters, 0x5d, 0x10ffff)) g->failed = 1;
    for (int i = 0; i < 3; i++) { /* a first name, one after a comma, a value */
        g->rule = rule[i] = llmi_g_rule(g, 0);
        end[i] = llmi_g_state(g, LLMI_G_END, 0, 0);
        int32_t s;
        if (i == 2) s = llmi_g_mark(c, ':', llmi_g_state(g, LLMI_G_CALL, end[i], called));
        else { /* names are written without escapes, so that two of them are equal only when their bytes are; and never empty */
            g->in_key = 1;
            int32_t loop = llmi_g_counted(g, LLMI_G_LOOP, 1, -1, llmi_g_byte(g, '"', '"', end[i]), 0);
            g->loop = loop;
            int32_t bump = llmi_g_state(g, LLMI_G_BUMP, loop, 0), body = llmi_g_char(g, &letters, bump);
            g->loop = -1;
            g->in_key = 0;
            if (!g->failed) g->states[loop].other = body;
            s = llmi_g_byte(g, '"', '"', loop);
            if (i == 1) s = llmi_g_mark(c, ',', s);
        }
        if (!g->failed) g->rules[rule[i]].start = s;
    }
    llmi_ids_drop(&letters.pairs);
    g->rule = outer;
    key_end = llmi_g_state(g, LLMI_G_KEY_END, 0, rule[2]);
    keys[1] = llmi_g_counted(g, LLMI_G_KEYS, least, most, next, rule[1]);
    keys[0] = comma ? keys[1] : llmi_g_counted(g, LLMI_G_KEYS, least, most, next, rule[0]);
    if (g->failed) return 0;
    g->states[keys[0]].extra = g->states[keys[1]].extra = key_end;
    g->states[key_end].next = keys[1];
    for (int32_t i = 0; i < declared; i++) {
        void *p = g->names;
        if (!llmi_g_room(g, &p, g->name_count, &g->name_capacity, sizeof *g->names)) return 0;
        g->names = (llmi_gname *)p;
        g->names[g->name_count].owner = key_end;
        g->names[g->name_count].at = (uint32_t)g->words.count;
        g->names[g->name_count++].bytes = m[i].bytes;
        if (!llmi_bytes_add(&g->words, m[i].name, m[i].bytes)) g->failed = 1;
    }
    return keys[0];
}

/* "name": value, with a comma before it, then next. */
static int32_t llmi_schema_member(llmi_schema *c, const llmi_member_view *m, int comma, int32_t next)
{
    llmi_bytes text = llmi_bytes_make(&c->g->a);
    int32_t s = llmi_g_mark(c, ':', llmi_g_state(c->g, LLMI_G_CALL, next, m->rule));
    if (!llmi_json_write_string(&text, m->name, m->bytes)) c->g->failed = 1;
    else s = llmi_g_text(c->g, text.data, text.count, s);
    llmi_bytes_drop(&text);
    return comma ? llmi_g_mark(c, ',', s) : s;
}

/* Settle the members: rules of their values; contradictions of required ones. Returns how many are required, -1: impossible. */
static int32_t llmi_schema_settle(llmi_schema *c, const llmi_view *v, llmi_member_view *m, int32_t *count)
{
    int32_t required = 0, kept = 0;
    for (int32_t i = 0; i < *count && c->code >= 0; i++) {
        llmi_view value;
        llmi_schema_member_view(c, v, m[i].name, &value);
        if (value.nothing && m[i].required) {
            const moq_json *list = llmi_schema_first(v, "required");
            LLMI_SCHEMA_NEVER(c, v, list ? list : value.nothing, "requires '%q', which the schema forbids", m[i].name);
            return -1;
        }
        required += m[i].required;
        m[i].rule = value.nothing ? -1 : llmi_schema_rule(c, &value);
        kept += m[i].rule >= 0;
    }
    return kept ? required : 0;
}

/* '{' members '}'. State [i][k]: members before i are settled, k of them were written. */
static int32_t llmi_schema_object(llmi_schema *c, const llmi_view *v, int32_t next)
{
    llm_grammar *g = c->g;
    int32_t count, least = llmi_schema_count(v, "minProperties", 1, 0), most = llmi_schema_count(v, "maxProperties", 0, -1);
    llmi_member_view *m = llmi_schema_members(c, v, &count);
    llmi_view open;
    int32_t required = m ? llmi_schema_settle(c, v, m, &count) : -1;
    int is_open = llmi_schema_free_members(c, v, count, &open), counted = least > 0 || most >= 0;
    int32_t wide = counted ? count : count ? 1 : 0, possible = 0;
    if (c->code < 0 || required < 0) return -1;
    for (int32_t i = 0; i < count; i++) possible += m[i].rule >= 0;
    if ((most >= 0 && (required > most || least > most)) || (!is_open && least > possible)) {
        LLMI_SCHEMA_NEVER(c, v, llmi_schema_first(v, least > possible || least > most ? "minProperties" : "maxProperties"),
                          "%d members are required and %d possible, which does not fit minProperties and maxProperties", (int)required, (int)possible);
        return -1;
    }
    if (is_open && least - possible > 50) LLMI_SCHEMA_REFUSE(c, MOQ_E_LIMIT, llmi_schema_first(v, "minProperties"),
                        "more than 50 members with free names; declare them in properties, or use an array");
    if ((int64_t)(wide + 1) * count > LLMI_G_MOST_STATES) g->failed = 2;
    int32_t *at = (int32_t *)llmi_take(&c->r, (size_t)wide + 1, sizeof *at);
    if (!at) { llmi_schema_nomem(c); return -1; }
    int32_t close = llmi_g_byte(g, '}', '}', next);
    for (int32_t k = 0; k <= wide; k++) {
        int32_t rest = least > k ? least - k : 0, room = most < 0 ? -1 : most - k;
        at[k] = counted && (room < -1 || (most >= 0 && room < 0) || (rest > 0 && !is_open)) ? -1 : close;
        if (is_open && at[k] >= 0 && room != 0) at[k] = llmi_schema_keys(c, &open, m, count, rest, room, k > 0, close);
    }
    for (int32_t i = count; i-- > 0 && !g->failed;)
        for (int32_t k = 0; k <= wide; k++) { /* at[k] and at[k + 1] are still those of i + 1 */
            int32_t on = counted && k == wide ? -1 : at[k < wide ? k + 1 : k], with = m[i].rule < 0 || on < 0 ? -1 : llmi_schema_member(c, &m[i], k > 0, on);
            at[k] = m[i].required ? with : llmi_g_either(g, with, at[k]);
        }
    return at[0] < 0 ? -1 : llmi_g_byte(g, '{', '{', at[0]);
}

/* ---- branches ---- */

/* Is no document that is written for `a` valid under `b`? 0 when that cannot be told. */
static int llmi_view_apart(llmi_schema *c, const llmi_view *a, const llmi_view *b)
{
    int32_t made, other, shared;
    const moq_json *list = llmi_view_values(a);
    int apart = 1;
    llmi_dec x, y;
    int x_strict = 0, y_strict = 0;
    if (a->nothing || b->nothing) return 1;
    c->checks += 64;
    if (c->checks > LLMI_MOST_CHECKS && a->count) LLMI_SCHEMA_REFUSE(c, MOQ_E_LIMIT, a->part[0].node, "takes too long to check; give it fewer branches of oneOf");
    if (c->code < 0) return 0;
    for (const moq_json *e = list ? llmi_value_next(list, NULL) : NULL; e && apart; e = llmi_value_next(list, e))
        if (llmi_view_holds(c, a, e)) apart = !llmi_view_holds(c, b, e);
    if (list) return apart;
    list = llmi_view_values(b);
    for (const moq_json *e = list ? llmi_value_next(list, NULL) : NULL; e && apart; e = llmi_value_next(list, e)) apart = !llmi_view_holds(c, a, e);
    if (list && apart) return 1;
    llmi_view_types(c, a, &made);
    shared = made & llmi_view_types(c, b, &other);
    if (shared & (LLMI_T_NULL | LLMI_T_BOOL)) return 0;
    if (shared & (LLMI_T_INT | LLMI_T_FRACTION)) {
        int order = 0;
        if (llmi_view_bound(a, 1, &x, &x_strict) && llmi_view_bound(b, 0, &y, &y_strict)) order = llmi_dec_compare(&x, &y) < (x_strict | y_strict);
        if (!order && llmi_view_bound(a, 0, &x, &x_strict) && llmi_view_bound(b, 1, &y, &y_strict)) order = llmi_dec_compare(&y, &x) < (x_strict | y_strict);
        if (!order) return 0;
    }
    if (shared & LLMI_T_STRING) {
        int32_t a_most = llmi_schema_count(a, "maxLength", 0, -1), b_most = llmi_schema_count(b, "maxLength", 0, -1);
        if (!(a_most >= 0 && a_most < llmi_schema_count(b, "minLength", 1, 0)) && !(b_most >= 0 && b_most < llmi_schema_count(a, "minLength", 1, 0))) return 0;
    }
    if (shared & LLMI_T_ARRAY) {
        int32_t a_most = llmi_schema_count(a, "maxItems", 0, -1), b_most = llmi_schema_count(b, "maxItems", 0, -1);
        if (!(a_most >= 0 && a_most < llmi_schema_count(b, "minItems", 1, 0)) && !(b_most >= 0 && b_most < llmi_schema_count(a, "minItems", 1, 0))) return 0;
    }
    if (!(shared & LLMI_T_OBJECT)) return 1;
    if (++c->depth > 20) { c->depth--; return 0; }
    int32_t count, found = 0;
    llmi_view p, q;
    const llmi_member_view *m = llmi_schema_members(c, a, &count);
    for (int32_t i = 0; m && i < count && !found && c->code >= 0; i++) { /* a member that is always there and never fits b */
        if (!m[i].required) continue;
        llmi_schema_member_view(c, a, m[i].name, &p);
        llmi_schema_member_view(c, b, m[i].name, &q);
        found = q.nothing || llmi_view_apart(c, &p, &q);
    }
    int32_t declared = count, wants;
    int is_open = llmi_schema_free_members(c, a, declared, &p);
    const llmi_member_view *w = llmi_schema_members(c, b, &wants);
    for (int32_t i = 0; w && m && i < wants && !found && !is_open; i++) { /* a member that b wants and a never writes */
        int32_t k = 0;
        while (k < declared && (m[k].bytes != w[i].bytes || memcmp(m[k].name, w[i].name, w[i].bytes) != 0)) k++;
        found = w[i].required && k == declared;
    }
    c->depth--;
    return found;
}

/* The view with one branch in place of its anyOf or oneOf. */
static void llmi_schema_branch_view(llmi_schema *c, const llmi_view *v, int32_t part, int32_t taken, const moq_json *branch, llmi_view *out)
{
    *out = *v;
    out->part[part].taken |= taken;
    out->merged = 1;
    llmi_schema_add(c, out, branch);
}

/* One branch or another. Of oneOf only those that cannot hold together. */
static int32_t llmi_schema_either(llmi_schema *c, const llmi_view *v, int32_t part, int one, int32_t next)
{
    const moq_json *list = moq_json_find(v->part[part].node, one ? "oneOf" : "anyOf");
    llmi_view a, b;
    int32_t s = -1, taken = one ? LLMI_TAKEN_ONE : LLMI_TAKEN_ANY;
    if (list->type != MOQ_JSON_ARRAY || list->count == 0) { LLMI_SCHEMA_REFUSE(c, MOQ_E_GRAMMAR, list, "must be a list of at least one schema"); return -1; }
    if (one && !c->u.classes && !llmi_unicode_make(&c->u, &c->r)) { llmi_schema_nomem(c); return -1; } /* a pattern met below would put them into what is dropped */
    for (const moq_json *e = moq_json_first(list); e && c->code >= 0; e = moq_json_next(list, e)) {
        llmi_schema_branch_view(c, v, part, taken, e, &a);
        llmi_arena kept = c->r;
        c->r = llmi_arena_make(&c->g->a); /* what comparing takes is not needed after it */
        for (const moq_json *f = one ? moq_json_first(list) : NULL; f && c->code >= 0; f = moq_json_next(list, f)) {
            if (e == f) continue;
            llmi_schema_branch_view(c, v, part, taken, f, &b);
            if (!llmi_view_apart(c, &a, &b))
                LLMI_SCHEMA_REFUSE(c, MOQ_E_UNSUPPORTED, f, "may hold together with an earlier or later branch of oneOf, which allows exactly one; "
                                   "tell the branches apart by type or by a required member with different const, or use anyOf");
        }
        llmi_arena_drop(&c->r);
        c->r = kept;
        s = llmi_g_either(c->g, s, llmi_g_state(c->g, LLMI_G_CALL, next, llmi_schema_rule(c, &a)));
    }
    return s;
}

/* ---- a view ---- */

/* The states of a view, or -1: nothing satisfies it. */
static int32_t llmi_schema_build(llmi_schema *c, const llmi_view *v, int32_t next)
{
    int32_t made, s = -1;
    const moq_json *values = llmi_view_values(v);
    if (v->nothing) {
        if (c->never.code == MOQ_OK) moq_fail(&c->never, MOQ_E_GRAMMAR, llmi_schema_where(c, v->nothing),
                            "the schema false allows nothing; leave it out, or say what is allowed");
        return -1;
    }
    if (values) return llmi_schema_values(c, v, values, next);
    for (int32_t i = 0; i < v->count; i++) {
        if (!(v->part[i].taken & LLMI_TAKEN_ANY) && moq_json_find(v->part[i].node, "anyOf")) return llmi_schema_either(c, v, i, 0, next);
        if (!(v->part[i].taken & LLMI_TAKEN_ONE) && moq_json_find(v->part[i].node, "oneOf")) return llmi_schema_either(c, v, i, 1, next);
    }
    llmi_view_types(c, v, &made);
    if (!made) LLMI_SCHEMA_NEVER(c, v, llmi_schema_first(v, "type"), "the types asked for here exclude each other");
    if (made & LLMI_T_NULL) s = llmi_g_text(c->g, "null", 4, next);
    if (made & LLMI_T_BOOL) s = llmi_g_either(c->g, s, llmi_g_either(c->g, llmi_g_text(c->g, "true", 4, next), llmi_g_text(c->g, "false", 5, next)));
    if (made & (LLMI_T_INT | LLMI_T_FRACTION)) s = llmi_g_either(c->g, s, llmi_schema_number(c, v, !(made & LLMI_T_FRACTION), next));
    if (made & LLMI_T_STRING) s = llmi_g_either(c->g, s, llmi_schema_string(c, v, next));
    if (made & LLMI_T_ARRAY) s = llmi_g_either(c->g, s, llmi_schema_array(c, v, next));
    if (made & LLMI_T_OBJECT) s = llmi_g_either(c->g, s, llmi_schema_object(c, v, next));
    if (made & (LLMI_T_ARRAY | LLMI_T_OBJECT) && !c->g->failed) c->g->rules[c->g->rule].weight = 1;
    return s;
}

/* All rules that the root's view leads to. */
static void llmi_schema_build_all(llmi_schema *c)
{
    llm_grammar *g = c->g;
    llmi_view v;
    memset(&v, 0, sizeof v);
    llmi_schema_add(c, &v, c->root);
    if (c->code >= 0) g->root = llmi_schema_rule(c, &v);
    for (const llmi_job *j = c->first; j && c->code >= 0 && !g->failed; j = j->next) {
        g->rule = j->rule;
        int32_t end = llmi_g_state(g, LLMI_G_END, 0, 0), start = llmi_schema_build(c, &j->view, end);
        if (start < 0) start = llmi_g_bytes(g, NULL, 0); /* no way on */
        if (!g->failed) g->rules[j->rule].start = start;
    }
}

/* Compile a schema into g. */
static moq_result llmi_schema_compile(llm_grammar *g, const char *text, size_t bytes, int32_t spaces, moq_error *err)
{
    llmi_schema *c = (llmi_schema *)moq_allocate(&g->a, sizeof *c);
    moq_result code;
    int32_t recursive = -1;
    if (!c) return llmi_nomem(err, "schema");
    moq_json_doc *doc = moq_json_parse(text, bytes, MOQ_JSON_STRICT, 0, "schema", &g->a, err);
    c->g = g;
    c->err = err;
    c->root = moq_json_root(doc);
    c->r = c->fixed = llmi_arena_make(&g->a);
    c->spaces = spaces;
    g->deepest = LLMI_G_DEEP_JSON;
    if (!doc) c->code = llmi_code(err, MOQ_E_JSON);
    else llmi_schema_build_all(c);
    if (c->code >= 0 && c->wrong.code < 0 && !g->failed) {
        c->code = c->wrong.code;
        if (err) *err = c->wrong;
    }
    if (c->code >= 0) c->code = llmi_g_finish(g, "#", &recursive, err);
    if (c->code == MOQ_E_GRAMMAR && recursive >= 0) {
        const llmi_job *j = c->first;
        while (j && j->rule != recursive) j = j->next;
        const moq_json *at = j && j->view.count ? j->view.part[j->view.count - 1].node : c->root;
        moq_fail(err, MOQ_E_GRAMMAR, llmi_schema_where(c, at), "leads to itself through anyOf or oneOf without anything in between; put it into properties or items");
    } else if (c->code == MOQ_E_GRAMMAR && c->never.code < 0 && err && c->wrong.code == MOQ_OK) {
        *err = c->never;
    }
    code = c->code;
    moq_json_destroy(doc);
    llmi_arena_drop(&c->r);
    llmi_arena_drop(&c->fixed);
    moq_release(&g->a, c, sizeof *c);
    return code;
}

LLM_API llm_grammar *llm_grammar_create(const llm_grammar_desc *desc, moq_error *err)
{
    const moq_allocator *a = desc ? &desc->allocator : NULL;
    moq_error own;
    moq_result r;
    llm_grammar *g;
    if (!err) err = &own;
    if (!desc || (desc->schema != NULL) == (desc->gbnf != NULL)) {
        moq_fail(err, MOQ_E_ARG, "llm_grammar_desc", "exactly one of schema and gbnf must be given");
        return NULL;
    }
    const char *text = desc->schema ? desc->schema : desc->gbnf;
    size_t bytes = desc->bytes ? desc->bytes : strlen(text);
    g = llmi_g_make(a);
    if (!g) { llmi_nomem(err, "grammar"); return NULL; }
    r = desc->schema ? llmi_schema_compile(g, text, bytes, !desc->compact, err) : llmi_gbnf_compile(g, text, bytes, err);
    if (r < 0) {
        llm_grammar_destroy(g);
        return NULL;
    }
    memset(err, 0, sizeof *err);
    err->offset = -1;
    return g;
}

LLM_API int64_t llm_grammar_shortest(const llm_grammar *g) { return g ? g->rest[g->rules[g->root].start] : 0; }

/* ------------------------------------------------------------------------------------------------
   >>llm-lexicon     the vocabulary as a tree of bytes
   Built once for a tokenizer; never changes. Control tokens and tokens without text are not in it.
   ------------------------------------------------------------------------------------------------ */

/* A node of the tree; nodes lie in depth-first order, so a subtree is the range [its index, skip). plain: all tokens in it are. */
typedef struct llmi_lex { uint32_t skip; int32_t token; uint16_t depth; uint8_t byte, plain; } llmi_lex; /* token -1: none ends here */

typedef struct llmi_lexicon {
    moq_allocator a;
    llmi_arena r;
    const llm_tokenizer *t;
    llmi_lex *nodes;      /* [count]; node 0 is the root */
    uint32_t count;
    int32_t *same;        /* [vocab] the next token with the same bytes, -1: none */
    uint32_t child[256];  /* of the root; 0: none */
    int32_t vocab, longest;
    int32_t *plain;       /* whole characters that JSON strings hold as they are: those with n characters are [plain_end[n - 1], plain_end[n]) */
    int32_t *plain_end;   /* [plain_most + 1] */
    uint32_t *plain_bits; /* [(vocab + 31) / 32 + 1] all of them */
    int32_t plain_most;
    int32_t *spaced;      /* tokens that look different at the beginning of a text, where decoders strip spaces */
    int32_t spaced_count;
    uint8_t strips;
} llmi_lexicon;

/* Tokens that may stand inside a document. */
static int llmi_lex_usable(const llm_tokenizer *t, int32_t id)
{
    const llmi_token *x = &t->tokens[id];
    return x->present && !x->special && x->shown_bytes > 0 && x->shown_bytes < 60000 && !llm_is_end(t, id);
}

/* a before b: by bytes, then by id. */
static int llmi_lex_before(const void *in, int32_t a, int32_t b)
{
    const llm_tokenizer *t = (const llm_tokenizer *)in;
    const llmi_token *x = &t->tokens[a], *y = &t->tokens[b];
    int c = memcmp(x->shown, y->shown, x->shown_bytes < y->shown_bytes ? x->shown_bytes : y->shown_bytes);
    return c ? c < 0 : x->shown_bytes != y->shown_bytes ? x->shown_bytes < y->shown_bytes : a < b;
}

/* Bytes that a and b have in common at their beginning. */
static uint32_t llmi_lex_common(const llmi_token *a, const llmi_token *b)
{
    uint32_t n = 0;
    while (n < a->shown_bytes && n < b->shown_bytes && a->shown[n] == b->shown[n]) n++;
    return n;
}

/* May a JSON string hold this byte as it is, or as part of a character? */
static int llmi_lex_is_plain(int byte) { return byte >= 0x20 && byte != '"' && byte != '\\'; }

/* The characters of a token that is plain; 0: it is not. */
static int32_t llmi_lex_chars(const llmi_token *t)
{
    int32_t count = 0;
    for (size_t i = 0, n; i < t->shown_bytes; i += n, count++) {
        uint32_t cp;
        if (!llmi_lex_is_plain((uint8_t)t->shown[i])) return 0;
        n = llmi_utf8_get(t->shown + i, t->shown_bytes - i, &cp, NULL);
        if (cp == LLMI_REPLACEMENT && (n != 3 || memcmp(t->shown + i, "\357\277\275", 3) != 0)) return 0;
    }
    return count;
}

/* The lists of plain tokens; chars [n] of list. 0: out of memory. */
static int llmi_lex_sort_plain(llmi_lexicon *x, const int32_t *list, const int32_t *chars, size_t n)
{
    int32_t total = 0;
    for (size_t i = 0; i < n; i++)
        if (chars[i] > x->plain_most) x->plain_most = chars[i];
    x->plain = (int32_t *)llmi_take(&x->r, n + 1, sizeof *x->plain);
    x->plain_end = (int32_t *)llmi_take(&x->r, (size_t)x->plain_most + 2, sizeof *x->plain_end);
    x->plain_bits = (uint32_t *)llmi_take(&x->r, (size_t)x->vocab / 32 + 2, sizeof *x->plain_bits);
    if (!x->plain || !x->plain_end || !x->plain_bits) return 0;
    for (size_t i = 0; i < n; i++) x->plain_end[chars[i]]++;
    x->plain_end[0] = 0;
    for (int32_t k = 1; k <= x->plain_most; k++) { /* sums: where each length begins */
        int32_t count = x->plain_end[k];
        x->plain_end[k] = total;
        total += count;
    }
    for (size_t i = 0; i < n; i++) { /* each moves its length's beginning to the end */
        int32_t id = list[i];
        if (!chars[i]) continue;
        x->plain[x->plain_end[chars[i]]++] = id;
        x->plain_bits[id >> 5] |= 1u << (id & 31);
    }
    return 1;
}

/* Fill the tree from the sorted list: every token adds the bytes that the one before it does not have. */
static void llmi_lex_fill(llmi_lexicon *x, const int32_t *list, const int32_t *chars, size_t n, uint32_t *open)
{
    const llm_tokenizer *t = x->t;
    uint32_t depth = 0;
    open[0] = 0;
    x->nodes[0].token = -1;
    x->count = 1;
    for (size_t i = 0; i < n; i++) {
        const llmi_token *token = &t->tokens[list[i]];
        uint32_t from = i ? llmi_lex_common(token, &t->tokens[list[i - 1]]) : 0;
        x->same[list[i]] = -1;
        if (i && from == token->shown_bytes && from == t->tokens[list[i - 1]].shown_bytes) { /* the same bytes again */
            llmi_lex *node = &x->nodes[open[from]];
            x->same[list[i]] = node->token;
            node->token = list[i];
            continue;
        }
        for (; depth > from; depth--) x->nodes[open[depth]].skip = x->count;
        for (; depth < token->shown_bytes; depth++) {
            llmi_lex *node = &x->nodes[x->count];
            node->byte = (uint8_t)token->shown[depth];
            node->depth = (uint16_t)(depth + 1);
            node->token = -1;
            node->plain = 1;
            if (depth == 0) x->child[node->byte] = x->count;
            open[depth + 1] = x->count++;
        }
        x->nodes[open[depth]].token = list[i];
        for (uint32_t d = 0; d <= depth && !chars[i]; d++) x->nodes[open[d]].plain = 0;
    }
    for (; depth > 0; depth--) x->nodes[open[depth]].skip = x->count;
    x->nodes[0].skip = x->count;
}

/* Does the decoder strip spaces at the beginning of a text? Then tokens with spaces are looked at one by one there. */
static int llmi_lex_strips(const llm_tokenizer *t)
{
    for (int32_t i = 0; i < t->decoder.count; i++) {
        const llmi_stage *d = &t->decoder.list[i];
        if ((d->kind == LLMI_METASPACE && d->prefix != LLMI_NEVER) || (d->kind == LLMI_STRIP && d->left > 0)) return 1;
    }
    return 0;
}

static void llmi_lexicon_drop(llmi_lexicon *x)
{
    if (!x) return;
    moq_allocator a = x->a;
    llmi_arena_drop(&x->r);
    moq_release(&a, x, sizeof *x);
}

/* The tree of a tokenizer, which must outlive it; NULL: out of memory. */
static llmi_lexicon *llmi_lexicon_make(const llm_tokenizer *t, const moq_allocator *a)
{
    llmi_lexicon *x = (llmi_lexicon *)moq_allocate(a, sizeof *x);
    llmi_arena scratch = llmi_arena_make(a);
    size_t n = 0, nodes = 1;
    if (!x) return NULL;
    if (a) x->a = *a;
    x->r = llmi_arena_make(a);
    x->t = t;
    x->vocab = t->count;
    x->strips = (uint8_t)llmi_lex_strips(t);
    int32_t *list = (int32_t *)llmi_take(&scratch, 2 * (size_t)t->count + 1, sizeof *list);
    x->same = (int32_t *)llmi_take(&x->r, (size_t)t->count + 1, sizeof *x->same);
    int ok = list && x->same;
    for (int32_t i = 0; i < t->count && ok; i++)
        if (llmi_lex_usable(t, i)) list[n++] = i;
    const int32_t *sorted = ok ? llmi_sort_ids(t, list, list + t->count, n, llmi_lex_before) : NULL;
    for (size_t i = 0; i < n && ok; i++) {
        const llmi_token *token = &t->tokens[sorted[i]];
        nodes += token->shown_bytes - (i ? llmi_lex_common(token, &t->tokens[sorted[i - 1]]) : 0);
        if ((int32_t)token->shown_bytes > x->longest) x->longest = (int32_t)token->shown_bytes;
        if (x->strips && memchr(token->shown, ' ', token->shown_bytes)) x->spaced_count++;
    }
    uint32_t *open = ok ? (uint32_t *)llmi_take(&scratch, (size_t)x->longest + 2, sizeof *open) : NULL;
    x->nodes = ok && nodes < UINT32_MAX ? (llmi_lex *)llmi_take(&x->r, nodes, sizeof *x->nodes) : NULL;
    x->spaced = ok ? (int32_t *)llmi_take(&x->r, (size_t)x->spaced_count + 1, sizeof *x->spaced) : NULL;
    int32_t *chars = ok ? (int32_t *)llmi_take(&scratch, n + 1, sizeof *chars) : NULL;
    for (size_t i = 0; i < n && chars; i++) chars[i] = llmi_lex_chars(&t->tokens[sorted[i]]);
    ok = open && chars && x->nodes && x->spaced && llmi_lex_sort_plain(x, sorted, chars, n);
    if (ok) llmi_lex_fill(x, sorted, chars, n, open);
    x->spaced_count = 0;
    for (size_t i = 0; i < n && ok && x->strips; i++) {
        const llmi_token *token = &t->tokens[sorted[i]];
        if (memchr(token->shown, ' ', token->shown_bytes)) x->spaced[x->spaced_count++] = sorted[i];
    }
    llmi_arena_drop(&scratch);
    if (ok) return x;
    llmi_lexicon_drop(x);
    return NULL;
}

/* The child of a node by its byte, or 0. */
static uint32_t llmi_lex_child(const llmi_lexicon *x, uint32_t node, int byte)
{
    if (node == 0) return x->child[byte];
    for (uint32_t i = node + 1; i < x->nodes[node].skip; i = x->nodes[i].skip)
        if (x->nodes[i].byte == byte) return i;
    return 0;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-guide       a grammar on a vocabulary: where a document stands
   Deterministic: a place is a number, and the same bytes lead from it to the same place.
   ------------------------------------------------------------------------------------------------ */

/* Where a document stands is a set of threads, each a BYTES state on a stack of frames. Stacks share their lower parts, equal
   stacks and equal sets get one number, and what a byte does to a set is remembered: a deterministic automaton that is made as
   it is needed. So a place in a document is a number, and copying it is free. */

/* Tuples of `width` numbers, of which the first `keys` identify it; each gets the index of its first arrival. */
typedef struct llmi_pool {
    moq_allocator a;
    int32_t *items;
    int32_t width, keys;
    size_t count, capacity; /* tuples; numbers */
    int32_t *slots;         /* index + 1, 0: free */
    size_t slot_count;
} llmi_pool;

static llmi_pool llmi_pool_make(const moq_allocator *a, int32_t width, int32_t keys)
{
    llmi_pool p;
    memset(&p, 0, sizeof p);
    p.a = *a;
    p.width = width;
    p.keys = keys;
    return p;
}

static void llmi_pool_drop(llmi_pool *p)
{
    moq_release(&p->a, p->items, p->capacity * sizeof *p->items);
    moq_release(&p->a, p->slots, p->slot_count * sizeof *p->slots);
    *p = llmi_pool_make(&p->a, p->width, p->keys);
}

static size_t llmi_pool_slot(const llmi_pool *p, const int32_t *key)
{
    uint64_t h = 0x9e3779b97f4a7c15u;
    for (int32_t i = 0; i < p->keys; i++) {
        h = (h ^ (uint32_t)key[i]) * 0xd6e8feb86659fd93u;
        h ^= h >> 32;
    }
    size_t i = (size_t)h & (p->slot_count - 1);
    for (; p->slots[i]; i = (i + 1) & (p->slot_count - 1)) {
        const int32_t *item = p->items + (size_t)(p->slots[i] - 1) * (size_t)p->width;
        int32_t k = 0;
        while (k < p->keys && item[k] == key[k]) k++;
        if (k == p->keys) break;
    }
    return i;
}

/* The index of a tuple, or -1. */
static int32_t llmi_pool_find(const llmi_pool *p, const int32_t *key) { return p->slot_count ? p->slots[llmi_pool_slot(p, key)] - 1 : -1; }

/* Twice the slots. */
static int llmi_pool_grow(llmi_pool *p)
{
    size_t old = p->slot_count, want = old ? old * 2 : 256;
    int32_t *slots = (int32_t *)moq_allocate(&p->a, want * sizeof *slots);
    if (!slots) return 0;
    moq_release(&p->a, p->slots, old * sizeof *slots);
    p->slots = slots;
    p->slot_count = want;
    for (size_t i = 0; i < p->count; i++) p->slots[llmi_pool_slot(p, p->items + i * (size_t)p->width)] = (int32_t)i + 1;
    return 1;
}

/* Adds a tuple that is not there; -1: out of memory. */
static int32_t llmi_pool_add(llmi_pool *p, const int32_t *tuple)
{
    size_t at = p->count * (size_t)p->width;
    if (p->count >= INT32_MAX / 2 || (p->slot_count / 2 <= p->count && !llmi_pool_grow(p))) return -1;
    if (p->capacity - at < (size_t)p->width) {
        int32_t *items = (int32_t *)llmi_grow(&p->a, p->items, at, &p->capacity, at + (size_t)p->width, sizeof *items);
        if (!items) return -1;
        p->items = items;
    }
    memcpy(p->items + at, tuple, (size_t)p->width * sizeof *tuple);
    p->slots[llmi_pool_slot(p, tuple)] = (int32_t)p->count + 1;
    return (int32_t)p->count++;
}

static int32_t *llmi_pool_at(const llmi_pool *p, int32_t index) { return p->items + (size_t)index * (size_t)p->width; }

/* Numbers of a node, a stack: its state, counter and the node below; then nesting, tokens to the end, and a mark of the last search. */
enum { LLMI_N_STATE, LLMI_N_DATA, LLMI_N_PARENT, LLMI_N_DEPTH, LLMI_N_REST, LLMI_N_MARK, LLMI_N_WIDTH };
/* Numbers of a set of threads: its list and flags; then where the nodes lie, tokens to the end, nesting, and the bytes that go on. */
enum { LLMI_C_LIST, LLMI_C_FLAGS, LLMI_C_FIRST, LLMI_C_COUNT, LLMI_C_REST, LLMI_C_DEPTH, LLMI_C_KEY, LLMI_C_BYTES, LLMI_C_WIDTH = LLMI_C_BYTES + 8 };
enum { LLMI_COMPLETE = 1, LLMI_BELOW = 2 }; /* flags: the document may end here; the frame was left */
enum { LLMI_NODE_BOTTOM, LLMI_NODE_BELOW };  /* the two nodes without a state: under the root rule; "some frame" */
#define LLMI_GUIDE_MOST 400000 /* nodes after which a new document begins with empty tables */
#define LLMI_GUIDE_KEPT (48 << 20) /* bytes of masks' parts after which they are made anew */

/* Tokens that stay above a frame, for one set of threads, with how many tokens the end of the frame is away after them. Inside a free
   text the plain tokens are not listed: any of them may come as long as there is room. */
typedef struct llmi_local {
    uint32_t *bits;       /* [vocab / 32] those with the most frequent distance, `usual`; NULL: few, and they are in the list */
    int32_t *ids, *rests; /* [count] the others and their distances */
    uint32_t *leaves;     /* [leave_count] nodes of the lexicon at which the frame is left, and which have children */
    int32_t count, leave_count, usual;
    int32_t loop, written; /* the LOOP of the free text, -1: none; its characters so far */
} llmi_local;

/* Where in its document a sequence is. Plain data. */
typedef struct llmi_place { int32_t config, key, fresh; } llmi_place; /* key: the free name so far, -1: none; fresh: nothing was written yet */

typedef struct llmi_guide {
    moq_allocator a;
    const llm_grammar *g;
    const llmi_lexicon *x;
    int32_t *rest;          /* [states] least tokens from each state to the end of its rule */
    llmi_pool nodes, lists, configs, steps, locals, names, sets; /* names: (one shorter, byte); sets: names used in an object */
    llmi_ids flat;          /* nodes of all configs */
    llmi_ids todo, found;   /* of the search for threads */
    int32_t *path;          /* [longest + 1] configs along a branch of the lexicon */
    uint32_t *bits;         /* [words] the mask */
    int32_t *allowed;       /* [words * 32] its tokens */
    size_t words;
    llmi_arena kept;        /* llmi_local and their lists */
    size_t kept_bytes;      /* about what they take */
    llmi_ids accepted, leaves;
    int32_t mark, key_now;  /* key_now: the name that a KEY_END sees, -1: any */
    int32_t ends[2 * LLMI_MAX_ENDS];
    int32_t end_count, start, users;
    int failed;
} llmi_guide;

/* ---- nodes ---- */

/* What a state's counter has counted to. */
static int32_t llmi_guide_count(const llmi_guide *g, int32_t state, int32_t data)
{
    int kind = g->g->states[state].kind;
    return kind == LLMI_G_KEYS || kind == LLMI_G_KEY_END ? llmi_pool_at(&g->sets, data)[2] : data;
}

/* The node of a state with its counter on top of `parent`. */
static int32_t llmi_guide_node(llmi_guide *g, int32_t state, int32_t data, int32_t parent)
{
    int32_t tuple[LLMI_N_WIDTH];
    tuple[LLMI_N_STATE] = state;
    tuple[LLMI_N_DATA] = data;
    tuple[LLMI_N_PARENT] = parent;
    int32_t at = llmi_pool_find(&g->nodes, tuple);
    if (at >= 0) return at;
    const int32_t *below = llmi_pool_at(&g->nodes, parent);
    tuple[LLMI_N_DEPTH] = below[LLMI_N_DEPTH] + g->g->rules[g->g->states[state].rule].weight;
    tuple[LLMI_N_REST] = llmi_g_sum(llmi_g_rest(g->g, g->rest, state, llmi_guide_count(g, state, data)), below[LLMI_N_REST]);
    tuple[LLMI_N_MARK] = 0;
    at = llmi_pool_add(&g->nodes, tuple);
    if (at < 0) g->failed = 1;
    return at < 0 ? LLMI_NODE_BOTTOM : at;
}

/* A node that the search for threads has yet to look at. */
static void llmi_guide_visit(llmi_guide *g, int32_t node)
{
    int32_t *n = llmi_pool_at(&g->nodes, node);
    if (n[LLMI_N_MARK] == g->mark || n[LLMI_N_REST] >= LLMI_FAR) return;
    n[LLMI_N_MARK] = g->mark;
    if (!llmi_ids_add(&g->todo, &node, 1)) g->failed = 1;
}

/* ---- free names of members ---- */

/* Does the name with this number spell these bytes? */
static int llmi_guide_spells(const llmi_guide *g, int32_t name, const char *s, size_t n)
{
    for (; name > 0; name = llmi_pool_at(&g->names, name)[0])
        if (n == 0 || llmi_pool_at(&g->names, name)[1] != (uint8_t)s[--n]) return 0;
    return n == 0;
}

/* May a member of the object at this KEY_END node be called so? Neither like a declared one nor like one before. */
static int llmi_guide_is_new(const llmi_guide *g, const int32_t *node, int32_t name)
{
    const llm_grammar *r = g->g;
    for (int32_t set = node[LLMI_N_DATA]; set > 0; set = llmi_pool_at(&g->sets, set)[0])
        if (llmi_pool_at(&g->sets, set)[1] == name) return 0;
    for (size_t i = 0; i < r->name_count; i++)
        if (r->names[i].owner == node[LLMI_N_STATE] && llmi_guide_spells(g, name, r->words.data + r->names[i].at, r->names[i].bytes)) return 0;
    return 1;
}

/* A tuple's index, added when it is new. */
static int32_t llmi_guide_tuple(llmi_guide *g, llmi_pool *p, int32_t a, int32_t b, int32_t c)
{
    int32_t tuple[3], at;
    tuple[0] = a;
    tuple[1] = b;
    tuple[2] = c;
    at = llmi_pool_find(p, tuple);
    if (at < 0 && (at = llmi_pool_add(p, tuple)) < 0) g->failed = 1;
    return at < 0 ? 0 : at;
}

/* ---- sets of threads ---- */

/* A node that is no BYTES state leads on without a byte. */
static int llmi_guide_follow(llmi_guide *g, int32_t at)
{
    const int32_t *node = llmi_pool_at(&g->nodes, at);
    int32_t state = node[LLMI_N_STATE], data = node[LLMI_N_DATA], parent = node[LLMI_N_PARENT];
    const llmi_gstate *s = &g->g->states[state];
    int32_t count = llmi_guide_count(g, state, data), more = s->most < 0 && count >= s->least ? count : count + 1;
    int open = s->most < 0 || count < s->most, frame = parent;
    switch (s->kind) {
    case LLMI_G_END:
        if (parent <= LLMI_NODE_BELOW) return parent == LLMI_NODE_BOTTOM ? LLMI_COMPLETE : LLMI_BELOW;
        llmi_guide_visit(g, parent);
        break;
    case LLMI_G_SPLIT:
        llmi_guide_visit(g, llmi_guide_node(g, s->next, data, parent));
        llmi_guide_visit(g, llmi_guide_node(g, s->other, data, parent));
        break;
    case LLMI_G_CALL: /* a call at the very end of a rule needs no frame */
        if (g->g->states[s->next].kind != LLMI_G_END) frame = llmi_guide_node(g, s->next, 0, parent);
        llmi_guide_visit(g, llmi_guide_node(g, g->g->rules[s->other].start, 0, frame));
        break;
    case LLMI_G_BUMP: {
        const llmi_gstate *loop = &g->g->states[s->next];
        int32_t counted = loop->most < 0 && data >= loop->least ? data : data + 1;
        llmi_guide_visit(g, llmi_guide_node(g, s->next, counted, parent));
        break;
    }
    default: /* REPEAT, LOOP, KEYS, KEY_END */
        if (s->kind == LLMI_G_KEY_END) {
            if (g->key_now >= 0 && !llmi_guide_is_new(g, node, g->key_now)) break;
            int32_t set = llmi_guide_tuple(g, &g->sets, data, g->key_now, count + 1);
            frame = llmi_guide_node(g, s->next, set, parent);
            llmi_guide_visit(g, llmi_guide_node(g, g->g->rules[s->other].start, 0, frame));
            break;
        }
        if (count >= s->least) llmi_guide_visit(g, llmi_guide_node(g, s->next, 0, parent));
        if (!open) break;
        if (s->kind == LLMI_G_LOOP) { llmi_guide_visit(g, llmi_guide_node(g, s->other, data, parent)); break; }
        frame = s->kind == LLMI_G_REPEAT ? llmi_guide_node(g, state, more, parent) : llmi_guide_node(g, s->extra, data, parent);
        llmi_guide_visit(g, llmi_guide_node(g, g->g->rules[s->other].start, 0, frame));
    }
    return 0;
}

/* Fill what is known of a new set from its nodes. */
static void llmi_guide_describe(llmi_guide *g, int32_t *c)
{
    c[LLMI_C_REST] = c[LLMI_C_FLAGS] ? 0 : LLMI_FAR;
    for (size_t i = 0; i < g->found.count; i++) {
        const int32_t *n = llmi_pool_at(&g->nodes, g->found.data[i]);
        const llmi_gstate *s = &g->g->states[n[LLMI_N_STATE]];
        if (n[LLMI_N_REST] < c[LLMI_C_REST]) c[LLMI_C_REST] = n[LLMI_N_REST];
        if (n[LLMI_N_DEPTH] > c[LLMI_C_DEPTH]) c[LLMI_C_DEPTH] = n[LLMI_N_DEPTH];
        c[LLMI_C_KEY] |= s->in_key;
        for (int32_t k = s->least; k < s->most; k++)
            for (int b = g->g->ranges[k].lo; b <= g->g->ranges[k].hi; b++) c[LLMI_C_BYTES + (b >> 5)] |= (int32_t)(1u << (b & 31));
    }
}

/* The set of threads in `found`, sorted, with these flags. */
static int32_t llmi_guide_set(llmi_guide *g, int flags)
{
    int32_t tuple[LLMI_C_WIDTH], list = 0, *v = g->found.data;
    for (size_t i = 1; i < g->found.count; i++) {
        int32_t moving = v[i];
        size_t k = i;
        for (; k > 0 && v[k - 1] > moving; k--) v[k] = v[k - 1];
        v[k] = moving;
    }
    for (size_t i = 0; i < g->found.count; i++) list = llmi_guide_tuple(g, &g->lists, list, v[i], 0);
    memset(tuple, 0, sizeof tuple);
    tuple[LLMI_C_LIST] = list;
    tuple[LLMI_C_FLAGS] = flags;
    int32_t at = llmi_pool_find(&g->configs, tuple);
    if (at >= 0) return at;
    tuple[LLMI_C_FIRST] = (int32_t)g->flat.count;
    tuple[LLMI_C_COUNT] = (int32_t)g->found.count;
    llmi_guide_describe(g, tuple);
    if (!llmi_ids_add(&g->flat, g->found.data, g->found.count) || (at = llmi_pool_add(&g->configs, tuple)) < 0) g->failed = 1;
    return at;
}

/* The threads that all nodes in `todo` lead to; -1: none. */
static int32_t llmi_guide_close(llmi_guide *g)
{
    int flags = 0;
    g->found.count = 0;
    while (g->todo.count > 0 && !g->failed) {
        int32_t at = g->todo.data[--g->todo.count];
        if (at <= LLMI_NODE_BELOW) continue;
        if (g->g->states[llmi_pool_at(&g->nodes, at)[LLMI_N_STATE]].kind != LLMI_G_BYTES) flags |= llmi_guide_follow(g, at);
        else if (!llmi_ids_add(&g->found, &at, 1)) g->failed = 1;
    }
    g->todo.count = 0;
    return g->failed || (g->found.count == 0 && !flags) ? -1 : llmi_guide_set(g, flags);
}

/* Threads after a byte, computed; -1: none. */
static int32_t llmi_guide_compute(llmi_guide *g, int32_t config, int byte)
{
    int32_t first = llmi_pool_at(&g->configs, config)[LLMI_C_FIRST], count = llmi_pool_at(&g->configs, config)[LLMI_C_COUNT];
    g->mark++;
    for (int32_t i = 0; i < count; i++) {
        const int32_t *n = llmi_pool_at(&g->nodes, g->flat.data[first + i]);
        int32_t state = n[LLMI_N_STATE], data = n[LLMI_N_DATA], parent = n[LLMI_N_PARENT];
        const llmi_gstate *s = &g->g->states[state];
        for (int32_t k = s->least; k < s->most; k++)
            if (byte >= g->g->ranges[k].lo && byte <= g->g->ranges[k].hi) llmi_guide_visit(g, llmi_guide_node(g, g->g->ranges[k].next, data, parent));
    }
    return llmi_guide_close(g);
}

/* Threads after a byte, remembered; free names are taken for new. -1: none. */
static int32_t llmi_guide_step(llmi_guide *g, int32_t config, int byte)
{
    int32_t tuple[3];
    if (!((uint32_t)llmi_pool_at(&g->configs, config)[LLMI_C_BYTES + (byte >> 5)] >> (byte & 31) & 1)) return -1;
    tuple[0] = config;
    tuple[1] = byte;
    int32_t at = llmi_pool_find(&g->steps, tuple);
    if (at >= 0) return llmi_pool_at(&g->steps, at)[2];
    g->key_now = -1;
    tuple[2] = llmi_guide_compute(g, config, byte);
    if (!g->failed && llmi_pool_add(&g->steps, tuple) < 0) g->failed = 1;
    return tuple[2];
}

/* The threads of a frame that is gone on with. */
static int32_t llmi_guide_resume(llmi_guide *g, int32_t node)
{
    int32_t tuple[3];
    tuple[0] = node;
    tuple[1] = 256; /* no byte */
    int32_t at = llmi_pool_find(&g->steps, tuple);
    if (at >= 0) return llmi_pool_at(&g->steps, at)[2];
    g->key_now = -1;
    g->mark++;
    llmi_guide_visit(g, node);
    tuple[2] = llmi_guide_close(g);
    if (!g->failed && llmi_pool_add(&g->steps, tuple) < 0) g->failed = 1;
    return tuple[2];
}

/* ------------------------------------------------------------------------------------------------
   >>llm-mask        which tokens may come next, and choosing among them
   No dead ends: a token is allowed only when the document can still be completed in the tokens that are left.
   ------------------------------------------------------------------------------------------------ */

/* Most tokens are chosen without a mask: what the model likes best is nearly always allowed, and one token is followed in no time.

   A mask is put together. Threads that stand on the same frame are looked at without what lies below it, and the tokens that
   stay above that frame are kept for good: all of a string's 100,000 tokens are found once for the grammar. Only tokens that
   leave the frame are followed again with the real stack. */

static void llmi_guide_allow(llmi_guide *g, int32_t token)
{
    for (; token >= 0; token = g->x->same[token]) g->bits[token >> 5] |= 1u << (token & 31);
}

static int llmi_guide_plain(const llmi_guide *g, int32_t token) { return (int)(g->x->plain_bits[token >> 5] >> (token & 31) & 1); }

/* All tokens below a node of the lexicon that `config` allows and that leave at most `left` tokens to the end. */
static void llmi_guide_walk(llmi_guide *g, int32_t config, uint32_t node, int32_t left)
{
    const llmi_lex *n = g->x->nodes;
    g->path[n[node].depth] = config;
    for (uint32_t i = node + 1, end = n[node].skip; i < end && !g->failed;) {
        int32_t c = llmi_guide_step(g, g->path[n[i].depth - 1], n[i].byte);
        if (c < 0) { i = n[i].skip; continue; }
        g->path[n[i].depth] = c;
        if (n[i].token >= 0 && llmi_pool_at(&g->configs, c)[LLMI_C_REST] <= left) llmi_guide_allow(g, n[i].token);
        i++;
    }
}

/* What was found (g->accepted: pairs of a token and its distance; g->leaves) is kept. The most frequent distance is guessed from
   samples: a wrong guess costs time, nothing else. */
static llmi_local *llmi_guide_keep(llmi_guide *g)
{
    llmi_local *l = (llmi_local *)llmi_take(&g->kept, 1, sizeof *l);
    size_t pairs = g->accepted.count / 2, others = 0, best = 0;
    const int32_t *v = g->accepted.data;
    int32_t usual = -1;
    for (size_t i = 0; i < 16 && pairs > g->words; i++) {
        int32_t rest = v[2 * (i * (pairs - 1) / 15) + 1];
        size_t same = 0;
        for (size_t k = 0; k < pairs; k++) same += v[2 * k + 1] == rest;
        if (same > best) { best = same; usual = rest; }
    }
    for (size_t i = 0; i < pairs; i++) others += v[2 * i + 1] != usual;
    if (l) {
        l->usual = usual;
        l->leave_count = (int32_t)g->leaves.count;
        if (usual >= 0) l->bits = (uint32_t *)llmi_take(&g->kept, g->words, sizeof *l->bits);
        l->ids = (int32_t *)llmi_take(&g->kept, others + 1, sizeof *l->ids);
        l->rests = (int32_t *)llmi_take(&g->kept, others + 1, sizeof *l->rests);
        l->leaves = (uint32_t *)llmi_take(&g->kept, g->leaves.count + 1, sizeof *l->leaves);
    }
    if (!l || !l->ids || !l->rests || !l->leaves || (usual >= 0 && !l->bits)) { g->failed = 1; return NULL; }
    g->kept_bytes += sizeof *l + 8 * others + 4 * g->leaves.count + (usual >= 0 ? 4 * g->words : 0);
    for (size_t i = 0; i < g->leaves.count; i++) l->leaves[i] = (uint32_t)g->leaves.data[i];
    for (size_t i = 0; i < pairs; i++) {
        int32_t id = v[2 * i], rest = v[2 * i + 1];
        if (rest == usual) { l->bits[id >> 5] |= 1u << (id & 31); continue; }
        l->ids[l->count] = id;
        l->rests[l->count++] = rest;
    }
    return l;
}

/* The LOOP when one thread of `config` stands in a free text before a character, and none of the others goes on with a plain token; -1. */
static int32_t llmi_guide_free_text(const llmi_guide *g, int32_t config, int32_t *written)
{
    const int32_t *c = llmi_pool_at(&g->configs, config);
    int32_t loop = -1;
    for (int32_t i = 0; i < c[LLMI_C_COUNT]; i++) {
        const int32_t *n = llmi_pool_at(&g->nodes, g->flat.data[c[LLMI_C_FIRST] + i]);
        const llmi_gstate *s = &g->g->states[n[LLMI_N_STATE]];
        if (loop < 0 && s->loop >= 0 && g->g->states[s->loop].any_text && g->g->states[s->loop].other == n[LLMI_N_STATE]) {
            loop = s->loop;
            *written = n[LLMI_N_DATA];
            continue;
        }
        for (int32_t k = s->least; k < s->most; k++)
            for (int b = g->g->ranges[k].lo; b <= g->g->ranges[k].hi; b++)
                if (llmi_lex_is_plain(b)) return -1;
    }
    return loop;
}

/* The tokens that stay above the frame of the threads in `config`, which stand on LLMI_NODE_BELOW. */
static llmi_local *llmi_guide_explore(llmi_guide *g, int32_t config)
{
    const llmi_lex *n = g->x->nodes;
    int32_t written = 0, loop = llmi_guide_free_text(g, config, &written);
    g->accepted.count = g->leaves.count = 0;
    g->path[0] = config;
    for (uint32_t i = 1; i < n[0].skip && !g->failed;) {
        if (loop >= 0 && n[i].plain) { i = n[i].skip; continue; }
        int32_t c = llmi_guide_step(g, g->path[n[i].depth - 1], n[i].byte), at = (int32_t)i, pair[2];
        if (c < 0) { i = n[i].skip; continue; }
        const int32_t *to = llmi_pool_at(&g->configs, c);
        g->path[n[i].depth] = c;
        pair[1] = to[LLMI_C_REST];
        for (int32_t token = n[i].token; token >= 0 && (loop < 0 || !llmi_guide_plain(g, token)); token = g->x->same[token]) {
            pair[0] = token;
            if (!llmi_ids_add(&g->accepted, pair, 2)) g->failed = 1;
        }
        if (to[LLMI_C_FLAGS] & LLMI_BELOW && n[i].skip > i + 1 && !llmi_ids_add(&g->leaves, &at, 1)) g->failed = 1;
        i = to[LLMI_C_COUNT] ? i + 1 : n[i].skip;
    }
    llmi_local *l = g->failed ? NULL : llmi_guide_keep(g);
    if (l) {
        l->loop = loop;
        l->written = written;
    }
    return l;
}

/* A counter that no token can bring to its upper bound changes nothing: one that stands for all of them. */
static int32_t llmi_guide_alike(const llmi_guide *g, int32_t state, int32_t data)
{
    int32_t loop = g->g->states[state].loop;
    const llmi_gstate *s = &g->g->states[loop < 0 ? 0 : loop];
    return loop >= 0 && data > s->least && s->most >= 0 && s->most - data > g->x->longest ? s->least : data;
}

/* What is kept for the threads of `config` that stand on the frame `parent`. */
static llmi_local *llmi_guide_local(llmi_guide *g, int32_t config, int32_t parent)
{
    int32_t first = llmi_pool_at(&g->configs, config)[LLMI_C_FIRST], count = llmi_pool_at(&g->configs, config)[LLMI_C_COUNT], tuple[3];
    g->mark++;
    for (int32_t i = 0; i < count && !g->failed; i++) {
        const int32_t *n = llmi_pool_at(&g->nodes, g->flat.data[first + i]);
        if (n[LLMI_N_PARENT] != parent) continue;
        int32_t state = n[LLMI_N_STATE], data = llmi_guide_alike(g, state, n[LLMI_N_DATA]);
        llmi_guide_visit(g, llmi_guide_node(g, state, data, LLMI_NODE_BELOW));
    }
    tuple[0] = llmi_guide_close(g);
    if (g->failed) return NULL;
    int32_t at = llmi_pool_find(&g->locals, tuple);
    llmi_local *l;
    if (at >= 0) {
        memcpy(&l, llmi_pool_at(&g->locals, at) + 1, sizeof l);
        return l;
    }
    l = llmi_guide_explore(g, tuple[0]);
    if (!l) return NULL;
    int32_t entry[1 + sizeof(llmi_local *) / sizeof(int32_t)];
    entry[0] = tuple[0];
    memcpy(entry + 1, &l, sizeof l);
    if (llmi_pool_add(&g->locals, entry) < 0) g->failed = 1;
    return l;
}

/* The plain tokens of a free text: for which there is room, and after which its end is at most `above` tokens away. */
static void llmi_guide_allow_plain(llmi_guide *g, const llmi_local *l, int32_t above)
{
    const llmi_lexicon *x = g->x;
    const llmi_gstate *s = &g->g->states[l->loop];
    int32_t most = s->most < 0 || s->most - l->written > x->plain_most ? x->plain_most : s->most - l->written, from = 1;
    while (from <= most && llmi_g_rest(g->g, g->rest, l->loop, l->written + from) > above) from++; /* the longer, the nearer to the least length */
    if (from > most) return;
    if (from == 1 && most == x->plain_most) {
        for (size_t w = 0; w < (size_t)x->vocab / 32 + 1; w++) g->bits[w] |= x->plain_bits[w];
        return;
    }
    for (int32_t i = x->plain_end[from - 1]; i < x->plain_end[most]; i++) g->bits[x->plain[i] >> 5] |= 1u << (x->plain[i] & 31);
}

/* All tokens that `config` allows and that leave at most `left` tokens to the end, put together. */
static void llmi_guide_assemble(llmi_guide *g, int32_t config, int32_t left)
{
    int32_t first = llmi_pool_at(&g->configs, config)[LLMI_C_FIRST], count = llmi_pool_at(&g->configs, config)[LLMI_C_COUNT];
    for (int32_t i = 0; i < count && !g->failed; i++) {
        int32_t parent = llmi_pool_at(&g->nodes, g->flat.data[first + i])[LLMI_N_PARENT], seen = 0;
        for (int32_t k = 0; k < i && !seen; k++) seen = llmi_pool_at(&g->nodes, g->flat.data[first + k])[LLMI_N_PARENT] == parent;
        const llmi_local *l = seen ? NULL : llmi_guide_local(g, config, parent);
        if (!l) continue;
        int32_t above = left - llmi_pool_at(&g->nodes, parent)[LLMI_N_REST]; /* what the frame itself may take */
        if (l->loop >= 0) llmi_guide_allow_plain(g, l, above);
        for (size_t w = 0; w < g->words && l->bits && l->usual <= above; w++) g->bits[w] |= l->bits[w];
        for (int32_t k = 0; k < l->count; k++)
            if (l->rests[k] <= above) g->bits[l->ids[k] >> 5] |= 1u << (l->ids[k] & 31);
        int32_t below = l->leave_count && parent > LLMI_NODE_BELOW ? llmi_guide_resume(g, parent) : -1;
        for (int32_t k = 0; k < l->leave_count && below >= 0; k++) llmi_guide_walk(g, below, l->leaves[k], left);
    }
}

/* The bytes that a token shows at a place, in text [capacity]; NULL: longer than any token. */
static const char *llmi_guide_bytes(const llmi_guide *g, const llmi_place *at, int32_t token, char *small, size_t capacity, size_t *n)
{
    const llmi_token *x = &g->x->t->tokens[token];
    *n = x->shown_bytes;
    if (!at->fresh || !g->x->strips || !memchr(x->shown, ' ', *n)) return x->shown;
    *n = llm_decode(g->x->t, &token, 1, 0, small, capacity);
    return *n < capacity ? small : NULL;
}

/* Is the token part of documents at all, so that advancing makes sense? */
static int llmi_guide_knows(const llmi_guide *g, int32_t token)
{
    return token >= 0 && token < g->x->vocab && llmi_lex_usable(g->x->t, token);
}

/* 1: the token may come next, and *at is past it; 0: it may not; -1: out of memory. */
static int llmi_guide_advance(llmi_guide *g, llmi_place *at, int32_t token)
{
    char small[512];
    size_t n;
    llmi_place to = *at;
    if (!llmi_guide_knows(g, token)) return 0;
    const char *s = llmi_guide_bytes(g, at, token, small, sizeof small, &n);
    if (!s || n == 0) return 0;
    for (size_t i = 0; i < n; i++) {
        int byte = (uint8_t)s[i], inside = llmi_pool_at(&g->configs, to.config)[LLMI_C_KEY];
        if (inside && byte == '"') { /* whether the name is new depends on the name, which is not in the threads */
            g->key_now = to.key;
            to.config = llmi_guide_compute(g, to.config, byte);
            g->key_now = -1;
        } else {
            to.config = llmi_guide_step(g, to.config, byte);
        }
        if (g->failed) return -1;
        if (to.config < 0) return 0;
        if (!llmi_pool_at(&g->configs, to.config)[LLMI_C_KEY]) to.key = -1;
        else to.key = inside ? llmi_guide_tuple(g, &g->names, to.key, byte, 0) : 0;
    }
    to.fresh = 0;
    *at = to;
    return g->failed ? -1 : 1;
}

/* Tokens to the end of the document. A free name that is taken needs one more character, and when very many are taken two. */
static int32_t llmi_guide_rest(const llmi_guide *g, const llmi_place *at)
{
    const int32_t *c = llmi_pool_at(&g->configs, at->config);
    int32_t best = c[LLMI_C_FLAGS] & LLMI_COMPLETE ? 0 : LLMI_FAR;
    if (at->key < 0) return c[LLMI_C_REST];
    for (int32_t i = 0; i < c[LLMI_C_COUNT]; i++) {
        const int32_t *n = llmi_pool_at(&g->nodes, g->flat.data[c[LLMI_C_FIRST] + i]);
        int32_t rest = n[LLMI_N_REST];
        if (g->g->states[n[LLMI_N_STATE]].in_key) {
            const int32_t *object = llmi_pool_at(&g->nodes, n[LLMI_N_PARENT]);
            int crowded = llmi_pool_at(&g->sets, object[LLMI_N_DATA])[2] + (int32_t)g->g->name_count > 60;
            int is_short = at->key == 0 || llmi_pool_at(&g->names, at->key)[0] == 0;
            rest += !llmi_guide_is_new(g, object, at->key) || (crowded && is_short);
        }
        if (rest < best) best = rest;
    }
    return best;
}

/* The tokens that may come next when `left` may still be written, this one included: a bit for each id, end tokens among them
   where the document is complete. NULL: out of memory. With free names the mask may hold tokens that llmi_guide_advance refuses. */
static const uint32_t *llmi_guide_mask(llmi_guide *g, const llmi_place *at, int64_t left)
{
    const int32_t *c = llmi_pool_at(&g->configs, at->config);
    int32_t rest = llmi_guide_rest(g, at), most;
    if (c[LLMI_C_DEPTH] > g->g->deepest && rest < left) left = rest;
    most = left > LLMI_FAR ? LLMI_FAR : (int32_t)left - 1;
    if (g->kept_bytes > LLMI_GUIDE_KEPT) {
        llmi_pool_drop(&g->locals);
        llmi_arena_drop(&g->kept);
        g->kept_bytes = 0;
    }
    memset(g->bits, 0, g->words * sizeof *g->bits);
    if (most >= 0) llmi_guide_assemble(g, at->config, most);
    for (int32_t i = 0; at->fresh && i < g->x->spaced_count && !g->failed; i++) {
        llmi_place to = *at;
        int32_t id = g->x->spaced[i];
        g->bits[id >> 5] &= ~(1u << (id & 31));
        if (llmi_guide_advance(g, &to, id) == 1 && llmi_guide_rest(g, &to) <= most) g->bits[id >> 5] |= 1u << (id & 31);
    }
    c = llmi_pool_at(&g->configs, at->config);
    for (int32_t i = 0; i < g->end_count && c[LLMI_C_FLAGS] & LLMI_COMPLETE; i++) g->bits[g->ends[i] >> 5] |= 1u << (g->ends[i] & 31);
    return g->failed ? NULL : g->bits;
}

/* Nothing may follow: the turn is over without running the model again. */
static int llmi_guide_finished(const llmi_guide *g, const llmi_place *at)
{
    const int32_t *c = g->failed ? NULL : llmi_pool_at(&g->configs, at->config);
    return c && c[LLMI_C_FLAGS] & LLMI_COMPLETE && c[LLMI_C_COUNT] == 0;
}

static int llmi_guide_is_end(const llmi_guide *g, int32_t id)
{
    for (int32_t i = 0; i < g->end_count; i++)
        if (g->ends[i] == id) return 1;
    return 0;
}

/* Is any logit a number above -infinity? */
static int llmi_guide_has_number(const float *logits, int32_t vocab)
{
    int32_t i = 0;
    while (i < vocab && llmi_rank(logits[i]) <= 0x007fffffu) i++;
    return i < vocab;
}

/* The logits of the tokens in the mask, one behind the other; their ids go to g->allowed. `out` may be the logits themselves. */
static int32_t llmi_guide_gather(llmi_guide *g, const uint32_t *mask, const float *logits, int32_t vocab, float *out)
{
    int32_t n = 0;
    for (int32_t i = 0; i < vocab && (size_t)i < g->words * 32; i += 32)
        for (uint32_t bits = mask[i >> 5], k = 0; bits; bits >>= 1, k++) {
            int32_t id = i + (int32_t)k;
            if (!(bits & 1) || id >= vocab) continue;
            g->allowed[n] = id;
            out[n++] = logits[id];
        }
    return n;
}

/* Follow a token when `left` may still be written, this one included. 1: it may come, and *at is past it (an end token leaves *at where it
   is); 0: it may not; -1: out of memory. */
static int llmi_guide_take(llmi_guide *g, llmi_place *at, int32_t id, int64_t left)
{
    llmi_place to = *at;
    if (llmi_guide_is_end(g, id)) return (llmi_pool_at(&g->configs, at->config)[LLMI_C_FLAGS] & LLMI_COMPLETE) != 0;
    int moved = llmi_guide_advance(g, &to, id);
    if (moved != 1 || llmi_guide_rest(g, &to) >= left) return moved < 0 ? -1 : 0;
    *at = to;
    return 1;
}

/* What the model likes best, without a mask: greedy its first few tokens, else one draw among all. That is exact: a draw that is refused
   and repeated without the refused token gives every allowed one its share of what is allowed. Filters count what is allowed, so they
   need the mask. Refused ids go to refused [LLM_TOP]. Returns the id, -1: all were refused, -2: no logit is a number, -3: out of memory. */
static int32_t llmi_guide_try(llmi_guide *g, llmi_place *at, const llm_sampling *s, const float *logits, int32_t vocab, int64_t left, uint64_t *random,
                              float *scratch, int32_t *index, int32_t *refused, int32_t *count)
{
    int greedy = llmi_is_greedy(s) || !random || !scratch || !index;
    int32_t n = 0;
    *count = 0;
    if (greedy) n = llmi_top(logits, vocab, LLM_TOP, refused);
    else if (llmi_filters(s)) return llmi_guide_has_number(logits, vocab) ? -1 : -2;
    else if ((refused[0] = llm_sample(s, logits, vocab, random, scratch, index)) >= 0) n = 1;
    for (; *count < n; ++*count) {
        int taken = llmi_guide_take(g, at, refused[*count], left);
        if (taken) return taken < 0 ? -3 : refused[*count];
    }
    return n ? -1 : -2;
}

/* Choose among the allowed tokens as llm_sample does among all, and go past the token; an end token leaves *at where it is.
   mixed [vocab], which may be the logits themselves, is overwritten. -1 and an error: no logit is a number, or out of memory. */
static int32_t llmi_guide_pick(llmi_guide *g, llmi_place *at, const llm_sampling *s, const float *logits, float *mixed, int32_t vocab, int64_t left,
                               uint64_t *random, float *scratch, int32_t *index, moq_error *err)
{
    const uint32_t bits_of_never = 0xff800000u;
    int32_t refused[LLM_TOP], count = 0, id = -3, next = 0, n = 0, rest = 0;
    float never;
    if (!g->failed) {
        rest = llmi_guide_rest(g, at);
        if (llmi_pool_at(&g->configs, at->config)[LLMI_C_DEPTH] > g->g->deepest && rest < left) left = rest;
        id = llmi_guide_try(g, at, s, logits, vocab, left, random, scratch, index, refused, &count);
    }
    if (id >= 0) return id;
    memcpy(&never, &bits_of_never, sizeof never);
    if (id == -1 && llmi_guide_mask(g, at, left)) {
        for (int32_t i = 0; i < count; i++) /* a padded table has rows behind the tokenizer's last token */
            if ((size_t)refused[i] >> 5 < g->words) g->bits[refused[i] >> 5] &= ~(1u << (refused[i] & 31));
        n = llmi_guide_gather(g, g->bits, logits, vocab, mixed);
    }
    for (;;) {
        int32_t k = llm_sample(s, mixed, n, random, scratch, index);
        if (k < 0) k = next < n ? next++ : -1; /* the model is sure that none of them can be: the first that may */
        int taken = k < 0 ? -1 : llmi_guide_take(g, at, g->allowed[k], left);
        if (taken == 1) return g->allowed[k];
        if (taken < 0) break;
        mixed[k] = never;
    }
    if (id == -2) moq_fail(err, MOQ_E_STATE, "logits", "none of %d logits is a number; look for NaN weights with moq_verify and MOQ_VERIFY_DEEP", vocab);
    else if (g->failed) llmi_nomem(err, "grammar");
    else moq_fail(err, MOQ_E_STATE, "grammar", "none of the tokens can go on in the %lld that are left, of which the document needs %d", (long long)left, (int)rest);
    return -1;
}

/* ---- making ---- */

/* From a state along a fixed text by whole tokens: often fewer than its bytes. */
static int32_t llmi_guide_chain(const llmi_guide *g, int32_t state)
{
    const llm_grammar *r = g->g;
    int32_t best = LLMI_FAR, at = state;
    for (uint32_t node = 0; r->states[at].kind == LLMI_G_BYTES && r->states[at].most - r->states[at].least == 1;) {
        const llmi_grange *range = &r->ranges[r->states[at].least];
        if (range->lo != range->hi || (node = llmi_lex_child(g->x, node, range->lo)) == 0) break;
        at = range->next;
        if (r->states[at].loop != r->states[state].loop) break;
        if (g->x->nodes[node].token >= 0 && llmi_g_sum(g->rest[at], 1) < best) best = g->rest[at] + 1;
    }
    return best;
}

/* rest [states]: like llmi_g_measure, in tokens of this vocabulary. */
static void llmi_guide_measure(llmi_guide *g)
{
    int32_t single[256];
    size_t n = g->g->state_count;
    int changed = 1;
    for (int b = 0; b < 256; b++) single[b] = g->x->child[b] && g->x->nodes[g->x->child[b]].token >= 0 ? 1 : LLMI_FAR;
    for (size_t i = 0; i < n; i++) g->rest[i] = LLMI_FAR;
    for (int down = 1; changed; down = !down) {
        changed = 0;
        for (size_t k = 0; k < n; k++) {
            size_t i = down ? n - 1 - k : k;
            int32_t cost = llmi_g_cost(g->g, g->rest, (int32_t)i, single), chain = llmi_guide_chain(g, (int32_t)i);
            if (chain < cost) cost = chain;
            if (cost < g->rest[i]) { g->rest[i] = cost; changed = 1; }
        }
    }
}

/* Empty tables with the two nodes that have no state, and the empty list, name and set. */
static void llmi_guide_clear(llmi_guide *g)
{
    int32_t bottom[LLMI_N_WIDTH], none[3] = {-1, -1, 0};
    llmi_pool *pools[7];
    pools[0] = &g->nodes; pools[1] = &g->lists; pools[2] = &g->configs; pools[3] = &g->steps;
    pools[4] = &g->locals; pools[5] = &g->names; pools[6] = &g->sets;
    for (int i = 0; i < 7; i++) llmi_pool_drop(pools[i]);
    llmi_arena_drop(&g->kept);
    g->kept_bytes = 0;
    g->flat.count = g->todo.count = g->found.count = 0;
    g->mark = 0;
    g->key_now = -1;
    memset(bottom, 0, sizeof bottom);
    for (int32_t i = 0; i < 2; i++) {
        bottom[LLMI_N_STATE] = -1 - i;
        if (llmi_pool_add(&g->nodes, bottom) < 0) g->failed = 1;
    }
    if (llmi_pool_add(&g->lists, none) < 0 || llmi_pool_add(&g->names, none) < 0 || llmi_pool_add(&g->sets, none) < 0) g->failed = 1;
    g->mark++;
    if (!g->failed) llmi_guide_visit(g, llmi_guide_node(g, g->g->rules[g->g->root].start, 0, LLMI_NODE_BOTTOM));
    g->start = g->failed ? -1 : llmi_guide_close(g);
}

static void llmi_guide_drop(llmi_guide *g)
{
    if (!g) return;
    moq_allocator a = g->a;
    llmi_pool_drop(&g->nodes);
    llmi_pool_drop(&g->lists);
    llmi_pool_drop(&g->configs);
    llmi_pool_drop(&g->steps);
    llmi_pool_drop(&g->locals);
    llmi_pool_drop(&g->names);
    llmi_pool_drop(&g->sets);
    llmi_arena_drop(&g->kept);
    llmi_ids_drop(&g->flat);
    llmi_ids_drop(&g->todo);
    llmi_ids_drop(&g->found);
    llmi_ids_drop(&g->accepted);
    llmi_ids_drop(&g->leaves);
    moq_release(&a, g->rest, g->g->state_count * sizeof *g->rest);
    moq_release(&a, g->path, ((size_t)g->x->longest + 2) * sizeof *g->path);
    moq_release(&a, g->bits, g->words * sizeof *g->bits);
    moq_release(&a, g->allowed, g->words * 32 * sizeof *g->allowed);
    moq_release(&a, g, sizeof *g);
}

/* One user less; the last one frees it. */
static void llmi_guide_leave(llmi_guide *g)
{
    if (g && --g->users == 0) llmi_guide_drop(g);
}

/* More ids that end a turn, beside the tokenizer's own. */
static void llmi_guide_add_end(llmi_guide *g, int32_t id)
{
    if (id >= 0 && id < (int32_t)(g->words * 32) && g->end_count < 2 * LLMI_MAX_ENDS && !llmi_guide_is_end(g, id)) g->ends[g->end_count++] = id;
}

/* A grammar on a vocabulary; both must outlive it. A vocabulary that cannot spell the grammar's texts is refused. */
static llmi_guide *llmi_guide_make(const llm_grammar *grammar, const llmi_lexicon *x, const moq_allocator *a, moq_error *err)
{
    llmi_guide *g = (llmi_guide *)moq_allocate(a, sizeof *g);
    if (!g) { llmi_nomem(err, "grammar"); return NULL; }
    if (a) g->a = *a;
    g->g = grammar;
    g->x = x;
    g->users = 1;
    g->nodes = llmi_pool_make(&g->a, LLMI_N_WIDTH, 3);
    g->lists = llmi_pool_make(&g->a, 3, 2);
    g->configs = llmi_pool_make(&g->a, LLMI_C_WIDTH, 2);
    g->steps = llmi_pool_make(&g->a, 3, 2);
    g->locals = llmi_pool_make(&g->a, 1 + (int32_t)(sizeof(llmi_local *) / sizeof(int32_t)), 1);
    g->names = llmi_pool_make(&g->a, 3, 2);
    g->sets = llmi_pool_make(&g->a, 3, 3);
    g->flat = g->todo = g->found = g->accepted = g->leaves = llmi_ids_make(&g->a);
    g->kept = llmi_arena_make(&g->a);
    g->words = ((size_t)x->vocab + 31) / 32 + 1;
    g->rest = (int32_t *)moq_allocate(&g->a, grammar->state_count * sizeof *g->rest);
    g->path = (int32_t *)moq_allocate(&g->a, ((size_t)x->longest + 2) * sizeof *g->path);
    g->bits = (uint32_t *)moq_allocate(&g->a, g->words * sizeof *g->bits);
    g->allowed = (int32_t *)moq_allocate(&g->a, g->words * 32 * sizeof *g->allowed);
    for (int32_t i = 0; i < x->t->end_count; i++) llmi_guide_add_end(g, x->t->ends[i]);
    if (g->rest && g->path && g->bits && g->allowed) {
        llmi_guide_measure(g);
        if (g->rest[grammar->rules[grammar->root].start] < LLMI_FAR) llmi_guide_clear(g);
        else moq_fail(err, MOQ_E_GRAMMAR, "grammar", "the vocabulary has no tokens for bytes that every text of the grammar needs; use another model, or other words");
        if (g->start >= 0 && !g->failed && g->nodes.count) return g;
    }
    if (!g->rest || !g->path || !g->bits || !g->allowed || g->failed) llmi_nomem(err, "grammar");
    llmi_guide_drop(g);
    return NULL;
}

/* Tokens of the shortest document. */
static int32_t llmi_guide_shortest(const llmi_guide *g) { return g->rest[g->g->rules[g->g->root].start]; }

/* The beginning of a document. Tables that have grown large are emptied when nobody else can stand in the middle of a document. */
static llmi_place llmi_guide_begin(llmi_guide *g)
{
    llmi_place p = {0, -1, 1};
    if (g->users == 1 && (g->nodes.count > LLMI_GUIDE_MOST || g->failed)) {
        g->failed = 0;
        llmi_guide_clear(g);
    }
    p.config = g->start < 0 ? 0 : g->start;
    return p;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-session     conversations: opening, saying, framing
   The tokens in the KV cache always equal a prefix of the frame around the whole conversation; only the rest is run.
   ------------------------------------------------------------------------------------------------ */

/* A turn goes through four phases:

       IDLE --say--> BEGIN --frame--> PROMPT --all tokens run--> ANSWER --end token, error or cancel--> IDLE

   What was said is kept as text. When a turn begins, the folder's frame is put around all of it and compared with the tokens
   that the slot already holds; the common beginning stays, the rest is run over what followed. So the cache never disagrees with
   the frame, also where the model spelled its answer in other tokens than the tokenizer would.

   An error or a cancel ends the turn and nothing else: what the model had answered so far stays part of the conversation, and
   the next llm_say goes on from there.

   A struct llm is one conversation in one slot of the cache. What all of them share is the house: weights, backend, tokenizer. */

/* The cancel flag is the only thing that another thread may touch. */
#if defined(__GNUC__)
#define LLMI_FLAG_GET(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define LLMI_FLAG_SET(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#else
#define LLMI_FLAG_GET(p) (*(p))
#define LLMI_FLAG_SET(p, v) (*(p) = (v))
#endif

enum {
    LLMI_IDLE = 0, /* nothing to do; `kept` says how the last turn ended */
    LLMI_BEGIN,    /* something was said */
    LLMI_PROMPT,   /* tokens [done, ids.count) are still to be run */
    LLMI_ANSWER    /* tokens are chosen, one after the other */
};

/* Framed turns are framed again as a whole, raw text is only appended to: one conversation is either. */
enum { LLMI_MODE_NONE = 0, LLMI_MODE_CHAT, LLMI_MODE_RAW };

#define LLMI_SPEEDS 18 /* passes of 1, 2, 4 ... rows are timed apart */

typedef struct llmi_turn { size_t role, text; } llmi_turn; /* offsets in llm.words */

/* Rows of one conversation in the pass in progress: tokens [llm.done, done + count), then llm.guess. */
typedef struct llmi_share {
    struct llm *m;               /* NULL: has left */
    int32_t count, guesses;
    int32_t wanted;              /* the last rows of it that want logits */
} llmi_share;

/* What the conversations of one model share. Strings of desc are not used after opening. */
typedef struct llmi_house {
    moq_allocator a;
    llm_desc desc;
    moq_checkpoint *own_checkpoint;
    moq_backend *own_backend;
    llm_tokenizer *tokenizer;
    llmi_model model;
    llm_info info;
    /* bytes of the longest text that one token can add */
    size_t token_bytes;
    /* made for the first grammar */
    llmi_lexicon *lexicon;
    /* [slots] whose conversation a slot of the cache holds; NULL: nobody's */
    struct llm **by_slot;
    int32_t conversations;
    /* [vocab] logits as they are changed before sampling; sampling's own */
    float *mixed, *scratch;
    int32_t *index;
    /* [slots] who takes part in the pass in progress; part_count 0: there is none */
    llmi_share *parts;
    int32_t part_count;
    /* seconds of that pass so far: its layers, its output layer */
    double spent[2];
    /* of one layer at 2^i rows, of a block of the output layer at 2^i wanted rows, of choosing for 2^i conversations; 0: not measured */
    double seconds[3][LLMI_SPEEDS];
    /* units of work of the call in progress: the first one of a call always runs */
    int32_t units;
} llmi_house;

struct llm {
    moq_allocator a;
    llmi_house *house;
    llmi_model *model;
    llm_tokenizer *tokenizer;
    /* of the cache */
    int32_t slot;
    llm_stats stats;
    llm_sampling sampling;
    uint64_t random;

    int mode, phase;
    volatile int cancel;
    /* how the last turn ended: comes out of llm_next once */
    moq_error kept;

    /* llmi_turn after llmi_turn: what was said, in order; its NUL-terminated roles and texts */
    llmi_bytes turns, words;
    /* the whole conversation as tokens, and how many of them the slot holds */
    llmi_ids ids;
    size_t done;
    /* index in ids where the answer begins; has the model begun to answer what was said last? */
    size_t answer;
    int answered;

    /* the answer so far, and its decoded bytes that are not shown yet: a cut character, or what may become a stop string */
    llmi_bytes text, raw;
    /* ids [from, end) were decoded last, together, to so many bytes */
    size_t from, from_bytes;
    /* NUL-terminated; ready: nobody has taken it yet */
    llmi_bytes piece;
    int ready;
    /* NUL-terminated stop strings, one after the other */
    llmi_bytes stops;
    /* llm_token of each token of the answer, with llm_desc.logprobs */
    llmi_bytes tokens;

    /* [1 + draft, vocab] logits: rows [row, rows) are of the next tokens, as long as guess[i] is what row i chooses. picked: there are none, the one
       row's choice is `pick` */
    float *last;
    int32_t row, rows, pick;
    int picked;
    int32_t guess[LLM_DRAFT], guesses;
    /* how many tokens are guessed, and by whom; NULL: from the conversation itself */
    int32_t draft;
    struct llm *drafter;

    /* what answers must be, NULL: anything, and how long at most; shared with forks */
    llmi_guide *guide;
    int32_t most;
    /* of the present answer: does the guide lead it, from where, after how many tokens? */
    int guided;
    llmi_place place;
    int32_t written;
};

/* forward: whoever says, closes or forgets something leaves the pass in progress, which >>llm-step runs; opening asks >>llm-plan */
static void llmi_settle(llmi_house *h, const llm *m);
static moq_result llmi_check_memory(const llm_desc *desc, moq_error *err);
static moq_result llmi_check_machine(const llm_desc *desc, const moq_checkpoint *ck, moq_backend *be, moq_error *err);

/* ---- open and close ---- */

/* Hand an error of our own to a caller who may want none. */
static void llmi_give(moq_error *err, const moq_error *own)
{
    if (err) *err = *own;
}

/* The state of an error before anything went wrong. */
static void llmi_no_error(moq_error *e)
{
    memset(e, 0, sizeof *e);
    e->offset = -1;
}

/* What to do, behind a sentence that only says what happened. */
static void llmi_add_hint(moq_error *e, const char *hint)
{
    size_t n = strlen(e->text), m = strlen(hint);
    if (n + m < sizeof e->text) memcpy(e->text + n, hint, m + 1);
}

/* A number of the desc: 0 .. most. */
static moq_result llmi_check_range(const char *key, int64_t v, int64_t most, moq_error *err)
{
    if (v >= 0 && v <= most) return MOQ_OK;
    return moq_fail(err, MOQ_E_ARG, key, "%lld is outside 0..%lld; 0 is the default", (long long)v, (long long)most);
}

/* A setting of least .. most; NaN is refused. */
static moq_result llmi_check_float(const char *key, float v, float least, float most, moq_error *err)
{
    if (llmi_rank(v) >= llmi_rank(least) && llmi_rank(v) <= llmi_rank(most)) return MOQ_OK;
    return moq_fail(err, MOQ_E_ARG, key, "%g is outside %g..%g", (double)v, (double)least, (double)most);
}

static moq_result llmi_check_sampling(const llm_sampling *s, moq_error *err)
{
    moq_result r;
    if ((r = llmi_check_range("llm_desc.sampling.top_k", s->top_k, INT32_MAX, err)) < 0) return r;
    if ((r = llmi_check_range("llm_desc.sampling.penalty_window", s->penalty_window, INT32_MAX, err)) < 0) return r;
    if ((r = llmi_check_range("llm_desc.sampling.bias_count", s->bias_count, s->bias ? INT32_MAX : 0, err)) < 0) return r;
    if ((r = llmi_check_float("llm_desc.sampling.temperature", s->temperature, 0, 1e6f, err)) < 0) return r;
    if ((r = llmi_check_float("llm_desc.sampling.top_p", s->top_p, 0, 1, err)) < 0) return r;
    if ((r = llmi_check_float("llm_desc.sampling.min_p", s->min_p, 0, 1, err)) < 0) return r;
    if ((r = llmi_check_float("llm_desc.sampling.typical_p", s->typical_p, 0, 1, err)) < 0) return r;
    if ((r = llmi_check_float("llm_desc.sampling.presence_penalty", s->presence_penalty, -1e6f, 1e6f, err)) < 0) return r;
    if ((r = llmi_check_float("llm_desc.sampling.frequency_penalty", s->frequency_penalty, -1e6f, 1e6f, err)) < 0) return r;
    return llmi_check_float("llm_desc.sampling.repetition_penalty", s->repetition_penalty, 0, 1e6f, err);
}

/* The caller's mistakes, each named by its field. */
static moq_result llmi_check_desc(const llm_desc *d, moq_error *err)
{
    moq_result r;
    if (!d || (!d->path && !d->checkpoint)) return moq_fail(err, MOQ_E_ARG, "llm_desc.path", "neither a path nor an open checkpoint was given");
    if (d->weights && strcmp(d->weights, "mapped") != 0 && strcmp(d->weights, "copied") != 0)
        return moq_fail(err, MOQ_E_ARG, "llm_desc.weights", "'%q' is not known; there are mapped and copied", d->weights);
    if ((r = llmi_check_range("llm_desc.context", d->context, 1 << 24, err)) < 0) return r;
    if ((r = llmi_check_range("llm_desc.slots", d->slots, 1 << 16, err)) < 0) return r;
    if ((r = llmi_check_range("llm_desc.chunk", d->chunk, 1 << 16, err)) < 0) return r;
    if ((r = llmi_check_range("llm_desc.keep", d->keep, 1 << 24, err)) < 0) return r;
    if ((r = llmi_check_range("llm_desc.draft", d->draft, LLM_DRAFT, err)) < 0) return r;
    if ((r = llmi_check_range("llm_desc.logprobs", d->logprobs, LLM_TOP, err)) < 0) return r;
    if ((r = llmi_check_range("llm_desc.ranks", d->ranks, 1 << 10, err)) < 0) return r;
    if ((r = llmi_check_range("llm_desc.threads", d->threads, 1 << 16, err)) < 0) return r;
    if ((r = llmi_check_range("llm_desc.endless", d->endless, 1, err)) < 0) return r;
    if ((r = llmi_check_range("llm_desc.no_tokenizer", d->no_tokenizer, 1, err)) < 0) return r;
    if ((r = llmi_check_range("llm_desc.all_reduce_queues", d->all_reduce_queues, 1, err)) < 0) return r;
    if ((int)d->act < 0 || (int)d->act > (int)MOQ_ACT_BF16)
        return moq_fail(err, MOQ_E_ARG, "llm_desc.act", "%d is no moq_act; 0 is MOQ_ACT_AUTO", (int)d->act);
    return llmi_check_sampling(&d->sampling, err);
}

/* The caller's checkpoint and backend, or our own, which the last llm_close then closes. */
static moq_result llmi_open_parts(llmi_house *h, const moq_checkpoint **ck, moq_backend **be, moq_error *err)
{
    const llm_desc *d = &h->desc;
    *ck = d->checkpoint;
    *be = d->backend;
    if (!*ck) {
        moq_open_desc open;
        memset(&open, 0, sizeof open);
        open.allocator = d->allocator;
        open.log = d->log;
        open.log_user = d->log_user;
        open.progress = d->progress;
        open.progress_user = d->progress_user;
        *ck = h->own_checkpoint = moq_open(d->path, &open, err);
        if (!*ck) return llmi_code(err, MOQ_E_IO);
    }
    if (!*be) {
        moq_cpu_desc cpu;
        memset(&cpu, 0, sizeof cpu);
        cpu.threads = d->threads;
        cpu.act = d->draft > 0 && d->act == MOQ_ACT_AUTO ? MOQ_ACT_WIDE : d->act; /* automatic rounding depends on the rows of a pass */
        cpu.kernel = d->kernel;
        cpu.parallel = d->parallel;
        cpu.allocator = d->allocator;
        *be = h->own_backend = moq_cpu_backend(&cpu, err);
        if (!*be) return llmi_code(err, MOQ_E_BACKEND);
    }
    return MOQ_OK;
}

static void llmi_fill_info(llmi_house *h, const moq_checkpoint *ck)
{
    const llmi_config *c = &h->model.c;
    h->info.model_type = c->family->model_type;
    h->info.layers = c->layers;
    h->info.hidden = c->hidden;
    h->info.vocab = c->vocab;
    h->info.context = c->context;
    h->info.slots = h->model.slots;
    h->info.weight_bytes = moq_get_info(ck)->total_bytes;
    h->info.memory_bytes = h->model.memory;
    h->info.kv = h->model.kv;
    h->info.token_bytes = h->model.token_bytes;
    h->info.token_products = h->model.token_products;
    h->info.head = h->model.head_scheme;
}

/* The longest text of one token, with a space or two that a decoder may add. */
static size_t llmi_longest_token(const llm_tokenizer *t)
{
    size_t most = 16;
    int32_t n = t ? llm_vocab(t) : 0;
    for (int32_t id = 0; id < n; id++) {
        size_t bytes = llm_decode(t, &id, 1, LLM_SPECIAL, NULL, 0) + 2;
        if (bytes > most) most = bytes;
    }
    return most;
}

/* Tables of words are padded by a few rows; one that is twice as long is another model's. */
static void llmi_tell_words(const llmi_model *m, const llm_tokenizer *t)
{
    moq_error finding;
    if (!t || llm_vocab(t) > m->c.vocab / 2) return;
    llmi_in_file(LLMI_TOKENIZER, moq_fail(&finding, MOQ_E_MISMATCH, NULL, "has %d tokens where vocab_size of config.json is %d; is it of the same model?",
                                          llm_vocab(t), m->c.vocab), &finding);
    llmi_tell(m, &finding);
}

/* What sampling and slots need, the small first: behind the tables of words a new block of the arena would begin. */
static moq_result llmi_take_tables(llmi_house *h, moq_error *err)
{
    llmi_arena *r = &h->model.arena;
    size_t vocab = (size_t)h->model.c.vocab, slots = (size_t)h->model.slots;
    h->by_slot = (llm **)llmi_take(r, slots, sizeof *h->by_slot);
    h->parts = (llmi_share *)llmi_take(r, slots, sizeof *h->parts);
    h->mixed = (float *)llmi_take(r, vocab, sizeof *h->mixed);
    h->scratch = (float *)llmi_take(r, vocab, sizeof *h->scratch);
    h->index = (int32_t *)llmi_take(r, vocab, sizeof *h->index);
    return h->mixed && h->scratch && h->index && h->by_slot && h->parts ? MOQ_OK : llmi_nomem(err, "sampling");
}

/* Everything that is there once; whatever fails, llmi_house_close frees what was made before. Reading a tokenizer takes several times its memory for
   a while, so it comes before weights and cache; what is wrong with the model is told first. */
static moq_result llmi_house_open(llmi_house *h, moq_error *err)
{
    const moq_checkpoint *ck;
    moq_backend *be;
    moq_error text;
    moq_result r = llmi_open_parts(h, &ck, &be, err);
    if (r < 0 || (r = llmi_check_machine(&h->desc, ck, be, err)) < 0) return r;
    if (!h->desc.no_tokenizer) h->tokenizer = llm_tokenizer_open(ck, &text);
    if ((r = llmi_model_open(&h->model, ck, be, &h->desc, err)) < 0) return r;
    if (h->desc.draft && h->model.stateful)
        return moq_fail(err, MOQ_E_UNSUPPORTED, "llm_desc.draft", "the running state of a '%s' cannot go back over a wrong guess; leave draft at 0",
                        h->model.c.family->model_type);
    if (!h->desc.no_tokenizer && !h->tokenizer) {
        llmi_give(err, &text);
        return llmi_code(err, MOQ_E_TOKENIZER);
    }
    llmi_tell_words(&h->model, h->tokenizer);
    h->token_bytes = llmi_longest_token(h->tokenizer);
    if ((r = llmi_take_tables(h, err)) < 0) return r;
    llmi_fill_info(h, ck);
    return MOQ_OK;
}

/* Weights go before the backend that made them, the backend before the checkpoint that they point into. */
static void llmi_house_close(llmi_house *h)
{
    moq_allocator a = h->a;
    llmi_lexicon_drop(h->lexicon);
    llm_tokenizer_close(h->tokenizer);
    if (h->model.be) llmi_model_close(&h->model);
    moq_backend_destroy(h->own_backend);
    moq_close(h->own_checkpoint);
    moq_release(&a, h, sizeof *h);
}

/* Room for everything that a conversation can come to hold, so that answering allocates nothing; MOQ_E_NOMEM when there is none.
   What is said is stored when it is said. */
static moq_result llmi_reserve(llm *m, moq_error *err)
{
    const llmi_house *h = m->house;
    moq_backend *be = m->model->be;
    size_t context = (size_t)m->model->c.context, text = h->tokenizer ? (context + 1) * h->token_bytes + 64 : 0;
    size_t logits = (1 + (size_t)h->desc.draft) * (size_t)m->model->c.vocab * sizeof *m->last;
    moq_error e;
    llmi_no_error(&e);
    m->last = (float *)(be->host_alloc ? be->host_alloc(be, logits, &e) : moq_allocate(&m->a, logits));
    if (!m->last && e.code < 0) {
        if (err) *err = e;
        return e.code;
    }
    if (m->last && llmi_ids_reserve(&m->ids, context + 1) && llmi_bytes_reserve(&m->text, text) && llmi_bytes_reserve(&m->raw, text) &&
        llmi_bytes_reserve(&m->piece, 3 * text + 1) && /* a byte that is no UTF-8 becomes three */
        (!h->desc.logprobs || llmi_bytes_reserve(&m->tokens, (context + 1) * sizeof(llm_token))))
        return MOQ_OK;
    return llmi_nomem(err, "conversation");
}

/* The slot becomes free. */
static void llmi_leave(llm *m)
{
    moq_allocator a = m->a;
    llmi_house *h = m->house;
    llmi_bytes_drop(&m->turns);
    llmi_bytes_drop(&m->words);
    llmi_bytes_drop(&m->text);
    llmi_bytes_drop(&m->raw);
    llmi_bytes_drop(&m->piece);
    llmi_bytes_drop(&m->stops);
    llmi_bytes_drop(&m->tokens);
    llmi_ids_drop(&m->ids);
    llmi_guide_leave(m->guide);
    if (h->model.be->host_alloc) h->model.be->host_release(h->model.be, m->last);
    else moq_release(&a, m->last, (1 + (size_t)h->desc.draft) * (size_t)m->model->c.vocab * sizeof *m->last);
    h->by_slot[m->slot] = NULL;
    h->conversations--;
    moq_release(&a, m, sizeof *m);
}

/* A conversation without words in slot `slot`; NULL and an error when there is no memory. */
static llm *llmi_enter(llmi_house *h, int32_t slot, moq_error *err)
{
    llm *m = (llm *)moq_allocate(&h->a, sizeof *m);
    if (!m) {
        llmi_nomem(err, "conversation");
        return NULL;
    }
    m->a = h->a;
    m->house = h;
    m->model = &h->model;
    m->tokenizer = h->tokenizer;
    m->slot = slot;
    m->draft = h->desc.draft;
    m->turns = llmi_bytes_make(&m->a);
    m->words = llmi_bytes_make(&m->a);
    m->text = llmi_bytes_make(&m->a);
    m->raw = llmi_bytes_make(&m->a);
    m->piece = llmi_bytes_make(&m->a);
    m->stops = llmi_bytes_make(&m->a);
    m->tokens = llmi_bytes_make(&m->a);
    m->ids = llmi_ids_make(&m->a);
    h->by_slot[slot] = m;
    h->conversations++;
    h->model.length[slot] = 0;
    llmi_no_error(&m->kept);
    llm_set_sampling(m, &h->desc.sampling);
    if (llmi_reserve(m, err) >= 0) return m;
    llmi_leave(m);
    return NULL;
}

LLM_API llm *llm_open(const llm_desc *desc, moq_error *err)
{
    moq_error e;
    llmi_house *h;
    llm *m = NULL;
    moq_result r;
    llmi_no_error(&e);
    r = llmi_check_desc(desc, &e);
    if (r >= 0 && desc->max_memory) r = llmi_check_memory(desc, &e);
    h = r < 0 ? NULL : (llmi_house *)moq_allocate(&desc->allocator, sizeof *h);
    if (r >= 0 && !h) llmi_nomem(&e, "llm");
    if (h) {
        h->a = desc->allocator;
        h->desc = *desc;
        if (llmi_house_open(h, &e) >= 0) m = llmi_enter(h, 0, &e);
        if (m) llmi_no_error(&e);
        else llmi_house_close(h);
    }
    if (e.code == MOQ_E_NOMEM) llmi_add_hint(&e, "; lower context, slots or chunk, choose a smaller kv, or give the program more memory");
    /* the caller's strings end here */
    if (m) h->desc.path = h->desc.kernel = h->desc.kv = h->desc.weights = NULL;
    llmi_give(err, &e);
    return m;
}

/* The first free slot. */
LLM_API llm *llm_join(llm *m, moq_error *err)
{
    moq_error e;
    llm *n = NULL;
    int32_t slot = 0;
    if (!m) {
        moq_fail(err, MOQ_E_ARG, "llm_join", "the model is NULL");
        return NULL;
    }
    llmi_no_error(&e);
    while (slot < m->model->slots && m->house->by_slot[slot]) slot++;
    if (slot == m->model->slots)
        moq_fail(&e, MOQ_E_STATE, "slots", "no slot of %d is free; close a conversation or open with a larger llm_desc.slots", slot);
    else n = llmi_enter(m->house, slot, &e);
    if (n) llm_set_sampling(n, &m->sampling);
    llmi_give(err, &e);
    return n;
}

/* The model goes with its last conversation. */
LLM_API void llm_close(llm *m)
{
    llmi_house *h;
    if (!m) return;
    h = m->house;
    llmi_settle(h, m);
    llmi_leave(m);
    if (h->conversations == 0) llmi_house_close(h);
}

LLM_API const llm_info *llm_get_info(const llm *m) { return m ? &m->house->info : NULL; }
LLM_API const llm_tokenizer *llm_get_tokenizer(const llm *m) { return m ? m->tokenizer : NULL; }
LLM_API const moq_checkpoint *llm_get_checkpoint(const llm *m) { return m ? m->model->ck : NULL; }
LLM_API moq_backend *llm_get_backend(const llm *m) { return m ? m->model->be : NULL; }
LLM_API const llm_stats *llm_get_stats(const llm *m) { return m ? &m->stats : NULL; }
LLM_API int32_t llm_get_slot(const llm *m) { return m ? m->slot : -1; }

/* Somebody wants the logits of a choice that the device made: the last token is run again, unless llm_forward has taken its place already. */
static void llmi_unpick(llm *m)
{
    if (!m->picked || m->row == m->rows) return;
    m->picked = 0;
    m->rows = m->row;
    if (m->done == m->ids.count) m->done--;
}

/* The generator starts again from the seed; NULL is greedy. */
LLM_API moq_result llm_set_sampling(llm *m, const llm_sampling *s)
{
    if (!m || (s && llmi_check_sampling(s, NULL) < 0)) return MOQ_E_ARG;
    llmi_unpick(m);
    if (s) m->sampling = *s;
    else memset(&m->sampling, 0, sizeof m->sampling);
    m->random = m->sampling.seed;
    return MOQ_OK;
}

/* Empty strings are left out: they would stop everything. */
LLM_API moq_result llm_set_stops(llm *m, const char *const *stops, int32_t count, moq_error *err)
{
    if (!m || (count > 0 && !stops)) return moq_fail(err, MOQ_E_ARG, "llm_set_stops", "the model or the list is NULL");
    m->stops.count = 0;
    for (int32_t i = 0; i < count; i++) {
        size_t n = stops[i] ? strlen(stops[i]) : 0;
        if (n == 0) continue;
        if (!llmi_bytes_add(&m->stops, stops[i], n + 1)) {
            m->stops.count = 0;
            return llmi_nomem(err, "stop strings");
        }
    }
    return MOQ_OK;
}

/* ---- saying ---- */

/* The error, if there is one, is in m->kept already.
   End the turn: `r` and the error stay for llm_next. */
static moq_result llmi_end(llm *m, moq_result r)
{
    m->phase = LLMI_IDLE;
    m->row = m->rows = 0;
    return r;
}

/* A role and its text at the end of the list; 0 when out of memory, and then nothing changed. */
static int llmi_add_turn(llm *m, const char *role, const char *text, size_t text_bytes)
{
    size_t words = m->words.count;
    llmi_turn t;
    t.role = words;
    t.text = words + strlen(role) + 1;
    if (llmi_bytes_add(&m->words, role, strlen(role) + 1) && llmi_bytes_add(&m->words, text, text_bytes) && llmi_bytes_add(&m->words, "", 1) &&
        llmi_bytes_add(&m->turns, (const char *)&t, sizeof t))
        return 1;
    m->words.count = words;
    return 0;
}

/* What the model has answered becomes a turn of the conversation. */
static moq_result llmi_keep_answer(llm *m)
{
    if (m->mode == LLMI_MODE_CHAT && m->answered && !llmi_add_turn(m, "assistant", m->text.data, m->text.count))
        return llmi_nomem(&m->kept, "conversation");
    m->answered = 0;
    m->text.count = 0;
    return MOQ_OK;
}

/* What every way of saying something begins with: old errors and cancels are over, an answer in progress ends here. */
static moq_result llmi_start_saying(llm *m, int mode)
{
    moq_result r;
    llmi_settle(m->house, m);
    llmi_no_error(&m->kept);
    LLMI_FLAG_SET(&m->cancel, 0);
    if (!m->tokenizer) return moq_fail(&m->kept, MOQ_E_STATE, "llm_desc.no_tokenizer",
                        "text cannot be said to a model opened without its tokenizer; open it with one, or run ids with llm_forward");
    if (m->mode != LLMI_MODE_NONE && m->mode != mode)
        return moq_fail(&m->kept, MOQ_E_STATE, "conversation", "framed turns and raw text do not mix; call llm_reset between them");
    r = llmi_keep_answer(m);
    if (r < 0) return r;
    m->mode = mode;
    m->ready = 0;
    m->row = m->rows = 0;
    return MOQ_OK;
}

/* Nothing runs yet: framing and running belong to the next llm_next or llm_step, within its time. */
LLM_API moq_result llm_say(llm *m, const char *role, const char *text)
{
    moq_result r;
    if (!m) return MOQ_E_ARG;
    r = llmi_start_saying(m, LLMI_MODE_CHAT);
    if (r >= 0 && (!role || !text)) r = moq_fail(&m->kept, MOQ_E_ARG, "llm_say", "role and text must not be NULL");
    if (r >= 0 && !llmi_add_turn(m, role, text, strlen(text))) r = llmi_nomem(&m->kept, "conversation");
    if (r < 0) return llmi_end(m, r);
    m->phase = LLMI_BEGIN;
    return MOQ_OK;
}

/* Append the ids of a text to the conversation. */
static moq_result llmi_encode_raw(llm *m, const char *text)
{
    uint32_t flags = m->ids.count ? LLM_SPECIAL : LLM_SPECIAL | LLM_BOS;
    size_t n = llm_encode(m->tokenizer, text, strlen(text), flags, NULL, 0);
    int32_t *ids = n == SIZE_MAX ? NULL : (int32_t *)moq_allocate(&m->a, n * sizeof *ids);
    int fits;
    if (!ids) return llmi_nomem(&m->kept, "conversation");
    fits = llm_encode(m->tokenizer, text, strlen(text), flags, ids, n) == n && llmi_ids_add(&m->ids, ids, n);
    moq_release(&m->a, ids, n * sizeof *ids);
    return fits ? MOQ_OK : llmi_nomem(&m->kept, "conversation");
}

/* Control tokens written in raw text are tokens: whoever says raw text writes the frame too. */
LLM_API moq_result llm_say_raw(llm *m, const char *text)
{
    moq_result r;
    if (!m) return MOQ_E_ARG;
    r = llmi_start_saying(m, LLMI_MODE_RAW);
    if (r >= 0 && !text) r = moq_fail(&m->kept, MOQ_E_ARG, "llm_say_raw", "text must not be NULL");
    if (r >= 0) r = llmi_encode_raw(m, text);
    if (r < 0) return llmi_end(m, r);
    m->phase = LLMI_BEGIN;
    return MOQ_OK;
}

/* ---- the prompt ---- */

/* The frame around the whole conversation replaces ids; `done` becomes the length of what the cache can keep. */
static moq_result llmi_frame_all(llm *m)
{
    size_t count = m->turns.count / sizeof(llmi_turn), n, same = 0, bytes = count * sizeof(llm_message);
    llm_message *list = (llm_message *)moq_allocate(&m->a, bytes);
    int32_t *ids = NULL;
    if (!list) return llmi_nomem(&m->kept, "conversation");
    for (size_t i = 0; i < count; i++) {
        llmi_turn t;
        memcpy(&t, m->turns.data + i * sizeof t, sizeof t);
        list[i].role = m->words.data + t.role;
        list[i].text = m->words.data + t.text;
    }
    n = llm_frame(m->tokenizer, list, count, 1, NULL, 0, &m->kept);
    if (n != SIZE_MAX && !(ids = (int32_t *)moq_allocate(&m->a, n * sizeof *ids))) llmi_nomem(&m->kept, "conversation");
    if (ids) {
        size_t need = llm_frame(m->tokenizer, list, count, 1, ids, n, &m->kept);
        /* the common beginning of the new frame and of what was run */
        while (same < n && same < m->done && ids[same] == m->ids.data[same]) same++;
        m->ids.count = 0;
        if (need != n || !llmi_ids_add(&m->ids, ids, n)) {
            same = 0;
            if (m->kept.code == MOQ_OK) llmi_nomem(&m->kept, "conversation");
        }
        m->done = same;
        moq_release(&m->a, ids, n * sizeof *ids);
    }
    moq_release(&m->a, list, bytes);
    return m->kept.code;
}

static const char *llmi_role(const llm *m, size_t turn)
{
    llmi_turn t;
    memcpy(&t, m->turns.data + turn * sizeof t, sizeof t);
    return m->words.data + t.role;
}

/* Forget the oldest user turn and what answered it; system turns at the beginning and the newest user turn stay. 0: there is nothing to
   forget. */
static int llmi_forget_turn(llm *m)
{
    size_t count = m->turns.count / sizeof(llmi_turn), first = 0, next;
    while (first < count && strcmp(llmi_role(m, first), "system") == 0) first++;
    for (next = first + 1; next < count && strcmp(llmi_role(m, next), "user") != 0;) next++;
    if (next >= count) return 0;
    /* the words stay where they are: they go with llm_reset */
    memmove(m->turns.data + first * sizeof(llmi_turn), m->turns.data + next * sizeof(llmi_turn), (count - next) * sizeof(llmi_turn));
    m->turns.count -= (next - first) * sizeof(llmi_turn);
    return 1;
}

/* Context shift. Dropping until half of the context is free makes it rare. What stays moves to other positions, and it is run again
   instead of being rotated in the cache: its keys and values were computed while the dropped text could be seen, they may be stored in
   four bits, and a running state cannot be shifted at all; run again, the cache is exactly that of the shorter conversation.
   `answer`: tokens at the end of ids that are already part of the answer; they stay. */
static moq_result llmi_shift(llm *m, size_t answer)
{
    size_t room = (size_t)m->model->c.context, keep = (size_t)m->house->desc.keep, old = m->answer, from = m->from;
    int32_t *said = NULL;
    int forgot = 0;
    if (m->mode == LLMI_MODE_RAW) {
        size_t rest = m->ids.count > keep ? m->ids.count - keep : 0, drop = rest - rest / 2;
        if (rest < 2 || m->ids.count - drop > room - 1) drop = m->ids.count > room / 2 + keep ? m->ids.count - room / 2 - keep : 0;
        if (drop == 0 || keep + 2 > room) return MOQ_OK;
        memmove(m->ids.data + keep, m->ids.data + keep + drop, (rest - drop) * sizeof *m->ids.data);
        m->ids.count -= drop;
        m->done = m->done < keep ? m->done : keep;
        m->answer = old > keep + drop ? old - drop : keep;
        m->from = from > keep + drop ? from - drop : keep;
        return MOQ_OK;
    }
    if (answer && !(said = (int32_t *)moq_allocate(&m->a, answer * sizeof *said))) return llmi_nomem(&m->kept, "conversation");
    if (answer) memcpy(said, m->ids.data + m->ids.count - answer, answer * sizeof *said);
    while (m->kept.code >= 0 && m->ids.count + (forgot ? answer : 0) > room / 2 && llmi_forget_turn(m)) {
        llmi_frame_all(m);
        forgot = 1;
    }
    if (forgot && m->kept.code >= 0) {
        m->answer = m->ids.count;
        m->from = from - old + m->answer;
        if (answer && !llmi_ids_add(&m->ids, said, answer)) llmi_nomem(&m->kept, "conversation");
    }
    moq_release(&m->a, said, answer * sizeof *said);
    return m->kept.code;
}

/* From what was said to the tokens that are to be run. At least one is: the logits of the last are needed. */
static moq_result llmi_begin(llm *m)
{
    moq_result r = m->mode == LLMI_MODE_CHAT ? llmi_frame_all(m) : MOQ_OK;
    size_t held = (size_t)m->model->length[m->slot], room = (size_t)m->model->c.context;
    if (r < 0) return r;
    m->answer = m->from = m->ids.count;
    /* one place is needed for the answer */
    if (m->house->desc.endless && m->ids.count >= room && (r = llmi_shift(m, 0)) < 0) return r;
    if (m->ids.count == 0) return moq_fail(&m->kept, MOQ_E_STATE, "conversation", "there is not a single token to begin with; say something first");
    if (m->ids.count > room)
        return moq_fail(&m->kept, MOQ_E_STATE, "context",
                        "the conversation has %zu tokens, the context holds %zu; open with a larger llm_desc.context, or begin anew with llm_reset", m->ids.count, room);
    /* llm_forward may have run the slot */
    if (m->done > held) m->done = held;
    /* the last token is run again for its logits */
    if (m->done == m->ids.count) m->done--;
    /* a running state cannot go back */
    if (m->model->stateful && m->done != held) m->done = 0;
    m->answer = m->from = m->ids.count;
    m->from_bytes = 0;
    m->raw.count = m->text.count = m->tokens.count = 0;
    m->phase = LLMI_PROMPT;
    m->guided = m->guide != NULL;
    m->written = 0;
    if (m->guide) m->place = llmi_guide_begin(m->guide);
    return MOQ_OK;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-answer      from logits to tokens and from tokens to text
   Chooses strictly one token after the other, whatever was guessed; shows whole characters and never a part of a stop string.
   ------------------------------------------------------------------------------------------------ */

/* The text of ids [from, end) without its first `skip` bytes, added to `out` (may be NULL); its length, SIZE_MAX: out of memory. */
static size_t llmi_decode(const llm *m, size_t from, size_t skip, llmi_bytes *out)
{
    char small[256], *text = small;
    const int32_t *ids = m->ids.data + from;
    size_t count = m->ids.count - from, n = llm_decode(m->tokenizer, ids, count, 0, small, sizeof small);
    int fits = 1;
    if (!out) return n;
    if (n >= sizeof small) {
        text = (char *)moq_allocate(&m->a, n + 1);
        if (!text) return SIZE_MAX;
        llm_decode(m->tokenizer, ids, count, 0, text, n + 1);
    }
    if (n > skip) fits = llmi_bytes_add(out, text + skip, n - skip);
    if (text != small) moq_release(&m->a, text, n + 1);
    return fits ? n : SIZE_MAX;
}

/* What the newest token adds to the text. It is decoded together with the token before it: decoders strip a space at the very
   beginning, and only there. */
static moq_result llmi_decode_newest(llm *m)
{
    size_t newest = m->ids.count - 1, alone;
    size_t n = llmi_decode(m, m->from, m->from_bytes, &m->raw);
    if (n == SIZE_MAX) return llmi_nomem(&m->kept, "answer");
    m->from_bytes = n;
    /* a token without text (a control token) gives the next one no beginning: keep the one before it */
    alone = llmi_decode(m, newest, 0, NULL);
    if (alone > 0) {
        m->from = newest;
        m->from_bytes = alone;
    }
    return MOQ_OK;
}

/* Looks for stop strings in raw. Returns how many of its bytes may be shown: all before the first stop string (*hit is 1), or all but an end
   that may become one. */
static size_t llmi_before_stop(const llm *m, int *hit)
{
    size_t n = m->raw.count, safe = n;
    *hit = 0;
    for (size_t at = 0; at < n; at++)
        for (const char *s = m->stops.data, *end = s + m->stops.count; s < end; s += strlen(s) + 1) {
            size_t bytes = strlen(s), left = n - at;
            if (memcmp(m->raw.data + at, s, bytes < left ? bytes : left) != 0) continue;
            *hit = *hit || bytes <= left;
            if (*hit) return at < safe ? at : safe;
            if (at < safe) safe = at;
        }
    return safe;
}

/* Move what is whole from raw into the piece, and to the answer. Bytes that are no UTF-8 become U+FFFD, NUL is dropped because
   pieces are C strings. all: nothing follows, so a cut character is shown as U+FFFD too. */
static moq_result llmi_show_piece(llm *m, int all)
{
    size_t from = 0, start, end = m->raw.count;
    int fits = 1, stopped = 0;
    m->piece.count = 0;
    if (m->stops.count && !m->guided) {
        end = llmi_before_stop(m, &stopped);
        if (all && !stopped) end = m->raw.count;
    }
    while (from < end && fits) {
        uint32_t cp;
        int cut;
        char put[4];
        size_t n = llmi_utf8_get(m->raw.data + from, end - from, &cp, &cut);
        if (cut && !all && !stopped) break;
        if (cp) fits = llmi_bytes_add(&m->piece, put, llmi_utf8_put(cp, put));
        from += n;
    }
    start = m->raw.count - from;
    if (start) memmove(m->raw.data, m->raw.data + from, start);
    m->raw.count = stopped ? 0 : start;
    fits = fits && llmi_bytes_add(&m->text, m->piece.data, m->piece.count) && llmi_bytes_add(&m->piece, "", 1);
    if (!fits) return llmi_nomem(&m->kept, "answer");
    m->piece.count--;
    m->ready = m->piece.count > 0;
    if (stopped) llmi_end(m, MOQ_OK);
    return MOQ_OK;
}

/* End tokens come from config.json and generation_config.json, and from the tokenizer's own list. */
static int llmi_ends_turn(const llm *m, int32_t id)
{
    for (int32_t i = 0; i < m->model->c.end_count; i++)
        if (m->model->c.ends[i] == id) return 1;
    return llm_is_end(m->tokenizer, id);
}

/* Tokens that an answer with a grammar may still have: as many as its limit and the context leave. */
static int64_t llmi_left(const llm *m)
{
    int64_t context = m->model->c.context, room = context - (int64_t)m->ids.count;
    int64_t most = m->most ? m->most : m->house->desc.endless ? context / 4 : context;
    return m->house->desc.endless || room > most - m->written ? most - m->written : room;
}

/* The next token from logits [vocab], which stay as they are: penalties, bias and masks work on a copy. -1: none is a number, or
   the grammar has an error for m->kept. */
static int32_t llmi_pick(llm *m, const float *logits)
{
    llmi_house *h = m->house;
    int32_t vocab = m->model->c.vocab;
    int mixes = llmi_penalizes(&m->sampling);
    if (mixes) memcpy(h->mixed, logits, (size_t)vocab * sizeof *logits);
    if (mixes) llm_penalize(&m->sampling, m->ids.data, m->ids.count, m->answer, h->mixed, vocab, h->index);
    if (mixes) logits = h->mixed;
    if (m->guided) {
        int32_t id = llmi_guide_pick(m->guide, &m->place, &m->sampling, logits, h->mixed, vocab, llmi_left(m), &m->random, h->scratch, h->index, &m->kept);
        m->written++;
        return id;
    }
    return llm_sample(&m->sampling, logits, vocab, &m->random, h->scratch, h->index);
}

/* Choose the next token from the next row of logits and show its text. Where it is what was guessed, it has been run already. */
static moq_result llmi_choose(llm *m)
{
    double start = moq_seconds();
    const float *logits = m->last + (size_t)m->row * (size_t)m->model->c.vocab;
    int32_t id = m->picked ? m->pick : llmi_pick(m, logits), row = m->row++;
    llm_token token;
    moq_result r;
    int finished;
    if (id < 0 && m->guided) return m->kept.code;
    if (id < 0)
        return moq_fail(&m->kept, MOQ_E_STATE, "logits",
                        "none of %d logits after %zu tokens is a number; look for NaN weights with moq_verify and MOQ_VERIFY_DEEP",
                        m->model->c.vocab, m->ids.count);
    if (m->house->desc.logprobs) {
        llm_logprobs(logits, m->model->c.vocab, id, m->house->desc.logprobs, &token);
        if (!llmi_bytes_add(&m->tokens, (const char *)&token, sizeof token)) return llmi_nomem(&m->kept, "answer");
    }
    if (row < m->guesses && m->row < m->rows && m->guess[row] == id && !llmi_ends_turn(m, id)) {
        m->done++;
        m->stats.guessed_tokens++;
    } else {
        m->rows = m->row;
        if (!m->model->stateful && m->model->length[m->slot] > (int32_t)m->done) m->model->length[m->slot] = (int32_t)m->done;
    }
    if (llmi_ends_turn(m, id)) return llmi_end(m, llmi_show_piece(m, 1));
    if (!llmi_ids_add(&m->ids, &id, 1)) return llmi_nomem(&m->kept, "answer");
    m->stats.generated_tokens++;
    if (llmi_decode_newest(m) < 0) return MOQ_E_NOMEM;
    finished = m->guided && llmi_guide_finished(m->guide, &m->place);
    r = llmi_show_piece(m, finished);
    m->stats.generate_seconds += moq_seconds() - start;
    return finished ? llmi_end(m, r) : r;
}

/* The tokens of the answer, one llm_token each. */
LLM_API const llm_token *llm_get_tokens(const llm *m, size_t *count)
{
    *count = m ? m->tokens.count / sizeof(llm_token) : 0;
    return m ? (const llm_token *)(const void *)m->tokens.data : NULL;
}

/* The shortest text must fit; whether it does after the prompt is seen when the answer begins. */
LLM_API moq_result llm_set_grammar(llm *m, const llm_grammar *g, int32_t max_tokens, moq_error *err)
{
    llmi_guide *guide = NULL;
    if (!m) return moq_fail(err, MOQ_E_ARG, "llm_set_grammar", "the model is NULL");
    if (max_tokens < 0) return moq_fail(err, MOQ_E_ARG, "llm_set_grammar", "max_tokens is %d; 0 is the default", max_tokens);
    if (m->phase > LLMI_BEGIN) return moq_fail(err, MOQ_E_STATE, "llm_set_grammar", "an answer is being written; wait for its end, cancel it or reset");
    if (g && !m->tokenizer) return moq_fail(err, MOQ_E_STATE, "llm_set_grammar",
                        "the model was opened without a tokenizer, so its tokens have no text; open it with one");
    if (g && !m->house->lexicon && !(m->house->lexicon = llmi_lexicon_make(m->tokenizer, &m->house->a))) return llmi_nomem(err, "grammar");
    if (g && m->guide && m->guide->g == g) {
        guide = m->guide;
        guide->users++;
    } else if (g) {
        guide = llmi_guide_make(g, m->house->lexicon, &m->house->a, err);
        if (!guide) return llmi_code(err, MOQ_E_GRAMMAR);
        for (int32_t i = 0; i < m->model->c.end_count; i++) llmi_guide_add_end(guide, m->model->c.ends[i]);
    }
    if (guide && llmi_guide_shortest(guide) > (max_tokens ? max_tokens : m->model->c.context)) {
        moq_fail(err, MOQ_E_LIMIT, "grammar", "its shortest text has %d tokens, of which %d are allowed; raise max_tokens or the context",
                 (int)llmi_guide_shortest(guide), (int)(max_tokens ? max_tokens : m->model->c.context));
        llmi_guide_leave(guide);
        return MOQ_E_LIMIT;
    }
    llmi_guide_leave(m->guide);
    m->guide = guide;
    m->most = max_tokens;
    return MOQ_OK;
}

/* ---- guessing ---- */

/* Prompt lookup: what followed the last time that the newest tokens stood here? The longer the match, the better: 4 tokens down to 2.
   Returns how many tokens were guessed, at most `most`. */
static int32_t llmi_look_up(const llmi_ids *ids, int32_t most, int32_t *guess)
{
    size_t count = ids->count;
    for (size_t match = count < 5 ? count - 1 : 4; match > 1; match--)
        for (size_t at = count - match; at-- > 0;) {
            int32_t n = 0;
            if (memcmp(ids->data + at, ids->data + count - match, match * sizeof *ids->data) != 0) continue;
            for (size_t i = at + match; i < count && n < most; i++) guess[n++] = ids->data[i];
            return n;
        }
    return 0;
}

/* A smaller model goes on alone, greedily. Its slot holds what it shares with the conversation. */
static int32_t llmi_ask_drafter(llm *m, int32_t most)
{
    llm *d = m->drafter;
    size_t same = 0, held = (size_t)d->model->length[d->slot];
    int32_t n = 0;
    moq_error e;
    if (m->ids.count + (size_t)most > (size_t)d->model->c.context) return 0;
    while (same < m->ids.count && same < d->ids.count && same < held && d->ids.data[same] == m->ids.data[same]) same++;
    if (same == m->ids.count) same--;
    d->ids.count = 0;
    if (!llmi_ids_add(&d->ids, m->ids.data, m->ids.count)) return 0;
    while (n < most) {
        int32_t left = (int32_t)(d->ids.count - same);
        if (llmi_run(d->model, d->slot, d->ids.data + same, left, (int32_t)same, NULL, d->last, &e) < 0) return n;
        same = d->ids.count;
        if ((m->guess[n] = llmi_greedy(d->last, d->model->c.vocab)) < 0) return n;
        if (!llmi_ids_add(&d->ids, &m->guess[n++], 1)) return n;
    }
    return n;
}

/* Tokens that may follow the pending one. A guess is never seen in what comes out, only in how fast it comes. */
static void llmi_guess(llm *m, int32_t most, int timed)
{
    int32_t room = m->model->c.context - (int32_t)m->done - 1;
    m->guesses = 0;
    if (most > m->draft) most = m->draft;
    if (most > room) most = room;
    if (most <= 0) return;
    /* another model cannot be stopped in the middle: under a time limit the conversation itself is asked */
    m->guesses = m->drafter && !timed ? llmi_ask_drafter(m, most) : llmi_look_up(&m->ids, most, m->guess);
    if (m->guesses < 0) m->guesses = 0;
}

/* Slots of both models must be able to go back over a wrong guess. */
LLM_API moq_result llm_set_draft(llm *m, llm *draft, int32_t tokens, moq_error *err)
{
    if (!m) return moq_fail(err, MOQ_E_ARG, "llm_set_draft", "the model is NULL");
    if (tokens < 0 || tokens > m->house->desc.draft)
        return moq_fail(err, MOQ_E_ARG, "llm_set_draft", "%d tokens are outside 0..%d; llm_desc.draft reserves room for them", tokens, m->house->desc.draft);
    if (draft && draft->house == m->house) return moq_fail(err, MOQ_E_ARG, "llm_set_draft", "a model cannot draft for itself; open a smaller one");
    if (draft && draft->model->stateful)
        return moq_fail(err, MOQ_E_UNSUPPORTED, "llm_set_draft",
                            "the running state of a '%s' cannot go back over a wrong guess; draft with a model without one", draft->model->c.family->model_type);
    if (draft && draft->model->c.vocab != m->model->c.vocab)
        return moq_fail(err, MOQ_E_MISMATCH, "llm_set_draft", "the draft model has %d tokens, this one %d; both need the same tokenizer", draft->model->c.vocab,
                        m->model->c.vocab);
    m->draft = tokens;
    m->drafter = tokens ? draft : NULL;
    return MOQ_OK;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-step        passes of many conversations, within a time
   The only place that decides what runs when; a call does one unit of work at least and allocates nothing.
   ------------------------------------------------------------------------------------------------ */

/* A round: every conversation does what needs no model (framing, choosing, showing), then the rows that they want go through the model as
   one pass. With a time limit a pass may stop between two layers; the next call of anybody goes on with it. Whoever leaves an unfinished
   pass (something else is said, or it is closed or cancelled) leaves its rows behind: they are computed for nobody. Its own place moves
   on only at the end of a pass, so it is as if the rows had never been asked for. */

/* ---- what runs next ---- */

enum { LLMI_LAYER, LLMI_HEAD, LLMI_CHOICE }; /* what is timed: a layer, a block of the head, the choosing of all who have logits */

/* The place of a number of rows among 1, 2, 4 ... */
static int32_t llmi_size_class(int32_t rows)
{
    int32_t i = 0;
    while (i + 1 < LLMI_SPEEDS && 1 << i < rows) i++;
    return i;
}

/* Seconds that a unit of `rows` (of CHOICE: conversations) will take. What was never timed counts as linear. */
static double llmi_expect(const llmi_house *h, int what, int32_t rows)
{
    int32_t n = llmi_size_class(rows);
    double known = 0;
    for (int32_t i = 0; i <= n; i++) known = h->seconds[what][i] > 0 ? h->seconds[what][i] : known * 2;
    return known;
}

/* It was faster than ever before: believe it. It was slower: half of all delays are another program's, so believe it slowly. */
static void llmi_measured(llmi_house *h, int what, int32_t rows, double seconds)
{
    double *s = &h->seconds[what][llmi_size_class(rows)], slower = *s * 1.05;
    *s = *s <= 0 || seconds < slower ? seconds : slower;
}

/* Seconds of a whole pass. */
static double llmi_expect_pass(const llmi_house *h, int32_t rows, int32_t wanted)
{
    int32_t block = wanted < h->model.head_rows ? wanted : h->model.head_rows, blocks = block ? (wanted + block - 1) / block : 0;
    return h->model.c.layers * llmi_expect(h, LLMI_LAYER, rows) + blocks * llmi_expect(h, LLMI_HEAD, block);
}

/* The rows that fit into `left` seconds: a power of two, so that every size is timed often. The first pass ever tells how fast one row is. */
static int32_t llmi_fitting(const llmi_house *h, double left)
{
    int32_t rows = 1;
    if (h->seconds[LLMI_LAYER][0] <= 0) return 1;
    while (rows * 2 <= h->model.chunk && llmi_expect_pass(h, rows * 2, 1) <= left * 0.9) rows *= 2;
    return rows;
}

/* Does it want rows of the next pass? */
static int llmi_wants(const llm *m)
{
    return !m->ready && (m->phase == LLMI_PROMPT || (m->phase == LLMI_ANSWER && m->row == m->rows));
}

/* The token chosen last needs a place, but choosing one more than fit did not: an answer may end exactly at the edge. */
static moq_result llmi_at_the_edge(llm *m)
{
    size_t context = (size_t)m->model->c.context, prompt = m->answer;
    if (m->house->desc.endless && llmi_shift(m, m->ids.count - m->answer) < 0) return m->kept.code;
    if (m->done >= context || m->ids.count > context)
        return moq_fail(&m->kept, MOQ_E_STATE, "context", "all %zu places of the context are used: the prompt has %zu tokens, the answer %zu, "
                        "of which the last was not run; stop after fewer tokens, or open with a larger llm_desc.context", context, prompt, m->ids.count - prompt);
    if (m->model->stateful) m->done = 0;
    m->phase = LLMI_PROMPT;
    return MOQ_OK;
}

static moq_result llmi_cancelled(llm *m) { return moq_fail(&m->kept, MOQ_E_CANCELLED, NULL, "the answer was stopped by llm_cancel"); }

/* All that can be done without the model. Errors and cancels end the turn. */
static void llmi_talk(llm *m)
{
    moq_result r = MOQ_OK;
    while (!m->ready && m->phase != LLMI_IDLE && r >= 0) {
        if (LLMI_FLAG_GET(&m->cancel)) r = llmi_cancelled(m);
        else if (m->phase == LLMI_BEGIN) r = llmi_begin(m);
        else if (m->phase == LLMI_ANSWER && m->row < m->rows) r = llmi_choose(m);
        else if (m->phase == LLMI_ANSWER && m->done >= (size_t)m->model->c.context) r = llmi_at_the_edge(m);
        else break;
        m->house->units++;
    }
    if (r < 0) llmi_end(m, r);
}

/* One row of a part into the pass; wanted rows are the last ones of their part. */
static void llmi_add_row(llmi_house *h, const llmi_share *p, int32_t i)
{
    const llm *m = p->m;
    int32_t all = p->count + p->guesses, out = i - (all - p->wanted);
    int32_t token = i < p->count ? m->ids.data[m->done + (size_t)i] : m->guess[i - p->count];
    llmi_pass_add(&h->model, m->slot, token, (int32_t)m->done + i, out >= 0 ? m->last + (size_t)out * (size_t)h->model.c.vocab : NULL);
}

/* A part for `m` of at most `most` rows. */
static void llmi_add_part(llmi_house *h, llm *m, int32_t most, int timed)
{
    llmi_share *p = &h->parts[h->part_count++];
    size_t left = m->ids.count - m->done;
    p->m = m;
    p->count = left < (size_t)most ? (int32_t)left : most;
    p->guesses = 0;
    m->guesses = 0;
    if (m->phase == LLMI_ANSWER) {
        llmi_guess(m, most - p->count, timed);
        p->guesses = m->guesses;
    }
    p->wanted = p->count == (int32_t)left ? 1 + p->guesses : 0;
}

/* Is the next token the one of the largest logit, as it is? */
static int llmi_takes_largest(const llm *m) { return llmi_is_greedy(&m->sampling) && !llmi_penalizes(&m->sampling) && !m->guided; }

/* May the device choose the tokens of this pass, so that no logits travel? */
static int llmi_device_picks(const llmi_house *h)
{
    const llmi_model *o = &h->model;
    if (!o->be->send_act || !o->be->argmax || h->desc.logprobs || o->c.logit_cap > 0 || o->stateful) return 0;
    for (int32_t i = 0; i < h->part_count; i++)
        if (h->parts[i].wanted > 1 || (h->parts[i].wanted && !llmi_takes_largest(h->parts[i].m))) return 0;
    return 1;
}

/* A new pass of everybody's rows (only NULL), or of one's: first those who answer, so that nobody who is read to makes others wait,
   then prompts with the rows that are left. Returns the number of rows. */
static int32_t llmi_collect(llmi_house *h, llm *only, double left, int timed)
{
    int32_t most = timed ? llmi_fitting(h, left) : h->model.chunk, used = 0, slots = h->model.slots;
    h->part_count = 0;
    for (int phase = LLMI_ANSWER; phase >= LLMI_PROMPT; phase--)
        for (int32_t s = 0; s < slots; s++) {
            llm *m = h->by_slot[s];
            int32_t room = most > used ? most - used : 0;
            if (!m || (only && m != only) || m->phase != phase || !llmi_wants(m)) continue;
            /* answers get their row also when time is short; prompts wait unless nothing else runs */
            if (room == 0 && (phase == LLMI_PROMPT ? used > 0 : used >= h->model.chunk)) continue;
            llmi_add_part(h, m, room > 0 ? room : 1, timed);
            used += h->parts[h->part_count - 1].count + h->parts[h->part_count - 1].guesses;
        }
    llmi_pass_clear(&h->model);
    h->model.pass.picks = llmi_device_picks(h);
    h->model.pass.sends = h->model.be->send_act && h->model.c.logit_cap <= 0;
    for (int wanted = 0; wanted < 2; wanted++)
        for (int32_t i = 0; i < h->part_count; i++) {
            const llmi_share *p = &h->parts[i];
            int32_t all = p->count + p->guesses, cut = all - p->wanted;
            for (int32_t r = wanted ? cut : 0; r < (wanted ? all : cut); r++) llmi_add_row(h, p, r);
        }
    h->spent[0] = h->spent[1] = 0;
    return used;
}

/* ---- running ---- */

/* The finished pass to those who took part. */
static void llmi_finish_pass(llmi_house *h)
{
    moq_error e;
    int32_t rows = h->model.pass.rows, wanted = h->model.pass.wanted, block = h->model.head_rows, count = h->part_count, picks = h->model.pass.picks, at = 0;
    double spent = h->spent[0] + h->spent[1];
    moq_result r;
    llmi_no_error(&e);
    r = llmi_pass_end(&h->model, &e);
    /* a running state that nobody followed is nobody's */
    for (int32_t i = 0; i < rows && h->model.stateful; i++) {
        int32_t slot = h->model.host[2 * (size_t)h->model.chunk + (size_t)i], used = 0;
        for (int32_t k = 0; k < count; k++) used |= h->parts[k].m && h->parts[k].m->slot == slot;
        if (!used) h->model.length[slot] = 0;
    }
    if (r >= 0) llmi_measured(h, LLMI_LAYER, rows, h->spent[0] / h->model.c.layers);
    if (r >= 0 && wanted) llmi_measured(h, LLMI_HEAD, wanted < block ? wanted : block, h->spent[1] / ((wanted + block - 1) / block));
    h->part_count = 0;
    for (int32_t i = 0; i < count; i++) {
        const llmi_share *p = &h->parts[i];
        llm *m = p->m;
        at += p->wanted;
        if (!m) continue;
        if (r < 0) {
            m->kept = e;
            llmi_end(m, r);
            continue;
        }
        m->done += (size_t)p->count;
        m->row = 0;
        m->rows = p->wanted;
        m->picked = picks;
        if (picks && p->wanted) m->pick = h->model.picked[at - 1];
        if (!llmi_takes_largest(m)) llmi_unpick(m); /* sampling was changed while the pass was on its way */
        if (m->phase == LLMI_ANSWER) {
            m->stats.generate_seconds += spent;
            continue;
        }
        m->stats.prompt_seconds += spent;
        m->stats.prompt_tokens += (uint64_t)p->count;
        if (m->done == m->ids.count) {
            m->phase = LLMI_ANSWER;
            m->answered = 1;
        }
        if (llmi_progress(&h->model, MOQ_STAGE_PREFILL, (int64_t)m->done, (int64_t)m->ids.count, &m->kept) < 0) llmi_end(m, m->kept.code);
    }
}

/* Its logits are nobody's, and those on their way arrive now: the memory for them may get others, or go. */
static void llmi_drop_logits(llmi_model *m, int32_t slot)
{
    const llmi_pass *p = &m->pass;
    moq_error e;
    for (int32_t i = 0; i < p->rows; i++) if (m->host[2 * (size_t)m->chunk + (size_t)i] == slot) m->out[i] = NULL;
    if (p->sends && (p->head || p->cut)) m->be->sync(m->be, &e); /* an error stays until the pass ends */
}

/* A conversation leaves the pass in progress. Nobody left in it: there is no pass any more. */
static void llmi_settle(llmi_house *h, const llm *m)
{
    int live = 0, left = 0;
    for (int32_t i = 0; i < h->part_count; i++) {
        left |= h->parts[i].m == m;
        if (h->parts[i].m == m) h->parts[i].m = NULL;
        live += h->parts[i].m != NULL;
    }
    if (left) llmi_drop_logits(&h->model, m->slot);
    if (h->part_count == 0 || live) return;
    llmi_pass_clear(&h->model);
    h->part_count = 0;
}

/* For those who need the activations or the states for themselves. */
static void llmi_finish_all(llmi_house *h)
{
    if (h->part_count == 0) return;
    while (!llmi_pass_done(&h->model)) llmi_pass_unit(&h->model, h->model.c.vocab);
    llmi_finish_pass(h);
}

/* A pass writes the rows that somebody has left behind into their slot until it ends: so it does, before the slot gets another content. */
static void llmi_finish_left(llmi_house *h, int32_t slot)
{
    const llmi_model *m = &h->model;
    for (int32_t i = 0; i < m->pass.rows; i++)
        if (m->host[2 * (size_t)m->chunk + (size_t)i] == slot) {
            llmi_finish_all(h);
            return;
        }
}

/* Who has been cancelled does not wait for the end of the pass. */
static void llmi_cancel_parts(llmi_house *h)
{
    for (int32_t i = h->part_count; i-- > 0;) {
        llm *m = h->parts[i].m;
        if (!m || !LLMI_FLAG_GET(&m->cancel)) continue;
        llmi_settle(h, m);
        llmi_end(m, llmi_cancelled(m));
    }
}

/* How many logits of a block that takes `whole` seconds are computed next with `left` seconds to go: all that are missing, or half of what fits,
   because the estimate is one. What was never timed begins with little. */
static int32_t llmi_next_slice(const llmi_model *m, double whole, double left)
{
    int32_t vocab = m->c.vocab, missing = vocab - m->pass.cut;
    double fits = whole > 0 ? left / whole * vocab : 0;
    if (!llmi_pass_slices(m) || missing <= m->head_cut || fits >= missing) return missing;
    fits /= 2;
    return fits > m->head_cut ? (int32_t)fits / 64 * 64 : m->head_cut;
}

/* Units of the pass in progress until it is done or the next one would end after `until` (0: no limit). On a device that works behind our
   back the clock says nothing without waiting for it: where the time may not do, every unit waits. Returns 1: done. */
static int llmi_run_pass(llmi_house *h, double until)
{
    llmi_model *m = &h->model;
    const llmi_pass *p = &m->pass;
    double now = moq_seconds();
    int careful = until > 0 && now + llmi_expect_pass(h, p->rows, p->wanted) - h->spent[0] - h->spent[1] > until;
    moq_error e;
    while (!llmi_pass_done(m)) {
        double start = now;
        int what = p->next < m->c.layers ? LLMI_LAYER : LLMI_HEAD;
        int32_t left = p->wanted - p->head, most = m->c.vocab;
        double unit = llmi_expect(h, what, what == LLMI_LAYER ? p->rows : left < m->head_rows ? left : m->head_rows);
        if (what == LLMI_HEAD && until > 0) {
            most = llmi_next_slice(m, unit, until - start);
            unit *= (double)most / m->c.vocab;
        }
        if (until > 0 && h->units > 0 && start + unit > until) return 0;
        llmi_cancel_parts(h);
        if (h->part_count == 0) return 1;
        llmi_pass_unit(m, most);
        h->units++;
        if (careful) m->be->sync(m->be, &e); /* an error stays until the pass ends */
        now = moq_seconds();
        h->spent[what] += now - start;
    }
    llmi_finish_pass(h);
    return 1;
}

/* One round for one conversation, or for all. 0: there is nothing to do or no time to do it in. */
static int llmi_round(llmi_house *h, llm *only, double until)
{
    int timed = until > 0;
    int32_t choosers = 0, slots = h->model.slots;
    if (h->part_count > 0) return llmi_run_pass(h, until);
    for (int32_t s = 0; s < slots; s++) {
        const llm *m = h->by_slot[s];
        choosers += m && (!only || m == only) && !m->ready && m->phase == LLMI_ANSWER && m->row < m->rows;
    }
    double start = timed ? moq_seconds() : 0;
    if (timed && choosers && h->units > 0 && start + llmi_expect(h, LLMI_CHOICE, choosers) > until) return 0;
    for (int32_t s = 0; s < slots; s++)
        if (h->by_slot[s] && (!only || h->by_slot[s] == only)) llmi_talk(h->by_slot[s]);
    if (timed && choosers) llmi_measured(h, LLMI_CHOICE, choosers, moq_seconds() - start);
    if (llmi_collect(h, only, until - moq_seconds(), timed) == 0) return 0;
    return llmi_run_pass(h, until);
}

/* Works until there is something to show or the turn is over. */
LLM_API const char *llm_next(llm *m, moq_error *err)
{
    if (!m) {
        moq_fail(err, MOQ_E_ARG, "llm_next", "the model is NULL");
        return NULL;
    }
    while (!m->ready && m->phase != LLMI_IDLE) llmi_round(m->house, m, 0);
    if (m->ready) {
        if (err) llmi_no_error(err);
        m->ready = 0;
        return m->piece.data;
    }
    if (m->mode == LLMI_MODE_NONE && m->kept.code == MOQ_OK) moq_fail(&m->kept, MOQ_E_STATE, "llm_next", "nothing was said; call llm_say first");
    llmi_give(err, &m->kept);
    llmi_no_error(&m->kept);
    return NULL;
}

/* Rounds until `until`; m NULL: of everybody. Without a clock, or where other ranks keep step: one round. */
static void llmi_rounds(llmi_house *h, llm *m, double start, int64_t max_microseconds)
{
    double until = start + (double)(max_microseconds > 0 ? max_microseconds : 1) * 1e-6;
    h->units = 0;
    if (start <= 0 || h->model.ranks > 1) {
        llmi_round(h, m, 0);
        return;
    }
    while ((!m || (!m->ready && m->phase != LLMI_IDLE)) && llmi_round(h, m, until) && moq_seconds() < until) {}
}

LLM_API int llm_step(llm *m, int64_t max_microseconds)
{
    double start = moq_seconds();
    if (!m) return -1;
    llmi_rounds(m->house, m, start, max_microseconds);
    return llm_ready(m);
}

LLM_API int llm_step_all(llm *m, int64_t max_microseconds)
{
    double start = moq_seconds();
    int pieces = 0, busy = 0;
    if (!m) return -1;
    llmi_rounds(m->house, NULL, start, max_microseconds);
    for (int32_t s = 0; s < m->model->slots; s++) {
        const llm *n = m->house->by_slot[s];
        pieces += n && n->ready;
        busy += n && n->phase != LLMI_IDLE;
    }
    return pieces ? pieces : busy ? 0 : -1;
}

/* Taking the piece twice gives it twice; "" before there was one. */
LLM_API const char *llm_piece(llm *m)
{
    if (!m || !m->piece.data) return "";
    m->ready = 0;
    return m->piece.data;
}

LLM_API int llm_ready(const llm *m) { return !m ? -1 : m->ready ? 1 : m->phase == LLMI_IDLE ? -1 : 0; }

/* Holds until something new is said, so that a cancel just before the first llm_next is not lost. */
LLM_API void llm_cancel(llm *m)
{
    if (m) LLMI_FLAG_SET(&m->cancel, 1);
}

/* The cache's tokens are forgotten too: a repeated conversation then computes exactly the same numbers in the same order. */
LLM_API void llm_reset(llm *m)
{
    if (!m) return;
    llmi_settle(m->house, m);
    m->mode = LLMI_MODE_NONE;
    m->phase = LLMI_IDLE;
    LLMI_FLAG_SET(&m->cancel, 0);
    m->turns.count = m->words.count = m->ids.count = m->text.count = m->raw.count = m->piece.count = m->tokens.count = 0;
    m->done = m->answer = m->from = m->from_bytes = 0;
    m->ready = m->answered = 0;
    m->row = m->rows = m->guesses = m->guided = 0;
    m->random = m->sampling.seed;
    m->model->length[m->slot] = 0;
    memset(&m->stats, 0, sizeof m->stats);
    llmi_no_error(&m->kept);
}

/* ---- tokens ---- */

/* A conversation whose slot is run by hand runs its own tokens again from that position on. */
LLM_API moq_result llm_forward(llm *m, int32_t slot, const int32_t *tokens, int32_t count, int32_t pos, float *logits, float *last, moq_error *err)
{
    moq_error e;
    moq_result r;
    llm *owner;
    if (!m) return moq_fail(err, MOQ_E_ARG, "llm_forward", "the model is NULL");
    llmi_no_error(&e);
    llmi_finish_all(m->house);
    r = llmi_run(m->model, slot, tokens, count, pos, logits, last, &e);
    owner = r != MOQ_E_ARG ? m->house->by_slot[slot] : NULL;
    if (owner && owner->done > (size_t)pos) owner->done = (size_t)pos;
    if (r >= 0) llmi_no_error(&e);
    llmi_give(err, &e);
    return r;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-state       forking a conversation; saving and loading one
   A state is checked as a whole before anything changes: a damaged one, or one of another model, leaves the conversation as it was.
   ------------------------------------------------------------------------------------------------ */

/* A state, all little-endian (a state of the other byte order is refused), nothing aligned:

       header    "LLMSTATE", version, bytes of all, hash of what follows the header, fingerprint of the model
       numbers   LLMI_STATE_FIELDS u64, see llmi_state_numbers
       arrays    ids (i32), turns (2 u64 each), words, text, raw, piece, stop strings, tokens
       logits    [vocab] F32 of the next token, when it is about to be chosen; one i32, the token itself, where the device has chosen it
       cache     the keys and values of every layer for the tokens that were run, or its running state, as the backend stores them */

/* Version 1 never holds a choice of the device. */
enum { LLMI_STATE_VERSION = 2, LLMI_STATE_HEADER = 40, LLMI_STATE_FIELDS = 18 };

/* Writes when it has memory, and always counts. */
typedef struct llmi_writer {
    uint8_t *at; /* NULL: count only */
    size_t bytes;
} llmi_writer;

static void llmi_put(llmi_writer *w, const void *data, size_t bytes)
{
    if (w->at && bytes) memcpy(w->at + w->bytes, data, bytes);
    w->bytes += bytes;
}

static void llmi_put_u64(llmi_writer *w, uint64_t v)
{
    uint8_t b[8];
    for (int i = 0; i < 8; i++) b[i] = (uint8_t)(v >> 8 * i);
    llmi_put(w, b, sizeof b);
}

static uint64_t llmi_get_u64(const uint8_t *p)
{
    uint64_t v = 0;
    for (int i = 0; i < 8; i++) v |= (uint64_t)p[i] << 8 * i;
    return v;
}

/* What two conversations of one model may differ in so that a state of one does not fit the other. */
typedef struct llmi_ground {
    const char *backend;
    size_t backend_bytes, elem; /* letters of its kind; bytes of an activation */
    int32_t kv, kv_bf16;        /* moq_kv_format */
    int latent_ways;            /* llmi_model's: a quantized cache and some backends cannot hold the narrow middles */
    int beyond;                 /* the context is longer than the model was trained for, as the longrope rule asks */
} llmi_ground;

static llmi_ground llmi_ground_of(const llm *m)
{
    const llmi_model *o = m->model;
    llmi_ground g;
    g.backend = o->be->name;
    g.backend_bytes = strcspn(o->be->name, ":");
    g.elem = o->elem;
    g.kv = (int32_t)o->kv;
    g.kv_bf16 = o->kv_bf16;
    g.latent_ways = o->latent_ways;
    g.beyond = o->c.context > o->c.rope.original;
    return g;
}

/* What must be equal so that a state fits: the backend's kind, the shapes, how the cache stores, and samples of every tensor (two
   fine-tunings of one model differ in them). */
static uint64_t llmi_fingerprint_on(const llm *m, const llmi_ground *g)
{
    const llmi_model *o = m->model;
    const llmi_config *c = &o->c;
    const int64_t shapes[] = {c->layers, c->hidden, c->heads, c->kv_heads, c->head_dim, c->value_dim, c->vocab, c->ssm_heads, c->ssm_state,
                              g->kv + 256 * (int64_t)g->latent_ways + 65536 * (int64_t)g->kv_bf16, (int64_t)g->elem, o->rank, o->ranks, 0x0102};
    uint64_t h = llmi_hash(g->backend, g->backend_bytes);
    size_t count = moq_tensor_count(o->ck), step = count / 1024 + 1;
    h = llmi_fold(h ^ llmi_hash((const char *)shapes, sizeof shapes), 0x9e3779b97f4a7c15u);
    if (c->rope.adjust == llmi_rope_longrope) h = llmi_fold(h + (uint64_t)g->beyond, 0x9e3779b97f4a7c15u); /* which of two lists turned the keys */
    if (c->rope.adjust == llmi_rope_dynamic) h = llmi_fold(h ^ (uint64_t)c->rope.longest, 0x9e3779b97f4a7c15u); /* what theta was made from */
    for (size_t i = 0; i < count; i += step) {
        const moq_tensor *t = moq_get_tensor(o->ck, i);
        size_t n = t->bytes < 64 ? (size_t)t->bytes : 64;
        h = llmi_fold(h ^ llmi_hash(t->name, t->name_bytes), 0xbf58476d1ce4e5b9u) + (uint64_t)t->dtype;
        if (n) h = llmi_fold(h ^ llmi_hash((const char *)t->data + (size_t)(t->bytes - n) / 2, n), 0x94d049bb133111ebu);
    }
    return h;
}

static uint64_t llmi_fingerprint(const llm *m)
{
    const llmi_ground g = llmi_ground_of(m);
    return llmi_fingerprint_on(m, &g);
}

static const char *llmi_ground_kv(const llmi_ground *g) { return g->kv == MOQ_KV_WIDE && g->kv_bf16 ? "bf16" : moq_kv_format_name((moq_kv_format)g->kv); }

/* Has this model that fingerprint on any other ground? Then that is why a state does not fit, else it is the model. */
static moq_result llmi_fail_other(const llm *m, uint64_t print, moq_error *err)
{
    static const struct { const char *name; size_t elem; } kinds[] = {{"cpu", 4}, {"cuda", 4}, {"cuda", 2}}; /* what their activations take */
    const llmi_ground own = llmi_ground_of(m);
    const llmi_rope *rope = &m->model->c.rope;
    for (int i = -1; i < (int)LLMI_COUNT(kinds); i++)
        for (int way = 0; way < 16 * (int)MOQ_KV_FORMAT_COUNT; way++) {
            llmi_ground g = own;
            if (i >= 0) {
                g.backend = kinds[i].name;
                g.backend_bytes = strlen(g.backend);
                g.elem = kinds[i].elem;
            }
            g.kv = way >> 4;
            g.kv_bf16 = way & 1;
            g.beyond = way >> 1 & 1;
            g.latent_ways = way >> 2 & 3;
            if (!g.latent_ways != !own.latent_ways) continue; /* whether there are such layers is the model's */
            if (g.beyond != own.beyond && rope->adjust != llmi_rope_longrope) continue; /* it makes no difference */
            if (llmi_fingerprint_on(m, &g) != print) continue;
            if (i >= 0) return moq_fail(err, MOQ_E_STATE, "state", "it was saved on %s with activations of %zu bytes, this conversation runs on %s with %zu; "
                                        "load it there or save it anew", g.backend, g.elem, m->model->be->name, own.elem);
            if (g.beyond != own.beyond) return moq_fail(err, MOQ_E_STATE, "state", "it was saved with a context %s the %lld tokens up to which this model turns "
                                        "keys by its short list, here it is %s; open with such a llm_desc.context or save it anew",
                                        g.beyond ? "above" : "of at most", (long long)rope->original, g.beyond ? "not" : "above");
            if (g.kv == own.kv && g.kv_bf16 == own.kv_bf16)
                return moq_fail(err, MOQ_E_STATE, "state", "it was saved on a backend whose cache of latent attention holds %s, here it holds %s; "
                                "load it there or save it anew", g.latent_ways == 1 ? "the narrow middles" : "whole keys and values",
                                own.latent_ways == 1 ? "the narrow middles" : "whole keys and values");
            return moq_fail(err, MOQ_E_STATE, "state", "it was saved with another KV format, %s, than this conversation's, %s; "
                            "open with llm_desc.kv \"%s\" or save it anew", llmi_ground_kv(&g), llmi_ground_kv(&own), llmi_ground_kv(&g));
        }
    return moq_fail(err, MOQ_E_STATE, "state", "it was saved by another model than this '%s'%s%s; load it there or save it anew", m->model->c.family->model_type,
                    rope->adjust == llmi_rope_dynamic ? ", or with another llm_desc.context, which decides how this one turns keys" : "",
                    m->model->ranks > 1 ? ", or by another of its ranks" : "");
}

/* What is held of the next token: nothing, its logits, or the token. */
enum { LLMI_NOT_RUN, LLMI_TO_CHOOSE, LLMI_CHOSEN };

/* The conversation in numbers; the order is the format. */
static void llmi_state_numbers(const llm *m, uint64_t v[LLMI_STATE_FIELDS])
{
    const uint64_t all[LLMI_STATE_FIELDS] = {
        (uint64_t)m->mode, (uint64_t)m->phase, (uint64_t)m->answered, m->done, m->answer, m->from, m->from_bytes, m->random, (uint64_t)m->ready,
        (uint64_t)(m->row == m->rows ? LLMI_NOT_RUN : m->picked ? LLMI_CHOSEN : LLMI_TO_CHOOSE), m->ids.count, m->turns.count / sizeof(llmi_turn),
        m->words.count, m->text.count, m->raw.count, m->piece.count,
        m->stops.count, m->tokens.count};
    memcpy(v, all, sizeof all);
}

/* What a layer's cache holds of the conversation. */
static size_t llmi_cache_bytes(const llm *m, const llmi_layer *l, size_t tokens)
{
    moq_backend *be = m->model->be;
    size_t bytes = l->kv ? be->kv_read(be, l->kv, m->slot, (int32_t)tokens, NULL) : 0;
    return bytes + (l->ssm ? be->ssm_read(be, l->ssm, m->slot, NULL) : 0);
}

/* Keys and values, or states, of every layer. */
static void llmi_put_cache(const llm *m, llmi_writer *w)
{
    moq_backend *be = m->model->be;
    for (int32_t i = 0; i < m->model->c.layers && m->done > 0; i++) {
        const llmi_layer *l = &m->model->layers[i];
        void *at = w->at ? w->at + w->bytes : NULL;
        if (l->kv) w->bytes += be->kv_read(be, l->kv, m->slot, (int32_t)m->done, at);
        if (l->ssm) w->bytes += be->ssm_read(be, l->ssm, m->slot, at);
    }
}

/* All of it; returns the bytes. */
static size_t llmi_write_state(const llm *m, uint8_t *out)
{
    uint64_t v[LLMI_STATE_FIELDS];
    llmi_writer w;
    w.at = out;
    w.bytes = LLMI_STATE_HEADER;
    llmi_state_numbers(m, v);
    for (int i = 0; i < LLMI_STATE_FIELDS; i++) llmi_put_u64(&w, v[i]);
    llmi_put(&w, m->ids.data, m->ids.count * sizeof *m->ids.data);
    for (size_t i = 0; i < m->turns.count / sizeof(llmi_turn); i++) {
        llmi_turn t;
        memcpy(&t, m->turns.data + i * sizeof t, sizeof t);
        llmi_put_u64(&w, t.role);
        llmi_put_u64(&w, t.text);
    }
    llmi_put(&w, m->words.data, m->words.count);
    llmi_put(&w, m->text.data, m->text.count);
    llmi_put(&w, m->raw.data, m->raw.count);
    llmi_put(&w, m->piece.data, m->piece.count);
    llmi_put(&w, m->stops.data, m->stops.count);
    llmi_put(&w, m->tokens.data, m->tokens.count);
    if (m->row < m->rows && m->picked) llmi_put(&w, &m->pick, sizeof m->pick);
    else if (m->row < m->rows) llmi_put(&w, m->last + (size_t)m->row * (size_t)m->model->c.vocab, (size_t)m->model->c.vocab * sizeof *m->last);
    llmi_put_cache(m, &w);
    if (out) {
        llmi_writer header;
        header.at = out;
        header.bytes = 0;
        llmi_put(&header, "LLMSTATE", 8);
        llmi_put_u64(&header, LLMI_STATE_VERSION);
        llmi_put_u64(&header, w.bytes);
        llmi_put_u64(&header, llmi_hash((const char *)out + LLMI_STATE_HEADER, w.bytes - LLMI_STATE_HEADER));
        llmi_put_u64(&header, llmi_fingerprint(m));
    }
    return w.bytes;
}

/* Can this backend hand out what its caches hold? */
static moq_result llmi_check_state(const llm *m, int copies, moq_error *err)
{
    const moq_backend *be = m->model->be;
    for (int32_t i = 0; i < m->model->c.layers; i++) {
        const llmi_layer *l = &m->model->layers[i];
        const char *lacks = NULL;
        if (l->kv && copies && !be->kv_copy) lacks = "kv_copy";
        if (l->ssm && copies && !be->ssm_copy) lacks = "ssm_copy";
        if (l->kv && !copies && (!be->kv_read || !be->kv_write)) lacks = "kv_read";
        if (l->ssm && !copies && (!be->ssm_read || !be->ssm_write)) lacks = "ssm_read";
        if (lacks) return moq_fail(err, MOQ_E_UNSUPPORTED, be->name, "this backend has no '%s', which forking and saving need; use the CPU backend", lacks);
    }
    return MOQ_OK;
}

/* Nothing counted as run that a failed pass has spoiled. A pass in progress changes nothing before `done`, except in a running state. */
static void llmi_settle_whole(llm *m)
{
    size_t held;
    if (m->model->stateful) llmi_finish_all(m->house);
    held = (size_t)m->model->length[m->slot];
    if (m->done > held) m->done = held;
}

/* `bytes` NULL: only the size. */
LLM_API size_t llm_copy_state(llm *m, void *bytes, size_t capacity, moq_error *err)
{
    size_t need;
    if (!m) {
        moq_fail(err, MOQ_E_ARG, "llm_copy_state", "the model is NULL");
        return SIZE_MAX;
    }
    if (llmi_check_state(m, 0, err) < 0) return SIZE_MAX;
    if (m->guided && m->phase > LLMI_BEGIN) {
        moq_fail(err, MOQ_E_STATE, "grammar", "an answer that a grammar leads cannot be saved in the middle; save before or after it");
        return SIZE_MAX;
    }
    llmi_settle_whole(m);
    need = llmi_write_state(m, NULL);
    if (bytes && capacity >= need) llmi_write_state(m, (uint8_t *)bytes);
    return need;
}

/* Everything a state says, checked; the arrays stay in its memory. */
typedef struct llmi_saved {
    uint64_t v[LLMI_STATE_FIELDS];
    const uint8_t *ids, *turns, *words, *text, *raw, *piece, *stops, *tokens, *logits, *cache;
    size_t cache_bytes;
} llmi_saved;

/* The header, before anything in it is believed. */
static moq_result llmi_check_header(const llm *m, const uint8_t *p, size_t bytes, moq_error *err)
{
    if (bytes < LLMI_STATE_HEADER + 8 * LLMI_STATE_FIELDS || memcmp(p, "LLMSTATE", 8) != 0)
        return moq_fail(err, MOQ_E_HEADER, "state", "%zu bytes that are no saved conversation; save one with llm_save", bytes);
    if (llmi_get_u64(p + 8) - 1 >= LLMI_STATE_VERSION)
        return moq_fail(err, MOQ_E_UNSUPPORTED, "state", "version %llu, this program reads %d; save the conversation again with it",
                        (unsigned long long)llmi_get_u64(p + 8), LLMI_STATE_VERSION);
    if (llmi_get_u64(p + 16) != bytes)
        return moq_fail(err, MOQ_E_TRUNCATED, "state", "%zu bytes, its header says %llu; the file was cut or something was added to it", bytes,
                        (unsigned long long)llmi_get_u64(p + 16));
    if (llmi_get_u64(p + 24) != llmi_hash((const char *)p + LLMI_STATE_HEADER, bytes - LLMI_STATE_HEADER))
        return moq_fail(err, MOQ_E_MISMATCH, "state", "its bytes do not agree with its checksum; the file is damaged");
    return llmi_get_u64(p + 32) == llmi_fingerprint(m) ? MOQ_OK : llmi_fail_other(m, llmi_get_u64(p + 32), err);
}

/* The next `count` items of `size` bytes, or NULL when the state is shorter. */
static const uint8_t *llmi_next_array(const uint8_t **at, size_t *left, uint64_t count, size_t size)
{
    const uint8_t *p = *at;
    if (count > *left / size) return NULL;
    *at += (size_t)count * size;
    *left -= (size_t)count * size;
    return p;
}

/* Numbers that no conversation of this model can have. The checksum makes them unlikely, and a file may still be forged. */
static moq_result llmi_check_numbers(const llm *m, const llmi_saved *s, moq_error *err)
{
    const uint64_t *v = s->v;
    size_t context = (size_t)m->model->c.context;
    const uint64_t held = (uint64_t)(m->model->stateful ? LLMI_TO_CHOOSE : LLMI_CHOSEN);
    int good = v[0] <= LLMI_MODE_RAW && v[1] <= LLMI_ANSWER && v[2] <= 1 && v[8] <= 1 && v[9] <= held && v[3] <= v[10] && v[4] <= v[10] && v[5] <= v[10] &&
               (v[17] == 0 || m->house->desc.logprobs) && v[17] % sizeof(llm_token) == 0 && v[6] <= SIZE_MAX / 4;
    if (v[3] > context) /* tokens that were not read yet may be more: a conversation whose context is full can be saved, and stays full */
        return moq_fail(err, MOQ_E_STATE, "state", "it holds %llu tokens, the context %zu; open with a larger llm_desc.context", (unsigned long long)v[3], context);
    for (size_t i = 0; good && i < v[10]; i++) {
        int32_t id;
        memcpy(&id, s->ids + i * sizeof id, sizeof id);
        good = id >= 0 && id < m->model->c.vocab;
    }
    for (size_t i = 0; good && i < 2 * v[11]; i++) good = llmi_get_u64(s->turns + 8 * i) < v[12];
    /* whatever offset a turn has, its text ends */
    good = good && (v[12] == 0 || s->words[v[12] - 1] == 0) && (v[16] == 0 || s->stops[v[16] - 1] == 0);
    if (good && v[9] == LLMI_CHOSEN) {
        int32_t id;
        memcpy(&id, s->logits, sizeof id);
        good = v[10] > 0 && id >= 0 && id < m->model->c.vocab;
    }
    good = good && !(v[1] == LLMI_ANSWER && !v[9] && v[3] >= v[10]) && !(v[1] == LLMI_PROMPT && v[3] >= v[10]);
    return good ? MOQ_OK : moq_fail(err, MOQ_E_STATE, "state", "its numbers contradict each other; it was not written by llm_save");
}

static moq_result llmi_parse_saved(const llm *m, const uint8_t *p, size_t bytes, llmi_saved *s, moq_error *err)
{
    const uint8_t *at = p + LLMI_STATE_HEADER;
    size_t left = bytes - LLMI_STATE_HEADER, cache = 0;
    moq_result r = llmi_check_header(m, p, bytes, err);
    if (r < 0) return r;
    for (int i = 0; i < LLMI_STATE_FIELDS; i++, at += 8, left -= 8) s->v[i] = llmi_get_u64(at);
    s->ids = llmi_next_array(&at, &left, s->v[10], sizeof(int32_t));
    s->turns = llmi_next_array(&at, &left, s->v[11], 16);
    s->words = llmi_next_array(&at, &left, s->v[12], 1);
    s->text = llmi_next_array(&at, &left, s->v[13], 1);
    s->raw = llmi_next_array(&at, &left, s->v[14], 1);
    s->piece = llmi_next_array(&at, &left, s->v[15], 1);
    s->stops = llmi_next_array(&at, &left, s->v[16], 1);
    s->tokens = llmi_next_array(&at, &left, s->v[17], 1);
    s->logits = llmi_next_array(&at, &left, s->v[9] == LLMI_CHOSEN ? 1 : s->v[9] ? (uint64_t)m->model->c.vocab : 0, sizeof(float));
    s->cache = at;
    if (!s->ids || !s->turns || !s->words || !s->text || !s->raw || !s->piece || !s->stops || !s->tokens || !s->logits)
        return moq_fail(err, MOQ_E_TRUNCATED, "state", "its arrays are longer than the state itself; save it anew");
    if ((r = llmi_check_numbers(m, s, err)) < 0) return r;
    for (int32_t i = 0; i < m->model->c.layers && s->v[3] > 0; i++) {
        cache += llmi_cache_bytes(m, &m->model->layers[i], (size_t)s->v[3]);
    }
    return cache == left ? MOQ_OK : moq_fail(err, MOQ_E_STATE, "state",
                        "%zu bytes of cache, this model needs %zu; save it anew with this model and KV format", left, cache);
}

/* Nothing can fail any more but memory, and that is asked for first. */
static int llmi_room_for(llm *m, const llmi_saved *s)
{
    const uint64_t *v = s->v;
    return llmi_ids_reserve(&m->ids, (size_t)v[10]) && llmi_bytes_reserve(&m->turns, (size_t)v[11] * sizeof(llmi_turn)) &&
           llmi_bytes_reserve(&m->words, (size_t)v[12]) && llmi_bytes_reserve(&m->text, (size_t)v[13]) && llmi_bytes_reserve(&m->raw, (size_t)v[14]) &&
           llmi_bytes_reserve(&m->piece, (size_t)v[15] + 1) && llmi_bytes_reserve(&m->stops, (size_t)v[16]) && llmi_bytes_reserve(&m->tokens, (size_t)v[17]);
}

static void llmi_set_bytes(llmi_bytes *b, const uint8_t *from, uint64_t count)
{
    b->count = 0;
    llmi_bytes_add(b, (const char *)from, (size_t)count);
}

/* A checked state becomes the conversation. */
static void llmi_take_state(llm *m, const llmi_saved *s)
{
    const uint64_t *v = s->v;
    const uint8_t *at = s->cache;
    moq_backend *be = m->model->be;
    m->mode = (int)v[0];
    m->phase = (int)v[1];
    m->answered = (int)v[2];
    m->done = (size_t)v[3];
    m->answer = (size_t)v[4];
    m->from = (size_t)v[5];
    m->from_bytes = (size_t)v[6];
    m->random = v[7];
    m->ready = (int)v[8];
    m->row = m->guesses = m->guided = 0;
    m->rows = v[9] > 0;
    m->picked = v[9] == LLMI_CHOSEN;
    m->ids.count = (size_t)v[10];
    if (v[10]) memcpy(m->ids.data, s->ids, (size_t)v[10] * sizeof *m->ids.data);
    m->turns.count = 0;
    for (size_t i = 0; i < v[11]; i++) {
        llmi_turn t;
        t.role = (size_t)llmi_get_u64(s->turns + 16 * i);
        t.text = (size_t)llmi_get_u64(s->turns + 16 * i + 8);
        llmi_bytes_add(&m->turns, (const char *)&t, sizeof t);
    }
    llmi_set_bytes(&m->words, s->words, v[12]);
    llmi_set_bytes(&m->text, s->text, v[13]);
    llmi_set_bytes(&m->raw, s->raw, v[14]);
    llmi_set_bytes(&m->piece, s->piece, v[15]);
    llmi_bytes_add(&m->piece, "", 1);
    m->piece.count--;
    llmi_set_bytes(&m->stops, s->stops, v[16]);
    llmi_set_bytes(&m->tokens, s->tokens, v[17]);
    if (m->picked) memcpy(&m->pick, s->logits, sizeof m->pick);
    else if (v[9]) memcpy(m->last, s->logits, (size_t)m->model->c.vocab * sizeof *m->last);
    for (int32_t i = 0; i < m->model->c.layers && m->done > 0; i++) {
        const llmi_layer *l = &m->model->layers[i];
        if (l->kv) be->kv_write(be, l->kv, m->slot, (int32_t)m->done, at);
        if (l->ssm) be->ssm_write(be, l->ssm, m->slot, at);
        at += llmi_cache_bytes(m, l, m->done);
    }
    m->model->length[m->slot] = (int32_t)m->done;
    if (!llmi_takes_largest(m) || m->house->desc.logprobs) llmi_unpick(m); /* other sampling than that it was saved under */
    LLMI_FLAG_SET(&m->cancel, 0);
    llmi_no_error(&m->kept);
}

LLM_API moq_result llm_set_state(llm *m, const void *bytes, size_t count, moq_error *err)
{
    llmi_saved s;
    moq_result r;
    if (!m || !bytes) return moq_fail(err, MOQ_E_ARG, "llm_set_state", "the model or the state is NULL");
    if ((r = llmi_check_state(m, 0, err)) < 0) return r;
    llmi_settle(m->house, m);
    if ((r = llmi_parse_saved(m, (const uint8_t *)bytes, count, &s, err)) < 0) return r;
    if (!llmi_room_for(m, &s)) return llmi_nomem(err, "state");
    llmi_finish_left(m->house, m->slot);
    llmi_take_state(m, &s);
    return MOQ_OK;
}

/* One block of memory for the whole state: it is small beside the model that made it. */
LLM_API moq_result llm_save(llm *m, const char *path, moq_error *err)
{
    moq_error e;
    size_t need;
    uint8_t *bytes;
    moq_result r;
    if (!m || !path) return moq_fail(err, MOQ_E_ARG, "llm_save", "the model or the path is NULL");
    need = llm_copy_state(m, NULL, 0, &e);
    if (need == SIZE_MAX) {
        llmi_give(err, &e);
        return e.code;
    }
    bytes = (uint8_t *)moq_allocate(&m->a, need);
    if (!bytes) return llmi_nomem(err, "state");
    llmi_write_state(m, bytes);
    r = moq_write_file(path, bytes, need, err);
    moq_release(&m->a, bytes, need);
    return r;
}

/* An error in what a file holds names the file. */
static void llmi_name_file(moq_error *e, const char *path)
{
    const moq_error own = *e;
    moq_fail(e, own.code, path, "%s", own.text);
}

LLM_API moq_result llm_load(llm *m, const char *path, moq_error *err)
{
    moq_error e;
    size_t bytes;
    char *text;
    moq_result r;
    if (!m || !path) return moq_fail(err, MOQ_E_ARG, "llm_load", "the model or the path is NULL");
    llmi_no_error(&e);
    text = moq_read_file(path, (uint64_t)1 << 40, &m->a, &bytes, &e);
    r = text ? llm_set_state(m, text, bytes, &e) : llmi_code(&e, MOQ_E_IO);
    if (text && r < 0) llmi_name_file(&e, path);
    if (text) moq_release(&m->a, text, bytes + 1);
    if (r < 0) llmi_give(err, &e);
    return r;
}

/* ---- forking ---- */

/* Everything but the slot. */
static int llmi_copy_talk(llm *to, const llm *from)
{
    const llmi_bytes *in[] = {&from->turns, &from->words, &from->text, &from->raw, &from->piece, &from->stops, &from->tokens};
    llmi_bytes *out[] = {&to->turns, &to->words, &to->text, &to->raw, &to->piece, &to->stops, &to->tokens};
    size_t vocab = (size_t)from->model->c.vocab;
    int fits = llmi_ids_add(&to->ids, from->ids.data, from->ids.count);
    for (size_t i = 0; i < LLMI_COUNT(in); i++) fits = fits && llmi_bytes_add(out[i], in[i]->data, in[i]->count);
    fits = fits && llmi_bytes_add(&to->piece, "", 1);
    if (!fits) return 0;
    to->piece.count--;
    to->sampling = from->sampling;
    to->random = from->random;
    to->mode = from->mode;
    to->phase = from->phase;
    to->kept = from->kept;
    to->done = from->done;
    to->answer = from->answer;
    to->answered = from->answered;
    to->from = from->from;
    to->from_bytes = from->from_bytes;
    to->ready = from->ready;
    to->draft = from->draft;
    to->guide = from->guide;
    if (to->guide) to->guide->users++;
    to->most = from->most;
    to->guided = from->guided;
    to->place = from->place;
    to->written = from->written;
    to->row = 0;
    to->rows = from->row < from->rows;
    to->picked = from->picked;
    to->pick = from->pick;
    if (to->rows && !to->picked) memcpy(to->last, from->last + (size_t)from->row * vocab, vocab * sizeof *to->last);
    return 1;
}

/* Copied, not shared: a slot of the cache is one run of memory, which is what makes attention fast, and a copy costs less than a token. */
LLM_API llm *llm_fork(llm *m, moq_error *err)
{
    moq_error e;
    moq_backend *be;
    llm *n;
    if (!m) {
        moq_fail(err, MOQ_E_ARG, "llm_fork", "the model is NULL");
        return NULL;
    }
    llmi_no_error(&e);
    be = m->model->be;
    llmi_settle_whole(m);
    n = llmi_check_state(m, 1, &e) < 0 ? NULL : llm_join(m, &e);
    if (n) llmi_finish_left(n->house, n->slot);
    if (n && !llmi_copy_talk(n, m)) {
        llmi_nomem(&e, "conversation");
        llm_close(n);
        n = NULL;
    }
    for (int32_t i = 0; n && i < m->model->c.layers && m->done > 0; i++) {
        const llmi_layer *l = &m->model->layers[i];
        if (l->kv) be->kv_copy(be, l->kv, n->slot, 0, m->slot, 0, (int32_t)m->done);
        if (l->ssm) be->ssm_copy(be, l->ssm, n->slot, m->slot);
    }
    if (n) {
        n->model->length[n->slot] = (int32_t)m->done;
        llmi_no_error(&e);
    }
    llmi_give(err, &e);
    return n;
}

/* ------------------------------------------------------------------------------------------------
   >>llm-plan        what a model will take
   Goes the way of llm_open with every large allocation counted instead of made, so that the plan and the model cannot disagree.
   ------------------------------------------------------------------------------------------------ */

/* An allocator that counts what is alive behind it. */
typedef struct llmi_count {
    moq_allocator inner;
    uint64_t live;
} llmi_count;

static void *llmi_count_alloc(void *user, size_t bytes, size_t align)
{
    llmi_count *c = (llmi_count *)user;
    void *p = align > 64 ? NULL : moq_allocate(&c->inner, bytes);
    if (p) c->live += bytes;
    return p;
}

static void llmi_count_release(void *user, void *ptr, size_t bytes)
{
    llmi_count *c = (llmi_count *)user;
    if (ptr) c->live -= bytes;
    moq_release(&c->inner, ptr, bytes);
}

static uint64_t llmi_arena_bytes(const llmi_arena *r)
{
    uint64_t n = 0;
    for (const llmi_block *b = r->head; b; b = b->next) n += b->bytes;
    return n;
}

/* The tokenizer, llmi_house_open's scratch, and llmi_reserve's share of every slot. */
static moq_result llmi_plan_talk(const llmi_house *h, llm_memory *out, moq_error *err)
{
    const llm_desc *d = &h->desc;
    uint64_t vocab = (uint64_t)h->model.c.vocab, context = (uint64_t)h->model.c.context, text = 0, one;
    llm_tokenizer *t = d->no_tokenizer ? NULL : llm_tokenizer_open(h->model.ck, err);
    if (!t && !d->no_tokenizer) return llmi_code(err, MOQ_E_TOKENIZER);
    llmi_tell_words(&h->model, t);
    if (t) {
        text = (context + 1) * llmi_longest_token(t) + 64;
        out->tokenizer_bytes = llmi_arena_bytes(&t->r) + sizeof *t;
    }
    llm_tokenizer_close(t);
    one = sizeof(llm) + 5 * text + (context + 1) * sizeof(int32_t) + (1 + (uint64_t)d->draft) * vocab * sizeof(float);
    if (d->logprobs) one += (context + 1) * sizeof(llm_token);
    out->run_bytes += sizeof *h + 3 * vocab * sizeof(float) + (uint64_t)h->model.slots * one;
    return MOQ_OK;
}

/* Everything that llmi_house_open makes, into *out. `count` is behind the allocator of h->desc. */
static moq_result llmi_plan_all(llmi_house *h, const llmi_count *count, llm_memory *out, moq_error *err)
{
    const moq_checkpoint *ck;
    moq_backend *be;
    llmi_model *m = &h->model;
    moq_result r = llmi_open_parts(h, &ck, &be, err);
    if (r < 0) return r;
    m->dry = 1;
    if ((r = llmi_model_open(m, ck, be, &h->desc, err)) < 0) return r;
    out->mapped_bytes = moq_get_info(ck)->total_bytes;
    out->weight_bytes = m->weight_memory;
    out->cache_bytes = m->cache_memory;
    /* what was really allocated on the way: folder, vectors, scratch of our own backend; and what was only counted */
    out->run_bytes = count->live + m->planned - m->weight_memory - m->cache_memory;
    out->context = m->c.context;
    out->max_context = m->c.max_positions > INT32_MAX ? INT32_MAX : (int32_t)m->c.max_positions;
    out->slots = m->slots;
    out->chunk = m->chunk;
    return llmi_plan_talk(h, out, err);
}

LLM_API moq_result llm_plan(const llm_desc *desc, llm_memory *out, moq_error *err)
{
    moq_error e;
    llmi_count count;
    llmi_house *h;
    moq_result r;
    llmi_no_error(&e);
    if (!out) return moq_fail(err, MOQ_E_ARG, "llm_plan", "there is no place for the plan");
    memset(out, 0, sizeof *out);
    if ((r = llmi_check_desc(desc, &e)) < 0) {
        llmi_give(err, &e);
        return r;
    }
    memset(&count, 0, sizeof count);
    count.inner = desc->allocator;
    h = (llmi_house *)moq_allocate(&desc->allocator, sizeof *h);
    if (!h) return llmi_nomem(err, "plan");
    h->a = desc->allocator;
    h->desc = *desc;
    h->desc.allocator.alloc = llmi_count_alloc;
    h->desc.allocator.release = llmi_count_release;
    h->desc.allocator.user = &count;
    h->desc.progress = NULL;
    r = llmi_plan_all(h, &count, out, &e);
    llmi_house_close(h);
    if (r < 0) memset(out, 0, sizeof *out);
    else llmi_no_error(&e);
    out->total_bytes = out->mapped_bytes + out->weight_bytes + out->cache_bytes + out->run_bytes + out->tokenizer_bytes;
    llmi_give(err, &e);
    return r;
}

/* What makes a model smaller. weights: they are too large by themselves, and then `fewer` helps. */
static const char *llmi_smaller(const llm_desc *desc, int weights, const char *fewer)
{
    if (desc->weights && strcmp(desc->weights, "copied") == 0) return "leave weights mapped";
    return weights ? fewer : "lower context, slots or chunk, or choose a smaller kv";
}

/* llm_open's own question. */
static moq_result llmi_check_memory(const llm_desc *desc, moq_error *err)
{
    llm_desc d = *desc;
    llm_memory p;
    moq_result r;
    d.log = NULL; /* opening tells it */
    r = llm_plan(&d, &p, err);
    if (r < 0 || p.total_bytes <= desc->max_memory) return r;
    return moq_fail(err, MOQ_E_LIMIT, "llm_desc.max_memory",
                    "%llu bytes are allowed, %llu are needed: %llu mapped weights, %llu repacked or copied, %llu cache (%d slot%s of %d tokens), %llu run state, "
                    "%llu tokenizer; %s",
                    (unsigned long long)desc->max_memory, (unsigned long long)p.total_bytes, (unsigned long long)p.mapped_bytes,
                    (unsigned long long)p.weight_bytes, (unsigned long long)p.cache_bytes, p.slots, p.slots == 1 ? "" : "s", p.context,
                    (unsigned long long)p.run_bytes, (unsigned long long)p.tokenizer_bytes,
                    llmi_smaller(desc, p.mapped_bytes + p.weight_bytes > desc->max_memory, "raise it, or open a folder of fewer bits a weight"));
}

/* The same without a limit of the caller's: what the machine cannot hold fills it before anything fails, as systems promise more than they have.
   Mapped weights do not count, whose pages the system may drop. Devices and allocators of the caller's refuse by themselves. */
static moq_result llmi_check_machine(const llm_desc *desc, const moq_checkpoint *ck, moq_backend *be, moq_error *err)
{
    const uint64_t longest = 1024; /* bytes of one token's text; more than any has */
    uint64_t own, all = moq_machine_memory();
    llm_desc d = *desc;
    llm_memory p;
    moq_error e;
    if (desc->max_memory || !all || desc->allocator.alloc || strcmp(be->name, "cpu") != 0) return MOQ_OK;
    d.checkpoint = ck;
    d.backend = be;
    d.log = NULL;
    d.no_tokenizer = 1;
    if (llm_plan(&d, &p, &e) < 0) return MOQ_OK; /* opening says what is wrong, and what is worth knowing beside it */
    own = p.total_bytes - p.mapped_bytes;
    /* a tokenizer is opened twice only where its texts may decide */
    if (!desc->no_tokenizer && own + 5 * longest * (uint64_t)p.context * (uint64_t)p.slots > all) {
        d.no_tokenizer = 0;
        if (llm_plan(&d, &p, &e) < 0) return MOQ_OK;
        own = p.total_bytes - p.mapped_bytes;
    }
    if (own <= all) return MOQ_OK;
    return moq_fail(err, MOQ_E_LIMIT, NULL,
                    "this machine has %.1f GB, but beyond its mapped weights the model takes %.1f GB: %.1f repacked or copied, %.1f cache (%d slot%s of %d tokens), "
                    "%.1f run state; %s", (double)all / 1e9, (double)own / 1e9, (double)p.weight_bytes / 1e9, (double)p.cache_bytes / 1e9, p.slots,
                    p.slots == 1 ? "" : "s", p.context, (double)p.run_bytes / 1e9,
                    llmi_smaller(desc, p.weight_bytes > all, "open a folder of fewer bits a weight"));
}

#ifdef MOQ_QUANTIZE

/* ------------------------------------------------------------------------------------------------
   >>llm-calibrate   the forward pass of a calibration
   Runs token rows through a model, layer by layer, on whatever backend it is given; knows nothing of statistics.
   ------------------------------------------------------------------------------------------------ */

/* One layer is open at a time, and all rows go through it before the next one is opened. Between two layers a token is 2 * hidden
   numbers: x, and d which the next norm adds to it. They are kept as F32, exactly, in memory or in a file. */
typedef struct llmi_calibration {
    const llm_samples *s;
    llmi_model m;
    llm_desc desc;
    moq_backend *watch;
    moq_spill *kept;        /* [tokens of all rows, 2, hidden], by chunks: x of all its tokens, then d */
    float *host;            /* [chunk, 2, hidden] */
    float *logits;          /* [chunk, vocab], whole rows: [longest, vocab]; or NULL */
    uint64_t tokens, done;  /* of all rows; of all rows and layers */
    int32_t longest;
} llmi_calibration;

/* One row through one layer; `at`: index of its first token among all; keep: the next layer gets what comes out. */
static moq_result llmi_calibrate_row(llmi_calibration *c, int32_t layer, int32_t row, uint64_t at, int keep, moq_error *err)
{
    llmi_model *m = &c->m;
    moq_backend *be = m->be;
    int32_t count = c->s->lengths[row], last = layer + 1 == m->c.layers;
    size_t hidden = (size_t)m->c.hidden, vocab = (size_t)m->c.vocab;
    moq_result code = MOQ_OK;
    for (int32_t first = 0, n; first < count && code >= 0; first += n) {
        n = count - first < m->chunk ? count - first : m->chunk;
        size_t half = (size_t)n * hidden, bytes = 2 * half * sizeof(float);
        uint64_t place = (at + (uint64_t)first) * 2 * hidden * sizeof(float);
        llmi_pass_clear(m);
        for (int32_t i = 0; i < n; i++)
            llmi_pass_add(m, 0, c->s->rows[row][first + i], first + i, last && c->logits ? c->logits + (size_t)i * vocab : NULL);
        llmi_pass_upload(m);
        if (layer == 0) llmi_pass_embed(m);
        else llmi_pass_angles(m);
        if (layer > 0) {
            if ((code = moq_spill_get(c->kept, place, c->host, bytes, err)) < 0) return code;
            be->upload_act(be, m->x, c->host, half);
            be->upload_act(be, m->d, c->host + half, half);
            m->pass.add = m->d;
        }
        llmi_pass_layer(m, &m->layers[layer]);
        while (m->pass.head < m->pass.wanted) llmi_pass_head(m, m->c.vocab);
        if (keep) {
            be->download_act(be, c->host, m->x, half);
            be->download_act(be, c->host + half, m->d, half);
            code = moq_spill_put(c->kept, place, c->host, bytes, err);
        }
        if (code >= 0) code = llmi_pass_end(m, err);
    }
    return code;
}

/* All rows through the layer that is open; `again`: the second time. */
static moq_result llmi_calibrate_rows(llmi_calibration *c, int32_t layer, int keep, int again, moq_error *err)
{
    const llm_samples *s = c->s;
    int32_t batch = s->batch > 0 ? s->batch : 1;
    char name[LLMI_NAME_BYTES], tail[LLMI_NAME_BYTES];
    const moq_tensor *embed = moq_find_tensor(c->m.ck, llmi_name(&c->m, name, -1, llmi_join(tail, c->m.embed_name, "weight")));
    uint64_t at = 0;
    moq_result code = MOQ_OK;
    for (int32_t i = 0; i < s->count && code >= 0; i++) {
        code = llmi_calibrate_row(c, layer, i, at, keep, err);
        if (layer == 0 && s->max_memory) moq_forget_tensor(c->m.ck, embed); /* a row of the embedding brings its neighbours along */
        at += (uint64_t)s->lengths[i];
        if (!again) c->done += (uint64_t)s->lengths[i];
        if (code >= 0 && ((i + 1) % batch == 0 || i + 1 == s->count)) moq_end_batch(c->watch);
        if (code >= 0 && s->progress && s->progress(s->progress_user, MOQ_STAGE_CALIBRATE, c->done, c->tokens * (uint64_t)c->m.c.layers))
            code = moq_fail(err, MOQ_E_CANCELLED, NULL, "stopped by the caller");
    }
    if (code >= 0) moq_end_layers(c->watch);
    return code;
}

/* One layer; twice where the observer changes its weights and there is a next one to feel it. */
static moq_result llmi_calibrate_layer(llmi_calibration *c, int32_t layer, moq_error *err)
{
    llmi_held *mark = c->m.held;
    int last = layer + 1 == c->m.c.layers, twice = !last && moq_takes_twice(c->watch);
    moq_result code = llmi_open_layer(&c->m, layer, err);
    if (code >= 0) code = llmi_calibrate_rows(c, layer, !last && !twice, 0, err);
    if (code >= 0 && twice) code = llmi_calibrate_rows(c, layer, 1, 1, err);
    llmi_close_layer(&c->m, layer, mark);
    if (c->s->max_memory) moq_forget_pages(c->m.ck);
    return code;
}

/* All rows, each through the whole model, for observers that need it so. */
static moq_result llmi_calibrate_whole(llmi_calibration *c, moq_error *err)
{
    const llm_samples *s = c->s;
    llmi_model *m = &c->m;
    int32_t batch = s->batch > 0 ? s->batch : 1;
    moq_result code = MOQ_OK;
    for (int32_t i = 0; i < s->count && code >= 0; i++) {
        code = llmi_run(m, 0, s->rows[i], s->lengths[i], 0, c->logits, NULL, err);
        c->done += (uint64_t)s->lengths[i];
        if (code >= 0 && ((i + 1) % batch == 0 || i + 1 == s->count)) moq_end_batch(c->watch);
        if (code >= 0 && s->progress && s->progress(s->progress_user, MOQ_STAGE_CALIBRATE, c->done, c->tokens))
            code = moq_fail(err, MOQ_E_CANCELLED, NULL, "stopped by the caller");
    }
    return code;
}

/* Rows that cannot be run are refused before the first layer. */
static moq_result llmi_check_samples(llmi_calibration *c, moq_error *err)
{
    const llm_samples *s = c->s;
    c->longest = 1;
    if (!s || s->count <= 0 || !s->rows || !s->lengths) return moq_fail(err, MOQ_E_ARG, "samples", "there is not a single row of tokens to calibrate with");
    for (int32_t i = 0; i < s->count; i++) {
        if (!s->rows[i] || s->lengths[i] <= 0) return moq_fail(err, MOQ_E_ARG, "samples", "row %d is empty", i);
        if (s->lengths[i] > c->longest) c->longest = s->lengths[i];
        c->tokens += (uint64_t)s->lengths[i];
    }
    return MOQ_OK;
}

/* The model without its layers, and room for what is between them: a quarter of the memory named, else a file. */
static moq_result llmi_open_calibration(llmi_calibration *c, const moq_checkpoint *source, moq_error *err)
{
    const llm_samples *s = c->s;
    uint64_t width;
    moq_result code;
    c->desc.kv = "wide";
    c->desc.context = c->longest;
    c->desc.allocator = *moq_get_allocator(source);
    c->m.one_by_one = moq_takes_layers(c->watch);
    if ((code = llmi_model_open(&c->m, source, c->watch, &c->desc, err)) < 0) return code;
    for (int32_t i = 0; i < s->count; i++)
        if ((code = llmi_check_run(&c->m, 0, s->rows[i], s->lengths[i], 0, err)) < 0) return code;
    width = 2 * (uint64_t)c->m.c.hidden * sizeof(float);
    if (s->logits) c->logits = (float *)llmi_take(&c->m.arena, (size_t)(c->m.one_by_one ? c->m.chunk : c->longest), (size_t)c->m.c.vocab * sizeof *c->logits);
    if (s->logits && !c->logits) return llmi_nomem(err, "logits");
    if (!c->m.one_by_one) return MOQ_OK;
    c->kept = moq_spill_create(c->tokens * width, s->max_memory ? s->max_memory / 4 : UINT64_MAX, s->scratch, &c->desc.allocator, err);
    if (!c->kept) return llmi_code(err, MOQ_E_NOMEM);
    c->host = (float *)llmi_take(&c->m.arena, (size_t)c->m.chunk, (size_t)width);
    return c->host ? MOQ_OK : llmi_nomem(err, "samples");
}

/* The model is opened for each pass: its weights stay mapped, and nothing of one pass can leak into the next. Every row begins at
   position 0 of the one slot, which overwrites the row before. */
LLM_API moq_result llm_calibrate(void *data, const moq_checkpoint *source, moq_backend *watch, moq_error *err)
{
    llmi_calibration *c;
    moq_error e;
    const moq_allocator *a = moq_get_allocator(source);
    llmi_no_error(&e);
    c = (llmi_calibration *)moq_allocate(a, sizeof *c);
    if (!c) return llmi_nomem(err, "samples");
    c->s = (const llm_samples *)data;
    c->watch = watch;
    moq_result code = llmi_check_samples(c, &e);
    if (code >= 0) code = llmi_open_calibration(c, source, &e);
    if (code >= 0 && !c->m.one_by_one) code = llmi_calibrate_whole(c, &e);
    for (int32_t i = 0; c->m.one_by_one && i < c->m.c.layers && code >= 0; i++) code = llmi_calibrate_layer(c, i, &e);
    if (c->m.be) llmi_model_close(&c->m);
    moq_spill_destroy(c->kept);
    moq_release(a, c, sizeof *c);
    if (code >= 0) llmi_no_error(&e);
    llmi_give(err, &e);
    return code;
}
#endif /* MOQ_QUANTIZE */

#endif /* LLM_IMPLEMENTATION */
