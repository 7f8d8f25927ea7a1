/* test_calib.c - calibration algorithms against recorded statistics, the observing backend, calibration runs, AutoQuantize's solver. */
#define MOQ_QUANTIZE
#include "test.h"
#include "golden.h"

#include <sys/stat.h>

/* F32 values of a recorded tensor; NULL when it is not there. Free with free(). */
static float *recorded(const moq_st *st, size_t *count, const char *format, const char *module)
{
    char name[640];
    const moq_tensor *t;
    snprintf(name, sizeof name, format, module);
    t = moq_st_find(st, name);
    *count = 0;
    if (!t) return NULL;
    size_t n = 1;
    for (uint32_t i = 0; i < t->rank; i++) n *= (size_t)t->shape[i];
    float *v = (float *)malloc((n ? n : 1) * sizeof *v);
    if (v && !moq_to_f32(t->dtype, t->data, n, v)) { free(v); return NULL; }
    *count = n;
    return v;
}

static moq_checkpoint *open_source(const char *source)
{
    moq_error err;
    moq_checkpoint *ck = moq_open(golden("sources/%s", source), NULL, &err);
    if (!ck) printf("  %s\n", err.text);
    return ck;
}

/* ---- calibration runs against what ModelOpt recorded ---- */

typedef struct recorded_run { const char *folder, *source, *recipe, *kv; } recorded_run;

static const recorded_run run_cases[] = {
    {"llama-fp8", "llama", "fp8", NULL},
    {"llama-nvfp4", "llama", "nvfp4", NULL},
    {"llama-w4a8_nvfp4_fp8", "llama", "w4a8_nvfp4_fp8", NULL},
    {"llama-nvfp4_omlp_only", "llama", "nvfp4_omlp_only", NULL},
    {"llama-nvfp4_mse_sweep", "llama", "nvfp4_w4a4_weight_mse_fp8_sweep", NULL},
    {"llama-nvfp4_four_over_six", "llama", "nvfp4_four_over_six", NULL},
    {"llama-nvfp4_local_hessian", "llama", "nvfp4_w4a4_weight_local_hessian", NULL},
    {"llama-nvfp4_act_headroom-kv_fp8_cast", "llama", "nvfp4_act_headroom", "fp8_cast"},
    {"llama-nvfp4_awq_lite", "llama", "nvfp4_awq_lite", NULL},
    {"llama-nvfp4_awq_clip", "llama", "nvfp4_awq_clip", NULL},
    {"llama-nvfp4_awq_full", "llama", "nvfp4_awq_full", NULL},
    {"llama-nvfp4_svdquant", "llama", "nvfp4_svdquant", NULL},
    {"llama-int4_awq", "llama", "int4_awq", NULL},
    {"llama-w4a8_awq", "llama", "w4a8_awq_beta", NULL},
    {"llama-int8_sq", "llama", "int8_smoothquant", NULL},
    {"llama-fp8-kv_fp8", "llama", "fp8", "fp8"},
    {"llama-nvfp4-kv_fp8", "llama", "nvfp4", "fp8"},
    {"llama-nvfp4-kv_fp8_affine", "llama", "nvfp4", "fp8_affine"},
    {"llama-nvfp4-kv_nvfp4", "llama", "nvfp4", "nvfp4"},
    {"llama-nvfp4-kv_nvfp4_affine", "llama", "nvfp4", "nvfp4_affine"},
    {"llama-nvfp4-kv_nvfp4_rotate", "llama", "nvfp4", "nvfp4_rotate"},
    {"qwen2-nvfp4", "qwen2", "nvfp4", NULL},
    {"qwen2-int4_awq", "qwen2", "int4_awq", NULL},
    {"qwen2-int8_sq", "qwen2", "int8_smoothquant", NULL},
    {"qwen3-nvfp4", "qwen3", "nvfp4", NULL},
    {"qwen3-nvfp4_awq_lite", "qwen3", "nvfp4_awq_lite", NULL},
    {"mixtral-nvfp4", "mixtral", "nvfp4", NULL},
    {"qwen3_moe-fp8", "qwen3_moe", "fp8", NULL},
    {"qwen3_moe-nvfp4", "qwen3_moe", "nvfp4", NULL},
    {"qwen3_moe-int8_sq", "qwen3_moe", "int8_smoothquant", NULL},
    {"qwen3_moe-nvfp4_experts_only_mse-kv_fp8_cast", "qwen3_moe", "nvfp4_experts_only_mse", "fp8_cast"}
};

/* What one run is worth. */
typedef struct run_score {
    int amax_count, amax_exact, kv_count, layers, same_alpha, clips, same_clip;
    double amax_worst, kv_worst, bias_worst, p_worst, p_equal, p_least, regret, blocks_equal, blocks_least;
    int p_layers, block_layers, missing;
} run_score;

/* The recorded loss of our alpha over the smallest recorded loss, minus 1. */
static double alpha_regret(const moq_json *info, double alpha)
{
    const moq_json *loss = moq_json_find(info, "loss"), *e;
    double least = 1e300, ours = 1e300, nearest = 1;
    for (e = moq_json_first(loss); e; e = moq_json_next(loss, e)) {
        double v = 0, at = strtod(e->key, NULL);
        moq_json_float(e, &v);
        if (v < least) least = v;
        if (fabs(at - alpha) < nearest) { nearest = fabs(at - alpha); ours = v; }
    }
    return ours / least - 1;
}

/* Which alpha gave our scale? Found by recomputing it: the statistics do not carry it. */
static int alpha_of(const moq_stats *s, const char *module)
{
    char name[640];
    const moq_tensor *t[3];
    static const char *const tails[3] = {"act_scale", "weight_scale", "best_scale"};
    for (int i = 0; i < 3; i++) {
        snprintf(name, sizeof name, "%s.awq_lite.%s", module, tails[i]);
        if (!(t[i] = moq_find_stat(s, name))) return -1;
    }
    int64_t n = (int64_t)t[0]->shape[0];
    float *v = (float *)malloc((size_t)n * sizeof *v);
    int found = -1;
    for (int i = 0; v && i < MOQI_ALPHAS && found < 0; i++) {
        moqi_awq_scale((const float *)t[0]->data, (const float *)t[1]->data, n, moqi_alpha(i), v);
        if (memcmp(v, t[2]->data, (size_t)n * sizeof *v) == 0) found = i;
    }
    free(v);
    return found;
}

static double relative(double a, double b) { return b > 0 || b < 0 ? fabs(a / b - 1) : fabs(a); }

/* Names as they end. */
static int ends(const char *s, const char *tail)
{
    size_t n = strlen(s), m = strlen(tail);
    return n >= m && strcmp(s + n - m, tail) == 0;
}

/* One recorded tensor against ours of the same name. */
static void score_tensor(run_score *r, const moq_tensor *t, const moq_stats *s)
{
    const moq_tensor *own = moq_find_stat(s, t->name);
    size_t n = (size_t)(t->bytes / 4), equal = 0;
    const float *b;
    float *a;
    int amax = ends(t->name, "input_quantizer.amax"), kv = ends(t->name, "bmm_quantizer.amax"), bias = ends(t->name, "bias_value");
    int p = ends(t->name, "pre_quant_scale"), blocks = ends(t->name, ".weight_quantizer.amax") && own && n > 1;
    if (strstr(t->name, "q_bmm_quantizer") || (!amax && !kv && !bias && !p && !blocks)) return;
    if (!own || own->bytes != t->bytes) { r->missing++; return; }
    a = (float *)malloc(t->bytes + 1);
    memcpy(a, t->data, t->bytes);
    b = (const float *)own->data;
    double worst = 0, largest = 0;
    for (size_t i = 0; i < n; i++) {
        float v = p ? moqi_bf16(b[i]) : b[i]; /* SmoothQuant's vectors are kept in F32, ModelOpt's record is BF16 */
        double d = bias ? fabs((double)v - (double)a[i]) : relative((double)v, (double)a[i]);
        if (fabs((double)a[i]) > largest) largest = fabs((double)a[i]);
        if (d > worst) worst = d;
        equal += memcmp(&a[i], &v, 4) == 0;
    }
    if (amax) {
        r->amax_count++;
        r->amax_exact += worst == 0;
        if (worst > r->amax_worst) r->amax_worst = worst;
    }
    if (kv) { r->kv_count++; if (worst > r->kv_worst) r->kv_worst = worst; }
    if (bias && worst / largest > r->bias_worst) r->bias_worst = worst / largest;
    if (p) {
        r->p_layers++;
        r->p_equal += (double)equal / (double)n;
        if ((double)equal / (double)n < r->p_least) r->p_least = (double)equal / (double)n;
        if (worst > r->p_worst) r->p_worst = worst;
    }
    if (blocks) {
        r->block_layers++;
        r->blocks_equal += (double)equal / (double)n;
        if ((double)equal / (double)n < r->blocks_least) r->blocks_least = (double)equal / (double)n;
    }
    free(a);
}

/* Choices of alpha and clip ratio from calibration.json. */
static void score_choices(run_score *r, const moq_json_doc *doc, const moq_stats *s)
{
    const moq_json *root = moq_json_root(doc), *e;
    for (e = moq_json_first(root); e; e = moq_json_next(root, e)) {
        char module[512];
        double best = 0;
        size_t n = strlen(e->key);
        if (ends(e->key, ".awq_lite")) {
            snprintf(module, sizeof module, "%.*s", (int)(n - 9), e->key);
            int own = alpha_of(s, module);
            moq_json_float(moq_json_find(e, "best_alpha"), &best);
            r->layers++;
            if (own < 0) { r->missing++; continue; }
            r->same_alpha += fabs(best - (double)moqi_alpha(own)) < 1e-4;
            double regret = alpha_regret(e, (double)moqi_alpha(own));
            if (regret > r->regret) r->regret = regret;
        }
        if (ends(e->key, ".awq_clip")) {
            char name[600];
            snprintf(name, sizeof name, "%.*s.weight_quantizer.amax", (int)(n - 9), e->key);
            const moq_tensor *t = moq_find_stat(s, name);
            moq_json_float(moq_json_find(e, "best_clip_val"), &best);
            r->clips++;
            r->same_clip += t && relative((double)*(const float *)t->data, best) < 0.02;
        }
    }
}

