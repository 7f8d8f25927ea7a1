/* test_llm_answer.c - stop strings, penalties, log-probabilities, typical sampling, speculation, time budgets, memory plans. */
#define _POSIX_C_SOURCE 200809L
#include "test.h"

#include <math.h>
#include <pthread.h>
#include <sys/resource.h>
#include <time.h>

#include "golden.h"

static const char scene[] = "green charger at hallway coat rack; red pillow at hallway coat rack; yellow book at bedroom drawer; red towel at kitchen sink; "
                            "blue umbrella at kitchen sink; Juno at kitchen counter; robot at bathroom washer";
static const char *const requests[] = {"would you move the green charger to the kitchen counter, then the red pillow to the bedroom bed?",
                                       "bring the yellow book to Juno", "put the red towel and the blue umbrella on the garage rack", "where is my lamp?"};

static llm_desc demo_desc(void)
{
    llm_desc d;
    memset(&d, 0, sizeof d);
    d.path = DEMO_DIR;
    d.threads = 1;
    d.context = 512;
    return d;
}

static void ask(llm *m, int i)
{
    llm_say(m, "system", scene);
    llm_say(m, "user", requests[i]);
}

static moq_result hear(llm *m, char *text, size_t capacity)
{
    moq_error e;
    size_t n = 0;
    text[0] = 0;
    for (const char *piece; (piece = llm_next(m, &e)) != NULL;)
        if (n + strlen(piece) < capacity) n += (size_t)snprintf(text + n, capacity - n, "%s", piece);
    return e.code;
}

/* ---- stop strings ---- */

/* Whatever the stops, what is shown is the plain answer up to the first of them, and no piece shows a part of one before. */
static void test_stops(void)
{
    static const char *const sets[][3] = {{"\"plan\"", NULL, NULL}, {"\"do\":\"pick\"", "zzz", NULL}, {"}", NULL, NULL}, {"xyz", "qqq", NULL},
                                          {"Moving the green charger and", "plan", "{"}, {"rack\"},{\"do\":\"pick\",\"what\":\"red", "bed\"}]}", ""}};
    char plain[1024], text[1024];
    moq_error e;
    llm_desc d = demo_desc();
    llm *m = open_or_say(&d);
    if (!m) return;
    ask(m, 0);
    CHECK_INT(hear(m, plain, sizeof plain), MOQ_OK);
    for (size_t k = 0; k < LLMI_COUNT(sets); k++) {
        int32_t count = sets[k][1] ? sets[k][2] ? 3 : 2 : 1;
        size_t first = strlen(plain), n = 0;
        for (int32_t i = 0; i < count; i++) {
            const char *at = sets[k][i][0] ? strstr(plain, sets[k][i]) : NULL;
            if (at && (size_t)(at - plain) < first) first = (size_t)(at - plain);
        }
        llm_reset(m);
        CHECK_INT(llm_set_stops(m, sets[k], count, &e), MOQ_OK);
        ask(m, 0);
        text[0] = 0;
        for (const char *piece; (piece = llm_next(m, &e)) != NULL;) {
            n += strlen(piece);
            strcat(text, piece);
            CHECK(n <= first && memcmp(text, plain, n) == 0);
        }
        CHECK_INT(e.code, MOQ_OK);
        CHECK_INT(n, first);
        /* the conversation goes on with what was shown */
        CHECK_INT(llm_say(m, "user", requests[1]), MOQ_OK);
        CHECK_INT(hear(m, text, sizeof text), MOQ_OK);
    }
    llm_close(m);
}

/* ---- penalties, log-probabilities, typical sampling ---- */

