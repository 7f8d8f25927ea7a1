/* Whole random models, CPU against CUDA: families, sizes, storage formats, caches and orders of work that nobody wrote down.

       test_models [FIRST [COUNT [SECONDS]]]     models FIRST, FIRST + 1, ...: what is random follows from that number alone
       MOQ_TELL=1: every distance; MOQ_WIDE_KEYS=1: caches that round nothing, to tell a wrong result from a rounding

   A folder in memory describes a model of llm.h; a table between engine and backend replaces each of its layers by a random one of some format,
   the same one for every backend. A random list of passes (prompts in pieces, batches, single steps, forks, rewinds) then runs on the CPU's plain
   C kernel, on its fast kernel and on CUDA. The first is the oracle; the distance of the second, which adds in another order, is the model's own
   noise and scales the limits. */
#include "../test.h"
#include "../layers.h"
#include "../golden.h"

#ifdef MOQ_NO_GPU /* to try the program itself: another CPU kernel stands for the GPU */
static moq_backend *moq_cuda_backend_full(const moq_cuda_desc *desc, moq_dtype activations, const moq_allocator *memory, moq_error *err)
{
    moq_cpu_desc d;
    (void)activations;
    (void)memory;
    memset(&d, 0, sizeof d);
    d.act = desc->act;
    return moq_cpu_backend(&d, err);
}
#else
extern moq_backend *moq_cuda_backend_full(const moq_cuda_desc *desc, moq_dtype activations, const moq_allocator *memory, moq_error *err);
#endif

enum { TENSORS = 12000, CONFIG = 8000, SLOTS = 20, ROWS = 1400, PASSES = 200, LAYERS = 2048, POOL = 11 };

static void die(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(2);
}

/* ---- formats ---- */

/* What a layer becomes: an entry of layer_formats, inputs of input_formats (-1: wide) with this scale, and what stands before and beside. */
typedef struct recipe {
    const char *name, *format;
    int input;
    float input_scale;
    int smooth, lora, hadamard;
    float requant;
} recipe;

static const recipe recipes[] = {{"bf16", "bf16", -1, 0, 0, 0, 0, 0},
                                 {"nvfp4 w4a16", "nvfp4", -1, 0, 0, 0, 0, 0},
                                 {"nvfp4", "nvfp4", 7, 0.004f, 0, 0, 0, 0},
                                 {"nvfp4 awq", "nvfp4", 7, 0.004f, 1, 0, 0, 0},
                                 {"nvfp4 svdquant", "nvfp4", 7, 0.004f, 1, 8, 0, 0},
                                 {"nvfp4 w4a8", "nvfp4 g32", 0, 0.02f, 0, 0, 0, 0},
                                 {"nvfp4 divisor", "nvfp4 divisor", -1, 0, 0, 0, 0, 0},
                                 {"nvfp4 [in/2, out]", "nvfp4 [in/2, out]", -1, 0, 0, 0, 0, 0},
                                 {"mxfp4", "mxfp4", 8, 0, 0, 0, 0, 0},
                                 {"mxfp4 w4a16", "mxfp4", -1, 0, 0, 0, 0, 0},
                                 {"mxfp4 w4a8", "mxfp4", 1, 0, 0, 0, 0, 0},
                                 {"mxfp6", "mxfp6 in bytes", -1, 0, 0, 0, 0, 0},
                                 {"fp8", "fp8 tensor", 0, 0.02f, 0, 0, 0, 0},
                                 {"fp8 weights", "fp8 tensor", -1, 0, 0, 0, 0, 0},
                                 {"fp8 channel token", "fp8 row", 1, 0, 0, 0, 0, 0},
                                 {"fp8 block", "fp8 block128", -1, 0, 0, 0, 0, 0},
                                 {"fp8 block group", "fp8 block128", 2, 0, 0, 0, 0, 0},
                                 {"mxfp8", "mxfp8", 10, 0, 0, 0, 0, 0},
                                 {"int8 smoothquant", "int8 row", 3, 0.04f, 1, 0, 0, 0},
                                 {"int8 token", "int8 row", 5, 0, 0, 0, 0, 0},
                                 {"int8 weights", "int8 row", -1, 0, 0, 0, 0, 0},
                                 {"int8 asymmetric", "int8 zero points", 4, 0.04f, 0, 0, 0, 0},
                                 {"int8 g128", "int8 g128", -1, 0, 0, 0, 0, 0},
                                 {"int4 g128", "int4 modelopt", -1, 0, 0, 0, 0, 0},
                                 {"int4 awq", "int4 modelopt", -1, 0, 1, 0, 0, 0},
                                 {"w4a8 awq", "int4 modelopt", 0, 0.02f, 1, 0, 0, 0.004f},
                                 {"int4 g32", "pack4 g32", -1, 0, 0, 0, 0, 0},
                                 {"int4 g32 zeros", "pack4 zero points", -1, 0, 0, 0, 0, 0},
                                 {"int4 g64 awq", "awq", -1, 0, 0, 0, 0, 0},
                                 {"int4 gptq", "gptq4", -1, 0, 0, 0, 0, 0},
                                 {"int4 order", "gptq4 desc_act", -1, 0, 0, 0, 0, 0},
                                 {"int4 rotated", "pack4 g32", -1, 0, 0, 0, 32, 0},
                                 {"int3", "pack3 g32", -1, 0, 0, 0, 0, 0},
                                 {"int8 channel packed", "pack8 channel", -1, 0, 0, 0, 0, 0},
                                 {"f16", "f16", -1, 0, 0, 0, 0, 0},
                                 {"f32", "f32", -1, 0, 0, 0, 0, 0}};
enum { RECIPES = sizeof recipes / sizeof recipes[0] };

static uint32_t pick(uint32_t n) { return (uint32_t)((uint64_t)test_random() * n >> 32); }
#define CHOOSE(list) ((list)[pick((uint32_t)LLMI_COUNT(list))])

/* ---- a model ---- */

typedef enum fill { NOTHING, NORM, SMALL, POSITIVE } fill;

typedef struct tensor {
    char name[112];
    int64_t dims[4];
    int rank;
    fill kind;
    size_t at, bytes;
} tensor;

typedef struct made {
    char key[112];
    layer l;
} made;

typedef struct row {
    int32_t slot, token, pos, wanted;
} row;

/* rows [first, first + rows) together; or, rows 0: slot `to` gets `count` tokens of slot `from` (by the host: through it), from `from_pos` on */
typedef struct pass {
    int32_t first, rows, most, to, from, from_pos, count, by_host;
} pass;

typedef struct model {
    uint64_t number;
    char config[CONFIG];
    size_t said;
    tensor *t;
    int count;
    uint8_t *file;
    size_t file_bytes;
    moq_checkpoint *ck;
    made *made;
    int made_count;
    float smooth[4096];
    char what[400];
    const recipe *recipe;
    int mixed, bf16_ends, has_state, dense, experts, wants_inputs;
    const char *head;
    moq_kv_format kv;
    float kv_scale;
    int32_t layers, hidden, inter, heads, kv_heads, dim, vocab, context, slots, chunk;
    row rows[ROWS];
    pass passes[PASSES];
    int32_t row_count, pass_count, wanted;
} model;

static void say(model *m, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    m->said += (size_t)vsnprintf(m->config + m->said, CONFIG - m->said, format, args);
    va_end(args);
    if (m->said >= CONFIG - 1) die("config.json is too long");
}

static void add(model *m, fill kind, const char *name, int rank, int64_t a, int64_t b, int64_t c)
{
    tensor *t = &m->t[m->count++];
    if (m->count >= TENSORS) die("too many tensors");
    snprintf(t->name, sizeof t->name, "%s", name);
    t->kind = kind;
    t->rank = rank;
    t->dims[0] = a;
    t->dims[1] = b;
    t->dims[2] = c;
    t->bytes = 2;
    for (int i = 0; i < rank; i++) t->bytes *= (size_t)t->dims[i];
}

