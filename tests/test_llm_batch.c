/* test_llm_batch.c - several conversations of one model: batches, forks, saved states, context shift. */
#define _POSIX_C_SOURCE 200809L /* barriers of threads */
#include "test.h"

#include <math.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include "golden.h"

static const char *const scenes[] = {
    "green umbrella at hallway bench; green plate at bedroom drawer; green spoon at kitchen fridge; Chen at hallway coat rack; robot at garage toolbox",
    "purple lamp at kitchen table; purple key at garage rack; black key at kitchen counter; Ana at bathroom cupboard; robot at garage rack",
    "yellow apple at living room tv stand; blue mug at hallway cabinet; Juno at bathroom washer; robot at bedroom shelf",
    "red pillow at hallway coat rack; yellow book at bedroom drawer; red towel at kitchen sink; Juno at kitchen counter; robot at bathroom washer"};
static const char *const errands[] = {"can you give the green plate to Chen?", "i need you to move both the purple key and the black key to the hallway coat rack.",
                                       "i need you to bring the black pillow to the bedroom desk for me", "please put the red pillow on the bedroom bed"};
enum { TALKS = 4 };

static llm_desc talk_desc(void)
{
    llm_desc d;
    memset(&d, 0, sizeof d);
    d.path = DEMO_DIR;
    d.threads = 1;
    d.act = MOQ_ACT_WIDE; /* what is compared here was computed with other numbers of rows */
    d.context = 512;
    return d;
}

static void begin_talk(llm *m, int i)
{
    CHECK_INT(llm_say(m, "system", scenes[i]), MOQ_OK);
    CHECK_INT(llm_say(m, "user", errands[i]), MOQ_OK);
}

/* The rest of the answer behind what is in `text`; returns how it ended. */
static moq_result hear_more(llm *m, char *text, size_t capacity)
{
    moq_error e;
    size_t n = strlen(text);
    for (const char *piece; (piece = llm_next(m, &e)) != NULL;)
        if (n + strlen(piece) < capacity) n += (size_t)snprintf(text + n, capacity - n, "%s", piece);
    if (e.code != MOQ_OK && e.code != MOQ_E_CANCELLED) fprintf(stderr, "%s\n", e.text);
    return e.code;
}

/* What each of the four answers alone, and how random it was. */
static char alone[TALKS][1024];

static void answer_alone(const llm_desc *d)
{
    for (int i = 0; i < TALKS; i++) {
        llm *m = open_or_say(d);
        alone[i][0] = 0;
        if (m) begin_talk(m, i);
        if (m) CHECK_INT(hear_more(m, alone[i], sizeof alone[i]), MOQ_OK);
        llm_close(m);
        CHECK(strlen(alone[i]) > 20);
    }
}

/* ---- batches ---- */

static double worst_relative; /* of all folders */

/* Four sequences whose rows share every pass give the logits that each gives alone. Kernels for one row and for many may add in another
   order, so equality is one of rounding; inputs and cache are kept wide, because rounded ones would jump where the order crosses an edge.
   The sequences are of different length and enter in pieces of different length, interleaved. */
static void check_batch(const char *folder)
{
    enum { N = 4, MOST = 23 };
    static const int32_t lengths[N] = {23, 7, 16, 12};
    moq_error e;
    llm_desc d;
    int32_t ids[N][MOST], done[N] = {0, 0, 0, 0};
    memset(&d, 0, sizeof d);
    d.path = folder;
    d.no_tokenizer = 1;
    d.threads = 1;
    d.act = MOQ_ACT_WIDE;
    d.kv = "wide";
    d.context = 32;
    d.slots = N;
    llm *m = llm_open(&d, &e);
    if (!m) fprintf(stderr, "%s: %s\n", folder, e.text);
    CHECK(m != NULL);
    if (!m) return;
    size_t vocab = (size_t)llm_get_info(m)->vocab, row = MOST * vocab;
    float *one = (float *)malloc(row * N * sizeof *one), *all = (float *)malloc(row * N * sizeof *all);
    CHECK(one && all);
    for (int i = 0; i < N; i++) {
        for (int t = 0; t < MOST; t++) ids[i][t] = (int32_t)(test_random() % (uint64_t)vocab);
        CHECK_INT(llm_forward(m, i, ids[i], lengths[i], 0, one + (size_t)i * row, NULL, &e), MOQ_OK);
    }
    for (int i = 0; i < N; i++) m->model->length[i] = 0;
    for (int step = 0; step < 200; step++) { /* a random number of rows of each; some want logits, and those come last */
        int32_t take[N], rows = 0;
        llmi_pass_clear(m->model);
        for (int i = 0; i < N; i++) {
            take[i] = (int32_t)(test_random() % 6);
            if (take[i] > lengths[i] - done[i]) take[i] = lengths[i] - done[i];
            rows += take[i];
        }
        for (int t = 0; t < 6; t++)
            for (int i = 0; i < N; i++) /* rows of different sequences alternate */
                if (t < take[i]) llmi_pass_add(m->model, i, ids[i][done[i] + t], done[i] + t, all + (size_t)i * row + (size_t)(done[i] + t) * vocab);
        if (rows == 0) continue;
        while (!llmi_pass_done(m->model)) llmi_pass_unit(m->model, INT32_MAX);
        CHECK_INT(llmi_pass_end(m->model, &e), MOQ_OK);
        for (int i = 0; i < N; i++) done[i] += take[i];
    }
    for (int i = 0; i < N; i++) {
        double error = relative_rms(all + (size_t)i * row, one + (size_t)i * row, (size_t)lengths[i] * vocab);
        CHECK_INT(done[i], lengths[i]);
        CHECK_INT(m->model->length[i], lengths[i]);
        if (!(error <= 1e-5)) fprintf(stderr, "%s: sequence %d differs in a batch by %g\n", folder, i, error);
        CHECK(error <= 1e-5);
        if (error > worst_relative) worst_relative = error;
    }
    free(one);
    free(all);
    llm_close(m);
}

/* Every golden folder that there is, and the demo model. */
static void test_batch_logits(void)
{
    static const char *const groups[] = {"modelopt", "sources", "compressed-tensors", "foreign"};
    int seen = 0;
    for (size_t g = 0; g < LLMI_COUNT(groups); g++) {
        char path[1024], folder[2048], file[2100];
        moqi_arena r = moqi_arena_make(NULL);
        const char **names = NULL;
        size_t count = 0;
        moq_error e;
        snprintf(path, sizeof path, "%s/%s", GOLDEN_DIR, groups[g]);
        if (moqi_is_dir(path)) CHECK_INT(moqi_list_dir(path, &r, &names, &count, &e), MOQ_OK);
        for (size_t i = 0; i < count; i++) {
            snprintf(folder, sizeof folder, "%s/%s", path, names[i]);
            snprintf(file, sizeof file, "%s/config.json", folder);
            if (!moqi_file_exists(file)) continue;
            snprintf(file, sizeof file, "%s/model.safetensors", folder);
            if (!moqi_file_exists(file)) continue; /* the subset has only the inputs of some sources */
            check_batch(folder);
            seen++;
        }
        moqi_arena_drop(&r);
    }
    CHECK(seen >= 4);
    check_batch(DEMO_DIR);
    printf("batched rows against single sequences in %d folders: relative rms at most %.2g\n", seen + 1, worst_relative);
}

/* ---- continuous batches ---- */