static void test_penalties(void)
{
    enum { N = 40, COUNT = 30 };
    for (int round = 0; round < 200; round++) {
        llm_sampling s;
        llm_bias bias[3] = {{3, 2.5f}, {-1, 9.0f}, {N + 4, 9.0f}};
        float logits[N], want[N];
        int32_t tokens[COUNT], scratch[N];
        size_t answer = test_random() % COUNT;
        memset(&s, 0, sizeof s);
        s.repetition_penalty = round % 3 ? 1 + test_uniform() * 0.5f : 0;
        s.presence_penalty = round % 2 ? test_uniform() : 0;
        s.frequency_penalty = round % 5 ? test_uniform() : 0;
        s.penalty_window = round % 4 == 0 ? 10 : 0;
        s.bias = bias;
        s.bias_count = 3;
        for (int i = 0; i < COUNT; i++) tokens[i] = (int32_t)(test_random() % (N + 2)) - 1; /* some outside */
        for (int i = 0; i < N; i++) {
            int in_all = 0, in_answer = 0;
            double v = (double)(logits[i] = test_uniform() * 8);
            for (int t = s.penalty_window ? COUNT - 10 : 0; t < COUNT; t++) { /* the obvious way */
                in_all += tokens[t] == i;
                in_answer += tokens[t] == i && (size_t)t >= answer;
            }
            if (in_all && s.repetition_penalty > 0) v = v > 0 ? v / (double)s.repetition_penalty : v * (double)s.repetition_penalty;
            if (in_answer) v -= (double)s.presence_penalty + (double)s.frequency_penalty * in_answer;
            want[i] = (float)(v + (i == 3 ? 2.5 : 0));
        }
        llm_penalize(&s, tokens, COUNT, answer, logits, N, scratch);
        for (int i = 0; i < N; i++) CHECK(fabsf(logits[i] - want[i]) < 1e-5f);
    }
}

static void test_logprobs(void)
{
    enum { N = 300 };
    char text[1024];
    llm_desc d = demo_desc();
    for (int round = 0; round < 50; round++) {
        float logits[N];
        llm_token t;
        double sum = 0;
        int32_t id = (int32_t)(test_random() % N);
        for (int i = 0; i < N; i++) logits[i] = i % 17 == 5 ? (float)(round % 2 ? -INFINITY : NAN) : test_uniform() * 30;
        logits[7] = logits[200]; /* a tie */
        for (int i = 0; i < N; i++) if (logits[i] == logits[i] && logits[i] > -1e30f) sum += exp((double)logits[i]);
        while (id % 17 == 5) id++;
        llm_logprobs(logits, N, id, LLM_TOP, &t);
        CHECK(fabs((double)t.logprob - ((double)logits[id] - log(sum))) < 1e-5);
        CHECK_INT(t.top_count, LLM_TOP);
        for (int k = 0; k < LLM_TOP; k++) {
            int better = 0;
            for (int i = 0; i < N; i++) better += logits[i] > logits[t.top_id[k]] || (logits[i] == logits[t.top_id[k]] && i < t.top_id[k]);
            CHECK_INT(better, k);
            CHECK(fabs((double)t.top_logprob[k] - ((double)logits[t.top_id[k]] - log(sum))) < 1e-5);
        }
    }
    d.logprobs = 3;
    llm *m = open_or_say(&d);
    if (!m) return;
    size_t vocab = (size_t)llm_get_info(m)->vocab, count = 0;
    ask(m, 0);
    CHECK_INT(hear(m, text, sizeof text), MOQ_OK);
    const llm_token *t = llm_get_tokens(m, &count);
    CHECK_INT(count, llm_get_stats(m)->generated_tokens + 1); /* the end token too */
    float *logits = (float *)malloc(m->ids.count * vocab * sizeof *logits);
    moq_error e;
    CHECK_INT(llm_forward(m, 0, m->ids.data, (int32_t)m->ids.count, 0, logits, NULL, &e), MOQ_OK);
    for (size_t i = 0; i < count; i++) { /* greedy: the likeliest one, with the probability that a whole pass says */
        llm_token w;
        llm_logprobs(logits + (m->answer - 1 + i) * vocab, (int32_t)vocab, t[i].id, 3, &w);
        CHECK_INT(t[i].top_count, 3);
        CHECK_INT(t[i].id, t[i].top_id[0]);
        CHECK(fabsf(t[i].logprob - w.logprob) < 1e-3f && t[i].logprob <= 0);
        if (i + 1 < count) CHECK_INT(t[i].id, m->ids.data[m->answer + i]);
    }
    free(logits);
    llm_close(m);
}