/* A layer [rows, cols] of a decoder layer; its bias. */
static void add_linear(model *m, const char *prefix, int layer, const char *name, int64_t rows, int64_t cols, int bias)
{
    char text[112];
    snprintf(text, sizeof text, "%slayers.%d.%s.weight", prefix, layer, name);
    add(m, NOTHING, text, 2, rows, cols, 0);
    snprintf(text, sizeof text, "%slayers.%d.%s.bias", prefix, layer, name);
    if (bias) add(m, SMALL, text, 1, rows, 0, 0);
}

static void add_vector(model *m, fill kind, const char *prefix, int layer, const char *name, int64_t count)
{
    char text[112];
    snprintf(text, sizeof text, "%slayers.%d.%s", prefix, layer, name);
    add(m, kind, text, 1, count, 0, 0);
}

/* ---- families ---- */

typedef struct mixture_size {
    int experts, top, inter, hidden, shared, bias, stacked;
} mixture_size;

static void add_attention(model *m, const char *prefix, int i, const char *mix, int fused, int bias, int out_bias, int norms, int sinks)
{
    char text[64];
    int64_t q = (int64_t)m->heads * m->dim, kv = (int64_t)m->kv_heads * m->dim;
    const struct {
        const char *name;
        int64_t rows;
    } parts[] = {{"q_proj", q}, {"k_proj", kv}, {"v_proj", kv}};
    for (int k = 0; k < 3 && !fused; k++) {
        snprintf(text, sizeof text, "%s.%s", mix, parts[k].name);
        add_linear(m, prefix, i, text, parts[k].rows, m->hidden, bias);
    }
    snprintf(text, sizeof text, "%s.qkv_proj", mix);
    if (fused) add_linear(m, prefix, i, text, q + 2 * kv, m->hidden, bias);
    snprintf(text, sizeof text, "%s.o_proj", mix);
    add_linear(m, prefix, i, text, m->hidden, q, out_bias);
    if (norms) add_vector(m, NORM, prefix, i, "self_attn.q_norm.weight", m->dim);
    if (norms) add_vector(m, NORM, prefix, i, "self_attn.k_norm.weight", m->dim);
    if (sinks) add_vector(m, SMALL, prefix, i, "self_attn.sinks", m->heads);
}

static void add_mlp(model *m, const char *prefix, int i, const char *block, int64_t inter, int gated, int fused)
{
    char text[64];
    snprintf(text, sizeof text, "%s.gate_proj", block);
    if (gated && !fused) add_linear(m, prefix, i, text, inter, m->hidden, 0);
    snprintf(text, sizeof text, "%s.%s", block, fused ? "gate_up_proj" : "up_proj");
    add_linear(m, prefix, i, text, fused ? 2 * inter : inter, m->hidden, 0);
    snprintf(text, sizeof text, "%s.down_proj", block);
    add_linear(m, prefix, i, text, m->hidden, inter, 0);
}

static void add_experts(model *m, const char *prefix, int i, const llmi_moe_names *n, const mixture_size *s)
{
    char text[112];
    const char *const parts[] = {n->gate, n->up, n->down};
    snprintf(text, sizeof text, "%s", n->router);
    add_linear(m, prefix, i, text, s->experts, m->hidden, n->stack && !n->gate);
    if (n->bias && s->bias) add_vector(m, SMALL, prefix, i, n->bias, s->experts);
    for (int e = 0; e < s->experts && !s->stacked; e++)
        for (int k = 0; k < 3; k++) {
            snprintf(text, sizeof text, "%s.%d.%s", n->experts, e, parts[k] ? parts[k] : "");
            if (parts[k]) add_linear(m, prefix, i, text, k < 2 ? s->inter : s->hidden, k < 2 ? s->hidden : s->inter, 0);
        }
    if (s->stacked) {
        snprintf(text, sizeof text, "%slayers.%d.%s.%s", prefix, i, n->experts, n->stack);
        add(m, NOTHING, text, 3, s->experts, s->hidden, 2 * s->inter);
        if (!n->gate) {
            strcat(text, "_bias");
            add(m, SMALL, text, 2, s->experts, 2 * s->inter, 0);
        }
        snprintf(text, sizeof text, "%slayers.%d.%s.%s", prefix, i, n->experts, n->down);
        add(m, NOTHING, text, 3, s->experts, s->inter, s->hidden);
        if (!n->gate) {
            strcat(text, "_bias");
            add(m, SMALL, text, 2, s->experts, s->hidden, 0);
        }
    }
    if (s->shared) add_mlp(m, prefix, i, n->shared, s->shared, n->gate != NULL, 0);
}

/* Sizes of a mixture that are worth a path of their own: few, many without a bias, groups; small matrices, and those of moe-few. */
static mixture_size choose_mixture(model *m)
{
    static const int experts[] = {4, 5, 8, 16, 32, 60, 128, 129, 160, 256, 384, 512};
    static const int inters[] = {32, 64, 96, 128, 192};
    mixture_size s;
    memset(&s, 0, sizeof s);
    s.experts = CHOOSE(experts);
    s.top = 1 + (int)pick((uint32_t)(s.experts < 10 ? s.experts : 10));
    s.inter = CHOOSE(inters);
    if (m->hidden >= 512 && pick(3)) s.inter = 512; /* wide enough for kernels of few rows */
    s.hidden = m->hidden;
    s.bias = (int)pick(2);
    m->experts = s.experts;
    return s;
}

/* says: a folder that is silent about its scaling is refused (gpt-oss). */
static void say_rope(model *m, int window_local, int says)
{
    const uint32_t kind = pick(8);
    switch (kind) {
    case 0:
        say(m, ", \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, "
               "\"original_max_position_embeddings\": 256}");
        break;
    case 1: say(m, ", \"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 2.0}"); break;
    case 2: say(m, ", \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 128}"); break;
    case 3:
    case 4:
        if (m->dim % 8 == 0 && !window_local) say(m, ", \"partial_rotary_factor\": %s", pick(2) ? "0.25" : pick(2) ? "0.5" : "0.75");
        break;
    default: break;
    }
    if (says && kind > 2) say(m, ", \"rope_scaling\": null");
}

static void say_types(model *m)
{
    say(m, ", \"layer_types\": [");
    for (int i = 0; i < m->layers; i++) say(m, "%s\"%s\"", i ? ", " : "", pick(2) ? "sliding_attention" : "full_attention");
    say(m, "]");
}

static void make_plain(model *m, const char *family)
{
    const char *p = "model.";
    int phi = strcmp(family, "phi3") == 0, gemma = strncmp(family, "gemma", 5) == 0, oss = strcmp(family, "gpt_oss") == 0;
    int qwen2 = strcmp(family, "qwen2") == 0, norms = strncmp(family, "qwen3", 5) == 0 || strcmp(family, "gemma3_text") == 0;
    const llmi_family *f = NULL;
    mixture_size s;
    for (size_t i = 0; i < LLMI_COUNT(llmi_families); i++)
        if (strcmp(llmi_families[i].model_type, family) == 0) f = &llmi_families[i];
    memset(&s, 0, sizeof s);
    if (f->moe) {
        s = choose_mixture(m);
        s.stacked = oss;
        say(m, ", \"%s\": %d, \"num_experts_per_tok\": %d, \"norm_topk_prob\": %s", f->moe->count_key, s.experts, s.top, pick(2) ? "true" : "false");
        say(m, ", \"%s\": %d", strcmp(family, "qwen3_moe") == 0 ? "moe_intermediate_size" : "intermediate_size", s.inter);
        if (strcmp(family, "qwen3_moe") == 0) say(m, ", \"intermediate_size\": %d", m->inter);
    } else {
        say(m, ", \"intermediate_size\": %d", m->inter);
    }
    if (gemma) say(m, ", \"query_pre_attn_scalar\": %d, \"hidden_activation\": \"gelu_pytorch_tanh\"", m->dim);
    else say(m, ", \"hidden_act\": \"%s\"", pick(4) ? "silu" : "gelu");
    if (gemma && pick(2)) say(m, ", \"attn_logit_softcapping\": 20.0, \"final_logit_softcapping\": 15.0");
    if (f->window == LLMI_WINDOW_ALL || f->window == LLMI_WINDOW_TYPES || pick(2))
        say(m, ", \"sliding_window\": %d, \"use_sliding_window\": true, \"max_window_layers\": 1", 3 + (int)pick(150));
    if (f->window == LLMI_WINDOW_TYPES) say_types(m);
    say_rope(m, f->window == LLMI_WINDOW_TYPES, oss);
    for (int i = 0; i < m->layers; i++) {
        add_vector(m, NORM, p, i, "input_layernorm.weight", m->hidden);
        add_vector(m, NORM, p, i, "post_attention_layernorm.weight", m->hidden);
        if (gemma) add_vector(m, NORM, p, i, "pre_feedforward_layernorm.weight", m->hidden);
        if (gemma) add_vector(m, NORM, p, i, "post_feedforward_layernorm.weight", m->hidden);
        add_attention(m, p, i, "self_attn", phi, qwen2 || oss || (!phi && pick(6) == 0), oss, norms, oss);
        if (s.experts) add_experts(m, p, i, f->moe, &s);
        else add_mlp(m, p, i, "mlp", m->inter, 1, phi);
    }
}

