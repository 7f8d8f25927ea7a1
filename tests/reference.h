/* reference.h - decoders as their papers and reference implementations describe them, token by token in double, and folders of
   random weights to run them on. Nothing here is shared with llm.h: shapes, names and formulas are written out once more. */
#ifndef REFERENCE_H
#define REFERENCE_H

#include <math.h>

enum { REF_TENSORS = 400, REF_TOKENS = 24, REF_WIDTH = 256, REF_VOCAB = 61 };

typedef struct ref_tensor { char name[96]; int64_t shape[3]; int rank; float *data; } ref_tensor;

/* What the references need to know; a family ignores what it does not have. */
typedef struct ref_config {
    int layers, hidden, heads, kv_heads, head_dim, inter, tokens;
    double theta, eps;
    int experts, top_k, moe_inter;
    int chunk, no_rope[8], moe[8], unit_heads, stacked;       /* llama4 */
    double temper, temper_floor;
    double pre_scalar, attn_cap, logit_cap;                   /* gemma2 */
    int window;
    int q_rank, kv_rank, nope, rope, value, groups, top_groups, shared, dense_first; /* deepseek_v2 */
    double route_scale, yarn, original, mscale;
} ref_config;

static ref_tensor ref_list[REF_TENSORS];
static int ref_count;

/* A random tensor [a], [a, b] or [a, b, c]; matrices are scaled so that rows of values stay near 1. */
static float *ref_make(const char *name, int64_t a, int64_t b, int64_t c, double scale)
{
    ref_tensor *t = &ref_list[ref_count++];
    int64_t n = a * (b ? b : 1) * (c ? c : 1);
    snprintf(t->name, sizeof t->name, "%s", name);
    t->shape[0] = a;
    t->shape[1] = b;
    t->shape[2] = c;
    t->rank = c ? 3 : b ? 2 : 1;
    t->data = (float *)calloc((size_t)n, sizeof(float));
    for (int64_t i = 0; i < n; i++) t->data[i] = (float)(scale * (double)(test_random() % 97 == 0 ? 6 * test_uniform() : test_normal() / (test_random() % 64 ? 1 : 4)));
    return t->data;
}

static const float *ref_find(const char *name)
{
    for (int i = 0; i < ref_count; i++)
        if (strcmp(ref_list[i].name, name) == 0) return ref_list[i].data;
    fprintf(stderr, "reference: no tensor %s\n", name);
    exit(2);
}

/* "model.layers.L.tail" */
static const char *ref_name(int layer, const char *tail)
{
    static char text[4][128];
    static int turn;
    turn = (turn + 1) & 3;
    if (layer < 0) snprintf(text[turn], sizeof text[turn], "model.%s", tail);
    else snprintf(text[turn], sizeof text[turn], "model.layers.%d.%s", layer, tail);
    return text[turn];
}

static const float *ref_of(int layer, const char *tail) { return ref_find(ref_name(layer, tail)); }
static float *ref_add(int layer, const char *tail, int rows, int cols) { return ref_make(ref_name(layer, tail), rows, cols, 0, cols ? 1 / sqrt((double)cols) : 0.3); }

/* Norm weights near 1, or near 0 where 1 is added to them. */
static void ref_norm_weight(int layer, const char *tail, int n, float middle)
{
    float *w = ref_add(layer, tail, n, 0);
    for (int i = 0; i < n; i++) w[i] += middle;
}

static void ref_clear(void)
{
    for (int i = 0; i < ref_count; i++) free(ref_list[i].data);
    ref_count = 0;
}

