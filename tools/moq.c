/* moq.c - the command line of modelopt_q: inspect, verify, run, quantize and measure checkpoints.

       cc -O2 tools/moq.c -o moq -lm -pthread          or: make -C tools

   Everything here goes through the public API of modelopt_q.h and examples/llm.h. stdout carries the result and nothing
   else; notes, progress and errors go to stderr. Exit status: 0 done or right, 1 checked and found wanting, 2 refused; what a signal
   stops ends as by that signal, after cleaning up.

   Contents: search for the tag.
       >>common     errors, memory, Ctrl-C, progress
       >>json-out   a JSON writer
       >>options    one option parser for all verbs
       >>open       backends, checkpoints, engines
       >>tokens     token ids from the command line and from files
       >>rows       lines of .jsonl files: texts and conversations
       >>inspect  >>verify  >>plain  >>dequant  >>logits  >>eval  >>run  >>tokenize  >>recipes  >>diff
       >>verbs      the table of verbs, help, main
   Beside it: moq_measure.h (bench and selftest, with the random layers that both need), moq_quantize.h (quantize, convert), moq_autoquant.h,
   moq_picture.h (inspect --png). */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define MOQ_QUANTIZE
#define MODELOPT_Q_IMPLEMENTATION
#include "../modelopt_q.h"
#define LLM_IMPLEMENTATION
#include "../examples/llm.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* ------------------------------------------------------------------------------------------------
   >>common          errors, memory, Ctrl-C, progress
   An error is one line on stderr; nothing half-written stays behind.
   ------------------------------------------------------------------------------------------------ */

static volatile sig_atomic_t stop_requested;
static volatile sig_atomic_t end_requested; /* not by Ctrl-C, which stops only an answer of a chat */
static volatile sig_atomic_t stop_signal;   /* the last of them */
static llm *volatile running;   /* what Ctrl-C cancels */
static char *unfinished_folder; /* removed when the tool gives up */

static void remove_folder(const char *path)
{
    DIR *d = opendir(path);
    struct dirent *entry;
    char file[4096];
    while (d && (entry = readdir(d)) != NULL) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        if (snprintf(file, sizeof file, "%s/%s", path, entry->d_name) < (int)sizeof file) unlink(file);
    }
    if (d) closedir(d);
    rmdir(path);
}

static void drop_unfinished(void)
{
    if (unfinished_folder) remove_folder(unfinished_folder);
    unfinished_folder = NULL;
}

#if defined(__GNUC__)
#define PRINTF_LIKE(f, a) __attribute__((format(printf, f, a)))
#else
#define PRINTF_LIKE(f, a)
#endif

/* One line on stderr. Returns the exit status for a refusal, so that `return refuse(...)` reads well. */
static int refuse(const char *format, ...) PRINTF_LIKE(1, 2);
static int refuse(const char *format, ...)
{
    va_list args;
    fputs("moq: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    return 2;
}

static int names_file(const char *text, size_t length)
{
    static const char *const ends[] = {".json", ".safetensors", ".jinja", ".txt", ".model", ".py"};
    for (int i = 0; i < COUNT(ends); i++) {
        size_t n = strlen(ends[i]);
        if (length > n && strncmp(text + length - n, ends[i], n) == 0 && !memchr(text, ' ', length)) return 1;
    }
    return 0;
}

/* The headers tell programmers which field to change; here the same thing is an option. */
static const struct { const char *field, *option; } said_otherwise[] = {
    {"llm_desc.max_memory", "--max-memory"}, {"llm_desc.context", "--context"}, {"llm_desc.chunk", "--chunk"}, {"llm_desc.kv", "--kv"},
    {"llm_desc.head", "--head"}, {"llm_desc.weights", "--weights"}, {"llm_desc.threads", "--threads"},
    {"llm_desc.sampling.temperature", "--temp"}, {"llm_desc.sampling.top_k", "--top-k"}, {"llm_desc.sampling.top_p", "--top-p"}, {"llm_desc.sampling.min_p", "--min-p"},
    {"lower context, slots or chunk, or choose a smaller kv", "lower --context or --chunk, or choose a smaller --kv"},
    {"stop after fewer tokens", "set --max-tokens"}, {"raise max_tokens or the context", "raise --max-tokens or --context"},
    {"moq_verify and MOQ_VERIFY_DEEP", "moq verify --deep"}, {"begin anew with llm_reset", "begin anew"}, {"; say texts with llm_say_raw", "; `moq run --raw` and rows of {\"text\"} do without one"},
    {"(a lone .safetensors file opens with moq_st_open)", "(`moq verify` takes a lone .safetensors file, too)"},
    {"expected the folder of a checkpoint", "expected the folder of a checkpoint (`moq verify` takes a lone .safetensors file, too)"},
    {"without it texts can neither be read nor written", "`moq run`, `tokenize` and what takes .txt or .jsonl files (`eval`, --calib) need it"},
    {", or run ids with llm_desc.no_tokenizer", ""}, {"calibrate with samples (moq_quantize_desc.calibrate)", "calibrate with text (--calib)"},
    {"give a calibration file that has it", "give a file that has it (--calibration)"},
    {"give a calibration file that has them", "give a file that has them (--calibration)"},
    {"leave weights mapped", "leave --weights mapped"},
    {"open a folder of fewer bits a weight", "take a folder of fewer bits a weight (a float one: --quantize RECIPE)"},
    {"lower context, slots or chunk, choose a smaller kv, or", "lower --context or --chunk, choose a smaller --kv, or"}, {"effective_bits: ", "--bits: "}
};

static void print_text(FILE *to, const char *text)
{
    while (*text) {
        int i = 0;
        size_t n = 0;
        for (; i < COUNT(said_otherwise); i++) {
            n = strlen(said_otherwise[i].field);
            if (strncmp(text, said_otherwise[i].field, n) == 0) break;
        }
        if (i == COUNT(said_otherwise)) fputc(*text++, to);
        else { fputs(said_otherwise[i].option, to); text += n; }
    }
    fputc('\n', to);
}

/* How much of `text` spells path[0 .. length) as the headers do, other bytes than printable ASCII as \xHH; 0: it begins otherwise. */
static size_t spells(const char *text, const char *path, size_t length)
{
    size_t used = 0;
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)path[i];
        char escaped[8];
        size_t n = (size_t)snprintf(escaped, sizeof escaped, c < 0x20 || c > 0x7e ? "\\x%02x" : "%c", c);
        if (strncmp(text + used, escaped, n) != 0) return 0;
        used += n;
    }
    return text[used] == ':' || text[used] == '/' ? used : 0;
}

/* "FOLDER/FILE: tensor 'NAME': what is wrong; what to do", from a text that begins with the bare name of a file, with that or the whole path of
   the folder (and a file in it), or with neither. */
static void print_placed(FILE *to, const char *prefix, const char *path, const char *text)
{
    size_t length = path ? strlen(path) : 0, base, head = strcspn(text, ":"), whole, last;
    while (length > 1 && path[length - 1] == '/') length--;
    for (base = length; base > 0 && path[base - 1] != '/'; base--) {}
    whole = path ? spells(text, path, length) : 0;
    last = path ? spells(text, path + base, length - base) : 0;
    fputs(prefix, to);
    if (whole || last) text += whole ? whole : last; /* the path as it was typed stands in its place */
    else if (path) { fprintf(to, "%.*s%s", (int)length, path, names_file(text, head) ? "/" : ": "); path = NULL; }
    if (path) fprintf(to, "%.*s", (int)length, path);
    print_text(to, text);
}

static int ends_with(const char *s, const char *end)
{
    size_t a = strlen(s), b = strlen(end);
    return a >= b && strcmp(s + a - b, end) == 0;
}

static int refuse_error(const char *path, const moq_error *err)
{
    moq_error more = *err;
    struct rlimit most;
    size_t n = strlen(more.text);
    if (err->code == MOQ_E_CANCELLED && stop_requested) return refuse("stopped");
    if (err->code == MOQ_E_NOMEM && getrlimit(RLIMIT_AS, &most) == 0 && most.rlim_cur != RLIM_INFINITY) /* the machine may have plenty */
        snprintf(more.text + n, sizeof more.text - n, "; `ulimit -v` allows this program %.0f MB, files that it maps included: raise that",
                 (double)most.rlim_cur / 1e6);
    err = &more;
    print_placed(stderr, "moq: ", path, err->text);
    return 2;
}

static void *take(size_t count, size_t bytes)
{
    void *p = calloc(count ? count : 1, bytes);
    if (!p) {
        drop_unfinished();
        exit(refuse("out of memory (%zu items of %zu bytes)", count, bytes));
    }
    return p;
}

static void *grow(void *old, size_t count, size_t bytes)
{
    void *p = count > SIZE_MAX / bytes ? NULL : realloc(old, count * bytes);
    if (!p) {
        drop_unfinished();
        exit(refuse("out of memory (%zu items of %zu bytes)", count, bytes));
    }
    return p;
}

static char *join(const char *a, const char *b, const char *c)
{
    size_t bytes = strlen(a) + strlen(b) + strlen(c) + 1;
    char *s = (char *)take(bytes, 1);
    snprintf(s, bytes, "%s%s%s", a, b, c);
    return s;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* Only async-signal-safe work: the loops look at the flag. Should one hang, the fourth Ctrl-C ends the program at once. */
static void on_interrupt(int number)
{
    stop_signal = number;
    if (number != SIGINT) end_requested = 1;
    if (stop_requested < 3) stop_requested = stop_requested + 1;
    else {
        signal(number, SIG_DFL);
        raise(number); /* comes when this returns */
    }
    if (running) llm_cancel(running);
}

/* Ctrl-C, the end of the terminal and a plain `kill` all stop cleanly; SIGTERM and SIGHUP stay ignored where nohup or a shell lets the program ignore them. */
static void catch_interrupt(void)
{
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action, old;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_interrupt;
    stop_requested = end_requested;
    signal(SIGXFSZ, SIG_IGN); /* a file that `ulimit -f` does not allow is an error of the write, told and cleaned up */
    for (int i = 0; i < COUNT(signals); i++)
        if (signals[i] == SIGINT || sigaction(signals[i], NULL, &old) != 0 || old.sa_handler != SIG_IGN) sigaction(signals[i], &action, NULL);
}

/* A bar on a terminal, for work over a second: `part` of it is done, `rest` is what else there is to say. part 1 takes the bar away. */
static int draw_bar(const char *what, double start, double part, const char *rest)
{
    static double drawn;
    static int visible;
    double now = moq_seconds();
    if (!isatty(2)) return stop_requested != 0;
    if (visible && (part >= 1 || stop_requested)) {
        fputs("\r\033[K", stderr);
        visible = 0;
    }
    if (part < 1 && !stop_requested && now - start > 1 && now - drawn > 0.1) {
        int filled = (int)(30 * part);
        fprintf(stderr, "\r\033[K%s [%.*s%.*s]%s%s", what, filled, "##############################", 30 - filled, "..............................",
                rest[0] ? " " : "", rest);
        drawn = now;
        visible = 1;
    }
    return stop_requested != 0;
}

/* Work that goes on at one rate, which is measured from its first report on. Returns 1 when it should stop. */
static int progress_bar(const char *what, uint64_t done, uint64_t total, int bytes)
{
    static double start;
    static uint64_t first, last;
    static const char *stage;
    char rest[64] = "";
    double now = moq_seconds(), rate;
    if (what != stage || done < last || done == 0) {
        stage = what;
        start = now;
        first = done;
    }
    last = done;
    rate = done > first && now > start ? (double)(done - first) / (now - start) : 0;
    if (rate > 0 && bytes) snprintf(rest, sizeof rest, "%.2f GB/s, %.0f s left", rate / 1e9, (double)(total - done) / rate);
    else if (rate > 0) snprintf(rest, sizeof rest, "%.0f s left", (double)(total - done) / rate);
    return draw_bar(what, start, done < total ? (double)done / (double)total : 1, rest);
}

static int on_progress(void *user, moq_stage stage, uint64_t done, uint64_t total)
{
    static const char *const names[] = {"working", "loading", "preparing", "verifying", "calibrating", "quantizing", "reading the prompt"};
    (void)user;
    return progress_bar((int)stage > 0 && (int)stage < COUNT(names) ? names[stage] : names[0], done, total, total > 1000000);
}

static void on_log(void *user, moq_log_level level, moq_result code, const char *text)
{
    (void)code;
    if (level == MOQ_LOG_WARNING) print_placed(stderr, "moq: note: ", (const char *)user, text);
}

/* A run that is killed cannot clean up: TARGET.tmp-PROCESS... stays. It is named, not removed: that no process here has the number does not
   say that none has it on another machine or in another container that shares the disk. */
static void note_leftovers(const char *target)
{
    char folder[4096];
    struct dirent *entry;
    size_t length = target ? strlen(target) : 0, base, n;
    while (length > 1 && target[length - 1] == '/') length--;
    for (base = length; base > 0 && target[base - 1] != '/'; base--) {}
    n = length - base;
    snprintf(folder, sizeof folder, "%.*s", (int)(base ? base : 1), base ? target : ".");
    DIR *d = n > 0 && base < sizeof folder ? opendir(folder) : NULL;
    while (d && (entry = readdir(d)) != NULL) {
        const char *tail = entry->d_name + (strncmp(entry->d_name, target + base, n) == 0 ? n : strlen(entry->d_name));
        const int ours = strncmp(tail, ".tmp-", 5) == 0 && tail[5 + strspn(tail + 5, "0123456789-")] == 0;
        long process = ours ? strtol(tail + 5, NULL, 10) : 0;
        if (process < 1 || kill((pid_t)process, 0) == 0 || errno != ESRCH) continue;
        fprintf(stderr, "moq: note: %.*s%s is what a run that was killed left behind; remove it, unless another machine or container is writing it\n",
                (int)base, target, entry->d_name);
    }
    if (d) closedir(d);
}

/* ------------------------------------------------------------------------------------------------
   >>json-out        a JSON writer
   Containers near the root go one item a line, deeper ones stay on their line.
   ------------------------------------------------------------------------------------------------ */

typedef struct json_out {
    FILE *to;
    int depth, lines; /* containers up to `lines` deep are broken into lines */
    int filled[64];   /* has the container of this depth an item yet? */
} json_out;

static json_out json_to(FILE *to, int lines)
{
    json_out j;
    memset(&j, 0, sizeof j);
    j.to = to;
    j.lines = lines;
    return j;
}

static void json_text(json_out *j, const char *s, size_t bytes)
{
    fputc('"', j->to);
    for (size_t i = 0; i < bytes; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c == '"' || c == '\\') fputc('\\', j->to);
        if (c < 0x20 || c == 0x7f) fprintf(j->to, "\\u%04x", c);
        else fputc(c, j->to);
    }
    fputc('"', j->to);
}

static void json_item(json_out *j, const char *key)
{
    if (j->depth == 0) return;
    if (j->filled[j->depth]) fputc(',', j->to);
    if (j->depth <= j->lines) fprintf(j->to, "\n%*s", j->depth * 2, "");
    else if (j->filled[j->depth]) fputc(' ', j->to);
    j->filled[j->depth] = 1;
    if (key) {
        json_text(j, key, strlen(key));
        fputs(": ", j->to);
    }
}

static void json_open(json_out *j, const char *key, char bracket)
{
    json_item(j, key);
    fputc(bracket, j->to);
    if (j->depth + 1 < COUNT(j->filled)) j->depth++;
    j->filled[j->depth] = 0;
}

static void json_close(json_out *j, char bracket)
{
    if (j->filled[j->depth] && j->depth <= j->lines) fprintf(j->to, "\n%*s", (j->depth - 1) * 2, "");
    fputc(bracket, j->to);
    if (--j->depth == 0) fputc('\n', j->to);
}

static void json_string(json_out *j, const char *key, const char *value)
{
    json_item(j, key);
    json_text(j, value ? value : "", value ? strlen(value) : 0);
}

static void json_int(json_out *j, const char *key, int64_t value)
{
    json_item(j, key);
    fprintf(j->to, "%" PRId64, value);
}

/* JSON has no NaN and no infinity: null. */
static void json_number(json_out *j, const char *key, double value)
{
    json_item(j, key);
    if (value - value == 0) fprintf(j->to, "%.9g", value);
    else fputs("null", j->to);
}

static void json_bool(json_out *j, const char *key, int value)
{
    json_item(j, key);
    fputs(value ? "true" : "false", j->to);
}

/* ------------------------------------------------------------------------------------------------
   >>options         one option parser for all verbs
   A table names every option once; a verb lists the names it takes.
   ------------------------------------------------------------------------------------------------ */

#define MAX_LIST 32
enum { MOST_COPIES = 256 }; /* of a layer, for bench */

typedef struct text_list { const char *item[MAX_LIST]; int count; } text_list;

typedef struct options {
    const char *args[4];
    int arg_count;
    int json, brief, explain, deep, hash, raw, stats, decode, help, active_experts;
    int64_t threads, context, limit, seq, max_tokens, top_k, seed, chunk, samples, batch, copies;
    double temp, top_p, min_p, bits, repeat_penalty, presence_penalty, frequency_penalty;
    const char *backend, *kernel, *act, *kv, *out, *dtype, *tokens, *data, *against, *system, *prompt, *file, *m, *recipe, *format, *calibration, *shard;
    const char *calib, *save_calibration, *max_memory, *quantize;
    const char *head, *weights, *to, *png, *recipes, *method, *search, *save_search, *json_schema, *grammar;
    int encode;
    text_list scheme, shape, exclude, rule;
} options;

enum { KIND_FLAG, KIND_INT, KIND_COUNT, KIND_REAL, KIND_TEXT, KIND_LIST };

typedef struct option_row {
    const char *name;
    int kind;
    size_t at; /* offset of the field in options */
    const char *value, *help;
} option_row;

#define FIELD(name) offsetof(options, name)

/* --kv of verbs that run a model, and of those that write a folder */
#define CACHE_KV "wide, bf16, fp8, fp8_affine, int8, nvfp4, nvfp4_affine, nvfp4_rotate or mxfp4"
#define FOLDER_KV "none, fp8, fp8_affine, fp8_cast, nvfp4, nvfp4_affine, nvfp4_cast or nvfp4_rotate"