/* Conversations join and leave while others answer; each says exactly what it says alone. */
static void check_continuous(int64_t microseconds, int32_t draft)
{
    char text[TALKS][1024];
    llm_desc d = talk_desc();
    llm *talk[TALKS] = {NULL, NULL, NULL, NULL};
    moq_error e;
    int state, turns = 0;
    d.slots = 3; /* one fewer than there are conversations */
    d.draft = draft;
    talk[0] = open_or_say(&d);
    if (!talk[0]) return;
    for (int i = 0; i < TALKS; i++) text[i][0] = 0;
    begin_talk(talk[0], 0);
    for (int next = 1; next < TALKS || turns >= 0; turns++) {
        if (next < TALKS && turns % 5 == 4) { /* one joins as soon as a slot is free */
            llm *any = talk[0] ? talk[0] : talk[1] ? talk[1] : talk[2];
            llm *n = llm_join(any, &e);
            if (n) {
                CHECK(llm_get_slot(n) != llm_get_slot(any));
                talk[next] = n;
                begin_talk(talk[next], next);
                next++;
            } else {
                CHECK_INT(e.code, MOQ_E_STATE);
                CHECK(strstr(e.text, "slot of 3") != NULL);
            }
        }
        llm *any = NULL;
        for (int i = 0; i < TALKS; i++) any = talk[i] ? talk[i] : any;
        state = llm_step_all(any, microseconds);
        for (int i = 0; i < TALKS; i++)
            if (talk[i] && llm_ready(talk[i]) > 0) snprintf(text[i] + strlen(text[i]), sizeof text[i] - strlen(text[i]), "%s", llm_piece(talk[i]));
        if (state < 0 && next == TALKS) break;
        for (int i = 0; i < TALKS && next < TALKS; i++) /* who has ended leaves, but not the last one */
            if (talk[i] && talk[i] != any && talk[i]->phase == LLMI_IDLE) {
                llm_close(talk[i]);
                talk[i] = NULL;
            }
        CHECK(turns < 100000);
        if (turns >= 100000) break;
    }
    for (int i = 0; i < TALKS; i++) {
        CHECK_STR(text[i], alone[i]);
        if (talk[i]) CHECK(llm_next(talk[i], &e) == NULL && e.code == MOQ_OK);
    }
    for (int i = 0; i < TALKS; i++) llm_close(talk[i]);
}

static void test_batch_continuous(void)
{
    llm_desc d = talk_desc();
    answer_alone(&d);
    check_continuous(1000000, 0);
    check_continuous(300, 0); /* passes stop between layers */
    check_continuous(1, 0);   /* one unit of work a call */
    check_continuous(700, 5);
}

/* Calls of every kind in the middle of a pass of others: nobody's answer changes. */
static void test_batch_disturbed(void)
{
    char text[2][1024] = {"", ""};
    llm_desc d = talk_desc();
    moq_error e;
    int32_t token = 5;
    d.slots = 3;
    answer_alone(&d);
    llm *a = open_or_say(&d), *b = a ? llm_join(a, &e) : NULL;
    CHECK(b != NULL);
    if (!b) return;
    begin_talk(a, 0);
    begin_talk(b, 1);
    for (int i = 0; llm_step_all(a, 1) >= 0 && i < 100000; i++) {
        if (llm_ready(a) > 0) strcat(text[0], llm_piece(a));
        if (llm_ready(b) > 0) strcat(text[1], llm_piece(b));
        if (i % 7 == 3) CHECK_INT(llm_forward(a, 2, &token, 1, 0, NULL, NULL, &e), MOQ_OK); /* an own slot */
        if (i % 41 == 5) CHECK(llm_copy_state(a, NULL, 0, &e) != SIZE_MAX);
        if (i % 31 == 11 && strlen(text[0]) > 40) { /* another one comes and goes */
            llm *c = llm_join(a, &e);
            CHECK(c != NULL);
            if (c) begin_talk(c, 2);
            for (int k = 0; k < 3 && c; k++) {
                llm_step_all(a, 1);
                if (llm_ready(a) > 0) strcat(text[0], llm_piece(a));
                if (llm_ready(b) > 0) strcat(text[1], llm_piece(b));
            }
            llm_close(c);
        }
    }
    CHECK_STR(text[0], alone[0]);
    CHECK_STR(text[1], alone[1]);
    llm_close(b);
    llm_close(a);
}

/* ---- forks ---- */

/* Both go on from the same place; a fork in the middle of an answer ends it the same way. */
static void test_fork_demo(void)
{
    char head[1024] = "", tail[1024], other[1024];
    moq_error e;
    llm_desc d = talk_desc();
    const char *piece;
    d.slots = 3;
    d.sampling.temperature = 0.8f;
    d.sampling.seed = 7;
    answer_alone(&d);
    llm *m = open_or_say(&d);
    if (!m) return;
    begin_talk(m, 1);
    for (int i = 0; i < 12 && (piece = llm_next(m, &e)) != NULL; i++) strcat(head, piece);
    llm *n = llm_fork(m, &e);
    CHECK(n != NULL);
    if (!n) return;
    CHECK_INT(n->model->length[n->slot], (int64_t)m->done);
    snprintf(tail, sizeof tail, "%s", head);
    snprintf(other, sizeof other, "%s", head);
    CHECK_INT(hear_more(n, other, sizeof other), MOQ_OK);
    CHECK_INT(hear_more(m, tail, sizeof tail), MOQ_OK);
    CHECK_STR(tail, alone[1]);
    CHECK_STR(other, alone[1]);
    /* a shared beginning is run once: the second fork only runs what is new */
    llm *k = llm_fork(m, &e);
    CHECK(k != NULL);
    if (k) {
        uint64_t before = llm_get_stats(k)->prompt_tokens;
        CHECK_INT(llm_say(k, "user", errands[0]), MOQ_OK);
        tail[0] = 0;
        CHECK_INT(hear_more(k, tail, sizeof tail), MOQ_OK);
        CHECK(llm_get_stats(k)->prompt_tokens - before < m->ids.count / 2);
    }
    CHECK(llm_fork(m, &e) == NULL && e.code == MOQ_E_STATE);
    CHECK(llm_fork(NULL, &e) == NULL && e.code == MOQ_E_ARG);
    llm_close(m); /* the first one may go first */
    llm_close(n);
    llm_close(k);
}

/* A model with a running state: raw ids, forked in the middle, go on to the same logits. */
static void check_fork_logits(const char *folder)
{
    enum { N = 20, CUT = 11 };
    moq_error e;
    llm_desc d;
    int32_t ids[N];
    memset(&d, 0, sizeof d);
    d.path = folder;
    d.no_tokenizer = 1;
    d.threads = 1;
    d.context = 32;
    d.slots = 2;
    llm *m = llm_open(&d, &e);
    CHECK(m != NULL);
    if (!m) return;
    size_t vocab = (size_t)llm_get_info(m)->vocab;
    float *a = (float *)malloc(vocab * sizeof *a), *b = (float *)malloc(vocab * sizeof *b);
    for (int i = 0; i < N; i++) ids[i] = (int32_t)(test_random() % vocab);
    CHECK_INT(llm_forward(m, 0, ids, CUT, 0, NULL, NULL, &e), MOQ_OK);
    m->ids.count = 0;
    CHECK(llmi_ids_add(&m->ids, ids, CUT)); /* as a conversation of these tokens */
    m->done = CUT;
    llm *n = llm_fork(m, &e);
    CHECK(n != NULL);
    if (n) {
        size_t bytes = llm_copy_state(m, NULL, 0, &e);
        void *state = malloc(bytes);
        CHECK(bytes != SIZE_MAX && llm_copy_state(m, state, bytes, &e) == bytes);
        CHECK_INT(llm_forward(m, 0, ids + CUT, N - CUT, CUT, NULL, a, &e), MOQ_OK);
        CHECK_INT(llm_forward(m, n->slot, ids + CUT, N - CUT, CUT, NULL, b, &e), MOQ_OK);
        CHECK(memcmp(a, b, vocab * sizeof *a) == 0);
        memset(b, 0, vocab * sizeof *b);
        CHECK_INT(llm_set_state(n, state, bytes, &e), MOQ_OK); /* back to the cut */
        CHECK_INT(llm_forward(m, n->slot, ids + CUT, N - CUT, CUT, NULL, b, &e), MOQ_OK);
        CHECK(memcmp(a, b, vocab * sizeof *a) == 0);
        free(state);
    }
    if (m->model->stateful) { /* what a running state cannot do is said */
        CHECK_INT(llm_forward(m, 0, ids, 3, 5, NULL, a, &e), MOQ_E_STATE);
        d.draft = 4;
        CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_UNSUPPORTED);
        CHECK(strstr(e.text, "cannot go back") != NULL);
    }
    free(a);
    free(b);
    llm_close(n);
    llm_close(m);
}