/* The folder: all tensors as F32, and config.json. */
static int ref_write(const char *dir, const char *config)
{
    static moq_tensor list[REF_TENSORS];
    char path[600];
    moq_error e;
    for (int i = 0; i < ref_count; i++) {
        const ref_tensor *t = &ref_list[i];
        moq_tensor *o = &list[i];
        uint64_t n = 1;
        memset(o, 0, sizeof *o);
        o->name = t->name;
        o->data = t->data;
        o->rank = (uint32_t)t->rank;
        for (int r = 0; r < t->rank; r++) n *= o->shape[r] = (uint64_t)t->shape[r];
        o->bytes = n * 4;
        o->dtype = MOQ_F32;
    }
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    if (moq_st_write(path, list, (size_t)ref_count, NULL, 0, NULL, &e) != MOQ_OK) { fprintf(stderr, "%s\n", e.text); return 0; }
    snprintf(path, sizeof path, "%s/config.json", dir);
    return moq_write_file(path, config, strlen(config), &e) == MOQ_OK;
}

/* ---- arithmetic ---- */

/* y = W x; W [rows, cols] */
static void ref_times(const float *w, const double *x, int rows, int cols, double *y)
{
    for (int r = 0; r < rows; r++) {
        y[r] = 0;
        for (int c = 0; c < cols; c++) y[r] += (double)w[r * cols + c] * x[c];
    }
}

/* y = x / rms(x) * (w + plus); w NULL: no weight */
static void ref_rms(const double *x, const float *w, double plus, int n, double eps, double *y)
{
    double s = 0;
    for (int i = 0; i < n; i++) s += x[i] * x[i];
    s = 1 / sqrt(s / n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * s * (w ? (double)w[i] + plus : 1);
}

static double ref_silu(double x) { return x / (1 + exp(-x)); }
static double ref_gelu_tanh(double x) { return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x))); }

/* down(act(gate x) * up x) */
static void ref_mlp(const float *gate, const float *up, const float *down, const double *x, int hidden, int inter, double (*act)(double), double *y)
{
    double g[REF_WIDTH], u[REF_WIDTH];
    ref_times(gate, x, inter, hidden, g);
    ref_times(up, x, inter, hidden, u);
    for (int i = 0; i < inter; i++) g[i] = act(g[i]) * u[i];
    ref_times(down, g, hidden, inter, y);
}

/* Attention of one head and one position over keys [first, pos]: k and v at `step` doubles from position to position. cap 0: none. */
static void ref_attend(const double *q, const double *k, const double *v, int step, int v_step, int dim, int v_dim, int first, int pos, double scale, double cap, double *y)
{
    double p[REF_TOKENS], max = -1e300, sum = 0;
    for (int i = first; i <= pos; i++) {
        p[i] = 0;
        for (int d = 0; d < dim; d++) p[i] += q[d] * k[i * step + d];
        p[i] *= scale;
        if (cap > 0) p[i] = cap * tanh(p[i] / cap);
        if (p[i] > max) max = p[i];
    }
    for (int i = first; i <= pos; i++) sum += p[i] = exp(p[i] - max);
    for (int d = 0; d < v_dim; d++) y[d] = 0;
    for (int i = first; i <= pos; i++)
        for (int d = 0; d < v_dim; d++) y[d] += p[i] / sum * v[i * v_step + d];
}

/* (a, b) as a complex number times e^(i angle) */
static void ref_turn(double *a, double *b, double angle)
{
    double x = *a, y = *b;
    *a = x * cos(angle) - y * sin(angle);
    *b = x * sin(angle) + y * cos(angle);
}

/* ---- Llama 4 (modeling_llama4: Llama4TextAttention, Llama4TextMoe) ----
   interleaved rope; L2 norm of the turned heads; layers without rope scale q by log1p(floor((pos + 1) / floor_scale)) * attn_scale + 1 and
   see everything, the others see their chunk; experts read sigmoid(logit) * x. With plain 1: SmolLM3, half-split rope and nothing of that. */