static const option_row option_table[] = {
    {"json", KIND_FLAG, FIELD(json), "", "one JSON object on stdout"},
    {"threads", KIND_INT, FIELD(threads), "N", "CPU threads (default, and 0: physical cores)"},
    {"backend", KIND_TEXT, FIELD(backend), "B", "cpu, cuda or cuda:N (default: cuda when built in and a device is there)"},
    {"kernel", KIND_TEXT, FIELD(kernel), "K", "auto, reference, or a name that inspect --explain prints (default: what MOQ_KERNEL says, else auto)"},
    {"act", KIND_TEXT, FIELD(act), "A", "how inputs of quantized layers are rounded: auto, stored, wide; of all layers: bf16"},
    {"kv", KIND_TEXT, FIELD(kv), "F", "KV cache: auto (as the checkpoint says), " CACHE_KV},
    {"head", KIND_TEXT, FIELD(head), "F", "an output layer that is stored unquantized: stored (default), or quantized while loading to int8 or fp8"},
    {"weights", KIND_TEXT, FIELD(weights), "W",
     "what products on a CPU read: mapped (default, the file where it lies) or copied (while opening, in the order of use: faster, more memory)"},
    {"context", KIND_INT, FIELD(context), "N", "tokens of one sequence, prompt and answer (default, and 0: what config.json says, at most 4096)"},
    {"chunk", KIND_INT, FIELD(chunk), "N", "prompt tokens per forward pass (0: 256, more on a GPU)"},
    {"explain", KIND_FLAG, FIELD(explain), "", "why each layer gets its kernel"},
    {"deep", KIND_FLAG, FIELD(deep), "", "also check every code of every weight"},
    {"hash", KIND_FLAG, FIELD(hash), "", "a line NAME, shape, hash for every quantized weight"},
    {"out", KIND_TEXT, FIELD(out), "PATH", "where the result goes"},
    {"dtype", KIND_TEXT, FIELD(dtype), "T", "f32 (default) or bf16"},
    {"tokens", KIND_TEXT, FIELD(tokens), "T", "1,2,3 or FILE.json or FILE.json#KEY"},
    {"data", KIND_TEXT, FIELD(data), "D", ".jsonl, .txt, or tokens"},
    {"limit", KIND_COUNT, FIELD(limit), "N", "only the first N rows or windows"},
    {"seq", KIND_COUNT, FIELD(seq), "N", "tokens of a window of text, or of a row to calibrate with (default 512, or what the model was made for)"},
    {"brief", KIND_FLAG, FIELD(brief), "", "only what differs, and the last line"},
    {"against", KIND_TEXT, FIELD(against), "DIR", "compare with this folder"},
    {"system", KIND_TEXT, FIELD(system), "S", "system message"},
    {"prompt", KIND_TEXT, FIELD(prompt), "P", "user message (default: stdin, a chat on a terminal)"},
    {"max-tokens", KIND_INT, FIELD(max_tokens), "N", "stop after N generated tokens (0, the default: when the turn or the context ends)"},
    {"temp", KIND_REAL, FIELD(temp), "X", "temperature (default 0: greedy)"},
    {"top-k", KIND_INT, FIELD(top_k), "K", "sample from the K best tokens (default 0: all); with --temp"},
    {"top-p", KIND_REAL, FIELD(top_p), "P", "sample from the best tokens of total probability P (default 0: all); with --temp"},
    {"min-p", KIND_REAL, FIELD(min_p), "P", "drop tokens below P times the best one's probability"},
    {"repeat-penalty", KIND_REAL, FIELD(repeat_penalty), "P",
     "against repetition, e.g. 1.1: positive logits of tokens that were there are divided by P, others multiplied (0, the default, and 1: off)"},
    {"presence-penalty", KIND_REAL, FIELD(presence_penalty), "P", "subtract P from the logits of tokens that the answer has (default 0: off)"},
    {"frequency-penalty", KIND_REAL, FIELD(frequency_penalty), "P", "subtract P times how often the answer has a token from its logit (default 0: off)"},
    {"seed", KIND_INT, FIELD(seed), "S", "seed of the sampler (default 0: the same answer every time)"},
    {"raw", KIND_FLAG, FIELD(raw), "", "no chat frame: continue the prompt"},
    {"stats", KIND_FLAG, FIELD(stats), "", "tokens per second on stderr"},
    {"decode", KIND_FLAG, FIELD(decode), "", "ids to text"},
    {"file", KIND_TEXT, FIELD(file), "F", "read F instead of stdin"},
    {"scheme", KIND_LIST, FIELD(scheme), "S", "only this kind of layer (may be repeated)"},
    {"shape", KIND_LIST, FIELD(shape), "NxK", "outputs x inputs (may be repeated)"},
    {"m", KIND_TEXT, FIELD(m), "1,8", "rows of x"},
    {"copies", KIND_INT, FIELD(copies), "N", "layers used in turn (default: more than the last-level cache holds; 1: weights stay in it if they fit)"},
    {"recipe", KIND_TEXT, FIELD(recipe), "R", "what to quantize to; moq recipes lists them"},
    {"calibration", KIND_TEXT, FIELD(calibration), "FILE", "recorded amax and pre_quant_scale values (a .safetensors file)"},
    {"calib", KIND_TEXT, FIELD(calib), "D", "text to calibrate with: .jsonl, .txt, or tokens"},
    {"samples", KIND_COUNT, FIELD(samples), "N", "at most N rows of it (default 512)"},
    {"batch", KIND_COUNT, FIELD(batch), "N", "rows of a batch: averages and losses are means over batches (default 8)"},
    {"save-calibration", KIND_TEXT, FIELD(save_calibration), "FILE", "keep what was measured, for --calibration"},
    {"max-memory", KIND_TEXT, FIELD(max_memory), "BYTES", "stay below it, e.g. 2G: refused with the numbers; quantize: activations go to a file"},
    {"bits", KIND_REAL, FIELD(bits), "X", "bits of a weight of linear layers on average (embeddings are not counted)"},
    {"recipes", KIND_TEXT, FIELD(recipes), "A,B", "what to choose from, beside leaving a layer as it is"},
    {"method", KIND_TEXT, FIELD(method), "M", "scores: gradient (default) or kl"},
    {"search", KIND_TEXT, FIELD(search), "FILE", "recorded scores, instead of making them"},
    {"save-search", KIND_TEXT, FIELD(save_search), "FILE", "keep scores and choice"},
    {"active-experts", KIND_FLAG, FIELD(active_experts), "", "experts cost what a token uses of them"},
    {"exclude", KIND_LIST, FIELD(exclude), "PATTERN", "leave modules of this name alone; * and ? as in a shell (may be repeated)"},
    {"rule", KIND_LIST, FIELD(rule), "PATTERN=R", "another recipe for modules of this name (may be repeated)"},
    {"format", KIND_TEXT, FIELD(format), "F", "container: modelopt (default), compressed-tensors, or gpt-oss (its experts in MXFP4)"},
    {"png", KIND_TEXT, FIELD(png), "FILE", "a picture of where the bits and, with --against, the error went"},
    {"encode", KIND_FLAG, FIELD(encode), "", "measure quantizing: GB/s of BF16 and the ratio to a copy of the same bytes"},
    {"to", KIND_TEXT, FIELD(to), "F", "container: modelopt, compressed-tensors or gpt-oss"},
    {"shard", KIND_TEXT, FIELD(shard), "BYTES", "largest file, e.g. 500M (default 10G)"},
    {"help", KIND_FLAG, FIELD(help), "", "what the verb does"},
    {"quantize", KIND_TEXT, FIELD(quantize), "RECIPE", "quantize a float folder while loading; nothing is written. Not for recipes that need data"},
    {"json-schema", KIND_TEXT, FIELD(json_schema), "FILE", "answers are documents of this JSON Schema, complete within --max-tokens; - is stdin"},
    {"grammar", KIND_TEXT, FIELD(grammar), "FILE", "answers are texts of this GBNF grammar, complete within --max-tokens; - is stdin"}
};

typedef struct verb_row {
    const char *name;
    int (*run)(const options *o);
    int min_args, max_args;
    const char *arguments; /* after the verb, for the usage line */
    const char *options;   /* names, space-separated, besides the common ones */
    const char *help, *example;
} verb_row;

/* How things are computed: every verb takes these, so that scripts may pass them along. What --kv would change is refused where it is kept. */
#define COMMON_OPTIONS "threads backend kernel act kv"

/* Is `name` one of the space-separated words of `list`? */
static int in_list(const char *list, const char *name)
{
    size_t length = strlen(name);
    for (const char *at = list; (at = strstr(at, name)) != NULL; at += length)
        if ((at == list || at[-1] == ' ') && (at[length] == ' ' || at[length] == 0)) return 1;
    return 0;
}

static const option_row *find_option(const char *name, size_t length)
{
    for (int i = 0; i < COUNT(option_table); i++)
        if (strlen(option_table[i].name) == length && strncmp(option_table[i].name, name, length) == 0) return &option_table[i];
    return NULL;
}

/* Names the option that may be meant: one with a slip in it, with _ for -, or one that begins alike (--temperature). */
static int refuse_option(const verb_row *verb, const char *a)
{
    char copy[32], *name = copy;
    snprintf(copy, sizeof copy, "%s", a);
    copy[strcspn(copy, "=")] = 0;
    for (char *at = copy; *at; at++)
        if (*at == '_') *at = '-';
    name += strspn(name, "-");
    for (int i = 0; i < 2 * COUNT(option_table); i++) { /* slips come first: --json-shema begins like --json */
        const char *other = option_table[i % COUNT(option_table)].name;
        size_t n = strlen(name), m = strlen(other), least = n < m ? n : m;
        if (!in_list(verb->options, other) && !in_list(COMMON_OPTIONS, other)) continue;
        if (i < COUNT(option_table) ? moq_is_slip(name, other) : least > 2 && strncmp(name, other, least) == 0)
            return refuse("there is no option '%s'; is --%s meant? Try: moq help %s", a, other, verb->name);
    }
    return refuse("there is no option '%s'; try: moq help %s", a, verb->name);
}

/* A number is no larger than this. */
static long long most_of(const option_row *row)
{
    static const struct { size_t at; long long most; } limits[] = {
        {FIELD(seed), INT64_MAX}, {FIELD(threads), 1024}, {FIELD(context), 1 << 24}, {FIELD(chunk), 65536},
        {FIELD(copies), MOST_COPIES}, {FIELD(temp), 1000000}, {FIELD(top_p), 1}, {FIELD(min_p), 1}, {FIELD(bits), 32},
        {FIELD(repeat_penalty), 100}, {FIELD(presence_penalty), 100}, {FIELD(frequency_penalty), 100}
    };
    for (int i = 0; i < COUNT(limits); i++)
        if (limits[i].at == row->at) return limits[i].most;
    return INT32_MAX;
}

static int set_option(options *o, const option_row *row, const char *value)
{
    char *at = (char *)o + row->at, *end = NULL;
    long long least = row->kind == KIND_COUNT, most = most_of(row);
    errno = 0;
    if (value && value[0] == 0 && row->at != FIELD(prompt) && row->at != FIELD(system))
        return refuse("--%s is empty; it needs a value: --%s %s", row->name, row->name, row->value);
    if (row->kind == KIND_FLAG) *(int *)(void *)at = 1;
    if (row->kind == KIND_TEXT) *(const char **)(void *)at = value;
    if (row->kind == KIND_INT || row->kind == KIND_COUNT) {
        long long n = strtoll(value, &end, 10);
        if (*end || end == value || errno || n < least || n > most)
            return refuse("--%s is a whole number from %lld to %lld, not '%s'", row->name, least, most, value);
        *(int64_t *)(void *)at = n;
    }
    if (row->kind == KIND_REAL) {
        double x = strtod(value, &end);
        if (*end || end == value || !(x >= 0 && x <= (double)most)) return refuse("--%s is a number from 0 to %lld, not '%s'", row->name, most, value);
        *(double *)(void *)at = x;
    }
    if (row->kind == KIND_LIST) {
        text_list *list = (text_list *)(void *)at;
        if (list->count == MAX_LIST) return refuse("--%s is given more than %d times", row->name, MAX_LIST);
        list->item[list->count++] = value;
    }
    return 0;
}

/* The container is --format of quantize and --to of convert; either takes both words. */
static const option_row *of_verb(const option_row *row, const verb_row *verb)
{
    const char *other = row->at == FIELD(to) ? "format" : row->at == FIELD(format) ? "to" : "";
    return other[0] && !in_list(verb->options, row->name) && in_list(verb->options, other) ? find_option(other, strlen(other)) : row;
}

static int parse_options(options *o, const verb_row *verb, int argc, char **argv)
{
    int i = 0, plain = 0, bad;
    for (; i < argc; i++) {
        const char *a = argv[i], *equals;
        const option_row *row;
        if (a[0] == 0) return refuse("an argument is empty, a path without a name; usage: moq %s %s", verb->name, verb->arguments);
        if (plain || a[0] != '-' || a[1] == 0) {
            if (o->arg_count >= verb->max_args)
                return refuse("'%s' is one argument too many%s; try: moq help %s", a,
                              in_list(verb->options, "prompt") ? ": what to say comes after --prompt, in quotes" : "", verb->name);
            o->args[o->arg_count++] = a;
            continue;
        }
        if (strcmp(a, "--") == 0) { plain = 1; continue; }
        equals = strchr(a, '=');
        row = a[1] == '-' ? find_option(a + 2, equals ? (size_t)(equals - a - 2) : strlen(a + 2)) : NULL;
        if (!row) return refuse_option(verb, a);
        row = of_verb(row, verb);
        if (row->kind != KIND_FLAG && !equals && ++i >= argc) return refuse("--%s needs a value: --%s %s", row->name, row->name, row->value);
        if (row->kind != KIND_FLAG && !equals && argv[i][0] == '-' && argv[i][1] == '-' && find_option(argv[i] + 2, strcspn(argv[i] + 2, "=")))
            return refuse("--%s needs a value before %s: --%s %s; what begins with -- is written --%s=%s", row->name, argv[i], row->name, row->value, row->name,
                          argv[i]);
        if (row->at != FIELD(help) && !in_list(verb->options, row->name) && !in_list(COMMON_OPTIONS, row->name))
            return refuse("--%s is not for '%s'; try: moq help %s", row->name, verb->name, verb->name);
        if (row->kind == KIND_FLAG && equals) return refuse("--%s takes no value", row->name);
        bad = set_option(o, row, row->kind == KIND_FLAG ? NULL : equals ? equals + 1 : argv[i]);
        if (bad) return bad;
    }
    if (o->help) return 0;
    if (o->arg_count < verb->min_args) return refuse("usage: moq %s %s; try: moq help %s", verb->name, verb->arguments, verb->name);
    return 0;
}

/* ------------------------------------------------------------------------------------------------
   >>open            backends, checkpoints, engines
   ------------------------------------------------------------------------------------------------ */

static int parse_act(const char *text, moq_act *out)
{
    static const char *const names[] = {"auto", "stored", "wide", "bf16"};
    *out = MOQ_ACT_AUTO;
    for (int i = 0; i < COUNT(names); i++)
        if (!text || strcmp(text, names[i]) == 0) { *out = text ? (moq_act)i : MOQ_ACT_AUTO; return 0; }
    return refuse("--act is auto, stored, wide or bf16, not '%s'", text);
}

/* The CUDA backend of --backend cuda or cuda:N, or of no --backend when a device is there: *out NULL and 0 means "use the CPU". */
static int open_cuda(const options *o, moq_backend **out)
{
    const char *name = o->backend;
    int asked = name && strncmp(name, "cuda", 4) == 0;
    *out = NULL;
    if (name && strcmp(name, "cpu") == 0) return 0;
    if (name && !(asked && (name[4] == 0 || (name[4] == ':' && name[5] >= '0' && name[5] <= '9' && strlen(name) < 8))))
        return refuse("--backend is cpu, cuda or cuda:N, not '%s'", name);
#ifdef MOQ_CUDA
    moq_error err;
    moq_cuda_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.device = asked && name[4] ? atoi(name + 5) : 0;
    desc.kernel = o->kernel;
    int bad = parse_act(o->act, &desc.act);
    if (bad) return bad;
    *out = !asked && o->kernel ? NULL : moq_cuda_backend_with(&desc, &err); /* a kernel without a backend is one of the CPU */
    if (!*out && asked) return refuse_error(NULL, &err);
#else
    if (asked) return refuse("--backend %s: this build has no CUDA; build it with `make -C tools CUDA=1` (needs nvcc), or use --backend cpu", name);
#endif
    return 0;
}

/* What --kernel says, else MOQ_KERNEL, so that a whole script can be run with others. A name that is not known is told with where it stands. */
static int choose_kernel(const char *asked, const char **out)
{
    moq_cpu_desc desc;
    moq_error err;
    *out = asked ? asked : getenv("MOQ_KERNEL");
    if (!*out) return 0;
    memset(&desc, 0, sizeof desc);
    desc.threads = 1;
    desc.kernel = *out;
    moq_backend *be = moq_cpu_backend(&desc, &err);
    moq_backend_destroy(be);
    if (!be && err.code != MOQ_E_ARG) return refuse("%s", err.text);
    return be ? 0 : refuse("%s: %s", asked ? "--kernel" : "MOQ_KERNEL in the environment", err.text);
}

static int open_backend(const options *o, const char *kernel, moq_backend **out)
{
    moq_cpu_desc desc;
    moq_error err;
    int bad = open_cuda(o, out);
    if (bad || *out) return bad;
    memset(&desc, 0, sizeof desc);
    desc.threads = (int32_t)o->threads;
    bad = choose_kernel(kernel, &desc.kernel);
    if (!bad) bad = parse_act(o->act, &desc.act);
    if (bad) return bad;
    *out = moq_cpu_backend(&desc, &err);
    return *out ? 0 : refuse_error(NULL, &err);
}

/* What an engine computes on. The CPU's backend is its own, whose scratch it counts; be: another one. */
static int choose_backend(const options *o, moq_backend *be, llm_desc *desc)
{
    desc->backend = be;
    if (be) return 0;
    desc->threads = (int32_t)o->threads;
    int bad = choose_kernel(o->kernel, &desc->kernel);
    return bad ? bad : parse_act(o->act, &desc->act);
}

/* quiet: what opening would log comes as findings of moq_verify. most: of bytes that quantizing while loading may take, or 0. */
static moq_checkpoint *open_folder(const char *path, int quiet, const char *recipe, uint64_t most, moq_error *err)
{
    moq_open_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.log = quiet ? NULL : on_log;
    desc.log_user = (void *)(uintptr_t)path;
    desc.progress = on_progress;
    desc.quantize = recipe;
    desc.max_memory = most;
    return moq_open(path, &desc, err);
}

/* A folder, its backend and an engine over both. */
typedef struct engine {
    const char *path;
    moq_checkpoint *ck;
    moq_backend *gpu; /* NULL: the CPU */
    llm *m;
    moq_backend *be; /* what m computes on */
    const llm_info *info;
} engine;

static void close_engine(engine *e)
{
    running = NULL;
    llm_close(e->m);
    moq_backend_destroy(e->gpu);
    moq_close(e->ck);
    memset(e, 0, sizeof *e);
}

static int parse_bytes(const char *option, const char *text, uint64_t *out); /* moq_quantize.h */

static int open_engine(engine *e, const options *o, const char *path, int64_t context, int no_tokenizer)
{
    llm_desc desc;
    moq_error err;
    int bad;
    memset(e, 0, sizeof *e);
    memset(&desc, 0, sizeof desc);
    e->path = path;
    if (o->max_memory && !parse_bytes("max-memory", o->max_memory, &desc.max_memory)) return 2;
    e->ck = open_folder(path, 0, path == o->args[0] ? o->quantize : NULL, desc.max_memory, &err);
    if (!e->ck) return refuse_error(path, &err);
    bad = open_cuda(o, &e->gpu);
    if (!bad) bad = choose_backend(o, e->gpu, &desc);
    if (bad) { close_engine(e); return bad; }
    desc.checkpoint = e->ck;
    desc.kv = o->kv;
    desc.head = o->head;
    desc.weights = o->weights;
    desc.context = (int32_t)(o->context ? o->context : context);
    desc.chunk = (int32_t)o->chunk;
    desc.no_tokenizer = no_tokenizer;
    desc.log = on_log;
    desc.log_user = (void *)(uintptr_t)path;
    desc.progress = on_progress;
    desc.sampling.temperature = (float)o->temp;
    desc.sampling.top_k = (int32_t)o->top_k;
    desc.sampling.top_p = (float)o->top_p;
    desc.sampling.min_p = (float)o->min_p;
    desc.sampling.repetition_penalty = (float)o->repeat_penalty;
    desc.sampling.presence_penalty = (float)o->presence_penalty;
    desc.sampling.frequency_penalty = (float)o->frequency_penalty;
    desc.sampling.seed = (uint64_t)o->seed;
    if (!(e->m = llm_open(&desc, &err))) bad = refuse_error(path, &err);
    if (bad) { close_engine(e); return bad; }
    e->info = llm_get_info(e->m);
    e->be = llm_get_backend(e->m);
    running = e->m;
    return 0;
}

#define NAME_A_FILE "name it with its whole path or as seen from the current folder"

/* A whole file that the user named, NUL-terminated, or NULL after an error line. Release with free_file. */
static char *read_input(const char *path, size_t *bytes)
{
    moq_error err;
    char *text = moq_read_file(path, (uint64_t)1 << 40, NULL, bytes, &err);
    if (!text && err.code == MOQ_E_NOTFOUND) refuse("%s: no such file; " NAME_A_FILE, path);
    else if (!text) refuse_error(path, &err);
    return text;
}

static void free_file(char *text, size_t bytes) { moq_release(NULL, text, text ? bytes + 1 : 0); }

/* Where s stops being UTF-8 (RFC 3629) without NUL; n: nowhere. */
static size_t first_no_text(const char *s, size_t n)
{
    size_t i = 0, length;
    for (; i < n; i += length) {
        unsigned a = (unsigned char)s[i], b = i + 1 < n ? (unsigned char)s[i + 1] : 0;
        length = a < 0x80 ? 1 : a < 0xc2 ? 0 : a < 0xe0 ? 2 : a < 0xf0 ? 3 : a < 0xf5 ? 4 : 0;
        if (a == 0 || length == 0 || length > n - i) return i;
        if ((a == 0xe0 && b < 0xa0) || (a == 0xed && b > 0x9f) || (a == 0xf0 && b < 0x90) || (a == 0xf4 && b > 0x8f)) return i;
        for (size_t k = 1; k < length; k++)
            if (((unsigned char)s[i + k] & 0xc0) != 0x80) return i;
    }
    return n;
}

/* The same of a text: anything else would be read as words that nobody wrote. Lines of JSON are judged one by one. */
static char *read_text(const char *path, size_t *bytes)
{
    char *text = read_input(path, bytes);
    size_t at = text ? first_no_text(text, *bytes) : 0;
    if (!text || at == *bytes || ends_with(path, ".jsonl")) return text;
    if (*bytes >= 2 && (memcmp(text, "\xff\xfe", 2) == 0 || memcmp(text, "\xfe\xff", 2) == 0)) refuse("%s: is UTF-16 text; save it as UTF-8", path);
    else refuse("%s: byte %zu is no UTF-8 text (found 0x%02x); save it as UTF-8, or give a .txt or .jsonl file of text", path, at,
                (unsigned)(unsigned char)text[at]);
    free_file(text, *bytes);
    return NULL;
}

/* ------------------------------------------------------------------------------------------------
   >>tokens          token ids from the command line and from files
   ------------------------------------------------------------------------------------------------ */

/* Rows of ids, one after another: row i is ids[start[i]] .. ids[start[i + 1] - 1]. */
typedef struct token_rows {
    int32_t *ids;
    size_t *start;
    size_t rows;
} token_rows;

static void free_tokens(token_rows *t)
{
    free(t->ids);
    free(t->start);
    memset(t, 0, sizeof *t);
}

static void tokens_row(token_rows *t, const int32_t *ids, size_t count)
{
    size_t used = t->rows ? t->start[t->rows] : 0;
    t->ids = (int32_t *)grow(t->ids, used + count + 1, sizeof *t->ids);
    t->start = (size_t *)grow(t->start, t->rows + 2, sizeof *t->start);
    if (count) memcpy(t->ids + used, ids, count * sizeof *ids);
    t->start[t->rows] = used;
    t->start[++t->rows] = used + count;
}

static int tokens_json_row(token_rows *t, const moq_json *list)
{
    int32_t *ids = (int32_t *)take(list->count, sizeof *ids);
    size_t count = 0;
    int64_t id;
    for (const moq_json *e = moq_json_first(list); e; e = moq_json_next(list, e)) {
        if (!moq_json_int(e, &id) || id < 0 || id > INT32_MAX) { free(ids); return 0; }
        ids[count++] = (int32_t)id;
    }
    tokens_row(t, ids, count);
    free(ids);
    return 1;
}