static moq_judge run_judge; /* of the table that runs */

static int score_case(const recorded_run *c, int f32, run_score *r)
{
    golden_rows g;
    moq_calibrate_desc d;
    moq_error err;
    char folder[256];
    moq_st *st;
    moq_checkpoint *ck;
    memset(r, 0, sizeof *r);
    r->p_least = r->blocks_least = 1;
    snprintf(folder, sizeof folder, "modelopt/%s/calibration.safetensors", c->folder);
    if (!is_there(golden("%s", folder)) || !is_there(golden("sources/%s/model.safetensors", c->source))) return 0;
    st = moq_st_open(golden("%s", folder), NULL, &err);
    ck = open_source(c->source);
    CHECK(st && ck && load_rows(&g, c->source, 16));
    memset(&d, 0, sizeof d);
    d.source = ck;
    d.recipe = c->recipe;
    d.kv = c->kv;
    d.forward = llm_calibrate;
    d.data = &g.samples;
    d.f32 = f32;
    d.judge = run_judge;
    moq_stats *s = ck ? moq_calibrate(&d, &err) : NULL;
    if (!s) printf("  %s: %s\n", c->folder, err.text);
    CHECK(s != NULL);
    for (size_t i = 0; s && st && i < moq_st_count(st); i++) score_tensor(r, moq_st_get(st, i), s);
    snprintf(folder, sizeof folder, "modelopt/%s/calibration.json", c->folder);
    moq_json_doc *doc = is_there(golden("%s", folder)) ? read_doc(golden("%s", folder)) : NULL;
    if (doc && s) score_choices(r, doc, s);
    moq_json_destroy(doc);
    moq_stats_destroy(s);
    moq_st_close(st);
    moq_close(ck);
    return 1;
}

/* The table of calibration from the tokens alone, in the BF16 way and in F32. */
static void run_table(int f32)
{
    int ran = 0, layers = 0, same = 0, clips = 0, same_clips = 0, amax = 0, exact = 0;
    printf("calibration from tokens, %s model: what ModelOpt recorded against what we find\n", f32 ? "F32" : "BF16");
    printf("  %-46s %9s %8s %7s %7s %7s %7s %8s %6s %7s\n", "case", "amax same", "worst", "alpha", "regret", "p same", "p worst", "clip", "blocks", "kv");
    for (size_t i = 0; i < sizeof run_cases / sizeof run_cases[0]; i++) {
        run_score r;
        char text[8][32];
        if (!score_case(&run_cases[i], f32, &r)) continue;
        ran++;
        memset(text, 0, sizeof text);
        if (r.amax_count) { snprintf(text[0], 32, "%d/%d", r.amax_exact, r.amax_count); snprintf(text[1], 32, "%.2f%%", r.amax_worst * 100); }
        if (r.layers) { snprintf(text[2], 32, "%d/%d", r.same_alpha, r.layers); snprintf(text[3], 32, "%.2f%%", r.regret * 100); }
        if (r.p_layers) { snprintf(text[4], 32, "%.1f%%", r.p_equal / r.p_layers * 100); snprintf(text[5], 32, "%.1f%%", r.p_worst * 100); }
        if (r.clips) snprintf(text[6], 32, "%d/%d", r.same_clip, r.clips);
        if (r.block_layers) snprintf(text[7], 32, "%.1f%%", r.blocks_equal / r.block_layers * 100);
        printf("  %-46s %9s %8s %7s %7s %7s %7s %8s %6s", run_cases[i].folder, text[0], text[1], text[2], text[3], text[4], text[5], text[6], text[7]);
        if (r.kv_count) printf(" %.2f%%", r.kv_worst * 100);
        if (r.bias_worst > 0) printf(" bias %.2f%%", r.bias_worst * 100);
        if (r.missing) printf(" missing %d", r.missing);
        printf("\n");
        CHECK_INT(r.missing, 0);
        /* A layer with another alpha has another scale, so amax and p count where nothing was chosen. The F32 limits are
           wider than there: the recorded model is a BF16 one. */
        if (!r.layers && !strstr(run_cases[i].recipe, "svdquant")) CHECK(r.amax_worst <= (f32 ? 0.05 : 0.02));
        if (strstr(run_cases[i].recipe, "smooth") && !f32) CHECK(r.p_worst <= 0.06 && r.p_equal >= 0.94 * r.p_layers);
        if (r.kv_count) CHECK(r.kv_worst <= 0.01 && r.bias_worst <= (f32 ? 0.016 : 0.0079));
        CHECK(r.regret <= (f32 || run_judge == MOQ_JUDGE_GRAM ? 0.03 : 0.005) && 10 * r.same_alpha >= 8 * r.layers);
        if (!r.layers && !r.p_layers) CHECK(r.blocks_least >= 0.9); /* a smoothed weight has blocks of its own */
        layers += r.layers;
        same += r.same_alpha;
        clips += r.clips;
        same_clips += r.same_clip;
        amax += r.amax_count;
        exact += r.amax_exact;
    }
    printf("  %d of %d cases are there\n", ran, (int)(sizeof run_cases / sizeof run_cases[0]));
    printf("  in all: alpha %d of %d, clip ratio %d of %d, input amax exact %d of %d\n", same, layers, same_clips, clips, exact, amax);
    CHECK(10 * same_clips >= (f32 ? 8 : 9) * clips);
    CHECK(ran > 0);
}

/* ---- staged: recorded statistics -> scale, scores and costs -> choice ---- */

static const char *const awq_cases[] = {"llama-nvfp4_awq_lite", "llama-nvfp4_awq_full", "llama-int4_awq", "llama-w4a8_awq", "qwen2-int4_awq", "qwen3-nvfp4_awq_lite"};

/* From recorded act, weight scale and alpha: s to 3e-7, and its BF16 values all equal; the smallest recorded loss is at that alpha. */
static void test_awq_scale_from_recorded(void)
{
    int layers = 0;
    for (size_t i = 0; i < sizeof awq_cases / sizeof awq_cases[0]; i++) {
        char file[256];
        moq_error err;
        snprintf(file, sizeof file, "modelopt/%s/calibration.safetensors", awq_cases[i]);
        if (!is_there(golden("%s", file))) continue;
        moq_st *st = moq_st_open(golden("%s", file), NULL, &err);
        snprintf(file, sizeof file, "modelopt/%s/calibration.json", awq_cases[i]);
        moq_json_doc *doc = read_doc(golden("%s", file));
        const moq_json *root = doc ? moq_json_root(doc) : NULL, *e;
        CHECK(st && doc);
        for (e = moq_json_first(root); e; e = moq_json_next(root, e)) {
            if (!ends(e->key, ".awq_lite")) continue;
            size_t n, m, k;
            double alpha = 0, worst = 0;
            float *act = recorded(st, &n, "%s.act_scale", e->key), *wsc = recorded(st, &m, "%s.weight_scale", e->key), *best = recorded(st, &k, "%s.best_scale", e->key);
            CHECK(act && wsc && best && n == m && m == k);
            if (!act || !wsc || !best) { free(act); free(wsc); free(best); continue; }
            float *s = (float *)malloc(n * sizeof *s);
            int flips = 0;
            moq_json_float(moq_json_find(e, "best_alpha"), &alpha);
            moqi_awq_scale(act, wsc, (int64_t)n, (float)alpha, s);
            for (size_t j = 0; j < n; j++) {
                double d = relative((double)s[j], (double)best[j]);
                if (d > worst) worst = d;
                flips += moq_bf16_encode(s[j]) != moq_bf16_encode(best[j]) || moq_bf16_encode(1 / s[j]) != moq_bf16_encode(1 / best[j]);
            }
            CHECK(worst < 4e-7);
            CHECK_INT(flips, 0);
            CHECK(alpha_regret(e, alpha) == 0);
            layers++;
            free(act); free(wsc); free(best); free(s);
        }
        moq_json_destroy(doc);
        moq_st_close(st);
    }
    CHECK(layers > 0);
    printf("  %d layers: scale from recorded statistics\n", layers);
}

enum { MOST_UNITS = 64 };

/* A recorded search as units. */
typedef struct golden_search {
    moq_json_doc *doc;
    const char *names[MOST_UNITS];
    double scores[MOST_UNITS][8], costs[MOST_UNITS][8], denominator, score, bits;
    int32_t choice[MOST_UNITS];
    moq_unit units[MOST_UNITS];
    size_t count;
    moq_solve_method method;
} golden_search;

static int load_search(golden_search *g, const char *folder)
{
    char file[256];
    memset(g, 0, sizeof *g);
    snprintf(file, sizeof file, "modelopt/%s/search.json", folder);
    if (!is_there(golden("%s", file))) return 0;
    g->doc = read_doc(golden("%s", file));
    const moq_json *root = moq_json_root(g->doc), *stats = moq_json_find(root, "candidate_stats"), *best = moq_json_find(root, "best"), *e;
    g->method = moq_json_is(moq_json_find(root, "method"), "gradient") ? MOQ_SOLVE_SUM : MOQ_SOLVE_THRESHOLD;
    moq_json_float(moq_json_find(root, "cost_denominator"), &g->denominator);
    moq_json_float(moq_json_find(best, "score"), &g->score);
    for (e = moq_json_first(stats); e && g->count < MOST_UNITS; e = moq_json_next(stats, e), g->count++) {
        const moq_json *formats = moq_json_find(e, "formats");
        moq_unit *u = &g->units[g->count];
        u->name = e->key;
        u->formats = (int32_t)formats->count;
        u->scores = g->scores[g->count];
        u->costs = g->costs[g->count];
        for (int32_t f = 0; f < u->formats; f++) {
            moq_json_float(moq_json_at(moq_json_find(e, "scores"), (size_t)f), &g->scores[g->count][f]);
            moq_json_float(moq_json_at(moq_json_find(e, "costs"), (size_t)f), &g->costs[g->count][f]);
            if (moq_json_is(moq_json_find(moq_json_find(best, "recipe"), e->key), moq_json_string(moq_json_at(formats, (size_t)f)))) g->choice[g->count] = f;
        }
    }
    g->bits = strtod(strrchr(folder, '_') + 1, NULL);
    return g->count > 0;
}

