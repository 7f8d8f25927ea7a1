/* test_llm.c - the engine of examples/llm.h: config.json, families against golden logits, sampling, conversations. */
#include "test.h"

#include <pthread.h>
#include <sys/stat.h>

#include "golden.h"
#include "reference.h"

static llm_desc plain_desc(void)
{
    llm_desc d;
    memset(&d, 0, sizeof d);
    d.no_tokenizer = 1;
    d.threads = 1;
    return d;
}

static char found_text[2048]; /* every finding of the last open */

static void keep_finding(void *user, moq_log_level level, moq_result code, const char *text)
{
    size_t n = strlen(found_text);
    (void)user;
    (void)level;
    (void)code;
    snprintf(found_text + n, sizeof found_text - n, "%s\n", text);
}

/* ---- golden logits ---- */

/* One key of logits.safetensors: wide is continuous, the stored ones compare by the median over tokens. */
static void check_logits(const char *dir, const moq_tensor *want, moq_act act, const char *kv, int32_t ids[2][TOKENS])
{
    llm_desc d = plain_desc();
    moq_error e;
    double error[2 * TOKENS], total;
    size_t rows = want->rank == 3 ? (size_t)want->shape[0] : 0, row = (size_t)TOKENS * VOCAB;
    float *got = (float *)malloc(2 * row * sizeof *got), *expected = (float *)malloc(2 * row * sizeof *expected);
    d.path = dir;
    d.act = act;
    d.kv = kv;
    d.slots = 2;
    llm *m = llm_open(&d, &e);
    if (!m) fprintf(stderr, "%s: %s\n", dir, e.text);
    CHECK(m && rows >= 1 && rows <= 2 && want->shape[1] == TOKENS && want->shape[2] == VOCAB && got && expected);
    if (m && got && expected && rows >= 1 && rows <= 2) {
        CHECK(moq_to_f32(want->dtype, want->data, rows * row, expected));
        for (size_t r = 0; r < rows; r++) CHECK_INT(llm_forward(m, (int32_t)r, ids[r], TOKENS, 0, got + r * row, NULL, &e), MOQ_OK);
        for (size_t t = 0; t < rows * TOKENS; t++) error[t] = relative_rms(got + t * VOCAB, expected + t * VOCAB, VOCAB);
        qsort(error, rows * TOKENS, sizeof *error, compare_double);
        total = relative_rms(got, expected, rows * row);
        int good = act == MOQ_ACT_WIDE ? total <= 1e-5 : error[rows * TOKENS / 2] <= 1e-4 && total <= 0.05;
        if (!good) fprintf(stderr, "%s %s: total %.3g, median token %.3g\n", dir, want->name, total, error[rows * TOKENS / 2]);
        CHECK(good);
    }
    llm_close(m);
    free(got);
    free(expected);
}

static int golden_cases;

static void check_case(const char *group, const char *name)
{
    char dir[512], file[600], source[64];
    int32_t ids[2][TOKENS];
    moq_error e;
    size_t n = strcspn(name, "-");
    int known = 0;
    snprintf(source, sizeof source, "%.*s", (int)n, name);
    for (size_t i = 0; i < LLMI_COUNT(llmi_families); i++) known |= strncmp(llmi_families[i].model_type, source, n) == 0; /* gemma3 is gemma3_text */
    snprintf(dir, sizeof dir, "%s/%s/%s", GOLDEN_DIR, group, name);
    snprintf(file, sizeof file, "%s/logits.safetensors", dir);
    if (!known || (strcmp(group, "sources") == 0 && !moqi_file_exists(file))) return; /* the subset has only the inputs of some sources */
    moq_st *st = moq_st_open(file, NULL, &e);
    CHECK(st != NULL && read_eval(golden("sources/%s/inputs.json", source), ids));
    if (st) {
        const moq_tensor *wide = moq_st_find(st, "wide"), *stored = moq_st_find(st, "as_stored"), *kv = moq_st_find(st, "as_stored_kv");
        int kv_in_stored = strcmp(name, "llama-fp8-kv") == 0; /* golden README: this case rounds K and V in as_stored */
        CHECK(wide != NULL);
        if (wide) check_logits(dir, wide, MOQ_ACT_WIDE, "wide", ids);
        if (stored) check_logits(dir, stored, MOQ_ACT_STORED, kv_in_stored ? NULL : "wide", ids);
        if (kv) check_logits(dir, kv, MOQ_ACT_STORED, "auto", ids);
        golden_cases++;
    }
    moq_st_close(st);
}

static void check_group(const char *group)
{
    moqi_arena r = moqi_arena_make(NULL);
    const char **names = NULL;
    size_t count = 0;
    moq_error e;
    CHECK_INT(moqi_list_dir(golden(group), &r, &names, &count, &e), MOQ_OK);
    for (size_t i = 0; i < count; i++) check_case(group, names[i]);
    moqi_arena_drop(&r);
}

static void test_llm_golden_sources(void)
{
    golden_cases = 0;
    check_group("sources");
    CHECK(golden_cases >= 2);
}

static void test_llm_golden_modelopt(void)
{
    golden_cases = 0;
    check_group("modelopt");
    CHECK(golden_cases >= 14);
}

static void test_llm_golden_compressed_tensors(void)
{
    golden_cases = 0;
    check_group("compressed-tensors");
    CHECK(golden_cases >= 10);
}

static void test_llm_golden_foreign(void)
{
    golden_cases = 0;
    check_group("foreign");
    CHECK(golden_cases >= 5);
}

/* ---- config.json ---- */

static const char llama_config[] = /* of sources/llama, in the older spelling of rope */
    "{\"model_type\": \"llama\", \"hidden_size\": 128, \"intermediate_size\": 256, \"num_hidden_layers\": 2, \"num_attention_heads\": 4,"
    " \"num_key_value_heads\": 2, \"head_dim\": 32, \"vocab_size\": 256, \"max_position_embeddings\": 256, \"rms_norm_eps\": 1e-05,"
    " \"hidden_act\": \"silu\", \"rope_theta\": 10000.0, \"rope_scaling\": null, \"tie_word_embeddings\": false, \"bos_token_id\": 1, \"eos_token_id\": 2}";