/* The set that typical_p keeps, by sorting surprises; draws never leave it and have its shares. */
static void test_typical(void)
{
    enum { N = 30, DRAWS = 20000 };
    for (int round = 0; round < 6; round++) {
        llm_sampling s;
        float logits[N], scratch[N];
        int32_t index[N], order[N], kept = 0;
        int drawn[N] = {0};
        double p[N], sum = 0, entropy = 0, taken = 0;
        uint64_t state = (uint64_t)round;
        memset(&s, 0, sizeof s);
        s.temperature = 1;
        s.typical_p = 0.2f + 0.15f * (float)round;
        for (int i = 0; i < N; i++) sum += p[i] = exp((double)(logits[i] = test_uniform() * 3));
        for (int i = 0; i < N; i++) p[i] /= sum;
        for (int i = 0; i < N; i++) entropy -= p[i] * log(p[i]);
        for (int i = 0; i < N; i++) {
            int at = i;
            for (; at > 0 && fabs(-log(p[order[at - 1]]) - entropy) > fabs(-log(p[i]) - entropy); at--) order[at] = order[at - 1];
            order[at] = i;
        }
        while (taken < (double)s.typical_p && kept < N) taken += p[order[kept++]];
        for (int n = 0; n < DRAWS; n++) drawn[llm_sample(&s, logits, N, &state, scratch, index)]++;
        for (int i = 0; i < N; i++) {
            double expected = i < kept ? p[order[i]] / taken * DRAWS : 0;
            CHECK(fabs(drawn[order[i]] - expected) <= 5 * sqrt(expected) + 1e-9);
        }
    }
}

/* A forbidden token is never chosen; the same settings give the same text with any number of threads. */
static void test_settings_in_a_conversation(void)
{
    char one[2048], two[2048];
    llm_desc d = demo_desc();
    int32_t brace;
    d.sampling.temperature = 1.2f;
    d.sampling.top_k = 60;
    d.sampling.typical_p = 0.9f;
    d.sampling.repetition_penalty = 1.05f;
    d.sampling.frequency_penalty = 0.02f;
    d.sampling.seed = 17;
    for (int threads = 1; threads <= 3; threads++) {
        d.threads = threads;
        llm *m = open_or_say(&d);
        if (!m) return;
        ask(m, 0);
        CHECK_INT(hear(m, threads == 1 ? one : two, sizeof one), MOQ_OK);
        if (threads > 1) CHECK_STR(two, one);
        brace = m->ids.data[m->answer];
        if (threads == 3) {
            llm_bias bias = {0, -(float)INFINITY};
            bias.id = brace;
            d.sampling.bias = &bias;
            d.sampling.bias_count = 1;
            llm_reset(m);
            llm_set_sampling(m, &d.sampling);
            ask(m, 0);
            hear(m, two, sizeof two);
            for (size_t i = m->answer; i < m->ids.count; i++) CHECK(m->ids.data[i] != brace);
        }
        llm_close(m);
    }
}

/* ---- speculation ---- */

static void test_draft(void)
{
    char plain[4][1024], text[1024];
    moq_error e;
    llm_desc d = demo_desc(), small = demo_desc();
    uint64_t guessed = 0, all = 0;
    small.kv = "fp8"; /* a drafter that is not always right */
    small.act = MOQ_ACT_STORED;
    for (int hot = 0; hot < 2; hot++) {
        d.sampling.temperature = hot ? 0.9f : 0;
        d.sampling.seed = 23;
        d.draft = 0;
        llm *m = open_or_say(&d);
        if (!m) return;
        for (int i = 0; i < 4; i++) {
            llm_reset(m);
            ask(m, i);
            CHECK_INT(hear(m, plain[i], sizeof plain[i]), MOQ_OK);
        }
        CHECK_INT(llm_set_draft(m, NULL, 1, &e), MOQ_E_ARG); /* no room was reserved */
        llm_close(m);
        d.draft = 8;
        m = open_or_say(&d);
        llm *drafter = open_or_say(&small);
        if (!m || !drafter) return;
        CHECK_INT(llm_set_draft(m, m, 3, &e), MOQ_E_ARG);
        for (int model = 0; model < 2; model++)
            for (int32_t n = 0; n <= 8; n += 4) {
                CHECK_INT(llm_set_draft(m, model ? drafter : NULL, n, &e), MOQ_OK);
                for (int i = 0; i < 4; i++) {
                    llm_reset(m);
                    ask(m, i);
                    CHECK_INT(hear(m, text, sizeof text), MOQ_OK);
                    CHECK_STR(text, plain[i]); /* guesses change nothing but the speed */
                    if (n == 0) CHECK_INT(llm_get_stats(m)->guessed_tokens, 0);
                    if (n) guessed += llm_get_stats(m)->guessed_tokens;
                    if (n) all += llm_get_stats(m)->generated_tokens;
                }
            }
        llm_close(m);
        llm_close(drafter);
    }
    CHECK(guessed > all / 5 && guessed < all);
    printf("speculation: the same text; %.0f %% of the tokens came from guesses\n", 100.0 * (double)guessed / (double)all);
}

/* ---- time ---- */

