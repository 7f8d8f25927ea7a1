/* Tokens a second of whole models with random NVFP4 weights: writes a folder of the wanted shape, opens it on the GPU, reads prompts and generates.
       bench_model SHAPE FOLDER [LAYERS [GB_PER_S [WHAT [CHUNK]]]]     e.g. bench_model llama-8b /tmp/model 32 4530
   Shapes: llama-8b, qwen3-30b-a3b, tiny, tiny-moe. GB_PER_S: what a plain read reaches, for the fraction (of weights and KV bytes of a token over that rate).
   A folder that is there already is used as it is. WHAT is made of letters, all by default, and two that choose:
     g  one sequence that is continued after 64, 1024 and 8192 tokens, one token a call, logits to the host
     p  prompts of 64 to 8192 tokens from position 0 on, the last row's logits to the host; beside 700 TFLOP/s, which cuBLAS BF16 holds on an H200
     s  1, 8, 32 and 64 sequences of 1024 tokens that are continued together: logits of all to the host; the largest one's index of each
     b  BF16 activations alone, f  F32 activations alone
   CHUNK: llm_desc.chunk of prompts. */
#include "../test.h"

#define LLM_IMPLEMENTATION
#include "../../examples/llm.h"

#include <sys/stat.h>

/* See modelopt_q_cuda.cu. */
#ifdef __cplusplus
extern "C"
#endif
moq_backend *moq_cuda_backend_full(const moq_cuda_desc *desc, moq_dtype activations, const moq_allocator *memory, moq_error *err);

typedef struct shape {
    const char *name, *model_type;
    int layers, hidden, inter, heads, kv_heads, head_dim, vocab, experts, top_k;
} shape;

static const shape shapes[] = {
    {"llama-8b", "llama", 32, 4096, 14336, 32, 8, 128, 128256, 0, 0},
    {"qwen3-30b-a3b", "qwen3_moe", 48, 2048, 768, 32, 4, 128, 151936, 128, 8},
    {"tiny", "llama", 2, 256, 512, 4, 2, 64, 512, 0, 0},
    {"tiny-moe", "qwen3_moe", 2, 256, 128, 4, 2, 64, 512, 8, 2}};

/* ---- the folder ---- */

enum tensor_kind { CODES, SCALES, GLOBAL, TABLE, ONES };

typedef struct tensor { char name[120]; int kind; int64_t rows, cols; uint64_t at, bytes; } tensor;

typedef struct list { tensor *t; size_t count, room; uint64_t bytes; } list;

static void add(list *l, int kind, int64_t rows, int64_t cols, const char *name)
{
    tensor *t;
    if (l->count == l->room) {
        l->room = l->room ? 2 * l->room : 1024;
        l->t = (tensor *)realloc(l->t, l->room * sizeof *l->t);
        if (!l->t) exit(2);
    }
    t = &l->t[l->count++];
    snprintf(t->name, sizeof t->name, "%s", name);
    t->kind = kind;
    t->rows = rows;
    t->cols = cols;
    t->bytes = kind == GLOBAL ? 4 : kind == TABLE || kind == ONES ? (uint64_t)(rows * cols) * 2 : kind == CODES ? (uint64_t)(rows * cols) / 2 : (uint64_t)(rows * cols) / 16;
    t->at = l->bytes;
    l->bytes += t->bytes;
}

static void add_layer(list *l, int64_t rows, int64_t cols, const char *name)
{
    char text[160];
    snprintf(text, sizeof text, "%s.weight", name);
    add(l, CODES, rows, cols, text);
    snprintf(text, sizeof text, "%s.weight_scale", name);
    add(l, SCALES, rows, cols, text);
    snprintf(text, sizeof text, "%s.weight_scale_2", name);
    add(l, GLOBAL, 1, 1, text);
}