static void make_latent(model *m, const char *family)
{
    static const int ranks[] = {32, 64, 96, 128}, parts[] = {16, 32, 48, 64};
    const char *p = "model.";
    int v3 = strcmp(family, "deepseek_v3") == 0, q_rank = pick(3) ? CHOOSE(ranks) : 0, rank = CHOOSE(ranks), nope = CHOOSE(parts), turned = pick(2) ? 16 : 32,
        value = CHOOSE(parts);
    mixture_size s = choose_mixture(m);
    int groups = s.experts % 8 == 0 && pick(2) ? 4 : 1, top_groups = groups > 1 ? 2 : 1, head = nope + turned;
    if (s.top > s.experts / groups * top_groups) s.top = s.experts / groups * top_groups;
    s.shared = pick(3) ? s.inter : 0;
    m->dense = (int)pick(2);
    say(m, ", \"intermediate_size\": %d, \"moe_intermediate_size\": %d, \"n_routed_experts\": %d, \"num_experts_per_tok\": %d, \"n_shared_experts\": %d",
        m->inter, s.inter, s.experts, s.top, s.shared ? 1 : 0);
    say(m, ", \"n_group\": %d, \"topk_group\": %d, \"topk_method\": \"%s\", \"scoring_func\": \"%s\"", groups, top_groups,
        v3           ? "noaux_tc"
        : groups > 1 ? "group_limited_greedy"
                     : "greedy",
        v3 ? "sigmoid" : "softmax");
    say(m, ", \"q_lora_rank\": %d, \"kv_lora_rank\": %d, \"qk_nope_head_dim\": %d, \"qk_rope_head_dim\": %d, \"v_head_dim\": %d", q_rank, rank, nope, turned,
        value);
    say(m, ", \"first_k_dense_replace\": %d, \"routed_scaling_factor\": 1.5, \"norm_topk_prob\": %s, \"hidden_act\": \"silu\"", m->dense,
        pick(2) ? "true" : "false");
    for (int i = 0; i < m->layers; i++) {
        const int dense = m->dense && i == 0;
        add_vector(m, NORM, p, i, "input_layernorm.weight", m->hidden);
        add_vector(m, NORM, p, i, "post_attention_layernorm.weight", m->hidden);
        if (q_rank) add_linear(m, p, i, "self_attn.q_a_proj", q_rank, m->hidden, 0);
        if (q_rank) add_vector(m, NORM, p, i, "self_attn.q_a_layernorm.weight", q_rank);
        add_linear(m, p, i, q_rank ? "self_attn.q_b_proj" : "self_attn.q_proj", (int64_t)m->heads * head, q_rank ? q_rank : m->hidden, 0);
        add_linear(m, p, i, "self_attn.kv_a_proj_with_mqa", rank + turned, m->hidden, 0);
        add_vector(m, NORM, p, i, "self_attn.kv_a_layernorm.weight", rank);
        add_linear(m, p, i, "self_attn.kv_b_proj", (int64_t)m->heads * (nope + value), rank, 0);
        add_linear(m, p, i, "self_attn.o_proj", m->hidden, (int64_t)m->heads * value, 0);
        if (dense) add_mlp(m, p, i, "mlp", m->inter, 1, 0);
        else add_experts(m, p, i, v3 ? &llmi_moe_deepseek3 : &llmi_moe_deepseek2, &s);
    }
}

static void make_nemotron(model *m)
{
    static const int states[] = {16, 32, 64, 128}, dims[] = {16, 32, 64};
    const char *p = "backbone.", letters[] = "M*E-M*E-";
    int heads = 2 << pick(3), dim = CHOOSE(dims), state = CHOOSE(states), groups = 1 << pick(2), taps = 2 + (int)pick(3);
    int64_t inner = (int64_t)heads * dim, width = inner + 2 * (int64_t)groups * state;
    int first = (int)pick(4);
    mixture_size s = choose_mixture(m);
    int narrow = pick(3) == 0;
    if (narrow) s.hidden = m->hidden / 2 / 8 * 8;
    s.shared = pick(3) ? s.inter : 0;
    m->layers = 4;
    m->has_state = 1;
    say(m,
        ", \"hybrid_override_pattern\": \"%.4s\", \"mamba_num_heads\": %d, \"mamba_head_dim\": %d, \"ssm_state_size\": %d, \"n_groups\": %d, "
        "\"conv_kernel\": %d",
        letters + first, heads, dim, state, groups, taps);
    say(m, ", \"intermediate_size\": %d, \"moe_intermediate_size\": %d, \"n_routed_experts\": %d, \"num_experts_per_tok\": %d, \"n_shared_experts\": %d",
        m->inter, s.inter, s.experts, s.top, s.shared ? 1 : 0);
    say(m, ", \"moe_shared_expert_intermediate_size\": %d, \"n_group\": 1, \"topk_group\": 1, \"routed_scaling_factor\": 1.5, \"norm_topk_prob\": %s",
        s.inter, pick(2) ? "true" : "false");
    if (narrow) say(m, ", \"moe_latent_size\": %d", s.hidden);
    say(m, ", \"time_step_limit\": [0.0, %s], \"mlp_hidden_act\": \"relu2\", \"layer_norm_epsilon\": 1e-5", pick(2) ? "0.1" : "100.0");
    for (int i = 0; i < m->layers; i++) {
        add_vector(m, NORM, p, i, "norm.weight", m->hidden);
        switch (letters[first + i]) {
        case 'M':
            add_linear(m, p, i, "mixer.in_proj", 2 * inner + 2 * (int64_t)groups * state + heads, m->hidden, 0);
            add_linear(m, p, i, "mixer.out_proj", m->hidden, inner, 0);
            add_vector(m, SMALL, p, i, "mixer.conv1d.weight", width * taps);
            if (pick(2)) add_vector(m, SMALL, p, i, "mixer.conv1d.bias", width);
            add_vector(m, SMALL, p, i, "mixer.dt_bias", heads);
            add_vector(m, POSITIVE, p, i, "mixer.A_log", heads);
            add_vector(m, SMALL, p, i, "mixer.D", heads);
            add_vector(m, NORM, p, i, "mixer.norm.weight", inner);
            break;
        case '*': add_attention(m, p, i, "mixer", 0, 0, 0, 0, 0); break;
        case 'E':
            add_experts(m, p, i, &llmi_moe_nemotron, &s);
            if (narrow) add_linear(m, p, i, "mixer.fc1_latent_proj", s.hidden, m->hidden, 0);
            if (narrow) add_linear(m, p, i, "mixer.fc2_latent_proj", m->hidden, s.hidden, 0);
            break;
        default: add_mlp(m, p, i, "mixer", m->inter, 0, 0); break;
        }
    }
}