/* The distribution of n durations; returns the share within 2.5 ms. */
static double print_times(const char *what, double *t, size_t n)
{
    size_t within = 0;
    for (size_t i = 0; i < n; i++) within += t[i] <= 2.5e-3;
    qsort(t, n, sizeof *t, compare_double);
    printf("    %-15s median %.2f, 90 %% %.2f, 99 %% %.2f, 99.9 %% %.2f, longest %.2f ms; within 2.5 ms: %.2f %%\n", what, 1e3 * t[n / 2], 1e3 * t[n * 9 / 10],
           1e3 * t[n * 99 / 100], 1e3 * t[n * 999 / 1000], 1e3 * t[n - 1], 100.0 * (double)within / (double)n);
    return (double)within / (double)n;
}

/* Budgets of 2 ms from the first call on: 99 of 100 calls return within 2.5 ms. Four conversations, each asked again as soon as its answer
   has ended, so that prompts are read while others answer; now and then only one of them is stepped. While other programs run, a call may
   be taken off the processor in its middle, so the test counts processor time; what the clock on the wall said of all calls, and of those
   that nobody interrupted, is printed beside it. */
static void test_budget(void)
{
    enum { CALLS = 20000, ANSWERS = 24 };
    static double wall[CALLS], own[CALLS], whole[CALLS];
    struct rusage before, after;
    llm_desc d = demo_desc();
    llm *talk[4];
    moq_error e;
    size_t calls = 0, mixed = 0, alone = 0;
    int answers = 0, asked = 0;
    d.slots = 4;
    talk[0] = open_or_say(&d);
    if (!talk[0]) return;
    for (int i = 1; i < 4; i++) talk[i] = llm_join(talk[0], &e);
    while (answers < ANSWERS && calls < CALLS) {
        int reading = 0, answering = 0;
        for (int i = 0; i < 4; i++) {
            if (llm_ready(talk[i]) > 0) llm_piece(talk[i]);
            if (llm_ready(talk[i]) < 0) {
                if (asked > i) CHECK(llm_next(talk[i], &e) == NULL && e.code == MOQ_OK);
                answers += asked > i;
                llm_reset(talk[i]);
                ask(talk[i], asked++ % 4);
            }
            reading += talk[i]->phase != LLMI_ANSWER;
            answering += talk[i]->phase == LLMI_ANSWER;
        }
        mixed += reading && answering;
        getrusage(RUSAGE_SELF, &before);
        double start = moq_seconds(), mine = own_seconds();
        if (calls % 7 == 3) llm_step(talk[calls / 7 % 4], 2000);
        else llm_step_all(talk[0], 2000);
        own[calls] = own_seconds() - mine;
        wall[calls++] = moq_seconds() - start;
        getrusage(RUSAGE_SELF, &after);
        if (after.ru_nivcsw == before.ru_nivcsw) whole[alone++] = wall[calls - 1];
    }
    for (int i = 0; i < 4; i++) llm_close(talk[i]);
    CHECK(answers >= ANSWERS && mixed > calls / 20);
    printf("2 ms budget, %zu calls, %d answers; in %zu calls prompts were read while others answered\n", calls, answers, mixed);
    print_times("wall clock:", wall, calls);
    printf("    %zu calls without an interruption\n", alone);
    if (alone) print_times("wall clock:", whole, alone);
    CHECK(print_times("processor time:", own, calls) >= 0.99);
}

/* The same seed gives the same text with one, two and five threads, sampled with everything on. */
static void test_threads_agree(void)
{
    static const int32_t threads[] = {1, 2, 5};
    char text[3][1024];
    for (int i = 0; i < 3; i++) {
        llm_desc d = demo_desc();
        d.threads = threads[i];
        d.sampling.temperature = 1.3f;
        d.sampling.top_p = 0.98f;
        d.sampling.top_k = 200;
        d.sampling.seed = 77;
        llm *m = open_or_say(&d);
        if (!m) return;
        ask(m, 2);
        hear(m, text[i], sizeof text[i]);
        CHECK(strlen(text[i]) > 20);
        CHECK_STR(text[i], text[0]);
        llm_close(m);
    }
}

