/* Golden logits and the demo model's answers through the CUDA backend.
   MOQ_GOLDEN: a folder with all golden checkpoints instead of the subset in tests/data/golden. MOQ_DATA: tests/data, for a program that moved. */
#include "../test.h"
#include "../golden.h"

static const char *data_path(const char *tail)
{
    static char text[4][1024];
    static int turn;
    const char *set = getenv("MOQ_GOLDEN"), *data = getenv("MOQ_DATA");
    turn = (turn + 1) & 3;
    if (set && strncmp(tail, "golden/", 7) == 0) snprintf(text[turn], sizeof text[turn], "%s/%s", set, tail + 7);
    else if (data) snprintf(text[turn], sizeof text[turn], "%s/%s", data, tail);
    else snprintf(text[turn], sizeof text[turn], "%s/../data/%s", TEST_DIR, tail);
    return text[turn];
}

static moq_backend *cuda_backend(moq_act act)
{
    moq_cuda_desc d;
    moq_error err;
    memset(&d, 0, sizeof d);
    d.act = act;
    moq_backend *be = moq_cuda_backend_with(&d, &err);
    if (!be) { fprintf(stderr, "%s\n", err.text); exit(2); }
    return be;
}

/* ---- golden logits ---- */

/* One key of logits.safetensors, whole rows at once and token by token: wide is continuous, the stored ones compare by the median over tokens. */
static void check_logits(const char *dir, const moq_tensor *want, moq_act act, const char *kv, int32_t ids[2][TOKENS])
{
    moq_error e;
    double error[2 * TOKENS], total;
    size_t rows = want->rank == 3 ? (size_t)want->shape[0] : 0, row = (size_t)TOKENS * VOCAB;
    float *got = (float *)malloc(2 * row * sizeof *got), *expected = (float *)malloc(2 * row * sizeof *expected);
    moq_backend *be = cuda_backend(act);
    llm_desc d;
    memset(&d, 0, sizeof d);
    d.no_tokenizer = 1;
    d.path = dir;
    d.kv = kv;
    d.slots = 2;
    d.backend = be;
    llm *m = llm_open(&d, &e);
    if (!m) fprintf(stderr, "%s: %s\n", dir, e.text);
    CHECK(m && rows >= 1 && rows <= 2 && want->shape[1] == TOKENS && want->shape[2] == VOCAB && got && expected);
    for (int single = 0; m && rows >= 1 && rows <= 2 && single < 2; single++) {
        CHECK(moq_to_f32(want->dtype, want->data, rows * row, expected));
        for (size_t r = 0; r < rows; r++)
            for (int t = 0; t < TOKENS; t += single ? 1 : TOKENS)
                if (llm_forward(m, (int32_t)r, ids[r] + t, single ? 1 : TOKENS, t, got + r * row + (size_t)t * VOCAB, NULL, &e) != MOQ_OK) { fprintf(stderr, "%s\n", e.text); CHECK(0); }
        for (size_t t = 0; t < rows * TOKENS; t++) error[t] = relative_rms(got + t * VOCAB, expected + t * VOCAB, VOCAB);
        qsort(error, rows * TOKENS, sizeof *error, compare_double);
        total = relative_rms(got, expected, rows * row);
        int good = act == MOQ_ACT_WIDE ? total <= 1e-5 : act == MOQ_ACT_AUTO ? error[rows * TOKENS / 2] <= 0.2 : error[rows * TOKENS / 2] <= 1e-4 && total <= 0.05;
        if (!good) fprintf(stderr, "%s %s%s: total %.3g, median token %.3g\n", dir, want->name, single ? ", one token a call" : "", total, error[rows * TOKENS / 2]);
        CHECK(good);
    }
    llm_close(m);
    moq_backend_destroy(be);
    free(got);
    free(expected);
}

static int golden_cases;