/* ---- the folder in memory ---- */

static void fill_values(const tensor *t, uint8_t *p, int unit)
{
    for (size_t i = 0; t->kind != NOTHING && i < t->bytes; i += 2) {
        float v = test_uniform() + test_uniform();
        v = t->kind == NORM ? (unit ? 0 : 1) + 0.2f * v : t->kind == SMALL ? 0.4f * v : fabsf(v) + 0.1f;
        uint16_t code = moq_bf16_encode(v);
        memcpy(p + i, &code, 2);
    }
}

/* Rows of the word tables in use by llm_make_head are read from here: they may not be all zero. */
static void fill_words(const tensor *t, uint8_t *p)
{
    for (size_t i = 0; i < t->bytes; i += 2) {
        uint16_t code = moq_bf16_encode(test_normal() * 0.06f);
        memcpy(p + i, &code, 2);
    }
}

static void write_file(model *m)
{
    char *head = (char *)malloc((size_t)m->count * 240 + 64);
    size_t n = 0, at = 0;
    uint64_t size;
    int unit = strstr(m->config, "\"gemma") != NULL;
    if (!head) die("no memory");
    for (int i = 0; i < m->count; i++) {
        tensor *t = &m->t[i];
        n += (size_t)sprintf(head + n, "%c\"%s\":{\"dtype\":\"BF16\",\"shape\":[", i ? ',' : '{', t->name);
        for (int k = 0; k < t->rank; k++) n += (size_t)sprintf(head + n, "%s%lld", k ? "," : "", (long long)t->dims[k]);
        n += (size_t)sprintf(head + n, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)at, (unsigned long long)(at + t->bytes));
        t->at = at;
        at += t->bytes;
    }
    head[n++] = '}';
    while (n % 8) head[n++] = ' ';
    size = n;
    m->file_bytes = 8 + n + at;
    m->file = (uint8_t *)calloc(m->file_bytes, 1); /* pages of layers that are replaced are never touched */
    if (!m->file) die("no memory");
    memcpy(m->file, &size, 8);
    memcpy(m->file + 8, head, n);
    for (int i = 0; i < m->count; i++) {
        uint8_t *p = m->file + 8 + n + m->t[i].at;
        if (strcmp(m->t[i].name, "lm_head.weight") == 0 || strstr(m->t[i].name, "embed")) fill_words(&m->t[i], p);
        else fill_values(&m->t[i], p, unit);
    }
    free(head);
}

static const char *const families[] = {"llama",     "mistral", "smollm3",     "qwen2",   "qwen3",       "phi3",        "mixtral",    "qwen3_moe",
                                       "qwen3_moe", "gemma2",  "gemma3_text", "gpt_oss", "deepseek_v2", "deepseek_v3", "nemotron_h", "nemotron_h"};