MOQI_UNUSED static void ref_make_llama4(const ref_config *c, int plain)
{
    const char *feed = plain ? "mlp" : "feed_forward";
    char t[96];
    ref_add(-1, "embed_tokens.weight", REF_VOCAB, c->hidden);
    for (int l = 0; l < c->layers; l++) {
        ref_norm_weight(l, "input_layernorm.weight", c->hidden, 1);
        ref_norm_weight(l, "post_attention_layernorm.weight", c->hidden, 1);
        ref_add(l, "self_attn.q_proj.weight", c->heads * c->head_dim, c->hidden);
        ref_add(l, "self_attn.k_proj.weight", c->kv_heads * c->head_dim, c->hidden);
        ref_add(l, "self_attn.v_proj.weight", c->kv_heads * c->head_dim, c->hidden);
        ref_add(l, "self_attn.o_proj.weight", c->hidden, c->heads * c->head_dim);
        if (!c->moe[l]) {
            snprintf(t, sizeof t, "%s.gate_proj.weight", feed);
            ref_add(l, t, c->inter, c->hidden);
            snprintf(t, sizeof t, "%s.up_proj.weight", feed);
            ref_add(l, t, c->inter, c->hidden);
            snprintf(t, sizeof t, "%s.down_proj.weight", feed);
            ref_add(l, t, c->hidden, c->inter);
            continue;
        }
        ref_add(l, "feed_forward.router.weight", c->experts, c->hidden);
        ref_add(l, "feed_forward.shared_expert.gate_proj.weight", c->moe_inter, c->hidden);
        ref_add(l, "feed_forward.shared_expert.up_proj.weight", c->moe_inter, c->hidden);
        ref_add(l, "feed_forward.shared_expert.down_proj.weight", c->hidden, c->moe_inter);
        if (c->stacked) {
            ref_make(ref_name(l, "feed_forward.experts.gate_up_proj"), c->experts, c->hidden, 2 * c->moe_inter, 1 / sqrt((double)c->hidden));
            ref_make(ref_name(l, "feed_forward.experts.down_proj"), c->experts, c->moe_inter, c->hidden, 1 / sqrt((double)c->moe_inter));
        }
        for (int e = 0; e < c->experts && !c->stacked; e++) {
            snprintf(t, sizeof t, "feed_forward.experts.%d.gate_proj.weight", e);
            ref_add(l, t, c->moe_inter, c->hidden);
            snprintf(t, sizeof t, "feed_forward.experts.%d.up_proj.weight", e);
            ref_add(l, t, c->moe_inter, c->hidden);
            snprintf(t, sizeof t, "feed_forward.experts.%d.down_proj.weight", e);
            ref_add(l, t, c->hidden, c->moe_inter);
        }
    }
    ref_norm_weight(-1, "norm.weight", c->hidden, 1);
    ref_make("lm_head.weight", REF_VOCAB, c->hidden, 0, 1 / sqrt((double)c->hidden));
}

/* One expert of layer l on x [hidden] -> y. */
static void ref_llama4_expert(const ref_config *c, int l, int e, const double *x, double *y)
{
    char t[3][96];
    int h = c->hidden, n = c->moe_inter;
    static const char *const parts[] = {"gate_proj", "up_proj", "down_proj"};
    for (int i = 0; i < 3; i++) snprintf(t[i], sizeof t[i], "feed_forward.experts.%d.%s.weight", e, parts[i]);
    if (!c->stacked) { ref_mlp(ref_of(l, t[0]), ref_of(l, t[1]), ref_of(l, t[2]), x, h, n, ref_silu, y); return; }
    const float *gate_up = ref_of(l, "feed_forward.experts.gate_up_proj") + (size_t)e * (size_t)(h * 2 * n);
    const float *down = ref_of(l, "feed_forward.experts.down_proj") + (size_t)e * (size_t)(n * h);
    double both[REF_WIDTH] = {0};
    for (int i = 0; i < h; i++)
        for (int o = 0; o < 2 * n; o++) both[o] += x[i] * (double)gate_up[i * 2 * n + o];
    for (int o = 0; o < h; o++) y[o] = 0;
    for (int i = 0; i < n; i++)
        for (int o = 0; o < h; o++) y[o] += ref_silu(both[i]) * both[n + i] * (double)down[i * h + o];
}