/* A budget that one token does not fit: passes stop between layers, and every call does its one unit. */
static void test_budget_of_nothing(void)
{
    char plain[1024], text[1024] = "";
    int calls = 0, state;
    llm_desc d = demo_desc();
    llm *m = open_or_say(&d);
    if (!m) return;
    ask(m, 1);
    CHECK_INT(hear(m, plain, sizeof plain), MOQ_OK);
    llm_reset(m);
    ask(m, 1);
    for (; (state = llm_step(m, 1)) >= 0 && calls < 200000; calls++) {
        if (state == 1) strcat(text, llm_piece(m));
        CHECK(m->house->units <= 2 || m->phase != LLMI_PROMPT);
    }
    CHECK_STR(text, plain);
    CHECK(calls > llm_get_info(m)->layers * 20);
    llm_close(m);
}

/* The output layer whole and in slices, of two answers at once: the same texts and log-probabilities, and no unit is more than a slice. */
static void test_head_in_slices(void)
{
    char text[2][2][1024] = {{"", ""}, {"", ""}};
    double sum[2][2] = {{0, 0}, {0, 0}};
    moq_error e;
    llm_desc d = demo_desc();
    llm *m[2];
    d.slots = 2;
    d.logprobs = 1;
    m[0] = open_or_say(&d);
    m[1] = m[0] ? llm_join(m[0], &e) : NULL;
    if (!m[1]) return;
    llmi_house *h = m[0]->house;
    CHECK_INT(h->model.head_cut, 4160); /* more than this model has tokens */
    for (int slices = 0; slices < 2; slices++) {
        int begun = 0;
        if (slices) h->model.head_cut = 64;
        for (int i = 0; i < 2; i++) {
            llm_reset(m[i]);
            ask(m[i], i);
        }
        for (int calls = 0; llm_step_all(m[0], 1) >= 0 && calls < 200000; calls++) {
            const llmi_pass *p = &h->model.pass;
            CHECK(p->cut % 64 == 0 && h->units <= 1 + 2); /* one of the pass; before it both may choose */
            begun += h->part_count > 0 && p->cut > 0;
            for (int i = 0; i < 2; i++)
                if (llm_ready(m[i]) > 0) strcat(text[slices][i], llm_piece(m[i]));
        }
        CHECK(slices ? begun > 15 * 20 : begun == 0);
        for (int i = 0; i < 2; i++) {
            size_t n;
            const llm_token *t = llm_get_tokens(m[i], &n);
            CHECK(n > 20);
            while (n-- > 0) sum[slices][i] += (double)t[n].logprob;
        }
    }
    for (int i = 0; i < 2; i++) {
        CHECK_STR(text[0][i], text[1][i]);
        CHECK(sum[0][i] == sum[1][i] && sum[0][i] < 0);
    }
    llm_close(m[1]);
    llm_close(m[0]);
}

static void *cancel_soon(void *arg)
{
    double until = moq_seconds() + 0.002;
    while (moq_seconds() < until) {}
    llm_cancel((llm *)arg);
    return NULL;
}

/* Cancelled in the middle of a pass over a long prompt: the others in it lose nothing. */
static void test_cancel_in_a_pass(void)
{
    char plain[1024], text[1024] = "";
    moq_error e;
    llm_desc d = demo_desc();
    pthread_t t;
    d.slots = 2;
    llm *m = open_or_say(&d), *n = m ? llm_join(m, &e) : NULL;
    CHECK(n != NULL);
    if (!n) return;
    ask(m, 2);
    CHECK_INT(hear(m, plain, sizeof plain), MOQ_OK);
    llm_reset(m);
    ask(m, 2);
    ask(n, 0);
    CHECK(pthread_create(&t, NULL, cancel_soon, n) == 0);
    for (int i = 0; llm_step_all(m, 200) >= 0 && i < 100000; i++) {
        if (llm_ready(m) > 0) strcat(text, llm_piece(m));
        if (llm_ready(n) > 0) llm_piece(n);
    }
    pthread_join(t, NULL);
    CHECK_STR(text, plain);
    CHECK(llm_next(n, &e) == NULL && e.code == MOQ_E_CANCELLED);
    CHECK_INT(llm_say(n, "user", requests[3]), MOQ_OK);
    CHECK_INT(hear(n, text, sizeof text), MOQ_OK);
    llm_close(n);
    llm_close(m);
}

/* ---- two ranks in steps ---- */

enum { STEP_RANKS = 2, STEP_TALKS = 2, STEP_CANCEL = 5 };

/* Ranks meet here. Each rank makes the same calls in the same order, from a thread of its own. */
typedef struct step_meeting {
    pthread_barrier_t barrier;
    const float *x[STEP_RANKS];
    int sums[STEP_RANKS];
} step_meeting;

