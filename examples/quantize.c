/* quantize.c - a model folder and some lines of text in, a quantized folder out.

       cc -O2 quantize.c -o quantize -lm -pthread
       ./quantize SOURCE TARGET [RECIPE [TEXT]]        nvfp4, calibrated with the lines of ../tests/data/demo-eval.jsonl, unless said otherwise

   TEXT has a sample a line: plain text, or an object {"text": ...} or {"system": ..., "user": ..., "assistant": ...} as in .jsonl files.

   The folder is the one that NVIDIA ModelOpt would have written. Ctrl-C is heard by programs that return 1 from show(). */
#define MOQ_QUANTIZE
#define MODELOPT_Q_IMPLEMENTATION
#include "../modelopt_q.h"
#define LLM_IMPLEMENTATION
#include "llm.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 64, TOKENS = 128 };

static int32_t ids[ROWS][TOKENS];   /* what the model reads while its layers are watched */
static const int32_t *rows[ROWS];
static int32_t lengths[ROWS];

/* A line for every tenth of the work; returning 1 would stop it, and nothing would be left. `user` tells the samples from their passes. */
static int show(void *user, moq_stage stage, uint64_t done, uint64_t total)
{
    static int shown = -1;
    int tenths = total ? (int)(10 * done / total) : 10, watching = stage == MOQ_STAGE_CALIBRATE;
    if ((watching && !user) || tenths == shown) return 0;
    shown = tenths;
    fprintf(stderr, "%s %3d %%\n", watching ? "watching the model" : "writing", 10 * tenths);
    return 0;
}

/* The ids of one line. A conversation is framed as the model knows it: calibrated with the bare JSON, it would watch what it never reads. */
static size_t read_line(const llm_tokenizer *words, const char *line, size_t bytes, int32_t *out, moq_error *err)
{
    static const char *const roles[] = {"system", "user", "assistant"};
    llm_message turns[3];
    size_t count = 0, n = SIZE_MAX;
    moq_json_doc *doc = line[0] == '{' ? moq_json_parse(line, bytes, MOQ_JSON_STRICT, 0, "sample", NULL, err) : NULL;
    const moq_json *root = moq_json_root(doc);
    const char *text = doc ? moq_json_string(moq_json_find(root, "text")) : line;
    for (int i = 0; doc && i < 3; i++) {
        turns[count].role = roles[i];
        turns[count].text = moq_json_string(moq_json_find(root, roles[i]));
        count += turns[count].text != NULL;
    }
    if (line[0] == '{' && !doc) return SIZE_MAX;
    if (text) n = llm_encode(words, text, doc ? strlen(text) : bytes, 0, out, TOKENS);
    else if (count) n = llm_frame(words, turns, count, 0, out, TOKENS, err);
    else moq_fail(err, MOQ_E_ARG, "sample", "has neither \"text\" nor \"user\"");
    moq_json_destroy(doc);
    return n;
}

/* Every line of a text file becomes a row of tokens. */
static int read_rows(const char *source, const char *path, llm_samples *samples, moq_error *err)
{
    char line[8192];
    int bad = 0;
    moq_checkpoint *ck = moq_open(source, NULL, err);
    llm_tokenizer *words = ck ? llm_tokenizer_open(ck, err) : NULL;
    FILE *file = words ? fopen(path, "r") : NULL;
    if (words && !file) moq_fail(err, MOQ_E_NOTFOUND, path, "cannot be read; give a file with a line of text for each sample");
    while (file && samples->count < ROWS && fgets(line, sizeof line, file)) {
        size_t n = read_line(words, line, strcspn(line, "\r\n"), ids[samples->count], err);
        if (n == SIZE_MAX) bad = 1;
        if (n == SIZE_MAX) break;
        if (n == 0) continue;
        rows[samples->count] = ids[samples->count];
        lengths[samples->count++] = n < TOKENS ? (int32_t)n : TOKENS;
    }
    if (file) fclose(file);
    llm_tokenizer_close(words);
    moq_close(ck);
    return file && !bad;
}

int main(int argc, char **argv)
{
    moq_error err;
    moq_quantize_desc q;
    llm_samples samples;
    if (argc < 3) { puts("usage: quantize SOURCE TARGET [RECIPE [TEXT]]     e.g. quantize my-model my-model-fp8 fp8 lines.txt"); return 2; }
    memset(&samples, 0, sizeof samples);
    samples.rows = rows;
    samples.lengths = lengths;
    samples.batch = 8;
    samples.progress = show;
    samples.progress_user = &samples;
    memset(&q, 0, sizeof q);
    q.source = argv[1];
    q.target = argv[2];
    q.recipe = argc > 3 ? argv[3] : "nvfp4";
    q.calibrate = llm_calibrate;                     /* runs the model; only for recipes that need to see inputs */
    q.data = &samples;
    q.progress = show;
    if (!read_rows(q.source, argc > 4 ? argv[4] : "../tests/data/demo-eval.jsonl", &samples, &err) || moq_quantize(&q, &err) != MOQ_OK) {
        puts(err.text);
        return 1;
    }
    printf("%s: %s, calibrated with %d rows\n", q.target, q.recipe, (int)samples.count);
    return 0;
}