static void add_block(list *l, const shape *s, int i)
{
    static const char *const mlp[3] = {"gate_proj", "up_proj", "down_proj"};
    char name[120];
    const struct { const char *tail; int64_t rows, cols; } own[4] = {
        {"q_proj", (int64_t)s->heads * s->head_dim, s->hidden}, {"k_proj", (int64_t)s->kv_heads * s->head_dim, s->hidden},
        {"v_proj", (int64_t)s->kv_heads * s->head_dim, s->hidden}, {"o_proj", s->hidden, (int64_t)s->heads * s->head_dim}};
    for (int k = 0; k < 4; k++) {
        snprintf(name, sizeof name, "model.layers.%d.self_attn.%s", i, own[k].tail);
        add_layer(l, own[k].rows, own[k].cols, name);
    }
    for (int e = 0; e < (s->experts ? s->experts : 1); e++)
        for (int k = 0; k < 3; k++) {
            if (s->experts) snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%d.%s", i, e, mlp[k]);
            else snprintf(name, sizeof name, "model.layers.%d.mlp.%s", i, mlp[k]);
            add_layer(l, k < 2 ? s->inter : s->hidden, k < 2 ? s->hidden : s->inter, name);
        }
    if (s->experts) {
        snprintf(name, sizeof name, "model.layers.%d.mlp.gate.weight", i);
        add(l, TABLE, s->experts, s->hidden, name);
        snprintf(name, sizeof name, "model.layers.%d.self_attn.q_norm.weight", i);
        add(l, ONES, 1, s->head_dim, name);
        snprintf(name, sizeof name, "model.layers.%d.self_attn.k_norm.weight", i);
        add(l, ONES, 1, s->head_dim, name);
    }
    snprintf(name, sizeof name, "model.layers.%d.input_layernorm.weight", i);
    add(l, ONES, 1, s->hidden, name);
    snprintf(name, sizeof name, "model.layers.%d.post_attention_layernorm.weight", i);
    add(l, ONES, 1, s->hidden, name);
}

/* Codes of every value, block scales of 0.25 to 2, tables of +-0.03: activations stay of the size they have in real models. */
static void fill(uint8_t *p, size_t bytes, int kind, int64_t cols)
{
    const float global = (float)(0.35 / sqrt((double)cols));
    size_t i;
    for (i = 0; kind == CODES && i + 8 <= bytes; i += 8) { uint64_t r = (uint64_t)test_random() << 32 | test_random(); memcpy(p + i, &r, 8); }
    for (i = 0; kind == SCALES && i < bytes; i++) p[i] = (uint8_t)(0x28 + test_random() % 0x18);
    for (i = 0; kind == TABLE && i + 2 <= bytes; i += 2) { uint16_t v = (uint16_t)((test_random() >> 8 & 0x80ff) | 0x3c00); memcpy(p + i, &v, 2); }
    for (i = 0; kind == ONES && i + 2 <= bytes; i += 2) { const uint16_t one = 0x3f80; memcpy(p + i, &one, 2); }
    if (kind == GLOBAL) memcpy(p, &global, 4);
}

static FILE *create(const char *dir, const char *file)
{
    char path[1100];
    snprintf(path, sizeof path, "%s/%s", dir, file);
    return fopen(path, "wb");
}

