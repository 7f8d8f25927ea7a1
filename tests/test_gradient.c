/* test_gradient.c - the way back through a model against differences in float64, AutoQuantize's scores and folders against ModelOpt's. */
#define MOQ_QUANTIZE
#include "test.h"
#include "golden.h"
#include "reference.h"

#include <sys/stat.h>
#include <unistd.h>

/* ---- single steps against differences in float64 ---- */

static int close_to(double got, double want, double limit) { return fabs(got - want) <= limit * (fabs(want) + 1e-3); }

static double activation64(const moq_activation_desc *a, double g, double u)
{
    double limit = (double)a->limit;
    switch ((int)a->kind) {
    case MOQ_GELU_MUL: return 0.5 * g * (1 + erf(g / sqrt(2.0))) * u;
    case MOQ_GELU_TANH_MUL: return 0.5 * g * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (g + 0.044715 * g * g * g))) * u;
    case MOQ_SWIGLU_CLAMP:
        g = g > limit ? limit : g;
        u = u > limit ? limit : u < -limit ? -limit : u;
        return g / (1 + exp(-(double)a->alpha * g)) * (u + (double)a->beta);
    case MOQ_RELU2: return g > 0 ? g * g : 0;
    default: return g / (1 + exp(-g)) * u;
    }
}

static void test_back_activation(void)
{
    for (int kind = 0; kind <= MOQ_RELU2; kind++)
        for (int i = 0; i < 500; i++) {
            moq_activation_desc a = {(moq_activation)kind, 7, 1.702f, 1};
            double g = (double)test_normal() * 2, u = (double)test_normal() * 2, e = 1e-5, dg, du;
            if (kind == MOQ_SWIGLU_CLAMP && (fabs(g - 7) < 1e-3 || fabs(fabs(u) - 7) < 1e-3)) continue;
            if (kind == MOQ_RELU2 && fabs(g) < 1e-3) continue;
            moqi_activate_slope(&a, g, u, &dg, &du);
            CHECK(close_to(dg, (activation64(&a, g + e, u) - activation64(&a, g - e, u)) / (2 * e), 1e-6));
            CHECK(close_to(du, kind == MOQ_RELU2 ? 0 : (activation64(&a, g, u + e) - activation64(&a, g, u - e)) / (2 * e), 1e-6));
        }
}

enum { WIDE = 37 };

static double norm64(const double *x, const float *w, const float *r, int n, double eps)
{
    double sum = 0, out = 0;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    for (int i = 0; i < n; i++) out += (double)r[i] * x[i] / sqrt(sum / n + eps) * (double)w[i];
    return out;
}

static void test_back_norm(void)
{
    float x[WIDE], w[WIDE], dy[WIDE], dx[WIDE];
    double x64[WIDE];
    moq_norm_desc d;
    memset(&d, 0, sizeof d);
    d.cols = WIDE;
    d.weight = w;
    d.eps = 1e-5f;
    for (int round = 0; round < 20; round++) {
        for (int i = 0; i < WIDE; i++) { x64[i] = x[i] = test_normal(); w[i] = test_normal(); dy[i] = test_normal(); dx[i] = 1; }
        moqi_back_norm_row(&d, x, dy, dx, 0);
        for (int i = 0; i < WIDE; i++) {
            double e = 1e-4, keep = x64[i], up, down;
            x64[i] = keep + e;
            up = norm64(x64, w, dy, WIDE, (double)d.eps);
            x64[i] = keep - e;
            down = norm64(x64, w, dy, WIDE, (double)d.eps);
            x64[i] = keep;
            CHECK(fabs((double)dx[i] - 1 - (up - down) / (2 * e)) < 2e-5 * (1 + fabs((double)dx[i])));
        }
    }
}