/* The keys of an object's lists, for a message: FILE.json#KEY takes one of them. Nothing where it has none. */
static void key_names(const moq_json *root, char *text, size_t capacity)
{
    size_t used = 0;
    for (const moq_json *e = moq_json_first(root); e && used < capacity; e = moq_json_next(root, e))
        if (e->key && e->type == MOQ_JSON_ARRAY)
            used += (size_t)snprintf(text + used, capacity - used, "%s%.60s", used ? ", " : "; FILE.json#KEY takes one of its lists: ", e->key);
}

static int tokens_json(token_rows *t, const char *path, const char *key)
{
    size_t bytes;
    moq_error err;
    char *text = read_input(path, &bytes);
    moq_json_doc *doc;
    const moq_json *list;
    char keys[300] = "";
    int good = 0;
    if (!text) return 2;
    doc = moq_json_parse(text, bytes, MOQ_JSON_STRICT, 0, base_name(path), NULL, &err);
    free_file(text, bytes);
    if (!doc) return refuse_error(path, &err);
    list = key ? moq_json_find(moq_json_root(doc), key) : moq_json_root(doc);
    if (list && list->type == MOQ_JSON_ARRAY && list->count > 0) {
        const moq_json *first = moq_json_first(list);
        good = first->type == MOQ_JSON_ARRAY;
        if (!good) good = tokens_json_row(t, list);
        else
            for (const moq_json *e = first; good && e; e = moq_json_next(list, e)) good = e->type == MOQ_JSON_ARRAY && tokens_json_row(t, e);
    }
    if (!good && t->rows > 0) refuse("%s: row %zu is no list of token ids, whole numbers from 0 on", path, t->rows);
    else if (!good) {
        key_names(moq_json_root(doc), keys, sizeof keys);
        refuse("%s: %s%s is no list of token ids and no list of such lists%s", path, key ? "key " : "the file", key ? key : "", keys);
    }
    moq_json_destroy(doc);
    return good ? 0 : 2;
}

/* A text that is neither: a list with something else in it, or the name of a file. */
static int refuse_tokens(const char *option, const char *text)
{
    struct stat info;
    if (stat(text, &info) == 0)
        return refuse("--%s: '%s' %s; text is read from .jsonl and .txt files where the verb takes it, ids from FILE.json or FILE.json#KEY, or as 1,2,3",
                      option, text, S_ISDIR(info.st_mode) ? "is a folder" : !S_ISREG(info.st_mode) ? "is a device or a pipe"
                      : "does not say by its name what it holds");
    if (strchr("0123456789", text[0]) && strchr(text, ','))
        return refuse("--%s: '%.200s' is no list of token ids: '%.20s' is no number; ids are written 1,2,3, or read from FILE.json or FILE.json#KEY",
                      option, text, text + strspn(text, "0123456789, "));
    return refuse("--%s %s: no such file; " NAME_A_FILE " (token ids are written 1,2,3)", option, text);
}

/* "1,2,3", "FILE.json" or "FILE.json#KEY", as --tokens, --data or --calib gave it. */
static int read_tokens(token_rows *t, const char *option, const char *text)
{
    const char *hash = strrchr(text, '#');
    memset(t, 0, sizeof *t);
    if (text[0] == 0) return refuse("the list of token ids is empty");
    if (strspn(text, "0123456789, ") == strlen(text)) {
        int32_t *ids = (int32_t *)take(strlen(text), sizeof *ids);
        size_t count = 0;
        for (const char *at = text; *at;) {
            char *end;
            unsigned long long id = strtoull(at, &end, 10);
            if (end == at || id > INT32_MAX) { free(ids); return refuse("'%s' is no list of token ids", text); }
            ids[count++] = (int32_t)id;
            at = end + strspn(end, " ");
            if (*at != ',') continue;
            at += 1 + strspn(at + 1, " ");
            if (!*at) { free(ids); return refuse("'%s' ends with a comma: a token is missing", text); }
        }
        tokens_row(t, ids, count);
        free(ids);
        return 0;
    }
    if (!hash && (ends_with(text, ".txt") || ends_with(text, ".jsonl")))
        return refuse("%s: is text by its name, and this takes token ids: 1,2,3, FILE.json or FILE.json#KEY; `moq tokenize DIR --file F` makes them", text);
    if (!hash && !strstr(text, ".json")) return refuse_tokens(option, text);
    if (hash) {
        char *path = join(text, "", "");
        int bad;
        path[hash - text] = 0;
        bad = tokens_json(t, path, hash + 1);
        free(path);
        return bad;
    }
    return tokens_json(t, text, NULL);
}

/* source: what --tokens, --data or --calib was, for messages. vocab, context: 0 when not known. */
static int check_tokens(const token_rows *t, const char *source, int32_t vocab, int32_t context)
{
    for (size_t r = 0; r < t->rows; r++) {
        size_t count = t->start[r + 1] - t->start[r];
        if (count == 0) return refuse("%.200s: row %zu is empty", source, r);
        if (context > 0 && count > (size_t)context)
            return refuse("%.200s: row %zu has %zu tokens, the model takes %d; use shorter rows", source, r, count, context);
        for (size_t i = t->start[r]; i < t->start[r + 1]; i++)
            if (vocab > 0 && t->ids[i] >= vocab)
                return refuse("%.200s: row %zu: token %d is outside the vocabulary of %d", source, r, t->ids[i], vocab);
    }
    return 0;
}

static size_t longest_row(const token_rows *t)
{
    size_t n = 0;
    for (size_t r = 0; r < t->rows; r++)
        if (t->start[r + 1] - t->start[r] > n) n = t->start[r + 1] - t->start[r];
    return n;
}

/* ------------------------------------------------------------------------------------------------
   >>rows            lines of .jsonl files: texts and conversations
   ------------------------------------------------------------------------------------------------ */

enum { MAX_MESSAGES = 256, NO_MORE_ROWS = -1 };

/* One line: a text, or messages. */
typedef struct text_row {
    const char *text; /* NULL: messages */
    size_t bytes, line, count;
    llm_message messages[MAX_MESSAGES];
    int noted; /* it was said that a row has more than is used */
} text_row;

#define ROW_SHAPES "{\"text\"}, {\"system\",\"user\",\"assistant\"} or {\"messages\":[{\"role\",\"content\"}]}"

static const char *const row_keys[] = {"system", "user", "assistant", "text", "messages"};
enum { ROW_ROLES = 3 }; /* the first of them */

/* Keys of other names are the caller's own, unless one is a slip of a role that is not there, or of any in a row that has none. */
static int check_keys(const text_row *row, const char *path, const moq_json *root)
{
    int slips = COUNT(row_keys);
    for (int i = COUNT(row_keys); i-- > 0;) {
        const moq_json *v = moq_json_find(root, row_keys[i]);
        int list = strcmp(row_keys[i], "messages") == 0;
        if (!v || v->type == MOQ_JSON_NULL) continue;
        if (v->type != (list ? MOQ_JSON_ARRAY : MOQ_JSON_STRING))
            return refuse("%s: line %zu: \"%s\" is no %s", path, row->line, row_keys[i], list ? "list" : "string");
        slips = i >= ROW_ROLES ? 0 : slips > ROW_ROLES ? ROW_ROLES : slips;
    }
    for (const moq_json *e = moq_json_first(root); e; e = moq_json_next(root, e))
        for (int i = 0; e->key && i < slips; i++)
            if (!moq_json_find(root, row_keys[i]) && moq_is_slip(e->key, row_keys[i]))
                return refuse("%s: line %zu: the key \"%.40s\" would be ignored; write \"%s\"", path, row->line, e->key, row_keys[i]);
    return 0;
}

static int parse_message(text_row *row, const char *path, const moq_json *message)
{
    llm_message *m = &row->messages[row->count++];
    m->role = moq_json_string(moq_json_find(message, "role"));
    m->text = moq_json_string(moq_json_find(message, "content"));
    if (!m->role || !m->text)
        return refuse("%s: line %zu: message %zu has no \"%s\" that is a string", path, row->line, row->count, m->role ? "content" : "role");
    for (int i = 0; i < ROW_ROLES; i++)
        if (strcmp(m->role, row_keys[i]) != 0 && moq_is_slip(m->role, row_keys[i]))
            return refuse("%s: line %zu: message %zu has the role \"%.40s\"; write \"%s\"", path, row->line, row->count, m->role, row_keys[i]);
    return 0;
}

/* Data sets come with rows that say the same thing twice, as a text and as messages: one of them counts, which is said once a file. */
static void note_ignored(text_row *row, const char *path, const moq_json *root, const char *used)
{
    const moq_json *list = moq_json_find(root, "messages");
    const char *left = NULL;
    for (int i = 0; i < ROW_ROLES; i++)
        if (moq_json_string(moq_json_find(root, row_keys[i]))) left = row_keys[i];
    if (row->text && list && list->count > 0) left = "messages";
    if (!left || row->noted) return;
    row->noted = 1;
    fprintf(stderr, "moq: note: %s: line %zu has \"%s\" and \"%s\"; of such rows only \"%s\" is read\n", path, row->line, used, left, used);
}

/* {"text"}, {"system","user","assistant"} or {"messages":[{"role","content"}]} */
static int parse_row(text_row *row, const char *path, const moq_json *root)
{
    const moq_json *text = moq_json_find(root, "text"), *list = moq_json_find(root, "messages");
    int bad = check_keys(row, path, root);
    row->text = moq_json_string(text);
    row->bytes = row->text ? text->text_bytes : 0;
    row->count = 0;
    if (!bad && row->text) note_ignored(row, path, root, "text");
    if (bad || row->text) return bad;
    if (list && list->count > MAX_MESSAGES) return refuse("%s: line %zu has more than %d messages", path, row->line, MAX_MESSAGES);
    for (const moq_json *e = moq_json_first(list); e && !bad; e = moq_json_next(list, e)) bad = parse_message(row, path, e);
    if (!bad && row->count > 0) note_ignored(row, path, root, "messages");
    for (int i = 0, listed = row->count > 0; !listed && i < ROW_ROLES; i++) {
        row->messages[row->count].role = row_keys[i];
        row->messages[row->count].text = moq_json_string(moq_json_find(root, row_keys[i]));
        if (row->messages[row->count].text) row->count++;
    }
    if (bad || row->count) return bad;
    return refuse("%s: line %zu has neither \"text\" nor messages; a row is " ROW_SHAPES, path, row->line);
}

/* The parser sees one line: what it calls line 1 of the file is line `line`. */
static int refuse_line(const char *path, size_t line, const moq_error *err)
{
    static const char one[] = "line 1, ", cut[] = "the file is probably incomplete";
    const char *from = err->text, *hint = "; a row is " ROW_SHAPES;
    char text[sizeof err->text];
    size_t n = strlen(err->file), used = 0;
    if (n > 0 && strncmp(from, err->file, n) == 0 && strncmp(from + n, ": ", 2) == 0) from += n + 2;
    while (*from) {
        if (strncmp(from, one, sizeof one - 1) == 0) from += sizeof one - 1;
        else if (strcmp(from, cut) == 0) { hint = "a row is a line, whole"; break; }
        else text[used++] = *from++;
    }
    text[used] = 0;
    return refuse("%s: line %zu%s %s%s", path, line, strncmp(text, "column ", 7) == 0 ? "," : ":", text, hint);
}

/* Calls `take_row` for every line that is not blank until it returns other than 0; NO_MORE_ROWS ends without a complaint. */
static int each_row(const char *path, const char *text, size_t bytes, int (*take_row)(void *user, const text_row *row), void *user)
{
    text_row *row = (text_row *)take(1, sizeof *row);
    moq_error err;
    int bad = 0;
    for (size_t at = 0, next; at < bytes && !bad; at = next) {
        const char *end = (const char *)memchr(text + at, '\n', bytes - at);
        size_t stop = end ? (size_t)(end - text) : bytes;
        moq_json_doc *doc;
        next = stop + 1;
        row->line++;
        if (strspn(text + at, " \t\r") >= stop - at) continue;
        doc = moq_json_parse(text + at, stop - at, MOQ_JSON_STRICT, 0, base_name(path), NULL, &err);
        if (!doc) bad = refuse_line(path, row->line, &err);
        if (!bad) bad = parse_row(row, path, moq_json_root(doc));
        if (!bad) bad = take_row(user, row);
        moq_json_destroy(doc);
    }
    free(row);
    return bad == NO_MORE_ROWS ? 0 : bad;
}

/* ------------------------------------------------------------------------------------------------
   >>inspect         what a folder holds
   ------------------------------------------------------------------------------------------------ */

typedef struct module_row {
    moq_linear l;
    char scheme[64];
    char kernel[400];
    uint64_t elements, bytes, weight_bytes; /* bytes: every tensor of the module; weight_bytes: without the bias */
    int again;                              /* a matrix of another row, as a second layer will use it: no more weights */
} module_row;

/* Does tensor `name` belong to module `l`, and is it its bias? Linear layers own "M.x", stacks "M" and "M_x". */
static int owns_tensor(const moq_linear *l, const char *name, int *is_bias)
{
    size_t n = strlen(l->name);
    const char *rest = name + n;
    if (strncmp(name, l->name, n) != 0) return 0;
    *is_bias = strcmp(rest, ".bias") == 0 || (l->experts > 0 && strcmp(rest, "_bias") == 0);
    return *rest == '.' || (l->experts > 0 && (*rest == '_' || *rest == 0));
}