static void ref_llama4_moe(const ref_config *c, int l, const double *x, double *y)
{
    double logits[REF_WIDTH], in[REF_WIDTH], out[REF_WIDTH];
    int taken[REF_WIDTH] = {0};
    ref_times(ref_of(l, "feed_forward.router.weight"), x, c->experts, c->hidden, logits);
    ref_mlp(ref_of(l, "feed_forward.shared_expert.gate_proj.weight"), ref_of(l, "feed_forward.shared_expert.up_proj.weight"),
            ref_of(l, "feed_forward.shared_expert.down_proj.weight"), x, c->hidden, c->moe_inter, ref_silu, y);
    for (int k = 0; k < c->top_k; k++) {
        int best = -1;
        for (int e = 0; e < c->experts; e++)
            if (!taken[e] && (best < 0 || logits[e] > logits[best])) best = e;
        taken[best] = 1;
        for (int i = 0; i < c->hidden; i++) in[i] = x[i] / (1 + exp(-logits[best]));
        ref_llama4_expert(c, l, best, in, out);
        for (int i = 0; i < c->hidden; i++) y[i] += out[i];
    }
}

/* logits [tokens, REF_VOCAB] */
MOQI_UNUSED static void ref_run_llama4(const ref_config *c, int plain, const int32_t *ids, double *logits)
{
    static double x[REF_TOKENS][REF_WIDTH], k[REF_TOKENS][REF_WIDTH], v[REF_TOKENS][REF_WIDTH], q[REF_TOKENS][REF_WIDTH];
    double h[REF_WIDTH], att[REF_WIDTH], y[REF_WIDTH];
    int dim = c->head_dim, qn = c->heads * dim, kn = c->kv_heads * dim;
    for (int t = 0; t < c->tokens; t++)
        for (int i = 0; i < c->hidden; i++) x[t][i] = (double)ref_of(-1, "embed_tokens.weight")[ids[t] * c->hidden + i];
    for (int l = 0; l < c->layers; l++) {
        for (int t = 0; t < c->tokens; t++) {
            ref_rms(x[t], ref_of(l, "input_layernorm.weight"), 0, c->hidden, c->eps, h);
            ref_times(ref_of(l, "self_attn.q_proj.weight"), h, qn, c->hidden, q[t]);
            ref_times(ref_of(l, "self_attn.k_proj.weight"), h, kn, c->hidden, k[t]);
            ref_times(ref_of(l, "self_attn.v_proj.weight"), h, kn, c->hidden, v[t]);
            for (int i = 0; i < qn + kn; i += dim) {
                double *head = i < qn ? &q[t][i] : &k[t][i - qn];
                for (int j = 0; j < dim / 2 && !c->no_rope[l]; j++) {
                    double angle = t * pow(c->theta, -2.0 * j / dim);
                    if (plain) ref_turn(&head[j], &head[j + dim / 2], angle);
                    else ref_turn(&head[2 * j], &head[2 * j + 1], angle);
                }
                if (c->unit_heads && !c->no_rope[l]) ref_rms(head, NULL, 0, dim, c->eps, head);
            }
            for (int i = 0; i < qn && c->no_rope[l]; i++) q[t][i] *= log1p(floor((t + 1.0) / c->temper_floor)) * c->temper + 1;
        }
        for (int t = 0; t < c->tokens; t++) {
            int first = c->chunk && !c->no_rope[l] ? t - t % c->chunk : 0;
            for (int i = 0; i < c->heads; i++) {
                int kv = i / (c->heads / c->kv_heads);
                ref_attend(&q[t][i * dim], &k[0][kv * dim], &v[0][kv * dim], REF_WIDTH, REF_WIDTH, dim, dim, first, t, 1 / sqrt((double)dim), 0, &att[i * dim]);
            }
            ref_times(ref_of(l, "self_attn.o_proj.weight"), att, c->hidden, qn, y);
            for (int i = 0; i < c->hidden; i++) x[t][i] += y[i];
            ref_rms(x[t], ref_of(l, "post_attention_layernorm.weight"), 0, c->hidden, c->eps, h);
            if (c->moe[l]) ref_llama4_moe(c, l, h, y);
            else ref_mlp(ref_of(l, plain ? "mlp.gate_proj.weight" : "feed_forward.gate_proj.weight"), ref_of(l, plain ? "mlp.up_proj.weight" : "feed_forward.up_proj.weight"),
                         ref_of(l, plain ? "mlp.down_proj.weight" : "feed_forward.down_proj.weight"), h, c->hidden, c->inter, ref_silu, y);
            for (int i = 0; i < c->hidden; i++) x[t][i] += y[i];
        }
    }
    for (int t = 0; t < c->tokens; t++) {
        ref_rms(x[t], ref_of(-1, "norm.weight"), 0, c->hidden, c->eps, h);
        ref_times(ref_find("lm_head.weight"), h, REF_VOCAB, c->hidden, logits + t * REF_VOCAB);
    }
}