/* sum r_i w_i of the chosen experts, the choice held fixed. */
static double route64(const moq_routing *m, const double *logits, const int32_t *index, const double *r)
{
    double p[16], sum = 0, chosen = 0, out = 0, scale = m->scale != 0 ? (double)m->scale : 1;
    for (int e = 0; e < m->experts; e++) sum += exp(logits[e]);
    for (int e = 0; e < m->experts; e++) p[e] = m->score == MOQ_SCORE_SIGMOID ? 1 / (1 + exp(-logits[e])) : exp(logits[e]) / sum;
    for (int i = 0; i < m->top_k; i++) chosen += p[index[i]];
    for (int i = 0; i < m->top_k; i++) out += r[i] * p[index[i]] * scale / (m->renormalize ? chosen : 1);
    return out;
}

static void test_back_route(void)
{
    for (int round = 0; round < 60; round++) {
        moq_routing m;
        float logits[16], scratch[80], weight[4], dlogits[16];
        double l64[16], r[4], dp[16];
        int32_t index[4];
        memset(&m, 0, sizeof m);
        m.experts = 9;
        m.top_k = 3;
        m.score = round % 2 ? MOQ_SCORE_SIGMOID : MOQ_SCORE_SOFTMAX;
        m.renormalize = round % 3 == 0;
        m.scale = round % 5 == 0 ? 2.5f : 0;
        for (int e = 0; e < 9; e++) { l64[e] = logits[e] = test_normal(); dlogits[e] = 0; }
        for (int i = 0; i < 3; i++) r[i] = (double)test_normal();
        moqi_route(&m, NULL, logits, scratch, index, weight);
        moqi_back_route(&m, scratch, index, r, dp, dlogits);
        for (int e = 0; e < 9; e++) {
            double h = 1e-5, keep = l64[e], up, down;
            l64[e] = keep + h;
            up = route64(&m, l64, index, r);
            l64[e] = keep - h;
            down = route64(&m, l64, index, r);
            l64[e] = keep;
            CHECK(close_to((double)dlogits[e], (up - down) / (2 * h), 1e-4));
        }
    }
}

enum { DIM = 16, VDIM = 12, LENGTH = 9 };

/* r . attention of one query over LENGTH keys, everything in double. all: [q | k | v] */
static double attention64(const double *all, const float *r, int window, double scale, double cap, const float *sink)
{
    const double *q = all, *k = q + DIM, *v = k + LENGTH * DIM;
    double p[LENGTH], sum = sink ? exp((double)*sink) : 0, out = 0;
    int first = window > 0 && LENGTH - window > 0 ? LENGTH - window : 0;
    for (int i = first; i < LENGTH; i++) {
        double s = 0;
        for (int j = 0; j < DIM; j++) s += q[j] * k[i * DIM + j];
        s *= scale;
        if (cap > 0) s = cap * tanh(s / cap);
        sum += p[i] = exp(s);
    }
    for (int i = first; i < LENGTH; i++)
        for (int j = 0; j < VDIM; j++) out += p[i] / sum * v[i * VDIM + j] * (double)r[j];
    return out;
}