typedef struct step_rank {
    step_meeting *at;
    int32_t rank;
    char text[2][STEP_TALKS][4096]; /* first answers, and those after the cancel */
    moq_result code[STEP_TALKS];
    int failed;
} step_rank;

static moq_result step_sum(void *user, moq_backend *be, void *x, size_t count, moq_error *err)
{
    step_rank *r = (step_rank *)user;
    step_meeting *at = r->at;
    float *sum = (float *)malloc(count * sizeof *sum);
    moq_result code = be->sync(be, err);
    at->x[r->rank] = (const float *)x;
    at->sums[r->rank]++;
    pthread_barrier_wait(&at->barrier);
    for (size_t i = 0; i < count; i++) sum[i] = at->x[0][i] + at->x[1][i];
    pthread_barrier_wait(&at->barrier);
    memcpy(x, sum, count * sizeof *sum);
    free(sum);
    return code;
}

/* Every talk of the model to its end, all in a step or a step of each in turn; number `cancel` is stopped after STEP_CANCEL pieces. */
static void step_talks(step_rank *r, llm *const m[STEP_TALKS], char text[STEP_TALKS][4096], int all, int cancel)
{
    int pieces[STEP_TALKS] = {0}, busy = 1;
    for (int turn = 0; busy && turn < 2000; turn++) {
        if (all) llm_step_all(m[0], 1);
        for (int k = 0; k < STEP_TALKS; k++) {
            if (!all && llm_ready(m[k]) >= 0) llm_step(m[k], 1); /* too little time for anything: a pass is made all the same */
            if (llm_ready(m[k]) <= 0) continue;
            if (strlen(text[k]) + strlen(llm_piece(m[k])) < sizeof text[k]) strcat(text[k], llm_piece(m[k]));
            if (++pieces[k] == STEP_CANCEL && k == cancel) llm_cancel(m[k]);
        }
        busy = 0;
        for (int k = 0; k < STEP_TALKS; k++) busy |= llm_ready(m[k]) >= 0;
    }
    for (int k = 0; k < STEP_TALKS; k++) {
        moq_error e;
        r->failed |= llm_ready(m[k]) >= 0 || llm_next(m[k], &e) != NULL;
        r->code[k] = e.code;
    }
}

static void *run_steps(void *user)
{
    step_rank *r = (step_rank *)user;
    llm_desc d = demo_desc();
    moq_error e;
    llm *m[STEP_TALKS];
    d.slots = STEP_TALKS;
    d.chunk = 48; /* prompts take several passes */
    d.act = MOQ_ACT_WIDE;
    if (r->at) {
        d.ranks = STEP_RANKS;
        d.rank = r->rank;
        d.all_reduce = step_sum;
        d.all_reduce_user = r;
    }
    m[0] = llm_open(&d, &e);
    m[1] = m[0] ? llm_join(m[0], &e) : NULL;
    r->failed = !m[1];
    if (m[1]) {
        for (int k = 0; k < STEP_TALKS; k++) ask(m[k], k ? 1 : 3);
        step_talks(r, m, r->text[0], 1, 1);
        for (int k = 0; k < STEP_TALKS; k++) { /* whoever was stopped begins anew, the other goes on */
            if (k == 1) { r->failed |= r->code[k] != MOQ_E_CANCELLED; llm_reset(m[k]); ask(m[k], 3); }
            else { r->failed |= r->code[k] != MOQ_OK; llm_say(m[k], "user", requests[3]); }
        }
        step_talks(r, m, r->text[1], 0, -1);
        for (int k = 0; k < STEP_TALKS; k++) r->failed |= r->code[k] != MOQ_OK;
    }
    llm_close(m[1]);
    llm_close(m[0]);
    return NULL;
}

/* Two conversations on one model in two parts say what they say on the whole one, step by step, also after one of them was stopped. */
static void test_ranks_steps(void)
{
    step_meeting at;
    pthread_t thread[STEP_RANKS];
    static step_rank r[STEP_RANKS], one;
    memset(&at, 0, sizeof at);
    run_steps(&one);
    CHECK_INT(one.failed, 0);
    pthread_barrier_init(&at.barrier, NULL, STEP_RANKS);
    for (int k = 0; k < STEP_RANKS; k++) {
        r[k].at = &at;
        r[k].rank = k;
        CHECK(pthread_create(&thread[k], NULL, run_steps, &r[k]) == 0);
    }
    for (int k = 0; k < STEP_RANKS; k++) pthread_join(thread[k], NULL);
    pthread_barrier_destroy(&at.barrier);
    CHECK(at.sums[0] > 0 && at.sums[0] == at.sums[1]);
    for (int k = 0; k < STEP_RANKS; k++) {
        CHECK_INT(r[k].failed, 0);
        for (int talk = 0; talk < STEP_TALKS; talk++) {
            CHECK(one.text[1][talk][0] != 0);
            CHECK_STR(r[k].text[0][talk], one.text[0][talk]);
            CHECK_STR(r[k].text[1][talk], one.text[1][talk]);
        }
    }
}