static void test_solve_recorded(void)
{
    static const char *const folders[] = {"llama-auto_grad_5.5", "llama-auto_kl_6.5", "llama-auto_kl_awq_8.0", "qwen3_moe-auto_grad_5.5", "qwen3_moe-auto_kl_awq_8.0"};
    int ran = 0;
    for (size_t i = 0; i < sizeof folders / sizeof folders[0]; i++) {
        golden_search g;
        moq_solve_desc d;
        moq_error err;
        int32_t choice[MOST_UNITS];
        double score = 0, cost = 0;
        if (!load_search(&g, folders[i])) continue;
        memset(&d, 0, sizeof d);
        d.units = g.units;
        d.count = g.count;
        d.effective_bits = g.bits;
        d.uncompressed = g.denominator;
        d.method = g.method;
        CHECK_INT(moq_solve(&d, choice, &score, &cost, &err), MOQ_OK);
        for (size_t j = 0; j < g.count; j++) CHECK_INT(choice[j], g.choice[j]);
        CHECK(relative(score, g.score) < 1e-12);
        printf("  %s: %zu units, score %.6g, %.6g bits\n", folders[i], g.count, score, cost / g.denominator * 16);
        ran++;
        moq_json_destroy(g.doc);
    }
    CHECK(ran > 0);
}

/* Every choice of `count` units, counted like an odometer: the best sum within the budget. */
static double exhaustive(const moq_solve_desc *d, double budget, double least)
{
    int32_t c[16] = {0};
    double best = 1e300;
    for (;;) {
        double cost = d->fixed_cost, score = 0;
        for (size_t i = 0; i < d->count; i++) { cost += d->units[i].costs[c[i]]; score += d->units[i].scores[c[i]]; }
        if (cost <= budget && cost >= least && score < best) best = score;
        size_t i = 0;
        while (i < d->count && ++c[i] == d->units[i].formats) c[i++] = 0;
        if (i == d->count) return best;
    }
}

/* Random small problems against all choices, with and without a lower limit of cost, with equal costs and equal scores among them. */
static void test_solve_exhaustive(void)
{
    for (int round = 0; round < 400; round++) {
        moq_unit units[8];
        double scores[8][4], costs[8][4], all = 0, score = -1, cost = -1;
        int32_t choice[8];
        moq_solve_desc d;
        moq_error err;
        memset(&d, 0, sizeof d);
        d.count = 1 + test_random() % 8;
        d.units = units;
        d.allocator = test_allocator();
        for (size_t i = 0; i < d.count; i++) {
            double size = 1 + test_random() % 20;
            units[i].name = "unit";
            units[i].formats = 1 + (int32_t)(test_random() % 4);
            units[i].scores = scores[i];
            units[i].costs = costs[i];
            for (int32_t f = 0; f < units[i].formats; f++) {
                costs[i][f] = size * (round % 2 ? 4.0 * (f + 1) : 1.0 + test_random() % 16);
                scores[i][f] = round % 3 ? fabs((double)test_normal()) : (double)(test_random() % 4);
            }
            all += size * 16;
        }
        d.uncompressed = all;
        d.fixed_cost = round % 5 == 0 ? 7 : 0;
        d.effective_bits = 2 + test_random() % 140 * 0.1;
        d.lower = round % 4 == 0 ? 0.9 : 0;
        double budget = d.effective_bits / 16 * all, want = exhaustive(&d, budget * (1 + 1e-12), d.lower * budget);
        moq_result r = moq_solve(&d, choice, &score, &cost, &err);
        if (want > 1e299) { CHECK_INT(r, MOQ_E_CONFIG); continue; }
        CHECK_INT(r, MOQ_OK);
        CHECK(fabs(score - want) <= 1e-9 * (1 + want));
        CHECK(cost <= budget * (1 + 1e-12) && cost >= d.lower * budget);
    }
    CHECK_INT(test_state.live_allocs, 0);
}

/* As many layers as a large model has, real-valued scores: still exact in well under a second. Checked against the Lagrangian bound. */
static void test_solve_large(void)
{
    enum { N = 320 };
    static moq_unit units[N];
    static double scores[N][3], costs[N][3];
    static int32_t choice[N];
    moq_solve_desc d;
    moq_error err;
    double score, cost, start = moq_seconds();
    memset(&d, 0, sizeof d);
    for (int i = 0; i < N; i++) {
        static const double sizes[5] = {6291456, 16777216, 117440512, 58720256, 4194304};
        double harm = exp((double)test_normal());
        units[i].name = "unit";
        units[i].formats = 3;
        units[i].scores = scores[i];
        units[i].costs = costs[i];
        for (int f = 0; f < 3; f++) {
            static const double bits[3] = {4.5, 8, 16};
            costs[i][f] = sizes[i % 5] * bits[f] / 16;
            scores[i][f] = f == 0 ? harm : f == 1 ? harm * 0.08 * (1 + fabs((double)test_uniform())) : 0;
        }
    }
    d.units = units;
    d.count = N;
    d.effective_bits = 5.4;
    CHECK_INT(moq_solve(&d, choice, &score, &cost, &err), MOQ_OK);
    printf("  %d units: %.3f s\n", N, moq_seconds() - start);
    double all = 0, best = -1e300;
    for (int i = 0; i < N; i++) all += costs[i][2];
    for (double price = 1e-12; price < 1e-5; price *= 1.01) { /* no choice can be better than this for any price */
        double bound = -price * 5.4 / 16 * all;
        for (int i = 0; i < N; i++) {
            double low = 1e300;
            for (int f = 0; f < 3; f++)
                if (scores[i][f] + price * costs[i][f] < low) low = scores[i][f] + price * costs[i][f];
            bound += low;
        }
        if (bound > best) best = bound;
    }
    CHECK(cost <= 5.4 / 16 * all * (1 + 1e-12));
    CHECK(score >= best * (1 - 1e-9) && score <= best * 1.01);
}