static void test_back_attention(void)
{
    enum { ALL = DIM + LENGTH * (DIM + VDIM) };
    for (int round = 0; round < 24; round++) {
        double all[ALL], score[LENGTH], slope[LENGTH];
        float f[ALL], grad[ALL], dy[VDIM], sink = 0.7f;
        moqi_watch w;
        moqi_tape t;
        moqi_tape_kv c;
        moqi_seen_kv s;
        moq_attention_desc a;
        memset(&w, 0, sizeof w);
        memset(&t, 0, sizeof t);
        memset(&c, 0, sizeof c);
        memset(&s, 0, sizeof s);
        memset(&a, 0, sizeof a);
        memset(grad, 0, sizeof grad);
        w.k = moqi_get_kernels(0);
        t.w = &w;
        s.desc.kv_heads = 1;
        s.dim[0] = c.kn = DIM;
        s.dim[1] = c.vn = VDIM;
        for (int i = 0; i < ALL; i++) all[i] = f[i] = test_uniform() * 2;
        for (int i = 0; i < VDIM; i++) dy[i] = test_normal();
        c.k = f + DIM;
        c.v = c.k + LENGTH * DIM;
        c.dk = grad + DIM;
        c.dv = c.dk + LENGTH * DIM;
        a.heads = 1;
        a.window = round % 3 == 1 ? 5 : 0;
        a.softcap = round % 4 == 2 ? 3.0f : 0;
        a.scale = round % 2 ? 0.5f : 0;
        a.sinks = round % 5 == 3 ? &sink : NULL;
        moqi_back_head(&t, &a, &c, &s, 0, LENGTH - 1, sink, f, dy, grad, score, slope);
        double scale = a.scale != 0 ? (double)a.scale : 1 / sqrt((double)DIM);
        for (int i = 0; i < ALL; i++) {
            double e = 1e-4, keep = all[i], up, down;
            all[i] = keep + e;
            up = attention64(all, dy, a.window, scale, (double)a.softcap, a.sinks);
            all[i] = keep - e;
            down = attention64(all, dy, a.window, scale, (double)a.softcap, a.sinks);
            all[i] = keep;
            CHECK(fabs((double)grad[i] - (up - down) / (2 * e)) < 2e-5 * (1 + fabs((double)grad[i])));
        }
    }
}

/* ---- whole models: gradients against differences of the loss, family by family ---- */

enum { MOST_LINEARS = 400, MOST_COLS = 1024 };

/* sum over rows of g . W v for every layer, v the layer's own direction: what the loss gains when v is added to its input. */
typedef struct slopes {
    char name[MOST_LINEARS][160];
    double slope[MOST_LINEARS];
    int count;
    double eps;
    const char *moved;         /* the layer whose input moves by eps v */
    double loss;
    const golden_rows *rows;
} slopes;

static float direction(const char *name, int64_t c)
{
    uint32_t h = 2166136261u;
    for (; *name; name++) h = (h ^ (uint8_t)*name) * 16777619u;
    h = (h ^ (uint32_t)c) * 2654435761u;
    h ^= h >> 15;
    h *= 2246822519u;
    return (float)(h >> 8) / 8388608.0f - 1;
}

static void add_slope(void *user, const moq_linear *layers, int32_t parts, const float *dy, int32_t rows)
{
    slopes *s = (slopes *)user;
    static float row[MOST_COLS];
    int64_t width = 0, at = 0;
    int k = 0;
    for (int32_t i = 0; i < parts; i++) width += layers[i].rows;
    for (; k < s->count && strcmp(s->name[k], layers[0].name) != 0; k++) {}
    if (k == MOST_LINEARS) return;
    if (k == s->count) { snprintf(s->name[k], sizeof s->name[k], "%s", layers[0].name); s->slope[k] = 0; s->count++; }
    for (int32_t i = 0; i < parts; at += layers[i++].rows)
        for (int64_t r = 0; r < layers[i].rows; r++) {
            double wv = 0, g = 0;
            moq_dequantize(&layers[i], r, 1, row);
            for (int64_t c = 0; c < layers[i].cols; c++) wv += (double)row[c] * (double)direction(layers[0].name, c);
            for (int32_t t = 0; t < rows; t++) g += (double)dy[t * width + at + r];
            s->slope[k] += g * wv;
        }
}

static moq_result go_back(void *user, moqi_tape *t, moq_error *err)
{
    moq_result r = moqi_gradient(t, err);
    ((slopes *)user)->loss += t->loss;
    return r;
}

static int move_input(void *user, const moq_linear *layers, int32_t parts, float *x, int32_t rows)
{
    const slopes *s = (const slopes *)user;
    (void)parts;
    if (!s->moved || strcmp(layers[0].name, s->moved) != 0) return 0;
    for (int64_t i = 0; i < rows * layers[0].cols; i++) x[i] += (float)(s->eps * (double)direction(s->moved, i % layers[0].cols));
    return 1;
}