/* A config with the first `from` replaced. */
static void edit(const char *text, const char *from, const char *to, char *out, size_t capacity)
{
    const char *at = strstr(text, from);
    CHECK(at != NULL);
    if (at) snprintf(out, capacity, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
}

static void *limited_alloc(void *user, size_t bytes, size_t align)
{
    return bytes > (size_t)1 << 28 ? NULL : test_alloc(user, bytes, align);
}

/* Opens the weights of a golden folder under another config.json. */
static moq_result open_with(const char *folder, const char *config, int32_t context, llm_info *info, moq_error *e)
{
    char path[256];
    size_t bytes = 0;
    moq_file files[2];
    moq_open_desc open;
    moq_allocator a = test_allocator();
    llm_desc d = plain_desc();
    moq_result code = MOQ_OK;
    a.alloc = limited_alloc;
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    char *weights = moq_read_file(golden(path), 1 << 28, NULL, &bytes, e);
    if (!weights) return e->code;
    files[0].name = "config.json";
    files[0].data = config;
    files[0].bytes = strlen(config);
    files[1].name = "model.safetensors";
    files[1].data = weights;
    files[1].bytes = bytes;
    memset(&open, 0, sizeof open);
    moq_checkpoint *ck = moq_open_memory(files, 2, &open, e);
    found_text[0] = 0;
    if (ck) {
        d.checkpoint = ck;
        d.allocator = a;
        d.context = context;
        d.log = keep_finding;
        llm *m = llm_open(&d, e);
        code = m ? MOQ_OK : e->code;
        CHECK((m == NULL) == (e->code != MOQ_OK));
        if (m && info) *info = *llm_get_info(m);
        llm_close(m);
    } else {
        code = e->code;
    }
    moq_close(ck);
    moq_release(NULL, weights, bytes + 1);
    CHECK_INT(test_state.live_allocs, 0);
    return code;
}

typedef struct config_case {
    const char *id, *folder, *from, *to;
    moq_result code;
    const char *says, *says_too; /* in the error, or in the findings of a success */
} config_case;

#define LLAMA "sources/llama"
#define MIXTRAL "modelopt/mixtral-nvfp4"

static const config_case config_cases[] = {
    {"C4", LLAMA, "\"model_type\": \"llama\",", "", MOQ_E_CONFIG, "model_type", ""},
    {"C4", LLAMA, "\"llama\"", "7", MOQ_E_CONFIG, "model_type", "7"},
    {"C5", LLAMA, "\"llama\"", "\"foo9\"", MOQ_E_UNSUPPORTED, "foo9", "qwen3_moe"},
    {"C6", LLAMA, "\"hidden_size\": 128", "\"hidden_size\": 0", MOQ_E_CONFIG, "hidden_size", "0"},
    {"C6", LLAMA, "\"hidden_size\": 128", "\"hidden_size\": -1", MOQ_E_CONFIG, "hidden_size", "-1"},
    {"C6", LLAMA, "\"hidden_size\": 128", "\"hidden_size\": 4096.5", MOQ_E_CONFIG, "hidden_size", "4096.5"},
    {"C6", LLAMA, "\"hidden_size\": 128", "\"hidden_size\": \"4096\"", MOQ_E_CONFIG, "hidden_size", "string 4096"},
    {"C6", LLAMA, "\"hidden_size\": 128", "\"hidden_size\": 1099511627776", MOQ_E_CONFIG, "hidden_size", "1099511627776"},
    {"C6", LLAMA, "\"hidden_size\": 128,", "", MOQ_E_CONFIG, "hidden_size", "absent"},
    {"C7", LLAMA, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000000", MOQ_E_LIMIT, "num_hidden_layers", "LLM_MAX_LAYERS"},
    {"C8", LLAMA, "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", MOQ_E_CONFIG, "num_attention_heads", "num_key_value_heads"},
    {"C8", LLAMA, "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 0", MOQ_E_CONFIG, "num_key_value_heads", "0"},
    {"C8", LLAMA, "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 8", MOQ_E_CONFIG, "num_attention_heads", "num_key_value_heads"},
    {"C9", LLAMA, "\"head_dim\": 32", "\"head_dim\": 16", MOQ_E_MISMATCH, "model.layers.0.self_attn.q_proj", "head_dim"},
    {"C10", LLAMA, "\"vocab_size\": 256", "\"vocab_size\": 512", MOQ_E_MISMATCH, "embed_tokens", "vocab_size"},
    {"C10", LLAMA, "\"vocab_size\": 256", "\"vocab_size\": 200", MOQ_OK, "embed_tokens", "vocab_size"},
    {"C11", LLAMA, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", MOQ_E_MISSING, "model.layers.2.input_layernorm.weight", ""},
    {"C12", LLAMA, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", MOQ_OK, "model.layers.1.", "not used"},
    {"C13", LLAMA, "\"rope_theta\": 10000.0", "\"rope_theta\": NaN", MOQ_E_CONFIG, "rope_theta", "NaN"},
    {"C13", LLAMA, "\"rope_theta\": 10000.0", "\"rope_theta\": 0", MOQ_E_CONFIG, "rope_theta", ""},
    {"C13", LLAMA, "\"rope_theta\": 10000.0", "\"rope_theta\": -1.5", MOQ_E_CONFIG, "rope_theta", "-1.5"},
    {"C13", LLAMA, "\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 0}", MOQ_E_CONFIG, "factor", "0"},
    {"C13", LLAMA, "\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\"}", MOQ_E_CONFIG, "factor", "absent"},
    {"C13", LLAMA, "\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"longrope\", \"short_factor\": [1]}", MOQ_E_CONFIG, "short_factor", ""},
    {"C14", LLAMA, "\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"spiral\"}", MOQ_E_UNSUPPORTED, "spiral", "yarn"},
    {"C15", LLAMA, "\"rms_norm_eps\": 1e-05,", "", MOQ_OK, "", ""},
    {"C15", LLAMA, "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": -1e-05", MOQ_E_CONFIG, "rms_norm_eps", "-1e-05"},
    {"C16", LLAMA, "\"eos_token_id\": 2", "\"eos_token_id\": [2, 3]", MOQ_OK, "", ""},
    {"C16", LLAMA, "\"eos_token_id\": 2", "\"eos_token_id\": null", MOQ_OK, "", ""},
    {"C16", LLAMA, "\"eos_token_id\": 2", "\"eos_token_id\": 256", MOQ_E_CONFIG, "eos_token_id", "256"},
    {"C16", LLAMA, "\"bos_token_id\": 1", "\"bos_token_id\": -1", MOQ_E_CONFIG, "bos_token_id", "-1"},
    {"C17", LLAMA, "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true", MOQ_OK, "lm_head.weight", "other values"},
    {"C18", MIXTRAL, "\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 5", MOQ_E_CONFIG, "num_experts_per_tok", "num_local_experts"},
    {"C18", MIXTRAL, "\"num_local_experts\": 4", "\"num_local_experts\": 0", MOQ_E_CONFIG, "num_local_experts", "block_sparse_moe.gate"},
    {"C18", MIXTRAL, "\"num_local_experts\": 4,", "", MOQ_E_CONFIG, "num_local_experts", "absent"},
    {"C18", MIXTRAL, "\"num_local_experts\": 4", "\"num_local_experts\": 5", MOQ_E_MISMATCH, "block_sparse_moe.gate", "num_local_experts"},
    {"C19", LLAMA, "\"max_position_embeddings\": 256", "\"max_position_embeddings\": 1099511627776", MOQ_OK, "", ""},
    {"act", LLAMA, "\"silu\"", "\"snake\"", MOQ_E_UNSUPPORTED, "hidden_act", "snake"},
    {"act", LLAMA, "\"silu\"", "\"relu2\"", MOQ_E_UNSUPPORTED, "hidden_act", "'relu2' is not implemented for a 'llama'"}, /* it has a gate */
    {"C5", LLAMA, "\"llama\"", "\"gemma9\"", MOQ_E_UNSUPPORTED, "gemma3_text", "nemotron_h"},
    {"C5", LLAMA, "\"llama\"", "\"olmo2\"", MOQ_E_UNSUPPORTED, "'olmo2' is unknown", "run elsewhere"},
    {"all", LLAMA, "\"silu\"", "\"silu\", \"is_causal\": false", MOQ_E_UNSUPPORTED, "is_causal", "embeddings"},
    {"all", LLAMA, "\"silu\"", "\"silu\", \"is_causal\": true, \"use_bidirectional_attention\": null", MOQ_OK, "", ""},
    {"all", LLAMA, "\"silu\"", "\"silu\", \"use_bidirectional_attention\": true", MOQ_E_UNSUPPORTED, "use_bidirectional_attention", "embeddings"},
    {"all", LLAMA, "\"silu\"", "\"silu\", \"is_causal\": 0", MOQ_E_UNSUPPORTED, "is_causal", "embeddings"},
    {"all", LLAMA, "\"silu\"", "\"silu\", \"use_bidirectional_attention\": 1", MOQ_E_UNSUPPORTED, "use_bidirectional_attention", "embeddings"},
    {"all", LLAMA, "\"silu\"", "\"silu\", \"is_causal\": 1, \"use_bidirectional_attention\": \"vision\"", MOQ_OK, "", ""},
    {"ok", MIXTRAL, "\"sliding_window\": null", "\"sliding_window\": 16", MOQ_OK, "", ""}};

static void test_llm_config_rows(void)
{
    for (size_t i = 0; i < LLMI_COUNT(config_cases); i++) {
        const config_case *c = &config_cases[i];
        char text[4096];
        moq_error e;
        size_t bytes = 0;
        int broken = test_state.broken;
        char *own = moq_read_file(golden(MIXTRAL "/config.json"), 1 << 20, NULL, &bytes, &e);
        CHECK(own != NULL);
        if (!own) return;
        edit(strcmp(c->folder, LLAMA) == 0 ? llama_config : own, c->from, c->to, text, sizeof text);
        moq_release(NULL, own, bytes + 1);
        moq_result code = open_with(c->folder, text, 0, NULL, &e);
        const char *said = code == MOQ_OK ? found_text : e.text;
        CHECK_INT(code, c->code);
        CHECK(strstr(said, c->says) && strstr(said, c->says_too));
        CHECK(code == MOQ_OK || e.text[0] != 0);
        for (const char *p = e.text; *p; p++) CHECK(*p >= 0x20 && *p < 0x7f);
        if (code == MOQ_E_CONFIG) CHECK_STR(e.file, "config.json");
        if (test_state.broken != broken) fprintf(stderr, "row %s (%s): %s\n", c->id, c->to, said);
    }
}

/* Weights of one architecture under the name of another that differs by norms alone: everything that is looked for is there. */
static void test_llm_norms_left_over(void)
{
    static const char folder[] = "modelopt/qwen3_moe-auto_kl_awq_8.0";
    char path[256], text[8192];
    size_t bytes = 0;
    moq_error e;
    snprintf(path, sizeof path, "%s/config.json", folder);
    char *own = moq_read_file(golden(path), 1 << 20, NULL, &bytes, &e);
    CHECK(own != NULL);
    if (!own) return;
    edit(own, "\"model_type\": \"qwen3_moe\"", "\"model_type\": \"mixtral\"", text, sizeof text);
    CHECK_INT(open_with(folder, own, 0, NULL, &e), MOQ_OK);
    CHECK_INT(open_with(folder, text, 0, NULL, &e), MOQ_E_UNSUPPORTED);
    CHECK(strstr(e.text, "self_attn.k_norm.weight") && strstr(e.text, "'mixtral'"));
    moq_release(NULL, own, bytes + 1);
}

static void test_llm_config_absent_and_huge(void)
{
    llm_info info;
    moq_error e;
    char text[2048], nested[2300];
    CHECK_INT(open_with(LLAMA, "{}", 0, NULL, &e), MOQ_E_NOTFOUND);              /* C1 */
    CHECK(strstr(e.text, "config.json: says nothing") != NULL); /* the file is there: moq_open wants it */
    CHECK_INT(open_with(LLAMA, llama_config, 1 << 24, NULL, &e), MOQ_E_NOMEM);  /* C19: a cache that nobody has */
    edit(llama_config, "\"max_position_embeddings\": 256", "\"max_position_embeddings\": 1099511627776", text, sizeof text);
    CHECK_INT(open_with(LLAMA, text, 0, &info, &e), MOQ_OK);
    CHECK_INT(info.context, 4096);
    snprintf(nested, sizeof nested, "{\"model_type\": \"big_picture\", \"text_config\": %s}", llama_config); /* C20 */
    CHECK_INT(open_with(LLAMA, nested, 0, &info, &e), MOQ_OK);
    CHECK_STR(info.model_type, "llama");
    CHECK_INT(info.context, 256);
    CHECK_INT(info.layers, 2);
    CHECK_INT(info.vocab, 256);
    CHECK(info.memory_bytes > 2 * 2 * 64 * 4 * 256); /* more than the KV cache alone */
}

/* A tied model whose file says that it is not: the head is missing, and the key is named beside it. */
static void test_llm_untied_without_head(void)
{
    char text[4096], *config;
    moq_error e;
    size_t bytes = 0;
    if (access(golden("sources/qwen3/config.json"), R_OK) != 0) { printf("skipped: sources/qwen3 is not in this set\n"); test_state.skipped++; return; }
    config = moq_read_file(golden("sources/qwen3/config.json"), 4000, NULL, &bytes, &e);
    CHECK(config != NULL);
    if (!config) return;
    edit(config, "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false", text, sizeof text);
    CHECK_INT(open_with("sources/qwen3", text, 0, NULL, &e), MOQ_E_MISSING);
    CHECK(strstr(e.text, "lm_head.weight") != NULL && strstr(e.text, "says tie_word_embeddings false") != NULL && strstr(e.text, "download it again") != NULL);
    moq_release(NULL, config, bytes + 1);
}

/* Reading without weights: windows and layers of experts by family. */
static moq_result read_config(const char *text, int32_t context, llmi_config *c, moq_checkpoint **ck, moq_error *e)
{
    static const char weights[] = "\x40\0\0\0\0\0\0\0{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}          \0\0\0\0";
    moq_file files[2];
    files[0].name = "config.json";
    files[0].data = text;
    files[0].bytes = strlen(text);
    files[1].name = "model.safetensors";
    files[1].data = weights;
    files[1].bytes = sizeof weights - 1;
    memset(c, 0, sizeof *c);
    *ck = moq_open_memory(files, 2, NULL, e);
    return *ck ? llmi_config_read(*ck, context, c, e) : e->code;
}

#define MIDDLES "\"kv_lora_rank\": 16, \"qk_nope_head_dim\": 16, \"qk_rope_head_dim\": 8, \"v_head_dim\": 16"

static const char sizes[] = "\"hidden_size\": 128, \"intermediate_size\": 256, \"num_hidden_layers\": 4, \"num_attention_heads\": 4, \"vocab_size\": 256";

/* What the reference implementations take where config.json is silent; null is not silence. */
static void test_llm_silent_keys(void)
{
    static const struct { const char *type, *keys; double attn_cap, logit_cap, scale, part_eps; moq_activation kind; int32_t shared, groups, top_groups, dense_first, experts; } cases[] = {
        {"llama", "\"rms_norm_eps\": 0.001", 0, 0, 0, 0.001, MOQ_SILU_MUL, 0, 0, 0, 0, 0},
        {"gemma2", "\"rms_norm_eps\": 0.001", 50, 30, 0, 0.001, MOQ_GELU_TANH_MUL, 0, 0, 0, 0, 0},
        {"gemma2", "\"attn_logit_softcapping\": null, \"final_logit_softcapping\": null, \"hidden_act\": \"silu\", \"hidden_activation\": \"gelu\"", 0, 0, 0, 1e-6, MOQ_GELU_MUL, 0, 0, 0, 0, 0},
        {"gemma3_text", "\"attn_logit_softcapping\": 50.0, \"final_logit_softcapping\": 9", 0, 9, 0, 1e-6, MOQ_GELU_TANH_MUL, 0, 0, 0, 0, 0},
        {"mixtral", "\"num_local_experts\": 8, \"num_experts_per_tok\": 2", 0, 0, 1, 1e-5, MOQ_SILU_MUL, 0, 1, 1, 0, 8},
        {"deepseek_v2", "\"rms_norm_eps\": 0.001, \"n_group\": 4, \"topk_group\": 2, \"moe_intermediate_size\": 32, \"n_routed_experts\": 16, \"num_experts_per_tok\": 2," MIDDLES, 0, 0, 1, 1e-6, MOQ_SILU_MUL, 64, 1, 1, 0, 16},
        {"deepseek_v3", "\"rms_norm_eps\": 0.001, \"moe_intermediate_size\": 32, \"n_routed_experts\": 16, \"num_experts_per_tok\": 2," MIDDLES, 0, 0, 2.5, 1e-6, MOQ_SILU_MUL, 32, 8, 4, 3, 16},
        {"nemotron_h", "\"hybrid_override_pattern\": \"*-*-\"", 0, 0, 0, 1e-5, MOQ_RELU2, 0, 0, 0, 0, 0},
        {"nemotron_h", "\"hybrid_override_pattern\": \"*-*-\", \"hidden_act\": \"silu\", \"mlp_hidden_act\": \"relu2\"",
         0, 0, 0, 1e-5, MOQ_RELU2, 0, 0, 0, 0, 0}};
    for (size_t i = 0; i < LLMI_COUNT(cases); i++) {
        char text[1024];
        llmi_config c;
        moq_checkpoint *ck;
        moq_error e;
        snprintf(text, sizeof text, "{\"model_type\": \"%s\", %s, %s}", cases[i].type, sizes, cases[i].keys);
        CHECK_INT(read_config(text, 0, &c, &ck, &e), MOQ_OK);
        if (e.code < 0) fprintf(stderr, "%s: %s\n", cases[i].type, e.text);
        CHECK(c.attn_cap == cases[i].attn_cap && c.logit_cap == cases[i].logit_cap && c.route_scale == cases[i].scale && c.part_eps == cases[i].part_eps);
        CHECK_INT(c.activation.kind, cases[i].kind);
        CHECK_INT(c.shared_inter, cases[i].shared);
        CHECK_INT(c.groups, cases[i].groups);
        CHECK_INT(c.top_groups, cases[i].top_groups);
        CHECK_INT(c.dense_first, cases[i].dense_first);
        CHECK_INT(c.experts, cases[i].experts);
        moq_close(ck);
    }
}

/* An error names the key that was found; what the whole of a model with a text_config says of attention is not about text. */
static void test_llm_keys_found(void)
{
    static const struct { const char *start, *more, *end, *key; } cases[] = {
        {"{\"model_type\": \"nemotron_h\"", "\"hybrid_override_pattern\": \"*-*-\", \"hidden_act\": \"relu2\", \"mlp_hidden_act\": \"silu\"", "}",
         "mlp_hidden_act"},
        {"{\"model_type\": \"gemma3_text\"", "\"hidden_activation\": \"snake\"", "}", "hidden_activation"},
        {"{\"model_type\": \"gemma3\", \"text_config\": {\"model_type\": \"gemma3_text\"", "\"is_causal\": 0", "}}", "is_causal"},
        {"{\"model_type\": \"gemma3\", \"is_causal\": 0, \"text_config\": {\"model_type\": \"gemma3_text\"", "\"is_causal\": true", "}}", NULL}};
    for (size_t i = 0; i < LLMI_COUNT(cases); i++) {
        char text[1024];
        llmi_config c;
        moq_checkpoint *ck;
        moq_error e;
        snprintf(text, sizeof text, "%s, %s, %s%s", cases[i].start, sizes, cases[i].more, cases[i].end);
        CHECK_INT(read_config(text, 0, &c, &ck, &e), cases[i].key ? MOQ_E_UNSUPPORTED : MOQ_OK);
        if (cases[i].key) CHECK(strncmp(e.text, "config.json: ", 13) == 0 && strncmp(e.text + 13, cases[i].key, strlen(cases[i].key)) == 0);
        moq_close(ck);
    }
}

static char slips[512];

static void take_slip(void *user, moq_log_level level, moq_result code, const char *text)
{
    size_t n = strlen(slips);
    (void)user; (void)level; (void)code;
    snprintf(slips + n, sizeof slips - n, "%s\n", text);
}

/* What is said of the keys of a file, in slips. */
static void find_slips(const char *text)
{
    llmi_model m;
    llm_desc d;
    moq_checkpoint *ck;
    moq_error e;
    memset(&m, 0, sizeof m);
    memset(&d, 0, sizeof d);
    d.log = take_slip;
    m.desc = &d;
    slips[0] = 0;
    read_config(text, 0, &m.c, &ck, &e);
    llmi_tell_slips(&m);
    moq_close(ck);
}

/* A key that nothing reads and that is one letter off one that is looked for and is not there: told. Keys of other families and programs, and
   those beside the right one: not. */
static void test_llm_misspelled_keys(void)
{
    static const struct { const char *more, *found; } cases[] = {
        {"\"rope_teta\": 10000", "config.json: rope_teta: nothing reads this key; is rope_theta meant?"},
        {"\"rope_tetha\": 10000", "config.json: rope_tetha: nothing reads this key; is rope_theta meant?"},
        {"\"rope_htteta\": 10000", NULL},
        {"\"num_key_value_head\": 2", "num_key_value_head: nothing reads this key; is num_key_value_heads meant?"},
        {"\"rms_norm_epss\": 1e-5", "rms_norm_epss: nothing reads this key; is rms_norm_eps meant?"},
        {"\"haed_dim\": 32", "haed_dim: nothing reads this key; is head_dim meant?"},
        {"\"rope_parameters\": {\"rope_thetta\": 500000.0}", "rope_thetta: nothing reads this key; is rope_theta meant?"},
        {"\"rms_norm_eps\": 1e-5, \"rms_norm_epss\": 1e-6", NULL}, {"\"rope_theta\": null, \"rope_thetas\": 1", NULL},
        {"\"boi_token_id\": 1, \"eod_token_id\": 2, \"hidden_sizes\": [1], \"mrope_interleaved\": true, \"v_groups\": 1, \"rope\": 1", NULL},
        {"\"torch_dtype\": \"bfloat16\", \"use_cache\": true, \"pretraining_tp\": 1, \"head\": 4, \"layer_type\": 1", NULL}};
    char text[1024];
    for (size_t i = 0; i < LLMI_COUNT(cases); i++) {
        for (int nested = 0; nested < 2; nested++) {
            snprintf(text, sizeof text, "{\"model_type\": \"%s\", %s%s, %s}%s", nested ? "picture\", \"text_config\": {\"model_type\": \"llama" : "llama", sizes, "",
                     cases[i].more, nested ? "}" : "");
            find_slips(text);
            if (cases[i].found ? !strstr(slips, cases[i].found) : slips[0] != 0) fprintf(stderr, "%s: %s\n", cases[i].more, slips);
            CHECK(cases[i].found ? strstr(slips, cases[i].found) != NULL : slips[0] == 0);
            CHECK(!strchr(slips, '\n') || strchr(slips, '\n')[1] == 0); /* once */
        }
    }
    find_slips("{\"model_typ\": \"llama\"}"); /* also where reading fails */
    CHECK(strstr(slips, "is model_type meant") != NULL);
    /* DeepSeek looks for n_group and has no n_groups; Nemotron-H has both */
    snprintf(text, sizeof text, "{\"model_type\": \"nemotron_h\", %s, \"hybrid_override_pattern\": \"*-*E\", \"n_groups\": 8, \"n_routed_experts\": 8, \"time_step_max\": 1}", sizes);
    find_slips(text);
    CHECK_STR(slips, "");
}

/* Nobody has the memory of 64 conversations of 16 M tokens. Refused before anything is allocated, whether by path or from an open folder; a limit
   of the caller's and an allocator of the caller's overrule it. */
static void test_llm_machine_memory(void)
{
    static const char dir[] = TEST_DIR "/../examples/demo-model";
    moq_error e;
    llm_memory p;
    llm_desc d = plain_desc();
    char told[64];
    moq_checkpoint *ck = moq_open(dir, NULL, &e);
    CHECK(moq_machine_memory() >= (uint64_t)64 << 20);
    CHECK(ck != NULL);
    d.path = dir;
    d.context = 1 << 24;
    d.slots = 64;
    d.no_tokenizer = 0;
    memset(&d.allocator, 0, sizeof d.allocator);
    CHECK_INT(llm_plan(&d, &p, &e), MOQ_OK);
    CHECK(p.total_bytes > moq_machine_memory());
    snprintf(told, sizeof told, ", %.1f run state", (double)p.run_bytes / 1e9); /* with the texts, as the plan has them */
    for (int open = 0; open < 2; open++) {
        if (open) d.checkpoint = ck;
        CHECK(llm_open(&d, &e) == NULL);
        CHECK_INT(e.code, MOQ_E_LIMIT);
        CHECK(strstr(e.text, "this machine has") != NULL && strstr(e.text, "lower context, slots or chunk") != NULL && strstr(e.text, told) != NULL);
    }
    d.max_memory = 1 << 20;
    CHECK(llm_open(&d, &e) == NULL && strstr(e.text, "llm_desc.max_memory") != NULL);
    d.max_memory = 0;
    d.allocator = test_allocator();
    d.allocator.alloc = limited_alloc;
    CHECK(llm_open(&d, &e) == NULL);
    CHECK_INT(e.code, MOQ_E_NOMEM);
    CHECK(strstr(e.text, "lower context, slots or chunk") != NULL); /* refused memory has a remedy too */
    CHECK_INT(test_state.live_allocs, 0);
    moq_close(ck);
}

/* Dynamic scaling: plain up to the original context, theta that grows with what was asked for beyond. */
static void test_llm_dynamic_rope(void)
{
    llmi_config c;
    moq_checkpoint *ck;
    moq_error e;
    char text[1024];
    for (int32_t context = 64; context <= 256; context *= 2) {
        double inv[16], grown = context > 128 ? 3.0 * context / 128 - 2 : 1;
        snprintf(text, sizeof text, "{\"model_type\": \"llama\", %s, \"max_position_embeddings\": 128, \"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 3}}", sizes);
        CHECK_INT(read_config(text, context, &c, &ck, &e), MOQ_OK);
        CHECK_INT(c.rope.dims, 32);
        CHECK(llmi_rope_table(&c.rope, inv) == 1.0f);
        for (int i = 0; i < 16; i++) CHECK(fabs(inv[i] * pow(10000.0 * pow(grown, 32.0 / 30), 2.0 * i / 32) - 1) < 1e-12);
        moq_close(ck);
    }
}

typedef struct window_case { const char *type, *keys; int32_t windows[4]; } window_case;

static void test_llm_windows(void)
{
    static const window_case cases[] = {
        {"llama", "\"sliding_window\": 8", {0, 0, 0, 0}},
        {"mistral", "\"sliding_window\": 8", {8, 8, 8, 8}},
        {"mistral", "\"sliding_window\": null", {0, 0, 0, 0}},
        {"phi3", "\"sliding_window\": 8", {8, 8, 8, 8}},
        {"qwen2", "\"sliding_window\": 8, \"use_sliding_window\": false, \"max_window_layers\": 0", {0, 0, 0, 0}},
        {"qwen2", "\"sliding_window\": 8, \"use_sliding_window\": true, \"max_window_layers\": 3", {0, 0, 0, 8}},
        {"qwen3", "\"sliding_window\": 8, \"use_sliding_window\": true, \"layer_types\": [\"full_attention\", \"sliding_attention\", \"full_attention\","
                  " \"sliding_attention\"]", {0, 8, 0, 8}},
        {"qwen3_moe", "\"sliding_window\": 8, \"use_sliding_window\": true, \"num_experts\": 0", {8, 8, 8, 8}},
        {"gemma2", "\"sliding_window\": 8", {8, 0, 8, 0}},
        {"gemma3_text", "\"sliding_window\": 8", {8, 8, 8, 8}},
        {"gemma3_text", "\"sliding_window\": 8, \"sliding_window_pattern\": 3", {8, 8, 0, 8}},
        {"gemma3_text", "\"sliding_window\": 8, \"_sliding_window_pattern\": 4, \"layer_types\": [\"full_attention\", \"sliding_attention\","
                        " \"full_attention\", \"sliding_attention\"]", {0, 8, 0, 8}},
        {"gpt_oss", "\"sliding_window\": 8, \"num_local_experts\": 0, \"rope_scaling\": null", {8, 0, 8, 0}}};
    for (size_t i = 0; i < LLMI_COUNT(cases); i++) {
        char text[1024];
        llmi_config c;
        moq_checkpoint *ck;
        moq_error e;
        snprintf(text, sizeof text, "{\"model_type\": \"%s\", %s, %s}", cases[i].type, sizes, cases[i].keys);
        CHECK_INT(read_config(text, 0, &c, &ck, &e), MOQ_OK);
        for (int32_t l = 0; l < 4 && c.family; l++) CHECK_INT(llmi_layer_window(&c, l), cases[i].windows[l]);
        moq_close(ck);
    }
}

static void test_llm_moe_layers(void)
{
    char text[1024];
    llmi_config c;
    moq_checkpoint *ck;
    moq_error e;
    static const int moe[] = {0, 1, 0, 0};
    snprintf(text, sizeof text, "{\"model_type\": \"qwen3_moe\", %s, \"num_experts\": 8, \"num_experts_per_tok\": 2, \"decoder_sparse_step\": 2,"
                                " \"mlp_only_layers\": [3], \"moe_intermediate_size\": 64, \"norm_topk_prob\": true}", sizes);
    CHECK_INT(read_config(text, 0, &c, &ck, &e), MOQ_OK);
    for (int32_t l = 0; l < 4; l++) CHECK_INT(llmi_layer_is_moe(&c, l), moe[l]);
    CHECK_INT(c.moe_inter, 64);
    CHECK_INT(c.renormalize, 1);
    moq_close(ck);
}

/* Published folders in their own spelling: what they leave out, and what is folded into other numbers. */
static void test_llm_published_configs(void)
{
    static const char gemma3[] = /* of a model that also sees: the decoder's description is nested and mostly left out */
        "{\"model_type\": \"gemma3\", \"eos_token_id\": [1, 106], \"text_config\": {\"hidden_size\": 2560, \"intermediate_size\": 10240,"
        " \"model_type\": \"gemma3_text\", \"num_hidden_layers\": 34, \"rope_scaling\": {\"factor\": 8.0, \"rope_type\": \"linear\"},"
        " \"sliding_window\": 1024}}";
    static const char deepseek[] =
        "{\"model_type\": \"deepseek_v3\", \"hidden_size\": 7168, \"intermediate_size\": 18432, \"num_hidden_layers\": 61, \"vocab_size\": 129280,"
        " \"num_attention_heads\": 128, \"num_key_value_heads\": 128, \"q_lora_rank\": 1536, \"kv_lora_rank\": 512, \"qk_nope_head_dim\": 128,"
        " \"qk_rope_head_dim\": 64, \"v_head_dim\": 128, \"first_k_dense_replace\": 3, \"moe_layer_freq\": 1, \"n_routed_experts\": 256,"
        " \"n_shared_experts\": 1, \"num_experts_per_tok\": 8, \"moe_intermediate_size\": 2048, \"n_group\": 8, \"topk_group\": 4,"
        " \"topk_method\": \"noaux_tc\", \"scoring_func\": \"sigmoid\", \"norm_topk_prob\": true, \"routed_scaling_factor\": 2.5,"
        " \"max_position_embeddings\": 163840, \"rope_theta\": 10000, \"rope_scaling\": {\"beta_fast\": 32, \"beta_slow\": 1, \"factor\": 40,"
        " \"mscale\": 1.0, \"mscale_all_dim\": 1.0, \"original_max_position_embeddings\": 4096, \"type\": \"yarn\"}}";
    static const char deepseek2[] =
        "{\"model_type\": \"deepseek_v2\", \"hidden_size\": 2048, \"intermediate_size\": 10944, \"num_hidden_layers\": 27, \"vocab_size\": 102400,"
        " \"num_attention_heads\": 16, \"q_lora_rank\": null, \"kv_lora_rank\": 512, \"qk_nope_head_dim\": 128, \"qk_rope_head_dim\": 64,"
        " \"v_head_dim\": 128, \"first_k_dense_replace\": 1, \"n_routed_experts\": 64, \"n_shared_experts\": 2, \"num_experts_per_tok\": 6,"
        " \"moe_intermediate_size\": 1408, \"n_group\": 1, \"topk_group\": 1, \"topk_method\": \"greedy\", \"scoring_func\": \"softmax\","
        " \"norm_topk_prob\": false, \"routed_scaling_factor\": 1.0, \"rope_scaling\": {\"factor\": 40, \"mscale\": 0.707, \"mscale_all_dim\": 0.707,"
        " \"original_max_position_embeddings\": 4096, \"type\": \"yarn\"}, \"max_position_embeddings\": 163840}";
    static const char nemotron[] =
        "{\"model_type\": \"nemotron_h\", \"hidden_size\": 4096, \"intermediate_size\": 21504, \"num_hidden_layers\": 8, \"vocab_size\": 131072,"
        " \"num_attention_heads\": 32, \"num_key_value_heads\": 8, \"attention_head_dim\": 128, \"hybrid_override_pattern\": \"M-M-M*-E\","
        " \"mamba_num_heads\": 128, \"mamba_head_dim\": 64, \"ssm_state_size\": 128, \"n_groups\": 8, \"conv_kernel\": 4, \"mlp_hidden_act\": \"relu2\","
        " \"layer_norm_epsilon\": 1e-06, \"time_step_limit\": [0.0, Infinity], \"n_routed_experts\": 8, \"num_experts_per_tok\": 2}";
    static const char llama4[] = /* Scout, one of whose older spellings says 4 for true; its first layers */
        "{\"model_type\": \"llama4\", \"text_config\": {\"model_type\": \"llama4_text\", \"attention_chunk_size\": 8192, \"attn_scale\": 0.1,"
        " \"attn_temperature_tuning\": 4, \"floor_scale\": 8192, \"hidden_size\": 5120, \"intermediate_size\": 8192, \"intermediate_size_mlp\": 16384,"
        " \"interleave_moe_layer_step\": 1, \"no_rope_layers\": [], \"num_attention_heads\": 40, \"num_experts_per_tok\": 1, \"num_hidden_layers\": 8,"
        " \"num_key_value_heads\": 8, \"head_dim\": 128, \"num_local_experts\": 16, \"rms_norm_eps\": 1e-05, \"rope_theta\": 500000.0, \"vocab_size\": 202048,"
        " \"rope_scaling\": {\"factor\": 16.0, \"high_freq_factor\": 1.0, \"low_freq_factor\": 1.0, \"original_max_position_embeddings\": 8192, \"rope_type\": \"llama3\"},"
        " \"use_qk_norm\": true, \"max_position_embeddings\": 10485760}}";
    static const char smollm3[] = /* without layer_types: layers without positions have the window */
        "{\"model_type\": \"smollm3\", \"hidden_size\": 2048, \"intermediate_size\": 11008, \"num_hidden_layers\": 8, \"vocab_size\": 128256,"
        " \"num_attention_heads\": 16, \"num_key_value_heads\": 4, \"use_sliding_window\": true, \"sliding_window\": 512}";
    static const char *const texts[] = {gemma3, deepseek, deepseek2, nemotron, llama4, smollm3};
    for (size_t i = 0; i < LLMI_COUNT(texts); i++) {
        llmi_config c;
        moq_checkpoint *ck;
        moq_error e;
        double inv[64];
        moq_result code = read_config(texts[i], 0, &c, &ck, &e);
        if (code != MOQ_OK) fprintf(stderr, "%s\n", e.text);
        CHECK_INT(code, MOQ_OK);
        if (i == 0) {
            CHECK(c.heads == 8 && c.kv_heads == 4 && c.head_dim == 256 && c.vocab == 262208 && c.tied && c.end_count == 2);
            CHECK(c.rope.theta == 1e6 && c.rope.factor == 8 && c.local.theta == 1e4 && c.local.adjust == NULL && c.attn_scale == 1.0 / 16);
            CHECK(llmi_layer_window(&c, 4) == 1024 && llmi_layer_window(&c, 5) == 0);
        } else if (i == 1) { /* (0.1 ln 40 + 1)^2 / sqrt(192) */
            CHECK(fabs(c.attn_scale - 0.13523377890) < 1e-9 && fabs((double)llmi_rope_table(&c.rope, inv) - 1) < 1e-7);
            CHECK(c.head_dim == 192 && c.value_dim == 128 && c.kv_heads == 128 && c.groups == 8 && c.top_groups == 4 && c.shared_inter == 2048);
            CHECK(c.score == MOQ_SCORE_SIGMOID && c.renormalize && c.route_scale == 2.5 && !llmi_layer_is_moe(&c, 2) && llmi_layer_is_moe(&c, 3));
        } else if (i == 2) {
            CHECK(c.q_rank == 0 && c.groups == 1 && c.score == MOQ_SCORE_SOFTMAX && !c.renormalize && c.shared_inter == 2816);
        } else if (i == 4) {
            CHECK(c.inter == 16384 && c.moe_inter == 8192 && c.shared_inter == 8192 && c.top_k == 1 && c.score == MOQ_SCORE_SIGMOID && !c.renormalize);
            CHECK(c.temper == 0.1 && c.temper_floor == 8192 && c.unit_heads && c.interleaved && c.context == 4096 && c.chunk == 0);
            CHECK(llmi_layer_turns(&c, 2) && !llmi_layer_turns(&c, 3) && llmi_layer_turns(&c, 4) && llmi_layer_is_moe(&c, 0));
        } else if (i == 5) {
            CHECK(llmi_layer_window(&c, 2) == 0 && llmi_layer_window(&c, 3) == 512 && !llmi_layer_turns(&c, 3) && llmi_layer_window(&c, 4) == 0);
        } else {
            static const int32_t mix[] = {3, 0, 3, 0, 3, 1, 0, 0}, feed[] = {0, 1, 0, 1, 0, 0, 1, 2};
            CHECK(c.head_dim == 128 && c.rope.dims == 0 && c.eps == 1e-6 && c.dt_max == 0 && c.activation.kind == MOQ_RELU2);
            for (int32_t l = 0; l < 8; l++) {
                int32_t a, b;
                llmi_layer_blocks(&c, l, &a, &b);
                CHECK(a == mix[l] && b == feed[l]);
            }
        }
        moq_close(ck);
    }
    char text[2048];
    llmi_config c;
    moq_checkpoint *ck;
    moq_error e;
    edit(nemotron, "\"conv_kernel\": 4", "\"conv_kernel\": 4, \"mamba_hidden_act\": \"gelu\"", text, sizeof text);
    CHECK_INT(read_config(text, 0, &c, &ck, &e), MOQ_E_UNSUPPORTED);
    CHECK(strstr(e.text, "mamba_hidden_act") != NULL);
    moq_close(ck);
    edit(nemotron, "\"relu2\"", "\"silu\"", text, sizeof text);
    CHECK_INT(read_config(text, 0, &c, &ck, &e), MOQ_E_UNSUPPORTED);
    CHECK(strstr(e.text, "'silu' is not implemented for a 'nemotron_h'") != NULL);
    moq_close(ck);
}

/* ---- families without a golden folder, against the references of reference.h ---- */

static const int32_t ref_ids[REF_TOKENS] = {3, 60, 0, 17, 17, 41, 8, 25, 59, 2, 33, 3, 12, 60, 44, 7, 1, 0, 58, 29, 13, 50, 36, 5};
static double ref_worst;
static uint64_t ref_print; /* what a saved state of the last model would be known by */

/* A folder of what reference.h made, opened; its logits in one pass, in pieces of 5, and token by token against `want`. Returns the bytes
   of its cache, `wide`: on a backend that cannot take latent attention apart. */
static uint64_t check_reference(const char *what, const char *config, const double *want, int tokens, int wide)
{
    static const char dir[] = TEST_DIR "/build/tmp/reference";
    static const int steps[] = {REF_TOKENS, 5, 1};
    llm_memory plan;
    moq_cpu_desc cd;
    moq_backend *be;
    static float got[REF_TOKENS * REF_VOCAB], expected[REF_TOKENS * REF_VOCAB];
    moq_error e;
    mkdir(TEST_DIR "/build", 0777);
    mkdir(TEST_DIR "/build/tmp", 0777);
    mkdir(dir, 0777);
    CHECK(ref_write(dir, config));
    for (int i = 0; i < tokens * REF_VOCAB; i++) expected[i] = (float)want[i];
    memset(&cd, 0, sizeof cd);
    cd.threads = 3;
    cd.act = MOQ_ACT_WIDE;
    be = moq_cpu_backend(&cd, &e);
    if (!be) return 0;
    if (wide) be->latent_create = NULL;
    for (size_t s = 0; s < 3; s++) {
        llm_desc d = plain_desc();
        d.path = dir;
        d.backend = be;
        d.context = 32;
        d.chunk = s == 0 ? 7 : 0;
        llm *m = llm_open(&d, &e);
        if (!m) fprintf(stderr, "%s: %s\n", what, e.text);
        CHECK(m != NULL);
        for (int at = 0; m && at < tokens; at += steps[s]) {
            int n = tokens - at < steps[s] ? tokens - at : steps[s];
            CHECK_INT(llm_forward(m, 0, ref_ids + at, n, at, got + at * REF_VOCAB, NULL, &e), MOQ_OK);
        }
        double off = m ? relative_rms(got, expected, (size_t)(tokens * REF_VOCAB)) : 1;
        if (off > 2e-5) fprintf(stderr, "%s, steps of %d: relative rms %g\n", what, steps[s], off);
        CHECK(off <= 2e-5);
        if (off > ref_worst) ref_worst = off;
        CHECK_INT(llm_plan(&d, &plan, &e), MOQ_OK);
        if (m) CHECK_INT(plan.cache_bytes, m->model->cache_memory);
        if (m) ref_print = llmi_fingerprint(m);
        llm_close(m);
    }
    moq_backend_destroy(be);
    return plan.cache_bytes;
}

/* Stacked experts, chunks, every second layer mixed; then experts one by one, lists instead of steps, two experts a token, no tuning. */
static void test_llm_reference_llama4(void)
{
    static double want[REF_TOKENS * REF_VOCAB];
    static const char common[] = "\"hidden_size\": 48, \"intermediate_size\": 20, \"intermediate_size_mlp\": 36, \"num_hidden_layers\": 5, \"vocab_size\": 61,"
        " \"num_attention_heads\": 6, \"num_key_value_heads\": 2, \"head_dim\": 8, \"num_local_experts\": 4, \"rms_norm_eps\": 1e-05, \"rope_theta\": 500000.0,"
        " \"tie_word_embeddings\": false, \"max_position_embeddings\": 64";
    for (int other = 0; other < 2; other++) {
        char config[2000];
        ref_config c;
        memset(&c, 0, sizeof c);
        c.layers = 5;
        c.hidden = 48;
        c.inter = 36;
        c.moe_inter = 20;
        c.heads = 6;
        c.kv_heads = 2;
        c.head_dim = 8;
        c.experts = 4;
        c.eps = 1e-5;
        c.theta = 500000;
        c.tokens = REF_TOKENS;
        c.top_k = other ? 2 : 1;
        c.stacked = !other;
        c.unit_heads = !other;
        c.chunk = other ? 0 : 6;
        c.temper = other ? 0 : 0.1;
        c.temper_floor = 4;
        c.no_rope[other ? 1 : 3] = c.no_rope[other ? 4 : 3] = 1;
        for (int l = 0; l < 5; l++) c.moe[l] = other ? l == 0 || l == 3 : l % 2;
        ref_make_llama4(&c, 0);
        ref_run_llama4(&c, 0, ref_ids, want);
        snprintf(config, sizeof config, "{\"model_type\": \"llama4\", \"text_config\": {\"model_type\": \"llama4_text\", %s, %s}}", common,
                 other ? "\"num_experts_per_tok\": 2, \"moe_layers\": [0, 3], \"no_rope_layers\": [1, 0, 1, 1, 0], \"use_qk_norm\": false, \"attn_temperature_tuning\": 0"
                       : "\"num_experts_per_tok\": 1, \"interleave_moe_layer_step\": 2, \"attention_chunk_size\": 6, \"floor_scale\": 4, \"attn_scale\": 0.1,"
                         " \"no_rope_layers\": [], \"use_qk_norm\": true, \"attn_temperature_tuning\": true");
        check_reference(other ? "llama4, experts one by one" : "llama4", config, want, REF_TOKENS, 0);
        ref_clear();
    }
}

static void test_llm_reference_smollm3(void)
{
    static double want[REF_TOKENS * REF_VOCAB];
    ref_config c;
    memset(&c, 0, sizeof c);
    c.layers = 5;
    c.hidden = 48;
    c.inter = 36;
    c.heads = 6;
    c.kv_heads = 3;
    c.head_dim = 8;
    c.eps = 1e-6;
    c.theta = 2000000;
    c.tokens = REF_TOKENS;
    c.temper_floor = 1;
    c.no_rope[3] = 1;
    ref_make_llama4(&c, 1);
    ref_run_llama4(&c, 1, ref_ids, want);
    check_reference("smollm3", "{\"model_type\": \"smollm3\", \"hidden_size\": 48, \"intermediate_size\": 36, \"num_hidden_layers\": 5, \"vocab_size\": 61,"
        " \"num_attention_heads\": 6, \"num_key_value_heads\": 3, \"no_rope_layer_interval\": 4, \"no_rope_layers\": [1, 1, 1, 0, 1], \"use_sliding_window\": false,"
        " \"max_position_embeddings\": 64}", want, REF_TOKENS, 0);
    ref_clear();
}

static void test_llm_reference_gemma2(void)
{
    static double want[REF_TOKENS * REF_VOCAB];
    ref_config c;
    memset(&c, 0, sizeof c);
    c.layers = 4;
    c.hidden = 40;
    c.inter = 56;
    c.heads = 4;
    c.kv_heads = 2;
    c.head_dim = 12;
    c.eps = 1e-6;
    c.theta = 10000;
    c.tokens = REF_TOKENS;
    c.window = 5;
    c.pre_scalar = 20;
    c.attn_cap = 3;
    c.logit_cap = 4;
    ref_make_gemma2(&c);
    ref_run_gemma2(&c, ref_ids, want);
    check_reference("gemma2", "{\"model_type\": \"gemma2\", \"hidden_size\": 40, \"intermediate_size\": 56, \"num_hidden_layers\": 4, \"vocab_size\": 61,"
        " \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 12, \"query_pre_attn_scalar\": 20, \"sliding_window\": 5,"
        " \"attn_logit_softcapping\": 3.0, \"final_logit_softcapping\": 4.0, \"hidden_activation\": \"gelu_pytorch_tanh\", \"max_position_embeddings\": 64}", want, REF_TOKENS, 0);
    ref_clear();
}

/* With a middle of q and YaRN; then V2-Lite's plain q, one group and plain rope. */
static void test_llm_reference_deepseek2(void)
{
    static double want[REF_TOKENS * REF_VOCAB];
    static const char common[] = "\"model_type\": \"deepseek_v2\", \"hidden_size\": 40, \"intermediate_size\": 44, \"num_hidden_layers\": 3, \"vocab_size\": 61,"
        " \"num_attention_heads\": 3, \"num_key_value_heads\": 3, \"kv_lora_rank\": 16, \"qk_nope_head_dim\": 10, \"qk_rope_head_dim\": 12, \"v_head_dim\": 6,"
        " \"n_routed_experts\": 8, \"n_shared_experts\": 2, \"num_experts_per_tok\": 3, \"moe_intermediate_size\": 12, \"first_k_dense_replace\": 1, \"moe_layer_freq\": 1,"
        " \"scoring_func\": \"softmax\", \"norm_topk_prob\": false, \"rms_norm_eps\": 1e-06, \"rope_theta\": 10000, \"tie_word_embeddings\": false";
    for (int lite = 0; lite < 2; lite++) {
        char config[2000];
        ref_config c;
        memset(&c, 0, sizeof c);
        c.layers = 3;
        c.hidden = 40;
        c.inter = 44;
        c.heads = 3;
        c.eps = 1e-6;
        c.theta = 10000;
        c.tokens = REF_TOKENS;
        c.q_rank = lite ? 0 : 20;
        c.kv_rank = 16;
        c.nope = 10;
        c.rope = 12;
        c.value = 6;
        c.experts = 8;
        c.top_k = 3;
        c.moe_inter = 12;
        c.shared = 2;
        c.dense_first = 1;
        c.groups = lite ? 1 : 4;
        c.top_groups = lite ? 1 : 2;
        c.route_scale = lite ? 1 : 2.5;
        c.yarn = lite ? 1 : 4;
        c.original = 16;
        c.mscale = 0.707;
        ref_make_deepseek2(&c);
        ref_run_deepseek2(&c, ref_ids, want);
        snprintf(config, sizeof config, "{%s, %s}", common,
                 lite ? "\"q_lora_rank\": null, \"n_group\": 1, \"topk_group\": 1, \"topk_method\": \"greedy\", \"routed_scaling_factor\": 1.0, \"max_position_embeddings\": 64"
                      : "\"q_lora_rank\": 20, \"n_group\": 4, \"topk_group\": 2, \"topk_method\": \"group_limited_greedy\", \"routed_scaling_factor\": 2.5,"
                        " \"max_position_embeddings\": 64, \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4, \"beta_fast\": 32, \"beta_slow\": 1, \"mscale\": 0.707,"
                        " \"mscale_all_dim\": 0.707, \"original_max_position_embeddings\": 16}");
        uint64_t narrow = check_reference(lite ? "deepseek_v2 lite" : "deepseek_v2", config, want, REF_TOKENS, 0);
        uint64_t print = ref_print;
        uint64_t whole = check_reference(lite ? "deepseek_v2 lite, wide" : "deepseek_v2, wide", config, want, REF_TOKENS, 1);
        CHECK(print != ref_print);
        /* a token keeps rank + rope numbers instead of heads * (nope + rope + value) */
        CHECK(narrow > 3 * 32 * (16 + 12) * 4 && narrow < 3 * (32 * (16 + 12) * 4 + 1024) && whole > 3 * 32 * 3 * (10 + 12 + 6) * 4);
        ref_clear();
    }
    printf("families against the references: worst relative rms %.2g\n", ref_worst);
}

/* Keys of the families that have more than plain attention: a wrong one is named. */
typedef struct family_case { const char *type, *keys, *says; } family_case;

#define LATENT "\"kv_lora_rank\": 8, \"qk_nope_head_dim\": 8, \"qk_rope_head_dim\": 8, \"v_head_dim\": 8"
#define ROUTED "\"n_routed_experts\": 8, \"num_experts_per_tok\": 2, \"moe_intermediate_size\": 64"
#define STATE "\"mamba_num_heads\": 8, \"mamba_head_dim\": 32, \"ssm_state_size\": 16, \"n_groups\": 2"

static void test_llm_family_refusals(void)
{
    static const family_case cases[] = {
        {"gemma3_text", "\"query_pre_attn_scalar\": 0", "query_pre_attn_scalar"},
        {"gemma3_text", "\"final_logit_softcapping\": -30.0", "final_logit_softcapping"},
        {"gemma3_text", "\"sliding_window\": 8, \"sliding_window_pattern\": 0", "sliding_window_pattern"},
        {"gemma3_text", "\"layer_types\": [\"full_attention\", \"full_attention\", \"full_attention\", \"chunked_attention\"]", "chunked_attention"},
        {"gemma3_text", "\"rope_parameters\": {\"full_attention\": {\"rope_type\": \"default\"}}", "rope_parameters"},
        {"gemma3_text", "\"rope_local_base_freq\": -1", "rope_theta"},
        {"llama", "\"rope_parameters\": {\"full_attention\": {\"rope_type\": \"default\"}}", "rope_parameters"},
        {"gpt_oss", "\"num_local_experts\": 4, \"num_experts_per_tok\": 2, \"rope_scaling\": null, \"swiglu_limit\": 0", "swiglu_limit"},
        {"gpt_oss", "\"num_experts_per_tok\": 2, \"rope_scaling\": null", "num_local_experts"},
        {"gpt_oss", "\"num_local_experts\": 4, \"num_experts_per_tok\": 2", "rope_scaling"}, /* its own is a stretched one */
        {"deepseek_v3", ROUTED, "kv_lora_rank"},
        {"deepseek_v3", LATENT, "n_routed_experts"},
        {"deepseek_v3", LATENT ", " ROUTED ", \"n_group\": 3", "n_group"},
        {"deepseek_v3", LATENT ", " ROUTED ", \"n_group\": 4, \"topk_group\": 5", "topk_group"},
        {"deepseek_v3", LATENT ", " ROUTED ", \"scoring_func\": \"sqrtsoftplus\"", "sqrtsoftplus"},
        {"deepseek_v3", LATENT ", " ROUTED ", \"moe_layer_freq\": 2", "moe_layer_freq"},
        {"deepseek_v3", LATENT ", " ROUTED ", \"n_shared_experts\": -1", "n_shared_experts"},
        {"deepseek_v3", LATENT ", " ROUTED ", \"routed_scaling_factor\": 0", "routed_scaling_factor"},
        {"deepseek_v3", "\"kv_lora_rank\": 8, \"qk_nope_head_dim\": 8, \"qk_rope_head_dim\": 7, \"v_head_dim\": 8, " ROUTED, "head_dim"},
        {"nemotron_h", STATE, "hybrid_override_pattern"},
        {"nemotron_h", STATE ", \"hybrid_override_pattern\": \"M*-\"", "layers_block_type"},
        {"nemotron_h", STATE ", \"hybrid_override_pattern\": \"M*-X\"", "layer 3"},
        {"nemotron_h", STATE ", \"layers_block_type\": [\"mamba\", \"attention\", \"mlp\", 7]", "layer 3"},
        {"nemotron_h", STATE ", \"hybrid_override_pattern\": \"M*-E\"", "n_routed_experts"},
        {"nemotron_h", "\"hybrid_override_pattern\": \"M*-M\"", "mamba_num_heads"},
        {"nemotron_h", STATE ", \"hybrid_override_pattern\": \"M*-M\", \"conv_kernel\": 0", "conv_kernel"},
        {"nemotron_h", STATE ", \"hybrid_override_pattern\": \"M*-M\", \"time_step_limit\": [\"x\", 1]", "time_step_limit"},
        {"nemotron_h", STATE ", \"hybrid_override_pattern\": \"M*-M\", \"time_step_min\": \"x\"", "time_step_min"},
        {"nemotron_h", "\"mamba_num_heads\": 8, \"mamba_head_dim\": 32, \"ssm_state_size\": 16, \"n_groups\": 3, \"hybrid_override_pattern\": \"M*-M\"",
         "n_groups"}};
    for (size_t i = 0; i < LLMI_COUNT(cases); i++) {
        char text[2048];
        llmi_config c;
        moq_checkpoint *ck;
        moq_error e;
        snprintf(text, sizeof text, "{\"model_type\": \"%s\", %s, %s}", cases[i].type, sizes, cases[i].keys);
        moq_result code = read_config(text, 0, &c, &ck, &e);
        int good = (code == MOQ_E_CONFIG || code == MOQ_E_UNSUPPORTED) && strstr(e.text, cases[i].says) && strncmp(e.text, "config.json", 11) == 0;
        if (!good) fprintf(stderr, "%s %s: %d %s\n", cases[i].type, cases[i].keys, code, code == MOQ_OK ? "" : e.text);
        CHECK(good);
        moq_close(ck);
    }
}

/* ---- rope: numbers computed by hand from the published formulas, in double ---- */

typedef struct rope_case { const char *keys; int32_t context; int count; double scale, first[8]; } rope_case;

static const rope_case rope_cases[] = {
    {"\"rope_theta\": 10000.0, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 4.0}", 0, 16, 1,
     {0.25, 0.140585331, 0.0790569415, 0.0444569853, 0.025, 0.0140585331, 0.00790569415, 0.00444569853}},
    {"\"head_dim\": 64, \"rope_parameters\": {\"rope_theta\": 500000.0, \"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0,"
     " \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 8192}", 0, 32, 1,
     {0.00729266474, 0.00483942135, 0.00321144599, 0.00137189357, 0.000524846161, 0.000178507813, 7.78465527e-05, 5.16590687e-05}},
    {"\"rope_theta\": 1000000.0, \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 32768}", 0, 16,
     1.138629436111989, {0.0316227766, 0.0133352143, 0.00477990126, 0.00165996159, 0.00055, 0.000168678601, 4.44569853e-05, 1.87473552e-05}},
    {"\"rope_theta\": 150000.0, \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 32.0, \"original_max_position_embeddings\": 4096, \"truncate\": false}",
     0, 16, 1.3465735902799727, {0.0508132748, 0.0193350011, 0.00679495949, 0.00209379238, 0.000456483919, 3.83088124e-05, 1.81883367e-05, 8.63549588e-06}},
    {"\"rope_theta\": 150000.0, \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 40.0, \"original_max_position_embeddings\": 4096, \"mscale\": 0.707,"
     " \"mscale_all_dim\": 1.0}", 0, 16, 0.9210423553163399, {0, 0, 0, 0, 0, 0, 0, 0}},
    {"\"rope_theta\": 10000.0, \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"attention_factor\": 1.5}", 0, 16, 1.5, {0, 0, 0, 0, 0, 0, 0, 0}},
    {"\"partial_rotary_factor\": 0.5, \"rope_theta\": 10000.0", 0, 8, 1, {1, 0.316227766, 0.1, 0.0316227766, 0.01, 0.00316227766, 0.001, 0.000316227766}},
    {"\"head_dim\": 4, \"rope_theta\": 10000.0, \"max_position_embeddings\": 131072, \"original_max_position_embeddings\": 4096, \"rope_scaling\": {\"type\":"
     " \"longrope\", \"short_factor\": [2, 4], \"long_factor\": [8, 16]}", 4096, 2, 1.1902380714238083, {0.5, 0.0025, 0, 0, 0, 0, 0, 0}},
    {"\"head_dim\": 4, \"rope_theta\": 10000.0, \"max_position_embeddings\": 131072, \"original_max_position_embeddings\": 4096, \"rope_scaling\": {\"type\":"
     " \"longrope\", \"short_factor\": [2, 4], \"long_factor\": [8, 16]}", 4097, 2, 1.1902380714238083, {0.125, 0.000625, 0, 0, 0, 0, 0, 0}}};

static void test_llm_rope(void)
{
    for (size_t i = 0; i < LLMI_COUNT(rope_cases); i++) {
        const rope_case *r = &rope_cases[i];
        char text[1024];
        llmi_config c;
        moq_checkpoint *ck;
        moq_error e;
        double inv[64];
        int at = i == 1 ? 12 : i == 2 || i == 3 ? 4 : 0; /* where the listed frequencies start */
        snprintf(text, sizeof text, "{\"model_type\": \"phi3\", %s, %s}", sizes, r->keys);
        CHECK_INT(read_config(text, r->context, &c, &ck, &e), MOQ_OK);
        if (c.family) {
            CHECK_INT(c.rope.dims / 2, r->count);
            double scale = (double)llmi_rope_table(&c.rope, inv);
            CHECK(fabs(scale - r->scale) < 1e-6);
            for (int k = 0; k < 8 && r->first[k] > 0; k++) CHECK(fabs(inv[at + k] / r->first[k] - 1) < 1e-7);
        }
        moq_close(ck);
    }
}

/* ---- forward ---- */

static float worst(const float *a, const float *b, size_t n)
{
    float w = 0;
    for (size_t i = 0; i < n; i++) w = fabsf(a[i] - b[i]) > w ? fabsf(a[i] - b[i]) : w;
    return w;
}

/* Chunks, single tokens, rewinding and other slots give what one pass gives. Mistral has a window of 16 of the 24 tokens. */
static void check_chunks(const char *folder, const char *source)
{
    int32_t ids[2][TOKENS];
    moq_error e;
    size_t n = (size_t)TOKENS * VOCAB;
    float *whole = (float *)malloc(n * sizeof *whole), *parts = (float *)malloc(n * sizeof *parts), last[VOCAB];
    CHECK(read_eval(golden("sources/%s/inputs.json", source), ids));
    for (int32_t chunk = 0; chunk <= 7; chunk += 7) {
        llm_desc d = plain_desc();
        d.path = golden(folder);
        d.act = MOQ_ACT_WIDE; /* rounded inputs would jump where another order of summation crosses an edge */
        d.slots = 3;
        d.chunk = chunk;
        llm *m = llm_open(&d, &e);
        CHECK(m != NULL);
        if (!m) break;
        CHECK_INT(llm_forward(m, 0, ids[0], TOKENS, 0, chunk ? parts : whole, last, &e), MOQ_OK);
        CHECK(memcmp(last, (chunk ? parts : whole) + (TOKENS - 1) * VOCAB, sizeof last) == 0);
        if (chunk) CHECK(worst(parts, whole, n) < 1e-4f);
        for (int32_t t = 0; t < TOKENS; t++) { /* one by one in slot 2, another text in slot 1 between */
            CHECK_INT(llm_forward(m, 2, &ids[0][t], 1, t, NULL, parts + t * VOCAB, &e), MOQ_OK);
            CHECK_INT(llm_forward(m, 1, &ids[1][t], 1, t, NULL, NULL, &e), MOQ_OK);
        }
        CHECK(worst(parts, whole, n) < 1e-4f);
        if (m->model->stateful) { /* a running state cannot go back, only begin again */
            CHECK_INT(llm_forward(m, 2, ids[0] + 5, 3, 5, parts, NULL, &e), MOQ_E_STATE);
            CHECK(strstr(e.text, "start again from 0") != NULL);
            CHECK_INT(llm_forward(m, 2, ids[0], 9, 0, parts, NULL, &e), MOQ_OK);
            CHECK(worst(parts, whole, 9 * VOCAB) < 1e-4f);
            llm_close(m);
            continue;
        }
        CHECK_INT(llm_forward(m, 2, ids[0] + 5, 3, 5, parts, NULL, &e), MOQ_OK); /* back to position 5 */
        CHECK(worst(parts, whole + 5 * VOCAB, 3 * VOCAB) < 1e-4f);
        CHECK_INT(llm_forward(m, 2, ids[0] + 9, 1, 9, NULL, last, &e), MOQ_E_STATE); /* 8 was not run again */
        llm_close(m);
    }
    free(whole);
    free(parts);
}

/* The largest |row of w - row of the codes times its scale|, and how that row is longest: rows of an output layer as llm_make_head left them,
   decoded by hand. */
static void check_head_codes(const moq_linear *w, const char *name, double *distance)
{
    int fp8 = strcmp(name, "fp8") == 0;
    uint8_t *codes = (uint8_t *)malloc((size_t)(w->rows * w->cols));
    float *scales = (float *)malloc((size_t)w->rows * sizeof *scales), *row = (float *)malloc((size_t)w->cols * sizeof *row);
    moq_linear narrow;
    moq_error e;
    CHECK_INT(llm_make_head(w, name, codes, scales, &narrow, &e), MOQ_OK);
    CHECK(narrow.rows == w->rows && narrow.cols == w->cols && narrow.codes.data == codes && narrow.scales.data == scales);
    for (int64_t r = 0; r < w->rows; r++) {
        double amax = 0, s = (double)scales[r], sum = 0;
        long wrong = 0;
        moq_dequantize(w, r, 1, row);
        for (int64_t c = 0; c < w->cols; c++) amax = fabs((double)row[c]) > amax ? fabs((double)row[c]) : amax;
        CHECK(fabs(s - amax / (fp8 ? 448 : 127)) <= 1e-6 * s);
        for (int64_t c = 0; c < w->cols; c++) {
            uint8_t code = codes[r * w->cols + c];
            int exponent = code >> 3 & 15;
            double size = exponent ? ldexp(8 + (code & 7), exponent - 10) : ldexp(code & 7, -9); /* E4M3 */
            double v = s * (fp8 ? (code & 128 ? -size : size) : (double)(int8_t)code), d = fabs((double)row[c] - v);
            wrong += !(d <= (fp8 ? fabs((double)row[c]) / 16 + s * ldexp(1, -10) : s / 2) * (1 + 1e-5));
            sum += d * d;
        }
        CHECK_INT(wrong, 0);
        distance[r] = sqrt(sum);
    }
    CHECK_INT(llm_make_head(&narrow, name, codes, scales, &narrow, &e), MOQ_E_UNSUPPORTED);
    free(codes);
    free(scales);
    free(row);
}

/* llm_desc.head: what the output layer reads is normed, so its length is at most sqrt(hidden) times the norm's largest weight, and a logit moves
   by at most that times the distance of its row. */
static void check_head(const char *folder, const char *module, const char *source)
{
    static const char *const names[] = {"int8", "fp8"};
    int32_t ids[2][TOKENS];
    moq_error e;
    moq_linear w;
    size_t n = (size_t)TOKENS * VOCAB;
    if (access(golden(folder), R_OK) != 0) { printf("skipped: the head of %s, which is not in this set\n", folder); test_state.skipped++; return; }
    float *stored = (float *)malloc(n * sizeof *stored), *narrow = (float *)malloc(n * sizeof *narrow);
    double distance[VOCAB], length = 0;
    llm_desc d = plain_desc();
    CHECK(read_eval(golden("sources/%s/inputs.json", source), ids));
    d.path = golden(folder);
    d.act = MOQ_ACT_WIDE;
    d.head = "stored";
    llm *m = llm_open(&d, &e);
    CHECK(m != NULL);
    if (!m) return;
    uint64_t bytes = llm_get_info(m)->token_bytes;
    CHECK_INT(llm_forward(m, 0, ids[0], TOKENS, 0, stored, NULL, &e), MOQ_OK);
    CHECK_INT(moq_find_linear(llm_get_checkpoint(m), module, &w, &e), MOQ_OK);
    for (int32_t i = 0; i < m->model->c.hidden; i++) length = fabs((double)m->model->final_norm[i]) > length ? fabs((double)m->model->final_norm[i]) : length;
    length *= sqrt((double)m->model->c.hidden);
    for (int k = 0; k < 2; k++) {
        llm_memory plan;
        long wrong = 0, moved = 0;
        check_head_codes(&w, names[k], distance);
        d.head = names[k];
        llm *other = llm_open(&d, &e);
        CHECK(other != NULL);
        if (!other) break;
        CHECK_INT(llm_plan(&d, &plan, &e), MOQ_OK);
        CHECK(plan.weight_bytes == other->model->weight_memory);
        CHECK(llm_get_info(other)->token_bytes < bytes && strcmp(llm_get_info(other)->head, llm_get_info(m)->head) != 0);
        CHECK_INT(llm_forward(other, 0, ids[0], TOKENS, 0, narrow, NULL, &e), MOQ_OK);
        for (size_t i = 0; i < n; i++) {
            double by = fabs((double)narrow[i] - (double)stored[i]);
            wrong += !(by <= length * distance[i % VOCAB] + 1e-4);
            moved += by > 0;
        }
        CHECK_INT(wrong, 0);
        CHECK(moved > (long)n / 2);
        llm_close(other);
    }
    d.head = "int5";
    CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_ARG && strstr(e.text, "int5") != NULL);
    llm_close(m);
    free(stored);
    free(narrow);
}

static void test_llm_head(void)
{
    check_head(LLAMA, "lm_head", "llama");
    check_head("sources/gemma3", "model.embed_tokens", "gemma3"); /* tied: the embedding stays as it is */
}

/* Rows of a pass: the caller's, else the backend's, else 256; the output layer of a device takes all conversations at once. */
static void check_pass_rows(void)
{
    static const struct { int32_t backend, desc, rows, head; } cases[] = {{0, 0, 256, 256}, {300, 0, 300, 300}, {300, 7, 7, 7}, {100000, 0, 400, 400}};
    moq_error e;
    for (size_t i = 0; i < LLMI_COUNT(cases); i++) {
        llm_desc d = plain_desc();
        llm_memory plan;
        d.path = golden(LLAMA);
        d.context = 400;
        d.chunk = cases[i].desc;
        d.backend = moq_cpu_backend(NULL, &e);
        CHECK(d.backend != NULL);
        d.backend->pass_rows = cases[i].backend;
        CHECK_INT(llm_plan(&d, &plan, &e), MOQ_OK);
        CHECK_INT(plan.chunk, cases[i].rows);
        llm *m = llm_open(&d, &e);
        CHECK(m != NULL);
        if (m) {
            CHECK_INT(m->model->chunk, cases[i].rows);
            CHECK_INT(m->model->head_rows, cases[i].head);
            m->model->c.vocab = 1 << 18; /* a million logits are four rows */
            m->model->slots = 90;
            CHECK_INT(llmi_head_rows(m->model), !cases[i].backend || cases[i].rows < 4 ? 4 : cases[i].rows < 64 ? cases[i].rows : 64);
            m->model->slots = 1;
            CHECK_INT(llmi_head_rows(m->model), 4);
        }
        llm_close(m);
        moq_backend_destroy(d.backend);
    }
}

/* llm_desc.weights: copies give the same bits, and take what was planned. */
static void check_copied(const char *folder, const char *source)
{
    int32_t ids[2][TOKENS];
    moq_error e;
    llm_memory plan;
    size_t n = (size_t)TOKENS * VOCAB;
    llm_desc d = plain_desc();
    if (access(golden(folder), R_OK) != 0) { printf("skipped: copies of %s, which is not in this set\n", folder); test_state.skipped++; return; }
    float *mapped = (float *)malloc(n * sizeof *mapped), *copied = (float *)malloc(n * sizeof *copied);
    CHECK(read_eval(golden("sources/%s/inputs.json", source), ids));
    d.path = golden(folder);
    for (int k = 0; k < 2; k++) {
        d.weights = k ? "copied" : "mapped";
        llm *m = llm_open(&d, &e);
        CHECK(m != NULL);
        if (!m) break;
        CHECK_INT(llm_plan(&d, &plan, &e), MOQ_OK);
        CHECK_INT(plan.weight_bytes, m->model->weight_memory);
        CHECK(!k || plan.weight_bytes > llm_get_info(m)->token_bytes / 2); /* of mixtures the experts stay */
        for (int at = 0; at < TOKENS; at += TOKENS / 2) /* one by one, and together */
            for (int i = 0; i < TOKENS / 2; i += at ? TOKENS / 2 : 1)
                CHECK_INT(llm_forward(m, 0, ids[0] + at + i, at ? TOKENS / 2 : 1, at + i, (k ? copied : mapped) + (size_t)(at + i) * VOCAB, NULL, &e), MOQ_OK);
        llm_close(m);
    }
    CHECK(memcmp(mapped, copied, n * sizeof *mapped) == 0);
    d.weights = "printed";
    CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_ARG && strstr(e.text, "printed") != NULL);
    free(mapped);
    free(copied);
}

static void test_llm_copied(void)
{
    check_copied(LLAMA, "llama");
    check_copied("sources/gemma3", "gemma3"); /* tied: the embedding is the output layer */
    check_copied("modelopt/qwen3_moe-auto_kl_awq_8.0", "qwen3_moe");
    check_copied("foreign/deepseek_v3-fp8-block", "deepseek_v3");
}

static void test_llm_chunks(void)
{
    check_pass_rows();
    static const char *const more[] = {"mistral", "gemma3", "nemotron_h"};
    check_chunks(LLAMA, "llama");
    check_chunks("modelopt/qwen3_moe-auto_kl_awq_8.0", "qwen3_moe");
    check_chunks("modelopt/gpt_oss-nvfp4", "gpt_oss");
    check_chunks("foreign/deepseek_v3-fp8-block", "deepseek_v3");
    for (size_t i = 0; i < LLMI_COUNT(more); i++) { /* where all golden folders are there */
        char folder[64];
        snprintf(folder, sizeof folder, "sources/%s", more[i]);
        if (moqi_is_dir(golden(folder))) check_chunks(folder, more[i]);
    }
}

/* A copy of sources/nemotron_h in `dir` whose experts are narrowed and widened by identities: another model with the same logits. */
static int write_narrow(const char *dir)
{
    static const char *const names[] = {
        "backbone.layers.1.mixer.fc1_latent_proj.weight", "backbone.layers.1.mixer.fc2_latent_proj.weight",
        "backbone.layers.3.mixer.fc1_latent_proj.weight", "backbone.layers.3.mixer.fc2_latent_proj.weight"};
    static uint16_t identity[128 * 128];
    moq_tensor list[256];
    char path[600], text[8192];
    size_t bytes = 0, count = 0;
    moq_error e;
    moq_st *st = moq_st_open(golden("sources/nemotron_h/model.safetensors"), NULL, &e);
    char *config = moq_read_file(golden("sources/nemotron_h/config.json"), 1 << 16, NULL, &bytes, &e);
    int good = st && config && moq_st_count(st) < 250;
    for (; good && count < moq_st_count(st); count++) list[count] = *moq_st_get(st, count);
    for (size_t i = 0; i < 128; i++) identity[i * 129] = 0x3f80;
    for (size_t i = 0; i < 4; i++) {
        moq_tensor *t = &list[count++];
        memset(t, 0, sizeof *t);
        t->name = names[i];
        t->data = identity;
        t->bytes = sizeof identity;
        t->shape[0] = t->shape[1] = 128;
        t->rank = 2;
        t->dtype = MOQ_BF16;
    }
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    good = good && moq_st_write(path, list, count, NULL, 0, NULL, &e) == MOQ_OK;
    if (config) edit(config, "\"moe_latent_size\": null", "\"moe_latent_size\": 128", text, sizeof text);
    snprintf(path, sizeof path, "%s/config.json", dir);
    good = good && moq_write_file(path, text, strlen(text), &e) == MOQ_OK;
    moq_st_close(st);
    if (config) moq_release(NULL, config, bytes + 1);
    return good;
}

/* Mixtral under the names that transformers 5 holds it by: `text` gets one of them for a published one, room for 128 bytes. */
static void held_name(const char *name, char *text)
{
    static const char *const names[][2] = {{"w1", "gate_proj"}, {"w2", "down_proj"}, {"w3", "up_proj"}};
    const char *block = strstr(name, "block_sparse_moe"), *leaf = block ? strstr(block, ".w") : NULL;
    snprintf(text, 128, "%s", name);
    if (!block) return;
    snprintf(text, 128, "%.*smlp%s", (int)(block - name), name, block + strlen("block_sparse_moe"));
    for (size_t i = 0; leaf && i < LLMI_COUNT(names); i++)
        if (strncmp(leaf + 1, names[i][0], 2) == 0 && leaf[3] == '.') /* experts.E.w1.weight and what belongs to it */
            snprintf(text, 128, "%.*smlp%.*s.%s%s", (int)(block - name), name, (int)(leaf - block - 16), block + 16, names[i][1], leaf + 3);
}

static int write_held(const char *dir)
{
    static moq_tensor list[512];
    static char names[512][128];
    char path[600];
    size_t bytes = 0, count = 0;
    moq_error e;
    moq_st *st = moq_st_open(golden(MIXTRAL "/model.safetensors"), NULL, &e);
    char *config = moq_read_file(golden(MIXTRAL "/config.json"), 1 << 16, NULL, &bytes, &e);
    int good = st && config && moq_st_count(st) <= LLMI_COUNT(list);
    for (; good && count < moq_st_count(st); count++) {
        list[count] = *moq_st_get(st, count);
        held_name(list[count].name, names[count]);
        list[count].name = names[count];
    }
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    good = good && moq_st_write(path, list, count, NULL, 0, NULL, &e) == MOQ_OK;
    snprintf(path, sizeof path, "%s/config.json", dir);
    good = good && moq_write_file(path, config, bytes, &e) == MOQ_OK;
    moq_st_close(st);
    if (config) moq_release(NULL, config, bytes + 1);
    return good;
}

static char *made_dir(const char *name)
{
    static char dir[600];
    mkdir(TEST_DIR "/build", 0777);
    mkdir(TEST_DIR "/build/tmp", 0777);
    snprintf(dir, sizeof dir, TEST_DIR "/build/tmp/%s", name);
    mkdir(dir, 0777);
    return dir;
}

/* How far the logits of `dir` are from those of a golden folder; narrow: only the experts of `dir` are held so. */
static double made_distance(const char *dir, const char *from, const char *source, int narrow)
{
    static float logits[2][TOKENS * VOCAB];
    int32_t ids[2][TOKENS];
    moq_error e;
    CHECK(read_eval(golden("sources/%s/inputs.json", source), ids));
    for (int i = 0; i < 2; i++) {
        llm_desc d = plain_desc();
        d.path = i ? dir : golden("%s", from);
        llm *m = open_or_say(&d);
        if (!m) return 1e30;
        if (narrow) CHECK((m->model->layers[1].narrow != NULL) == i);
        CHECK_INT(llm_forward(m, 0, ids[0], TOKENS, 0, logits[i], NULL, &e), MOQ_OK);
        llm_close(m);
    }
    return relative_rms(logits[1], logits[0], (size_t)TOKENS * VOCAB);
}

static void test_llm_held_names(void)
{
    const char *dir = made_dir("held");
    CHECK(write_held(dir));
    CHECK(made_distance(dir, MIXTRAL, "mixtral", 0) == 0);
}

static void test_llm_narrow_experts(void)
{
    const char *dir = made_dir("narrow");
    if (!moqi_is_dir(golden("sources/nemotron_h"))) return; /* only with all golden folders */
    CHECK(write_narrow(dir));
    CHECK(made_distance(dir, "sources/nemotron_h", "nemotron_h", 1) < 1e-6);
}

static void test_llm_forward_refusals(void)
{
    llm_desc d = plain_desc();
    moq_error e;
    int32_t ids[40];
    float last[VOCAB];
    memset(ids, 0, sizeof ids);
    CHECK(llm_open(NULL, &e) == NULL && e.code == MOQ_E_ARG);
    CHECK(llm_open(&d, NULL) == NULL);
    d.path = golden("sources/no-such-folder");
    CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_NOTFOUND);
    d.path = golden("sources/llama");
    d.kv = "paper";
    CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_ARG && strstr(e.text, "paper"));
    for (int i = 0; i < (int)MOQ_KV_FORMAT_COUNT; i++) CHECK(strstr(e.text, moq_kv_format_name((moq_kv_format)i))); /* all that there are */
    CHECK(strstr(e.text, "bf16"));
    d.kv = NULL;
    d.path = "model.gguf";
    CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_NOTFOUND && strstr(e.text, "take the folder with .safetensors files"));
    d.path = golden("sources/llama");
    d.context = -1;
    CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_ARG && strstr(e.text, "context"));
    d.context = 32;
    d.sampling.temperature = (float)NAN;
    CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_ARG && strstr(e.text, "temperature"));
    d.sampling.temperature = 0;
    d.sampling.frequency_penalty = (float)NAN;
    CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_ARG && strstr(e.text, "frequency_penalty"));
    d.sampling.frequency_penalty = 0;
    d.sampling.bias_count = 1;
    CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_ARG && strstr(e.text, "bias_count"));
    d.sampling.bias_count = 0;
    d.endless = 7;
    CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_ARG && strstr(e.text, "endless"));
    d.endless = 0;
    d.act = (moq_act)77;
    CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_ARG && strstr(e.text, "moq_act"));
    d.act = MOQ_ACT_AUTO;
    llm *m = llm_open(&d, &e);
    CHECK(m != NULL);
    if (!m) return;
    llm_sampling hot = {0};
    hot.temperature = (float)NAN;
    CHECK_INT(llm_set_sampling(m, &hot), MOQ_E_ARG);
    hot.temperature = 1;
    hot.top_p = 1.5f;
    CHECK_INT(llm_set_sampling(m, &hot), MOQ_E_ARG);
    hot.top_p = 0.5f;
    CHECK_INT(llm_set_sampling(m, &hot), MOQ_OK);
    CHECK_INT(llm_set_sampling(m, NULL), MOQ_OK);
    CHECK_INT(llm_set_sampling(NULL, &hot), MOQ_E_ARG);
    CHECK_INT(llm_forward(NULL, 0, ids, 1, 0, NULL, last, &e), MOQ_E_ARG);
    CHECK_INT(llm_forward(m, 1, ids, 1, 0, NULL, last, &e), MOQ_E_ARG);
    CHECK_INT(llm_forward(m, -1, ids, 1, 0, NULL, last, &e), MOQ_E_ARG);
    CHECK_INT(llm_forward(m, 0, NULL, 1, 0, NULL, last, &e), MOQ_E_ARG);
    CHECK_INT(llm_forward(m, 0, ids, 0, 0, NULL, last, &e), MOQ_E_ARG);
    CHECK_INT(llm_forward(m, 0, ids, 1, -1, NULL, last, &e), MOQ_E_ARG);
    CHECK_INT(llm_forward(m, 0, ids, 1, 1, NULL, last, &e), MOQ_E_STATE);
    CHECK_INT(llm_forward(m, 0, ids, 33, 0, NULL, last, &e), MOQ_E_STATE);
    CHECK(strstr(e.text, "33") && strstr(e.text, "32"));
    ids[2] = VOCAB;
    CHECK_INT(llm_forward(m, 0, ids, 3, 0, NULL, last, &e), MOQ_E_ARG);
    CHECK(strstr(e.text, "256"));
    ids[2] = 1;
    CHECK_INT(llm_forward(m, 0, ids, 32, 0, NULL, last, &e), MOQ_OK);
    CHECK_INT(llm_say(m, "user", "hello"), MOQ_E_STATE); /* no tokenizer */
    CHECK(llm_next(m, &e) == NULL && e.code == MOQ_E_STATE && strstr(e.text, "no_tokenizer"));
    CHECK(llm_next(m, &e) == NULL && e.code == MOQ_E_STATE && strstr(e.text, "nothing was said"));
    llm_close(m);
    llm_close(NULL);
}