static void write_config(const char *dir, const shape *s)
{
    FILE *f = create(dir, "config.json");
    if (!f) { fprintf(stderr, "%s: cannot write\n", dir); exit(2); }
    fprintf(f, "{\"model_type\": \"%s\", \"hidden_size\": %d, \"intermediate_size\": %d, \"num_hidden_layers\": %d, \"num_attention_heads\": %d,\n", s->model_type, s->hidden,
            s->inter, s->layers, s->heads);
    fprintf(f, " \"num_key_value_heads\": %d, \"head_dim\": %d, \"vocab_size\": %d, \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-5, \"rope_theta\": 500000.0,\n", s->kv_heads,
            s->head_dim, s->vocab);
    if (s->experts) fprintf(f, " \"moe_intermediate_size\": %d, \"num_experts\": %d, \"num_experts_per_tok\": %d, \"norm_topk_prob\": true, \"decoder_sparse_step\": 1, \"mlp_only_layers\": [],\n", s->inter, s->experts, s->top_k);
    fprintf(f, " \"tie_word_embeddings\": false, \"max_position_embeddings\": 40960, \"attention_bias\": false}\n");
    fclose(f);
    f = create(dir, "hf_quant_config.json");
    if (!f) exit(2);
    fprintf(f, "{\"producer\": {\"name\": \"modelopt\", \"version\": \"0.47.0\"}, \"quantization\": {\"quant_algo\": \"W4A16_NVFP4\", \"kv_cache_quant_algo\": null, \"group_size\": 16,\n");
    fprintf(f, " \"exclude_modules\": [\"lm_head\", \"model.embed_tokens\"%s]}}\n", s->experts ? ", \"*mlp.gate\"" : "");
    fclose(f);
}

static void write_tensors(const char *dir, const list *l)
{
    static const char *const types[] = {"U8", "F8_E4M3", "F32", "BF16", "BF16"};
    enum { PIECE = 1 << 20 };
    FILE *f = create(dir, "model.safetensors");
    uint8_t *p = (uint8_t *)malloc(PIECE);
    char *head = (char *)malloc(l->count * 260 + 64);
    size_t n = 0;
    uint64_t size;
    if (!f || !p || !head) exit(2);
    for (size_t i = 0; i < l->count; i++) {
        const tensor *t = &l->t[i];
        char dims[64];
        if (t->kind == GLOBAL) snprintf(dims, sizeof dims, "[]");
        else if (t->kind == ONES) snprintf(dims, sizeof dims, "[%lld]", (long long)t->cols);
        else snprintf(dims, sizeof dims, "[%lld,%lld]", (long long)t->rows, (long long)(t->kind == CODES ? t->cols / 2 : t->kind == SCALES ? t->cols / 16 : t->cols));
        n += (size_t)snprintf(head + n, 260, "%c\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%llu,%llu]}", i ? ',' : '{', t->name, types[t->kind], dims,
                              (unsigned long long)t->at, (unsigned long long)(t->at + t->bytes));
    }
    head[n++] = '}';
    while (n % 8) head[n++] = ' ';
    size = n;
    fwrite(&size, 8, 1, f);
    fwrite(head, 1, n, f);
    for (size_t i = 0; i < l->count; i++)
        for (uint64_t at = 0; at < l->t[i].bytes; at += PIECE) {
            size_t m = l->t[i].bytes - at < PIECE ? (size_t)(l->t[i].bytes - at) : (size_t)PIECE;
            fill(p, m, l->t[i].kind, l->t[i].cols);
            if (fwrite(p, 1, m, f) != m) { fprintf(stderr, "%s: the disk is full\n", dir); exit(2); }
        }
    fclose(f);
    free(p);
    free(head);
}

/* Bytes of weights that one token reads: all but the embedding table, and of the experts only the chosen ones. */
static double token_bytes(const list *l, const shape *s)
{
    double sum = 0;
    for (size_t i = 0; i < l->count; i++)
        if (strcmp(l->t[i].name, "model.embed_tokens.weight") != 0)
            sum += (double)l->t[i].bytes * (strstr(l->t[i].name, ".experts.") ? (double)s->top_k / s->experts : 1);
    return sum;
}

/* ---- timing ---- */