/* The loss by plain forward passes, in double from the logits. */
static double plain_loss(moq_checkpoint *ck, moq_backend *be, const golden_rows *g, moq_error *err)
{
    llm_desc d;
    double loss = 0, cap = 0;
    memset(&d, 0, sizeof d);
    d.checkpoint = ck;
    d.backend = be;
    d.kv = "wide";
    d.context = 32;
    d.no_tokenizer = 1;
    llm *m = llm_open(&d, err);
    if (!m) return -1;
    int64_t vocab = llm_get_info(m)->vocab;
    float *logits = (float *)malloc((size_t)(32 * vocab) * sizeof *logits);
    double *p = (double *)malloc((size_t)vocab * sizeof *p);
    (void)cap; /* llm_forward has applied it */
    for (int32_t i = 0; i < g->samples.count; i++) {
        if (llm_forward(m, 0, g->rows[i], g->lengths[i], 0, logits, NULL, err) < 0) loss = -1e30;
        for (int32_t r = 0; r + 1 < g->lengths[i]; r++) {
            moqi_log_softmax(0, logits + r * vocab, vocab, p);
            loss -= p[g->rows[i][r + 1]];
        }
    }
    free(p);
    free(logits);
    llm_close(m);
    return loss;
}

static double moved_loss(slopes *s, moq_checkpoint *ck, moq_backend *cpu, double eps)
{
    moq_observer o;
    moq_error err;
    memset(&o, 0, sizeof o);
    o.user = s;
    o.input = move_input;
    s->eps = eps;
    moq_backend *be = moq_observing_backend(cpu, &o, NULL, &err);
    double v = be ? plain_loss(ck, be, s->rows, &err) : -1;
    moq_backend_destroy(be);
    return v;
}

static void check_family(const char *name, const char *folder, golden_rows *g)
{
    static slopes s;
    moq_error err;
    moq_cpu_desc cd;
    moqi_tape_user u;
    moq_checkpoint *ck = moq_open(folder, NULL, &err);
    memset(&cd, 0, sizeof cd);
    cd.threads = 1;
    cd.act = MOQ_ACT_WIDE;
    moq_backend *cpu = moq_cpu_backend(&cd, &err);
    memset(&s, 0, sizeof s);
    memset(&u, 0, sizeof u);
    s.rows = g;
    u.user = &s;
    u.batch = go_back;
    u.grad = add_slope;
    moqi_tape *t = moqi_tape_create(cpu, 0, &u, NULL, NULL, &err);
    moq_json_float(moq_json_find(moq_get_config(ck), "final_logit_softcapping"), &t->cap);
    moq_result r = llm_calibrate(&g->samples, ck, &t->w->be, &err);
    moq_end_batch(&t->w->be);
    if (r >= 0) r = moqi_tape_sync(&t->w->be, &err);
    moqi_tape_destroy(t);
    if (r < 0) printf("  %s: %s\n", name, err.text);
    CHECK_INT(r, MOQ_OK);
    s.moved = NULL;
    double loss = moved_loss(&s, ck, cpu, 0), worst = 0, sum = 0;
    CHECK(fabs(loss - s.loss) < 1e-4 * loss);
    int layers = 0;
    for (int k = 0; k < s.count; k += 1 + s.count / 40) { /* some forty layers of each */
        s.moved = s.name[k];
        double step = 2e-3, got = (moved_loss(&s, ck, cpu, step) - moved_loss(&s, ck, cpu, -step)) / (2 * step);
        double off = fabs(got - s.slope[k]) / (fabs(s.slope[k]) + 0.05);
        for (int side = -1; side <= 1 && off > 0.05; side += 2) { /* a router that changes its mind does so on one side only */
            step = side * 2e-3;
            got = (moved_loss(&s, ck, cpu, step) - loss) / step;
            off = fabs(got - s.slope[k]) / (fabs(s.slope[k]) + 0.5);
        }
        if (off > 0.05) printf("    %s: %g by differences, %g by the tape\n", s.moved, got, s.slope[k]);
        CHECK(off <= 0.05);
        worst = off > worst ? off : worst;
        sum += off;
        layers++;
    }
    printf("  %-12s loss %.4f, %d of %d layers: slope off by %.2e on average, %.2e at most\n", name, loss, layers, s.count, sum / (layers ? layers : 1), worst);
    CHECK(layers > 0);
    moq_backend_destroy(cpu);
    moq_close(ck);
}