/* The caller's own table: an entry that is missing is found out before anything is prepared. */
/* A backend that lacks what a layer needs is refused while opening, with the names of both. */
static void test_llm_backend_without_entries(void)
{
    static const char *const cases[][3] = {{"sources/llama", "attention", ""}, {"foreign/deepseek_v3-fp8-block", "copy_heads", "model.layers.0.self_attn"},
                                           {"modelopt/gpt_oss-nvfp4", "moe", "model.layers.0"}, {"sources/nemotron_h", "ssm", "backbone.layers.0.mixer"}};
    moq_error e;
    moq_backend *be = moq_cpu_backend(NULL, &e);
    CHECK(be != NULL);
    for (int i = 0; be && i < 4; i++) {
        moq_backend copy = *be;
        llm_desc d = plain_desc();
        if (i == 3 && !moqi_is_dir(golden(cases[i][0]))) break;
        if (i == 0) copy.attention = NULL;
        if (i == 1) copy.copy_heads = NULL;
        if (i == 2) copy.moe = NULL;
        if (i == 3) copy.ssm = NULL;
        d.path = golden(cases[i][0]);
        d.backend = &copy;
        CHECK(llm_open(&d, &e) == NULL);
        CHECK_INT(e.code, MOQ_E_UNSUPPORTED);
        CHECK(strstr(e.text, cases[i][1]) != NULL && strstr(e.text, cases[i][2]) != NULL);
    }
    moq_backend_destroy(be);
}

