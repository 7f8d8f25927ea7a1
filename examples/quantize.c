/* quantize.c - a model folder and some conversations in, the quantized folder that NVIDIA ModelOpt would have written out.

       cc -O2 quantize.c -o quantize -lm -pthread
       ./quantize SOURCE TARGET [RECIPE [ROWS]]        nvfp4, calibrated with ../tests/data/demo-eval.jsonl, unless said otherwise

   ROWS has an object a line: {"system": ..., "user": ..., "assistant": ...}; `moq quantize` reads plain text and tokens too. */
#define MOQ_QUANTIZE
#define MODELOPT_Q_IMPLEMENTATION
#include "../modelopt_q.h"
#define LLM_IMPLEMENTATION
#include "llm.h"
#include <stdio.h>
#include <string.h>
enum { ROWS = 64, TOKENS = 128 };
static int32_t ids[ROWS][TOKENS], lengths[ROWS];   /* what the model reads while its layers are watched */
static const int32_t *rows[ROWS];

static uint64_t pass, passes = 1; /* of the model over all rows */

static void show(const char *what, uint64_t done, uint64_t total)
{
    static const char *last;
    static int shown;
    if (what != last) last = what, shown = -1;
    if (total && (int)(100 * done / total) > shown) fprintf(stderr, "\r%s %3d %% ", what, shown = (int)(100 * done / total));
}

/* Returning 1 from these would stop the work, and nothing would be left of it. llm_calibrate counts the rows of a pass: */
static int on_rows(void *user, moq_stage stage, uint64_t done, uint64_t total)
{
    (void)user, (void)stage;
    show("watching the model", pass * total + done, passes * total);
    return 0;
}

/* and moq_quantize the passes, then what it writes. */
static int on_work(void *user, moq_stage stage, uint64_t done, uint64_t total)
{
    (void)user;
    if (stage == MOQ_STAGE_CALIBRATE) pass = done, passes = total;
    else show("writing", done, total);
    return 0;
}

/* The tokens of one line, framed as the model knows conversations: calibrated with the bare JSON, it would watch what it never reads. */
static size_t read_row(const llm_tokenizer *words, const char *name, const char *line, int32_t *out, moq_error *err)
{
    static const char *const roles[] = {"system", "user", "assistant"};
    llm_message turns[3];
    size_t count = 0, n = SIZE_MAX;
    moq_json_doc *doc = moq_json_parse(line, strcspn(line, "\r\n"), MOQ_JSON_STRICT, 0, name, NULL, err);
    for (int i = 0; doc && i < 3; i++) {
        turns[count].role = roles[i];
        turns[count].text = moq_json_string(moq_json_find(moq_json_root(doc), roles[i]));
        count += turns[count].text != NULL;
    }
    if (doc && !count) moq_fail(err, MOQ_E_CONFIG, name, "has none of \"system\", \"user\" and \"assistant\"");
    if (doc && count) n = llm_frame(words, turns, count, 0, out, TOKENS, err);
    moq_json_destroy(doc);
    return n;
}

static int read_rows(const char *source, const char *path, llm_samples *samples, moq_error *err)
{
    static char line[1 << 16], name[300];
    size_t n = 0;
    int number = 0;
    moq_checkpoint *ck = moq_open(source, NULL, err);
    llm_tokenizer *words = ck ? llm_tokenizer_open(ck, err) : NULL;
    FILE *file = words ? fopen(path, "r") : NULL;
    if (words && !file) moq_fail(err, MOQ_E_NOTFOUND, path, "cannot be read; give a file with a conversation on each line");
    while (file && n != SIZE_MAX && samples->count < ROWS && fgets(line, sizeof line, file)) {
        snprintf(name, sizeof name, "%s, row %d", path, ++number);
        n = line[strspn(line, " \t\r\n")] ? read_row(words, name, line, ids[samples->count], err) : 0;
        rows[samples->count] = ids[samples->count], lengths[samples->count] = n < TOKENS ? (int32_t)n : TOKENS;
        samples->count += n > 0 && n != SIZE_MAX;
    }
    if (file) fclose(file);
    llm_tokenizer_close(words);
    moq_close(ck);
    return file && n != SIZE_MAX;
}

int main(int argc, char **argv)
{
    static moq_quantize_desc q;
    static llm_samples samples;
    moq_error err;
    if (argc < 3) return puts("usage: quantize SOURCE TARGET [RECIPE [ROWS]]     e.g. quantize my-model my-model-fp8 fp8 rows.jsonl"), 2;
    samples.rows = rows, samples.lengths = lengths;
    samples.batch = 8;                             /* averages are taken over 8 rows at a time */
    samples.progress = on_rows, q.progress = on_work;
    q.source = argv[1], q.target = argv[2];
    q.recipe = argc > 3 ? argv[3] : "nvfp4";
    q.calibrate = llm_calibrate;                   /* runs the model; only for recipes that need to see inputs */
    q.data = &samples;
    if (!read_rows(q.source, argc > 4 ? argv[4] : "../tests/data/demo-eval.jsonl", &samples, &err) || moq_quantize(&q, &err) != MOQ_OK)
        return puts(err.text), 1;
    printf("%s: %s, calibrated with %d rows\n", q.target, q.recipe, (int)samples.count);
    return 0;
}