/* ---- Gemma 2 (modeling_gemma2): norms before and after both blocks with weights 1 + w, embeddings times sqrt(hidden), scores and logits
   capped by tanh, GELU, even layers see a window, the head is the table of words ---- */

MOQI_UNUSED static void ref_make_gemma2(const ref_config *c)
{
    static const char *const norms[] = {"input_layernorm.weight", "post_attention_layernorm.weight", "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"};
    ref_add(-1, "embed_tokens.weight", REF_VOCAB, c->hidden);
    for (int l = 0; l < c->layers; l++) {
        for (int i = 0; i < 4; i++) ref_norm_weight(l, norms[i], c->hidden, 0);
        ref_add(l, "self_attn.q_proj.weight", c->heads * c->head_dim, c->hidden);
        ref_add(l, "self_attn.k_proj.weight", c->kv_heads * c->head_dim, c->hidden);
        ref_add(l, "self_attn.v_proj.weight", c->kv_heads * c->head_dim, c->hidden);
        ref_add(l, "self_attn.o_proj.weight", c->hidden, c->heads * c->head_dim);
        ref_add(l, "mlp.gate_proj.weight", c->inter, c->hidden);
        ref_add(l, "mlp.up_proj.weight", c->inter, c->hidden);
        ref_add(l, "mlp.down_proj.weight", c->hidden, c->inter);
    }
    ref_norm_weight(-1, "norm.weight", c->hidden, 0);
}

MOQI_UNUSED static void ref_run_gemma2(const ref_config *c, const int32_t *ids, double *logits)
{
    static double x[REF_TOKENS][REF_WIDTH], k[REF_TOKENS][REF_WIDTH], v[REF_TOKENS][REF_WIDTH], q[REF_TOKENS][REF_WIDTH];
    double h[REF_WIDTH], att[REF_WIDTH], y[REF_WIDTH];
    int dim = c->head_dim, qn = c->heads * dim, kn = c->kv_heads * dim;
    const float *words = ref_of(-1, "embed_tokens.weight");
    for (int t = 0; t < c->tokens; t++)
        for (int i = 0; i < c->hidden; i++) x[t][i] = sqrt((double)c->hidden) * (double)words[ids[t] * c->hidden + i];
    for (int l = 0; l < c->layers; l++) {
        for (int t = 0; t < c->tokens; t++) {
            ref_rms(x[t], ref_of(l, "input_layernorm.weight"), 1, c->hidden, c->eps, h);
            ref_times(ref_of(l, "self_attn.q_proj.weight"), h, qn, c->hidden, q[t]);
            ref_times(ref_of(l, "self_attn.k_proj.weight"), h, kn, c->hidden, k[t]);
            ref_times(ref_of(l, "self_attn.v_proj.weight"), h, kn, c->hidden, v[t]);
            for (int i = 0; i < qn + kn; i += dim)
                for (int j = 0; j < dim / 2; j++) {
                    double *head = i < qn ? &q[t][i] : &k[t][i - qn];
                    ref_turn(&head[j], &head[j + dim / 2], t * pow(c->theta, -2.0 * j / dim));
                }
        }
        for (int t = 0; t < c->tokens; t++) {
            int first = l % 2 == 0 && t >= c->window ? t - c->window + 1 : 0;
            for (int i = 0; i < c->heads; i++) {
                int kv = i / (c->heads / c->kv_heads);
                ref_attend(&q[t][i * dim], &k[0][kv * dim], &v[0][kv * dim], REF_WIDTH, REF_WIDTH, dim, dim, first, t, 1 / sqrt(c->pre_scalar), c->attn_cap, &att[i * dim]);
            }
            ref_times(ref_of(l, "self_attn.o_proj.weight"), att, c->hidden, qn, y);
            ref_rms(y, ref_of(l, "post_attention_layernorm.weight"), 1, c->hidden, c->eps, y);
            for (int i = 0; i < c->hidden; i++) x[t][i] += y[i];
            ref_rms(x[t], ref_of(l, "pre_feedforward_layernorm.weight"), 1, c->hidden, c->eps, h);
            ref_mlp(ref_of(l, "mlp.gate_proj.weight"), ref_of(l, "mlp.up_proj.weight"), ref_of(l, "mlp.down_proj.weight"), h, c->hidden, c->inter, ref_gelu_tanh, y);
            ref_rms(y, ref_of(l, "post_feedforward_layernorm.weight"), 1, c->hidden, c->eps, y);
            for (int i = 0; i < c->hidden; i++) x[t][i] += y[i];
        }
    }
    for (int t = 0; t < c->tokens; t++) {
        ref_rms(x[t], ref_of(-1, "norm.weight"), 1, c->hidden, c->eps, h);
        ref_times(words, h, REF_VOCAB, c->hidden, logits + t * REF_VOCAB);
        for (int i = 0; i < REF_VOCAB; i++) logits[t * REF_VOCAB + i] = c->logit_cap * tanh(logits[t * REF_VOCAB + i] / c->logit_cap);
    }
}