static void test_fork_families(void)
{
    static const char *const folders[] = {"sources/nemotron_h", "modelopt/nemotron_h-mamba_fp8_aggressive", "foreign/deepseek_v3-fp8-block",
                                          "modelopt/gpt_oss-nvfp4", "modelopt/llama-nvfp4-kv_nvfp4", "modelopt/llama-fp8-kv_fp8"};
    int seen = 0;
    for (size_t i = 0; i < LLMI_COUNT(folders); i++) {
        char path[1024];
        snprintf(path, sizeof path, "%s/%s", GOLDEN_DIR, folders[i]);
        if (!moqi_is_dir(path)) continue;
        check_fork_logits(path);
        seen++;
    }
    CHECK(seen >= 2);
}

/* ---- saved states ---- */

static char state_file[256];

/* Saved in the middle of an answer, loaded into another process's model (here: another llm): the rest is the same. */
static void test_state_goes_on(void)
{
    char head[1024] = "", tail[1024];
    moq_error e;
    const char *piece;
    llm_desc d = talk_desc();
    d.sampling.temperature = 0.7f;
    d.sampling.seed = 3;
    answer_alone(&d);
    for (int cut = 0; cut < 30; cut += 7) { /* 0: before the first token */
        llm *m = open_or_say(&d);
        if (!m) return;
        begin_talk(m, 3);
        head[0] = 0;
        for (int i = 0; i < cut && (piece = llm_next(m, &e)) != NULL; i++) strcat(head, piece);
        if (cut == 7) llm_step(m, 1); /* in the middle of a pass */
        CHECK_INT(llm_save(m, state_file, &e), MOQ_OK);
        snprintf(tail, sizeof tail, "%s", head);
        CHECK_INT(hear_more(m, tail, sizeof tail), MOQ_OK);
        CHECK_STR(tail, alone[3]);
        llm_close(m);
        d.sampling.seed = 99; /* the state brings its own random numbers */
        m = open_or_say(&d);
        d.sampling.seed = 3;
        if (!m) return;
        begin_talk(m, 0);
        CHECK(llm_next(m, &e) != NULL);
        CHECK_INT(llm_load(m, state_file, &e), MOQ_OK);
        snprintf(tail, sizeof tail, "%s", head);
        CHECK_INT(hear_more(m, tail, sizeof tail), MOQ_OK);
        CHECK_STR(tail, alone[3]);
        CHECK_INT(llm_say(m, "user", errands[1]), MOQ_OK); /* and the conversation goes on */
        tail[0] = 0;
        CHECK_INT(hear_more(m, tail, sizeof tail), MOQ_OK);
        CHECK(tail[0] != 0);
        llm_close(m);
    }
}

/* Every damaged byte, every cut and every other model is refused, and the conversation stays as it was. */
static void test_state_refused(void)
{
    char text[1024] = "", path[1024];
    moq_error e;
    llm_desc d = talk_desc();
    answer_alone(&d);
    llm *m = open_or_say(&d);
    if (!m) return;
    begin_talk(m, 0);
    CHECK(llm_next(m, &e) != NULL);
    size_t bytes = llm_copy_state(m, NULL, 0, &e);
    uint8_t *state = (uint8_t *)malloc(bytes), *bad = (uint8_t *)malloc(bytes);
    CHECK(state && bad && llm_copy_state(m, state, bytes, &e) == bytes);
    llm_reset(m);
    begin_talk(m, 2);
    strcpy(text, llm_next(m, &e));
    for (int i = 0; i < 400; i++) { /* one bit somewhere, half of the time among the numbers */
        size_t at = (size_t)test_random() % (i % 2 ? bytes : 400);
        memcpy(bad, state, bytes);
        bad[at] ^= (uint8_t)(1u << test_random() % 8);
        CHECK(llm_set_state(m, bad, bytes, &e) < 0 && e.text[0]);
    }
    for (size_t cut = 0; cut < bytes; cut += 1 + cut / 7) CHECK(llm_set_state(m, state, cut, &e) < 0);
    for (int i = 0; i < 3000; i++) { /* forged: numbers are changed and the checksum is made right */
        int field = i % LLMI_STATE_FIELDS;
        uint64_t v = test_random() % 3 ? (uint64_t)test_random() << test_random() % 33 : test_random() % 1024;
        memcpy(bad, state, bytes);
        for (int k = 0; k < 8; k++) bad[LLMI_STATE_HEADER + 8 * field + k] = (uint8_t)(v >> 8 * k);
        uint64_t hash = llmi_hash((const char *)bad + LLMI_STATE_HEADER, bytes - LLMI_STATE_HEADER);
        for (int k = 0; k < 8; k++) bad[24 + k] = (uint8_t)(hash >> 8 * k);
        if (llm_set_state(m, bad, bytes, &e) == MOQ_OK) { /* what is accepted can be gone on with and saved */
            for (int k = 0; k < 2; k++) llm_step(m, 1);
            CHECK(llm_copy_state(m, NULL, 0, &e) != SIZE_MAX);
            llm_reset(m);
            begin_talk(m, 2);
            CHECK_STR(llm_next(m, &e), text);
        }
    }
    CHECK_INT(hear_more(m, text, sizeof text), MOQ_OK);
    CHECK_STR(text, alone[2]);
    llm_close(m);
    d.kv = "fp8"; /* the same model, but its cache is stored in another way */
    m = open_or_say(&d);
    CHECK(m && llm_set_state(m, state, bytes, &e) == MOQ_E_STATE && strstr(e.text, "another KV format, wide, than this conversation's, fp8;"));
    if (m) { /* as if it were saved on a GPU in BF16 */
        llmi_ground other = llmi_ground_of(m);
        other.backend = "cuda";
        other.backend_bytes = 4;
        other.elem = 2;
        const uint64_t print = llmi_fingerprint_on(m, &other);
        memcpy(bad, state, bytes);
        for (int k = 0; k < 8; k++) bad[32 + k] = (uint8_t)(print >> 8 * k);
        CHECK(llm_set_state(m, bad, bytes, &e) == MOQ_E_STATE && strstr(e.text, "saved on cuda with activations of 2 bytes, this conversation runs on cpu with 4;"));
    }
    llm_close(m);
    d.kv = NULL;
    d.context = 16; /* shorter than what the state holds */
    m = open_or_say(&d);
    CHECK(m && llm_set_state(m, state, bytes, &e) == MOQ_E_STATE && strstr(e.text, "context"));
    llm_close(m);
    snprintf(path, sizeof path, "%s/sources/llama", GOLDEN_DIR);
    memset(&d, 0, sizeof d);
    d.path = path;
    d.no_tokenizer = 1;
    m = open_or_say(&d);
    CHECK(m && llm_set_state(m, state, bytes, &e) == MOQ_E_STATE && strstr(e.text, "another model than this 'llama';"));
    CHECK(m && llm_load(m, "/nonexistent/state", &e) < 0 && strncmp(e.text, "/nonexistent/state: ", 20) == 0);
    CHECK(m && llm_save(m, "/nonexistent/state", &e) < 0 && strncmp(e.text, "/nonexistent/state: ", 20) == 0);
    CHECK(m && llm_load(m, "", &e) == MOQ_E_ARG && strstr(e.text, "the path is empty"));
    CHECK(m && llm_save(m, "", &e) == MOQ_E_ARG && strstr(e.text, "the path is empty"));
    CHECK(m && llm_save(m, NULL, &e) == MOQ_E_ARG && strstr(e.text, "llm_save: "));
    CHECK(llm_save(NULL, "x", &e) == MOQ_E_ARG && strcmp(e.text, "llm_save: the model or the path is NULL") == 0);
    llm_close(m);
    free(state);
    free(bad);
}

