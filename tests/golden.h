/* golden.h - what tests of the engine share: paths and files of the golden checkpoints, their tokens, distances of logits. */
#ifndef GOLDEN_H
#define GOLDEN_H

#include <dirent.h>
#include <math.h>
#include <stdarg.h>
#include <time.h>
#include <unistd.h>

#define LLM_IMPLEMENTATION
#include "../examples/llm.h"

#ifndef GOLDEN_DIR
#define GOLDEN_DIR TEST_DIR "/data/golden"
#endif
#define DEMO_DIR TEST_DIR "/../examples/demo-model"

/* The path of something in GOLDEN_DIR; good for seven further calls. */
MOQI_UNUSED static const char *golden(const char *format, ...)
{
    static char text[8][1200];
    static int turn;
    va_list args;
    turn = (turn + 1) & 7;
    int n = snprintf(text[turn], sizeof text[turn], "%s/", GOLDEN_DIR);
    va_start(args, format);
    vsnprintf(text[turn] + n, sizeof text[turn] - (size_t)n, format, args);
    va_end(args);
    return text[turn];
}

/* Processor time of this thread: other programs do not count. */
MOQI_UNUSED static double own_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

MOQI_UNUSED static int is_there(const char *path) { return access(path, R_OK) == 0; }

/* Files of a folder, and the folder. */
MOQI_UNUSED static void remove_dir(const char *path)
{
    char text[2400];
    DIR *d = opendir(path);
    if (!d) return;
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        if (e->d_name[0] == '.') continue;
        snprintf(text, sizeof text, "%s/%s", path, e->d_name);
        unlink(text);
    }
    closedir(d);
    rmdir(path);
}

/* NULL when there is no such file. Destroy with moq_json_destroy. */
MOQI_UNUSED static moq_json_doc *read_doc(const char *path)
{
    size_t bytes = 0;
    moq_error err;
    char *text = moq_read_file(path, 1 << 26, NULL, &bytes, &err);
    if (!text) return NULL;
    moq_json_doc *doc = moq_json_parse(text, bytes, MOQ_JSON_CONFIG, 0, path, NULL, &err);
    if (!doc) fprintf(stderr, "%s\n", err.text);
    moq_release(NULL, text, bytes + 1);
    return doc;
}

/* Row i of a list of lists of token ids -> its length; at most `most` are taken. */
static int32_t golden_row(const moq_json *list, uint32_t i, int32_t *tokens, uint32_t most)
{
    const moq_json *row = moq_json_at(list, i);
    uint32_t n = row && row->count < most ? row->count : row ? most : 0;
    for (uint32_t k = 0; k < n; k++) {
        int64_t v = -1;
        moq_json_int(moq_json_at(row, k), &v);
        tokens[k] = (int32_t)v;
    }
    return (int32_t)n;
}

#ifdef MOQ_QUANTIZE
/* The calibration rows of 24 tokens, in batches of 4. */
typedef struct golden_rows {
    int32_t tokens[16][32], lengths[16];
    const int32_t *rows[16];
    llm_samples samples;
} golden_rows;

/* The first `count` <= 16 of them; 0: there are fewer. */
MOQI_UNUSED static int load_rows(golden_rows *g, const char *source, int32_t count)
{
    moq_json_doc *doc = read_doc(golden("sources/%s/inputs.json", source));
    const moq_json *list = doc ? moq_json_find(moq_json_root(doc), "calib") : NULL;
    memset(g, 0, sizeof *g);
    for (int32_t i = 0; list && i < (int32_t)list->count && i < count; i++, g->samples.count++) {
        g->lengths[i] = golden_row(list, (uint32_t)i, g->tokens[i], 32);
        g->rows[i] = g->tokens[i];
    }
    g->samples.rows = g->rows;
    g->samples.lengths = g->lengths;
    g->samples.batch = 4;
    moq_json_destroy(doc);
    return g->samples.count == count;
}
#endif

/* The two rows whose logits are recorded. */
enum { TOKENS = 24, VOCAB = 256 };

MOQI_UNUSED static int read_eval(const char *inputs, int32_t ids[2][TOKENS])
{
    moq_json_doc *doc = read_doc(inputs);
    const moq_json *list = doc ? moq_json_find(moq_json_root(doc), "eval") : NULL;
    int good = list != NULL;
    for (uint32_t r = 0; r < 2 && good; r++) good = golden_row(list, r, ids[r], TOKENS) == TOKENS;
    moq_json_destroy(doc);
    return good;
}

/* Relative rms of a - b against b. */
MOQI_UNUSED static double relative_rms(const float *a, const float *b, size_t n)
{
    double d = 0, s = 0;
    for (size_t i = 0; i < n; i++) {
        double e = (double)a[i] - (double)b[i];
        d += e * e;
        s += (double)b[i] * (double)b[i];
    }
    return s > 0 && d == d ? sqrt(d / s) : d == 0 ? 0 : 1e30;
}

MOQI_UNUSED static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

MOQI_UNUSED static llm *open_or_say(const llm_desc *d)
{
    moq_error e;
    llm *m = llm_open(d, &e);
    if (!m) fprintf(stderr, "%s\n", e.text);
    CHECK(m != NULL);
    return m;
}
#endif