static void check_case(const char *group, const char *name)
{
    char tail[300], dir[512], file[600], source[64], inputs[512];
    int32_t ids[2][TOKENS];
    moq_error e;
    int known = 0;
    snprintf(source, sizeof source, "%.*s", (int)strcspn(name, "-"), name);
    for (size_t i = 0; i < LLMI_COUNT(llmi_families); i++) known |= strcmp(source, llmi_families[i].model_type) == 0;
    snprintf(tail, sizeof tail, "golden/%s/%s", group, name);
    snprintf(dir, sizeof dir, "%s", data_path(tail));
    snprintf(file, sizeof file, "%s/logits.safetensors", dir);
    if (!known || (strcmp(group, "sources") == 0 && !moqi_file_exists(file))) return; /* the subset has only the inputs of some sources */
    snprintf(tail, sizeof tail, "golden/sources/%s/inputs.json", source);
    snprintf(inputs, sizeof inputs, "%s", data_path(tail));
    moq_st *st = moq_st_open(file, NULL, &e);
    CHECK(st != NULL && read_eval(inputs, ids));
    if (st) {
        const moq_tensor *wide = moq_st_find(st, "wide"), *stored = moq_st_find(st, "as_stored"), *kv = moq_st_find(st, "as_stored_kv");
        int kv_in_stored = strcmp(name, "llama-fp8-kv") == 0; /* this case rounds K and V in as_stored */
        CHECK(wide != NULL);
        if (wide) check_logits(dir, wide, MOQ_ACT_WIDE, "wide", ids);
        if (wide) check_logits(dir, wide, MOQ_ACT_AUTO, "wide", ids); /* what is rounded to 16 or 8 bits without being asked */
        if (stored) check_logits(dir, stored, MOQ_ACT_STORED, kv_in_stored ? NULL : "wide", ids);
        if (kv) check_logits(dir, kv, MOQ_ACT_STORED, "auto", ids);
        golden_cases++;
    }
    moq_st_close(st);
}

static void check_group(const char *group, int least)
{
    moqi_arena r = moqi_arena_make(NULL);
    const char **names = NULL;
    size_t count = 0;
    moq_error e;
    char tail[100];
    snprintf(tail, sizeof tail, "golden/%s", group);
    golden_cases = 0;
    CHECK_INT(moqi_list_dir(data_path(tail), &r, &names, &count, &e), MOQ_OK);
    for (size_t i = 0; i < count; i++) check_case(group, names[i]);
    moqi_arena_drop(&r);
    CHECK(golden_cases >= least);
    printf("note: %d golden folders in %s\n", golden_cases, group);
}

static void test_cuda_golden_sources(void) { check_group("sources", 1); }
static void test_cuda_golden_modelopt(void) { check_group("modelopt", 10); }
static void test_cuda_golden_compressed_tensors(void) { check_group("compressed-tensors", 8); }
static void test_cuda_golden_foreign(void) { check_group("foreign", 2); }

/* ---- the demo model ---- */

/* Greedy answer to one line of demo-eval.jsonl. */
static void answer(llm *bot, const char *system, const char *user, char *text, size_t capacity)
{
    moq_error e;
    const char *piece;
    size_t n = 0;
    text[0] = 0;
    llm_say(bot, "system", system);
    llm_say(bot, "user", user);
    while ((piece = llm_next(bot, &e)) != NULL) n += (size_t)snprintf(text + n, n < capacity ? capacity - n : 0, "%s", piece);
    if (e.code != MOQ_OK) { fprintf(stderr, "%s\n", e.text); CHECK(0); }
    llm_reset(bot);
}

/* Logits of a text in pieces of several lengths, with the backend's own choice of arithmetic, beside the CPU's. */
static void check_pieces(llm *cpu, llm *gpu)
{
    enum { LONGEST = 64 };
    static const int before[] = {0, 1, 16, 17, 40}, counts[] = {1, 8, 16, 17, 33, LONGEST};
    moq_error e;
    if (!cpu || !gpu) return;
    const size_t vocab = (size_t)llm_get_info(gpu)->vocab;
    float *a = (float *)malloc(LONGEST * vocab * sizeof *a), *b = (float *)malloc(LONGEST * vocab * sizeof *b);
    int32_t ids[128];
    for (int i = 0; i < 128; i++) ids[i] = (int32_t)((size_t)(i * 37 + 11) % vocab);
    for (size_t p = 0; p < LLMI_COUNT(before); p++)
        for (size_t c = 0; c < LLMI_COUNT(counts); c++) {
            const int n = counts[c];
            for (int k = 0; k < 2; k++) {
                if (before[p]) CHECK(llm_forward(k ? gpu : cpu, 0, ids, before[p], 0, NULL, NULL, &e) == MOQ_OK);
                CHECK(llm_forward(k ? gpu : cpu, 0, ids + before[p], n, before[p], k ? b : a, NULL, &e) == MOQ_OK);
            }
            double off = relative_rms(b, a, (size_t)n * vocab);
            if (!(off <= 0.05)) fprintf(stderr, "%d tokens after %d: logits off by %.3g\n", n, before[p], off);
            CHECK(off <= 0.05);
        }
    free(a);
    free(b);
}