/* Latent attention: a quantized cache holds whole keys and values, a wide one the narrow middles where the backend can. Either state is refused by the other
   for its format, and one of a backend that cannot for that, not as another model's. */
static void test_state_latent(void)
{
    char path[1024];
    moq_error e;
    llm_desc d;
    snprintf(path, sizeof path, "%s/foreign/deepseek_v3-fp8-block", GOLDEN_DIR);
    memset(&d, 0, sizeof d);
    d.path = path;
    d.no_tokenizer = 1;
    d.context = 32;
    d.kv = "wide";
    llm *m = open_or_say(&d);
    d.kv = "fp8";
    llm *n = open_or_say(&d);
    size_t bytes = m && n ? llm_copy_state(m, NULL, 0, &e) : 0, other_bytes = m && n ? llm_copy_state(n, NULL, 0, &e) : 0;
    uint8_t *state = (uint8_t *)malloc(bytes + 40), *other = (uint8_t *)malloc(other_bytes + 40);
    CHECK(m && n && m->model->latent_ways == 1 && n->model->latent_ways == 2);
    if (m && n && state && other) {
        CHECK(llm_copy_state(m, state, bytes, &e) == bytes && llm_copy_state(n, other, other_bytes, &e) == other_bytes);
        CHECK(llm_set_state(n, state, bytes, &e) == MOQ_E_STATE && strstr(e.text, "another KV format, wide, than this conversation's, fp8;"));
        CHECK(llm_set_state(m, other, other_bytes, &e) == MOQ_E_STATE && strstr(e.text, "another KV format, fp8, than this conversation's, wide;"));
        llmi_ground ground = llmi_ground_of(m);
        ground.latent_ways = 2;
        const uint64_t print = llmi_fingerprint_on(m, &ground);
        for (int k = 0; k < 8; k++) state[32 + k] = (uint8_t)(print >> 8 * k);
        CHECK_INT(llm_set_state(m, state, bytes, &e), MOQ_E_STATE);
        CHECK(strstr(e.text, "latent attention holds whole keys and values, here it holds the narrow middles;"));
    }
    free(state);
    free(other);
    llm_close(m);
    llm_close(n);
}

/* ---- endless conversations ---- */

/* Turn after turn in a context that holds about two of them: the oldest ones are forgotten, the system turn stays, and every answer is the one that a
   model gives that was told only what is left. */
static void test_shift_chat(void)
{
    char text[1024], fresh[1024];
    llm_desc d = talk_desc();
    int shifts = 0;
    d.context = 300;
    llm *m = open_or_say(&d);
    if (!m) return;
    CHECK_INT(llm_say(m, "system", scenes[0]), MOQ_OK);
    moq_result r = MOQ_OK;
    for (int i = 0; i < 12 && r == MOQ_OK; i++) {
        CHECK_INT(llm_say(m, "user", errands[i % 4]), MOQ_OK);
        text[0] = 0;
        r = hear_more(m, text, sizeof text);
    }
    CHECK_INT(r, MOQ_E_STATE); /* without `endless` the context fills */
    moq_error e;
    CHECK_INT(llm_say(m, "user", errands[0]), MOQ_OK);
    CHECK(llm_next(m, &e) == NULL && e.code == MOQ_E_STATE);
    CHECK_INT(llm_save(m, state_file, &e), MOQ_OK); /* what is full can be saved, and is full again */
    CHECK_INT(llm_load(m, state_file, &e), MOQ_OK);
    CHECK_INT(llm_say(m, "user", errands[1]), MOQ_OK);
    CHECK(llm_next(m, &e) == NULL && e.code == MOQ_E_STATE);
    llm_close(m);
    d.endless = 1;
    m = open_or_say(&d);
    if (!m) return;
    CHECK_INT(llm_say(m, "system", scenes[0]), MOQ_OK);
    for (int i = 0; i < 12; i++) {
        size_t turns = m->turns.count / sizeof(llmi_turn);
        CHECK_INT(llm_say(m, "user", errands[i % 4]), MOQ_OK);
        size_t said = m->turns.count / sizeof(llmi_turn);
        text[0] = 0;
        CHECK_INT(hear_more(m, text, sizeof text), MOQ_OK);
        CHECK(m->ids.count <= 301);
        CHECK_STR(llmi_role(m, 0), "system");
        size_t left = m->turns.count / sizeof(llmi_turn);
        (void)turns;
        if (left < said) shifts++;
        /* the same turns said to a fresh model; an answer that shifted in its middle saw more in its beginning */
        llm *f = open_or_say(&d);
        if (!f) break;
        for (size_t t = 0; t < left; t++) {
            llmi_turn turn;
            memcpy(&turn, m->turns.data + t * sizeof turn, sizeof turn);
            CHECK_INT(llm_say(f, m->words.data + turn.role, m->words.data + turn.text), MOQ_OK);
        }
        fresh[0] = 0;
        CHECK_INT(hear_more(f, fresh, sizeof fresh), MOQ_OK);
        if (m->done == m->ids.count - 1 || left == said) CHECK(strcmp(fresh, text) == 0 || left < said);
        llm_close(f);
    }
    CHECK(shifts >= 2);
    llm_close(m);
}