/* What a model computes does not depend on who was opened before it on the same backend: a float model whose layers round nothing, behind one that does. */
static void test_llm_two_models(void)
{
    enum { LENGTH = 60, WORDS = 256 };
    static float logits[2][LENGTH * WORDS];
    int32_t ids[LENGTH];
    moq_error e;
    for (int i = 0; i < LENGTH; i++) ids[i] = (i * 37 + 5) % WORDS;
    for (int second = 0; second < 2; second++) {
        llm_desc d = plain_desc();
        moq_backend *be = moq_cpu_backend(NULL, &e);
        llm *other = NULL, *m;
        CHECK(be != NULL);
        d.backend = be;
        d.path = golden("modelopt/llama-nvfp4");
        if (second) CHECK((other = llm_open(&d, &e)) != NULL && other->model->rounds);
        d.path = golden("sources/llama");
        CHECK((m = llm_open(&d, &e)) != NULL && !m->model->rounds);
        if (m) CHECK_INT(llm_forward(m, 0, ids, LENGTH, 0, logits[second], NULL, &e), MOQ_OK);
        llm_close(m);
        llm_close(other);
        moq_backend_destroy(be);
    }
    CHECK(memcmp(logits[0], logits[1], sizeof logits[0]) == 0);
}

static int stop_at_layer(void *user, moq_stage stage, uint64_t done, uint64_t total)
{
    (void)user;
    (void)total;
    return stage == MOQ_STAGE_PREPARE && done == 1;
}