/* Tensors are sorted by name, so those of a module follow each other. */
static size_t first_tensor_from(const moq_checkpoint *ck, const char *name)
{
    size_t low = 0, high = moq_tensor_count(ck);
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (strcmp(moq_get_tensor(ck, middle)->name, name) < 0) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void measure_module(const moq_checkpoint *ck, module_row *row)
{
    const moq_linear *l = &row->l;
    size_t n = strlen(l->name);
    row->elements = (uint64_t)l->rows * (uint64_t)l->cols * (uint64_t)(l->experts > 0 ? l->experts : 1);
    for (size_t i = first_tensor_from(ck, l->name); i < moq_tensor_count(ck); i++) {
        const moq_tensor *t = moq_get_tensor(ck, i);
        int is_bias;
        if (strncmp(t->name, l->name, n) != 0) break;
        if (!owns_tensor(l, t->name, &is_bias)) continue;
        row->bytes += t->bytes;
        if (!is_bias) row->weight_bytes += t->bytes;
    }
}

static void explain_module(moq_backend *be, module_row *row)
{
    moq_linear one = row->l;
    moq_error err;
    row->kernel[0] = 0;
    if (!be || !be->explain) return;
    if (one.experts > 0 && moq_slice_expert(&row->l, 0, &one, &err) != MOQ_OK) return;
    if (be->supports && be->supports(be, &one, &err) != MOQ_OK) snprintf(row->kernel, sizeof row->kernel, "none: %.180s", err.text);
    else be->explain(be, &one, row->kernel, sizeof row->kernel);
}

/* With --head: the output layer as it would run. A table that serves as embedding and as output layer gets a row of its own for that. */
static int list_head(const options *o, moq_backend *be, module_row *rows, size_t *count)
{
    module_row *head = NULL, *embed = NULL, *row = &rows[*count];
    moq_linear stored;
    moq_error err;
    if (!o->head || strcmp(o->head, "stored") == 0) return 0;
    for (size_t i = 0; i < *count; i++) {
        const char *name = rows[i].l.name;
        if (ends_with(name, "lm_head")) head = &rows[i];
        if (ends_with(name, "embed_tokens") || ends_with(name, ".embeddings") || strcmp(name, "embeddings") == 0) embed = &rows[i];
    }
    if (!head && !embed) return refuse("--head: this folder has neither lm_head nor an embedding");
    if (head) row = head;
    else *row = *embed;
    stored = row->l;
    if (llm_make_head(&stored, o->head, NULL, NULL, &row->l, &err) != MOQ_OK) return refuse_error(o->args[0], &err);
    if (!head) row->l.name = "lm_head";
    row->again = !head;
    *count += !head;
    moq_scheme_name(&row->l.scheme, row->scheme, sizeof row->scheme);
    row->bytes = row->weight_bytes = (uint64_t)row->l.rows * ((uint64_t)row->l.cols + sizeof(float));
    /* the explanation asks only whether codes are there */
    row->l.codes.data = row->l.scales.data = stored.codes.data;
    explain_module(be, row);
    return 0;
}

/* One more row than there are modules: for list_head. */
static int list_modules(const moq_checkpoint *ck, const char *path, moq_backend *be, module_row **out, size_t *count)
{
    size_t n = moq_module_count(ck);
    module_row *rows = (module_row *)take(n + 1, sizeof *rows);
    moq_error err;
    for (size_t i = 0; i < n; i++) {
        if (moq_get_module(ck, i, &rows[i].l, &err) != MOQ_OK) { free(rows); return refuse_error(path, &err); }
        moq_scheme_name(&rows[i].l.scheme, rows[i].scheme, sizeof rows[i].scheme);
        measure_module(ck, &rows[i]);
        explain_module(be, &rows[i]);
    }
    *out = rows;
    *count = n;
    return 0;
}

/* An integer of config.json, there or in the text part of a larger model. */
static int64_t config_int(const moq_checkpoint *ck, const char *key, int64_t otherwise)
{
    const moq_json *root = moq_get_config(ck);
    int64_t v = otherwise;
    if (!moq_json_int(moq_json_find(root, key), &v)) moq_json_int(moq_json_find(moq_json_find(root, "text_config"), key), &v);
    return v;
}

/* Bytes of the KV cache for `context` tokens: one cache for every module that makes keys, in the format named by --kv or stored.
   Windows are not counted off. */
static uint64_t plan_kv(const moq_checkpoint *ck, moq_backend *be, const module_row *rows, size_t count, int64_t context, const char *kv)
{
    static const char *const makers[] = {".k_proj", ".qkv_proj", ".kv_b_proj"};
    int64_t heads = config_int(ck, "num_attention_heads", 1), rope = config_int(ck, "qk_rope_head_dim", 0);
    uint64_t total = 0;
    for (size_t i = 0; i < count; i++)
        for (int k = 0; k < COUNT(makers); k++) {
            moq_kv_desc d;
            moq_error err;
            char attention[512];
            size_t length = strlen(rows[i].l.name);
            if (!ends_with(rows[i].l.name, makers[k]) || length >= sizeof attention) continue;
            snprintf(attention, sizeof attention, "%.*s", (int)(length - strlen(makers[k])), rows[i].l.name);
            memset(&d, 0, sizeof d);
            d.name = attention;
            d.slots = 1;
            d.capacity = (int32_t)context;
            d.kv_heads = (int32_t)config_int(ck, "num_key_value_heads", heads);
            d.head_dim = (int32_t)config_int(ck, "head_dim", config_int(ck, "hidden_size", 0) / (heads ? heads : 1));
            if (rope) {
                d.head_dim = (int32_t)(rope + config_int(ck, "qk_nope_head_dim", 0));
                d.value_dim = (int32_t)config_int(ck, "v_head_dim", 0);
            }
            if (moq_find_kv(ck, attention, &d.kv, &err) != MOQ_OK) continue;
            if (kv) moq_kv_format_find(kv, &d.kv.format);
            if (be && be->kv_bytes) total += be->kv_bytes(be, &d);
        }
    return total;
}

static void print_bytes(const char *label, uint64_t bytes)
{
    if (bytes < 1000000) printf("%s%.1f KB", label, (double)bytes / 1e3);
    else if (bytes < 1000000000) printf("%s%.1f MB", label, (double)bytes / 1e6);
    else printf("%s%.2f GB", label, (double)bytes / 1e9);
}

static void shape_text(const moq_linear *l, char *text, size_t capacity)
{
    if (l->experts > 0) snprintf(text, capacity, "%dx%" PRId64 "x%" PRId64, l->experts, l->rows, l->cols);
    else snprintf(text, capacity, "%" PRId64 "x%" PRId64, l->rows, l->cols);
}

static void json_shape(json_out *j, const moq_linear *l)
{
    json_open(j, "shape", '[');
    if (l->experts > 0) json_int(j, NULL, l->experts);
    json_int(j, NULL, l->rows);
    json_int(j, NULL, l->cols);
    json_close(j, ']');
}

static double bits_per(uint64_t bytes, uint64_t elements) { return elements ? 8.0 * (double)bytes / (double)elements : 0; }

/* memory: what examples/llm.h will take; planned 0: it does not know this architecture, then kv_bytes is all that is known. */
typedef struct totals {
    uint64_t elements, bytes, quantized, quantized_bytes, kv_bytes;
    moq_error refusal; /* why the engine cannot run it, where nothing is planned */
    int64_t context;
    int planned;
    llm_memory memory;
} totals;

static void inspect_json(const moq_checkpoint *ck, const module_row *rows, size_t count, const totals *t)
{
    const moq_info *info = moq_get_info(ck);
    json_out j = json_to(stdout, 2);
    json_open(&j, NULL, '{');
    json_string(&j, "model_type", info->model_type);
    json_string(&j, "quant_algo", info->quant_algo);
    json_string(&j, "kv_cache", moq_kv_format_name(info->kv));
    json_string(&j, "family", info->family_name);
    json_string(&j, "producer", info->producer);
    json_number(&j, "effective_bits", bits_per(t->bytes, t->elements));
    json_number(&j, "quantized_bits", bits_per(t->quantized_bytes, t->quantized));
    json_int(&j, "total_bytes", (int64_t)info->total_bytes);
    json_int(&j, "context", t->context);
    json_int(&j, "kv_bytes", (int64_t)t->kv_bytes);
    if (t->planned) {
        json_open(&j, "memory", '{');
        json_int(&j, "mapped_bytes", (int64_t)t->memory.mapped_bytes);
        json_int(&j, "weight_bytes", (int64_t)t->memory.weight_bytes);
        json_int(&j, "cache_bytes", (int64_t)t->memory.cache_bytes);
        json_int(&j, "run_bytes", (int64_t)t->memory.run_bytes);
        json_int(&j, "tokenizer_bytes", (int64_t)t->memory.tokenizer_bytes);
        json_int(&j, "total_bytes", (int64_t)t->memory.total_bytes);
        json_close(&j, '}');
    }
    json_open(&j, "modules", '[');
    for (size_t i = 0; i < count; i++) {
        json_open(&j, NULL, '{');
        json_string(&j, "name", rows[i].l.name);
        json_string(&j, "scheme", rows[i].scheme);
        json_shape(&j, &rows[i].l);
        json_number(&j, "bits", bits_per(rows[i].weight_bytes, rows[i].elements));
        json_int(&j, "bytes", (int64_t)rows[i].bytes);
        json_item(&j, "kernel");
        json_text(&j, rows[i].kernel, strcspn(rows[i].kernel, ":"));
        json_string(&j, "why", rows[i].kernel);
        json_close(&j, '}');
    }
    json_close(&j, ']');
    json_close(&j, '}');
}

/* Rows that say the same but for a number in the module's name, such as that of the layer. */
typedef struct row_group {
    char name[512];        /* with ranges in the place of numbers: layers.0-29.mlp.up_proj */
    const module_row *row; /* the first of them */
    size_t count;
    size_t cut, tail; /* while they are made: the number is name[cut .. tail); equal: there is none */
    long number;
} row_group;

static int compare_rows(const module_row *a, const module_row *b)
{
    int c = strcmp(a->scheme, b->scheme);
    if (!c) c = strcmp(a->kernel, b->kernel);
    if (!c) c = (a->bytes > b->bytes) - (a->bytes < b->bytes);
    if (!c) c = (a->l.experts > b->l.experts) - (a->l.experts < b->l.experts);
    if (!c) c = (a->l.rows > b->l.rows) - (a->l.rows < b->l.rows);
    return c ? c : (a->l.cols > b->l.cols) - (a->l.cols < b->l.cols);
}

/* By all but the number. 0: they become one. */
static int compare_groups(const row_group *a, const row_group *b)
{
    int c = (a->cut > b->cut) - (a->cut < b->cut);
    if (!c) c = memcmp(a->name, b->name, a->cut);
    if (!c) c = strcmp(a->name + a->tail, b->name + b->tail);
    return c ? c : compare_rows(a->row, b->row);
}

static int order_groups(const void *a, const void *b)
{
    const row_group *x = (const row_group *)a, *y = (const row_group *)b;
    int c = compare_groups(x, y);
    return c ? c : (x->number > y->number) - (x->number < y->number);
}

static int order_found(const void *a, const void *b)
{
    const row_group *x = (const row_group *)a, *y = (const row_group *)b;
    return (x->row > y->row) - (x->row < y->row);
}

/* Finds the part `k` of a name, between dots, if it is a number. */
static void find_number(row_group *g, int k)
{
    const char *at = g->name;
    for (; k > 0 && at; k--) at = strchr(at, '.') ? strchr(at, '.') + 1 : NULL;
    size_t digits = at ? strspn(at, "0123456789") : 0;
    int whole = digits > 0 && digits < 10 && (at[digits] == '.' || at[digits] == 0);
    g->cut = whole ? (size_t)(at - g->name) : strlen(g->name);
    g->tail = g->cut + (whole ? digits : 0);
    g->number = whole ? strtol(at, NULL, 10) : 0;
}

/* "0-2,5" in place of the number of the first of n groups, which differ in nothing else. */
static void join_groups(row_group *to, const row_group *g, size_t n)
{
    row_group all = g[0];
    size_t used = g->cut;
    for (size_t i = 1; i < n; i++) {
        all.count += g[i].count;
        if (g[i].row < all.row) all.row = g[i].row;
    }
    for (size_t i = 0, end; i < n; i = end) {
        for (end = i + 1; end < n && g[end].number == g[end - 1].number + 1; end++) {}
        used += (size_t)snprintf(all.name + used, sizeof all.name - used, end - i > 1 ? "%s%ld-%ld" : "%s%ld", i ? "," : "", g[i].number, g[end - 1].number);
        if (used >= sizeof all.name) used = sizeof all.name - 1;
    }
    snprintf(all.name + used, sizeof all.name - used, "%s", g->name + g->tail);
    *to = all;
}

/* The rows as they are, or grouped: first over the last numbers of the names (experts), then over those before (layers). */
static row_group *group_rows(const module_row *rows, size_t count, int grouped, size_t *listed)
{
    row_group *g = (row_group *)take(count, sizeof *g);
    for (size_t i = 0; i < count; i++) {
        snprintf(g[i].name, sizeof g[i].name, "%s", rows[i].l.name);
        g[i].row = &rows[i];
        g[i].count = 1;
    }
    for (int k = 15; grouped && k >= 0; k--) {
        size_t n = 0;
        for (size_t i = 0; i < count; i++) find_number(&g[i], k);
        qsort(g, count, sizeof *g, order_groups);
        for (size_t i = 0, end; i < count; i = end, n++) {
            for (end = i + 1; end < count && g[i].tail > g[i].cut && compare_groups(&g[i], &g[end]) == 0; end++) {}
            if (end - i > 1) join_groups(&g[n], &g[i], end - i);
            else if (n != i) g[n] = g[i];
        }
        count = n;
    }
    qsort(g, count, sizeof *g, order_found);
    *listed = count;
    return g;
}

static void print_row(const row_group *g, int wide, int scheme, int explain)
{
    const module_row *row = g->row;
    char shape[64];
    shape_text(&row->l, shape, sizeof shape);
    printf("%-*s  %-*s  %14s  %6.3f  %12" PRIu64, wide, g->name, scheme, row->scheme, shape, bits_per(row->weight_bytes, row->elements), row->bytes * g->count);
    if (explain) printf("  %7zu  %s", g->count, row->kernel);
    printf("\n");
}

static void inspect_text(const moq_checkpoint *ck, const module_row *rows, size_t count, const totals *t, int explain)
{
    const moq_info *info = moq_get_info(ck);
    int wide = 6, scheme = 6;
    row_group *list;
    size_t listed;
    size_t modules = 0;
    printf("%s: %s, %s%s%s%s%s, KV cache %s\n", moq_get_name(ck), info->model_type[0] ? info->model_type : "no model_type",
           info->family != MOQ_FAMILY_NONE ? info->family_name : t->quantized ? "quantized without a description" : "not quantized",
           info->quant_algo[0] ? " " : "", info->quant_algo, info->producer[0] ? " by " : "", info->producer, moq_kv_format_name(info->kv));
    list = group_rows(rows, count, explain, &listed);
    for (size_t i = 0; i < count; i++) modules += !rows[i].again;
    for (size_t i = 0; i < listed; i++) {
        if ((int)strlen(list[i].name) > wide) wide = (int)strlen(list[i].name);
        if ((int)strlen(list[i].row->scheme) > scheme) scheme = (int)strlen(list[i].row->scheme);
    }
    printf("%-*s  %-*s  %14s  %6s  %12s%s\n", wide, "module", scheme, "scheme", "shape", "bits", "bytes", explain ? "  modules  kernel" : "");
    for (size_t i = 0; i < listed; i++) print_row(&list[i], wide, scheme, explain);
    free(list);
    printf("%zu modules, %zu tensors in %u file%s", modules, moq_tensor_count(ck), info->shards, info->shards == 1 ? "" : "s");
    print_bytes(", ", info->total_bytes);
    printf("\neffective bits: %.3f over all %.3g M weights", bits_per(t->bytes, t->elements), (double)t->elements / 1e6);
    if (t->quantized) printf(", %.3f over the %.3g M quantized ones", bits_per(t->quantized_bytes, t->quantized), (double)t->quantized / 1e6);
    printf("\nmemory for a context of %" PRId64 " tokens:", t->context);
    print_bytes(" weights ", info->total_bytes);
    print_bytes(", KV cache ", t->kv_bytes);
    if (t->planned) print_bytes(", repacked or copied weights ", t->memory.weight_bytes);
    if (t->planned) print_bytes(", run state ", t->memory.run_bytes);
    if (t->planned) print_bytes(", tokenizer ", t->memory.tokenizer_bytes);
    print_bytes(", together ", t->planned ? t->memory.total_bytes : info->total_bytes + t->kv_bytes);
    printf("\n");
    if (!t->planned) {
        printf("`moq run` cannot: ");
        print_text(stdout, t->refusal.text);
    }
}

static int bench_encode(const options *o); /* moq_quantize.h */
static int draw_picture(const options *o, const moq_checkpoint *ck, const module_row *rows, size_t count); /* moq_picture.h */

/* llm_plan's figures, with the tokenizer where the folder has one. */
static int plan_memory(const options *o, const moq_checkpoint *ck, moq_backend *be, totals *t)
{
    llm_desc d;
    memset(&d, 0, sizeof d);
    d.checkpoint = ck;
    d.context = (int32_t)t->context;
    d.kv = o->kv;
    d.head = o->head;
    d.weights = o->weights;
    d.chunk = (int32_t)o->chunk;
    if (choose_backend(o, strcmp(be->name, "cpu") == 0 ? NULL : be, &d)) return 0; /* as open_engine does it, so that both say the same */
    d.log = on_log;
    d.log_user = (void *)(uintptr_t)o->args[0];
    t->planned = llm_plan(&d, &t->memory, &t->refusal) == MOQ_OK;
    d.no_tokenizer = 1;
    d.log = NULL; /* it was told */
    if (!t->planned) t->planned = llm_plan(&d, &t->memory, &t->refusal) == MOQ_OK;
    if (t->planned) t->kv_bytes = t->memory.cache_bytes;
    return t->planned;
}

static int verb_inspect(const options *o)
{
    moq_error err;
    moq_backend *be = NULL;
    module_row *rows = NULL;
    size_t count = 0;
    totals t;
    moq_checkpoint *ck = open_folder(o->args[0], 0, NULL, 0, &err);
    int bad = ck ? open_backend(o, o->kernel, &be) : refuse_error(o->args[0], &err);
    if (!bad && o->against && !o->png) bad = refuse("--against goes with --png FILE; moq diff compares numbers");
    if (!bad) bad = list_modules(ck, o->args[0], be, &rows, &count);
    if (!bad) bad = list_head(o, be, rows, &count);
    if (!bad) {
        memset(&t, 0, sizeof t);
        for (size_t i = 0; i < count; i++) {
            int quantized = moq_scheme_is_quantized(&rows[i].l.scheme);
            if (rows[i].again) continue;
            t.elements += rows[i].elements;
            t.bytes += rows[i].weight_bytes;
            if (quantized) t.quantized += rows[i].elements;
            if (quantized) t.quantized_bytes += rows[i].weight_bytes;
        }
        t.context = o->context ? o->context : config_int(ck, "max_position_embeddings", 4096);
        if (!o->context && t.context > 4096) t.context = 4096;
        if (!plan_memory(o, ck, be, &t)) t.kv_bytes = plan_kv(ck, be, rows, count, t.context, o->kv);
        if (o->png) bad = draw_picture(o, ck, rows, count);
        if (!bad && o->json) inspect_json(ck, rows, count, &t);
        else if (!bad) inspect_text(ck, rows, count, &t, o->explain);
    }
    free(rows);
    moq_backend_destroy(be);
    moq_close(ck);
    return bad;
}

/* ------------------------------------------------------------------------------------------------
   >>verify          every rule, every finding
   Fatal findings are the result (stdout); what is only worth knowing goes to stderr.
   ------------------------------------------------------------------------------------------------ */

typedef struct verdict {
    const char *path;
    json_out *json; /* NULL: text */
    int fatal;
} verdict;

static void report_finding(void *user, int fatal, const moq_error *f)
{
    verdict *v = (verdict *)user;
    v->fatal |= fatal;
    if (!v->json) { print_placed(fatal ? stdout : stderr, fatal ? "" : "moq: note: ", v->path, f->text); return; }
    json_open(v->json, NULL, '{');
    json_bool(v->json, "fatal", fatal);
    json_string(v->json, "code", moq_result_name(f->code));
    json_string(v->json, "file", f->file);
    json_string(v->json, "object", f->object);
    json_int(v->json, "offset", f->offset);
    json_string(v->json, "text", f->text);
    json_close(v->json, '}');
}

/* What the engine would log. */
static void verify_log(void *user, moq_log_level level, moq_result code, const char *text)
{
    moq_error f;
    memset(&f, 0, sizeof f);
    f.offset = -1;
    f.code = code;
    snprintf(f.text, sizeof f.text, "%s", text);
    if (level == MOQ_LOG_WARNING) report_finding(user, 0, &f);
}

/* A long list in a sentence, from `open` to `close`, gives way to where it can be read. */
static void fold_list(moq_error *f, const char *open, const char *close, const char *instead)
{
    char *at = strstr(f->text, open), *end = at ? strstr(at + strlen(open), close) : NULL;
    moq_error whole = *f;
    if (!end || end - at < 60) return;
    snprintf(at, sizeof f->text - (size_t)(at - f->text), "%s%s%s", open, instead, whole.text + (end - f->text));
}

/* A sound folder that `moq run` refuses all the same. */
static void report_idle(verdict *v, const char *what, const moq_error *err)
{
    moq_error f = *err;
    fold_list(&f, "; known: ", ". ", "what `moq run` lists");
    fold_list(&f, "known ones (", ")", "`moq run` lists them");
    size_t n = strlen(f.text);
    if (n < sizeof f.text) snprintf(f.text + n, sizeof f.text - n, " (the checkpoint is whole, but `moq run` %s)", what);
    report_finding(v, 0, &f);
}

/* A damaged tokenizer, or one of another model, is a finding like any other; none, or a kind that is not known here, is not. */
static void report_tokenizer(verdict *v, const moq_error *err)
{
    static const moq_result wrong[] = {MOQ_E_JSON, MOQ_E_UTF8, MOQ_E_TRUNCATED, MOQ_E_DUPLICATE, MOQ_E_MISMATCH};
    for (int i = 0; i < COUNT(wrong); i++)
        if (err->code == wrong[i]) { report_finding(v, 1, err); return; }
    report_idle(v, "cannot read and write text with it", err);
}

/* A folder without a chat template may be meant for other uses than chats: that is said, too. */
static void verify_frame(const moq_checkpoint *ck, verdict *v, moq_error *memory)
{
    static const llm_message hello = {"user", "hello"};
    moq_error err;
    llm_tokenizer *t = llm_tokenizer_open(ck, &err);
    int bad = !t || llm_frame(t, &hello, 1, 1, NULL, 0, &err) == SIZE_MAX;
    if (bad && err.code == MOQ_E_NOMEM) *memory = err;
    else if (bad && t) report_idle(v, "cannot chat with it", &err);
    llm_tokenizer_close(t);
}

/* Tensors may keep every rule and still be another model's than config.json describes. A kind of model that llm.h does not run is sound all the same.
   memory: set where there is too little of it to tell. */
static void verify_model(const moq_checkpoint *ck, verdict *v, moq_error *memory)
{
    llm_desc d;
    llm_memory p;
    moq_error err, text;
    memset(&d, 0, sizeof d);
    d.checkpoint = ck;
    d.log = verify_log;
    d.log_user = v;
    if (!moq_get_config(ck)) return;
    if (llm_plan(&d, &p, &text) == MOQ_OK) { verify_frame(ck, v, memory); return; }
    d.no_tokenizer = 1;
    d.log = NULL; /* it was told */
    if (text.code == MOQ_E_NOMEM) *memory = text;
    else if (llm_plan(&d, &p, &err) == MOQ_OK) report_tokenizer(v, &text);
    else if (err.code == MOQ_E_NOMEM) *memory = err;
    else if (err.code == MOQ_E_UNSUPPORTED) report_idle(v, "does not run it", &err);
    else report_finding(v, 1, &err);
}

/* What opening says before it refuses may name the reason: a key that is misspelled. */
static void verify_again(const char *path, verdict *v)
{
    moq_open_desc d;
    memset(&d, 0, sizeof d);
    d.log = verify_log;
    d.log_user = v;
    moq_close(moq_open(path, &d, NULL));
}

/* A refusal to open is a finding, unless the machine and not the file is to blame: E_IO comes with the system's number, or from a look at the folder. */
static int verify_path(const options *o, verdict *v)
{
    struct stat info;
    moq_error err;
    const char *path = o->args[0];
    int bad = 0, folder;
    if (stat(path, &info) != 0) return refuse("%s: %s; name a checkpoint folder or a .safetensors file", path, strerror(errno));
    memset(&err, 0, sizeof err);
    folder = S_ISDIR(info.st_mode);
    if (!folder && !S_ISREG(info.st_mode)) return refuse("%s: is a device or a pipe; name a checkpoint folder or a .safetensors file", path);
    if (folder) {
        moq_checkpoint *ck = open_folder(path, 1, NULL, 0, &err);
        if (ck) moq_verify(ck, o->deep ? (uint32_t)MOQ_VERIFY_DEEP : 0, report_finding, v, &err);
        else bad = 1;
        if (ck && !v->fatal && err.code == MOQ_OK) verify_model(ck, v, &err);
        moq_close(ck);
    } else {
        moq_st *st = moq_st_open(path, NULL, &err);
        bad = st == NULL;
        moq_st_close(st);
    }
    if (err.code == MOQ_E_NOMEM || (err.code == MOQ_E_IO && err.os_code) || err.code == MOQ_E_CANCELLED) return refuse_error(path, &err);
    if (bad && folder) verify_again(path, v);
    if (bad) report_finding(v, 1, &err);
    return v->fatal;
}

static int verb_verify(const options *o)
{
    json_out j = json_to(stdout, 2);
    verdict v;
    int status;
    v.path = o->args[0];
    v.json = o->json ? &j : NULL;
    v.fatal = 0;
    if (o->json) {
        struct stat info;
        if (stat(v.path, &info) != 0 || !(S_ISDIR(info.st_mode) || S_ISREG(info.st_mode))) return verify_path(o, &v);
        json_open(&j, NULL, '{');
        json_open(&j, "findings", '[');
    }
    status = verify_path(o, &v);
    if (o->json) {
        json_close(&j, ']');
        json_bool(&j, "sound", status == 0);
        json_close(&j, '}');
    }
    return status;
}

/* ------------------------------------------------------------------------------------------------
   >>plain           the plain matrix that a quantized layer stands for
   y = x W'^T in real arithmetic, where the layer computes hadamard(x) * pre_quant_scale first and adds a low-rank branch.
   ------------------------------------------------------------------------------------------------ */

static float view_float(const moq_view *v, int64_t index)
{
    size_t bytes = (size_t)moq_dtype_bits(v->dtype) / 8;
    float f = 0;
    moq_to_f32(v->dtype, (const char *)v->data + (size_t)index * bytes, 1, &f);
    return f;
}

static int is_folded(const moq_linear *l) { return l->pre_quant_scale.data || l->lora_a.data || l->hadamard_size > 0; }

/* H[i][j] of the input transform: Sylvester's matrix has the sign of the parity of i & j. */
static double hadamard_at(const moq_linear *l, int i, int j)
{
    unsigned bits = (unsigned)i & (unsigned)j, odd = 0;
    if (l->hadamard.data) return (double)view_float(&l->hadamard, (int64_t)i * l->hadamard_size + j);
    for (; bits; bits &= bits - 1) odd ^= 1;
    return odd ? -1.0 : 1.0;
}

/* One row of W' = ((W + B A) diag(p)) H^T, all in double. row: [cols] dequantized, in and out. */
static void fold_row(const moq_linear *l, int64_t r, double *row, double *scratch)
{
    int64_t stored_row = l->row_first + r * l->row_step;
    if (l->lora_a.data) {
        int64_t rank = l->scheme.lora_rank, stored_cols = (int64_t)l->lora_a.count / rank;
        for (int64_t k = 0; k < rank; k++) {
            double b = (double)view_float(&l->lora_b, stored_row * rank + k);
            for (int64_t c = 0; c < l->cols; c++) row[c] += b * (double)view_float(&l->lora_a, k * stored_cols + l->col_first + c);
        }
    }
    if (l->pre_quant_scale.data)
        for (int64_t c = 0; c < l->cols; c++) row[c] *= (double)view_float(&l->pre_quant_scale, l->col_first + c);
    if (l->hadamard_size > 0) {
        int n = l->hadamard_size;
        for (int64_t block = 0; block + n <= l->cols; block += n) {
            for (int i = 0; i < n; i++) {
                scratch[i] = 0;
                for (int k = 0; k < n; k++) scratch[i] += row[block + k] * hadamard_at(l, i, k);
            }
            for (int i = 0; i < n; i++) row[block + i] = scratch[i] * (double)l->hadamard_scale;
        }
    }
}

/* Rows [first, first + count) of W' in double. out: [count, cols], scratch: [cols] doubles and floats. */
static void plain_rows(const moq_linear *l, int64_t first, int64_t count, double *out, double *scratch, float *decoded)
{
    for (int64_t r = first; r < first + count; r++, out += l->cols) {
        moq_dequantize(l, r, 1, decoded);
        for (int64_t c = 0; c < l->cols; c++) out[c] = (double)decoded[c];
        if (is_folded(l)) fold_row(l, r, out, scratch);
    }
}

/* The float of a double with the lost bits kept as one sticky bit (round to odd): rounding that again, to fewer bits, is rounding once. */
static float sticky_float(double d)
{
    float f = (float)d;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (d - d == 0 && (double)f != d) {
        if (fabs((double)f) > fabs(d)) bits--;
        bits |= 1;
        memcpy(&f, &bits, 4);
    }
    return f;
}

/* ------------------------------------------------------------------------------------------------
   >>dequant         hashes of quantized weights; unquantized folders
   ------------------------------------------------------------------------------------------------ */

#define FNV_START 0xcbf29ce484222325u

/* FNV-1a-64 over the little-endian bytes of floats. */
static uint64_t fnv_floats(uint64_t h, const float *x, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], 4);
        for (int b = 0; b < 32; b += 8) h = (h ^ (bits >> b & 255)) * 0x100000001b3u;
    }
    return h;
}