/* Raw text: far more tokens than the context are written; the first `keep` tokens stay. */
static void test_shift_raw(void)
{
    moq_error e;
    llm_desc d = talk_desc();
    llm_bias never[8];
    int32_t first[16], count = 0;
    d.context = 64;
    d.endless = 1;
    d.keep = 16;
    d.act = MOQ_ACT_WIDE; /* else inputs of many rows are shorter than those of one */
    d.sampling.temperature = 1.5f;
    d.sampling.seed = 5;
    llm *m = open_or_say(&d);
    if (!m) return;
    for (int32_t id = 0; id < llm_get_info(m)->vocab && count < 8; id++) /* no end */
        if (llmi_ends_turn(m, id)) { never[count].id = id; never[count++].add = -(float)INFINITY; }
    d.sampling.bias = never;
    d.sampling.bias_count = count;
    llm_set_sampling(m, &d.sampling);
    CHECK_INT(llm_say_raw(m, "robot at garage rack; red book at kitchen table; Ana at bathroom cupboard; green mug at hallway bench"), MOQ_OK);
    for (int i = 0; i < 200; i++) {
        CHECK(llm_next(m, &e) != NULL);
        if (i == 0) memcpy(first, m->ids.data, sizeof first);
        CHECK(m->ids.count <= 65);
        CHECK(memcmp(m->ids.data, first, sizeof first) == 0);
    }
    CHECK(llm_get_stats(m)->generated_tokens >= 200);
    /* the cache is exactly that of the tokens that are left */
    size_t vocab = (size_t)llm_get_info(m)->vocab;
    float *now = (float *)malloc(vocab * sizeof *now), *again = (float *)malloc(vocab * sizeof *again);
    int32_t done = (int32_t)m->done, token = m->ids.data[m->done - 1];
    CHECK(done > 17);
    CHECK_INT(llm_forward(m, 0, &token, 1, done - 1, NULL, now, &e), MOQ_OK);
    llm *f = open_or_say(&d);
    if (f) CHECK_INT(llm_forward(f, 0, m->ids.data, done, 0, NULL, again, &e), MOQ_OK);
    CHECK(f && relative_rms(now, again, vocab) <= 1e-5);
    free(now);
    free(again);
    llm_close(f);
    llm_close(m);
}

/* A dynamic theta comes from the context that was asked for: beyond the original length another context turns keys otherwise. */
static void test_state_dynamic_rope(void)
{
    static const char dir[] = TEST_DIR "/build/tmp/dynamic", *const linked[] = {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"};
    static const struct { int32_t saved, loaded; int fits; } cases[] = {{512, 1024, 1}, {1024, 2048, 0}, {4096, 2048, 0}, {4096, 4096, 1}};
    static const char plain[] = "\"rope_type\": \"default\"";
    moq_error e;
    size_t bytes = 0;
    char *config = moq_read_file(DEMO_DIR "/config.json", 1 << 20, NULL, &bytes, &e), *at = config ? strstr(config, plain) : NULL, text[400];
    CHECK(at != NULL);
    if (!at) return;
    mkdir(TEST_DIR "/build", 0777);
    mkdir(TEST_DIR "/build/tmp", 0777);
    mkdir(dir, 0777);
    snprintf(text, sizeof text, "%s/config.json", dir);
    FILE *f = fopen(text, "wb");
    CHECK(f && fprintf(f, "%.*s\"factor\": 2.0, \"rope_type\": \"dynamic\"%s", (int)(at - config), config, at + sizeof plain - 1) > 0);
    if (f) fclose(f);
    moq_release(NULL, config, bytes + 1);
    for (size_t i = 0; i < sizeof linked / sizeof *linked; i++) {
        char from[400];
        snprintf(from, sizeof from, "%s/%s", DEMO_DIR, linked[i]);
        snprintf(text, sizeof text, "%s/%s", dir, linked[i]);
        unlink(text);
        CHECK_INT(link(from, text), 0);
    }
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        llm_desc d = talk_desc();
        d.path = dir;
        d.context = cases[i].saved;
        llm *m = open_or_say(&d);
        d.context = cases[i].loaded;
        llm *n = open_or_say(&d);
        if (m && n) {
            begin_talk(m, 0);
            CHECK(llm_next(m, &e) != NULL);
            CHECK_INT(llm_save(m, state_file, &e), MOQ_OK);
            CHECK_INT(llm_load(n, state_file, &e), cases[i].fits ? MOQ_OK : MOQ_E_STATE);
            CHECK(cases[i].fits || strstr(e.text, "another llm_desc.context"));
        }
        llm_close(m);
        llm_close(n);
    }
    remove_dir(dir);
}

/* The output layer may be another: neither the cache nor what was chosen already depends on it. From there on both choose for themselves. */
static void test_state_other_head(void)
{
    static const char *const heads[] = {NULL, "int8", "fp8"};
    moq_error e;
    llm_desc d = talk_desc();
    llm *from = open_or_say(&d);
    if (!from) return;
    begin_talk(from, 0);
    for (int i = 0; i < 3; i++) CHECK(llm_next(from, &e) != NULL);
    const size_t bytes = llm_copy_state(from, NULL, 0, &e);
    uint8_t *state = (uint8_t *)malloc(bytes), *again = (uint8_t *)malloc(bytes);
    CHECK(state && again && llm_copy_state(from, state, bytes, &e) == bytes);
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        char text[1024] = "";
        d.head = heads[i];
        llm *m = open_or_say(&d);
        CHECK(m && llm_set_state(m, state, bytes, &e) == MOQ_OK);
        if (m) {
            CHECK(llm_copy_state(m, again, bytes, &e) == bytes && memcmp(state, again, bytes) == 0);
            if (i == 0) { /* the piece that was on its way */
                const char *a = llm_next(from, &e), *b = llm_next(m, &e);
                CHECK(a && b && strcmp(a, b) == 0);
            }
            CHECK_INT(hear_more(m, text, sizeof text), MOQ_OK);
            CHECK(text[0] != 0);
        }
        llm_close(m);
    }
    free(state);
    free(again);
    llm_close(from);
}

/* A cache in half the bytes: its state fits one like it, goes on with the same words, and is refused by a wide one. */
static void test_state_half_cache(void)
{
    moq_error e;
    llm_desc d = talk_desc();
    d.kv = "bf16";
    llm *m = open_or_say(&d), *n = open_or_say(&d);
    d.kv = "wide";
    llm *wide = open_or_say(&d);
    if (m && n && wide) {
        CHECK(llm_get_info(m)->memory_bytes < llm_get_info(wide)->memory_bytes);
        begin_talk(m, 0);
        for (int i = 0; i < 3; i++) CHECK(llm_next(m, &e) != NULL);
        CHECK_INT(llm_save(m, state_file, &e), MOQ_OK);
        CHECK_INT(llm_load(wide, state_file, &e), MOQ_E_STATE);
        CHECK(strstr(e.text, state_file) == e.text && strstr(e.text, "another KV format, bf16, than this conversation's, wide;"));
        CHECK_INT(llm_load(n, state_file, &e), MOQ_OK);
        for (const char *a = "", *b; a; ) {
            a = llm_next(m, &e);
            b = llm_next(n, &e);
            CHECK(a && b ? strcmp(a, b) == 0 : a == b);
            if (!b) break;
        }
    }
    llm_close(m);
    llm_close(n);
    llm_close(wide);
}

/* ---- out of memory ---- */

static void test_batch_out_of_memory(void)
{
    moq_error e;
    for (long k = 1; k < 400; k++) {
        llm_desc d = talk_desc();
        test_state.live_allocs = 0;
        d.allocator = test_allocator();
        d.slots = 2;
        llm *m = open_or_say(&d), *n = NULL;
        if (!m) return;
        begin_talk(m, 0);
        CHECK(llm_next(m, &e) != NULL);
        test_state.fail_at = k;
        n = llm_fork(m, &e);
        size_t need = n ? llm_copy_state(m, NULL, 0, &e) : 0;
        void *state = n ? malloc(need) : NULL;
        moq_result saved = n ? llm_save(m, state_file, &e) : MOQ_OK;
        moq_result loaded = n && saved == MOQ_OK ? llm_load(n, state_file, &e) : MOQ_OK;
        int whole = test_state.fail_at > 0 && n && saved == MOQ_OK && loaded == MOQ_OK;
        CHECK(n != NULL || e.code == MOQ_E_NOMEM);
        CHECK(saved == MOQ_OK || saved == MOQ_E_NOMEM);
        CHECK(loaded == MOQ_OK || loaded == MOQ_E_NOMEM);
        test_state.fail_at = 0;
        free(state);
        llm_close(n);
        llm_close(m);
        CHECK_INT(test_state.live_allocs, 0);
        if (whole) break;
        CHECK(k < 399);
    }
}