static void test_llm_open_cancelled(void)
{
    llm_desc d = plain_desc();
    moq_error e;
    d.path = golden("sources/llama");
    d.allocator = test_allocator();
    d.progress = stop_at_layer;
    CHECK(llm_open(&d, &e) == NULL && e.code == MOQ_E_CANCELLED);
    CHECK_INT(test_state.live_allocs, 0);
}

/* Every allocation of the engine and its backend fails once, alone and with all after it; nothing may leak. */
static void check_open_out_of_memory(const char *folder)
{
    moq_error e;
    moq_checkpoint *ck = moq_open(golden(folder), NULL, &e);
    CHECK(ck != NULL);
    for (int forever = 0; forever < 2 && ck; forever++) {
        int opened = 0;
        for (long k = 1; k < 4000 && !opened; k += forever ? 7 : 1) {
            llm_desc d = plain_desc();
            d.checkpoint = ck;
            d.context = 32;
            d.weights = forever ? "copied" : NULL;
            d.allocator = test_allocator();
            test_state.fail_at = k;
            const long before = test_state.total_allocs;
            test_state.fail_forever = forever;
            llm *m = llm_open(&d, &e);
            opened = m != NULL;
            CHECK((test_state.total_allocs - before < k) == opened);
            CHECK_INT(e.code, opened ? MOQ_OK : MOQ_E_NOMEM);
            if (test_state.broken) fprintf(stderr, "allocation %ld: %s\n", k, m ? "opened" : e.text);
            test_state.fail_at = 0;
            llm_close(m);
            CHECK_INT(test_state.live_allocs, 0);
            if (test_state.broken) opened = 1;
        }
        CHECK(opened);
    }
    moq_close(ck);
}