static void test_unit_names(void)
{
    static const char *const names[][2] = {
        {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.qkv"}, {"model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.qkv"},
        {"model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.o_proj"}, {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.gate_up"},
        {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_up"}, {"model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj"},
        {"model.layers.1.mlp.experts.3.down_proj", "model.layers.1.mlp.experts"}, {"model.layers.1.block_sparse_moe.experts.12.w1", "model.layers.1.block_sparse_moe.experts"},
        {"backbone.layers.1.mixer.up_proj", "backbone.layers.1.mixer.up_proj"}, {"lm_head", "lm_head"}};
    char text[128];
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        CHECK_INT(moq_unit_name(names[i][0], text, sizeof text), strlen(names[i][1]));
        CHECK_STR(text, names[i][1]);
    }
    CHECK(moq_recipe_bits(NULL) == 16 && moq_recipe_bits(moq_find_recipe("nvfp4")) == 4.5 && moq_recipe_bits(moq_find_recipe("w4a16_nvfp4")) == 4.5);
    CHECK(moq_recipe_bits(moq_find_recipe("nvfp4_w4a4_weight_mse_fp8_sweep")) == 4 && moq_recipe_bits(moq_find_recipe("int4_awq")) == 4);
    CHECK(moq_recipe_bits(moq_find_recipe("w4a8_nvfp4_fp8")) == 4 && moq_recipe_bits(moq_find_recipe("fp8")) == 8 && moq_recipe_bits(moq_find_recipe("mxfp6")) == 6);
}

/* ---- algorithms against slow second implementations ---- */

/* One-sided Jacobi: rows of v [n, length] turned in pairs until all are orthogonal; size [n] their lengths, the longest first. Slow. */
static void slow_singular_values(double *v, int64_t n, int64_t length, double *size)
{
    for (int sweep = 0, moved = 1; moved && sweep < 60; sweep++) {
        moved = 0;
        for (int64_t p = 0; p < n - 1; p++)
            for (int64_t q = p + 1; q < n; q++) {
                double *a = v + p * length, *b = v + q * length, aa = 0, bb = 0, ab = 0;
                for (int64_t i = 0; i < length; i++) { aa += a[i] * a[i]; bb += b[i] * b[i]; ab += a[i] * b[i]; }
                if (!(fabs(ab) > 1e-15 * sqrt(aa * bb))) continue;
                double zeta = (bb - aa) / (2 * ab), t = (zeta >= 0 ? 1 : -1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
                double c = 1 / sqrt(1 + t * t), s = c * t;
                moved = 1;
                for (int64_t i = 0; i < length; i++) {
                    double x = a[i], y = b[i];
                    a[i] = c * x - s * y;
                    b[i] = s * x + c * y;
                }
            }
    }
    for (int64_t i = 0; i < n; i++) {
        double sum = 0;
        int64_t at = i;
        for (int64_t j = 0; j < length; j++) sum += v[i * length + j] * v[i * length + j];
        for (; at > 0 && size[at - 1] < sqrt(sum); at--) size[at] = size[at - 1];
        size[at] = sqrt(sum);
    }
}

enum { RANDOM, OUTLIERS, DEFICIENT, REPEATED, BLOCKS, GRADED, ZERO, SAME, HUGE_VALUES, TINY_VALUES };

/* w [rows, cols] of a kind. */
static void fill_kind(float *w, int64_t rows, int64_t cols, int kind)
{
    float thin[400], scale = kind == HUGE_VALUES ? 1e36f : kind == TINY_VALUES ? 1e-38f : 1; /* half of the tiny ones are no normal numbers */
    for (int i = 0; i < 400; i++) thin[i] = test_normal();
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) {
            float v = test_normal() * scale;
            if (kind == OUTLIERS && test_random() % 50 == 0) v *= 40;
            if (kind == DEFICIENT) v = thin[i] * thin[200 + j] + thin[(i + 7) % 200] * thin[200 + (j + 3) % 200]; /* rank 2 */
            if (kind == REPEATED) v = i == j ? (i % 3 ? 2.0f : -2.0f) : 0; /* one value, many times */
            if (kind == BLOCKS) v = i / 2 == j / 2 ? (i == j ? 3.0f : 1.0f) : 0; /* 4 and 2 many times */
            if (kind == GRADED) v = i == j ? ldexpf(1, -(int)i) : 0;
            if (kind == ZERO) v = 0;
            if (kind == SAME) v = 1;
            w[i * cols + j] = v;
        }
}

static void backwards(void *user, int tasks, void (*task)(void *arg, int index, int worker), void *arg)
{
    ++*(int *)user;
    for (int i = tasks - 1; i >= 0; i--) task(arg, i, i % 3);
}

/* U S V^T against Jacobi's singular values: no other matrix of this rank is closer, factors orthogonal; the same bits from several workers. */
static void test_low_rank(void)
{
    static const int shapes[][4] = {{40, 24, 8, RANDOM}, {24, 40, 8, RANDOM}, {33, 7, 7, RANDOM}, {5, 19, 9, RANDOM}, {16, 16, 32, RANDOM}, {64, 48, 1, RANDOM},
        {150, 170, 32, OUTLIERS}, {190, 130, 32, OUTLIERS}, {66, 65, 8, DEFICIENT}, {65, 66, 8, DEFICIENT}, {40, 40, 8, REPEATED}, {30, 50, 32, REPEATED},
        {100, 70, 8, BLOCKS}, {40, 60, 30, BLOCKS}, {45, 45, 32, GRADED}, {20, 45, 32, GRADED}, {20, 30, 4, ZERO}, {30, 20, 4, ZERO}, {70, 9, 4, SAME},
        {9, 70, 4, SAME}, {30, 40, 8, HUGE_VALUES}, {40, 30, 8, TINY_VALUES}, {1, 9, 4, RANDOM}, {9, 1, 4, RANDOM}, {1, 1, 1, RANDOM}, {2, 2, 2, OUTLIERS}};
    int runs = 0;
    double worst_size = 0, worst_left = 0;
    moq_parallel three;
    memset(&three, 0, sizeof three);
    three.run = backwards;
    three.user = &runs;
    three.workers = 3;
    for (size_t t = 0; t < sizeof shapes / sizeof shapes[0]; t++) {
        int64_t rows = shapes[t][0], cols = shapes[t][1], rank = shapes[t][2], n = rows < cols ? rows : cols, length = rows + cols - n;
        size_t sizes[2] = {(size_t)(rank * cols) * 4, (size_t)(rows * rank) * 4};
        float *w = (float *)malloc((size_t)(rows * cols) * 4), *a = (float *)malloc(sizes[0]), *b = (float *)malloc(sizes[1]);
        float *a3 = (float *)malloc(sizes[0]), *b3 = (float *)malloc(sizes[1]);
        double *turned = (double *)malloc((size_t)(rows * cols) * 8), *size = (double *)calloc((size_t)n, 8), left = 0, least = 0;
        fill_kind(w, rows, cols, shapes[t][3]);
        CHECK(moqi_low_rank(NULL, NULL, w, rows, cols, rank, b, a));
        CHECK(moqi_low_rank(NULL, &three, w, rows, cols, rank, b3, a3));
        CHECK(memcmp(a, a3, sizes[0]) == 0 && memcmp(b, b3, sizes[1]) == 0);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < length; j++) turned[i * length + j] = (double)(rows < cols ? w[i * cols + j] : w[j * cols + i]);
        slow_singular_values(turned, n, length, size);
        double unit = size[0] > 0 ? size[0] : 1;
        for (int64_t k = rank; k < n; k++) least += size[k] / unit * (size[k] / unit);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j++) {
                double rest = (double)w[i * cols + j];
                for (int64_t k = 0; k < rank; k++) rest -= (double)b[i * rank + k] * (double)a[k * cols + j];
                left += rest / unit * (rest / unit);
            }
        if (!(fabs(sqrt(left) - sqrt(least)) <= worst_left)) worst_left = fabs(sqrt(left) - sqrt(least));
        for (int64_t k = 0; k < rank; k++)
            for (int64_t l = 0; l <= k; l++) {
                double dot = 0, own = 0;
                for (int64_t j = 0; j < cols; j++) dot += (double)a[k * cols + j] * (double)a[l * cols + j];
                for (int64_t i = 0; i < rows; i++) own += (double)b[i * rank + k] / unit * ((double)b[i * rank + l] / unit);
                if (k < n && size[k] > 1e-14 * unit) CHECK(fabs(dot - (k == l)) < 1e-6);
                if (k >= n) CHECK(dot == 0 && own == 0);
                else if (k != l) CHECK(fabs(own) < 1e-6);
                else if (!(fabs(sqrt(own) - size[k] / unit) <= worst_size)) worst_size = fabs(sqrt(own) - size[k] / unit);
            }
        free(w);
        free(a);
        free(b);
        free(a3);
        free(b3);
        free(turned);
        free(size);
    }
    printf("  of the largest singular value: each of them within %.2g, what is left within %.2g\n", worst_size, worst_left);
    CHECK(runs > 0 && worst_size < 1e-7 && worst_left < 3e-7);
}

/* The sums behind it on every instruction set: the same bits. */
static void test_low_rank_sums(void)
{
    double x[19 * 40], c[19], y[3][40];
    for (int i = 0; i < 19 * 40; i++) x[i] = (double)test_normal();
    for (int i = 0; i < 19; i++) c[i] = (double)test_normal();
    for (int n = 0; n < 40; n++)
        for (int count = 0; count < 20; count++) {
            for (int level = 0; level <= moqi_vector_level(); level++) {
                for (int j = 0; j < 40; j++) y[level][j] = j;
                MOQI_CALL(level, moqi_add_rows, (y[level], c, x, count, 40, n));
                CHECK(memcmp(y[level], y[0], sizeof y[0]) == 0);
            }
            for (int j = 0; j < 40; j++) {
                double want = j;
                for (int i = 0; i < count && j < n; i++) want += c[i] * x[i * 40 + j];
                CHECK(fabs(y[0][j] - want) < 1e-12);
            }
        }
}

/* One weight rounded as the exporter will: NVFP4's static step or an integer group. Written from the formulas. */
static double slow_round(const moq_coding *c, float amax, float top, double x)
{
    if (c->scale == MOQ_F8_E4M3) {
        static const double values[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
        float k = 448 / (top * 0.16666667163372039794921875f), s = moq_e4m3_decode(moq_e4m3_encode(amax * 0.16666667163372039794921875f * k)) / k;
        double best = 0, a = fabs(x);
        for (int i = 1; i < 8 && s > 0; i++)
            if (fabs(a - values[i] * (double)s) < fabs(a - best)) best = values[i] * (double)s;
        return x < 0 ? -best : best;
    }
    double s = (double)amax / 7, q = s > 0 ? rint(x / s) : 0;
    return (q < -8 ? -8 : q > 7 ? 7 : q) * s;
}

/* Optimal brain quantization, which GPTQ's triangular factor stands for: H^-1 by elimination, and after each column the column is
   eliminated from it. All in double. w [rows, n] in place. */
static void slow_gptq(const moq_coding *c, float top, const float *amax, double *w, int64_t rows, const double *h, int64_t n)
{
    int64_t g = c->group_cols, groups = (n + g - 1) / g;
    double *a = (double *)malloc((size_t)(2 * n * n) * sizeof *a), *inv = (double *)malloc((size_t)(n * n) * sizeof *inv);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) { a[i * 2 * n + j] = h[i * n + j]; a[i * 2 * n + n + j] = i == j; }
    for (int64_t p = 0; p < n; p++) { /* Gauss and Jordan; definite, so no pivoting */
        double d = a[p * 2 * n + p];
        for (int64_t j = 0; j < 2 * n; j++) a[p * 2 * n + j] /= d;
        for (int64_t i = 0; i < n; i++) {
            double f = a[i * 2 * n + p];
            for (int64_t j = 0; j < 2 * n && i != p; j++) a[i * 2 * n + j] -= f * a[p * 2 * n + j];
        }
    }
    for (int64_t i = 0; i < n; i++) memcpy(inv + i * n, a + i * 2 * n + n, (size_t)n * sizeof *inv);
    for (int64_t p = 0; p < n; p++) {
        for (int64_t r = 0; r < rows; r++) {
            double q = slow_round(c, amax[r * groups + p / g], top, w[r * n + p]), e = (w[r * n + p] - q) / inv[p * n + p];
            for (int64_t j = p; j < n; j++) w[r * n + j] -= e * inv[p * n + j];
            w[r * n + p] = q;
        }
        for (int64_t i = n - 1; i > p; i--)
            for (int64_t j = n - 1; j > p; j--) inv[i * n + j] -= inv[i * n + p] * inv[p * n + j] / inv[p * n + p];
    }
    free(a);
    free(inv);
}