/* ---- one model on two ranks ---- */

enum { RANKS = 2 };

/* Ranks meet here; `fail_at` > 0: this call fails on every rank. queues: as if sums were only queued, and this is said when it is asked for. */
typedef struct meeting {
    pthread_barrier_t barrier;
    const float *x[RANKS];
    int calls, fail_at, queues, asked[RANKS];
} meeting;

typedef struct rank_of {
    meeting *at;
    const char *dir;
    const int32_t *tokens;
    int32_t rank, count;
    float *logits;    /* [count, VOCAB] */
    char text[1024];  /* of the demo model's answer, where there are no tokens */
    moq_error err;
} rank_of;

static moq_result sum_ranks(void *user, moq_backend *be, void *x, size_t count, moq_error *err)
{
    const rank_of *r = (const rank_of *)user;
    float *sum;
    moq_result code = be->sync(be, err);
    if (!x) {
        CHECK(r->at->queues && count == 0);
        r->at->asked[r->rank]++;
        return r->at->fail_at && r->at->calls >= r->at->fail_at ? moq_fail(err, MOQ_E_BACKEND, "link", "the other rank is gone") : MOQ_OK;
    }
    sum = (float *)malloc(count * sizeof *sum);
    r->at->x[r->rank] = (const float *)x;
    if (r->rank == 0) r->at->calls++;
    pthread_barrier_wait(&r->at->barrier);
    for (size_t i = 0; i < count; i++) sum[i] = r->at->x[0][i] + r->at->x[1][i];
    if (!r->at->queues && r->at->calls == r->at->fail_at) code = moq_fail(err, MOQ_E_BACKEND, "link", "the other rank is gone");
    pthread_barrier_wait(&r->at->barrier);
    memcpy(x, sum, count * sizeof *sum);
    free(sum);
    return code;
}

static void *run_rank(void *user)
{
    rank_of *r = (rank_of *)user;
    llm_desc d;
    memset(&d, 0, sizeof d);
    d.path = r->dir;
    d.threads = 1;
    d.act = MOQ_ACT_WIDE;
    d.context = 512;
    d.no_tokenizer = r->tokens != NULL;
    if (r->at) {
        d.ranks = RANKS;
        d.rank = r->rank;
        d.all_reduce = sum_ranks;
        d.all_reduce_user = r;
        d.all_reduce_queues = r->at->queues;
    }
    llm *m = llm_open(&d, &r->err);
    if (m && r->tokens) llm_forward(m, 0, r->tokens, r->count, 0, r->logits, NULL, &r->err);
    if (m && !r->tokens) {
        begin_talk(m, 0);
        r->err.code = hear_more(m, r->text, sizeof r->text);
    }
    llm_close(m);
    return NULL;
}

static void run_ranks(meeting *at, rank_of *r, const char *dir, const int32_t *tokens, int32_t count)
{
    pthread_t thread[RANKS];
    memset(r, 0, RANKS * sizeof *r);
    at->calls = 0;
    pthread_barrier_init(&at->barrier, NULL, RANKS);
    for (int32_t i = 0; i < RANKS; i++) {
        r[i].at = at;
        r[i].dir = dir;
        r[i].tokens = tokens;
        r[i].rank = i;
        r[i].count = count;
        r[i].logits = (float *)calloc((size_t)count * VOCAB, sizeof(float));
        pthread_create(&thread[i], NULL, run_rank, &r[i]);
    }
    for (int i = 0; i < RANKS; i++) pthread_join(thread[i], NULL);
    pthread_barrier_destroy(&at->barrier);
}

/* Families and schemes whose layers are divided in different ways; `refused`: what cannot be. */
static void test_ranks_logits(void)
{
    static const struct { const char *dir, *refused; } cases[] = {
        {"sources/llama", NULL}, {"sources/qwen2", NULL}, {"sources/qwen3", NULL}, {"sources/phi3", NULL}, {"sources/mixtral", NULL},
        {"sources/qwen3_moe", NULL}, {"sources/gpt_oss", NULL}, {"sources/gemma3", NULL}, {"modelopt/llama-nvfp4", NULL}, {"modelopt/llama-fp8", NULL},
        {"modelopt/llama-mxfp4", NULL}, {"modelopt/llama-nvfp4-kv_fp8_affine", NULL}, {"modelopt/llama-nvfp4_svdquant", NULL},
        {"modelopt/mixtral-nvfp4", NULL}, {"modelopt/gpt_oss-mxfp4", NULL}, {"modelopt/gpt_oss-nvfp4", NULL}, {"foreign/llama-gptq-int4-g32-descact", NULL},
        {"modelopt/llama-int4_awq", "columns"}, {"sources/deepseek_v3", "latent attention"}};
    int32_t tokens[TOKENS];
    for (int i = 0; i < TOKENS; i++) tokens[i] = (int32_t)(test_random() % VOCAB);
    for (size_t i = 0; i < MOQI_COUNT(cases); i++) {
        const char *dir = golden("%s", cases[i].dir);
        meeting at;
        rank_of r[RANKS], one;
        if (!is_there(golden("%s/config.json", cases[i].dir))) { printf("%s is not in this set\n", cases[i].dir); continue; }
        memset(&at, 0, sizeof at);
        memset(&one, 0, sizeof one);
        run_ranks(&at, r, dir, tokens, TOKENS);
        one.dir = dir;
        one.tokens = tokens;
        one.count = TOKENS;
        one.logits = (float *)calloc((size_t)TOKENS * VOCAB, sizeof(float));
        run_rank(&one);
        for (int k = 0; k < RANKS; k++) {
            if (cases[i].refused) {
                if (!strstr(r[k].err.text, cases[i].refused)) fprintf(stderr, "%s: '%s'\n", cases[i].dir, r[k].err.text);
                CHECK(r[k].err.code < 0 && strstr(r[k].err.text, cases[i].refused));
                continue;
            }
            double far = relative_rms(r[k].logits, one.logits, (size_t)TOKENS * VOCAB);
            if (r[k].err.code < 0 || !(far < 5e-6)) fprintf(stderr, "%s, rank %d: %.2g, %s\n", cases[i].dir, k, far, r[k].err.text);
            CHECK_INT(r[k].err.code, MOQ_OK);
            CHECK(far < 5e-6);
            CHECK(at.calls > 0);
        }
        CHECK(memcmp(r[0].logits, r[1].logits, (size_t)TOKENS * VOCAB * sizeof(float)) == 0);
        free(one.logits);
        for (int k = 0; k < RANKS; k++) free(r[k].logits);
    }
}

/* The state of one rank is none of the other's. */
static void test_ranks_state(void)
{
    llm_desc d = talk_desc();
    moq_error e;
    void *state = NULL;
    size_t bytes = 0;
    d.ranks = RANKS;
    d.all_reduce = sum_ranks; /* nothing runs here: it is not called */
    for (d.rank = 0; d.rank < RANKS; d.rank++) {
        llm_memory plan;
        llm *m = open_or_say(&d);
        if (!m) break;
        CHECK_INT(llm_plan(&d, &plan, &e), MOQ_OK);
        CHECK(m->model->head_part > 0 && plan.cache_bytes == m->model->cache_memory && plan.weight_bytes == m->model->weight_memory);
        if (!state) {
            bytes = llm_copy_state(m, NULL, 0, &e);
            state = malloc(bytes);
            CHECK(llm_copy_state(m, state, bytes, &e) == bytes);
            CHECK_INT(llm_set_state(m, state, bytes, &e), MOQ_OK);
        } else {
            CHECK(llm_set_state(m, state, bytes, &e) < 0);
        }
        llm_close(m);
    }
    d.rank = RANKS;
    CHECK(!llm_open(&d, &e) && e.code == MOQ_E_ARG);
    d.ranks = -1;
    CHECK(!llm_open(&d, &e) && e.code == MOQ_E_ARG);
    free(state);
}