typedef struct hash_line { char *name; int64_t shape[3]; int rank; uint64_t hash; } hash_line;

static int compare_lines(const void *a, const void *b) { return strcmp(((const hash_line *)a)->name, ((const hash_line *)b)->name); }

static hash_line make_line(char *name, int64_t experts, const moq_linear *l, uint64_t hash)
{
    hash_line line;
    line.name = name;
    line.rank = experts > 0 ? 3 : 2;
    line.shape[0] = experts > 0 ? experts : l->rows;
    line.shape[1] = experts > 0 ? l->rows : l->cols;
    line.shape[2] = l->cols;
    line.hash = hash;
    return line;
}

/* Hash of one matrix, which also runs on in *whole, the hash of the stack it is part of. */
static uint64_t hash_matrix(const moq_linear *l, uint64_t *whole)
{
    float *row = (float *)take((size_t)l->cols, sizeof *row);
    uint64_t h = FNV_START;
    for (int64_t r = 0; r < l->rows && !stop_requested; r++) {
        moq_dequantize(l, r, 1, row);
        h = fnv_floats(h, row, (size_t)l->cols);
        if (whole) *whole = fnv_floats(*whole, row, (size_t)l->cols);
    }
    free(row);
    return h;
}

/* The name of a module's weights in an unquantized folder: linears are NAME.weight, stacks keep the name of their tensor. */
static char *weight_name(const moq_linear *l)
{
    size_t n = strlen(l->tensor), tail = strlen(".weight");
    int named = n > tail && strcmp(l->tensor + n - tail, ".weight") == 0;
    return join(l->name, l->experts == 0 || named ? ".weight" : "", "");
}

/* The lines of one module: linears as NAME.weight, stacks as NAME and NAME[e]. Returns how many, -1 on an error. */
static int hash_module(const moq_linear *l, hash_line *lines, const char *path)
{
    uint64_t whole = FNV_START;
    moq_linear one;
    moq_error err;
    char index[24], *name;
    if (l->experts == 0) {
        lines[0] = make_line(weight_name(l), 0, l, hash_matrix(l, NULL));
        return 1;
    }
    for (int e = 0; e < l->experts; e++) {
        if (moq_slice_expert(l, e, &one, &err) != MOQ_OK) { refuse_error(path, &err); return -1; }
        snprintf(index, sizeof index, "[%d]", e);
        name = weight_name(l);
        lines[e + 1] = make_line(join(name, index, ""), 0, l, hash_matrix(&one, &whole));
        free(name);
    }
    lines[0] = make_line(weight_name(l), l->experts, l, whole);
    return l->experts + 1;
}

static void print_hashes(const hash_line *lines, size_t count, int json)
{
    json_out j = json_to(stdout, 2);
    char hex[20];
    if (json) json_open(&j, NULL, '{');
    if (json) json_open(&j, "tensors", '{');
    for (size_t i = 0; i < count; i++) {
        snprintf(hex, sizeof hex, "%016" PRIx64, lines[i].hash);
        if (json) {
            json_open(&j, lines[i].name, '{');
            json_open(&j, "shape", '[');
            for (int k = 0; k < lines[i].rank; k++) json_int(&j, NULL, lines[i].shape[k]);
            json_close(&j, ']');
            json_string(&j, "fnv1a64", hex);
            json_close(&j, '}');
        } else {
            printf("%s\t%" PRId64 "x%" PRId64, lines[i].name, lines[i].shape[0], lines[i].shape[1]);
            if (lines[i].rank == 3) printf("x%" PRId64, lines[i].shape[2]);
            printf("\t%s\n", hex);
        }
    }
    if (json) json_close(&j, '}');
    if (json) json_close(&j, '}');
}

static int dequant_hash(const options *o, const moq_checkpoint *ck)
{
    hash_line *lines = NULL;
    size_t count = 0, modules = moq_module_count(ck);
    moq_linear l;
    moq_error err;
    int bad = 0, more;
    for (size_t i = 0; i < modules && !bad; i++) {
        if (progress_bar("hashing", i, modules, 0)) bad = refuse("stopped");
        else if (moq_get_module(ck, i, &l, &err) != MOQ_OK) bad = refuse_error(o->args[0], &err);
        if (bad || !moq_scheme_is_quantized(&l.scheme)) continue;
        lines = (hash_line *)grow(lines, count + (size_t)l.experts + 1, sizeof *lines);
        more = hash_module(&l, lines + count, o->args[0]);
        if (more < 0) bad = 2;
        else count += (size_t)more;
    }
    if (!bad) progress_bar("hashing", modules, modules, 0);
    if (!bad && stop_requested) bad = refuse("stopped");
    if (count) qsort(lines, count, sizeof *lines, compare_lines);
    if (!bad) print_hashes(lines, count, o->json);
    if (!bad && !count) fprintf(stderr, "moq: note: %s holds no quantized weight\n", o->args[0]);
    for (size_t i = 0; i < count; i++) free(lines[i].name);
    free(lines);
    return bad;
}

/* One tensor of the folder to be written: copied (module NULL), or the plain weight of a module. */
typedef struct out_tensor {
    moq_tensor t;
    const moq_linear *module;
    int shard;
} out_tensor;

typedef struct out_folder {
    const moq_checkpoint *ck;
    moq_linear *modules;       /* every quantized module, sorted by name */
    size_t module_count;
    out_tensor *tensors;
    size_t count;
    int shards, folded;
    moq_dtype dtype;
    char *temp;
    const char *source, *target;
} out_folder;

#define SHARD_BYTES ((uint64_t)2 << 30) /* bytes of new weights that are held at a time */