/* ---- DeepSeek-V2 (the model's own modeling_deepseek.py): latent attention with YaRN, groups of experts by their largest softmax score,
   weights times routed_scaling_factor without renormalization, shared experts as one MLP ---- */

MOQI_UNUSED static void ref_make_deepseek2(const ref_config *c)
{
    char t[96];
    ref_add(-1, "embed_tokens.weight", REF_VOCAB, c->hidden);
    for (int l = 0; l < c->layers; l++) {
        int q = c->heads * (c->nope + c->rope);
        ref_norm_weight(l, "input_layernorm.weight", c->hidden, 1);
        ref_norm_weight(l, "post_attention_layernorm.weight", c->hidden, 1);
        if (c->q_rank) {
            ref_add(l, "self_attn.q_a_proj.weight", c->q_rank, c->hidden);
            ref_norm_weight(l, "self_attn.q_a_layernorm.weight", c->q_rank, 1);
            ref_add(l, "self_attn.q_b_proj.weight", q, c->q_rank);
        } else ref_add(l, "self_attn.q_proj.weight", q, c->hidden);
        ref_add(l, "self_attn.kv_a_proj_with_mqa.weight", c->kv_rank + c->rope, c->hidden);
        ref_norm_weight(l, "self_attn.kv_a_layernorm.weight", c->kv_rank, 1);
        ref_add(l, "self_attn.kv_b_proj.weight", c->heads * (c->nope + c->value), c->kv_rank);
        ref_add(l, "self_attn.o_proj.weight", c->hidden, c->heads * c->value);
        if (l < c->dense_first) {
            ref_add(l, "mlp.gate_proj.weight", c->inter, c->hidden);
            ref_add(l, "mlp.up_proj.weight", c->inter, c->hidden);
            ref_add(l, "mlp.down_proj.weight", c->hidden, c->inter);
            continue;
        }
        ref_add(l, "mlp.gate.weight", c->experts, c->hidden);
        ref_add(l, "mlp.shared_experts.gate_proj.weight", c->shared * c->moe_inter, c->hidden);
        ref_add(l, "mlp.shared_experts.up_proj.weight", c->shared * c->moe_inter, c->hidden);
        ref_add(l, "mlp.shared_experts.down_proj.weight", c->hidden, c->shared * c->moe_inter);
        for (int e = 0; e < c->experts; e++) {
            snprintf(t, sizeof t, "mlp.experts.%d.gate_proj.weight", e);
            ref_add(l, t, c->moe_inter, c->hidden);
            snprintf(t, sizeof t, "mlp.experts.%d.up_proj.weight", e);
            ref_add(l, t, c->moe_inter, c->hidden);
            snprintf(t, sizeof t, "mlp.experts.%d.down_proj.weight", e);
            ref_add(l, t, c->hidden, c->moe_inter);
        }
    }
    ref_norm_weight(-1, "norm.weight", c->hidden, 1);
    ref_make("lm_head.weight", REF_VOCAB, c->hidden, 0, 1 / sqrt((double)c->hidden));
}