/* The factor against H^-1 itself, and the quantized weight against the slow algorithm and plain rounding. */
static void gptq_case(const char *recipe, int64_t rows, int64_t n, int64_t tokens)
{
    moq_coding c = moq_find_recipe(recipe)->scheme.weight;
    double *h = (double *)calloc((size_t)(n * n), sizeof *h), *keep = (double *)malloc((size_t)(n * n) * sizeof *keep), *slow;
    float *x = (float *)malloc((size_t)(tokens * n) * sizeof *x), *amax, top;
    moqi_matrix w = moqi_matrix_make(NULL, rows, n), q = moqi_matrix_make(NULL, rows, n);
    if (c.group_cols > n) c.group_cols = (int32_t)n;
    int64_t g = c.group_cols, groups = (n + g - 1) / g, wrong = 0;
    for (int64_t t = 0; t < tokens; t++) {
        float common = test_uniform(), other = test_uniform();
        for (int64_t i = 0; i < n; i++) x[t * n + i] = (i == 5 ? 0 : test_uniform() + 2 * common + (float)(i % 3) * other) * (i == 9 ? 8.0f : 1.0f);
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < n; j++) h[i * n + j] += 2.0 / (double)tokens * (double)x[t * n + i] * (double)x[t * n + j];
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i++) w.data[r * w.ld + i] = q.data[r * q.ld + i] = i == 7 ? 0 : moqi_bf16(test_normal() * (r == 1 ? 20.0f : 1.0f));
    amax = (float *)malloc((size_t)(rows * groups) * sizeof *amax);
    top = moqi_block_amax(&w, 0, rows, 0, n);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < groups; k++) amax[r * groups + k] = moqi_amax(w.data + r * w.ld + k * g, k * g + g > n ? n - k * g : g);
    moqi_gptq_damp(&w, h, 0.01);
    CHECK(h[7 * n + 7] > 1 && h[7 * n + 3] == 0 && h[3 * n + 7] == 0); /* a dead column */
    memcpy(keep, h, (size_t)(n * n) * sizeof *h);
    CHECK(moqi_inverse_factor(NULL, h, n));
    double worst = 0;
    for (int64_t i = 0; i < n; i++) /* (U H) U^T = 1 / ... : H = U^-1 U^-T, so U H U^T = 1 */
        for (int64_t j = 0; j < n; j++) {
            double sum = 0;
            for (int64_t k = i; k < n; k++) {
                double part = 0;
                for (int64_t l = j; l < n; l++) part += keep[k * n + l] * h[j * n + l];
                sum += h[i * n + k] * part;
            }
            if (j < i) CHECK(h[i * n + j] == 0);
            if (fabs(sum - (i == j)) > worst) worst = fabs(sum - (i == j));
        }
    CHECK(worst < 1e-9);
    CHECK(moqi_gptq_rows(NULL, NULL, &c, top, amax, &q, h));
    slow = (double *)malloc((size_t)(rows * n) * sizeof *slow);
    for (int64_t i = 0; i < rows * n; i++) slow[i] = (double)w.data[i / n * w.ld + i % n];
    slow_gptq(&c, top, amax, slow, rows, keep, n);
    double errors[3] = {0, 0, 0};
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i++) wrong += fabs((double)q.data[r * q.ld + i] - slow[r * n + i]) > 1e-4 * (double)top;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = 0; r < rows; r++) {
            double e[3] = {0, 0, 0};
            for (int64_t i = 0; i < n; i++) {
                double v = (double)x[t * n + i], o = (double)w.data[r * w.ld + i];
                e[0] += v * (slow_round(&c, amax[r * groups + i / g], top, o) - o);
                e[1] += v * ((double)q.data[r * q.ld + i] - o);
                e[2] += v * (slow[r * n + i] - o);
            }
            for (int k = 0; k < 3; k++) errors[k] += e[k] * e[k];
        }
    printf("  %-10s %3lld x %3lld: squared error %.4g, second implementation %.4g, plain rounding %.4g; %lld of %lld weights are others\n", recipe,
           (long long)rows, (long long)n, errors[1], errors[2], errors[0], (long long)wrong, (long long)(rows * n));
    CHECK(errors[1] < 0.7 * errors[0] && errors[1] < 1.05 * errors[2] && errors[2] < 1.05 * errors[1]);
    CHECK((double)wrong <= 0.01 * (double)(rows * n)); /* one value on an edge moves all that follow it in its row */
    moqi_matrix_drop(NULL, &w);
    moqi_matrix_drop(NULL, &q);
    free(h);
    free(keep);
    free(slow);
    free(x);
    free(amax);
}

static void test_gptq(void)
{
    double h[9] = {0, 0, 0, 0, 0, 0, 0, 0, 0};
    gptq_case("nvfp4_gptq", 12, 32, 100);
    gptq_case("nvfp4_gptq", 70, 176, 400); /* more than one block of each kind, none of them whole */
    gptq_case("int4_gptq", 12, 24, 100);
    gptq_case("int4_gptq", 70, 300, 700);
    CHECK(!moqi_inverse_factor(NULL, h, 3)); /* not definite: the identity */
    for (int i = 0; i < 9; i++) CHECK(h[i] == (i % 4 == 0));
}

/* Inputs of one layer as its NVFP4 quantizer rounds them, [rows, cols]; the model computes with the rounded ones. */
typedef struct input_log { const char *name; const moq_st *stats; float *x; size_t count, room; } input_log;

static int keep_input(void *user, const moq_linear *layers, int32_t parts, float *x, int32_t rows)
{
    input_log *l = (input_log *)user;
    size_t n = (size_t)rows * (size_t)layers[0].cols, count;
    float *amax = recorded(l->stats, &count, "%s.input_quantizer.amax", layers[0].name);
    for (size_t i = 0; amax && i < n; i += 16) {
        float top = 0, g = amax[0] * moqi_bits_f32(0x39c30c31u), s; /* 1 / 2688 */
        for (size_t k = i; k < i + 16; k++) top = fabsf(x[k]) > top ? fabsf(x[k]) : top;
        s = top / (6 * g);
        s = moq_e4m3_decode(moq_e4m3_encode(s < 448 ? s : 448)) * g;
        for (size_t k = i; k < i + 16; k++) x[k] = moqi_bf16(moq_e2m1_decode(moq_e2m1_encode(x[k] / (s < 1e-5f ? 1 : s))) * (s < 1e-5f ? 1 : s));
    }
    for (int32_t i = 0; i < parts; i++) {
        if (strcmp(layers[i].name, l->name) != 0) continue;
        if (l->count + n > l->room) {
            l->room = 2 * (l->count + n);
            l->x = (float *)realloc(l->x, l->room * sizeof *x);
        }
        memcpy(l->x + l->count, x, n * sizeof *x);
        l->count += n;
    }
    free(amax);
    return amax != NULL;
}

/* All of them, from a BF16 model. Free x with free(). */
static input_log inputs_of(const moq_checkpoint *ck, const moq_st *stats, const char *name, golden_rows *g)
{
    input_log l;
    moq_observer o;
    moq_error err;
    memset(&l, 0, sizeof l);
    memset(&o, 0, sizeof o);
    l.name = name;
    l.stats = stats;
    o.user = &l;
    o.input = keep_input;
    o.bf16 = 1;
    moq_backend *be = moq_cpu_backend(NULL, &err), *watch = moq_observing_backend(be, &o, NULL, &err);
    CHECK(be && watch && llm_calibrate(&g->samples, ck, watch, &err) == MOQ_OK);
    moq_backend_destroy(watch);
    moq_backend_destroy(be);
    return l;
}

/* A BF16 folder with the weights that gptq made in its first block. 0 on failure. */
static int write_made(const char *dir, const char *source, const moq_checkpoint *ck, const moq_st *stats)
{
    static moq_tensor list[400];
    char path[1300];
    moq_error err;
    size_t bytes, n = 0;
    mkdir(dir, 0777);
    for (; n < moq_tensor_count(ck) && n < 400; n++) {
        list[n] = *moq_get_tensor(ck, n);
        const moq_tensor *made = strstr(list[n].name, "layers.0.") ? moq_st_find(stats, list[n].name) : NULL;
        if (!made) continue;
        list[n].dtype = made->dtype;
        list[n].data = made->data;
        list[n].bytes = made->bytes;
    }
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    if (moq_st_write(path, list, n, NULL, 0, NULL, &err) != MOQ_OK) return 0;
    snprintf(path, sizeof path, "%s/config.json", source);
    char *text = moq_read_file(path, 1 << 20, NULL, &bytes, &err);
    snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *f = fopen(path, "wb");
    int ok = text && f && fwrite(text, 1, bytes, f) == bytes;
    if (f) fclose(f);
    moq_release(NULL, text, bytes + 1);
    return ok;
}