static const moq_linear *quantized_named(const out_folder *f, const char *name, size_t length)
{
    size_t low = 0, high = f->module_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        int c = strncmp(f->modules[middle].name, name, length);
        if (c == 0) c = f->modules[middle].name[length] != 0;
        if (c == 0) return &f->modules[middle];
        if (c < 0) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

/* The quantized module that a tensor is part of, unless it is the module's bias, which stays. */
static const moq_linear *owner_of(const out_folder *f, const char *name)
{
    int is_bias;
    for (size_t n = strlen(name); n > 0; n--) {
        const moq_linear *l = name[n] == '.' || name[n] == '_' || name[n] == 0 ? quantized_named(f, name, n) : NULL;
        if (l && owns_tensor(l, name, &is_bias)) return is_bias ? NULL : l;
    }
    return NULL;
}

static int is_kv_companion(const char *name)
{
    static const char *const ends[] = {".k_scale", ".v_scale", ".k_bias", ".v_bias"};
    for (int i = 0; i < COUNT(ends); i++)
        if (ends_with(name, ends[i])) return 1;
    return 0;
}

/* gpt-oss and Llama 4 hold expert stacks as [experts, in, out], everyone else as [experts, out, in]. */
static int stacks_are_transposed(const moq_checkpoint *ck)
{
    const char *type = moq_get_info(ck)->model_type;
    return strncmp(type, "gpt_oss", 7) == 0 || strncmp(type, "llama4", 6) == 0;
}

static void plan_weight(out_folder *f, const moq_linear *l)
{
    out_tensor *t = &f->tensors[f->count++];
    int swap = l->experts > 0 && stacks_are_transposed(f->ck), k = 0;
    t->module = l;
    t->t.name = weight_name(l);
    t->t.dtype = f->dtype;
    if (l->experts > 0) t->t.shape[k++] = (uint64_t)l->experts;
    t->t.shape[k++] = (uint64_t)(swap ? l->cols : l->rows);
    t->t.shape[k++] = (uint64_t)(swap ? l->rows : l->cols);
    t->t.rank = (uint32_t)k;
    t->t.bytes = (uint64_t)moq_dtype_bits(f->dtype) / 8 * (uint64_t)l->rows * (uint64_t)l->cols * (uint64_t)(l->experts > 0 ? l->experts : 1);
    f->folded += is_folded(l);
}

static int compare_tensors(const void *a, const void *b) { return strcmp(((const out_tensor *)a)->t.name, ((const out_tensor *)b)->t.name); }

/* What the new folder will hold, and in which file. */
static int plan_folder(out_folder *f)
{
    size_t modules = moq_module_count(f->ck), tensors = moq_tensor_count(f->ck);
    uint64_t held = 0;
    moq_error err;
    f->modules = (moq_linear *)take(modules, sizeof *f->modules);
    f->tensors = (out_tensor *)take(modules + tensors, sizeof *f->tensors);
    for (size_t i = 0; i < modules; i++) {
        moq_linear *l = &f->modules[f->module_count];
        if (moq_get_module(f->ck, i, l, &err) != MOQ_OK) return refuse_error(f->source, &err);
        f->module_count += (size_t)moq_scheme_is_quantized(&l->scheme);
    }
    for (size_t i = 0; i < tensors; i++) {
        const moq_tensor *t = moq_get_tensor(f->ck, i);
        if (owner_of(f, t->name) || (moq_get_info(f->ck)->kv != MOQ_KV_WIDE && is_kv_companion(t->name))) continue;
        f->tensors[f->count++].t = *t;
    }
    for (size_t i = 0; i < f->module_count; i++) plan_weight(f, &f->modules[i]);
    qsort(f->tensors, f->count, sizeof *f->tensors, compare_tensors);
    for (size_t i = 0; i < f->count; i++) {
        if (held > 0 && held + f->tensors[i].t.bytes > SHARD_BYTES) { f->shards++; held = 0; }
        held += f->tensors[i].t.bytes;
        f->tensors[i].shard = f->shards;
    }
    f->shards++;
    return 0;
}

static void store_value(void *data, moq_dtype dtype, int64_t index, double value)
{
    float f = (float)value;
    uint16_t h;
    if (dtype == MOQ_F32) { memcpy((char *)data + index * 4, &f, 4); return; }
    h = moq_bf16_encode(sticky_float(value));
    memcpy((char *)data + index * 2, &h, 2);
}

/* The plain weight of a module as it will lie in the file. Release with free. */
static void *make_weight(const out_folder *f, const out_tensor *t)
{
    const moq_linear *l = t->module;
    int64_t experts = l->experts > 0 ? l->experts : 1, matrix = l->rows * l->cols;
    double *row = (double *)take((size_t)l->cols * 2 + (size_t)l->hadamard_size, sizeof *row);
    float *decoded = (float *)take((size_t)l->cols, sizeof *decoded);
    char *data = (char *)take((size_t)t->t.bytes, 1);
    int swap = l->experts > 0 && stacks_are_transposed(f->ck);
    for (int64_t e = 0; e < experts && !stop_requested; e++) {
        moq_linear one = *l;
        moq_error err;
        if (l->experts > 0 && moq_slice_expert(l, (int32_t)e, &one, &err) != MOQ_OK) {
            refuse_error(f->source, &err);
            drop_unfinished();
            exit(2);
        }
        for (int64_t r = 0; r < l->rows; r++) {
            plain_rows(&one, r, 1, row, row + l->cols, decoded);
            for (int64_t c = 0; c < l->cols; c++) store_value(data, f->dtype, e * matrix + (swap ? c * l->rows + r : r * l->cols + c), row[c]);
        }
    }
    free(row);
    free(decoded);
    return data;
}

static void shard_name(const out_folder *f, int shard, char *name, size_t capacity)
{
    if (f->shards == 1) snprintf(name, capacity, "model.safetensors");
    else snprintf(name, capacity, "model-%05d-of-%05d.safetensors", shard + 1, f->shards);
}

static int write_shard(out_folder *f, int shard)
{
    static const char *const metadata[] = {"format", "pt"};
    moq_tensor *list = (moq_tensor *)take(f->count, sizeof *list);
    size_t count = 0;
    char name[64], *path, *shown;
    moq_error err;
    int bad = 0;
    for (size_t i = 0; i < f->count; i++) {
        if (f->tensors[i].shard != shard) continue;
        if (progress_bar("writing", i, f->count, 0)) bad = 1;
        list[count] = f->tensors[i].t;
        if (f->tensors[i].module && !bad) list[count].data = make_weight(f, &f->tensors[i]);
        count++;
    }
    shard_name(f, shard, name, sizeof name);
    path = join(f->temp, "/", name);
    shown = join(f->target, "/", name);
    if (bad || stop_requested) bad = refuse("stopped; nothing was written");
    else if (moq_st_write(path, list, count, metadata, 1, NULL, &err) != MOQ_OK) bad = refuse_error(shown, &err);
    for (size_t i = 0, k = 0; i < f->count; i++) {
        if (f->tensors[i].shard != shard) continue;
        if (f->tensors[i].module) free((void *)(uintptr_t)list[k].data);
        k++;
    }
    free(list);
    free(path);
    free(shown);
    return bad;
}

/* A JSON value as it was, without quantization_config, and with `dtype` where a type of weights is named. */
static void copy_json(json_out *j, const moq_json *v, const char *key, const char *dtype)
{
    if (v->type == MOQ_JSON_ARRAY || v->type == MOQ_JSON_OBJECT) {
        json_open(j, key, v->type == MOQ_JSON_ARRAY ? '[' : '{');
        for (const moq_json *e = moq_json_first(v); e; e = moq_json_next(v, e))
            if (!e->key || (strcmp(e->key, "quantization_config") != 0 && strcmp(e->key, "compression_config") != 0)) copy_json(j, e, e->key, dtype);
        json_close(j, v->type == MOQ_JSON_ARRAY ? ']' : '}');
        return;
    }
    json_item(j, key);
    if (key && v->type == MOQ_JSON_STRING && (strcmp(key, "dtype") == 0 || strcmp(key, "torch_dtype") == 0)) json_text(j, dtype, strlen(dtype));
    else if (v->type == MOQ_JSON_STRING) json_text(j, v->text, v->text_bytes);
    else if (v->type == MOQ_JSON_NUMBER) fputs(v->text, j->to);
    else fputs(v->type == MOQ_JSON_TRUE ? "true" : v->type == MOQ_JSON_FALSE ? "false" : "null", j->to);
}

/* A target that cannot be made or written: what the system says of it, and what to do. */
static int refuse_target(const char *target, int number)
{
    struct stat info;
    char *parent = join(target, "", "");
    size_t base = (size_t)(base_name(target) - target);
    parent[base] = 0;
    int absent = number == ENOENT && base && stat(parent, &info) != 0;
    const char *remedy = number == ENOSPC || number == EDQUOT ? "free some space, or choose another disk" : number == ENAMETOOLONG ? "choose a shorter name"
                         : number == EFBIG ? "raise `ulimit -f`, or choose another disk" : "choose a place that can be written";
    free(parent);
    return absent ? refuse("%s: its parent folder does not exist; create that first", target)
                  : refuse("%s: cannot be written: %s; %s", target, strerror(number), remedy);
}

static int finish_file(FILE *to, const char *path)
{
    int bad = !to || ferror(to), number = errno;
    if (to && fclose(to) != 0) { bad = 1; number = errno; }
    return bad ? refuse_target(path, number) : 0;
}

static int write_config(const out_folder *f)
{
    char *path = join(f->temp, "/", "config.json");
    FILE *to = fopen(path, "wb");
    json_out j = json_to(to, 60);
    int bad;
    if (to) copy_json(&j, moq_get_config(f->ck), NULL, f->dtype == MOQ_F32 ? "float32" : "bfloat16");
    bad = finish_file(to, path);
    free(path);
    return bad;
}

static int write_index(const out_folder *f)
{
    char *path = join(f->temp, "/", "model.safetensors.index.json"), name[64];
    FILE *to = fopen(path, "wb");
    json_out j = json_to(to, 2);
    uint64_t total = 0;
    int bad;
    for (size_t i = 0; i < f->count; i++) total += f->tensors[i].t.bytes;
    if (to) {
        json_open(&j, NULL, '{');
        json_open(&j, "metadata", '{');
        json_int(&j, "total_size", (int64_t)total);
        json_close(&j, '}');
        json_open(&j, "weight_map", '{');
        for (size_t i = 0; i < f->count; i++) {
            shard_name(f, f->tensors[i].shard, name, sizeof name);
            json_string(&j, f->tensors[i].t.name, name);
        }
        json_close(&j, '}');
        json_close(&j, '}');
    }
    bad = finish_file(to, path);
    free(path);
    return bad;
}

static int copy_file(const char *from, const char *to)
{
    size_t bytes;
    moq_error err;
    char *data = read_input(from, &bytes);
    int bad = !data ? 2 : moq_write_file(to, data, bytes, &err) != MOQ_OK ? refuse_error(to, &err) : 0;
    free_file(data, bytes);
    return bad;
}

/* Everything that is no weight and says nothing of the quantization: tokenizer, templates, licence. */
static int copy_others(const out_folder *f)
{
    static const char *const left[] = {"config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json", "recipe.yaml",
                                       "model.safetensors.index.json"};
    DIR *d = opendir(f->source);
    struct dirent *entry;
    struct stat info;
    int bad = d ? 0 : refuse("%s: cannot be listed: %s", f->source, strerror(errno));
    while (!bad && (entry = readdir(d)) != NULL) {
        char *from = join(f->source, "/", entry->d_name), *to = join(f->temp, "/", entry->d_name);
        int skip = ends_with(entry->d_name, ".safetensors") || stat(from, &info) != 0 || !S_ISREG(info.st_mode);
        for (int i = 0; i < COUNT(left); i++) skip |= strcmp(entry->d_name, left[i]) == 0;
        if (!skip) bad = copy_file(from, to);
        free(from);
        free(to);
    }
    if (d) closedir(d);
    return bad;
}

static int write_folder(out_folder *f, const char *target)
{
    int bad = plan_folder(f);
    if (!bad && mkdir(f->temp, 0777) != 0)
        return refuse_target(target, errno);
    unfinished_folder = f->temp;
    for (int i = 0; !bad && i < f->shards; i++) bad = write_shard(f, i);
    if (!bad) bad = write_config(f);
    if (!bad && f->shards > 1) bad = write_index(f);
    if (!bad) bad = copy_others(f);
    if (!bad && stop_requested) bad = refuse("stopped; nothing was written");
    if (!bad && rename(f->temp, target) != 0) bad = refuse_target(target, errno);
    if (!bad) unfinished_folder = NULL;
    drop_unfinished();
    if (!bad && f->folded)
        fprintf(stderr, "moq: note: the input transforms and low-rank branches of %d layers were multiplied into their weights\n", f->folded);
    return bad;
}

static int dequant_out(const options *o, const moq_checkpoint *ck)
{
    out_folder f;
    struct stat info;
    char number[32], *target = join(o->out, "", "");
    int bad;
    memset(&f, 0, sizeof f);
    f.ck = ck;
    f.source = o->args[0];
    f.dtype = MOQ_F32;
    for (size_t n = strlen(target); n > 1 && target[n - 1] == '/'; n--) target[n - 1] = 0;
    snprintf(number, sizeof number, ".tmp-%ld", (long)getpid());
    f.temp = join(target, number, "");
    f.target = target;
    if (o->dtype && strcmp(o->dtype, "bf16") == 0) f.dtype = MOQ_BF16;
    if (o->dtype && strcmp(o->dtype, "bf16") != 0 && strcmp(o->dtype, "f32") != 0) bad = refuse("--dtype is f32 or bf16, not '%s'", o->dtype);
    else if (lstat(target, &info) == 0)
        bad = refuse("%s: %s; choose another target or remove it first", target, stat(target, &info) == 0 ? "exists already" : "is a link to nothing");
    else bad = write_folder(&f, target);
    for (size_t i = 0; i < f.count; i++)
        if (f.tensors[i].module) free((void *)(uintptr_t)f.tensors[i].t.name);
    free(f.tensors);
    free(f.modules);
    free(f.temp);
    free(target);
    return bad;
}

static int verb_dequant(const options *o)
{
    moq_error err;
    moq_checkpoint *ck;
    int bad;
    if (!o->hash == !o->out)
        return refuse(o->hash ? "dequant takes --hash or --out DST, not both" : "dequant needs --hash or --out DST; try: moq help dequant");
    if (o->out && o->json) return refuse("--json goes with --hash");
    ck = open_folder(o->args[0], 0, NULL, 0, &err);
    if (!ck) return refuse_error(o->args[0], &err);
    bad = o->hash ? dequant_hash(o, ck) : dequant_out(o, ck);
    moq_close(ck);
    return bad;
}

/* ------------------------------------------------------------------------------------------------
   >>logits          a full forward over given tokens
   ------------------------------------------------------------------------------------------------ */

static int run_logits(const options *o, engine *e, const token_rows *t)
{
    size_t length = t->start[1] - t->start[0], row = length * (size_t)e->info->vocab;
    float *logits = (float *)take(t->rows * row, sizeof *logits);
    moq_tensor out;
    moq_error err;
    moq_result r = MOQ_OK;
    for (size_t i = 0; i < t->rows && r == MOQ_OK; i++) {
        progress_bar("running", i, t->rows, 0);
        r = llm_forward(e->m, 0, t->ids + t->start[i], (int32_t)length, 0, logits + i * row, NULL, &err);
    }
    if (r == MOQ_OK) {
        progress_bar("running", t->rows, t->rows, 0);
        memset(&out, 0, sizeof out);
        out.name = "logits";
        out.data = logits;
        out.bytes = (uint64_t)t->rows * row * sizeof *logits;
        out.dtype = MOQ_F32;
        out.rank = 3;
        out.shape[0] = t->rows;
        out.shape[1] = length;
        out.shape[2] = (uint64_t)e->info->vocab;
        r = moq_st_write(o->out, &out, 1, NULL, 0, NULL, &err);
        if (r != MOQ_OK) refuse_error(o->out, &err);
    } else refuse_error(e->path, &err);
    free(logits);
    return r == MOQ_OK ? 0 : 2;
}

static int verb_logits(const options *o)
{
    token_rows t;
    engine e;
    int bad;
    if (!o->tokens || !o->out) return refuse("logits needs --tokens T and --out FILE.safetensors; try: moq help logits");
    bad = read_tokens(&t, "tokens", o->tokens);
    for (size_t i = 1; !bad && i < t.rows; i++)
        if (t.start[i + 1] - t.start[i] != t.start[1] - t.start[0]) bad = refuse("the rows of tokens differ in length; run them one by one");
    if (!bad) bad = open_engine(&e, o, o->args[0], (int64_t)longest_row(&t), 1);
    if (!bad) {
        bad = check_tokens(&t, o->tokens, e.info->vocab, e.info->context);
        if (!bad) bad = run_logits(o, &e, &t);
        close_engine(&e);
    }
    free_tokens(&t);
    return bad;
}

/* ------------------------------------------------------------------------------------------------
   >>eval            how well a folder predicts text and answers
   Negative log-likelihoods in nats, softmax in double. Tokens are run in pieces, so that logits stay small.
   ------------------------------------------------------------------------------------------------ */

enum { PIECE = 64 }; /* tokens whose logits are held at a time */

typedef struct score {
    double nll, kl;
    uint64_t tokens, best; /* scored tokens; those that were also the likeliest */
    size_t first_miss;     /* index of the first scored token that was not, in the last span */
    int32_t instead;       /* and the likeliest token there */
} score;

typedef struct evaluation {
    engine a, b; /* b: --against, or empty */
    const llm_tokenizer *tok;
    float *logits, *other;
    score total;
    uint64_t rows, exact, used; /* chat rows; right answers; tokens of all windows */
    uint64_t lines;             /* of the file, for the bar */
    int empty;                  /* the file has no bytes */
    const options *o;
} evaluation;

static int32_t likeliest(const float *x, int32_t n)
{
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

/* log(sum(exp(x))) */
static double log_sum_exp(const float *x, int32_t n)
{
    double top = (double)x[likeliest(x, n)], sum = 0;
    for (int32_t i = 0; i < n; i++) sum += exp((double)x[i] - top);
    return top + log(sum);
}

/* KL(p || q) of the softmaxes of two rows of logits. */
static double divergence(const float *p, const float *q, int32_t n)
{
    double lp = log_sum_exp(p, n), lq = log_sum_exp(q, n), sum = 0;
    for (int32_t i = 0; i < n; i++) sum += exp((double)p[i] - lp) * (((double)p[i] - lp) - ((double)q[i] - lq));
    return sum;
}

/* Run ids[0 .. count) from position 0, compare the tokens from index `from` >= 1 on with the likeliest ones, and add up the
   likelihoods of those before index `until`. */
static moq_result score_span(evaluation *v, const int32_t *ids, size_t count, size_t from, size_t until, moq_error *err)
{
    int32_t vocab = v->a.info->vocab;
    moq_result r = MOQ_OK;
    v->total.first_miss = count;
    if (from > 1) r = llm_forward(v->a.m, 0, ids, (int32_t)from - 1, 0, NULL, NULL, err);
    if (r == MOQ_OK && from > 1 && v->b.m) r = llm_forward(v->b.m, 0, ids, (int32_t)from - 1, 0, NULL, NULL, err);
    for (size_t at = from - 1; at + 1 < count && r == MOQ_OK; at += PIECE) {
        size_t n = count - 1 - at < PIECE ? count - 1 - at : PIECE;
        r = llm_forward(v->a.m, 0, ids + at, (int32_t)n, (int32_t)at, v->logits, NULL, err);
        if (r == MOQ_OK && v->b.m) r = llm_forward(v->b.m, 0, ids + at, (int32_t)n, (int32_t)at, v->other, NULL, err);
        for (size_t i = 0; i < n && r == MOQ_OK; i++) {
            const float *row = v->logits + i * (size_t)vocab;
            int32_t best = likeliest(row, vocab), wanted = ids[at + i + 1];
            if (at + i + 1 < until) {
                v->total.nll += log_sum_exp(row, vocab) - (double)row[wanted];
                if (v->b.m) v->total.kl += divergence(v->other + i * (size_t)vocab, row, vocab);
                v->total.tokens++;
                v->total.best += best == wanted;
            }
            if (best != wanted && v->total.first_miss == count) {
                v->total.first_miss = at + i + 1;
                v->total.instead = best;
            }
        }
    }
    return r;
}

/* The greedy answer left the expected tokens at `miss`, but other tokens may spell the same text: go on while they do. */
static int same_text_anyway(evaluation *v, int32_t *ids, size_t prompt, size_t miss, const char *want, moq_error *err)
{
    size_t length = strlen(want), capacity = length + 64, n = miss, got, limit = (size_t)v->a.info->context;
    char *text = (char *)take(capacity, 1);
    int32_t token = v->total.instead;
    int same = 0;
    while (n < limit && n - prompt <= length) {
        got = llm_decode(v->tok, ids + prompt, n - prompt, 0, text, capacity);
        if (got > length || strncmp(text, want, got) != 0) break;
        same = got == length && llm_is_end(v->tok, token);
        if (llm_is_end(v->tok, token)) break;
        ids[n++] = token;
        if (llm_forward(v->a.m, 0, ids + n - 1, 1, (int32_t)n - 1, NULL, v->logits, err) != MOQ_OK) break;
        token = likeliest(v->logits, v->a.info->vocab);
    }
    free(text);
    return same;
}

/* Messages that end with an answer. The likelihood is that of the answer's own tokens; an exact answer also ends where it should. */
static int eval_chat(evaluation *v, const llm_message *messages, size_t count, size_t line)
{
    moq_error err;
    const llm_tokenizer *t = v->tok;
    size_t limit = (size_t)v->a.info->context, prompt = llm_frame(t, messages, count - 1, 1, NULL, 0, &err), all = 0, end, text;
    const char *answer = messages[count - 1].text;
    int32_t *ids;
    int bad = 0;
    if (prompt != SIZE_MAX) all = llm_frame(t, messages, count, 0, NULL, 0, &err);
    if (prompt == SIZE_MAX || all == SIZE_MAX) return refuse_error(v->a.path, &err);
    ids = (int32_t *)take(all + prompt + limit + 1, sizeof *ids);
    llm_frame(t, messages, count, 0, ids, all, &err);
    for (end = prompt; end < all && !llm_is_end(t, ids[end]); end++) {}
    text = end;
    if (end < all) end++;
    if (end > limit) bad = refuse("%s: line %zu has %zu tokens, the context is %zu; raise --context", v->o->data, line, end, limit);
    else if (prompt == 0 || text <= prompt) bad = refuse("%s: line %zu has no prompt or no answer", v->o->data, line);
    else if (score_span(v, ids, end, prompt, text, &err) != MOQ_OK) bad = refuse_error(v->a.path, &err);
    else {
        size_t miss = v->total.first_miss;
        v->rows++;
        v->exact += (uint64_t)(miss == end || same_text_anyway(v, ids, prompt, miss, answer, &err));
    }
    free(ids);
    return bad;
}

/* Windows of --seq tokens, cut without overlap; all but the first token of each are scored. */
static int eval_windows(evaluation *v, const int32_t *ids, size_t count)
{
    size_t most = (size_t)v->a.info->context, seq = v->o->seq ? (size_t)v->o->seq : most < 512 ? most : 512, limit = (size_t)v->o->limit;
    moq_error err;
    if (seq < 2) return refuse("--seq %zu: windows have at least 2 tokens, of which the first is not scored", seq);
    if (seq > most) return refuse("--seq %zu: windows have 2 to %d tokens here", seq, v->a.info->context);
    for (size_t at = 0; at < count; at += seq) {
        size_t n = count - at < seq ? count - at : seq;
        if (n < 2 || (limit && v->rows == limit)) break;
        if (progress_bar("scoring", at, count, 0)) return refuse("stopped");
        if (score_span(v, ids + at, n, 1, n, &err) != MOQ_OK) return refuse_error(v->a.path, &err);
        v->used += n;
        v->rows++;
    }
    progress_bar("scoring", count, count, 0);
    return 0;
}

static int eval_text(evaluation *v, const char *text, size_t bytes)
{
    size_t n = llm_encode(v->tok, text, bytes, LLM_BOS, NULL, 0);
    int32_t *ids = (int32_t *)take(n == SIZE_MAX ? 1 : n, sizeof *ids);
    int bad = n == SIZE_MAX ? refuse("out of memory") : 0;
    if (!bad) llm_encode(v->tok, text, bytes, LLM_BOS, ids, n);
    for (size_t i = 0; !bad && i < n; i++)
        if (ids[i] < 0 || ids[i] >= v->a.info->vocab) bad = refuse("%s: token %d is outside the model's vocabulary of %d", v->a.path, ids[i], v->a.info->vocab);
    if (!bad) bad = eval_windows(v, ids, n);
    free(ids);
    return bad;
}

static int eval_object(void *user, const text_row *row)
{
    evaluation *v = (evaluation *)user;
    const char *path = v->o->data;
    size_t count = row->count;
    if (v->o->limit && v->rows >= (uint64_t)v->o->limit) return NO_MORE_ROWS;
    if (progress_bar("scoring", v->rows, v->lines, 0)) return refuse("stopped");
    if (v->rows > 0 && (row->text != NULL) != (v->used > 0))
        return refuse("%s: line %zu: texts and conversations are not scored together; give each its own file", path, row->line);
    if (row->text) return eval_text(v, row->text, row->bytes);
    while (count > 0 && strcmp(row->messages[count - 1].role, "assistant") != 0) count--;
    if (count < 2) return refuse("%s: line %zu has neither \"text\" nor messages that end with an answer", path, row->line);
    return eval_chat(v, row->messages, count, row->line);
}

static int eval_lines(evaluation *v, const char *text, size_t bytes)
{
    int bad;
    v->lines = 1;
    for (size_t i = 0; i < bytes; i++) v->lines += text[i] == '\n';
    if (v->o->limit && (uint64_t)v->o->limit < v->lines) v->lines = (uint64_t)v->o->limit;
    bad = each_row(v->o->data, text, bytes, eval_object, v);
    progress_bar("scoring", v->lines, v->lines, 0);
    return bad;
}

static int eval_tokens(evaluation *v)
{
    token_rows t;
    int bad = read_tokens(&t, "data", v->o->data);
    if (!bad) bad = check_tokens(&t, v->o->data, v->a.info->vocab, 0);
    for (size_t r = 0; !bad && r < t.rows; r++) bad = eval_windows(v, t.ids + t.start[r], t.start[r + 1] - t.start[r]);
    free_tokens(&t);
    return bad;
}

static int eval_file(evaluation *v)
{
    size_t bytes;
    char *text = read_text(v->o->data, &bytes);
    int bad = text ? 0 : 2;
    v->empty = text && bytes == 0;
    if (!bad) bad = ends_with(v->o->data, ".jsonl") ? eval_lines(v, text, bytes) : eval_text(v, text, bytes);
    free_file(text, bytes);
    return bad;
}

static int print_score(const evaluation *v)
{
    int chat = v->rows > 0 && v->used == 0;
    double n = v->total.tokens ? (double)v->total.tokens : 1, nll = v->total.nll / n;
    json_out j = json_to(stdout, 1);
    if (v->total.tokens == 0)
        return refuse("%s: %s; give text of at least two tokens, or rows " ROW_SHAPES " in a .jsonl file", v->o->data,
                      v->empty ? "the file is empty" : "there is nothing in it to score");
    if (v->o->json) {
        json_open(&j, NULL, '{');
        if (chat) json_int(&j, "exact", (int64_t)v->exact);
        if (chat) json_int(&j, "rows", (int64_t)v->rows);
        json_number(&j, "nll", nll);
        if (!chat) json_number(&j, "ppl", exp(nll));
        json_int(&j, "tokens", (int64_t)(chat ? v->total.tokens : v->used));
        json_number(&j, "token_accuracy", (double)v->total.best / n);
        if (v->b.m) json_number(&j, "kl", v->total.kl / n);
        json_close(&j, '}');
        return 0;
    }
    if (chat) printf("exact %" PRIu64 "/%" PRIu64 " nll %.6f", v->exact, v->rows, nll);
    else printf("nll %.4f ppl %.2f tokens %" PRIu64, nll, exp(nll), v->used);
    if (v->b.m) printf(" kl %.6f", v->total.kl / n);
    printf("\n");
    return 0;
}

static int verb_eval(const options *o)
{
    evaluation v;
    int bad, text;
    memset(&v, 0, sizeof v);
    v.o = o;
    if (!o->data) return refuse("eval needs --data FILE; try: moq help eval");
    text = ends_with(o->data, ".jsonl") || ends_with(o->data, ".txt");
    bad = open_engine(&v.a, o, o->args[0], o->seq && !text ? o->seq : 0, !text);
    if (!bad && o->against) {
        bad = open_engine(&v.b, o, o->against, v.a.info->context, 1);
        running = v.a.m;
        if (!bad && v.b.info->vocab != v.a.info->vocab)
            bad = refuse("%s has %d tokens, %s has %d: they cannot be compared", o->against, v.b.info->vocab, o->args[0], v.a.info->vocab);
    }
    if (!bad) {
        v.tok = llm_get_tokenizer(v.a.m);
        v.logits = (float *)take((size_t)PIECE * (size_t)v.a.info->vocab, sizeof *v.logits);
        if (v.b.m) v.other = (float *)take((size_t)PIECE * (size_t)v.a.info->vocab, sizeof *v.other);
        bad = text ? eval_file(&v) : eval_tokens(&v);
        if (!bad) bad = print_score(&v);
    }
    free(v.logits);
    free(v.other);
    close_engine(&v.b);
    close_engine(&v.a);
    return bad;
}

/* ------------------------------------------------------------------------------------------------
   >>run             answers and chats
   ------------------------------------------------------------------------------------------------ */

/* MB that a prompt, a schema or a grammar may have where its end is not known beforehand, and that one line for `tokenize` may: far more than any model
   takes, so that what never ends (/dev/zero) is told before memory is. */
enum { PROMPT_MB = 64, LINES_MB = 4096 };

/* The whole of a stream, NUL-terminated; NULL after an error line. */
static char *read_stream(FILE *from, const char *name, int most, size_t *bytes)
{
    size_t capacity = 65536, n;
    char *text = (char *)take(capacity, 1);
    *bytes = 0;
    while ((n = fread(text + *bytes, 1, capacity - *bytes - 1, from)) > 0) {
        *bytes += n;
        if ((uint64_t)*bytes > (uint64_t)most << 20) {
            refuse("%s: %d MB were read and it goes on; that is the limit here, so give something shorter, or that ends", name, most);
            free(text);
            return NULL;
        }
        if (capacity - *bytes < 2) text = (char *)grow(text, capacity *= 2, 1);
    }
    if (ferror(from)) {
        if (stop_requested) refuse("stopped");
        else refuse("%s: %s", name, strerror(errno));
        free(text);
        return NULL;
    }
    text[*bytes] = 0;
    return text;
}

/* end: as json_answer has it */
static void print_stats(const engine *e, const char *end)
{
    const llm_stats *s = llm_get_stats(e->m);
    fprintf(stderr, "moq: prompt %" PRIu64 " tokens, %.1f tokens/s; generated %" PRIu64 " tokens, %.1f tokens/s%s\n", s->prompt_tokens,
            s->prompt_seconds > 0 ? (double)s->prompt_tokens / s->prompt_seconds : 0.0, s->generated_tokens,
            s->generate_seconds > 0 ? (double)s->generated_tokens / s->generate_seconds : 0.0,
            strcmp(end, "length") == 0 ? ", up to --max-tokens" : strcmp(end, "context") == 0 ? ", until the context was full" : "");
}

/* end: why there is no more: "stop", "length" (--max-tokens) or "context" */
static void json_answer(const engine *e, const char *text, size_t length, const char *end)
{
    const llm_stats *s = llm_get_stats(e->m);
    json_out j = json_to(stdout, 1);
    json_open(&j, NULL, '{');
    json_item(&j, "text");
    json_text(&j, text, length);
    json_item(&j, "end");
    json_text(&j, end, strlen(end));
    json_int(&j, "prompt_tokens", (int64_t)s->prompt_tokens);
    json_int(&j, "generated_tokens", (int64_t)s->generated_tokens);
    json_number(&j, "prompt_seconds", s->prompt_seconds);
    json_number(&j, "generate_seconds", s->generate_seconds);
    json_close(&j, '}');
}

/* Stream one answer. Ctrl-C ends it: 2 for a single answer. */
static int answer(const engine *e, const options *o)
{
    uint64_t before = llm_get_stats(e->m)->generated_tokens;
    const char *piece;
    char *all = NULL;
    size_t length = 0;
    int shown = 0, full;
    const char *end;
    moq_error err;
    memset(&err, 0, sizeof err);
    while ((piece = llm_next(e->m, &err)) != NULL) {
        size_t n = strlen(piece);
        shown = 1;
        if (o->json) {
            all = (char *)grow(all, length + n + 1, 1);
            memcpy(all + length, piece, n);
            length += n;
        } else {
            fputs(piece, stdout);
            if (fflush(stdout) != 0) break;
        }
        if (o->max_tokens && !o->json_schema && !o->grammar && llm_get_stats(e->m)->generated_tokens - before >= (uint64_t)o->max_tokens) break;
    }
    /* an answer that fills the context is one; a document that a grammar asks for would be incomplete */
    full = !piece && err.code == MOQ_E_STATE && strcmp(err.object, "context") == 0 && llm_get_stats(e->m)->generated_tokens > before &&
           !o->json_schema && !o->grammar;
    if (full) err.code = MOQ_OK;
    end = piece ? "length" : full ? "context" : "stop";
    if (o->json && (piece || err.code == MOQ_OK)) json_answer(e, all ? all : "", length, end);
    if (!o->json && (shown || err.code == MOQ_OK)) fputc('\n', stdout); /* an error without an answer leaves nothing on stdout */
    fflush(stdout); /* before what stderr says, should both go to one place */
    free(all);
    if (full) print_placed(stderr, "moq: note: ", e->path, err.text);
    if (o->stats) print_stats(e, end);
    return piece || err.code == MOQ_OK ? 0 : refuse_error(e->path, &err);
}

static int say(const engine *e, const options *o, const char *role, const char *text)
{
    moq_error err;
    size_t bytes = strlen(text), at = first_no_text(text, bytes);
    if (at < bytes) return refuse("the %s message is no UTF-8 text: byte %zu is 0x%02x", role, at, (unsigned)(unsigned char)text[at]);
    moq_result r = o->raw ? llm_say_raw(e->m, text) : llm_say(e->m, role, text);
    if (r == MOQ_OK) return 0;
    memset(&err, 0, sizeof err);
    while (llm_next(e->m, &err)) {} /* the sentence comes out of llm_next */
    if (err.code == MOQ_OK) moq_fail(&err, r, role, "%s", moq_result_text(r));
    return refuse_error(e->path, &err);
}

static int is_blank(const char *text) { return text[strspn(text, " \t\r\n")] == 0; }

/* A slash and a word alone: paths and fractions are none. */
static int is_command(const char *line) { return line[0] == '/' && line[1] && line[1 + strspn(line + 1, "abcdefghijklmnopqrstuvwxyz")] == 0; }

/* Lines from the terminal and answers, until the end of input. Ctrl-C ends an answer; at the prompt it ends the chat. */
static int chat(const engine *e, const options *o)
{
    static const char commands[] = "An empty line or /exit ends the chat, /reset forgets it, /help says this, Ctrl-C stops an answer.\n";
    char line[16384];
    int bad = 0;
    fputs(commands, stderr);
    signal(SIGINT, SIG_DFL);
    for (;;) {
        fputs("> ", stderr);
        if (!fgets(line, sizeof line, stdin)) {
            fputc('\n', stderr);
            break;
        }
        line[strcspn(line, "\r\n")] = 0;
        if (line[0] == 0 || strcmp(line, "/exit") == 0 || strcmp(line, "/quit") == 0) break;
        if (is_command(line) && strcmp(line, "/reset") != 0) { /* /help too */
            if (strcmp(line, "/help") != 0) fprintf(stderr, "moq: note: there is no %s; a line that begins with a blank goes to the model\n", line);
            fputs(commands, stderr);
            continue;
        }
        if (strcmp(line, "/reset") == 0) {
            llm_reset(e->m);
            bad = o->system ? say(e, o, "system", o->system) : 0;
            continue;
        }
        catch_interrupt();
        bad = say(e, o, "user", line);
        if (!bad) bad = answer(e, o);
        if ((bad && !stop_requested) || end_requested) break;
        bad = 0;
        signal(SIGINT, SIG_DFL);
    }
    return !bad && end_requested ? refuse("stopped") : bad;
}

static int is_standard(const char *path) { return strcmp(path, "-") == 0 || strcmp(path, "/dev/stdin") == 0; }

/* The file of --json-schema or --grammar as messages name it; NULL without. */
static const char *grammar_name(const options *o)
{
    const char *path = o->json_schema ? o->json_schema : o->grammar;
    return path && is_standard(path) ? "standard input" : path;
}

/* A file, or what comes through a pipe: "-", and the names that shells give them. Release with free_file. */
static char *read_piped(const char *path, const char *name, size_t *bytes)
{
    struct stat info;
    const int standard = is_standard(path);
    if (!standard && (stat(path, &info) != 0 || S_ISREG(info.st_mode) || S_ISDIR(info.st_mode))) return read_input(path, bytes);
    FILE *from = standard ? stdin : fopen(path, "rb");
    if (!from) {
        refuse("%s: %s", name, strerror(errno));
        return NULL;
    }
    char *read = read_stream(from, name, PROMPT_MB, bytes), *text = read ? (char *)moq_allocate(NULL, *bytes + 1) : NULL;
    if (text) memcpy(text, read, *bytes);
    else if (read) refuse("%s: out of memory", name);
    if (!standard) fclose(from);
    free(read);
    return text;
}

/* --json-schema and --grammar: compiled before the model is opened, so that a wrong one is told at once. */
static int open_grammar(const options *o, llm_grammar **out)
{
    const char *path = o->json_schema ? o->json_schema : o->grammar, *name = grammar_name(o);
    llm_grammar_desc d;
    moq_error err;
    size_t bytes = 0;
    *out = NULL;
    if (!path) return 0;
    if (o->json_schema && o->grammar) return refuse("--json-schema and --grammar exclude each other");
    if (path != name && !o->prompt) return refuse("standard input cannot be the prompt and the %s; give --prompt", o->json_schema ? "schema" : "grammar");
    char *text = read_piped(path, name, &bytes);
    if (!text) return 2;
    memset(&d, 0, sizeof d);
    if (o->json_schema) d.schema = text;
    else d.gbnf = text;
    d.bytes = bytes;
    if (bytes == 0) moq_fail(&err, MOQ_E_GRAMMAR, NULL, "%s is empty", path == name ? "the file" : "it");
    else *out = llm_grammar_create(&d, &err);
    free_file(text, bytes);
    return *out ? 0 : refuse_error(name, &err);
}

static int verb_run(const options *o)
{
    engine e;
    char *text = NULL;
    size_t bytes = 0;
    llm_grammar *grammar;
    moq_error err;
    int bad = open_grammar(o, &grammar);
    if (!bad && o->prompt && is_blank(o->prompt) && !o->raw) bad = refuse("--prompt is empty; give it a text");
    if (!bad && !(o->temp > 0) && (o->top_k || o->top_p > 0 || o->min_p > 0))
        fputs("moq: note: --top-k, --top-p and --min-p change nothing without --temp: the likeliest token is always taken\n", stderr);
    else if (!bad && !(o->temp > 0) && o->seed) fputs("moq: note: --seed changes nothing without --temp: the likeliest token is always taken\n", stderr);
    if (!bad) bad = open_engine(&e, o, o->args[0], 0, 0);
    if (bad) {
        llm_grammar_destroy(grammar);
        return bad;
    }
    if (grammar && llm_set_grammar(e.m, grammar, (int32_t)(o->max_tokens < INT32_MAX ? o->max_tokens : INT32_MAX), &err) < 0)
        bad = refuse_error(grammar_name(o), &err);
    if (!bad && o->system) bad = say(&e, o, "system", o->system);
    if (!bad && !o->prompt && isatty(0) && !o->json) bad = chat(&e, o);
    else if (!bad) {
        if (!o->prompt) {
            text = read_stream(stdin, "standard input", PROMPT_MB, &bytes);
            bad = text ? 0 : 2;
            while (text && !o->raw && bytes > 0 && (text[bytes - 1] == '\n' || text[bytes - 1] == '\r')) text[--bytes] = 0;
        }
        if (text && strlen(text) < bytes) bad = refuse("standard input is no UTF-8 text: byte %zu is 0x00", strlen(text));
        else if (text && is_blank(text) && !o->raw) bad = refuse("there is no prompt on standard input; write one there, or give --prompt");
        if (!bad) bad = say(&e, o, "user", o->prompt ? o->prompt : text);
        if (!bad) bad = answer(&e, o);
    }
    free(text);
    close_engine(&e);
    llm_grammar_destroy(grammar);
    return bad;
}

/* ------------------------------------------------------------------------------------------------
   >>tokenize        text to ids and back, line by line
   ------------------------------------------------------------------------------------------------ */

static void encode_line(const llm_tokenizer *t, const char *line, size_t bytes)
{
    int32_t few[512], *ids = few;
    size_t n = llm_encode(t, line, bytes, LLM_SPECIAL | LLM_BOS, few, (size_t)COUNT(few));
    if (n != SIZE_MAX && n > (size_t)COUNT(few)) {
        ids = (int32_t *)take(n, sizeof *ids);
        n = llm_encode(t, line, bytes, LLM_SPECIAL | LLM_BOS, ids, n);
    }
    if (n == SIZE_MAX) exit(refuse("out of memory"));
    for (size_t i = 0; i < n; i++) printf("%s%d", i ? "," : "", ids[i]);
    putchar('\n');
    if (ids != few) free(ids);
}

/* The reverse of encode_line: what it puts in front of every text is dropped again. */
static int decode_line(const llm_tokenizer *t, const char *line)
{
    token_rows rows;
    int32_t front[16];
    size_t skip = llm_encode(t, "", 0, LLM_BOS, front, (size_t)COUNT(front)), n, bytes;
    char *text;
    int bad;
    if (line[strspn(line, " \r")] == 0) { putchar('\n'); return 0; }
    if (line[strspn(line, "0123456789, \r")] != 0) return refuse("'%.60s' is no line of token ids, as 1,2,3", line);
    bad = read_tokens(&rows, "decode", line);
    if (bad) return bad;
    n = rows.start[1];
    for (size_t i = 0; i < n; i++)
        if (rows.ids[i] >= llm_vocab(t)) {
            bad = refuse("token %d is none of the tokenizer's %d", rows.ids[i], llm_vocab(t));
            free_tokens(&rows);
            return bad;
        }
    if (skip > (size_t)COUNT(front) || skip > n || memcmp(front, rows.ids, skip * sizeof *front) != 0) skip = 0;
    bytes = llm_decode(t, rows.ids + skip, n - skip, LLM_SPECIAL, NULL, 0);
    text = (char *)take(bytes + 1, 1);
    llm_decode(t, rows.ids + skip, n - skip, LLM_SPECIAL, text, bytes + 1);
    fwrite(text, 1, bytes, stdout);
    putchar('\n');
    free(text);
    free_tokens(&rows);
    return 0;
}

/* Lines of a stream, of any number: only one is in memory, of at most LINES_MB. */
static int tokenize_lines(const llm_tokenizer *t, FILE *from, const char *name, int decode)
{
    size_t capacity = 65536, bytes = 0, n;
    char *text = (char *)take(capacity, 1);
    int bad = 0;
    do {
        n = fread(text + bytes, 1, capacity - bytes - 1, from);
        size_t at = 0, seen = bytes; /* no line ends in what was there before */
        bytes += n;
        if (ferror(from)) bad = stop_requested ? refuse("stopped") : refuse("%s: %s", name, strerror(errno));
        while (!bad && !stop_requested && at < bytes) {
            char *end = (char *)memchr(text + seen, '\n', bytes - seen);
            size_t stop = end ? (size_t)(end - text) : bytes;
            if (!end && n > 0) break; /* there may be more of it */
            text[stop] = 0;
            if (decode) bad = decode_line(t, text + at);
            else encode_line(t, text + at, stop - at);
            at = seen = stop + (end != NULL);
        }
        if (at > 0) memmove(text, text + at, bytes - at);
        bytes -= at;
        if (!bad && (uint64_t)bytes > (uint64_t)LINES_MB << 20)
            bad = refuse("%s: a line has %d MB and goes on; that is the limit of one line here, so break it, or give something that ends", name, LINES_MB);
        if (!bad && capacity - bytes < 2) text = (char *)grow(text, capacity *= 2, 1);
    } while (!bad && !stop_requested && n > 0);
    free(text);
    return !bad && stop_requested ? refuse("stopped") : bad;
}

static int verb_tokenize(const options *o)
{
    moq_error err;
    FILE *from = o->file ? fopen(o->file, "rb") : stdin;
    moq_checkpoint *ck;
    llm_tokenizer *t;
    int bad;
    if (!from && errno == ENOENT) return refuse("%s: no such file; " NAME_A_FILE, o->file);
    if (!from) return refuse("%s: %s", o->file, strerror(errno));
    ck = open_folder(o->args[0], 0, NULL, 0, &err);
    t = ck ? llm_tokenizer_open(ck, &err) : NULL;
    bad = t ? tokenize_lines(t, from, o->file ? o->file : "standard input", o->decode) : refuse_error(o->args[0], &err);
    if (from != stdin) fclose(from);
    llm_tokenizer_close(t);
    moq_close(ck);
    return bad;
}

/* ------------------------------------------------------------------------------------------------
   >>recipes         the table of recipes
   ------------------------------------------------------------------------------------------------ */

/* "F4 x16 F8_E4M3 +global": the element, how many share a scale, its type. */
static void coding_text(const moq_coding *c, char *text, size_t capacity)
{
    char group[48] = "";
    if (c->elem == MOQ_NONE) { snprintf(text, capacity, "wide"); return; }
    if (c->group_rows == 1 && c->group_cols > 0) snprintf(group, sizeof group, " /%d %s", c->group_cols, moq_dtype_name(c->scale));
    else if (c->group_rows > 1) snprintf(group, sizeof group, " /%dx%d %s", c->group_rows, c->group_cols, moq_dtype_name(c->scale));
    else if (c->group_rows == 1) snprintf(group, sizeof group, " /row %s", moq_dtype_name(c->scale));
    else if (c->scale != MOQ_NONE) snprintf(group, sizeof group, " /tensor %s", moq_dtype_name(c->scale));
    snprintf(text, capacity, "%s%s%s%s", moq_dtype_name(c->elem), group, c->has_global ? " + global" : "", c->dynamic ? ", dynamic" : "");
}

/* How much `name`, in lower case, is like a recipe: 3 a slip, 2 what its folders say, 1 a part of its name. */
static int likeness(const moq_recipe *r, const char *name)
{
    char algo[64];
    snprintf(algo, sizeof algo, "%s", r->algo);
    for (char *at = algo; *at; at++) *at = (char)(*at >= 'A' && *at <= 'Z' ? *at + 32 : *at);
    return moq_is_slip(name, r->name) ? 3 : strcmp(name, algo) == 0 ? 2 : strlen(name) > 2 && strstr(r->name, name) != NULL;
}

/* An unknown recipe is refused with the one that may be meant. */
static int check_recipe(const char *name)
{
    char copy[64];
    const moq_recipe *like = NULL;
    if (moq_find_recipe(name) || strcmp(name, "none") == 0) return 0;
    snprintf(copy, sizeof copy, "%s", name);
    for (char *at = copy; *at; at++) *at = (char)(*at >= 'A' && *at <= 'Z' ? *at + 32 : *at == '-' ? '_' : *at);
    for (size_t i = 0; i < moq_recipe_count(); i++)
        if (likeness(moq_get_recipe(i), copy) > (like ? likeness(like, copy) : 0)) like = moq_get_recipe(i);
    if (!like) return refuse("there is no recipe '%s'; moq recipes lists them", name);
    return refuse("there is no recipe '%s'; is %s meant? Try: moq recipes", name, like->name);
}

/* --kv of quantize; j: NULL for text. */
static void list_kv_recipes(json_out *j)
{
    static const char *const rows[][4] = {
        {"fp8", "FP8, a scale a layer", "largest keys and values", "FP8_KV_CFG"},
        {"fp8_affine", "FP8 after a bias a channel", "largest keys and values, means", "FP8_AFFINE_KV_CFG"},
        {"fp8_cast", "FP8, scale 1", "none", "kv/fp8_cast"},
        {"nvfp4", "FP4, FP8 scales of 16", "largest keys and values", "NVFP4_KV_CFG"},
        {"nvfp4_affine", "FP4, FP8 scales of 16", "largest after a bias a channel", "NVFP4_AFFINE_KV_CFG"},
        {"nvfp4_cast", "FP4, FP8 scales of 16, scale 1", "none", "kv/nvfp4_cast"},
        {"nvfp4_rotate", "FP4, FP8 scales of 16", "largest of rotated keys and values", "NVFP4_KV_ROTATE_CFG"}};
    if (j) json_open(j, "kv_recipes", '[');
    else printf("\n%-32s %-36s %-34s %s\n", "--kv, beside a recipe", "keys and values", "calibration", "ModelOpt");
    for (int i = 0; i < COUNT(rows); i++) {
        if (!j) { printf("%-32s %-36s %-34s %s\n", rows[i][0], rows[i][1], rows[i][2], rows[i][3]); continue; }
        json_open(j, NULL, '{');
        json_string(j, "name", rows[i][0]);
        json_string(j, "stores", rows[i][1]);
        json_string(j, "calibration", rows[i][2]);
        json_string(j, "modelopt", rows[i][3]);
        json_close(j, '}');
    }
    if (j) json_close(j, ']');
}

static int verb_recipes(const options *o)
{
    json_out j = json_to(stdout, 2);
    char weight[96], input[96], scheme[64];
    if (o->json) json_open(&j, NULL, '{');
    if (o->json) json_open(&j, "recipes", '[');
    else printf("%-32s %-36s %-34s %-40s %-32s %s\n", "recipe", "quantizes", "weights", "inputs", "calibration", "ModelOpt");
    for (size_t i = 0; i < moq_recipe_count(); i++) {
        const moq_recipe *r = moq_get_recipe(i);
        coding_text(&r->scheme.weight, weight, sizeof weight);
        coding_text(&r->scheme.input, input, sizeof input);
        moq_scheme_name(&r->scheme, scheme, sizeof scheme);
        if (!o->json) {
            printf("%-32s %-36s %-34s %-40s %-32s %s\n", r->name, r->covers, weight, input, r->calibration, r->modelopt);
            continue;
        }
        json_open(&j, NULL, '{');
        json_string(&j, "name", r->name);
        json_string(&j, "covers", r->covers);
        json_string(&j, "scheme", scheme);
        json_string(&j, "weight", weight);
        json_string(&j, "input", input);
        json_string(&j, "calibration", r->calibration);
        json_string(&j, "modelopt", r->modelopt);
        json_string(&j, "quant_algo", r->algo);
        json_close(&j, '}');
    }
    if (o->json) json_close(&j, ']');
    list_kv_recipes(o->json ? &j : NULL);
    if (o->json) json_close(&j, '}');
    return 0;
}

/* ------------------------------------------------------------------------------------------------
   >>diff            two folders, tensor by tensor
   ------------------------------------------------------------------------------------------------ */

/* What is compared: a folder, or one .safetensors file. */
typedef struct side { const char *path; moq_checkpoint *ck; moq_st *st; } side;

static int open_side(side *s, const char *path)
{
    struct stat info;
    moq_error err;
    memset(s, 0, sizeof *s);
    s->path = path;
    if (stat(path, &info) != 0)
        return refuse("%s: %s; name two checkpoint folders or two .safetensors files, with whole paths or as seen from the current folder", path,
                      errno == ENOENT ? "no such folder or file" : strerror(errno));
    if (S_ISDIR(info.st_mode)) s->ck = open_folder(path, 0, NULL, 0, &err);
    else s->st = moq_st_open(path, NULL, &err);
    return s->ck || s->st ? 0 : refuse_error(path, &err);
}

static void close_side(side *s)
{
    moq_close(s->ck);
    moq_st_close(s->st);
}

static size_t side_count(const side *s) { return s->ck ? moq_tensor_count(s->ck) : moq_st_count(s->st); }
static const moq_tensor *side_get(const side *s, size_t i) { return s->ck ? moq_get_tensor(s->ck, i) : moq_st_get(s->st, i); }

/* sqrt(sum((a - b)^2) / sum(b^2)); 0 when both are zero */
typedef struct distance { double error, power; } distance;

static double relative(const distance *d) { return d->power > 0 ? sqrt(d->error / d->power) : d->error > 0 ? INFINITY : 0.0; }

static void add_distance(distance *d, const double *a, const double *b, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        d->error += (a[i] - b[i]) * (a[i] - b[i]);
        d->power += b[i] * b[i];
    }
}

/* The module whose codes tensor `name` holds. Module names are prefixes of their tensors' names. */
static int module_of_tensor(const moq_checkpoint *ck, const char *name, moq_linear *out)
{
    char *module = join(name, "", "");
    moq_error err;
    int found = 0;
    for (size_t n = strlen(module); n > 0 && !found; n--) {
        if (module[n] != '.' && module[n] != '_' && module[n] != 0) continue;
        module[n] = 0;
        found = moq_has_linear(ck, module) && moq_find_linear(ck, module, out, &err) == MOQ_OK && strcmp(out->tensor, name) == 0;
    }
    free(module);
    return found;
}

/* How far the plain weights of `a` are from those of `b`. 0 when they cannot be compared. */
static int module_distance(const moq_linear *a, const moq_linear *b, distance *d)
{
    size_t cols = (size_t)a->cols;
    int experts = a->experts > 0 ? a->experts : 1;
    double *rows = (double *)take(cols * 2 + (size_t)(a->hadamard_size + b->hadamard_size), sizeof *rows);
    float *decoded = (float *)take(cols, sizeof *decoded);
    int same = a->rows == b->rows && a->cols == b->cols && a->experts == b->experts;
    memset(d, 0, sizeof *d);
    for (int e = 0; same && e < experts && !stop_requested; e++) {
        moq_linear one = *a, other = *b;
        if (a->experts > 0) same = moq_slice_expert(a, e, &one, NULL) == MOQ_OK && moq_slice_expert(b, e, &other, NULL) == MOQ_OK;
        for (int64_t r = 0; same && r < a->rows; r++) {
            plain_rows(&one, r, 1, rows, rows + 2 * cols, decoded);
            plain_rows(&other, r, 1, rows + cols, rows + 2 * cols, decoded);
            add_distance(d, rows, rows + cols, a->cols);
        }
    }
    free(rows);
    free(decoded);
    return same;
}

static int tensor_distance(const moq_tensor *a, const moq_tensor *b, distance *d)
{
    uint64_t n = a->bytes * 8 / (uint64_t)moq_dtype_bits(a->dtype), m = b->bytes * 8 / (uint64_t)moq_dtype_bits(b->dtype);
    memset(d, 0, sizeof *d);
    if (n != m || moq_dtype_bits(a->dtype) < 8 || moq_dtype_bits(b->dtype) < 8) return 0;
    for (uint64_t i = 0; i < n; i++) {
        float x, y;
        double p, q;
        if (!moq_to_f32(a->dtype, (const char *)a->data + i * (uint64_t)moq_dtype_bits(a->dtype) / 8, 1, &x)) return 0;
        if (!moq_to_f32(b->dtype, (const char *)b->data + i * (uint64_t)moq_dtype_bits(b->dtype) / 8, 1, &y)) return 0;
        p = (double)x;
        q = (double)y;
        add_distance(d, &p, &q, 1);
    }
    return 1;
}

static uint64_t differing_bytes(const moq_tensor *a, const moq_tensor *b)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < a->bytes; i++) n += ((const char *)a->data)[i] != ((const char *)b->data)[i];
    return n;
}