static void ref_deepseek2_moe(const ref_config *c, int l, const double *x, double *y)
{
    double p[REF_WIDTH], best[REF_WIDTH], out[REF_WIDTH], sum = 0, max = -1e300;
    int open[REF_WIDTH] = {0}, size = c->experts / c->groups;
    char t[3][96];
    static const char *const parts[] = {"gate_proj", "up_proj", "down_proj"};
    ref_times(ref_of(l, "mlp.gate.weight"), x, c->experts, c->hidden, p);
    for (int e = 0; e < c->experts; e++) if (p[e] > max) max = p[e];
    for (int e = 0; e < c->experts; e++) sum += p[e] = exp(p[e] - max);
    for (int e = 0; e < c->experts; e++) p[e] /= sum;
    for (int g = 0; g < c->groups; g++) {
        best[g] = 0;
        for (int e = g * size; e < (g + 1) * size; e++) if (p[e] > best[g]) best[g] = p[e];
    }
    for (int i = 0; i < c->top_groups; i++) {
        int g = 0;
        for (int j = 1; j < c->groups; j++) if (best[j] > best[g]) g = j;
        best[g] = -1;
        for (int e = g * size; e < (g + 1) * size; e++) open[e] = 1;
    }
    ref_mlp(ref_of(l, "mlp.shared_experts.gate_proj.weight"), ref_of(l, "mlp.shared_experts.up_proj.weight"),
            ref_of(l, "mlp.shared_experts.down_proj.weight"), x, c->hidden, c->shared * c->moe_inter, ref_silu, y);
    for (int k = 0; k < c->top_k; k++) {
        int e = -1;
        for (int j = 0; j < c->experts; j++) if (open[j] && (e < 0 || p[j] > p[e])) e = j;
        open[e] = 0;
        for (int i = 0; i < 3; i++) snprintf(t[i], sizeof t[i], "mlp.experts.%d.%s.weight", e, parts[i]);
        ref_mlp(ref_of(l, t[0]), ref_of(l, t[1]), ref_of(l, t[2]), x, c->hidden, c->moe_inter, ref_silu, out);
        for (int i = 0; i < c->hidden; i++) y[i] += c->route_scale * p[e] * out[i];
    }
}

/* Radians per position of pair i, as yarn_find_correction_range and yarn_linear_ramp_mask have it. */
static double ref_yarn(const ref_config *c, int i)
{
    double plain = pow(c->theta, -2.0 * i / c->rope), two_pi = 6.283185307179586, low, high, ramp;
    if (c->yarn <= 1) return plain;
    low = floor(c->rope * log(c->original / (32 * two_pi)) / (2 * log(c->theta)));
    high = ceil(c->rope * log(c->original / (1 * two_pi)) / (2 * log(c->theta)));
    if (low < 0) low = 0;
    if (high > c->rope - 1) high = c->rope - 1;
    if (low == high) high += 0.001;
    ramp = (i - low) / (high - low);
    ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
    return plain / c->yarn * ramp + plain * (1 - ramp);
}