/* Llama 4 with two experts a token, whose weights multiply their inputs; random weights. */
static void check_llama4(void)
{
    static const char dir[] = TEST_DIR "/build/tmp/gradient";
    golden_rows g;
    ref_config c;
    memset(&c, 0, sizeof c);
    c.layers = 4;
    c.hidden = 48;
    c.inter = 36;
    c.moe_inter = 20;
    c.heads = 6;
    c.kv_heads = 2;
    c.head_dim = 8;
    c.experts = 4;
    for (int l = 1; l < 4; l += 2) c.moe[l] = 1;
    ref_make_llama4(&c, 0);
    mkdir(TEST_DIR "/build", 0777);
    mkdir(TEST_DIR "/build/tmp", 0777);
    mkdir(dir, 0777);
    CHECK(ref_write(dir, "{\"model_type\": \"llama4_text\", \"hidden_size\": 48, \"intermediate_size\": 20, \"intermediate_size_mlp\": 36, \"num_hidden_layers\": 4,"
        " \"vocab_size\": 61, \"num_attention_heads\": 6, \"num_key_value_heads\": 2, \"head_dim\": 8, \"num_local_experts\": 4, \"num_experts_per_tok\": 2,"
        " \"interleave_moe_layer_step\": 2, \"attention_chunk_size\": 7, \"floor_scale\": 4, \"max_position_embeddings\": 64, \"rope_theta\": 10000}"));
    ref_clear();
    memset(&g, 0, sizeof g);
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 20; j++) g.tokens[i][j] = (int32_t)(test_random() % REF_VOCAB);
        g.rows[i] = g.tokens[i];
        g.lengths[i] = 20;
    }
    g.samples.rows = g.rows;
    g.samples.lengths = g.lengths;
    g.samples.count = 2;
    g.samples.batch = 2;
    g.samples.logits = 1;
    check_family("llama4", dir, &g);
}

static void test_gradient_families(void)
{
    static const char *const sources[] = {"llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"};
    int families = 0;
    for (size_t i = 0; i < sizeof sources / sizeof *sources; i++) {
        golden_rows g;
        if (!is_there(golden("sources/%s/model.safetensors", sources[i])) || !load_rows(&g, sources[i], 2)) { printf("  %s: not in this set\n", sources[i]); continue; }
        g.samples.logits = 1;
        check_family(sources[i], golden("sources/%s", sources[i]), &g);
        families++;
    }
    check_llama4();
    CHECK(families >= 1);
}

/* ---- AutoQuantize against ModelOpt ---- */

/* Bytes of all tensors that differ, in percent; 100 when the lists differ. */
static double folder_difference(const char *ours, const char *theirs)
{
    moq_error err;
    double bytes = 0, wrong = 0;
    moq_checkpoint *x = moq_open(ours, NULL, &err), *y = moq_open(theirs, NULL, &err);
    int same = x && y && moq_tensor_count(x) == moq_tensor_count(y);
    for (size_t i = 0; same && i < moq_tensor_count(x); i++) {
        const moq_tensor *t = moq_get_tensor(x, i), *v = moq_find_tensor(y, t->name);
        if (!v || v->bytes != t->bytes || v->dtype != t->dtype) { same = 0; break; }
        bytes += (double)t->bytes;
        for (uint64_t k = 0; k < t->bytes; k++) wrong += ((const uint8_t *)t->data)[k] != ((const uint8_t *)v->data)[k];
    }
    moq_close(x);
    moq_close(y);
    return same && bytes > 0 ? 100 * wrong / bytes : 100;
}