static void test_cuda_demo(void)
{
    enum { LINES = 60 };
    char *text, *at, dir[1100], a[2048], b[2048];
    size_t bytes = 0;
    moq_error e;
    int lines = 0, same = 0, right[3] = {0, 0, 0};
    double seconds[2] = {0, 0};
    uint64_t tokens[2] = {0, 0};
    const char *demo = getenv("MOQ_DEMO");
    snprintf(dir, sizeof dir, "%s", demo ? demo : data_path("../../examples/demo-model"));
    text = moq_read_file(data_path("demo-eval.jsonl"), 1 << 24, NULL, &bytes, &e);
    CHECK(text != NULL);
    moq_backend *be = cuda_backend(MOQ_ACT_WIDE), *usual = cuda_backend(MOQ_ACT_AUTO);
    llm_desc d;
    memset(&d, 0, sizeof d);
    d.path = dir;
    d.act = MOQ_ACT_WIDE;
    llm *cpu = llm_open(&d, &e);
    if (!cpu) fprintf(stderr, "%s\n", e.text);
    d.backend = be;
    llm *gpu = llm_open(&d, &e);
    if (!gpu) fprintf(stderr, "%s\n", e.text);
    d.backend = usual;
    d.act = MOQ_ACT_AUTO;
    llm *third = llm_open(&d, &e);
    if (!third) fprintf(stderr, "%s\n", e.text);
    CHECK(cpu && gpu && third);
    check_pieces(cpu, third);
    for (at = text; at && cpu && gpu && lines < LINES && *at; lines++) {
        size_t n = strcspn(at, "\n");
        moq_json_doc *doc = moq_json_parse(at, n, MOQ_JSON_STRICT, 0, "demo-eval.jsonl", NULL, &e);
        const moq_json *root = moq_json_root(doc);
        const char *system = moq_json_string(moq_json_find(root, "system")), *user = moq_json_string(moq_json_find(root, "user")), *want = moq_json_string(moq_json_find(root, "assistant"));
        CHECK(system && user && want);
        if (system && user && want) {
            answer(cpu, system, user, a, sizeof a);
            const llm_stats *s = llm_get_stats(cpu);
            (void)s;
            if (third) answer(third, system, user, b, sizeof b);
            right[2] += strcmp(b, want) == 0;
            answer(gpu, system, user, b, sizeof b);
            same += strcmp(a, b) == 0;
            right[0] += strcmp(a, want) == 0;
            right[1] += strcmp(b, want) == 0;
            if (strcmp(a, b) != 0) fprintf(stderr, "line %d: CPU %s\n         CUDA %s\n", lines + 1, a, b);
        }
        moq_json_destroy(doc);
        at += n + (at[n] == '\n');
    }
    for (int k = 0; k < 2 && cpu && gpu; k++) { /* tokens a second of one long answer, the second time */
        llm *m = k ? gpu : cpu;
        llm_say(m, "system", "red book at hallway bench; robot at garage toolbox");
        llm_say(m, "user", "bring me the red book");
        while (llm_next(m, &e)) {}
        seconds[k] = llm_get_stats(m)->generate_seconds;
        tokens[k] = llm_get_stats(m)->generated_tokens;
    }
    CHECK(lines >= 20);
    CHECK_INT(same, lines);
    CHECK(right[2] >= right[0] - 3); /* inputs of long prompts are rounded to BF16 there */
    printf("note: demo model, %d prompts: CPU %d right, CUDA %d right, %d equal, %d right by default; tokens per second CPU %.0f, CUDA %.0f\n", lines, right[0], right[1], same, right[2],
           seconds[0] > 0 ? (double)tokens[0] / seconds[0] : 0, seconds[1] > 0 ? (double)tokens[1] / seconds[1] : 0);
    llm_close(cpu);
    llm_close(gpu);
    llm_close(third);
    moq_backend_destroy(be);
    moq_backend_destroy(usual);
    moq_release(NULL, text, bytes + 1);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_cuda_golden_sources);
    RUN(test_cuda_golden_modelopt);
    RUN(test_cuda_golden_compressed_tensors);
    RUN(test_cuda_golden_foreign);
    RUN(test_cuda_demo);
    return test_end();
}