/* From the inputs that a layer has behind `from`, the slow algorithm must make the folder's weight. */
static void gptq_layer(const moq_quantize_desc *d, const char *layer, const moq_checkpoint *from, const moq_checkpoint *ck, const moq_checkpoint *out, const moq_st *stats, golden_rows *g)
{
    moq_linear w, q;
    moq_error err;
    size_t count;
    CHECK(moq_find_linear(ck, layer, &w, &err) == MOQ_OK && moq_find_linear(out, layer, &q, &err) == MOQ_OK);
    input_log l = inputs_of(from, stats, layer, g);
    moq_coding c = moq_find_recipe(d->recipe)->scheme.weight;
    int64_t n = w.cols, rows = w.rows, tokens = (int64_t)l.count / n, gc = c.group_cols, groups = n / gc, wrong = 0;
    CHECK_INT(tokens, 16 * 24);
    double *h = (double *)calloc((size_t)(n * n), sizeof *h), *slow = (double *)malloc((size_t)(rows * n) * sizeof *slow), mean = 0, errors[2] = {0, 0};
    double *plain = (double *)malloc((size_t)(rows * n) * sizeof *plain);
    float *amax = (float *)calloc((size_t)(rows * groups), sizeof *amax), *row = (float *)malloc((size_t)n * sizeof *row), *x = l.x;
    float *top = recorded(stats, &count, "%s.weight_quantizer.global_amax", layer);
    CHECK((top != NULL) == c.has_global);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < n; j++) h[i * n + j] += 2.0 / (double)tokens * (double)x[t * n + i] * (double)x[t * n + j];
    for (int64_t i = 0; i < n; i++) mean += h[i * n + i] / (double)n;
    for (int64_t i = 0; i < n; i++) h[i * n + i] += 0.01 * mean;
    for (int64_t r = 0; r < rows; r++) {
        moq_dequantize(&w, r, 1, row);
        for (int64_t i = 0; i < n; i++) plain[r * n + i] = (double)row[i];
        for (int64_t k = 0; k < groups; k++) amax[r * groups + k] = moqi_amax(row + k * gc, gc);
    }
    memcpy(slow, plain, (size_t)(rows * n) * sizeof *slow);
    slow_gptq(&c, top ? top[0] : 0, amax, slow, rows, h, n);
    for (int64_t r = 0; r < rows; r++) {
        moq_dequantize(&q, r, 1, row);
        for (int64_t i = 0; i < n; i++) wrong += fabs((double)row[i] - slow[r * n + i]) > 1e-3 * fabs(slow[r * n + i]) + 1e-6;
        for (int64_t t = 0; t < tokens; t++) {
            double e[2] = {0, 0};
            for (int64_t i = 0; i < n; i++) {
                double o = plain[r * n + i], v = (double)x[t * n + i];
                e[0] += v * (slow_round(&c, amax[r * groups + i / gc], top ? top[0] : 0, o) - o);
                e[1] += v * ((double)row[i] - o);
            }
            for (int k = 0; k < 2; k++) errors[k] += e[k] * e[k];
        }
    }
    printf("  %-10s %-32s %5lld of %6lld weights are others; squared error of its outputs %.3f of plain rounding's\n", d->recipe, layer, (long long)wrong,
           (long long)(rows * n), errors[1] / errors[0]);
    CHECK((double)wrong <= 0.03 * (double)(rows * n)); /* BF16 products in another order flip values on edges, and each moves what follows in its row */
    CHECK(errors[1] < 0.8 * errors[0]);
    free(h);
    free(slow);
    free(plain);
    free(amax);
    free(row);
    free(top);
    free(l.x);
}

/* From tokens to a folder, whose weights are those of the second implementation: in the first block, and in the second, whose inputs come from
   a first block that is quantized. */
static void test_gptq_folder(void)
{
    static const char *const cases[][2] = {{"llama", "nvfp4_gptq"}, {"llama", "int4_gptq"}, {"qwen2", "nvfp4_gptq"}}; /* qwen2 has biases */
    static const char *const files[] = {"gptq-out/model.safetensors", "gptq-out/config.json", "gptq-out/hf_quant_config.json", "gptq-out/generation_config.json", "gptq-out",
                                        "gptq-made/model.safetensors", "gptq-made/config.json", "gptq-made", "gptq-stats"};
    int done = 0;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        golden_rows g;
        moq_quantize_desc d;
        moq_error err;
        char target[1100], made[1100], kept[1100], file[1200];
        snprintf(target, sizeof target, "%s", test_path("build/gptq-out"));
        snprintf(made, sizeof made, "%s", test_path("build/gptq-made"));
        snprintf(kept, sizeof kept, "%s", test_path("build/gptq-stats"));
        if (!is_there(golden("sources/%s/model.safetensors", cases[i][0]))) continue;
        CHECK(load_rows(&g, cases[i][0], 16));
        memset(&d, 0, sizeof d);
        d.source = golden("sources/%s", cases[i][0]);
        d.target = target;
        d.recipe = cases[i][1];
        d.calibrate = llm_calibrate;
        d.data = &g.samples;
        d.save_calibration = kept;
        d.threads = (int)i + 1;
        moq_result r = moq_quantize(&d, &err);
        if (r != MOQ_OK) printf("  %s\n", err.text);
        CHECK_INT(r, MOQ_OK);
        moq_checkpoint *ck = open_source(cases[i][0]), *out = moq_open(target, NULL, &err), *from = NULL;
        moq_st *stats = moq_st_open(kept, NULL, &err);
        CHECK(ck && out && stats);
        if (ck && out && stats && write_made(made, d.source, ck, stats)) from = moq_open(made, NULL, &err);
        CHECK(from != NULL);
        if (from) {
            gptq_layer(&d, "model.layers.0.self_attn.k_proj", ck, ck, out, stats, &g);
            gptq_layer(&d, "model.layers.1.self_attn.q_proj", from, ck, out, stats, &g);
        }
        moq_close(from);
        moq_close(out);
        moq_close(ck);
        moq_st_close(stats);
        for (size_t k = 0; k < sizeof files / sizeof *files; k++) {
            snprintf(file, sizeof file, "%s/%s", test_path("build"), files[k]);
            remove(file);
        }
        done++;
    }
    if (!done) test_state.skipped++;
}

/* Products by tiles against sums in double, for odd shapes. */
static void test_product(void)
{
    for (int64_t rows = 1; rows < 11; rows += 3)
        for (int64_t cols = 1; cols < 70; cols += 13)
            for (int64_t tokens = 1; tokens < 6; tokens += 2) {
                moqi_matrix w = moqi_matrix_make(NULL, rows, cols), x = moqi_matrix_make(NULL, tokens, cols);
                float y[64];
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < cols; j++) w.data[i * w.ld + j] = test_normal();
                for (int64_t i = 0; i < tokens; i++)
                    for (int64_t j = 0; j < cols; j++) x.data[i * x.ld + j] = test_normal();
                moqi_product(NULL, NULL, &x, &w, y, rows);
                for (int64_t t = 0; t < tokens; t++)
                    for (int64_t r = 0; r < rows; r++) {
                        double sum = 0, size = 0;
                        for (int64_t j = 0; j < cols; j++) {
                            double p = (double)w.data[r * w.ld + j] * (double)x.data[t * x.ld + j];
                            sum += p;
                            size += fabs(p);
                        }
                        CHECK(fabs(sum - (double)y[t * rows + r]) <= 1e-5 * size);
                    }
                moqi_matrix_drop(NULL, &w);
                moqi_matrix_drop(NULL, &x);
            }
}

/* Our fake quantization against decoded bytes of the exporters: the same numbers where both use the same scale. */
static void test_fake_weight(void)
{
    static const char *const recipes[] = {"int8_weight_only", "int4_blockwise_weight_only", "mxfp8", "fp8_per_channel_per_token"};
    enum { R = 6, C = 256 };
    moqi_matrix w = moqi_matrix_make(NULL, R, C), q = moqi_matrix_make(NULL, R, C);
    for (int i = 0; i < R * C; i++) w.data[i] = moqi_bf16(test_normal());
    for (size_t i = 0; i < sizeof recipes / sizeof recipes[0]; i++) {
        const moq_recipe *recipe = moq_find_recipe(recipes[i]);
        int64_t g = recipe->scheme.weight.group_cols > 0 ? recipe->scheme.weight.group_cols : C;
        moqi_fake_weight(NULL, &recipe->scheme.weight, 0, &w, &q);
        for (int64_t r = 0; r < R; r++)
            for (int64_t k = 0; k < C; k += g) {
                double top = 0, worst = 0, step = 0;
                for (int64_t j = k; j < k + g; j++) {
                    double x = (double)w.data[r * C + j], d = fabs((double)q.data[r * C + j] - x);
                    if (fabs(x) > top) top = fabs(x);
                    if (d > worst) worst = d;
                }
                step = strcmp(recipes[i], "int8_weight_only") == 0 ? top / 127 / 2 : g == 128 ? top / 7 / 2 : top / 14;
                CHECK(worst > 0 && worst <= step * 1.01 + top / 256); /* half a step, and BF16's own rounding */
            }
    }
    moqi_matrix_drop(NULL, &w);
    moqi_matrix_drop(NULL, &q);
}

/* A histogram of known block maxima: percentiles are bin centres. */
static void test_headroom(void)
{
    static uint64_t bins[MOQI_BINS];
    float x[16];
    memset(x, 0, sizeof x);
    moqi_headroom_add(bins, x, 16); /* a zero block is not counted */
    for (int i = 0; i < MOQI_BINS; i++) CHECK(bins[i] == 0);
    CHECK(moqi_headroom_amax(bins, 3.5f) == 3.5f);
    for (int i = 0; i < 1000; i++) { x[i % 16] = i < 20 ? 0.001f : 1.0f; moqi_headroom_add(bins, x, 16); x[i % 16] = 0; }
    /* 2 % of the blocks are at 0.001: the anchor is its bin's centre times 16384, above the upper value */
    double bin = floor((log2(0.001) + 40) / 0.15625);
    CHECK(relative((double)moqi_headroom_amax(bins, 1), 16384 * exp2(-40 + (bin + 0.5) * 0.15625)) < 1e-6);
}

/* ---- the observing backend ---- */

typedef struct watch_log {
    int inputs, outputs, kv, batches, zero;
    int64_t rows;
    const moq_checkpoint *ck;
    char seen[512]; /* by module index */
} watch_log;

static int log_input(void *user, const moq_linear *layers, int32_t parts, float *x, int32_t rows)
{
    watch_log *l = (watch_log *)user;
    l->inputs++;
    l->rows += rows;
    for (int32_t p = 0; p < parts; p++)
        for (size_t i = 0; i < moq_module_count(l->ck) && i < sizeof l->seen; i++) {
            moq_linear w;
            moq_get_module(l->ck, i, &w, NULL);
            if (strcmp(w.name, layers[p].name) == 0) l->seen[i] = 1;
        }
    if (l->zero) memset(x, 0, (size_t)(rows * layers[0].cols) * sizeof *x);
    return l->zero;
}

static void log_output(void *user, const moq_linear *layers, int32_t parts, const float *y, int32_t rows)
{
    (void)layers; (void)parts; (void)y; (void)rows;
    ((watch_log *)user)->outputs++;
}