/* ---- memory ---- */

static uint64_t most_live;

static void *count_most(void *user, size_t bytes, size_t align)
{
    void *p = llmi_count_alloc(user, bytes, align);
    uint64_t live = ((const llmi_count *)user)->live;
    if (live > most_live) most_live = live;
    return p;
}

/* What opening may hold for a moment: a backend's scratch memory grows with the layers, the old one is there until the new one is. Reading a tokenizer
   takes more, but before all that is large. */
static uint64_t passing(llm *m)
{
    return 400000 + moqi_cpu_of(llm_get_backend(m))->scratch_bytes;
}

/* The plan is what opening allocates, and answering allocates nothing. */
static void check_plan(const char *path, int talks)
{
    moq_error e;
    llm_desc d;
    llm_memory p;
    llmi_count count;
    memset(&d, 0, sizeof d);
    memset(&count, 0, sizeof count);
    d.path = path;
    d.threads = 1;
    d.context = talks ? 256 : 32;
    d.slots = 3;
    d.logprobs = 2;
    d.no_tokenizer = !talks;
    CHECK_INT(llm_plan(&d, &p, &e), MOQ_OK);
    d.allocator.alloc = count_most;
    d.allocator.release = llmi_count_release;
    d.allocator.user = &count;
    most_live = 0;
    llm *m = llm_open(&d, &e);
    CHECK(m != NULL);
    if (!m) return;
    if (most_live > count.live + passing(m)) fprintf(stderr, "%s: opening takes %.0f more than it keeps\n", path, (double)(most_live - count.live));
    CHECK(most_live <= count.live + passing(m));
    llm *a = llm_join(m, &e), *b = llm_join(m, &e);
    CHECK(a && b);
    double planned = (double)(p.total_bytes - p.mapped_bytes), live = (double)count.live;
    if (fabs(planned - live) > 0.005 * live + 4000) fprintf(stderr, "%s: planned %.0f, allocated %.0f\n", path, planned, live);
    CHECK(fabs(planned - live) <= 0.005 * live + 4000);
    CHECK_INT(p.slots, 3);
    CHECK_INT(p.mapped_bytes, llm_get_info(m)->weight_bytes);
    llm_close(a);
    llm_close(b);
    llm_close(m);
    CHECK_INT(count.live, 0);
    d.max_memory = p.total_bytes + p.total_bytes / 50 + 70000;
    m = llm_open(&d, &e);
    CHECK(m != NULL);
    llm_close(m);
    d.max_memory = p.total_bytes * 9 / 10;
    CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_LIMIT);
    CHECK(strstr(e.text, "cache") != NULL && strstr(e.text, "3 slots") != NULL);
    CHECK_INT(count.live, 0);
}