static void test_llm_open_out_of_memory(void)
{
    check_open_out_of_memory(MIXTRAL);
    check_open_out_of_memory("modelopt/gpt_oss-nvfp4");
    check_open_out_of_memory("foreign/deepseek_v3-fp8-block");
    if (moqi_is_dir(golden("sources/nemotron_h"))) check_open_out_of_memory("sources/nemotron_h");
}

/* ---- sampling ---- */

static void test_llm_sample_greedy(void)
{
    llm_sampling s;
    uint64_t state = 0;
    float nan = (float)NAN, inf = (float)INFINITY;
    float a[] = {-1, 3, 2, 3}, b[] = {0, 0, 0, 0}, c[4], z[] = {-0.0f, 0.0f};
    memset(&s, 0, sizeof s);
    CHECK_INT(llm_sample(&s, a, 4, &state, NULL, NULL), 1); /* ties: the lowest */
    CHECK_INT(llm_sample(&s, z, 2, &state, NULL, NULL), 0);
    b[2] = nan;
    b[3] = -1;
    CHECK_INT(llm_sample(&s, b, 4, &state, NULL, NULL), 0);
    for (int i = 0; i < 4; i++) c[i] = i % 2 ? nan : -inf;
    CHECK_INT(llm_sample(&s, c, 4, &state, NULL, NULL), -1);
    c[2] = inf;
    CHECK_INT(llm_sample(&s, c, 4, &state, NULL, NULL), 2);
    CHECK_INT(llm_sample(&s, a, 0, &state, NULL, NULL), -1);
}