/* Tokens a second of `count` steps of one token from a context of `context` tokens; logits come to the host every time. */
static double run(llm *m, int context, int count, int vocab)
{
    float *logits = (float *)malloc((size_t)vocab * sizeof *logits);
    int32_t *ids = (int32_t *)malloc((size_t)context * sizeof *ids), id = 1;
    moq_error e;
    double start = 0;
    if (!logits || !ids) exit(2);
    for (int i = 0; i < context; i++) ids[i] = (int32_t)(test_random() % (uint32_t)vocab);
    if (llm_forward(m, 0, ids, context, 0, NULL, logits, &e) != MOQ_OK) { fprintf(stderr, "%s\n", e.text); exit(2); }
    for (int i = -3; i < count; i++) {
        if (i == 0) start = moq_seconds();
        if (llm_forward(m, 0, &id, 1, context + 3 + i, NULL, logits, &e) != MOQ_OK) { fprintf(stderr, "%s\n", e.text); exit(2); }
        id = (int32_t)(test_random() % (uint32_t)vocab);
    }
    start = moq_seconds() - start;
    for (int k = 0; k < vocab; k++) if (!(fabs((double)logits[k]) < 1e6)) { fprintf(stderr, "logits are not numbers\n"); exit(2); }
    free(logits);
    free(ids);
    return count / start;
}

/* Numbers of logits that a caller would use. */
static void check_logits(const float *logits, int vocab)
{
    for (int k = 0; k < vocab; k++) if (!(fabs((double)logits[k]) < 1e6)) { fprintf(stderr, "logits are not numbers\n"); exit(2); }
}

/* Seconds of a prompt of `count` tokens: the shortest of some. */
static double run_prompt(llm *m, int count, int vocab)
{
    float *logits = (float *)malloc((size_t)vocab * sizeof *logits);
    int32_t *ids = (int32_t *)malloc((size_t)count * sizeof *ids);
    const int turns = count > 2048 ? 3 : 6;
    double best = 1e30;
    moq_error e;
    if (!logits || !ids) exit(2);
    for (int i = 0; i < count; i++) ids[i] = (int32_t)(test_random() % (uint32_t)vocab);
    for (int i = 0; i < turns; i++) {
        double t = moq_seconds();
        if (llm_forward(m, 0, ids, count, 0, NULL, logits, &e) != MOQ_OK) { fprintf(stderr, "%s\n", e.text); exit(2); }
        t = moq_seconds() - t;
        if (t < best) best = t;
    }
    check_logits(logits, vocab);
    free(logits);
    free(ids);
    return best;
}

/* Seconds of a pass of one token in each of `count` sequences of `context` tokens, as an engine makes them that wants logits, or choices of the device. */
static double run_together(llm *m, int count, int context, int vocab, int picks)
{
    enum { TURNS = 10 };
    llmi_model *own = m->model;
    moq_backend *be = own->be;
    const size_t bytes = (size_t)count * (size_t)vocab * sizeof(float);
    float *logits = (float *)(be->host_alloc ? be->host_alloc(be, bytes, NULL) : malloc(bytes));
    int32_t *ids = (int32_t *)malloc((size_t)context * sizeof *ids);
    double best = 1e30;
    moq_error e;
    if (!logits || !ids) exit(2);
    for (int i = 0; i < context; i++) ids[i] = (int32_t)(test_random() % (uint32_t)vocab);
    for (int s = 0; s < count; s++)
        if (own->length[s] < context && llm_forward(m, s, ids, context, 0, NULL, logits, &e) != MOQ_OK) { fprintf(stderr, "%s\n", e.text); exit(2); }
    for (int i = 0; i < TURNS; i++) {
        double t = moq_seconds();
        llmi_pass_clear(own);
        own->pass.picks = picks;
        own->pass.sends = be->send_act != NULL;
        for (int s = 0; s < count; s++) llmi_pass_add(own, s, ids[(s + i) % context], context + i, logits + (size_t)s * (size_t)vocab);
        while (!llmi_pass_done(own)) llmi_pass_unit(own, vocab);
        if (llmi_pass_end(own, &e) != MOQ_OK) { fprintf(stderr, "%s\n", e.text); exit(2); }
        t = moq_seconds() - t;
        if (t < best) best = t;
    }
    for (int s = 0; s < count; s++) { own->length[s] = context; check_logits(logits + (size_t)s * (size_t)vocab, vocab); }
    if (be->host_alloc) be->host_release(be, logits);
    else free(logits);
    free(ids);
    return best;
}