static void log_kv(void *user, const moq_kv_desc *cache, const float *k, const float *v, int32_t rows)
{
    (void)k; (void)v; (void)rows;
    CHECK(strstr(cache->name, "self_attn") || strstr(cache->name, "mixer"));
    ((watch_log *)user)->kv++;
}

static void log_batch(void *user) { ((watch_log *)user)->batches++; }

/* Logits of two rows through a backend; 0 when the engine does not run this family. */
static int logits_on(const moq_checkpoint *ck, moq_backend *be, const golden_rows *g, float *out, size_t room)
{
    llm_desc d;
    moq_error err;
    memset(&d, 0, sizeof d);
    d.checkpoint = ck;
    d.backend = be;
    d.no_tokenizer = 1;
    d.chunk = 7; /* rows in pieces */
    llm *m = llm_open(&d, &err);
    if (!m) return 0;
    size_t vocab = (size_t)llm_get_info(m)->vocab;
    CHECK(2 * 24 * vocab <= room);
    for (int i = 0; i < 2; i++) CHECK_INT(llm_forward(m, 0, g->rows[i], g->lengths[i], 0, out + (size_t)i * 24 * vocab, NULL, &err), MOQ_OK);
    llm_close(m);
    return (int)vocab;
}

static double distance(const float *a, const float *b, size_t n)
{
    double d = 0, s = 0;
    for (size_t i = 0; i < n; i++) {
        d += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        s += (double)b[i] * (double)b[i];
    }
    return sqrt(d / s);
}

/* Watching changes nothing, sees every layer, and a changed input goes into the product. */
static void test_observe(void)
{
    static const char *const sources[] = {"llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "phi3", "gpt_oss", "nemotron_h", "deepseek_v3", "gemma3"};
    static float plain[2 * 24 * 512], seen[2 * 24 * 512];
    int ran = 0;
    for (size_t i = 0; i < sizeof sources / sizeof sources[0]; i++) {
        golden_rows g;
        moq_error err;
        watch_log log;
        moq_observer o;
        char file[256];
        snprintf(file, sizeof file, "sources/%s/model.safetensors", sources[i]); /* the small set has only some of the models */
        if (!is_there(golden("%s", file))) continue;
        moq_checkpoint *ck = open_source(sources[i]);
        moq_backend *be = moq_cpu_backend(NULL, &err);
        CHECK(ck && be && load_rows(&g, sources[i], 16));
        size_t n = (size_t)logits_on(ck, be, &g, plain, sizeof plain / 4) * 48;
        if (n == 0) { printf("  %s: the engine does not run it yet\n", sources[i]); moq_backend_destroy(be); moq_close(ck); continue; }
        memset(&log, 0, sizeof log);
        memset(&o, 0, sizeof o);
        log.ck = ck;
        o.user = &log;
        o.input = log_input;
        o.output = log_output;
        o.kv = log_kv;
        o.end_batch = log_batch;
        moq_allocator a = test_allocator();
        moq_backend *watch = moq_observing_backend(be, &o, &a, &err);
        CHECK(watch && logits_on(ck, watch, &g, seen, sizeof seen / 4) > 0);
        double d = distance(seen, plain, n);
        int missing = 0;
        for (size_t m = 0; m < moq_module_count(ck); m++) {
            moq_linear w;
            moq_get_module(ck, m, &w, &err);
            if (!log.seen[m] && !strstr(w.name, "embed") && !strstr(w.name, ".experts") && !strstr(w.name, "conv1d")) missing++;
        }
        moq_end_batch(watch);
        moq_end_batch(be); /* no observer: nothing happens */
        CHECK(d < 2e-6);
        CHECK_INT(missing, 0);
        CHECK_INT(log.batches, 1);
        CHECK(log.inputs == log.outputs && log.inputs > 0);
        log.zero = 1;
        CHECK(logits_on(ck, watch, &g, seen, sizeof seen / 4) > 0);
        for (size_t k = 0; k < n; k++) CHECK(seen[k] == 0 || d > 1); /* the output layer saw zeros */
        moq_backend_destroy(watch);
        o.bf16 = 1;
        log.zero = 0;
        watch = moq_observing_backend(be, &o, &a, &err);
        CHECK(watch && logits_on(ck, watch, &g, seen, sizeof seen / 4) > 0);
        double rounded = distance(seen, plain, n);
        CHECK(rounded > 1e-4 && rounded < 0.5);
        int flips = 0;
        for (size_t k = 0; k < n; k++) flips += (moqi_f32_bits(seen[k]) & 0xffffu) != 0;
        CHECK_INT(flips, 0);
        moq_backend_destroy(watch);
        printf("  %s: watched %.2g from plain, BF16 %.2g; %d products, %d rows of keys\n", sources[i], d, rounded, log.inputs, log.kv);
        CHECK(logits_on(ck, be, &g, seen, sizeof seen / 4) > 0 && memcmp(seen, plain, n * 4) == 0);
        moq_backend_destroy(be);
        moq_close(ck);
        ran++;
    }
    CHECK(ran > 0);
    CHECK_INT(test_state.live_allocs, 0);
}

static int stop_at_once(void *user, moq_stage stage, uint64_t done, uint64_t total)
{
    (void)user; (void)stage; (void)done; (void)total;
    return 1;
}

static const moq_recipe *choose_nothing(void *user, const char *module)
{
    (void)user;
    return strstr(module, "down_proj") ? moq_find_recipe("fp8") : NULL;
}

/* Errors are sentences, nothing leaks, and what was not chosen is not there. */
static void test_calibrate_misuse(void)
{
    golden_rows g;
    moq_calibrate_desc d;
    moq_error err;
    moq_checkpoint *ck = open_source("llama");
    if (!ck) return;
    CHECK(load_rows(&g, "llama", 16));
    memset(&d, 0, sizeof d);
    d.source = ck;
    d.data = &g.samples;
    d.threads = 1;
    d.allocator = test_allocator();
    CHECK(!moq_calibrate(&d, &err) && err.code == MOQ_E_ARG);
    d.forward = llm_calibrate;
    CHECK(!moq_calibrate(&d, &err) && err.code == MOQ_E_ARG);
    d.recipe = "nvfp5";
    CHECK(!moq_calibrate(&d, &err) && err.code == MOQ_E_ARG && strstr(err.text, "nvfp5"));
    d.recipe = "nvfp4";
    d.kv = "fp9";
    CHECK(!moq_calibrate(&d, &err) && err.code == MOQ_E_ARG && strstr(err.text, "fp9"));
    for (int i = 1; i < (int)MOQ_KV_FORMAT_COUNT; i++) CHECK(strstr(err.text, moq_kv_format_name((moq_kv_format)i)));
    d.kv = NULL;
    g.samples.count = 0;
    CHECK(!moq_calibrate(&d, &err) && err.code == MOQ_E_ARG && strstr(err.text, "row"));
    g.samples.count = 4;
    g.tokens[1][3] = 1 << 20;
    CHECK(!moq_calibrate(&d, &err) && err.code == MOQ_E_ARG);
    g.tokens[1][3] = 1;
    d.progress = stop_at_once;
    CHECK(!moq_calibrate(&d, &err) && err.code == MOQ_E_CANCELLED);
    d.progress = NULL;
    d.choose = choose_nothing;
    moq_stats *s = moq_calibrate(&d, &err);
    CHECK(s && moq_stats_count(s) == 4 && moq_find_stat(s, "model.layers.1.mlp.down_proj.input_quantizer.amax"));
    CHECK(s && !moq_get_stat(s, 4) && moq_find_stat(s, "model.layers.0.mlp.down_proj.weight_quantizer.amax") && !moq_find_stat(s, "model.layers.1.mlp.up_proj.input_quantizer.amax"));
    if (s) {
        CHECK_INT(moq_stats_save(s, test_path("build/calib_test.safetensors"), &err), MOQ_OK);
        moq_st *st = moq_st_open(test_path("build/calib_test.safetensors"), NULL, &err);
        const moq_tensor *t = st ? moq_st_find(st, "model.layers.0.mlp.down_proj.input_quantizer.amax") : NULL;
        CHECK(t && t->rank == 0 && t->dtype == MOQ_F32 && memcmp(t->data, moq_find_stat(s, t->name)->data, 4) == 0);
        moq_st_close(st);
        remove(test_path("build/calib_test.safetensors"));
    }
    moq_stats_destroy(s);
    moq_stats_destroy(NULL);
    CHECK_INT(test_state.live_allocs, 0);
    moq_close(ck);
}

/* Every allocation of a run may fail: an error, and nothing is left. Later failures are sampled, because a run takes hundreds. */
static void test_calibrate_allocations(void)
{
    static const char *const recipes[][2] = {{"nvfp4_awq_full", "fp8_affine"}, {"int8_smoothquant", "nvfp4_rotate"}, {"nvfp4_w4a4_weight_local_hessian", NULL},
        {"nvfp4_gptq", NULL}};
    golden_rows g;
    moq_error err;
    moq_checkpoint *ck = open_source("llama");
    if (!ck) return;
    CHECK(load_rows(&g, "llama", 16));
    g.samples.count = 1;
    g.lengths[0] = 3;
    for (size_t i = 0; i < sizeof recipes / sizeof recipes[0]; i++) {
        moq_calibrate_desc d;
        moq_stats *s = NULL;
        int failures = 0;
        memset(&d, 0, sizeof d);
        d.source = ck;
        d.recipe = recipes[i][0];
        d.kv = recipes[i][1];
        d.forward = llm_calibrate;
        d.data = &g.samples;
        d.threads = 1;
        d.allocator = test_allocator();
        for (long k = 1; !s && k < 100000; k += 1 + k / 6) {
            test_state.fail_at = k;
            s = moq_calibrate(&d, &err);
            if (!s) { CHECK_INT(err.code, MOQ_E_NOMEM); failures++; CHECK_INT(test_state.live_allocs, 0); }
        }
        test_state.fail_at = 0;
        CHECK(s && failures > 10);
        moq_stats_destroy(s);
        CHECK_INT(test_state.live_allocs, 0);
    }
    moq_close(ck);
}

/* The plain way: the whole model for one row after the other, layers never ended. */
static moq_result forward_whole(void *data, const moq_checkpoint *source, moq_backend *watch, moq_error *err)
{
    const llm_samples *s = (const llm_samples *)data;
    llm_desc d;
    memset(&d, 0, sizeof d);
    d.checkpoint = source;
    d.backend = watch;
    d.kv = "wide";
    d.context = 32;
    d.no_tokenizer = 1;
    llm *m = llm_open(&d, err);
    moq_result code = m ? MOQ_OK : err->code;
    for (int32_t i = 0; i < s->count && code >= 0; i++) {
        code = llm_forward(m, 0, s->rows[i], s->lengths[i], 0, NULL, NULL, err);
        if (code >= 0 && ((i + 1) % s->batch == 0 || i + 1 == s->count)) moq_end_batch(watch);
    }
    llm_close(m);
    return code;
}

static int same_stats(const moq_stats *a, const moq_stats *b)
{
    int same = a && b && moq_stats_count(a) == moq_stats_count(b);
    for (size_t i = 0; same && i < moq_stats_count(a); i++) {
        const moq_tensor *t = moq_get_stat(a, i), *u = moq_find_stat(b, t->name);
        same = u && t->bytes == u->bytes && memcmp(t->data, u->data, (size_t)t->bytes) == 0;
        if (!same) printf("  differs: %s\n", t->name);
    }
    return same;
}

/* Layer by layer, in memory or through a file, the statistics are those of the whole model, bit for bit. */
static void test_calibrate_streams(void)
{
    static const char *const cases[][3] = {
        {"llama", "nvfp4_awq_full", "fp8_affine"}, {"llama", "int8_smoothquant", "nvfp4_rotate"}, {"llama", "nvfp4_w4a4_weight_local_hessian", NULL},
        {"gemma3", "nvfp4_act_headroom", "fp8"}, {"qwen3_moe", "nvfp4", "fp8"}, {"deepseek_v3", "fp8", "nvfp4_affine"}, {"gpt_oss", "nvfp4", NULL},
        {"nemotron_h", "mamba_moe_nvfp4_aggressive", "fp8"}, {"phi3", "nvfp4_awq_lite", NULL}, {"mistral", "int4_awq", NULL},
        {"llama", "nvfp4_gptq", NULL}, {"mixtral", "int4_gptq", NULL}};
    int done = 0;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        golden_rows g;
        moq_calibrate_desc d;
        moq_error err;
        moq_stats *s[4];
        if (!is_there(golden("sources/%s/model.safetensors", cases[i][0]))) continue;
        moq_checkpoint *ck = open_source(cases[i][0]);
        CHECK(ck && load_rows(&g, cases[i][0], 16));
        if (!ck) continue;
        g.lengths[1] = 7;
        g.lengths[15] = 1; /* rows need not be alike */
        memset(&d, 0, sizeof d);
        d.source = ck;
        d.recipe = cases[i][1];
        d.kv = cases[i][2];
        d.data = &g.samples;
        d.judge = i % 2 ? MOQ_JUDGE_GRAM : MOQ_JUDGE_EXACT;
        d.threads = 1;
        int first = strstr(cases[i][1], "gptq") != NULL; /* whole rows cannot be run twice: every layer sees layers as they were */
        for (int k = 0; k < 4; k++) {
            d.forward = k ? llm_calibrate : forward_whole;
            d.threads = k == 3 ? 3 : 1;
            g.samples.max_memory = k == 2 ? 1024 : 0;
            g.samples.scratch = test_path("build/calib_spill");
            s[k] = moq_calibrate(&d, &err);
            if (!s[k]) printf("  %s: %s\n", cases[i][0], err.text);
            CHECK(s[k] != NULL);
            if (k > first) CHECK(same_stats(s[first], s[k]));
            else if (k) CHECK(!same_stats(s[0], s[k]));
        }
        CHECK(s[0] && moq_stats_count(s[0]) > 0);
        for (int k = 0; k < 4; k++) moq_stats_destroy(s[k]);
        moq_close(ck);
        done++;
    }
    printf("  %d families: layer by layer = the whole model\n", done);
    CHECK(done > 0);
}