/* A conversation, and a sum that fails in the middle of a pass: both ranks end it with the same error. */
static void test_ranks_answer(void)
{
    meeting at;
    rank_of r[RANKS], one;
    memset(&at, 0, sizeof at);
    memset(&one, 0, sizeof one);
    one.dir = DEMO_DIR;
    run_rank(&one);
    for (int turn = 0; turn < 4; turn++) {
        at.fail_at = turn % 2 ? 7 : 0;
        at.queues = turn / 2;
        at.asked[0] = at.asked[1] = 0;
        run_ranks(&at, r, DEMO_DIR, NULL, 0);
        CHECK(at.queues ? at.asked[0] > 0 && at.asked[0] == at.asked[1] : at.asked[0] == 0);
        for (int k = 0; k < RANKS; k++) {
            CHECK_INT(r[k].err.code, at.fail_at ? MOQ_E_BACKEND : MOQ_OK);
            if (!at.fail_at) CHECK_STR(r[k].text, one.text);
            free(r[k].logits);
        }
    }
}

/* ---- a device whose logits have to travel ---- */

/* The CPU backend as if its memory were not the host's: what send_act brings is there after sync, and not before. */
typedef struct device {
    moq_backend be;
    moq_backend *inner;
    struct { float *dst, *values; size_t count; } sent[64];
    int waiting, sends, picks, alive, downloads;
} device;

static device distant; /* functions of the table get no more than the CPU's context */

static void *distant_host_alloc(moq_backend *be, size_t bytes, moq_error *err)
{
    (void)be; (void)err;
    distant.alive++;
    return calloc(1, bytes);
}

static void distant_host_release(moq_backend *be, void *ptr)
{
    (void)be;
    distant.alive -= ptr != NULL;
    free(ptr);
}

static void distant_send(moq_backend *be, float *dst, const void *src, size_t count)
{
    (void)be;
    distant.sends++;
    if (distant.waiting == 64) exit(2);
    distant.sent[distant.waiting].dst = dst;
    distant.sent[distant.waiting].count = count;
    distant.sent[distant.waiting].values = (float *)memcpy(malloc(count * sizeof(float)), src, count * sizeof(float));
    distant.waiting++;
}

static moq_result distant_sync(moq_backend *be, moq_error *err)
{
    for (int i = 0; i < distant.waiting; i++) {
        memcpy(distant.sent[i].dst, distant.sent[i].values, distant.sent[i].count * sizeof(float));
        free(distant.sent[i].values);
    }
    distant.waiting = 0;
    return distant.inner->sync(be, err);
}

static void distant_argmax(moq_backend *be, const void *x, int32_t rows, int32_t n, int32_t *index)
{
    distant.picks += rows;
    distant.inner->argmax(be, x, rows, n, index);
}

static void distant_download(moq_backend *be, float *dst, const void *src, size_t count)
{
    distant.downloads++;
    distant.inner->download_act(be, dst, src, count);
}

static void open_distant(llm_desc *d)
{
    moq_cpu_desc c;
    moq_error err;
    memset(&c, 0, sizeof c);
    memset(&distant, 0, sizeof distant);
    c.threads = 1;
    c.act = MOQ_ACT_WIDE;
    distant.inner = moq_cpu_backend(&c, &err);
    distant.be = *distant.inner;
    distant.be.host_alloc = distant_host_alloc;
    distant.be.host_release = distant_host_release;
    distant.be.send_act = distant_send;
    distant.be.sync = distant_sync;
    distant.be.argmax = distant_argmax;
    distant.be.download_act = distant_download;
    d->backend = &distant.be;
}

/* Greedy answers need no logits on the host, others get them there; the text is the CPU's. `change`: somebody wants them after the device has chosen:
   1 other sampling that is the same, 2 a saved state, which holds the choice. Returns how many tokens the device has chosen. */
static int check_distant(const llm_sampling *s, int change)
{
    llm_desc d = talk_desc();
    static char text[1024], want[1024];
    moq_error e;
    if (s) d.sampling = *s;
    llm *m = open_or_say(&d);
    if (!m) return 0;
    begin_talk(m, 0);
    want[0] = text[0] = 0;
    CHECK_INT(hear_more(m, want, sizeof want), MOQ_OK);
    llm_close(m);
    open_distant(&d);
    m = open_or_say(&d);
    if (!m) return 0;
    begin_talk(m, 0);
    for (int ready; (ready = llm_step(m, 0)) >= 0;) {
        const char *piece = ready ? llm_next(m, &e) : NULL;
        size_t n = strlen(text);
        if (piece) snprintf(text + n, sizeof text - n, "%s", piece);
        if (change == 1 && test_random() % 3 == 0) llm_set_sampling(m, s);
        if (change == 2 && test_random() % 7 == 0) CHECK(llm_save(m, state_file, &e) == MOQ_OK && llm_load(m, state_file, &e) == MOQ_OK);
    }
    CHECK_STR(text, want);
    CHECK(s ? distant.picks == 0 && distant.sends > 20 : distant.picks > 20 && distant.sends == 0);
    CHECK_INT(distant.downloads, 0);
    llm_close(m);
    CHECK_INT(distant.alive, 0);
    moq_backend_destroy(distant.inner);
    return distant.picks;
}

static void test_device_picks(void)
{
    llm_sampling s;
    int picks = check_distant(NULL, 0);
    check_distant(NULL, 1);
    CHECK_INT(check_distant(NULL, 2), picks); /* no token is run again */
    memset(&s, 0, sizeof s);
    s.temperature = 0.7f;
    s.seed = 5;
    check_distant(&s, 0);
    memset(&s, 0, sizeof s);
    s.repetition_penalty = 1.1f;
    check_distant(&s, 0);
}

/* Unit by unit until an answer of `from` tokens waits for the next one: 0 in the middle of its pass, 1 when it can be chosen. */
static void stop_in_answer(llm *m, size_t from, int chosen)
{
    moq_error e;
    while (m->ids.count - m->answer < from || m->phase != LLMI_ANSWER || (chosen ? m->row == m->rows : m->house->part_count == 0)) {
        if (llm_step(m, 1) < 0) { CHECK(0); return; }
        if (llm_ready(m) > 0) llm_next(m, &e);
    }
}

