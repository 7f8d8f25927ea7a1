/* Tokens a second of whole models with random NVFP4 weights: writes a folder of the wanted shape, opens it on the GPU and generates.
       bench_model SHAPE FOLDER [LAYERS [GB_PER_S]]     e.g. bench_model llama-8b /tmp/model 32 4530
   Shapes: llama-8b, qwen3-30b-a3b, tiny. GB_PER_S: what a plain read reaches, for the fraction (of weights and KV bytes of a token over that rate).
   A folder that is there already is used as it is. Prints after 64, 1024 and 8192 tokens of context, one token a call, logits to the host. */
#include "../test.h"

#define LLM_IMPLEMENTATION
#include "../../examples/llm.h"

#include <sys/stat.h>

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

int main(int argc, char **argv)
{
    static const int contexts[] = {64, 1024, 8192};
    static const char *const kvs[] = {"wide", "fp8"};
    char path[1100], name[40];
    shape s;
    list l;
    moq_error e;
    struct stat st;
    size_t i = 0;
    memset(&l, 0, sizeof l);
    while (i < sizeof shapes / sizeof *shapes && (argc < 3 || strcmp(argv[1], shapes[i].name) != 0)) i++;
    if (i == sizeof shapes / sizeof *shapes) { fprintf(stderr, "bench_model SHAPE FOLDER [LAYERS [GB_PER_S]]; shapes: llama-8b, qwen3-30b-a3b, tiny, tiny-moe\n"); return 2; }
    s = shapes[i];
    if (argc > 3 && atoi(argv[3]) > 0) s.layers = atoi(argv[3]);
    double rate = argc > 4 ? atof(argv[4]) * 1e9 : 4.53e12, start = moq_seconds();
    add(&l, TABLE, s.vocab, s.hidden, "model.embed_tokens.weight");
    for (int k = 0; k < s.layers; k++) add_block(&l, &s, k);
    add(&l, ONES, 1, s.hidden, "model.norm.weight");
    add(&l, TABLE, s.vocab, s.hidden, "lm_head.weight");
    mkdir(argv[2], 0777);
    snprintf(path, sizeof path, "%s/model.safetensors", argv[2]);
    if (stat(path, &st) != 0) { write_config(argv[2], &s); write_tensors(argv[2], &l); }
    snprintf(name, sizeof name, "%s, %d layers", s.name, s.layers);
    printf("%s: %.2f GB, %.2f GB of weights a token; written in %.1f s\n", name, 1e-9 * (double)l.bytes, 1e-9 * token_bytes(&l, &s), moq_seconds() - start);
    for (int kv = 0; kv < 2; kv++) {
        moq_cuda_desc cd;
        llm_desc d;
        memset(&cd, 0, sizeof cd);
        memset(&d, 0, sizeof d);
        cd.act = MOQ_ACT_WIDE;
        d.path = argv[2];
        d.no_tokenizer = 1;
        d.act = MOQ_ACT_WIDE;
        d.context = s.vocab > 1000 ? 8448 : 512;
        d.kv = kvs[kv];
        d.backend = getenv("MOQ_CPU") ? NULL : moq_cuda_backend_with(&cd, &e);
        if (!d.backend && !getenv("MOQ_CPU")) { fprintf(stderr, "%s\n", e.text); return 2; }
        start = moq_seconds();
        llm *m = llm_open(&d, &e);
        if (!m) { fprintf(stderr, "%s\n", e.text); return 2; }
        printf("opened in %.1f s, KV %s\n", moq_seconds() - start, kvs[kv]);
        for (size_t k = 0; k < sizeof contexts / sizeof *contexts; k++) {
            if (contexts[k] + 200 > d.context) continue;
            double t = run(m, contexts[k], s.vocab > 1000 ? 100 : 10, s.vocab), elem = kv ? 1 : d.backend && d.backend->act == MOQ_F32 ? 4 : 2;
            double bytes = token_bytes(&l, &s) + 2.0 * s.layers * s.kv_heads * s.head_dim * elem * (contexts[k] + 50);
            printf("%s, KV %s, %5d tokens of context: %7.1f tokens/s, %.2f GB a token, %.0f %% of a plain read\n", name, kvs[kv], contexts[k], t, 1e-9 * bytes, 100 * t * bytes / rate);
            fflush(stdout);
        }
        llm_close(m);
        if (d.backend) moq_backend_destroy(d.backend);
    }
    free(l.t);
    return 0;
}