enum { CHOICES = 50, DRAWS = 40000 };

/* The distribution that the filters leave, by sorting and in doubles. */
static void expected_distribution(const llm_sampling *s, const float *logits, double *p)
{
    int order[CHOICES];
    double sum = 0, kept = 0;
    for (int i = 0; i < CHOICES; i++) {
        int at = i;
        for (; at > 0 && logits[order[at - 1]] < logits[i]; at--) order[at] = order[at - 1];
        order[at] = i;
        p[i] = 0;
    }
    int most = s->top_k > 0 && s->top_k < CHOICES ? s->top_k : CHOICES;
    double best = (double)logits[order[0]], t = (double)s->temperature;
    for (int i = 0; i < most; i++) sum += exp(((double)logits[order[i]] - best) / t);
    for (int i = 0; i < most; i++) {
        double w = exp(((double)logits[order[i]] - best) / t);
        if (s->top_p > 0 && s->top_p < 1 && kept >= (double)s->top_p * sum) break;
        if (w < (double)s->min_p) break;
        p[order[i]] = w;
        kept += w;
    }
    for (int i = 0; i < CHOICES; i++) p[i] /= kept;
}

#define SAMPLING(t, k, p, m, seed) {t, k, p, m, seed, 0, 0, 0, 0, 0, NULL, 0}

static void test_llm_sample_distributions(void)
{
    static const llm_sampling settings[] = {SAMPLING(1.0f, 0, 0, 0, 1), SAMPLING(0.5f, 0, 1, 0, 2), SAMPLING(1.0f, 5, 0, 0, 3), SAMPLING(2.0f, 0, 0.7f, 0, 4),
                                            SAMPLING(1.0f, 0, 0, 0.1f, 5), SAMPLING(1.5f, 10, 0.8f, 0, 6), SAMPLING(1.0f, 49, 0.95f, 0.02f, 7), SAMPLING(1.0f, 1, 0, 0, 8)};
    float logits[CHOICES], scratch[CHOICES];
    int32_t index[CHOICES];
    for (int i = 0; i < CHOICES; i++) logits[i] = test_uniform() * 4;
    for (size_t k = 0; k < LLMI_COUNT(settings); k++) {
        double p[CHOICES];
        int count[CHOICES] = {0};
        uint64_t state = settings[k].seed, again = settings[k].seed;
        expected_distribution(&settings[k], logits, p);
        for (int n = 0; n < DRAWS; n++) {
            int32_t id = llm_sample(&settings[k], logits, CHOICES, &state, scratch, index);
            CHECK(id >= 0 && id < CHOICES);
            count[id]++;
            if (n < 100) CHECK_INT(llm_sample(&settings[k], logits, CHOICES, &again, scratch, index), id); /* the seed decides */
        }
        for (int i = 0; i < CHOICES; i++) { /* five standard deviations, and never a token that was filtered out */
            double expected = p[i] * DRAWS, slack = 5 * sqrt(expected) + 1e-9;
            CHECK(fabs(count[i] - expected) <= slack);
        }
    }
}

/* What llm_sample chooses, by weighing and sorting everything. order: [n]. */
static const float *sorted_logits;

static int compare_logits(const void *a, const void *b)
{
    int32_t i = *(const int32_t *)a, k = *(const int32_t *)b;
    uint32_t x = llmi_rank(sorted_logits[i]), y = llmi_rank(sorted_logits[k]);
    return x != y ? (x < y ? 1 : -1) : (i > k) - (i < k);
}

static int32_t plain_sample(const llm_sampling *s, const float *logits, int32_t n, uint64_t *state, float *weight, int32_t *order, int32_t *last)
{
    int counts = s->top_k > 0 && s->top_k < n;
    int32_t most = counts ? s->top_k : n, kept = 0, first = 0;
    double total = 0, mass = 0;
    for (int32_t i = 0; i < n; i++) order[i] = i;
    sorted_logits = logits;
    qsort(order, (size_t)n, sizeof *order, compare_logits);
    float max = logits[order[0]];
    if (llmi_rank(max) <= 0x007fffffu) return -1;
    if (s->top_k == 1 || max - max != 0) return order[0];
    for (int32_t i = 0; i < n; i++) weight[i] = llmi_rank(logits[i]) > 0x007fffffu ? (float)exp(((double)logits[i] - (double)max) / (double)s->temperature) : 0;
    double at = llmi_random(state);
    if (!(s->top_k > 0 || (s->top_p > 0 && s->top_p < 1) || s->min_p > 0 || (s->typical_p > 0 && s->typical_p < 1))) {
        for (int32_t i = 0; i < n; i++) total += weight[i];
        at *= total;
        for (int32_t i = 0; i < n; i++)
            if ((at -= weight[i]) < 0) return i;
        return order[0];
    }
    for (int32_t i = 0; i < most; i++) total += weight[counts ? order[i] : i];
    while (kept < most && !(s->top_p > 0 && s->top_p < 1 && mass >= (double)s->top_p * total)) {
        if (kept > 0 && weight[order[kept]] < s->min_p) break;
        mass += weight[order[kept++]];
    }
    for (int32_t i = 0; i < n; i++) last[n - 1 - i] = order[i];
    if (s->typical_p > 0 && s->typical_p < 1) mass = llmi_typical(weight, last + n - 1, kept, mass, (double)s->typical_p, &first, &kept);
    at *= mass;
    for (int32_t i = first; i < kept; i++)
        if ((at -= weight[order[i]]) < 0) return order[i];
    return order[first];
}

/* Rows of `kind`: ties, one value, wide ranges, infinities, NaN of both signs, zeros of both signs. */
static float some_logit(int kind)
{
    static const float odd[] = {0.0f, -0.0f, 1e-45f, -1e-45f, 3e38f, -3e38f, 2.5f, 2.5f};
    uint32_t r = test_random();
    float v = test_uniform() * 8, nan;
    if (kind == 1) return floorf(v);
    if (kind == 2) return 4;
    if (kind == 3) return v * 20;
    if (kind == 4) return odd[r % 6 == 4 && r % 5 ? 0 : r % 8];
    if (kind == 5 && r % 4 == 0) return -(float)INFINITY;
    if (kind == 5 && r % 4 == 1) {
        r = r & 0x80000000u ? 0xffc00000u : 0x7fc00000u;
        memcpy(&nan, &r, 4);
        return nan;
    }
    if (kind == 6) return odd[r % 4];
    if (kind == 7) return r % 64 ? -(float)INFINITY : v;
    return kind == 8 ? -0.6931471f * (float)(r % 3) : v * v * (v < 0 ? -1.0f : 1.0f); /* weights just above a half, a quarter */
}

static void test_llm_sample_plain(void)
{
    static const float temperatures[] = {1, 0.7f, 0.2f, 1e-3f, 1e-30f, 5, 1e4f, 1e29f}, shares[] = {0, 1, 0.9f, 0.5f, 0.05f, 0.999999f},
                       parts[] = {0, 0.05f, 1e-30f, 0.5f, 1, 1.5f};
    enum { MOST = 3000 };
    static float logits[MOST], a[MOST], b[MOST];
    static int32_t index[MOST], order[MOST], last[MOST];
    for (int n = 0; n < 6000; n++) {
        static const int32_t lengths[] = {1, 2, 7, 64, 65, 300, MOST};
        int32_t count = lengths[test_random() % 7], counts[] = {0, 0, 2, 5, 40, count - 1, count, count + 1, -3};
        llm_sampling s;
        uint64_t state = test_random(), again = state;
        int kind = (int)(test_random() % 10);
        memset(&s, 0, sizeof s);
        s.temperature = temperatures[test_random() % 8];
        s.top_k = counts[test_random() % 9];
        s.top_p = test_random() % 2 ? shares[test_random() % 6] : 0;
        s.min_p = test_random() % 2 ? parts[test_random() % 6] : 0;
        s.typical_p = test_random() % 4 ? 0 : shares[test_random() % 6];
        for (int32_t i = 0; i < count; i++) logits[i] = some_logit(kind);
        for (int k = 0; k < 5; k++) {
            int32_t id = llm_sample(&s, logits, count, &state, a, index), plain = plain_sample(&s, logits, count, &again, b, order, last);
            if (id != plain)
                fprintf(stderr, "kind %d, %d logits, temperature %g, top_k %d, top_p %g, min_p %g, typical_p %g\n", kind, count, (double)s.temperature, s.top_k,
                        (double)s.top_p, (double)s.min_p, (double)s.typical_p);
            CHECK_INT(id, plain);
            CHECK(state == again);
        }
    }
}