typedef struct comparison {
    side a, b, source;
    json_out j;
    int json, brief;
    size_t total, equal, renamed; /* renamed: layers of both whose codes have another name in B */
} comparison;

static void report_number(comparison *c, const char *key, double value)
{
    if (c->json) json_number(&c->j, key, value);
    else printf("\t%s %.6g", key, value);
}

static void report_snr(comparison *c, const char *key, const moq_linear *l, const moq_linear *truth)
{
    distance d;
    if (module_distance(l, truth, &d)) report_number(c, key, d.error > 0 ? 10 * log10(d.power / d.error) : INFINITY);
}

/* "BF16 [49152, 576]"; a scalar has the shape []. */
static void print_type(const moq_tensor *t)
{
    printf("%s [", moq_dtype_name(t->dtype));
    for (uint32_t k = 0; k < t->rank; k++) printf("%s%" PRIu64, k ? ", " : "", t->shape[k]);
    printf("]");
}

/* F32 holds every value of it, so that of two codes with the same value one is 0 and one -0. */
static int is_float(moq_dtype t) { return t == MOQ_F32 || t == MOQ_BF16 || t == MOQ_F16 || t == MOQ_F8_E4M3 || t == MOQ_F8_E5M2; }

/* One tensor: t of A, u of B; one of them may be missing. */
static void compare_tensor(comparison *c, const moq_tensor *t, const moq_tensor *u)
{
    const char *name = t ? t->name : u->name;
    int same_type = t && u && t->dtype == u->dtype && t->rank == u->rank && memcmp(t->shape, u->shape, sizeof t->shape[0] * t->rank) == 0;
    int equal = same_type && t->bytes == u->bytes && (t->bytes == 0 || memcmp(t->data, u->data, (size_t)t->bytes) == 0);
    moq_linear la, lb, ls;
    int module = t && u && c->a.ck && c->b.ck && module_of_tensor(c->a.ck, name, &la) && moq_find_linear(c->b.ck, la.name, &lb, NULL) == MOQ_OK;
    distance d;
    c->total++;
    c->equal += (size_t)equal;
    if (t && !u && c->a.ck && c->b.ck && module_of_tensor(c->a.ck, name, &la) && moq_find_linear(c->b.ck, la.name, &lb, NULL) == MOQ_OK)
        c->renamed += strcmp(la.tensor, lb.tensor) != 0;
    if (c->brief && equal) return;
    if (c->json) json_open(&c->j, NULL, '{');
    if (c->json) json_string(&c->j, "name", name);
    if (c->json) json_string(&c->j, "state", equal ? "equal" : !t ? "only in B" : !u ? "only in A" : same_type ? "bytes differ" : "type or shape differs");
    else printf("%s\t", name);
    if (!c->json && equal) printf("equal");
    else if (!c->json && !(t && u)) printf("only in %s", t ? c->a.path : c->b.path);
    else if (!c->json && !same_type) {
        print_type(t);
        printf(" against ");
        print_type(u);
    } else if (!c->json) printf("%" PRIu64 " of %" PRIu64 " bytes differ", differing_bytes(t, u), t->bytes);
    if (c->json && same_type && !equal) json_int(&c->j, "differing_bytes", (int64_t)differing_bytes(t, u));
    if (c->json && same_type && !equal) json_int(&c->j, "bytes", (int64_t)t->bytes);
    if (t && u && !equal && (module ? module_distance(&la, &lb, &d) : tensor_distance(t, u, &d))) {
        int same = same_type && d.error == 0 && (module || is_float(t->dtype));
        report_number(c, "relative_error", relative(&d));
        if (same && c->json) json_bool(&c->j, "same_values", 1);
        else if (same) printf("\t%s", module ? "the same values in other codes (0 and -0 are two)" : "only the signs of zeros differ");
    }
    if (module && c->source.ck && moq_find_linear(c->source.ck, la.name, &ls, NULL) == MOQ_OK) {
        report_snr(c, "snr_a_db", &la, &ls);
        report_snr(c, "snr_b_db", &lb, &ls);
    }
    if (c->json) json_close(&c->j, '}');
    else printf("\n");
}