/* Multiplications of a token in the weights of all layers but the output layer, which only the last token of a prompt passes through. */
static double token_products(const shape *s)
{
    const double attention = (double)s->hidden * s->head_dim * (2.0 * s->heads + 2.0 * s->kv_heads), experts = s->experts ? s->top_k : 1;
    return s->layers * (attention + 3.0 * experts * s->hidden * s->inter + (double)s->experts * s->hidden);
}

/* ---- what is asked for ---- */

typedef struct wish { const char *what, *folder, *kv, *name; moq_dtype act; int chunk; double rate; } wish;

static int wants(const wish *w, int letter) { return !w->what || !strpbrk(w->what, "gps") || strchr(w->what, letter) != NULL; }

static llm *open_model(const wish *w, int context, int slots, llm_desc *d)
{
    moq_cuda_desc cd;
    moq_error e;
    double start = moq_seconds();
    memset(&cd, 0, sizeof cd);
    memset(d, 0, sizeof *d);
    d->path = w->folder;
    d->no_tokenizer = 1;
    d->context = context;
    d->slots = slots;
    d->kv = w->kv;
    d->chunk = w->chunk;
    d->backend = getenv("MOQ_CPU") ? NULL : moq_cuda_backend_full(&cd, w->act, NULL, &e);
    if (!d->backend && !getenv("MOQ_CPU")) { fprintf(stderr, "%s\n", e.text); exit(2); }
    llm *m = llm_open(d, &e);
    if (!m) { fprintf(stderr, "%s\n", e.text); exit(2); }
    printf("%s: opened in %.1f s, rows of a pass: %d\n", w->name, moq_seconds() - start, m->model->chunk);
    return m;
}

static void close_model(llm *m, const llm_desc *d)
{
    llm_close(m);
    if (d->backend) moq_backend_destroy(d->backend);
}

static void measure_generation(llm *m, const wish *w, const shape *s, const list *l)
{
    static const int contexts[] = {64, 1024, 8192};
    const double elem = strcmp(w->kv, "wide") != 0 ? 1 : w->act == MOQ_F32 ? 4 : 2;
    for (size_t k = 0; k < sizeof contexts / sizeof *contexts; k++) {
        if (contexts[k] + 200 > m->model->c.context) continue;
        double t = run(m, contexts[k], s->vocab > 1000 ? 100 : 10, s->vocab);
        double bytes = token_bytes(l, s) + 2.0 * s->layers * s->kv_heads * s->head_dim * elem * (contexts[k] + 50);
        printf("%s, %5d tokens of context: %7.1f tokens/s, %.2f GB a token, %.0f %% of a plain read\n", w->name, contexts[k], t, 1e-9 * bytes,
               100 * t * bytes / w->rate);
        fflush(stdout);
    }
}

static void measure_prompts(llm *m, const wish *w, const shape *s)
{
    static const int counts[] = {64, 128, 512, 2048, 8192};
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
        if (counts[k] > m->model->c.context) continue;
        double t = run_prompt(m, counts[k], s->vocab);
        double tera = 2e-12 * (token_products(s) * counts[k] + (double)s->hidden * s->vocab) / t;
        printf("%s, prompt of %5d tokens: %9.3f ms, %8.0f tokens/s, %5.1f TFLOP/s in weights, %.2f of 700\n", w->name, counts[k], 1e3 * t, counts[k] / t,
               tera, tera / 700);
        fflush(stdout);
    }
}