/* limit: of a score's error, with BF16 and with F32 activations; percent: bytes of the folder that may differ. */
typedef struct auto_case { const char *name; double limit[2], percent; } auto_case;

static const auto_case auto_cases[] = {
    {"llama-auto_grad_5.5", {0.05, 0.15}, 0}, {"qwen3_moe-auto_grad_5.5", {0.05, 0.15}, 0}, {"llama-auto_kl_6.5", {0.03, 0.15}, 0},
    {"llama-auto_kl_awq_8.0", {0.03, 0.15}, 0.01}, {"qwen3_moe-auto_kl_awq_8.0", {0.09, 1}, 0.01}}; /* in F32 routers choose other experts */

/* The recorded number of a unit: list "scores" or "costs". */
static double recorded_number(const moq_json *root, const char *unit, const char *list, int k)
{
    double v = -1;
    moq_json_float(moq_json_at(moq_json_find(moq_json_find(moq_json_find(root, "candidate_stats"), unit), list), (size_t)k), &v);
    return v;
}

static void run_auto(const auto_case *c, int f32)
{
    static const char *const plain[] = {"nvfp4", "fp8"}, *const smooth[] = {"nvfp4_awq_lite", "int4_awq", "fp8"};
    char source[300], target[1300], search[1300];
    golden_rows g;
    moq_autoquant_desc d;
    moq_error err;
    double worst = 0, harm = 0, best = 0, bytes = 0;
    int same = 1, awq = strstr(c->name, "awq") != NULL;
    snprintf(source, sizeof source, "%.*s", (int)strcspn(c->name, "-"), c->name);
    if (!is_there(golden("modelopt/%s/search.json", c->name)) || !is_there(golden("sources/%s/model.safetensors", source)) || !load_rows(&g, source, 16)) { printf("  %s: not in this set\n", c->name); return; }
    g.samples.logits = 1;
    moq_json_doc *doc = read_doc(golden("modelopt/%s/search.json", c->name));
    const moq_json *root = moq_json_root(doc);
    snprintf(target, sizeof target, "%s", test_path("build/auto-out"));
    snprintf(search, sizeof search, "%s", test_path("build/auto-search.json"));
    remove_dir(target);
    memset(&d, 0, sizeof d);
    d.source = golden("sources/%s", source);
    d.target = f32 ? NULL : target;
    d.effective_bits = strtod(strrchr(c->name, '_') + 1, NULL);
    d.recipes = awq ? smooth : plain;
    d.recipe_count = awq ? 3 : 2;
    d.method = strstr(c->name, "grad") ? MOQ_SOLVE_SUM : MOQ_SOLVE_THRESHOLD;
    d.forward = llm_calibrate;
    d.data = &g.samples;
    d.f32 = f32;
    d.threads = 1;
    d.save_search = search;
    moq_search *s = moq_autoquant(&d, &err);
    if (!s) printf("  %s: %s\n", c->name, err.text);
    CHECK(s != NULL);
    size_t units = s ? moq_search_get_info(s)->units : 0;
    for (size_t i = 0; i < units; i++) {
        const moq_search_unit *u = moq_search_get_unit(s, i);
        const char *chosen = moq_json_string(moq_json_find(moq_json_find(moq_json_find(root, "best"), "recipe"), u->name));
        const char *ours = u->recipes[u->choice] ? u->recipes[u->choice]->modelopt : "NONE";
        CHECK(chosen != NULL);
        if (!chosen || strncmp(chosen, ours, strlen(ours)) != 0) { same = 0; printf("    %s: %s, ModelOpt chose %s\n", u->name, ours, chosen ? chosen : "?"); }
        for (int k = 0; k < u->formats; k++) {
            double want = recorded_number(root, u->name, "scores", k), off = want > 0 ? fabs(u->scores[k] / want - 1) : fabs(u->scores[k]);
            if (off > worst) worst = off;
            CHECK(fabs(u->costs[k] - recorded_number(root, u->name, "costs", k)) < 1e-9);
        }
        harm += recorded_number(root, u->name, "scores", u->choice);
    }
    moq_json_float(moq_json_find(moq_json_find(root, "best"), "score"), &best);
    CHECK(worst <= c->limit[f32]);
    CHECK(harm <= best * 1.02); /* regret by ModelOpt's own scores */
    if (!f32) bytes = folder_difference(target, golden("modelopt/%s", c->name));
    CHECK(f32 || (same && bytes <= c->percent));
    printf("  %-28s %s: scores within %.2f %%, %s, folder differs in %.4f %% of bytes\n", c->name, f32 ? "F32 " : "BF16", 100 * worst,
           same ? "the same choice" : "ANOTHER CHOICE", bytes);
    if (s && !f32) { /* from the file, the same choice at once */
        moq_search_destroy(s);
        d.search = search;
        d.save_search = NULL;
        d.target = NULL;
        d.recipes = NULL;
        d.recipe_count = 0;
        d.forward = NULL;
        s = moq_autoquant(&d, &err);
        CHECK(s != NULL && moq_search_get_info(s)->units == units);
        for (size_t i = 0; s && same && i < units; i++) {
            const moq_search_unit *u = moq_search_get_unit(s, i);
            const char *chosen = moq_json_string(moq_json_find(moq_json_find(moq_json_find(root, "best"), "recipe"), u->name));
            const char *ours = u->recipes[u->choice] ? u->recipes[u->choice]->modelopt : "NONE";
            CHECK(chosen && strncmp(chosen, ours, strlen(ours)) == 0);
        }
    }
    moq_search_destroy(s);
    remove_dir(target);
    unlink(search);
    moq_json_destroy(doc);
}