static int verb_diff(const options *o)
{
    comparison c;
    size_t i = 0, k = 0;
    int bad;
    memset(&c, 0, sizeof c);
    c.j = json_to(stdout, 2);
    c.json = o->json;
    c.brief = o->brief;
    bad = open_side(&c.a, o->args[0]);
    if (!bad) bad = open_side(&c.b, o->args[1]);
    if (!bad && o->against) bad = open_side(&c.source, o->against);
    if (!bad && c.json) json_open(&c.j, NULL, '{');
    if (!bad && c.json) json_open(&c.j, "tensors", '[');
    while (!bad && !stop_requested && (i < side_count(&c.a) || k < side_count(&c.b))) {
        const moq_tensor *t = i < side_count(&c.a) ? side_get(&c.a, i) : NULL, *u = k < side_count(&c.b) ? side_get(&c.b, k) : NULL;
        int order = !t ? 1 : !u ? -1 : strcmp(t->name, u->name);
        compare_tensor(&c, order <= 0 ? t : NULL, order >= 0 ? u : NULL);
        i += order <= 0;
        k += order >= 0;
    }
    if (!bad && stop_requested) bad = refuse("stopped");
    if (!bad && c.json) {
        json_close(&c.j, ']');
        json_int(&c.j, "equal", (int64_t)c.equal);
        json_int(&c.j, "total", (int64_t)c.total);
        json_close(&c.j, '}');
    } else if (!bad) printf("equal %zu/%zu tensors\n", c.equal, c.total);
    if (!bad && c.renamed) {
        fflush(stdout);
        fprintf(stderr, "moq: note: %zu layers are stored under other names in %s; `moq dequant DIR --hash` of both folders compares their values "
                "(NVFP4 in compressed-tensors: its inverted global scale rounds the last bit of most)\n",
                c.renamed, c.b.path);
    }
    close_side(&c.a);
    close_side(&c.b);
    close_side(&c.source);
    return bad ? bad : c.equal != c.total;
}

#include "moq_measure.h"
#include "moq_quantize.h"
#include "moq_autoquant.h"
#include "moq_picture.h"

/* ------------------------------------------------------------------------------------------------
   >>verbs           the table of verbs, help, main
   ------------------------------------------------------------------------------------------------ */

#define ENGINE_OPTIONS "context chunk head weights quantize max-memory "

static const verb_row verb_table[] = {
    {"inspect", verb_inspect, 1, 1, "DIR", "json context chunk head weights explain png against",
     "Architecture, recipe, KV format; every module with its scheme, shape, bits per weight and bytes; totals and a memory plan.\n"
     "--png: a picture of where the bytes are, layer by layer, and of bits per weight; with --against SRC of the error instead.",
     "moq inspect Llama-3.1-8B-Instruct-NVFP4 --context 8192 --explain"},
    {"verify", verb_verify, 1, 1, "DIR or FILE.safetensors", "json deep",
     "Checks every rule of the container and of the quantization. Silent when sound; findings one a line, then exit status 1.",
     "moq verify Llama-3.1-8B-Instruct-NVFP4 --deep"},
    {"dequant", verb_dequant, 1, 1, "DIR (--hash or --out DST)", "json hash out dtype",
     "Hashes of every quantized weight, or an unquantized folder.\n"
     "--hash: name, shape and FNV-1a-64 of the F32 values. --out: a folder that any other tool reads; what layers do to their\n"
     "inputs (pre_quant_scale, Hadamard transform) and low-rank branches are multiplied into the weights.",
     "moq dequant my-model-nvfp4 --out my-model-bf16 --dtype bf16"},
    {"logits", verb_logits, 1, 1, "DIR --tokens T --out FILE.safetensors", ENGINE_OPTIONS "tokens out",
     "Runs rows of token ids of one length; writes `logits`, F32 [batch, length, vocabulary].",
     "moq logits my-model --tokens inputs.json#eval --act stored --out logits.safetensors"},
    {"eval", verb_eval, 1, 1, "DIR --data D", ENGINE_OPTIONS "json data limit seq against",
     "Right answers and likelihood of chat rows, perplexity of text.\n"
     "Chat rows (.jsonl): greedy answers that match exactly, mean negative log-likelihood of the answers' tokens.\n"
     "Text (.txt, .jsonl rows {\"text\"}, each cut by itself) or tokens: perplexity over windows of --seq.\n"
     "--against DIR2: also the mean KL divergence of the next-token distributions from DIR2's.",
     "moq eval my-model-nvfp4 --data eval.jsonl --limit 200 --against my-model"},
    {"run", verb_run, 1, 1, "DIR",
     ENGINE_OPTIONS "json system prompt max-tokens temp top-k top-p min-p repeat-penalty presence-penalty frequency-penalty seed raw stats json-schema grammar",
     "Answers a prompt, streaming. Without --prompt: what stands on stdin, or a chat on a terminal.\n"
     "An answer ends where the model ends its turn; one that never does goes on until the context is full, unless --max-tokens says less.\n"
     "A small model that says the same over and over: --repeat-penalty 1.1, also without --temp.",
     "moq run my-model --system 'You are brief.' --prompt 'What is the capital of France?' --stats"},
    {"tokenize", verb_tokenize, 1, 1, "DIR", "decode file",
     "Lines of text to lines of comma-separated token ids, with the tokens that the folder puts around a text; --decode: the reverse.",
     "echo 'Hello there' | moq tokenize my-model"},
    {"recipes", verb_recipes, 0, 0, "", "json",
     "Every recipe: what it quantizes, formats of weights and inputs, calibration, ModelOpt's name; and those of KV caches.", "moq recipes"},
    {"quantize", verb_quantize, 2, 2, "SRC DST --recipe R",
     "json recipe calib samples seq batch save-calibration calibration max-memory exclude rule format shard",
     "Quantizes a float checkpoint folder as ModelOpt would write it; DST must not exist. Layers of SRC that are quantized already (models that come\n"
     "in FP8 or MXFP4 only) are decoded first, and a note says so.\n"
     "Recipes that search or scale inputs run the model on --calib D first, or take --calibration FILE with recorded values;\n"
     "weight-only and MX recipes need neither. Rows of .jsonl files (texts, or conversations in the folder's chat frame) and of\n"
     "lists of token lists end after --seq tokens; a .txt or a single list of tokens is cut into rows of that length.",
     "moq quantize my-model my-model-nvfp4 --recipe nvfp4_awq_lite --calib calib.jsonl --samples 128"},
    {"autoquant", verb_autoquant, 1, 2, "SRC DST --bits X --recipes A,B --calib D",
     "json bits recipes method calib samples seq batch search save-search calibration active-experts exclude shard",
     "Chooses a recipe for each layer within a budget of bits, as ModelOpt's AutoQuantize does, and writes DST; without DST it only searches.\n"
     "Layers that share an input, and all experts of a layer, get the same recipe. --method gradient: what a change of a layer's output costs,\n"
     "by the gradient of the next-token loss; kl: how far the model's next-token distributions move. --search FILE reuses recorded scores.",
     "moq autoquant my-model my-model-5.5 --bits 5.5 --recipes nvfp4,fp8 --calib calib.jsonl --samples 128 --save-search scores.json"},
    {"convert", verb_convert, 2, 2, "SRC DST --to F", "json to recipe shard",
     "The same codes and scales in the other container.\n"
     "Weights dequantize to the same values, but for NVFP4 in or from compressed-tensors: that stores the inverse of the global scale,\n"
     "whose rounding moves most F32 values by their last bit.\n"
     "SRC may be of any family that opens (ModelOpt, compressed-tensors, FP8 blocks, AWQ, GPTQ, gpt-oss); DST must not exist.\n"
     "A layer that the container cannot hold is named and nothing is written. --recipe nvfp4 casts MXFP4 layers to weight-only\n"
     "NVFP4 of the same values, and says where exponents lie too far apart for that.",
     "moq convert my-model-nvfp4 my-model-ct --to compressed-tensors"},
    {"diff", verb_diff, 2, 2, "A B", "json brief against",
     "Compares two folders or safetensors files tensor by tensor.\n"
     "A line for each: equal, or how many bytes differ and the relative error of the values.\n"
     "--brief: only tensors that differ. --against SRC: also the signal-to-noise ratio of each side's weights. Exit status 1 when anything differs.",
     "moq diff my-nvfp4 their-nvfp4 --against my-model"},
    {"bench", verb_bench, 0, 1, "[DIR]", ENGINE_OPTIONS "json scheme shape m copies encode",
     "How fast layers with random weights are, or a model.\n"
     "Of layers: time, GB/s of weights, GFLOP/s, speed over that of a plain read of the same bytes and, on a\n"
     "GPU, over that of cuBLAS with BF16 weights where it is installed.\n"
     "With DIR: prompt and generation tokens per second. With --encode: how fast one core quantizes BF16 weights to each format.",
     "moq bench --scheme nvfp4 --shape 4096x14336 --m 1,8"},
    {"selftest", verb_selftest, 0, 0, "", "json", "Every kernel against float64 on random data with outliers and odd shapes.", "moq selftest"}
};

static const verb_row *find_verb(const char *name)
{
    for (int i = 0; i < COUNT(verb_table); i++)
        if (strcmp(verb_table[i].name, name) == 0) return &verb_table[i];
    return NULL;
}

static int refuse_verb(const char *name)
{
    for (int i = 0; i < COUNT(verb_table); i++)
        if (moq_is_slip(name, verb_table[i].name)) return refuse("there is no verb '%s'; is %s meant? Try: moq help", name, verb_table[i].name);
    return refuse("there is no verb '%s'; moq help lists them", name);
}

static int help_all(void)
{
    printf("moq - inspect, verify, run and quantize model checkpoints\n\nusage: moq VERB ARGUMENTS\n\n");
    for (int i = 0; i < COUNT(verb_table); i++) {
        const verb_row *v = &verb_table[i];
        int first = (int)strcspn(v->help, ".;\n");
        printf("  %-9s %-40s %.*s\n", v->name, v->arguments, first, v->help);
    }
    printf("\n  help [VERB], --version\n\nExit status: 0 done or right, 1 checked and found wanting, 2 refused; stopped by a signal, as by that signal.\n");
    return 0;
}

static int help_verb(const verb_row *v)
{
    int computes = !in_list("verify dequant tokenize recipes diff", v->name), writes = in_list("quantize autoquant", v->name);
    printf("usage: moq %s%s%s%s\n\n%s\n\n", v->name, v->arguments[0] ? " " : "", v->arguments, v->options[0] ? " [options]" : "", v->help);
    for (int i = 0; i < COUNT(option_table); i++) {
        const option_row *row = &option_table[i];
        char name[64];
        snprintf(name, sizeof name, "--%s %s", row->name, row->value);
        if (row->at == FIELD(kv) && v->run == verb_convert) continue;
        if (in_list(v->options, row->name) || (computes && in_list(COMMON_OPTIONS, row->name)))
            printf("  %-18s %s\n", name, row->at == FIELD(kv) && writes ? "KV cache that the folder asks for: " FOLDER_KV : row->help);
    }
    if (in_list(v->options, "quantize"))
        printf("\nrecipes that need no data, for --quantize:\n"
               "  w4a16_nvfp4 nvfp4 nvfp4_four_over_six nvfp4_w4a4_weight_mse_fp8_sweep nvfp4_mse nvfp4_fp8_mha nvfp4_mlp_only nvfp4_omlp_only\n"
               "  nvfp4_mlp_weight_only fp8_per_channel_per_token fp8_2d_blockwise_weight_only int8_weight_only int4_mse\n"
               "  int4_blockwise_weight_only mxfp4 mxfp4_mlp_weight_only w4a8_mxfp4_fp8 mxfp6 mxfp6_e2m3 mxfp8 mxint8\n");
    if (strcmp(v->name, "bench") == 0) {
        printf("\nkinds of layers:");
        for (int i = 0; i < COUNT(layer_kinds); i++) printf("%s%s", i % 8 ? " " : "\n  ", layer_kinds[i].name);
        printf("\n");
    }
    printf("\nexample: %s\n", v->example);
    return 0;
}

/* What goes to a full disk or a closed pipe is no result: 0 becomes a refusal, and so does 1, whose findings are lost. */
static int flushed(int bad)
{
    int failed = fflush(stdout) != 0, before = !failed && ferror(stdout); /* of an earlier flush the reason is not known any more */
    if (bad == 2 || (!failed && !before)) return bad;
    return refuse("stdout: %s", before ? "cannot be written; is the disk full?" : strerror(errno));
}

static int print_version(void)
{
#if defined(__clang__)
    const char *compiler = "clang " __clang_version__;
#elif defined(__VERSION__)
    const char *compiler = "gcc " __VERSION__;
#else
    const char *compiler = "unknown";
#endif
#ifdef MOQ_CUDA_TARGETS
    const char *cuda = MOQ_CUDA_TARGETS;
#elif defined(MOQ_CUDA)
    const char *cuda = "built in";
#else
    const char *cuda = "not built in";
#endif
    printf("moq %s\ncompiler: %s\ncpu: %s, %d cores\ncuda: %s\n", MOQ_VERSION, compiler, moq_cpu_features(), moq_cpu_count(), cuda);
    return 0;
}

/* Names of recipes and KV caches, before anything is opened. */
static int check_names(const options *o, const verb_row *verb)
{
    moq_kv_format kv;
    int bad = o->recipe ? check_recipe(o->recipe) : 0;
    if (!bad && o->quantize) bad = check_recipe(o->quantize);
    if (!bad && o->weights && strcmp(o->weights, "mapped") != 0 && strcmp(o->weights, "copied") != 0)
        bad = refuse("--weights: '%s' is not known; there are mapped and copied", o->weights);
    for (int i = 0; !bad && i < o->rule.count; i++)
        if (strchr(o->rule.item[i], '=')) bad = check_recipe(strrchr(o->rule.item[i], '=') + 1);
    if (bad || !o->kv || strcmp(o->kv, "auto") == 0 || moq_kv_format_find(o->kv, &kv)) return bad;
    if (in_list("quantize autoquant", verb->name))
        return refuse("--kv is " FOLDER_KV ", not '%s'", o->kv);
    return strcmp(o->kv, "bf16") == 0 ? 0 : refuse("--kv is auto, " CACHE_KV ", not '%s'", o->kv);
}

/* Is `folder` the folder that `path` lies in, or one further out (deep)? */
static int lies_in(const char *path, const char *folder, int deep)
{
    size_t length = strlen(path);
    struct stat here, top, last;
    char *at = join(path, "", "");
    int found = 0;
    while (length > 1 && at[length - 1] == '/') length--;
    while (length > 0 && at[length - 1] != '/') length--;
    at[length] = 0;
    memset(&last, 0, sizeof last);
    for (int i = 0; stat(folder, &top) == 0 && i < (deep ? 64 : 1) && !found; i++) {
        char *up = join(at, at[0] ? "../" : "./../", "");
        if (stat(at[0] ? at : ".", &here) != 0 || (here.st_dev == last.st_dev && here.st_ino == last.st_ino)) i = 64; /* the root is its own parent */
        else found = here.st_dev == top.st_dev && here.st_ino == top.st_ino;
        last = here;
        free(at);
        at = up;
    }
    free(at);
    return found;
}

/* A file to be written when the work is done, which may take long. */
static int check_file(const char *target, const char *source)
{
    struct stat info;
    const char *base = base_name(target);
    char *parent = join(target, "", "");
    int there = stat(target, &info) == 0, bad = 0;
    parent[base - target] = 0;
    if (!there && lstat(target, &info) == 0) bad = refuse("%s: is a link to nothing; choose another target or remove it first", target);
    else if (there && S_ISDIR(info.st_mode)) bad = refuse("%s: is a folder; a file of that name cannot be written", target);
    else if (there && !S_ISREG(info.st_mode)) bad = refuse("%s: is a device or a pipe; name a file", target);
    else if (there && lies_in(target, source, 0))
        bad = refuse("%s: is a file of the source; choose another target", target);
    else if (parent[0] && stat(parent, &info) != 0 && errno == ENOENT)
        bad = refuse("%s: its parent folder '%s' does not exist; create that first", target, parent);
    else if (access(parent[0] ? parent : ".", W_OK) != 0)
        bad = refuse_target(target, errno);
    free(parent);
    return bad;
}

/* Is `target` what `input` reads, a file or a FILE.json#KEY? */
static int is_input(const char *target, const char *input)
{
    struct stat here, there;
    char *path = input ? join(input, "", "") : NULL;
    int same = 0;
    if (path) {
        path[strcspn(path, "#")] = 0;
        same = stat(target, &here) == 0 && stat(path, &there) == 0 && here.st_dev == there.st_dev && here.st_ino == there.st_ino;
    }
    free(path);
    return same;
}

/* Nothing that is read is overwritten, no folder is built inside the source, and no link that leads nowhere is replaced. */
static int check_targets(const options *o, const verb_row *verb)
{
    const char *targets[] = {o->arg_count > 1 && verb->run != verb_diff ? o->args[1] : NULL, o->out, o->save_calibration, o->save_search, o->png};
    const char *inputs[] = {o->tokens, o->data, o->calib, o->calibration};
    for (int i = 0; i < COUNT(targets); i++) {
        const char *target = targets[i];
        const int folder = i == 0 || verb->run == verb_dequant;
        if (!target) continue;
        if (folder && lies_in(target, o->args[0], 1)) return refuse("%s: lies inside the source %s; choose a target outside it", target, o->args[0]);
        if (!folder && check_file(target, o->args[0])) return 2;
        if (!folder && o->against && lies_in(target, o->against, 0)) return refuse("%s: is a file of the source; choose another target", target);
        for (int k = 0; k < COUNT(inputs); k++)
            if (is_input(target, inputs[k])) return refuse("%s: is read by this command; choose another target", target);
        note_leftovers(target);
    }
    return 0;
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "";
    const verb_row *verb;
    moq_act act;
    options o;
    int bad;
    if (!name[0]) return refuse("say what to do: moq help lists the verbs");
    if (strcmp(name, "--version") == 0 || strcmp(name, "version") == 0) return flushed(print_version());
    if (strcmp(name, "help") == 0 || strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) {
        if (argc < 3) return flushed(help_all());
        verb = find_verb(argv[2]);
        return verb ? flushed(help_verb(verb)) : refuse_verb(argv[2]);
    }
    verb = find_verb(name);
    if (!verb) return refuse_verb(name);
    memset(&o, 0, sizeof o);
    bad = parse_options(&o, verb, argc - 2, argv + 2);
    if (bad) return bad;
    if (o.help) return flushed(help_verb(verb));
    if (parse_act(o.act, &act) || check_names(&o, verb) || check_targets(&o, verb)) return 2;
    catch_interrupt();
    bad = verb->run(&o);
    drop_unfinished();
    bad = flushed(bad);
    if (bad == 2 && stop_requested) { /* the caller sees what ended the work: a shell 128 + its number */
        signal(stop_signal, SIG_DFL);
        raise(stop_signal);
    }
    return bad;
}