/* Other sampling takes effect with the next token: in the middle of the pass that brings it, behind that pass, and where llm_forward has run the slot. */
static void test_device_picks_late(void)
{
    static char text[1024], want[1024];
    const llm_bias much = {11, 1e9f};
    for (int turn = 0; turn < 8; turn++) {
        llm_desc d = talk_desc();
        llm_sampling s;
        moq_error e;
        const int chosen = turn & 1, by_hand = turn & 2 && chosen, biased = turn & 4;
        int32_t first;
        memset(&s, 0, sizeof s);
        s.bias = &much;
        s.bias_count = biased ? 1 : 0;
        open_distant(&d);
        llm *m = open_or_say(&d);
        if (!m) return;
        begin_talk(m, 0);
        want[0] = text[0] = 0;
        CHECK_INT(hear_more(m, want, sizeof want), MOQ_OK);
        llm_reset(m);
        begin_talk(m, 0);
        stop_in_answer(m, 4, chosen);
        snprintf(text, sizeof text, "%.*s", (int)m->text.count, m->text.data);
        first = m->ids.data[0];
        const size_t at = m->ids.count;
        if (by_hand) CHECK_INT(llm_forward(m, 0, &first, 1, 0, NULL, NULL, &e), MOQ_OK);
        llm_set_sampling(m, &s);
        CHECK(m->done <= m->ids.count);
        while (m->ids.count == at && llm_ready(m) >= 0) { if (llm_step(m, 1) > 0) llm_next(m, &e); }
        if (biased) CHECK_INT(m->ids.data[at], much.id);
        else {
            while (llm_next(m, &e)) {}
            CHECK(m->text.count == strlen(want) && memcmp(m->text.data, want, strlen(want)) == 0);
        }
        llm_close(m);
        CHECK_INT(distant.alive, 0);
        moq_backend_destroy(distant.inner);
    }
}

/* A state with a choice of the device, loaded under other sampling or where probabilities are wanted: the logits are made again. Forged choices are refused. */
static void test_device_picks_saved(void)
{
    static uint8_t state[1 << 20];
    const llm_bias much = {11, 1e9f};
    for (int turn = 0; turn < 4; turn++) {
        llm_desc d = talk_desc();
        llm_sampling s;
        moq_error e;
        memset(&s, 0, sizeof s);
        s.bias = &much;
        s.bias_count = 1;
        open_distant(&d);
        llm *m = open_or_say(&d);
        if (!m) return;
        begin_talk(m, 0);
        stop_in_answer(m, 4, 1);
        const size_t at = m->ids.count, done = m->done, bytes = llm_copy_state(m, state, sizeof state, &e);
        const int32_t pick = m->pick;
        CHECK(bytes <= sizeof state && m->picked && m->done == done); /* saving changes nothing */
        llm_reset(m);
        if (turn == 1) llm_set_sampling(m, &s);
        if (turn >= 2) { /* right but for the token, which no vocabulary has, or for what was read before it: nothing */
            llmi_saved parsed;
            uint8_t *ids, *rest;
            size_t all = bytes;
            CHECK_INT(llmi_parse_saved(m, state, bytes, &parsed, &e), MOQ_OK);
            ids = state + (parsed.ids - state);
            rest = state + (parsed.logits - state) + 4;
            if (turn == 2) memset(rest - 4, 0x7f, 4);
            else {
                memmove(ids, parsed.turns, (size_t)(rest - parsed.turns));
                all = (size_t)(rest - state) - (size_t)(parsed.turns - parsed.ids);
                memset(state + LLMI_STATE_HEADER + 8 * 3, 0, 3 * 8); /* tokens that were run, where turns and answer begin */
                memset(state + LLMI_STATE_HEADER + 8 * 10, 0, 8);    /* ids */
                for (int i = 0; i < 8; i++) state[16 + i] = (uint8_t)((uint64_t)all >> 8 * i);
            }
            const uint64_t sum = llmi_hash((const char *)state + LLMI_STATE_HEADER, all - LLMI_STATE_HEADER);
            for (int i = 0; i < 8; i++) state[24 + i] = (uint8_t)(sum >> 8 * i);
            CHECK(llm_set_state(m, state, all, &e) == MOQ_E_STATE && strstr(e.text, "contradict"));
        } else {
            CHECK_INT(llm_set_state(m, state, bytes, &e), MOQ_OK);
            CHECK(m->picked == (turn == 0) && m->done == done - (turn == 1));
            while (m->ids.count == at && llm_ready(m) >= 0) { if (llm_step(m, 1) > 0) llm_next(m, &e); }
            CHECK_INT(m->ids.data[at], turn ? much.id : pick);
        }
        llm_close(m);
        CHECK_INT(distant.alive, 0);
        moq_backend_destroy(distant.inner);
    }
}

/* Who leaves a pass that goes on for others gets nothing of it any more. loads: it takes a saved state; otherwise it is closed and its slot becomes a fork.
   travels: logits have to. unit: how many units of the pass of two rows have run, the last ones slices of logits. */
static void check_leaver(int loads, int travels, int unit)
{
    static char want[2][1024], text[1024];
    llm_desc d = talk_desc();
    llm *m[2], *n;
    moq_error e;
    d.slots = 2;
    if (travels) open_distant(&d);
    d.sampling.repetition_penalty = 1.00001f; /* logits come to the host */
    if (!(m[0] = open_or_say(&d))) return;
    m[0]->model->head_cut = 64;
    m[1] = llm_join(m[0], &e);
    for (int i = 0; i < 2; i++) {
        begin_talk(m[i], i);
        want[i][0] = 0;
        CHECK_INT(hear_more(m[i], want[i], sizeof want[i]), MOQ_OK);
        llm_reset(m[i]);
    }
    begin_talk(m[0], 0);
    stop_in_answer(m[0], 20, 1);
    if (llm_ready(m[0]) > 0) llm_next(m[0], &e);
    size_t bytes = llm_copy_state(m[0], NULL, 0, &e);
    void *state = malloc(bytes);
    CHECK(state && llm_copy_state(m[0], state, bytes, &e) == bytes);
    begin_talk(m[1], 1);
    stop_in_answer(m[1], 2, 1);
    for (int i = 0; i < 1000 && m[0]->house->part_count < 2; i++) {
        llm_piece(m[0]);
        llm_piece(m[1]);
        llm_step_all(m[0], 1);
    }
    for (int i = 1; i < unit; i++) llm_step_all(m[0], 1);
    CHECK_INT(m[0]->house->part_count, 2);
    n = m[1];
    if (loads) CHECK_INT(llm_set_state(m[1], state, bytes, &e), MOQ_OK);
    else {
        llm_close(m[1]);
        n = llm_fork(m[0], &e);
        CHECK(n != NULL);
    }
    free(state);
    for (int i = 0; i < 2; i++) {
        llm *who = i ? n : m[0];
        if (!who) continue;
        while (llm_next(who, &e)) {}
        snprintf(text, sizeof text, "%.*s", (int)who->text.count, who->text.data);
        CHECK_STR(text, want[0]);
    }
    llm_close(n);
    llm_close(m[0]);
    if (travels) CHECK_INT(distant.alive, 0);
    if (travels) moq_backend_destroy(distant.inner);
}

static void test_leaver(void)
{
    for (int loads = 0; loads < 2; loads++)
        for (int travels = 0; travels < 2; travels++)
            for (int unit = 1; unit < 16; unit += 6) check_leaver(loads, travels, unit);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    snprintf(state_file, sizeof state_file, "%s/llm_batch_%d.state", "/tmp", (int)getpid());
    RUN(test_batch_logits);
    RUN(test_batch_continuous);
    RUN(test_batch_disturbed);
    RUN(test_fork_demo);
    RUN(test_fork_families);
    RUN(test_state_goes_on);
    RUN(test_state_refused);
    RUN(test_state_latent);
    RUN(test_shift_chat);
    RUN(test_shift_raw);
    RUN(test_state_dynamic_rope);
    RUN(test_state_other_head);
    RUN(test_state_half_cache);
    RUN(test_batch_out_of_memory);
    RUN(test_ranks_logits);
    RUN(test_ranks_state);
    RUN(test_ranks_answer);
    RUN(test_device_picks);
    RUN(test_device_picks_late);
    RUN(test_device_picks_saved);
    RUN(test_leaver);
    remove(state_file);
    return test_end();
}