static void test_auto_bf16(void)
{
    for (size_t i = 0; i < sizeof auto_cases / sizeof *auto_cases; i++) run_auto(&auto_cases[i], 0);
}

static void test_auto_f32(void)
{
    for (size_t i = 0; i < sizeof auto_cases / sizeof *auto_cases; i++) run_auto(&auto_cases[i], 1);
}

/* ---- what cannot be done ---- */

static int count_and_stop(void *user, moq_stage stage, uint64_t done, uint64_t total)
{
    (void)stage;
    (void)done;
    (void)total;
    (*(int *)user)++;
    return 1;
}

/* A forward pass that does not say where its batches end. */
static moq_result run_no_batch(void *data, const moq_checkpoint *source, moq_backend *watch, moq_error *err)
{
    const llm_samples *s = (const llm_samples *)data;
    moq_error e;
    llm_desc d;
    memset(&d, 0, sizeof d);
    (void)source;
    d.path = golden("sources/llama");
    d.kv = "wide";
    d.no_tokenizer = 1;
    d.backend = watch;
    llm *m = llm_open(&d, &e);
    static float logits[TOKENS * VOCAB];
    moq_result r = m ? llm_forward(m, 0, s->rows[0], TOKENS, 0, logits, NULL, err) : MOQ_E_STATE;
    llm_close(m);
    return r;
}