static const char *const mixtures[] = {"mixtral", "qwen3_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "nemotron_h"};

static const recipe *find_recipe(const char *name)
{
    for (int i = 0; i < RECIPES; i++)
        if (strcmp(recipes[i].name, name) == 0) return &recipes[i];
    die(name);
    return NULL;
}

static void choose_sizes(model *m)
{
    static const int odd[] = {48, 72, 100, 136, 200, 264, 328}, round[] = {128, 256, 384, 512}, large[] = {512, 1024, 1152};
    static const int dims[] = {32, 40, 48, 64, 64, 80, 96, 112, 128, 128, 160, 192, 256}, kvs[] = {1, 2, 2, 3, 4, 8}, groups[] = {1, 1, 2, 3, 4, 5, 7, 8, 16};
    static const int vocabs[] = {33, 100, 257, 320, 515, 1000};
    int kind = (int)pick(8);
    m->layers = 1 + (int)pick(3);
    m->hidden = kind < 3 ? CHOOSE(odd) : kind < 6 ? CHOOSE(round) : CHOOSE(large);
    m->inter = kind < 3 ? CHOOSE(odd) : kind < 6 ? CHOOSE(round) : CHOOSE(large);
    if (kind >= 6) m->layers = 1;
    do {
        m->dim = CHOOSE(dims);
        m->kv_heads = CHOOSE(kvs);
        m->heads = m->kv_heads * CHOOSE(groups);
    } while (m->heads * m->dim > 1024 || (kind >= 3 && m->heads * m->dim % 128));
    m->vocab = CHOOSE(vocabs);
}

static void make_model(model *m, uint64_t number)
{
    static const char *const heads[] = {NULL, NULL, NULL, "int8", "fp8"};
    static const float kv_scales[] = {0.02f, 0.01f, 0.005f};
    static const int chunks[] = {7, 40, 64, 256, 640}, slots[] = {1, 2, 3, 5, 9, 17, 20};
    const char *family, *prefix;
    char text[112];
    static const char *const wanted[] = {"nvfp4 w4a16", "nvfp4", "mxfp4 w4a16", "mxfp4", "int4 g64 awq",
                                         "int4 awq",    "fp8",   "fp8 weights", "mxfp8", "int8 smoothquant"};
    int tied, nemotron, few;
    memset(m, 0, sizeof *m);
    m->number = number;
    test_state.seed = 0x9e3779b97f4a7c15u * (number + 1);
    for (int i = 0; i < 8; i++) test_random();
    m->t = (tensor *)calloc(TENSORS, sizeof *m->t);
    m->made = (made *)calloc(LAYERS, sizeof *m->made);
    if (!m->t || !m->made) die("no memory");
    for (size_t i = 0; i < LLMI_COUNT(m->smooth); i++) m->smooth[i] = 0.6f + 0.4f * fabsf(test_uniform() + test_uniform());
    choose_sizes(m);
    family = CHOOSE(families);
    few = pick(8) == 0; /* mixtures that one kernel runs for few rows are rare otherwise */
    if (few) {
        m->hidden = pick(2) ? 512 : 1024;
        m->layers = 1;
        family = CHOOSE(mixtures);
    }
    nemotron = strcmp(family, "nemotron_h") == 0;
    prefix = nemotron ? "backbone." : "model.";
    say(m, "{\"model_type\": \"%s\", \"hidden_size\": %d, \"num_attention_heads\": %d, \"num_key_value_heads\": %d, \"head_dim\": %d, \"vocab_size\": %d",
        family, m->hidden, m->heads, m->kv_heads, m->dim, m->vocab);
    snprintf(text, sizeof text, "%s%s.weight", prefix, nemotron ? "embeddings" : "embed_tokens");
    add(m, NOTHING, text, 2, m->vocab, m->hidden, 0);
    if (nemotron) make_nemotron(m);
    else if (strncmp(family, "deepseek", 8) == 0) make_latent(m, family);
    else make_plain(m, family);
    tied = pick(3) == 0;
    say(m, ", \"num_hidden_layers\": %d, \"max_position_embeddings\": 1024, \"rms_norm_eps\": 1e-5, \"rope_theta\": 10000.0, \"tie_word_embeddings\": %s}",
        m->layers, tied ? "true" : "false");
    snprintf(text, sizeof text, "%s%s.weight", prefix, nemotron ? "norm_f" : "norm");
    add(m, NORM, text, 1, m->hidden, 0, 0);
    if (!tied) add(m, NOTHING, "lm_head.weight", 2, m->vocab, m->hidden, 0);
    m->recipe = pick(2) && !few ? &recipes[pick(RECIPES)] : find_recipe(wanted[pick(few ? 5 : (uint32_t)LLMI_COUNT(wanted))]);
    m->mixed = !few && pick(4) == 0;
    m->bf16_ends = (int)pick(2);
    m->head = CHOOSE(heads);
    m->kv = pick(2) ? (moq_kv_format)pick(MOQ_KV_FORMAT_COUNT) : MOQ_KV_WIDE;
    m->kv_scale = CHOOSE(kv_scales);
    m->slots = CHOOSE(slots);
    m->chunk = CHOOSE(chunks);
    m->context = 700;
    write_file(m);
    snprintf(m->what, sizeof m->what,
             "%s, hidden %d, inter %d, %d heads of %d over %d, vocab %d%s, %d layers, %d experts, %s%s, KV %s, %d slots, chunk %d%s%s", family, m->hidden,
             m->inter, m->heads, m->dim, m->kv_heads, m->vocab, tied ? " tied" : "", m->layers, m->experts, m->mixed ? "mixed with " : "", m->recipe->name,
             moq_kv_format_name(m->kv), m->slots, m->chunk, m->head ? ", head " : "", m->head ? m->head : "");
}

static void free_model(model *m)
{
    moq_close(m->ck);
    for (int i = 0; i < m->made_count; i++) layer_free(&m->made[i].l);
    free(m->made);
    free(m->t);
    free(m->file);
}

/* ---- layers in place of those of the folder ---- */

/* Weights become about as large as 1 / sqrt(cols): by a power of two, which every kind of scale can hold. */
static void set_size(layer *l)
{
    moq_linear *w = &l->w;
    double sum = 0, n = (double)(w->rows * w->cols);
    int shift;
    for (int64_t i = 0; i < w->rows * w->cols; i++) sum += l->exact[i] * l->exact[i];
    frexp(sqrt(n / sum / (double)w->cols), &shift);
    moq_view *v = w->scales.data ? &w->scales : &w->codes;
    uint8_t *p = (uint8_t *)(size_t)v->data;
    if (w->global_mul != 1) {
        w->global_mul *= ldexpf(1, shift);
        return;
    }
    if (w->global_div != 1) {
        w->global_div *= ldexpf(1, -shift);
        return;
    }
    for (uint64_t i = 0; i < v->count; i++) {
        uint16_t h;
        float f;
        if (v->dtype == MOQ_F8_E8M0) p[i] = (uint8_t)(p[i] + shift);
        else if (v->dtype == MOQ_F32) {
            memcpy(&f, p + 4 * i, 4);
            f *= ldexpf(1, shift);
            memcpy(p + 4 * i, &f, 4);
        } else {
            memcpy(&h, p + 2 * i, 2);
            h = v->dtype == MOQ_BF16 ? moq_bf16_encode(ldexpf(moq_bf16_decode(h), shift)) : moq_f16_encode(ldexpf(moq_f16_decode(h), shift));
            memcpy(p + 2 * i, &h, 2);
        }
    }
}

static const layer_format *find_format(const char *name)
{
    for (size_t i = 0; i < LLMI_COUNT(layer_formats); i++)
        if (strcmp(layer_formats[i].name, name) == 0) return &layer_formats[i];
    die(name);
    return NULL;
}

static int fits(const recipe *r, const moq_linear *w)
{
    const layer_format *f = find_format(r->format);
    if (w->rows % f->row_unit || w->cols % f->col_unit || (r->hadamard && w->cols % r->hadamard)) return 0;
    return r->input < 0 || input_formats[r->input].c.group_cols <= 0 || w->cols % input_formats[r->input].c.group_cols == 0;
}

/* The recipe of a layer: the model's, where its shape allows; routers and word tables are mostly left alone. */
static const recipe *recipe_for(const model *m, const moq_linear *w, const char *key)
{
    const int word = strstr(key, "embed") || strstr(key, "lm_head"), expert = strstr(key, "experts") != NULL,
              router = strstr(key, "router") || (strstr(key, "gate") && !strstr(key, "gate_"));
    const recipe *r = m->mixed ? &recipes[pick(RECIPES)] : m->recipe;
    if (router) return &recipes[pick(2) ? 0 : RECIPES - 1];
    if (word && m->bf16_ends) return &recipes[0];
    for (int i = 0; i < 40; i++) { /* low-rank branches of experts are of one rank */
        if (fits(r, w) && !(word && (r->smooth || r->hadamard)) && !(expert && r->lora && (m->mixed || r != m->recipe))) return r;
        r = &recipes[pick(RECIPES)];
    }
    return &recipes[0];
}

static void dress(model *m, layer *l, const recipe *r)
{
    moq_linear *w = &l->w;
    if (r->input >= 0) {
        w->scheme.input = input_formats[r->input].c;
        w->input_scale = r->input_scale;
        w->input_zero = input_formats[r->input].zero;
        m->wants_inputs = 1;
    }
    if (r->smooth) {
        w->pre_quant_scale = layer_view(m->smooth, MOQ_F32, w->cols);
        w->scheme.pre_quant_scale = 1;
    }
    if (r->lora) {
        float *p = layer_floats(l, r->lora * (w->cols + w->rows), 0.03f);
        w->scheme.lora_rank = (uint16_t)r->lora;
        w->lora_a = layer_view(p, MOQ_F32, r->lora * w->cols);
        w->lora_b = layer_view(p + r->lora * w->cols, MOQ_F32, w->rows * r->lora);
    }
    if (r->hadamard) {
        w->scheme.hadamard = 1;
        w->hadamard_size = r->hadamard;
        w->hadamard_scale = 1 / sqrtf((float)r->hadamard);
    }
    if (r->requant > 0) {
        w->scheme.requantize_fp8 = 1;
        w->requant_scale = r->requant;
    }
}

/* The layer that stands for `w`: made once. Sizes of another layer's key never differ. */
static void replace(model *m, const moq_linear *w, const char *key, moq_linear *out)
{
    uint64_t seed = test_state.seed;
    made *p = NULL;
    for (int i = 0; i < m->made_count && !p; i++)
        if (strcmp(m->made[i].key, key) == 0) p = &m->made[i];
    if (!p) {
        if (m->made_count == LAYERS) die("too many layers");
        p = &m->made[m->made_count++];
        snprintf(p->key, sizeof p->key, "%s", key);
        test_state.seed = llmi_hash(key, strlen(key)) ^ (m->number * 0x9e3779b97f4a7c15u);
        const recipe *r = recipe_for(m, w, key);
        layer_make(&p->l, find_format(r->format), w->rows, w->cols);
        if (p->l.w.rows != w->rows || p->l.w.cols != w->cols) die("a format that does not fit was chosen");
        set_size(&p->l);
        dress(m, &p->l, r);
        if (w->bias.data) p->l.w.bias = layer_view(layer_floats(&p->l, w->rows, 0.2f), MOQ_F32, w->rows);
        test_state.seed = seed;
    }
    *out = p->l.w;
    out->name = w->name;
}

/* A backend with a model's layers. */
typedef struct stage {
    moq_backend be;
    const moq_backend *inner;
    model *m;
    uint32_t shaken; /* state of the random numbers that inputs are shaken by */
} stage;

static moq_weight *stage_linear(moq_backend *be, const moq_linear *w, int32_t parts, moq_error *err)
{
    const stage *s = (const stage *)(const void *)be;
    moq_linear own[3];
    for (int32_t i = 0; i < parts; i++) {
        if (moq_scheme_is_quantized(&w[i].scheme)) own[i] = w[i]; /* an output layer by llm_make_head */
        else replace(s->m, &w[i], w[i].name, &own[i]);
    }
    return s->inner->prepare_linear(be, own, parts, err);
}

/* Many experts share the layers of a few: their number is no multiple of anything that routing could confuse. */
static moq_experts *stage_moe(moq_backend *be, const moq_moe *moe, moq_error *err)
{
    const stage *s = (const stage *)(const void *)be;
    const int32_t n = moe->routing.experts;
    const moq_linear *from[3] = {moe->gate, moe->up, moe->down};
    moq_linear *all = (moq_linear *)calloc(3 * (size_t)n, sizeof *all);
    moq_moe own = *moe;
    char key[112];
    if (!all) die("no memory");
    for (int k = 0; k < 3; k++)
        for (int32_t e = 0; from[k] && e < n; e++) {
            snprintf(key, sizeof key, "%s %d %d", moe->name, k, e % POOL);
            replace(s->m, &from[k][e], key, &all[k * n + e]);
        }
    own.gate = moe->gate ? all : NULL;
    own.up = all + n;
    own.down = all + 2 * n;
    moq_experts *x = s->inner->prepare_moe(be, &own, err);
    free(all);
    return x;
}

/* Scales and biases that calibration would have found. */
static moq_kv_cache *stage_kv(moq_backend *be, const moq_kv_desc *desc, moq_error *err)
{
    const stage *s = (const stage *)(const void *)be;
    moq_kv_desc d = *desc;
    float scales[2][64], *biases = NULL;
    const int64_t heads = d.kv_heads, keys = heads * d.head_dim, values = heads * (d.value_dim ? d.value_dim : d.head_dim);
    const uint64_t seed = test_state.seed;
    moq_kv_cache *kv;
    if (d.kv.format == MOQ_KV_WIDE || d.kv.format == MOQ_KV_MXFP4 || heads > 64) return s->inner->kv_create(be, desc, err);
    test_state.seed = llmi_hash(d.name, strlen(d.name)) ^ s->m->number;
    const int each = (int)pick(2);
    for (int k = 0; k < 2; k++)
        for (int64_t i = 0; i < heads; i++)
            scales[k][i] = s->m->kv_scale * (d.kv.format == MOQ_KV_INT8 ? 3 : 1) * (1 + (each ? 0.5f * fabsf(test_uniform()) : 0));
    d.kv.k_scale = layer_view(scales[0], MOQ_F32, each ? heads : 1);
    d.kv.v_scale = layer_view(scales[1], MOQ_F32, each ? heads : 1);
    if (d.kv.format == MOQ_KV_FP8_AFFINE || d.kv.format == MOQ_KV_NVFP4_AFFINE) {
        biases = (float *)calloc((size_t)(keys + values), sizeof *biases);
        for (int64_t i = 0; i < keys + values; i++) biases[i] = test_uniform() * 0.5f;
        d.kv.k_bias = layer_view(biases, MOQ_F32, keys);
        d.kv.v_bias = layer_view(biases + keys, MOQ_F32, values);
    }
    test_state.seed = seed;
    kv = s->inner->kv_create(be, &d, err);
    free(biases);
    return kv;
}

static moq_latent_desc stage_middle(const stage *s, const moq_latent_desc *d, moq_linear *own)
{
    moq_latent_desc out = *d;
    replace(s->m, d->kv_b, d->kv_b->name, own);
    out.kv_b = own;
    return out;
}

static size_t stage_latent_bytes(const moq_backend *be, const moq_latent_desc *d)
{
    const stage *s = (const stage *)(const void *)be;
    moq_linear own;
    moq_latent_desc mine = stage_middle(s, d, &own);
    return s->inner->latent_bytes(be, &mine);
}

static moq_latent *stage_latent(moq_backend *be, const moq_latent_desc *d, moq_error *err)
{
    const stage *s = (const stage *)(const void *)be;
    moq_linear own;
    moq_latent_desc mine = stage_middle(s, d, &own);
    return s->inner->latent_create(be, &mine, err);
}

/* Inputs of a layer times 1 + e, rms of e 2^-18: what stands at an edge where inputs are rounded falls to the other side. */
static void stage_shaken(moq_backend *be, const moq_weight *w, const void *x, int32_t rows, void *y)
{
    stage *s = (stage *)(void *)be;
    const int64_t count = rows * ((const moqi_weight *)(const void *)w)->cols;
    const float *from = (const float *)x;
    float *to = (float *)malloc((size_t)count * sizeof *to);
    if (!to) die("no memory");
    for (int64_t i = 0; i < count; i++) {
        s->shaken = s->shaken * 1664525u + 1013904223u;
        to[i] = from[i] * (1 + ((float)(s->shaken >> 8) / 8388608.0f - 1) * 6.6e-6f);
    }
    s->inner->linear((moq_backend *)(uintptr_t)s->inner, w, to, rows, y);
    free(to);
}

static void set_stage(stage *s, const moq_backend *inner, model *m, int shaken)
{
    s->be = *inner;
    s->inner = inner;
    s->m = m;
    s->shaken = 1;
    if (shaken) { /* and no other entry that multiplies, but mixtures */
        s->be.linear = stage_shaken;
        s->be.linear_rows = NULL;
        s->be.mlp = NULL;
    }
    s->be.prepare_linear = stage_linear;
    if (inner->prepare_moe) s->be.prepare_moe = stage_moe;
    s->be.kv_create = stage_kv;
    if (inner->latent_create) {
        s->be.latent_bytes = stage_latent_bytes;
        s->be.latent_create = stage_latent;
    }
}

/* ---- passes ---- */

static void add_row(model *m, int32_t slot, int32_t pos, int wanted)
{
    row *r = &m->rows[m->row_count++];
    r->slot = slot;
    r->token = (int32_t)pick((uint32_t)m->vocab);
    r->pos = pos;
    r->wanted = wanted;
    m->wanted += wanted;
    m->passes[m->pass_count].rows++;
}

static void begin_pass(model *m)
{
    m->passes[m->pass_count].first = m->row_count;
    m->passes[m->pass_count].most = pick(8) ? INT32_MAX : 64 * (1 + (int32_t)pick(4));
}
static int has_room(const model *m, int rows) { return m->row_count + rows < ROWS && m->pass_count + 2 < PASSES; }

/* A prompt, in pieces. */
static void plan_prompt(model *m, int32_t slot, int32_t *length, int32_t count)
{
    int32_t pos = m->has_state || pick(3) ? (pick(4) ? 0 : length[slot]) : (int32_t)pick((uint32_t)length[slot] + 1),
            piece = 1 + (int32_t)pick(2 * (uint32_t)count);
    const int all = (int)pick(2);
    if (m->has_state && pos != length[slot]) pos = 0;
    if (pos + count > m->context) pos = 0;
    if (piece > m->chunk) piece = m->chunk;
    for (int32_t at = 0; at < count && has_room(m, piece); m->pass_count++) {
        begin_pass(m);
        for (int32_t i = 0; i < piece && at < count; i++, at++) add_row(m, slot, pos + at, all || at + 1 == count || i + 1 == piece);
        length[slot] = pos + at;
    }
}

/* Some tokens of many sequences: one each, or up to `most`. */
static void plan_batch(model *m, int32_t *length, int most)
{
    int32_t take[SLOTS], rows = 0;
    const int all = (int)pick(2);
    if (!has_room(m, m->chunk)) return;
    begin_pass(m);
    for (int32_t s = 0; s < m->slots; s++) {
        take[s] = most == 1 ? 1 : (int32_t)pick((uint32_t)most + 1);
        if (length[s] == 0 && pick(4)) take[s] = 0;
        if (take[s] > m->context - length[s]) take[s] = 0;
        if (rows + take[s] > m->chunk) take[s] = 0;
        rows += take[s];
    }
    for (int last = 0; last < 2; last++) /* rows that want logits stand last */
        for (int t = 0; t < most; t++)
            for (int32_t s = 0; s < m->slots; s++)
                if (t < take[s] && (all ? last : (t + 1 == take[s]) == last)) add_row(m, s, length[s] + t, last);
    for (int32_t s = 0; s < m->slots; s++) length[s] += take[s];
    if (m->passes[m->pass_count].rows) m->pass_count++;
}

static void plan_copy(model *m, int32_t *length)
{
    pass *p = &m->passes[m->pass_count];
    int32_t from = (int32_t)pick((uint32_t)m->slots), to = (int32_t)pick((uint32_t)m->slots);
    if (!has_room(m, 1) || length[from] < 2) return;
    p->from = from;
    p->to = to;
    p->by_host = from != to && pick(3) == 0;
    if (from == to && m->has_state) return;
    p->from_pos = from == to ? 1 + (int32_t)pick((uint32_t)length[from] - 1) : 0;
    p->count = m->has_state || from == to ? length[from] - p->from_pos : 1 + (int32_t)pick((uint32_t)length[from]);
    length[to] = p->count;
    m->pass_count++;
}

static void plan(model *m, int budget)
{
    int32_t length[SLOTS];
    memset(length, 0, sizeof length);
    const int full = budget;
    for (int turn = 0; turn < 60 && budget > 0 && has_room(m, 20); turn++) {
        const int before = m->row_count;
        const int32_t slot = (int32_t)pick((uint32_t)m->slots), longest = full < 600 ? full : 600;
        const uint32_t kind = turn == 0 ? 0 : pick(8);
        if (kind == 0) plan_prompt(m, slot, length, 1 + (int32_t)pick((uint32_t)longest));
        else if (kind == 1) plan_prompt(m, slot, length, 1 + (int32_t)pick(40));
        else if (kind <= 3) plan_batch(m, length, 1);
        else if (kind == 4) plan_batch(m, length, 4);
        else if (kind == 5) plan_copy(m, length);
        else
            for (int i = 0; i < 3; i++)
                if (length[slot] < m->context && has_room(m, 1)) {
                    begin_pass(m);
                    add_row(m, slot, length[slot]++, 1);
                    m->pass_count++;
                }
        budget -= m->row_count - before + 2;
    }
}

static void copy_slot(llmi_model *x, const pass *p)
{
    moq_backend *be = x->be;
    for (int32_t i = 0; i < x->c.layers; i++) {
        const llmi_layer *l = &x->layers[i];
        if (l->kv && p->by_host) {
            void *bytes = malloc(be->kv_read(be, l->kv, p->from, p->count, NULL) + 1);
            be->kv_read(be, l->kv, p->from, p->count, bytes);
            be->kv_write(be, l->kv, p->to, p->count, bytes);
            free(bytes);
        } else if (l->kv) be->kv_copy(be, l->kv, p->to, 0, p->from, p->from_pos, p->count);
        if (l->ssm && p->by_host) {
            void *bytes = malloc(be->ssm_read(be, l->ssm, p->from, NULL) + 1);
            be->ssm_read(be, l->ssm, p->from, bytes);
            be->ssm_write(be, l->ssm, p->to, bytes);
            free(bytes);
        } else if (l->ssm && p->to != p->from) be->ssm_copy(be, l->ssm, p->to, p->from);
    }
    x->length[p->to] = p->count;
}

/* All passes; logits [wanted, vocab]. */
static moq_result run_passes(const model *m, llmi_model *x, float *out, moq_error *err)
{
    moq_result code = MOQ_OK;
    for (int32_t i = 0; i < m->pass_count && code >= 0; i++) {
        const pass *p = &m->passes[i];
        if (!p->rows) {
            copy_slot(x, p);
            continue;
        }
        llmi_pass_clear(x);
        for (int32_t r = p->first; r < p->first + p->rows; r++) {
            llmi_pass_add(x, m->rows[r].slot, m->rows[r].token, m->rows[r].pos, m->rows[r].wanted ? out : NULL);
            out += m->rows[r].wanted ? m->vocab : 0;
        }
        while (!llmi_pass_done(x)) llmi_pass_unit(x, p->most);
        code = llmi_pass_end(x, err);
    }
    return code;
}

/* ---- comparing ---- */

static int threads = 8;

/* Opens the model on a backend, runs it, closes it. NULL: refused. */
static float *run_on(model *m, moq_backend *inner, int shaken, moq_error *err)
{
    stage s;
    llm_desc d;
    float *out = (float *)malloc(((size_t)m->wanted * (size_t)m->vocab + 1) * sizeof *out);
    llm *bot;
    if (!out) die("no memory");
    memset(&d, 0, sizeof d);
    set_stage(&s, inner, m, shaken);
    d.checkpoint = m->ck;
    d.backend = &s.be;
    d.no_tokenizer = 1;
    d.kv = m->kv == MOQ_KV_WIDE ? "wide" : moq_kv_format_name(m->kv);
    d.head = m->head;
    d.context = m->context;
    d.slots = m->slots;
    d.chunk = m->chunk;
    bot = llm_open(&d, err);
    if (bot && run_passes(m, bot->model, out, err) == MOQ_OK) {
        llm_close(bot);
        return out;
    }
    llm_close(bot);
    free(out);
    return NULL;
}

static float *run_cpu(model *m, const char *kernel, moq_act act, int shaken, moq_error *err)
{
    moq_cpu_desc d;
    memset(&d, 0, sizeof d);
    d.kernel = kernel;
    d.act = act;
    d.threads = threads;
    moq_backend *be = moq_cpu_backend(&d, err);
    if (!be) die(err->text);
    float *out = run_on(m, be, shaken, err);
    moq_backend_destroy(be);
    return out;
}

typedef struct errors {
    double median, most;
    int32_t worst;
} errors;

/* Relative rms of each token's logits; the nearer one of two oracles (the second may be NULL). */
static errors compare(const model *m, const float *a, const float *b, const float *c)
{
    double *e = (double *)malloc((size_t)m->wanted * sizeof *e);
    errors out = {0, 0, 0};
    if (!e) die("no memory");
    for (int32_t i = 0; i < m->wanted; i++) {
        e[i] = relative_rms(a + (size_t)i * (size_t)m->vocab, b + (size_t)i * (size_t)m->vocab, (size_t)m->vocab);
        double other = c ? relative_rms(a + (size_t)i * (size_t)m->vocab, c + (size_t)i * (size_t)m->vocab, (size_t)m->vocab) : e[i];
        if (other < e[i]) e[i] = other;
        if (e[i] > out.most) {
            out.most = e[i];
            out.worst = i;
        }
    }
    qsort(e, (size_t)m->wanted, sizeof *e, compare_double);
    out.median = m->wanted ? e[m->wanted / 2] : 0;
    free(e);
    return out;
}

static errors larger(errors a, errors b)
{
    if (b.median > a.median) a.median = b.median;
    if (b.most > a.most) a.most = b.most;
    return a;
}

/* Where the worst token stands. */
static void show_worst(const model *m, int32_t worst)
{
    for (int32_t i = 0, n = 0; i < m->pass_count; i++)
        for (int32_t r = m->passes[i].first; r < m->passes[i].first + m->passes[i].rows; r++)
            if (m->rows[r].wanted && n++ == worst)
                fprintf(stderr, "    worst: pass %d of %d, %d rows; slot %d, position %d\n", i, m->pass_count, m->passes[i].rows, m->rows[r].slot,
                        m->rows[r].pos);
}

typedef struct way {
    const char *name;
    moq_dtype activations;
    moq_act act;
    const char *kernel;
} way;

static const way ways[] = {{"F32 wide", MOQ_F32, MOQ_ACT_WIDE, NULL},   {"F32 stored", MOQ_F32, MOQ_ACT_STORED, NULL},
                           {"F32 auto", MOQ_F32, MOQ_ACT_AUTO, NULL},   {"BF16 wide", MOQ_BF16, MOQ_ACT_WIDE, NULL},
                           {"BF16 auto", MOQ_BF16, MOQ_ACT_AUTO, NULL}, {"F32 bf16", MOQ_F32, MOQ_ACT_BF16, NULL}};
enum { WAYS = sizeof ways / sizeof ways[0] };

static int refused;

/* F32 keeps 24 bits of every sum, and the CPU's two orders differ by what that leaves (noise). CUDA multiplies 17 and more rows with 16 bits of each
   input, 2^8 as coarse, of which the sum over columns keeps less than a quarter: 64 times the noise. Where something is rounded to a format, an input
   or a key that stands at an edge may fall to the other side: a step of 2^-4 for one of hundreds of numbers, in a few tokens. BF16 keeps 8 bits of
   everything: 2^-9 / sqrt(3) a rounding, some tens of them, and experts that are nearly equal change places: other logits, which may be several times
   those of a token whose own are small (model 417: 3.5 where the CPU rounds its router's logits, and nothing else, to BF16). By the backend's own choice
   some tokens of a sequence have rounded inputs and others not: apart is the distance of the two. How much the edges of a model matter the CPU says
   itself (rounded): by another order, and by inputs shaken by 2^-18, which moves the first tokens of a sequence and so all that look at them
   (model 8042: the median of six such runs is 1e-6 to 0.07; model 6005: one token of 521 by 1.65). */
static double larger_of(double a, double b) { return a > b ? a : b; }

static int good(const model *m, const way *w, const errors *e, const errors *noise, const errors *rounded, const errors *apart)
{
    const int short_keys = m->kv >= MOQ_KV_NVFP4, short_numbers = w->activations == MOQ_BF16 || w->act == MOQ_ACT_AUTO || w->act == MOQ_ACT_BF16;
    double median = 64 * noise->median + 2e-5, most = 64 * noise->most + 1e-4;
    if (m->kv != MOQ_KV_WIDE) {
        median += short_keys ? 2e-2 : 1e-3;
        most = 0.3;
    }
    if (w->act == MOQ_ACT_STORED) {
        median += 6 * rounded->median + (short_keys ? 0.1 : m->wanted < 50 ? 0.05 : 2e-2);
        most = larger_of(m->experts ? 1.5 : 0.5, 2 * rounded->most);
    }
    if (short_numbers) {
        median = (m->experts || m->mixed ? 0.25 : 0.1) + (short_keys ? 0.35 : 0) + (w->act == MOQ_ACT_AUTO ? apart->median : 0);
        most = larger_of(m->experts ? 5 : 1.7, w->act == MOQ_ACT_AUTO ? 2 * rounded->most : 0);
    }
    return e->median <= median && e->most <= most;
}

/* 1: passed. */
static int check_way(model *m, const way *w, const float *wide, const float *stored, const errors *noise, const errors *rounded, const errors *apart)
{
    moq_cuda_desc d;
    moq_error err;
    errors e;
    memset(&d, 0, sizeof d);
    memset(&err, 0, sizeof err);
    d.act = w->act;
    d.kernel = w->kernel;
    moq_backend *be = moq_cuda_backend_full(&d, w->activations, NULL, &err);
    if (!be) die(err.text);
    float *out = run_on(m, be, 0, &err);
    moq_backend_destroy(be);
    if (!out) {
        refused++;
        fprintf(stderr, "model %d (%s), %s: refused: %s\n", (int)m->number, m->what, w->name, err.text);
        return err.code == MOQ_E_UNSUPPORTED;
    }
    e = compare(m, out, w->act == MOQ_ACT_STORED ? stored : wide, w->act == MOQ_ACT_AUTO ? stored : NULL);
    free(out);
    const int fine = good(m, w, &e, noise, rounded, apart);
    if (!fine || getenv("MOQ_TELL")) {
        fprintf(stderr, "model %d (%s), %s%s: median %.3g, most %.3g of %d tokens; noise %.3g, %.3g, as stored %.3g\n", (int)m->number, m->what, w->name,
                fine ? "" : " FAILED", e.median, e.most, m->wanted, noise->median, noise->most, rounded->median);
        if (!fine) show_worst(m, e.worst);
    }
    if (!fine) fprintf(stderr, "    again: test_models %d 1\n", (int)m->number);
    return fine;
}

/* The oracles; a cache that the CPU refuses for these heads becomes wide. */
static int run_oracles(model *m, float *out[5])
{
    moq_error err;
    memset(&err, 0, sizeof err);
    out[0] = run_cpu(m, "reference", MOQ_ACT_WIDE, 0, &err);
    if (!out[0] && m->kv != MOQ_KV_WIDE) {
        m->kv = MOQ_KV_WIDE;
        out[0] = run_cpu(m, "reference", MOQ_ACT_WIDE, 0, &err);
    }
    if (out[0]) out[1] = run_cpu(m, NULL, MOQ_ACT_WIDE, 0, &err);
    if (out[1]) out[2] = m->wants_inputs ? run_cpu(m, "reference", MOQ_ACT_STORED, 0, &err) : out[0];
    if (out[2]) out[3] = m->wants_inputs ? run_cpu(m, NULL, MOQ_ACT_STORED, 0, &err) : out[1];
    if (out[3]) out[4] = m->wants_inputs ? run_cpu(m, NULL, MOQ_ACT_STORED, 1, &err) : out[1];
    if (!out[4]) fprintf(stderr, "model %d (%s), CPU: %s\n    %s\n", (int)m->number, m->what, err.text, m->config);
    return out[4] != NULL;
}

static int check_model(uint64_t number)
{
    model *m = (model *)malloc(sizeof *m);
    moq_file files[2];
    moq_error err;
    float *out[5] = {NULL, NULL, NULL, NULL, NULL};
    errors noise, rounded, apart;
    double start = moq_seconds();
    int fine = 1;
    if (!m) die("no memory");
    make_model(m, number);
    if (getenv("MOQ_WIDE_KEYS")) m->kv = MOQ_KV_WIDE;
    double weights = (double)m->layers * m->hidden * (3.0 * m->inter + 2.5 * m->heads * m->dim + 2.0 * m->kv_heads * m->dim) + (double)m->hidden * m->vocab;
    plan(m, (int)(weights > 0 ? 2.5e8 / weights < 1200 ? 2.5e8 / weights : 1200 : 40));
    memset(files, 0, sizeof files);
    files[0].name = "config.json";
    files[0].data = m->config;
    files[0].bytes = m->said;
    files[1].name = "model.safetensors";
    files[1].data = m->file;
    files[1].bytes = m->file_bytes;
    m->ck = moq_open_memory(files, 2, NULL, &err);
    if (!m->ck) {
        fprintf(stderr, "model %d (%s): %s\n", (int)number, m->what, err.text);
        fine = 0;
    }
    if (fine) fine = run_oracles(m, out);
    double cpu = moq_seconds();
    if (fine) {
        noise = compare(m, out[1], out[0], NULL);
        rounded = larger(compare(m, out[3], out[2], NULL), compare(m, out[4], out[2], NULL));
        apart = compare(m, out[2], out[0], NULL);
        for (int i = 0; i < WAYS; i++) {
            if (ways[i].act == MOQ_ACT_STORED && !m->wants_inputs) continue;
            if (ways[i].act != MOQ_ACT_WIDE && ways[i].act != MOQ_ACT_STORED && (number + (uint64_t)i) % 3)
                continue; /* limits are wide: some models are enough */
            fine &= check_way(m, &ways[i], out[0], out[2], &noise, &rounded, &apart);
        }
    }
    if (getenv("MOQ_TELL"))
        fprintf(stderr, "model %d: %d rows in %d passes, CPU %.2f s, CUDA %.2f s\n", (int)number, m->row_count, m->pass_count, cpu - start,
                moq_seconds() - cpu);
    if (out[2] != out[0]) free(out[2]);
    if (out[3] != out[1]) free(out[3]);
    if (out[4] != out[1]) free(out[4]);
    free(out[1]);
    free(out[0]);
    free_model(m);
    free(m);
    return fine;
}

int main(int argc, char **argv)
{
    const uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    const int count = argc > 2 ? atoi(argv[2]) : 40;
    const double limit = argc > 3 ? atof(argv[3]) : 1e9, start = moq_seconds();
    int passed = 0, failed = 0;
    if (moq_cpu_count() < threads) threads = moq_cpu_count();
    for (int i = 0; i < count && moq_seconds() - start < limit; i++) {
        if (check_model(first + (uint64_t)i)) passed++;
        else failed++;
    }
    printf("note: models %llu to %llu in %.1f s, %d runs refused\n", (unsigned long long)first, (unsigned long long)(first + (uint64_t)(passed + failed) - 1),
           moq_seconds() - start, refused);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