/* Logits around 0 at the edge of a bucket, which (max - logit) / T and max - bucket * T put on either side of it. */
static void test_llm_sample_edges(void)
{
    static const float small[] = {-0.0f, 0.0f, -1e-45f, 1e-45f, -1e-20f};
    int32_t order[4], last[4];
    float a[4], b[4];
    for (int n = 1; n < 200; n += 2)
        for (int k = 1; k < 700; k++) {
            float logits[4] = {-1e30f, small[k % 5], -1e30f, 0};
            llm_sampling s;
            uint64_t state = (uint64_t)(700 * n + k), again = state;
            memset(&s, 0, sizeof s);
            s.temperature = (float)n / 128;
            s.top_k = 2;
            logits[3] = (float)k / 64 * s.temperature;
            int32_t index[4] = {0, 0, 0, 0};
            CHECK_INT(llm_sample(&s, logits, 4, &state, a, index), plain_sample(&s, logits, 4, &again, b, order, last));
            CHECK(state == again && index[3] == 3 && index[2] == 1);
        }
}

/* ---- streaming ---- */

/* Bytes arrive one by one; pieces are whole characters, and together the text with U+FFFD for what is no UTF-8. */
static void check_stream(const char *bytes, size_t n, const char *expected)
{
    llm m;
    char text[256];
    size_t used = 0, bad;
    memset(&m, 0, sizeof m);
    text[0] = 0;
    for (size_t i = 0; i <= n; i++) {
        if (i < n) CHECK(llmi_bytes_add(&m.raw, bytes + i, 1));
        CHECK_INT(llmi_show_piece(&m, i == n), MOQ_OK);
        CHECK(moqi_utf8_valid((const uint8_t *)m.piece.data, m.piece.count, &bad));
        CHECK_INT(m.ready, m.piece.count > 0);
        CHECK_INT(strlen(m.piece.data), m.piece.count);
        used += (size_t)snprintf(text + used, sizeof text - used, "%s", m.piece.data);
    }
    CHECK_STR(text, expected);
    CHECK_INT(m.text.count, strlen(expected));
    CHECK_INT(m.raw.count, 0);
    llmi_bytes_drop(&m.raw);
    llmi_bytes_drop(&m.piece);
    llmi_bytes_drop(&m.text);
}

static void test_llm_stream_utf8(void)
{
    check_stream("plain", 5, "plain");
    check_stream("\xc3\xa9\xe2\x82\xac\xf0\x9f\xa4\x96!", 10, "\xc3\xa9\xe2\x82\xac\xf0\x9f\xa4\x96!");
    check_stream("a\x80z", 3, "a\xef\xbf\xbdz");
    check_stream("a\xf0\x9f\xa4", 4, "a\xef\xbf\xbd");       /* cut off at the end */
    check_stream("\xe2\x82x", 3, "\xef\xbf\xbdx");
    check_stream("\xed\xa0\x80", 3, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"); /* a surrogate */
    check_stream("a\0z", 3, "az");
}

/* ---- conversations, on the demo model ---- */

static const char house[] = "green charger at hallway coat rack; red pillow at hallway coat rack; yellow book at bedroom drawer; red towel at kitchen sink; "
                            "blue umbrella at kitchen sink; Juno at kitchen counter; robot at bathroom washer";
static const char request[] = "would you move the green charger to the kitchen counter, then the red pillow to the bedroom bed?";
static const char plan[] =
    "{\"say\":\"Moving the green charger and red pillow.\",\"plan\":[{\"do\":\"go\",\"to\":\"hallway coat rack\"},{\"do\":\"pick\",\"what\":\"green charger\"},"
    "{\"do\":\"go\",\"to\":\"kitchen counter\"},{\"do\":\"place\",\"what\":\"green charger\",\"on\":\"kitchen counter\"},{\"do\":\"go\",\"to\":\"hallway coat rack\"},"
    "{\"do\":\"pick\",\"what\":\"red pillow\"},{\"do\":\"go\",\"to\":\"bedroom bed\"},{\"do\":\"place\",\"what\":\"red pillow\",\"on\":\"bedroom bed\"}]}";

static llm *open_demo(int32_t context, moq_allocator *a)
{
    llm_desc d;
    moq_error e;
    memset(&d, 0, sizeof d);
    d.path = DEMO_DIR;
    d.threads = 1;
    d.context = context;
    if (a) d.allocator = *a;
    llm *m = llm_open(&d, &e);
    if (!m) fprintf(stderr, "%s\n", e.text);
    CHECK(m != NULL);
    return m;
}

/* The rest of the answer; returns how it ended. */
static moq_result hear_text(llm *m, char *text, size_t capacity)
{
    moq_error e;
    size_t n = 0, bad;
    text[0] = 0;
    for (const char *piece; (piece = llm_next(m, &e)) != NULL;) {
        CHECK(piece[0] != 0 && moqi_utf8_valid((const uint8_t *)piece, strlen(piece), &bad));
        if (n + strlen(piece) < capacity) n += (size_t)snprintf(text + n, capacity - n, "%s", piece);
    }
    return e.code;
}

static void test_llm_demo_answer(void)
{
    char text[4096];
    llm *m = open_demo(0, NULL);
    if (!m) return;
    for (int round = 0; round < 2; round++) { /* the same again after a reset */
        CHECK_INT(llm_say(m, "system", house), MOQ_OK);
        CHECK_INT(llm_say(m, "user", request), MOQ_OK);
        CHECK_INT(hear_text(m, text, sizeof text), MOQ_OK);
        CHECK_STR(text, plan);
        const llm_stats *s = llm_get_stats(m);
        CHECK(s->prompt_tokens > 20 && s->generated_tokens > 20 && s->prompt_seconds > 0 && s->generate_seconds > 0);
        CHECK_INT(hear_text(m, text, sizeof text), MOQ_OK); /* nothing was said */
        CHECK_STR(text, "");
        llm_reset(m);
        CHECK_INT(llm_get_stats(m)->prompt_tokens, 0);
    }
    llm_close(m);
}

static void test_llm_step_equals_next(void)
{
    char text[4096] = "";
    size_t n = 0;
    int r, waits = 0;
    moq_error e;
    llm *m = open_demo(0, NULL);
    if (!m) return;
    llm_say(m, "system", house);
    llm_say(m, "user", request);
    while ((r = llm_step(m, 300)) >= 0) {
        if (r == 0) { waits++; continue; }
        n += (size_t)snprintf(text + n, sizeof text - n, "%s", llm_piece(m));
    }
    CHECK(waits > 2);
    CHECK(llm_next(m, &e) == NULL && e.code == MOQ_OK);
    CHECK_STR(text, plan);
    CHECK_INT(llm_step(m, 1000), -1);
    llm_close(m);
}

/* After several turns the cache holds the frame of the whole conversation, and a fresh model given all of it answers the same. */
static void test_llm_turns_equal_frame(void)
{
    char first[4096], second[4096], fresh[4096];
    moq_error e;
    int32_t ids[2048];
    llm_message list[4] = {{"system", house}, {"user", request}, {"assistant", first}, {"user", "bring me the red towel"}};
    llm *m = open_demo(0, NULL), *other = open_demo(0, NULL);
    memset(ids, 0, sizeof ids);
    if (m && other) {
        llm_say(m, "system", house);
        llm_say(m, "user", request);
        CHECK_INT(hear_text(m, first, sizeof first), MOQ_OK);
        uint64_t before = llm_get_stats(m)->prompt_tokens;
        llm_say(m, "user", "bring me the red towel");
        CHECK(llm_next(m, &e) != NULL);
        size_t n = llm_frame(m->tokenizer, list, 4, 1, ids, LLMI_COUNT(ids), &e);
        CHECK(n < LLMI_COUNT(ids) && n == m->answer);
        for (size_t i = 0; i < n && i < m->ids.count; i++) CHECK_INT(m->ids.data[i], ids[i]);
        CHECK(llm_get_stats(m)->prompt_tokens - before < n / 3); /* what the cache held was not run again */
        snprintf(second, sizeof second, "%s", llm_piece(m));
        hear_text(m, second + strlen(second), sizeof second - strlen(second));
        for (int i = 0; i < 4; i++) llm_say(other, list[i].role, list[i].text);
        CHECK_INT(hear_text(other, fresh, sizeof fresh), MOQ_OK);
        CHECK_STR(second, fresh);
    }
    llm_close(m);
    llm_close(other);
}

static void test_llm_cancel_and_go_on(void)
{
    char text[4096];
    moq_error e;
    llm *m = open_demo(0, NULL);
    if (!m) return;
    llm_say(m, "system", house);
    llm_say(m, "user", request);
    for (int i = 0; i < 3; i++) CHECK(llm_next(m, &e) != NULL);
    llm_cancel(m);
    CHECK(llm_next(m, &e) == NULL && e.code == MOQ_E_CANCELLED);
    CHECK(llm_next(m, &e) == NULL && e.code == MOQ_OK);
    llm_reset(m);
    llm_say(m, "system", house);
    llm_say(m, "user", request);
    CHECK_INT(hear_text(m, text, sizeof text), MOQ_OK);
    CHECK_STR(text, plan);
    llm_close(m);
}

static void *cancel_it(void *m)
{
    llm_cancel((llm *)m);
    return NULL;
}

static void test_llm_cancel_from_a_thread(void)
{
    char text[4096];
    moq_error e;
    pthread_t thread;
    llm *m = open_demo(0, NULL);
    if (!m) return;
    llm_say(m, "system", house);
    llm_say(m, "user", request);
    CHECK(llm_next(m, &e) != NULL);
    CHECK_INT(pthread_create(&thread, NULL, cancel_it, m), 0);
    moq_result r = hear_text(m, text, sizeof text); /* the answer may have been faster */
    CHECK(r == MOQ_E_CANCELLED || r == MOQ_OK);
    pthread_join(thread, NULL);
    llm_close(m);
}

static void test_llm_context_full(void)
{
    char text[4096];
    moq_error e;
    llm *m = open_demo(150, NULL);
    if (!m) return;
    llm_say(m, "system", house);
    llm_say(m, "user", request);
    CHECK_INT(hear_text(m, text, sizeof text), MOQ_E_STATE);
    CHECK(strncmp(text, plan, strlen(text)) == 0);
    CHECK_INT(m->ids.count >= 150, 1);
    llm_say(m, "user", request);
    CHECK(llm_next(m, &e) == NULL && e.code == MOQ_E_STATE && strstr(e.text, "150"));
    llm_close(m);
}

static void test_llm_raw_and_seeds(void)
{
    char text[3][600];
    llm_sampling s = SAMPLING(1.5f, 40, 0.95f, 0, 11);
    llm *m = open_demo(0, NULL);
    if (!m) return;
    for (int i = 0; i < 3; i++) {
        moq_error e;
        s.seed = i < 2 ? 11 : 12;
        llm_reset(m);
        llm_set_sampling(m, &s);
        CHECK_INT(llm_say_raw(m, "red key at living room tv stand; yellow"), MOQ_OK);
        text[i][0] = 0;
        for (int n = 0; n < 40; n++) {
            const char *piece = llm_next(m, &e);
            if (!piece) break;
            snprintf(text[i] + strlen(text[i]), sizeof text[i] - strlen(text[i]), "%s", piece);
        }
    }
    CHECK_STR(text[0], text[1]);
    CHECK(strcmp(text[0], text[2]) != 0);
    CHECK_INT(llm_say(m, "user", "hello"), MOQ_E_STATE); /* raw and framed do not mix */
    llm_reset(m);
    CHECK_INT(llm_say(m, "user", NULL), MOQ_E_ARG);
    CHECK_INT(llm_say(m, "user", "hello"), MOQ_OK);
    CHECK_INT(llm_say_raw(m, "hello"), MOQ_E_STATE);
    llm_close(m);
}

/* Memory that runs out while talking ends the answer and leaks nothing. */
static void test_llm_talk_out_of_memory(void)
{
    moq_allocator a = test_allocator();
    char text[4096];
    int done = 0;
    llm *m = open_demo(48, &a); /* the answer ends where the context does */
    if (!m) return;
    for (long k = 1; k < 200 && !done; k++) {
        llm_reset(m);
        test_state.fail_at = k;
        moq_result r = llm_say(m, "user", "bring me the red book");
        if (r == MOQ_OK) r = hear_text(m, text, sizeof text);
        else CHECK_INT(hear_text(m, text, sizeof text), r);
        done = test_state.fail_at > 0;
        CHECK_INT(r, done ? MOQ_E_STATE : MOQ_E_NOMEM);
        test_state.fail_at = 0;
        llmi_bytes_drop(&m->turns); /* buffers that have grown would hide the next failure */
        llmi_bytes_drop(&m->words);
        llmi_bytes_drop(&m->text);
        llmi_bytes_drop(&m->raw);
        llmi_bytes_drop(&m->piece);
        llmi_ids_drop(&m->ids);
    }
    CHECK(done);
    llm_close(m);
    CHECK_INT(test_state.live_allocs, 0);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_llm_config_rows);
    RUN(test_llm_norms_left_over);
    RUN(test_llm_config_absent_and_huge);
    RUN(test_llm_windows);
    RUN(test_llm_silent_keys);
    RUN(test_llm_keys_found);
    RUN(test_llm_untied_without_head);
    RUN(test_llm_misspelled_keys);
    RUN(test_llm_machine_memory);
    RUN(test_llm_dynamic_rope);
    RUN(test_llm_moe_layers);
    RUN(test_llm_published_configs);
    RUN(test_llm_reference_llama4);
    RUN(test_llm_reference_smollm3);
    RUN(test_llm_reference_gemma2);
    RUN(test_llm_reference_deepseek2);
    RUN(test_llm_family_refusals);
    RUN(test_llm_rope);
    RUN(test_llm_golden_sources);
    RUN(test_llm_golden_modelopt);
    RUN(test_llm_golden_compressed_tensors);
    RUN(test_llm_golden_foreign);
    RUN(test_llm_head);
    RUN(test_llm_copied);
    RUN(test_llm_chunks);
    RUN(test_llm_held_names);
    RUN(test_llm_narrow_experts);
    RUN(test_llm_forward_refusals);
    RUN(test_llm_backend_without_entries);
    RUN(test_llm_two_models);
    RUN(test_llm_open_cancelled);
    RUN(test_llm_open_out_of_memory);
    RUN(test_llm_sample_greedy);
    RUN(test_llm_sample_distributions);
    RUN(test_llm_sample_plain);
    RUN(test_llm_sample_edges);
    RUN(test_llm_stream_utf8);
    RUN(test_llm_demo_answer);
    RUN(test_llm_step_equals_next);
    RUN(test_llm_turns_equal_frame);
    RUN(test_llm_cancel_and_go_on);
    RUN(test_llm_cancel_from_a_thread);
    RUN(test_llm_context_full);
    RUN(test_llm_raw_and_seeds);
    RUN(test_llm_talk_out_of_memory);
    return test_end();
}