static void measure_together(llm *m, const wish *w, const shape *s, const list *l)
{
    static const int counts[] = {1, 8, 32, 64};
    const int context = s->vocab > 1000 ? 1024 : 64;
    const double elem = strcmp(w->kv, "wide") != 0 ? 1 : w->act == MOQ_F32 ? 4 : 2;
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
        if (counts[k] > m->model->slots) continue;
        const double chosen = m->model->be->send_act ? run_together(m, counts[k], context, s->vocab, 1) : 0;
        double t = run_together(m, counts[k], context, s->vocab, 0), kv = 2.0 * s->layers * s->kv_heads * s->head_dim * elem * (context + 5) * counts[k];
        printf("%s, %2d sequences of %d tokens: %8.3f ms a pass, %8.0f tokens/s, chosen there %8.3f ms; %.2f GB of weights, %.2f of caches: "
               "%.2f ms of a plain read\n", w->name, counts[k], context, 1e3 * t, counts[k] / t, 1e3 * chosen, 1e-9 * token_bytes(l, s), 1e-9 * kv, 1e3 * (token_bytes(l, s) + kv) / w->rate);
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    static const char *const kvs[] = {"wide", "fp8"};
    char path[1100], name[80];
    shape s;
    list l;
    wish w;
    struct stat st;
    size_t i = 0;
    memset(&l, 0, sizeof l);
    while (i < sizeof shapes / sizeof *shapes && (argc < 3 || strcmp(argv[1], shapes[i].name) != 0)) i++;
    if (i == sizeof shapes / sizeof *shapes) {
        fprintf(stderr, "bench_model SHAPE FOLDER [LAYERS [GB_PER_S [WHAT [CHUNK]]]]; shapes: llama-8b, qwen3-30b-a3b, tiny, tiny-moe\n");
        return 2;
    }
    s = shapes[i];
    memset(&w, 0, sizeof w);
    if (argc > 3 && atoi(argv[3]) > 0) s.layers = atoi(argv[3]);
    w.rate = argc > 4 && atof(argv[4]) > 0 ? atof(argv[4]) * 1e9 : 4.53e12;
    w.what = argc > 5 ? argv[5] : NULL;
    w.folder = argv[2];
    double start = moq_seconds();
    add(&l, TABLE, s.vocab, s.hidden, "model.embed_tokens.weight");
    for (int k = 0; k < s.layers; k++) add_block(&l, &s, k);
    add(&l, ONES, 1, s.hidden, "model.norm.weight");
    add(&l, TABLE, s.vocab, s.hidden, "lm_head.weight");
    mkdir(argv[2], 0777);
    snprintf(path, sizeof path, "%s/model.safetensors", argv[2]);
    if (stat(path, &st) != 0) { write_config(argv[2], &s); write_tensors(argv[2], &l); }
    printf("%s, %d layers: %.2f GB, %.2f GB of weights a token; written in %.1f s\n", s.name, s.layers, 1e-9 * (double)l.bytes, 1e-9 * token_bytes(&l, &s),
           moq_seconds() - start);
    const int large = s.vocab > 1000;
    for (int kv = 0; kv < 4; kv++) {
        llm_desc d;
        llm *m;
        w.act = kv / 2 ? MOQ_BF16 : MOQ_F32;
        w.kv = kvs[kv % 2];
        if (w.what && strpbrk(w.what, "bf") && !strchr(w.what, kv / 2 ? 'b' : 'f')) continue;
        snprintf(name, sizeof name, "%s, %d layers, %s, KV %s", s.name, s.layers, moq_dtype_name(w.act), w.kv);
        w.name = name;
        w.chunk = argc > 6 ? atoi(argv[6]) : 0;
        if (wants(&w, 'g') || wants(&w, 'p')) {
            m = open_model(&w, large ? 8448 : 512, 1, &d);
            if (wants(&w, 'p')) measure_prompts(m, &w, &s);
            if (wants(&w, 'g')) measure_generation(m, &w, &s, &l);
            close_model(m, &d);
        }
        if (wants(&w, 's')) {
            m = open_model(&w, large ? 1280 : 512, 64, &d);
            measure_together(m, &w, &s, &l);
            close_model(m, &d);
        }
    }
    free(l.t);
    return 0;
}