static void test_auto_misuse(void)
{
    static const char *const two[] = {"nvfp4", "fp8"}, *const bad[] = {"nvfp5"}, *const svd[] = {"nvfp4_svdquant"};
    golden_rows g;
    moq_autoquant_desc d;
    moq_error err;
    int calls = 0;
    if (!load_rows(&g, "llama", 4)) { test_state.skipped++; return; }
    g.samples.logits = 1;
    memset(&d, 0, sizeof d);
    d.source = golden("sources/%s", "llama");
    d.threads = 1;
    d.recipes = two;
    d.recipe_count = 2;
    d.effective_bits = 5;
    d.allocator = test_allocator();
    CHECK(!moq_autoquant(&d, &err) && err.code == MOQ_E_ARG); /* no data */
    d.forward = llm_calibrate;
    d.data = &g.samples;
    g.samples.logits = 0;
    CHECK(!moq_autoquant(&d, &err) && err.code == MOQ_E_STATE && strstr(err.text, "logits"));
    g.samples.logits = 1;
    d.effective_bits = 3;
    d.forward = run_no_batch; /* too few bits are told before anything runs */
    CHECK(!moq_autoquant(&d, &err) && err.code == MOQ_E_CONFIG && strstr(err.text, "takes 4.5"));
    d.forward = llm_calibrate;
    d.target = TEST_DIR;
    CHECK(!moq_autoquant(&d, &err) && err.code == MOQ_E_ARG && strstr(err.text, "exists already"));
    d.target = NULL;
    d.effective_bits = 5;
    d.recipes = bad;
    d.recipe_count = 1;
    CHECK(!moq_autoquant(&d, &err) && err.code == MOQ_E_ARG);
    d.recipes = svd;
    CHECK(!moq_autoquant(&d, &err) && err.code == MOQ_E_UNSUPPORTED);
    d.recipes = two;
    d.recipe_count = 0;
    CHECK(!moq_autoquant(&d, &err) && err.code == MOQ_E_ARG);
    d.recipe_count = 2;
    d.forward = run_no_batch;
    CHECK(!moq_autoquant(&d, &err) && err.code == MOQ_E_ARG && strstr(err.text, "moq_end_batch"));
    d.forward = llm_calibrate;
    d.recipe_count = 2;
    d.progress = count_and_stop;
    d.progress_user = &calls;
    CHECK(!moq_autoquant(&d, &err) && err.code == MOQ_E_CANCELLED && calls == 1);
    CHECK_INT(test_state.live_allocs, 0);
}

/* Any allocation may be the one that is refused: an error, and nothing is left. */
static void test_auto_allocations(void)
{
    static const char *const two[] = {"nvfp4", "fp8"};
    golden_rows g;
    moq_error err;
    long step = 1, total = 0;
    if (!load_rows(&g, "llama", 1)) { test_state.skipped++; return; }
    g.samples.logits = 1;
    g.lengths[0] = 5;
    for (int method = 0; method < 2; method++)
        for (long k = 1, done = 0; !done; k += step) {
            moq_autoquant_desc d;
            memset(&d, 0, sizeof d);
            d.source = golden("sources/%s", "llama");
            d.threads = 1;
            d.recipes = two;
            d.recipe_count = 2;
            d.effective_bits = 6;
            d.method = method ? MOQ_SOLVE_THRESHOLD : MOQ_SOLVE_SUM;
            d.forward = llm_calibrate;
            d.data = &g.samples;
            d.allocator = test_allocator();
            test_state.fail_at = k;
            moq_search *s = moq_autoquant(&d, &err);
            done = s != NULL && test_state.fail_at > 0;
            CHECK(done || (!s && err.code == MOQ_E_NOMEM));
            if (!done && err.code != MOQ_E_NOMEM) { printf("  allocation %ld: %s\n", k, s ? "ignored" : err.text); done = 1; }
            test_state.fail_at = 0;
            moq_search_destroy(s);
            CHECK_INT(test_state.live_allocs, 0);
            total++;
            step = 1 + k / 16;
        }
    printf("  %ld refusals\n", total);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_back_activation);
    RUN(test_back_norm);
    RUN(test_back_route);
    RUN(test_back_attention);
    RUN(test_gradient_families);
    RUN(test_auto_bf16);
    RUN(test_auto_f32);
    RUN(test_auto_misuse);
    RUN(test_auto_allocations);
    return test_end();
}