MOQI_UNUSED static void ref_run_deepseek2(const ref_config *c, const int32_t *ids, double *logits)
{
    static double x[REF_TOKENS][REF_WIDTH], k[REF_TOKENS][REF_WIDTH], v[REF_TOKENS][REF_WIDTH], q[REF_TOKENS][REF_WIDTH];
    double h[REF_WIDTH], a[REF_WIDTH], kv[REF_WIDTH], att[REF_WIDTH], y[REF_WIDTH];
    int dim = c->nope + c->rope;
    double sharp = c->yarn > 1 ? 0.1 * c->mscale * log(c->yarn) + 1 : 1, scale = sharp * sharp / sqrt((double)dim);
    for (int t = 0; t < c->tokens; t++)
        for (int i = 0; i < c->hidden; i++) x[t][i] = (double)ref_of(-1, "embed_tokens.weight")[ids[t] * c->hidden + i];
    for (int l = 0; l < c->layers; l++) {
        for (int t = 0; t < c->tokens; t++) {
            ref_rms(x[t], ref_of(l, "input_layernorm.weight"), 0, c->hidden, c->eps, h);
            if (c->q_rank) {
                ref_times(ref_of(l, "self_attn.q_a_proj.weight"), h, c->q_rank, c->hidden, a);
                ref_rms(a, ref_of(l, "self_attn.q_a_layernorm.weight"), 0, c->q_rank, c->eps, a);
                ref_times(ref_of(l, "self_attn.q_b_proj.weight"), a, c->heads * dim, c->q_rank, q[t]);
            } else ref_times(ref_of(l, "self_attn.q_proj.weight"), h, c->heads * dim, c->hidden, q[t]);
            ref_times(ref_of(l, "self_attn.kv_a_proj_with_mqa.weight"), h, c->kv_rank + c->rope, c->hidden, a);
            for (int j = 0; j < c->rope / 2; j++) {
                double angle = t * ref_yarn(c, j);
                ref_turn(&a[c->kv_rank + 2 * j], &a[c->kv_rank + 2 * j + 1], angle);
                for (int i = 0; i < c->heads; i++) ref_turn(&q[t][i * dim + c->nope + 2 * j], &q[t][i * dim + c->nope + 2 * j + 1], angle);
            }
            ref_rms(a, ref_of(l, "self_attn.kv_a_layernorm.weight"), 0, c->kv_rank, c->eps, h);
            ref_times(ref_of(l, "self_attn.kv_b_proj.weight"), h, c->heads * (c->nope + c->value), c->kv_rank, kv);
            for (int i = 0; i < c->heads; i++) {
                for (int d = 0; d < c->nope; d++) k[t][i * dim + d] = kv[i * (c->nope + c->value) + d];
                for (int d = 0; d < c->rope; d++) k[t][i * dim + c->nope + d] = a[c->kv_rank + d];
                for (int d = 0; d < c->value; d++) v[t][i * c->value + d] = kv[i * (c->nope + c->value) + c->nope + d];
            }
        }
        for (int t = 0; t < c->tokens; t++) {
            for (int i = 0; i < c->heads; i++)
                ref_attend(&q[t][i * dim], &k[0][i * dim], &v[0][i * c->value], REF_WIDTH, REF_WIDTH, dim, c->value, 0, t, scale, 0, &att[i * c->value]);
            ref_times(ref_of(l, "self_attn.o_proj.weight"), att, c->hidden, c->heads * c->value, y);
            for (int i = 0; i < c->hidden; i++) x[t][i] += y[i];
            ref_rms(x[t], ref_of(l, "post_attention_layernorm.weight"), 0, c->hidden, c->eps, h);
            if (l >= c->dense_first) ref_deepseek2_moe(c, l, h, y);
            else ref_mlp(ref_of(l, "mlp.gate_proj.weight"), ref_of(l, "mlp.up_proj.weight"), ref_of(l, "mlp.down_proj.weight"), h, c->hidden, c->inter, ref_silu, y);
            for (int i = 0; i < c->hidden; i++) x[t][i] += y[i];
        }
    }
    for (int t = 0; t < c->tokens; t++) {
        ref_rms(x[t], ref_of(-1, "norm.weight"), 0, c->hidden, c->eps, h);
        ref_times(ref_find("lm_head.weight"), h, REF_VOCAB, c->hidden, logits + t * REF_VOCAB);
    }
}

#endif