/* Reading a large tokenizer.json takes more memory than it leaves: that is given back before weights and cache are there. */
static void test_plan_large_tokenizer(void)
{
    static const char *const names[] = {"config.json", "hf_quant_config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json"};
    const size_t pad = 2 << 20;
    moq_file files[LLMI_COUNT(names)];
    moq_open_desc open;
    char path[1024];
    moq_error e;
    llmi_count count;
    llm_desc d;
    memset(&d, 0, sizeof d);
    memset(&count, 0, sizeof count);
    for (size_t i = 0; i < LLMI_COUNT(names); i++) {
        size_t more = i + 1 == LLMI_COUNT(names) ? pad : 0, bytes = 0;
        snprintf(path, sizeof path, DEMO_DIR "/%s", names[i]);
        char *text = moq_read_file(path, 1u << 30, NULL, &bytes, &e), *copy = (char *)malloc(bytes + more + 16);
        if (!text || !copy) exit(2);
        size_t at = more ? (size_t)snprintf(copy, 16, "{\"pad\": \"") : 0;
        memset(copy + at, 'x', more);
        if (more) memcpy(copy + at + more, "\",", 2);
        memcpy(copy + at + (more ? more + 2 : 0), text + (more != 0), bytes - (more != 0));
        files[i].name = names[i];
        files[i].data = copy;
        files[i].bytes = bytes + more + (more ? at + 1 : 0);
        moq_release(NULL, text, bytes + 1);
    }
    d.threads = 1;
    d.context = 256;
    d.allocator.alloc = count_most;
    d.allocator.release = llmi_count_release;
    d.allocator.user = &count;
    memset(&open, 0, sizeof open);
    open.allocator = d.allocator;
    moq_checkpoint *ck = moq_open_memory(files, LLMI_COUNT(names), &open, &e);
    CHECK(ck != NULL);
    d.checkpoint = ck;
    most_live = 0;
    llm *m = ck ? llm_open(&d, &e) : NULL;
    if (!m) fprintf(stderr, "%s\n", e.text);
    CHECK(m != NULL);
    CHECK(m && count.live > 2 * pad + 1000000 && most_live <= count.live + passing(m));
    llm_close(m);
    moq_close(ck);
    for (size_t i = 0; i < LLMI_COUNT(names); i++) free((void *)(uintptr_t)files[i].data);
}

static void test_plan(void)
{
    static const char *const folders[] = {"sources/llama", "modelopt/llama-nvfp4", "modelopt/gpt_oss-nvfp4", "modelopt/qwen3_moe-nvfp4", "modelopt/mixtral-nvfp4",
                                          "foreign/deepseek_v3-fp8-block", "modelopt/nemotron_h-mamba_fp8_aggressive", "foreign/qwen2-gptq-int8-g128",
                                          "modelopt/llama-nvfp4_svdquant", "modelopt/llama-auto_kl_6.5", "compressed-tensors/llama-w4a16-g32-asym"};
    int seen = 0;
    for (size_t i = 0; i < LLMI_COUNT(folders); i++) {
        char path[1024];
        snprintf(path, sizeof path, "%s/%s", GOLDEN_DIR, folders[i]);
        if (!moqi_is_dir(path)) continue;
        check_plan(path, 0);
        seen++;
    }
    CHECK(seen >= 3);
    check_plan(DEMO_DIR, 1);
    llm_memory p;
    moq_error e;
    CHECK_INT(llm_plan(NULL, &p, &e), MOQ_E_ARG);
}

/* After a conversation has begun to answer, no step allocates. */
static void test_nothing_grows(void)
{
    moq_error e;
    llm_desc d = demo_desc();
    const char *const stops[] = {"never to be seen"};
    test_state.live_allocs = 0;
    d.allocator = test_allocator();
    d.slots = 2;
    d.draft = 4;
    d.logprobs = 4;
    d.sampling.temperature = 0.8f;
    d.sampling.top_k = 50;
    d.sampling.repetition_penalty = 1.01f;
    llm *m = open_or_say(&d), *n = m ? llm_fork(m, &e) : NULL;
    CHECK(n != NULL);
    if (!n) return;
    CHECK_INT(llm_set_stops(m, stops, 1, &e), MOQ_OK);
    ask(m, 0);
    ask(n, 2);
    llm_step_all(m, 1); /* the frame is put around what was said */
    long before = test_state.total_allocs;
    uint64_t tokens = 0;
    for (int i = 0; llm_step_all(m, 500) >= 0 && i < 100000; i++) {
        if (llm_ready(m) > 0) llm_piece(m);
        if (llm_ready(n) > 0) llm_piece(n);
    }
    tokens = llm_get_stats(m)->generated_tokens + llm_get_stats(n)->generated_tokens;
    CHECK(tokens > 60);
    CHECK_INT(test_state.total_allocs - before, 0);
    printf("%llu tokens of two conversations: %ld allocations\n", (unsigned long long)tokens, test_state.total_allocs - before);
    llm_close(m);
    llm_close(n);
    CHECK_INT(test_state.live_allocs, 0);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_stops);
    RUN(test_penalties);
    RUN(test_logprobs);
    RUN(test_typical);
    RUN(test_settings_in_a_conversation);
    RUN(test_draft);
    RUN(test_budget);
    RUN(test_threads_agree);
    RUN(test_budget_of_nothing);
    RUN(test_head_in_slices);
    RUN(test_cancel_in_a_pass);
    RUN(test_ranks_steps);
    RUN(test_plan);
    RUN(test_plan_large_tokenizer);
    RUN(test_nothing_grows);
    return test_end();
}