/* What was put comes back, in memory and in a file; no file has a name; ranges are kept. */
static void test_spill(void)
{
    for (int in_file = 0; in_file < 2; in_file++) {
        moq_error err;
        uint8_t data[300], back[300];
        moq_allocator a = test_allocator();
        moq_spill *s = moq_spill_create(1000, in_file ? 999 : 1000, test_path("build/calib_spill"), &a, &err);
        CHECK(s != NULL);
        if (!s) continue;
        CHECK(!is_there(test_path("build/calib_spill")));
        for (int i = 0; i < 300; i++) data[i] = (uint8_t)(i * 7 + in_file);
        CHECK_INT(moq_spill_put(s, 700, data, 300, &err), MOQ_OK);
        CHECK_INT(moq_spill_put(s, 10, data + 5, 200, &err), MOQ_OK);
        CHECK_INT(moq_spill_get(s, 700, back, 300, &err), MOQ_OK);
        CHECK(memcmp(back, data, 300) == 0);
        CHECK_INT(moq_spill_get(s, 11, back, 199, &err), MOQ_OK);
        CHECK(memcmp(back, data + 6, 199) == 0);
        CHECK_INT(moq_spill_put(s, 701, data, 300, &err), MOQ_E_ARG);
        CHECK_INT(moq_spill_get(s, UINT64_MAX, back, 2, &err), MOQ_E_ARG);
        moq_spill_destroy(s);
    }
    moq_error err;
    CHECK(!moq_spill_create(10, 0, NULL, NULL, &err) && err.code == MOQ_E_ARG);
    CHECK(!moq_spill_create(10, 0, "/nowhere/at/all", NULL, &err) && err.code < 0 && strstr(err.text, "no such file"));
    moq_spill_destroy(NULL);
    CHECK_INT(test_state.live_allocs, 0);
}

static void test_run_bf16(void) { run_table(0); }
static void test_run_f32(void) { run_table(1); }

/* d^T H d in doubles of a block of 16 weights whose amax is a, in a tensor whose amax is `whole`. */
static double block_loss(const float *h, const float *w, float a, float whole)
{
    float s = (float)((double)moq_e4m3_decode(moq_e4m3_encode((float)((double)a / (double)whole * 448))) / 448 * (double)whole / 6);
    double d[16], loss = 0;
    for (int i = 0; i < 16; i++) d[i] = (double)w[i] - (double)(moq_e2m1_decode(moq_e2m1_encode(w[i] / s)) * s);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) loss += d[i] * (double)h[i * 16 + j] * d[j];
    return loss;
}

/* The block scales of local_hessian: none of the 126 candidates errs less, on every instruction set and number of workers. */
static void test_hessian_search(void)
{
    enum { ROWS = 7, COLS = 48 };
    float w[ROWS * COLS], h[COLS / 16 * 256], x[COLS], out[ROWS * COLS / 16], again[ROWS * COLS / 16], top = 0;
    moqi_matrix m;
    memset(&m, 0, sizeof m);
    m.data = w;
    m.rows = ROWS;
    m.cols = m.ld = COLS;
    memset(h, 0, sizeof h);
    for (int i = 0; i < ROWS * COLS; i++) {
        w[i] = i < 16 ? 0 : moq_bf16_decode(moq_bf16_encode(test_normal()));
        if (fabsf(w[i]) > top) top = fabsf(w[i]);
    }
    for (int t = 0; t < 40; t++) {
        for (int i = 0; i < COLS; i++) x[i] = test_normal();
        moqi_hessian_add(h, x, COLS);
    }
    moqi_hessian_search(NULL, h, &m, top, out);
    for (int b = 0; b < ROWS * COLS / 16; b++) {
        const float *hb = h + b % (COLS / 16) * 256, *wb = w + b * 16;
        double best = 1e300, mine = block_loss(hb, wb, out[b], top);
        for (int code = 1; code <= 126; code++) {
            double loss = block_loss(hb, wb, top * (moq_e4m3_decode((uint8_t)code) / 448), top);
            if (loss < best) best = loss;
        }
        CHECK(out[b] > 0 && out[b] <= top && mine <= best * (1 + 1e-4));
    }
    CHECK(out[0] < top / 1000); /* a block of zeros: all are equal, the first is taken */
    for (int level = 0; level <= moqi_vector_level(); level++) {
        moqi_hessian_work p;
        p.h = h;
        p.w = &m;
        p.level = level;
        p.out = again;
        moqi_hessian_steps(&p, top);
        for (int i = 0; i < ROWS; i++) moqi_hessian_task(&p, i, 0);
        CHECK(memcmp(out, again, sizeof out) == 0);
    }
}

/* The cheap judge of long runs, on the same short ones. */
static void test_run_gram(void)
{
    run_judge = MOQ_JUDGE_GRAM;
    run_table(0);
    run_judge = MOQ_JUDGE_AUTO;
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_product);
    RUN(test_fake_weight);
    RUN(test_awq_scale_from_recorded);
    RUN(test_headroom);
    RUN(test_hessian_search);
    RUN(test_low_rank);
    RUN(test_low_rank_sums);
    RUN(test_gptq);
    RUN(test_gptq_folder);
    RUN(test_solve_recorded);
    RUN(test_solve_exhaustive);
    RUN(test_solve_large);
    RUN(test_unit_names);
    RUN(test_observe);
    RUN(test_calibrate_misuse);
    RUN(test_calibrate_allocations);
    RUN(test_spill);
    RUN(test_calibrate_streams);
    RUN(test_run_bf16);
    RUN(test_run_f32);
    RUN(test_run_gram);
    return test_end();
}
