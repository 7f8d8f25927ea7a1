/* test_bind.c - tensors of a module -> moq_linear: every golden checkpoint by its hashes, and every malformed module by its error. */
#include "test.h"

#ifndef GOLDEN_DIR
#define GOLDEN_DIR TEST_DIR "/data/golden"
#endif

/* ---- a folder opened by the sections below >>bind alone ---- */

typedef struct folder {
    moqi_arena arena;
    moq_st *st;
    moq_json_doc *config, *hf, *gptq, *expected;
    moq_tensor *list;
    moqi_map map;
    const char *file[1];
    moqi_tensor_set set;
    moqi_quant q;
    moqi_module *modules;
    size_t count;
} folder;

static moq_json_doc *read_json(const char *dir, const char *name)
{
    char path[1200];
    size_t bytes;
    moq_error err;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    char *text = moq_read_file(path, 1u << 30, NULL, &bytes, &err);
    if (!text) return NULL;
    moq_json_doc *doc = moq_json_parse(text, bytes, MOQ_JSON_CONFIG, 0, name, NULL, &err);
    if (!doc) fprintf(stderr, "%s: %s\n", path, err.text);
    moq_release(NULL, text, bytes + 1);
    return doc;
}

static void folder_close(folder *f)
{
    moqi_arena_drop(&f->arena);
    moq_st_close(f->st);
    moq_json_destroy(f->config);
    moq_json_destroy(f->hf);
    moq_json_destroy(f->gptq);
    moq_json_destroy(f->expected);
    memset(f, 0, sizeof *f);
}

static int folder_open(folder *f, const char *dir, const moq_open_desc *desc, moq_error *err)
{
    char path[1300];
    memset(f, 0, sizeof *f);
    f->arena = moqi_arena_make(NULL);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    f->st = moq_st_open(path, NULL, err);
    if (!f->st) return 0;
    f->config = read_json(dir, "config.json");
    f->hf = read_json(dir, "hf_quant_config.json");
    f->gptq = read_json(dir, "quantize_config.json");
    f->expected = read_json(dir, "expected.json");
    size_t n = moq_st_count(f->st);
    f->list = (moq_tensor *)moqi_take_array(&f->arena, n, sizeof *f->list);
    moqi_map_make(&f->map, &f->arena, n);
    for (size_t i = 0; i < n; i++) {
        f->list[i] = *moq_st_get(f->st, i);
        f->list[i].shard = 0;
        moqi_map_add(&f->map, f->list[i].name, f->list[i].name_bytes, (uint32_t)i);
    }
    f->file[0] = "model.safetensors";
    f->set.list = f->list;
    f->set.count = n;
    f->set.map = &f->map;
    f->set.files = f->file;
    if (moqi_quant_parse(&f->q, moq_json_root(f->config), moq_json_root(f->hf), moq_json_root(f->gptq), &f->arena, desc, err) < 0) return 0;
    return moqi_collect_modules(&f->set, &f->q, &f->arena, &f->modules, &f->count, desc, err) == MOQ_OK;
}

static const moqi_module *folder_find(const folder *f, const char *name, size_t bytes)
{
    for (size_t i = 0; i < f->count; i++)
        if (strlen(f->modules[i].name) == bytes && memcmp(f->modules[i].name, name, bytes) == 0) return &f->modules[i];
    return NULL;
}

/* ---- golden: hashes ---- */

static uint64_t hash_f32(const float *x, size_t n)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) {
        uint32_t b;
        memcpy(&b, &x[i], 4);
        for (int k = 0; k < 4; k++) h = (h ^ (b >> (8 * k) & 255)) * 0x100000001b3u;
    }
    return h;
}

/* "a.weight", "a.experts.gate_up_proj" or "a.experts.gate_up_proj[3]" */
static int check_hash(const folder *f, const char *dir, const moq_json *e)
{
    const char *name = e->key, *bracket = strchr(name, '[');
    size_t bytes = bracket ? (size_t)(bracket - name) : strlen(name);
    moq_linear w;
    moq_error err;
    char got[17];
    if (!bracket && moqi_ends(name, ".weight")) bytes -= 7;
    const moqi_module *m = folder_find(f, name, bytes);
    if (!m) { fprintf(stderr, "%s: no module for %s\n", dir, name); return 0; }
    if (moqi_bind_linear(&f->set, &f->q, m, &w, &err) < 0) { fprintf(stderr, "%s: %s\n", dir, err.text); return 0; }
    if (bracket && moq_slice_expert(&w, atoi(bracket + 1), &w, &err) < 0) { fprintf(stderr, "%s: %s\n", dir, err.text); return 0; }
    int64_t rows = w.rows * (w.experts ? w.experts : 1);
    float *x = (float *)malloc((size_t)(rows * w.cols) * sizeof(float));
    moq_dequantize(&w, 0, rows, x);
    snprintf(got, sizeof got, "%016llx", (unsigned long long)hash_f32(x, (size_t)(rows * w.cols)));
    int ok = moq_json_is(moq_json_find(e, "fnv1a64"), got);
    if (!ok) {
        double v = 0;
        fprintf(stderr, "%s: %s: hash %s, expected %s; first8", dir, name, got, moq_json_string(moq_json_find(e, "fnv1a64")));
        for (size_t i = 0; i < 8; i++) {
            moq_json_float(moq_json_at(moq_json_find(e, "first8"), i), &v);
            fprintf(stderr, " %g/%g", (double)x[i], v);
        }
        fprintf(stderr, "\n");
    }
    free(x);
    return ok;
}

static int golden_folders, golden_tensors;

static void check_folder(const char *dir)
{
    folder f;
    moq_error err;
    if (!folder_open(&f, dir, NULL, &err)) {
        fprintf(stderr, "%s: %s\n", dir, err.text);
        CHECK(0);
        folder_close(&f);
        return;
    }
    const moq_json *tensors = moq_json_find(moq_json_root(f.expected), "tensors");
    CHECK(tensors && tensors->count > 0);
    for (const moq_json *e = moq_json_first(tensors); e; e = moq_json_next(tensors, e)) {
        CHECK(check_hash(&f, dir, e));
        golden_tensors++;
    }
    for (size_t i = 0; i < f.count; i++) { /* every module binds, also those that are not quantized */
        moq_linear w;
        if (moqi_bind_linear(&f.set, &f.q, &f.modules[i], &w, &err) < 0) { fprintf(stderr, "%s: %s\n", dir, err.text); CHECK(0); }
        CHECK(i == 0 || strcmp(f.modules[i - 1].name, f.modules[i].name) < 0);
    }
    golden_folders++;
    folder_close(&f);
}

static void test_bind_golden_hashes(void)
{
    static const char *const kinds[] = {"modelopt", "compressed-tensors", "foreign"};
    for (size_t i = 0; i < 3; i++) {
        moqi_arena arena = moqi_arena_make(NULL);
        const char **names;
        size_t count;
        moq_error err;
        char dir[1100], path[1200];
        snprintf(dir, sizeof dir, "%s/%s", GOLDEN_DIR, kinds[i]);
        if (moqi_list_dir(dir, &arena, &names, &count, &err) < 0) { fprintf(stderr, "%s\n", err.text); CHECK(0); continue; }
        CHECK(count > 0);
        for (size_t k = 0; k < count; k++) {
            snprintf(path, sizeof path, "%s/%s", dir, names[k]);
            check_folder(path);
        }
        moqi_arena_drop(&arena);
    }
    printf("note: %d golden folders, %d hashes\n", golden_folders, golden_tensors);
    CHECK(golden_folders >= 10 && golden_tensors >= 100);
}

/* ---- golden: what the schemes are called, so that inputs and flags are bound too ---- */

static void test_bind_golden_schemes(void)
{
    static const struct { const char *dir, *module, *scheme; } rows[] = {
        {"modelopt/llama-nvfp4", "model.layers.0.mlp.down_proj", "nvfp4"},
        {"modelopt/llama-nvfp4_mlp_weight_only", "model.layers.0.mlp.down_proj", "w4a16_nvfp4_g32"},
        {"modelopt/llama-nvfp4_svdquant", "model.layers.0.mlp.down_proj", "nvfp4_svd"},
        {"modelopt/llama-nvfp4_awq_lite", "model.layers.0.self_attn.o_proj", "nvfp4_awq"},
        {"modelopt/llama-w4a8_nvfp4_fp8", "model.layers.0.mlp.down_proj", "w4a8_nvfp4_fp8"},
        {"modelopt/llama-w4a8_awq", "model.layers.0.mlp.down_proj", "w4a8_awq"},
        {"modelopt/llama-int4_awq", "model.layers.0.mlp.down_proj", "int4_awq"},
        {"modelopt/llama-mxfp4", "model.layers.0.mlp.down_proj", "mxfp4"},
        {"modelopt/llama-mxfp4_mlp_weight_only", "model.layers.0.mlp.down_proj", "mxfp4"},
        {"modelopt/llama-w4a8_mxfp4_fp8", "model.layers.0.mlp.down_proj", "w4a8_mxfp4_fp8"},
        {"modelopt/llama-mxfp8", "model.layers.0.mlp.down_proj", "mxfp8"},
        {"modelopt/llama-fp8", "model.layers.0.mlp.down_proj", "fp8"},
        {"modelopt/llama-fp8_pc_pt", "model.layers.0.mlp.down_proj", "fp8_pc_pt"},
        {"modelopt/llama-fp8_pb_wo", "model.layers.0.mlp.down_proj", "fp8_pb_wo"},
        {"modelopt/llama-fp8_pb_wo", "model.layers.0.self_attn.k_proj", "fp8_pb_wo"},
        {"modelopt/llama-int8_sq", "model.layers.0.mlp.down_proj", "int8_sq"},
        {"modelopt/llama-int8_wo", "model.layers.0.mlp.down_proj", "w8a16"},
        {"modelopt/llama-none-kv_fp8", "model.embed_tokens", "w8a16_pt"},
        {"modelopt/gpt_oss-nvfp4", "model.layers.0.mlp.experts.gate_up_proj", "nvfp4"},
        {"modelopt/gpt_oss-mxfp4", "model.layers.0.mlp.router", "bf16"},
        {"compressed-tensors/llama-fp8-dynamic", "model.layers.0.mlp.down_proj", "fp8_pc_pt_sbf16"},
        {"compressed-tensors/llama-fp8-block", "model.layers.0.self_attn.k_proj", "fp8_block128_sbf16"},
        {"compressed-tensors/llama-nvfp4a16", "model.layers.0.mlp.down_proj", "w4a16_nvfp4"},
        {"compressed-tensors/llama-mxfp4", "model.layers.0.mlp.down_proj", "mxfp4_arule2"},
        {"compressed-tensors/llama-w4a16-g32-actorder", "model.layers.0.mlp.down_proj", "int4_g32_sbf16_actorder"},
        {"compressed-tensors/llama-w4a16-g32-asym", "model.layers.0.mlp.down_proj", "int4_g32_sbf16_zp"},
        {"compressed-tensors/llama-w4a8-int", "model.layers.0.mlp.gate_proj", "w4a8_int4_g128_sbf16"},
        {"compressed-tensors/llama-hadamard-w4a16-g32", "model.layers.0.mlp.down_proj", "int4_g32_sbf16_hadamard"},
        {"foreign/gpt_oss-mxfp4", "model.layers.0.mlp.experts.down_proj", "w4a16_mxfp4"},
        {"foreign/deepseek_v3-fp8-block", "model.layers.0.mlp.down_proj", "fp8_block128"},
        {"foreign/llama-gptq-int4-g32-descact", "model.layers.0.mlp.down_proj", "int4_g32_sf16_zp_actorder"},
        {"foreign/llama-gptq-int4-g128-sym", "model.layers.0.mlp.down_proj", "int4_g128_sf16_zp"},
        {"foreign/qwen2-awq-g64", "model.layers.0.mlp.down_proj", "int4_g64_sf16_zp"},
    };
    int seen = 0;
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        folder f;
        moq_error err;
        moq_linear w;
        char dir[1100], path[1200], name[80];
        snprintf(dir, sizeof dir, "%s/%s", GOLDEN_DIR, rows[i].dir);
        snprintf(path, sizeof path, "%s/model.safetensors", dir);
        if (!moqi_file_exists(path)) continue; /* only a subset of the folders may be here */
        CHECK(folder_open(&f, dir, NULL, &err));
        const moqi_module *m = folder_find(&f, rows[i].module, strlen(rows[i].module));
        CHECK(m != NULL);
        if (m && moqi_bind_linear(&f.set, &f.q, m, &w, &err) == MOQ_OK) {
            moq_scheme_name(&w.scheme, name, sizeof name);
            CHECK_STR(name, rows[i].scheme);
            CHECK(w.scheme.pre_quant_scale == (w.pre_quant_scale.data != NULL) && (w.scheme.lora_rank > 0) == (w.lora_a.data != NULL));
            CHECK(!w.hadamard_size || (w.hadamard.count == (uint64_t)w.hadamard_size * (uint64_t)w.hadamard_size));
            CHECK((w.scheme.input.has_global || (w.scheme.input.elem && !w.scheme.input.dynamic)) == (w.input_scale > 0));
        } else CHECK(0);
        seen++;
        folder_close(&f);
    }
    CHECK(seen >= 8);
}

static void test_bind_golden_kv(void)
{
    static const struct { const char *dir; moq_kv_format format; int scales, biases; } rows[] = {
        {"modelopt/llama-fp8", MOQ_KV_WIDE, 0, 0},
        {"modelopt/llama-fp8-kv_fp8", MOQ_KV_FP8, 1, 0},
        {"modelopt/llama-nvfp4-kv_fp8_affine", MOQ_KV_FP8_AFFINE, 1, 64},
        {"modelopt/llama-nvfp4-kv_nvfp4", MOQ_KV_NVFP4, 1, 0},
        {"modelopt/llama-nvfp4-kv_nvfp4_affine", MOQ_KV_NVFP4_AFFINE, 1, 64},
        {"modelopt/llama-nvfp4_act_headroom-kv_fp8_cast", MOQ_KV_FP8, 0, 0},
        {"compressed-tensors/llama-fp8-kv", MOQ_KV_FP8, 1, 0},
    };
    int seen = 0;
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        folder f;
        moq_error err;
        moq_kv kv;
        char dir[1100], path[1200];
        snprintf(dir, sizeof dir, "%s/%s", GOLDEN_DIR, rows[i].dir);
        snprintf(path, sizeof path, "%s/model.safetensors", dir);
        if (!moqi_file_exists(path)) continue;
        CHECK(folder_open(&f, dir, NULL, &err));
        CHECK_INT(moqi_bind_kv(&f.set, &f.q, "model.layers.0.self_attn", &kv, &err), MOQ_OK);
        CHECK_INT(kv.format, rows[i].format);
        CHECK_INT(kv.k_scale.count, rows[i].scales);
        CHECK_INT(kv.v_scale.count, rows[i].scales);
        CHECK_INT(kv.k_bias.count, rows[i].biases);
        CHECK_INT(kv.v_bias.count, rows[i].biases);
        seen++;
        folder_close(&f);
    }
    CHECK(seen >= 2);
}

/* ---- modules made in memory ---- */

#define FAKE_MAX 24

typedef struct fake {
    moq_tensor t[FAKE_MAX], sorted[FAKE_MAX];
    size_t n;
    moqi_arena arena, quant_arena;
    moqi_map map;
    moqi_tensor_set set;
    moqi_quant q;
    moq_json_doc *doc, *config;
    const char *file[1];
} fake;

/* `description`: the inner object of hf_quant_config.json, or NULL; `config`: config.json, or NULL */
static void fake_begin(fake *f, const char *description, const char *config)
{
    char text[600];
    moq_error err;
    memset(f, 0, sizeof *f);
    f->quant_arena = moqi_arena_make(NULL);
    f->file[0] = "model.safetensors";
    snprintf(text, sizeof text, "{\"producer\":{\"name\":\"modelopt\",\"version\":\"0.47.0\"},\"quantization\":%s}", description ? description : "{}");
    if (description) f->doc = moq_json_parse(text, strlen(text), MOQ_JSON_CONFIG, 0, "hf_quant_config.json", NULL, &err);
    config = config ? config : "{}";
    f->config = moq_json_parse(config, strlen(config), MOQ_JSON_CONFIG, 0, "config.json", NULL, &err);
    if (!f->config || (description && !f->doc)) fprintf(stderr, "%s\n", err.text);
    moq_result r = moqi_quant_parse(&f->q, moq_json_root(f->config), f->doc ? moq_json_root(f->doc) : NULL, NULL, &f->quant_arena, NULL, &err);
    if (r < 0) { fprintf(stderr, "%s\n", err.text); test_state.broken++; }
}

static void fake_end(fake *f)
{
    for (size_t i = 0; i < f->n; i++) free((void *)(size_t)f->t[i].data);
    moqi_arena_drop(&f->arena);
    moqi_arena_drop(&f->quant_arena);
    moq_json_destroy(f->doc);
    moq_json_destroy(f->config);
}

/* Shape as text, "128,64"; data: an exact-size block; floats get small positive numbers, bytes random ones without E4M3 NaN or sign. */
static uint8_t *fake_add(fake *f, const char *name, moq_dtype dtype, const char *shape)
{
    moq_tensor *t = &f->t[f->n++];
    uint64_t n = 1;
    memset(t, 0, sizeof *t);
    t->name = name;
    t->name_bytes = (uint32_t)strlen(name);
    t->dtype = dtype;
    for (const char *p = shape; *p; p++) {
        char *end;
        t->shape[t->rank] = strtoull(p, &end, 10);
        n *= t->shape[t->rank++];
        p = *end ? end : end - 1;
    }
    t->bytes = n * (uint64_t)moq_dtype_bits(dtype) / 8;
    uint8_t *d = (uint8_t *)malloc(t->bytes ? t->bytes : 1);
    t->data = d;
    for (uint64_t i = 0; i < t->bytes; i++) d[i] = (uint8_t)(test_random() % 112 + 8);
    for (uint64_t i = 0; i < n && dtype == MOQ_F32; i++) {
        float v = 0.01f + 0.001f * (float)(i % 7);
        memcpy(d + 4 * i, &v, 4);
    }
    for (uint64_t i = 0; i < n && dtype == MOQ_BF16; i++) { d[2 * i] = 0x24; d[2 * i + 1] = 0x3c; }
    return d;
}

static int by_name(const void *a, const void *b) { return strcmp(((const moq_tensor *)a)->name, ((const moq_tensor *)b)->name); }

static void fake_index(fake *f, const moq_allocator *a)
{
    moqi_arena_drop(&f->arena);
    f->arena = moqi_arena_make(a);
    memcpy(f->sorted, f->t, sizeof f->t);
    qsort(f->sorted, f->n, sizeof f->sorted[0], by_name);
    if (!moqi_map_make(&f->map, &f->quant_arena, f->n)) test_state.broken++;
    for (size_t i = 0; i < f->n; i++) moqi_map_add(&f->map, f->sorted[i].name, f->sorted[i].name_bytes, (uint32_t)i);
    f->set.list = f->sorted;
    f->set.count = f->n;
    f->set.map = &f->map;
    f->set.files = f->file;
}

/* Collect and bind everything, as moq_open will; *w: the module, if it is there. */
static moq_result fake_bind(fake *f, const char *name, moq_linear *w, const moq_open_desc *desc, moq_error *err)
{
    moqi_module *m;
    size_t count;
    moq_linear any;
    memset(w, 0, sizeof *w);
    fake_index(f, NULL);
    moq_result r = moqi_collect_modules(&f->set, &f->q, &f->arena, &m, &count, desc, err);
    if (r < 0) { CHECK(m == NULL && count == 0); return r; }
    for (size_t i = 0; i < count; i++) {
        if ((r = moqi_bind_linear(&f->set, &f->q, &m[i], &any, err)) < 0) { CHECK(any.codes.data == NULL && any.name == NULL); return r; }
        if (strcmp(m[i].name, name) == 0) *w = any;
    }
    return MOQ_OK;
}

/* Everything in one call: the code and words that the message must hold. A NULL word ends the list. */
static void expect(fake *f, moq_result code, const char *word1, const char *word2, const char *word3)
{
    const char *words[3] = {word1, word2, word3};
    moq_linear w;
    moq_error err;
    memset(&err, 0, sizeof err);
    moq_result r = fake_bind(f, "m", &w, NULL, &err);
    if (r != code) {
        fprintf(stderr, "got %s (%s), expected %s with %s\n", moq_result_name(r), r < 0 ? err.text : "", moq_result_name(code), word1 ? word1 : "");
        test_state.broken++;
    }
    for (int i = 0; i < 3 && r == code && code < 0; i++)
        if (words[i] && !strstr(err.text, words[i])) { fprintf(stderr, "no \"%s\" in: %s\n", words[i], err.text); test_state.broken++; }
    if (r < 0) CHECK(err.code == r && err.object[0]);
    fake_end(f);
}

#define NVFP4 "{\"quant_algo\":\"NVFP4\",\"kv_cache_quant_algo\":null,\"group_size\":16,\"exclude_modules\":[\"lm_head\"]}"
#define FP8 "{\"quant_algo\":\"FP8\",\"kv_cache_quant_algo\":null,\"exclude_modules\":[\"lm_head\"]}"
#define INT4 "{\"quant_algo\":\"W4A16_AWQ\",\"kv_cache_quant_algo\":null,\"group_size\":128,\"has_zero_point\":false,\"pre_quant_scale\":true,\"exclude_modules\":[]}"

static void add_nvfp4(fake *f, const char *skip)
{
    static const struct { const char *name; moq_dtype dtype; const char *shape; } parts[] = {
        {"m.weight", MOQ_U8, "48,32"}, {"m.weight_scale", MOQ_F8_E4M3, "48,4"}, {"m.weight_scale_2", MOQ_F32, ""}, {"m.input_scale", MOQ_F32, ""}};
    for (size_t i = 0; i < MOQI_COUNT(parts); i++)
        if (!skip || strcmp(skip, parts[i].name) != 0) fake_add(f, parts[i].name, parts[i].dtype, parts[i].shape);
}

static void put_f32(uint8_t *p, float v) { memcpy(p, &v, 4); }

static void test_bind_malformed_nvfp4(void)
{
    fake f;
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, NULL);
    expect(&f, MOQ_OK, NULL, NULL, NULL);
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, "m.weight_scale"); fake_add(&f, "m.weight_scale", MOQ_F8_E4M3, "48,2"); /* X1 */
    expect(&f, MOQ_E_SHAPE, "m.weight_scale", "[48, 2]", "[48, 4]");
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, "m.weight_scale"); fake_add(&f, "m.weight_scale", MOQ_F32, "48,4"); /* X2 */
    expect(&f, MOQ_E_DTYPE, "m.weight_scale", "F32", "F8_E4M3");
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, "m.weight_scale"); fake_add(&f, "m.weight_scale", MOQ_F8_E4M3, "128,4"); /* X3 */
    expect(&f, MOQ_E_SHAPE, "m.weight_scale", "[128, 4]", "engine layout, not a ModelOpt export");
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, "m.weight_scale_2"); /* X4 */
    expect(&f, MOQ_E_MISSING, "m.weight_scale_2", "m.weight", NULL);
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, "m.weight_scale_2"); fake_add(&f, "m.weight_scale_2", MOQ_F32, "1"); /* X5 */
    expect(&f, MOQ_OK, NULL, NULL, NULL);
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, "m.weight_scale_2"); fake_add(&f, "m.weight_scale_2", MOQ_F32, "48");
    expect(&f, MOQ_E_SHAPE, "m.weight_scale_2", "[48]", NULL);
    fake_begin(&f, NVFP4, NULL); fake_add(&f, "m.weight", MOQ_U8, "48,12"); fake_add(&f, "m.weight_scale", MOQ_F8_E4M3, "48,2"); fake_add(&f, "m.weight_scale_2", MOQ_F32, "");
    expect(&f, MOQ_E_SHAPE, "m.weight", "24", "16"); /* X6 */
    fake_begin(&f, "{\"quant_algo\":\"W4A16_NVFP4\",\"kv_cache_quant_algo\":null,\"group_size\":32}", NULL); add_nvfp4(&f, NULL); /* K8 */
    expect(&f, MOQ_E_MISMATCH, "'m'", "32", "16");
    fake_begin(&f, "{\"quant_algo\":\"W4A16_NVFP4\",\"kv_cache_quant_algo\":null,\"group_size\":32}", NULL); add_nvfp4(&f, NULL);
    expect(&f, MOQ_E_MISMATCH, "hf_quant_config.json: layer", "asks for groups of 32 (group_size)", "has groups of 16"); /* the file to mend */
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, "m.weight_scale"); /* X19 */
    expect(&f, MOQ_E_MISSING, "m.weight_scale", NULL, NULL);
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, "m.weight_scale"); fake_add(&f, "m.weight_scale", MOQ_F8_E4M3, "48"); /* rank */
    expect(&f, MOQ_E_SHAPE, "m.weight_scale", "[48]", NULL);
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, "m.weight"); fake_add(&f, "m.weight", MOQ_U8, "0,32");
    expect(&f, MOQ_E_SHAPE, "m.weight", "[0, 32]", NULL);
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, NULL); fake_add(&f, "m.weight_packed", MOQ_U8, "48,32"); /* X16 */
    expect(&f, MOQ_E_DUPLICATE, "m.weight_packed", "m.weight", NULL);
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, NULL); fake_add(&f, "m.bias", MOQ_BF16, "47"); /* X21 */
    expect(&f, MOQ_E_SHAPE, "m.bias", "[47]", "[48]");
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, NULL); fake_add(&f, "m.pre_quant_scale", MOQ_BF16, "1"); /* X13 */
    expect(&f, MOQ_E_SHAPE, "m.pre_quant_scale", "[1]", "[64]");
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, NULL); fake_add(&f, "m.pre_quant_scale", MOQ_BF16, "48");
    expect(&f, MOQ_E_SHAPE, "m.pre_quant_scale", "[48]", "[64]");
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, NULL); fake_add(&f, "m.svdquant_lora_a", MOQ_BF16, "8,64");
    expect(&f, MOQ_E_MISSING, "m.svdquant_lora_b", NULL, NULL);
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, NULL); fake_add(&f, "m.svdquant_lora_a", MOQ_BF16, "8,64"); fake_add(&f, "m.svdquant_lora_b", MOQ_BF16, "48,4");
    expect(&f, MOQ_E_SHAPE, "m.svdquant_lora_b", "[48, 4]", "[48, 8]");
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, NULL); fake_add(&f, "n.weight", MOQ_F8_E4M3, "64"); /* X24 */
    expect(&f, MOQ_E_DTYPE, "n.weight", "F8_E4M3", NULL);
}

static void test_bind_malformed_others(void)
{
    fake f;
    static const struct { const char *weight; moq_dtype wd; const char *scale; moq_dtype sd; moq_result code; const char *name; } fp8[] = {
        {"48,64", MOQ_F8_E4M3, "", MOQ_F32, MOQ_OK, NULL},
        {"48,64", MOQ_F8_E4M3, "1,1,1,1", MOQ_F32, MOQ_OK, NULL},
        {"48,64", MOQ_F8_E4M3, "48", MOQ_F32, MOQ_OK, NULL},                        /* X8 */
        {"48,64", MOQ_F8_E4M3, "48,1", MOQ_BF16, MOQ_OK, NULL},
        {"48,64", MOQ_F8_E4M3, "64", MOQ_F32, MOQ_E_SHAPE, "m.weight_scale"},
        {"48,64", MOQ_I8, "", MOQ_F32, MOQ_E_DTYPE, "m.weight"},                    /* X7 */
        {"48,64", MOQ_U8, "", MOQ_F32, MOQ_E_DTYPE, "m.weight"},
        {"48,64", MOQ_F8_E5M2, "", MOQ_F32, MOQ_E_UNSUPPORTED, "m.weight"},         /* X10 */
        {"48,64", MOQ_F8_E4M3, "", MOQ_I32, MOQ_E_DTYPE, "m.weight_scale"},
        {"130,257", MOQ_F8_E4M3, "2,1,3,1", MOQ_F32, MOQ_OK, NULL},
        {"130,257", MOQ_F8_E4M3, "2,3", MOQ_F32, MOQ_OK, NULL},
        {"130,257", MOQ_F8_E4M3, "2,1,2,1", MOQ_F32, MOQ_E_SHAPE, "m.weight_scale"}, /* X9 */
        {"130,257", MOQ_F8_E4M3, "1,3", MOQ_F32, MOQ_E_SHAPE, "m.weight_scale"},
        {"130,257", MOQ_F8_E4M3, "2,3", MOQ_U8, MOQ_E_DTYPE, "m.weight_scale"},
    };
    for (size_t i = 0; i < MOQI_COUNT(fp8); i++) {
        fake_begin(&f, FP8, NULL);
        fake_add(&f, "m.weight", fp8[i].wd, fp8[i].weight);
        fake_add(&f, "m.weight_scale", fp8[i].sd, fp8[i].scale);
        expect(&f, fp8[i].code, fp8[i].name, fp8[i].code < 0 ? "expected" : NULL, NULL);
    }
    static const struct { const char *weight, *scale; moq_result code; const char *word; } int4[] = {
        {"24,256", "48,2", MOQ_OK, NULL},
        {"48,128", "48,2", MOQ_E_SHAPE, "[24, 256]"}, /* X11, K16: halved along the columns */
        {"24,256", "49,2", MOQ_E_SHAPE, "even"},      /* X12 */
        {"24,256", "48,4", MOQ_E_MISMATCH, "128"},
        {"24,200", "48,2", MOQ_E_SHAPE, "200"},
    };
    for (size_t i = 0; i < MOQI_COUNT(int4); i++) {
        fake_begin(&f, INT4, NULL);
        fake_add(&f, "m.weight", MOQ_U8, int4[i].weight);
        fake_add(&f, "m.weight_scale", MOQ_F32, int4[i].scale);
        expect(&f, int4[i].code, "m", int4[i].word, NULL);
    }
    static const struct { const char *weight; moq_dtype wd; const char *scale; moq_dtype sd; moq_result code; } stacks[] = {
        {"3,32,48", MOQ_U8, "3,4,48", MOQ_F8_E4M3, MOQ_OK},
        {"3,32,48", MOQ_U8, "3,48,4", MOQ_F8_E4M3, MOQ_E_SHAPE}, /* X20: not transposed as the codes are */
        {"3,32,48", MOQ_U8, "4,4,48", MOQ_F8_E4M3, MOQ_E_SHAPE},
        {"3,32,48", MOQ_U8, "3,32,3", MOQ_U8, MOQ_OK},
        {"3,32,48", MOQ_U8, "3,2,48", MOQ_U8, MOQ_E_SHAPE},
        {"3,64,48", MOQ_F8_E4M3, "", MOQ_F32, MOQ_OK},
        {"3,64,48", MOQ_F8_E4M3, "3", MOQ_F32, MOQ_OK},
        {"3,64,48", MOQ_F8_E4M3, "3,48", MOQ_F32, MOQ_OK},
        {"3,64,48", MOQ_F8_E4M3, "3,64", MOQ_F32, MOQ_E_SHAPE},
        {"3,32,48", MOQ_U8, "3,64,2", MOQ_F32, MOQ_E_UNSUPPORTED},
    };
    for (size_t i = 0; i < MOQI_COUNT(stacks); i++) {
        fake_begin(&f, NULL, NULL);
        fake_add(&f, "a.experts.down_proj", stacks[i].wd, stacks[i].weight);
        fake_add(&f, "a.experts.down_proj_weight_scale", stacks[i].sd, stacks[i].scale);
        if (stacks[i].sd == MOQ_F8_E4M3) fake_add(&f, "a.experts.down_proj_weight_scale_2", MOQ_F32, i & 1 ? "3" : "");
        expect(&f, stacks[i].code, "a.experts.down_proj", NULL, NULL);
    }
    fake_begin(&f, NULL, NULL); fake_add(&f, "a.experts.down_proj_blocks", MOQ_U8, "3,48,2,16"); fake_add(&f, "a.experts.down_proj_scales", MOQ_U8, "3,48,3");
    expect(&f, MOQ_E_SHAPE, "a.experts.down_proj_scales", "[3, 48, 3]", "[3, 48, 2]");
    fake_begin(&f, NULL, NULL); fake_add(&f, "a.experts.down_proj_blocks", MOQ_U8, "3,48,2,16");
    expect(&f, MOQ_E_MISSING, "a.experts.down_proj_scales", NULL, NULL);
}

static void test_bind_malformed_packed(void)
{
    fake f;
    int64_t shape[2] = {48, 64};
    static const struct { const char *packed, *scale, *zero, *order; moq_result code; const char *word; } rows[] = {
        {"48,8", "48,2", NULL, NULL, MOQ_OK, NULL},
        {"48,8", "48,2", "6,2", NULL, MOQ_OK, NULL},
        {"48,8", "48,2", "48,2", NULL, MOQ_E_SHAPE, "weight_zero_point"},
        {"48,9", "48,2", NULL, NULL, MOQ_E_SHAPE, "weight_packed"},
        {"47,8", "48,2", NULL, NULL, MOQ_E_SHAPE, "weight_shape"},
        {"48,8", "47,2", NULL, NULL, MOQ_E_SHAPE, "weight_scale"},
        {"48,8", "48,4", NULL, NULL, MOQ_E_MISMATCH, "32"},
        {"48,8", "48,2", NULL, "63", MOQ_E_SHAPE, "weight_g_idx"},
        {"48,8", "48,2", NULL, "64", MOQ_E_MISMATCH, "weight_g_idx"}, /* random numbers: out of range */
    };
    static const char config[] = "{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":"
        "{\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":4,\"type\":\"int\",\"strategy\":\"group\",\"group_size\":32,\"symmetric\":true}}},\"ignore\":[],\"version\":\"0.20.0\"}}";
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        fake_begin(&f, NULL, config);
        fake_add(&f, "m.weight_packed", MOQ_I32, rows[i].packed);
        fake_add(&f, "m.weight_scale", MOQ_BF16, rows[i].scale);
        memcpy(fake_add(&f, "m.weight_shape", MOQ_I64, "2"), shape, sizeof shape);
        if (rows[i].zero) fake_add(&f, "m.weight_zero_point", MOQ_I32, rows[i].zero);
        if (rows[i].order) fake_add(&f, "m.weight_g_idx", MOQ_I32, rows[i].order);
        expect(&f, rows[i].code, "m.", rows[i].word, NULL);
    }
    fake_begin(&f, NULL, config); fake_add(&f, "m.weight_packed", MOQ_I32, "48,8"); fake_add(&f, "m.weight_scale", MOQ_BF16, "48,2");
    expect(&f, MOQ_E_MISSING, "m.weight_shape", NULL, NULL);
    fake_begin(&f, NULL, config); fake_add(&f, "m.weight_packed", MOQ_I32, "48,8"); fake_add(&f, "m.weight_scale", MOQ_BF16, "48,2");
    shape[1] = INT64_MAX; memcpy(fake_add(&f, "m.weight_shape", MOQ_I64, "2"), shape, sizeof shape);
    expect(&f, MOQ_E_SHAPE, "m.weight_shape", NULL, NULL);
    fake_begin(&f, NULL, NULL); fake_add(&f, "m.qweight", MOQ_I32, "64,6"); fake_add(&f, "m.scales", MOQ_F16, "2,48"); fake_add(&f, "m.qzeros", MOQ_I32, "2,5");
    expect(&f, MOQ_E_SHAPE, "m.qzeros", "[2, 5]", "[2, 6]");
    fake_begin(&f, NULL, NULL); fake_add(&f, "m.qweight", MOQ_I32, "64,7"); fake_add(&f, "m.scales", MOQ_F16, "2,48"); fake_add(&f, "m.qzeros", MOQ_I32, "2,6");
    expect(&f, MOQ_E_SHAPE, "m.qweight", NULL, NULL);
    fake_begin(&f, NULL, NULL); fake_add(&f, "m.qweight", MOQ_I32, "64,6"); fake_add(&f, "m.qzeros", MOQ_I32, "2,6");
    expect(&f, MOQ_E_MISSING, "m.scales", NULL, NULL);
    fake_begin(&f, NULL, NULL); fake_add(&f, "m.qweight", MOQ_I32, "8,48"); fake_add(&f, "m.scales", MOQ_F16, "2,48");
    expect(&f, MOQ_E_UNSUPPORTED, "m.qweight", NULL, NULL);
}

/* N rows: values of scales that multiply a whole tensor. */
static void test_bind_scalar_values(void)
{
    static const struct { const char *tensor; uint32_t bits; int zero_codes; moq_result code; } rows[] = {
        {"m.weight_scale_2", 0x7fc00000u, 0, MOQ_E_SCALE}, {"m.weight_scale_2", 0x7f800000u, 0, MOQ_E_SCALE}, /* N1 */
        {"m.weight_scale_2", 0xff800000u, 0, MOQ_E_SCALE}, {"m.weight_scale_2", 0x7f800001u, 0, MOQ_E_SCALE},
        {"m.weight_scale_2", 0, 0, MOQ_E_SCALE},  /* N2 */
        {"m.weight_scale_2", 0, 1, MOQ_OK},       /* N3 */
        {"m.weight_scale_2", 0xbf800000u, 0, MOQ_E_SCALE}, {"m.weight_scale_2", 0x80000000u, 0, MOQ_E_SCALE}, /* N4 */
        {"m.weight_scale_2", 0x00011111u, 0, MOQ_OK}, /* N5: subnormal */
        {"m.input_scale", 0x7fc00000u, 0, MOQ_E_SCALE}, {"m.input_scale", 0, 1, MOQ_E_SCALE}, /* N13 */
        {"m.input_scale", 0x7f7fffffu, 0, MOQ_OK},
    };
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        fake f;
        fake_begin(&f, NVFP4, NULL);
        add_nvfp4(&f, rows[i].tensor);
        memcpy(fake_add(&f, rows[i].tensor, MOQ_F32, ""), &rows[i].bits, 4);
        for (size_t k = 0; k < f.n && rows[i].zero_codes; k++)
            if (strcmp(f.t[k].name, "m.weight") == 0) memset((void *)(size_t)f.t[k].data, 0x80, (size_t)f.t[k].bytes); /* 0 and -0 */
        expect(&f, rows[i].code, rows[i].tensor, "value", NULL);
    }
    for (int i = 0; i < 3; i++) { /* a scalar scale of FP8; a global scale as a divisor; KV */
        fake f;
        moq_kv kv;
        moq_error err;
        fake_begin(&f, i == 2 ? "{\"quant_algo\":\"FP8\",\"kv_cache_quant_algo\":\"FP8\"}" : NULL, NULL);
        fake_add(&f, i == 1 ? "m.weight_packed" : "m.weight", i == 1 ? MOQ_U8 : MOQ_F8_E4M3, "32,32");
        uint8_t *s = fake_add(&f, "m.weight_scale", i == 1 ? MOQ_F8_E4M3 : MOQ_F32, i == 1 ? "32,4" : "");
        if (i == 1) put_f32(fake_add(&f, "m.weight_global_scale", MOQ_F32, "1"), -2.0f);
        if (i == 0) put_f32(s, -1.0f);
        if (i == 2) {
            put_f32(fake_add(&f, "m.k_proj.k_scale", MOQ_F32, ""), 0.0f);
            fake_index(&f, NULL);
            CHECK_INT(moqi_bind_kv(&f.set, &f.q, "m", &kv, &err), MOQ_E_SCALE); /* N16 */
            CHECK(strstr(err.text, "m.k_proj.k_scale") && kv.format == MOQ_KV_WIDE);
            fake_end(&f);
        } else expect(&f, MOQ_E_SCALE, "m.weight", "value is -", NULL);
    }
}

/* ---- findings ---- */

static char found[4096];

static void take_finding(void *user, moq_log_level level, moq_result code, const char *text)
{
    (void)user; (void)level; (void)code;
    size_t n = strlen(found);
    snprintf(found + n, sizeof found - n, "%s\n", text);
}

static void expect_finding(fake *f, const char *word1, const char *word2)
{
    moq_open_desc desc;
    moq_linear w;
    moq_error err;
    memset(&desc, 0, sizeof desc);
    desc.log = take_finding;
    found[0] = 0;
    moq_result r = fake_bind(f, "m", &w, &desc, &err);
    if (r < 0) fprintf(stderr, "%s\n", err.text);
    CHECK_INT(r, MOQ_OK);
    if (word1 ? !strstr(found, word1) || !strstr(found, word2) : found[0] != 0) { fprintf(stderr, "found: %s\n", found); CHECK(0); }
    fake_end(f);
}

static void test_bind_findings(void)
{
    fake f;
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, NULL);
    expect_finding(&f, NULL, NULL);
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, NULL); fake_add(&f, "n.weight_scale", MOQ_F32, "48"); /* X17 */
    expect_finding(&f, "n.weight_scale", "not there");
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, NULL); fake_add(&f, "lm_head.weight", MOQ_F8_E4M3, "64,64"); fake_add(&f, "lm_head.weight_scale", MOQ_F32, "");
    expect_finding(&f, "lm_head.weight", "excludes"); /* Q10, K15 */
    fake_begin(&f, "{\"quant_algo\":\"MXFP8\",\"kv_cache_quant_algo\":null,\"group_size\":32}", NULL);
    fake_add(&f, "m.weight", MOQ_F8_E4M3, "48,64"); fake_add(&f, "m.weight_scale", MOQ_F8_E8M0, "48,2");
    expect_finding(&f, "m.weight_scale", "F8_E8M0"); /* X14 */
    fake_begin(&f, "{\"quant_algo\":\"W8A16\",\"kv_cache_quant_algo\":null}", NULL);
    fake_add(&f, "m.weight", MOQ_I8, "48,64"); fake_add(&f, "m.weight_scale", MOQ_F32, "1");
    expect_finding(&f, "m.weight_scale", "one scale for all rows"); /* X15 */
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, "m.input_scale");
    expect_finding(&f, "'m'", "input_scale"); /* N14 */
    fake_begin(&f, NVFP4, NULL); add_nvfp4(&f, "m.weight_scale_2"); memcpy(fake_add(&f, "m.weight_scale_2", MOQ_F32, ""), "\x01\0\0", 4);
    expect_finding(&f, "m.weight_scale_2", "subnormal"); /* N5 */
}

/* ---- modules: which tensors carry one, in which order ---- */

static void test_bind_modules(void)
{
    static const char *const want[] = {"a", "a-b", "a.experts.down_proj", "a.moe.up_proj", "conv", "q"};
    fake f;
    moqi_module *m = NULL;
    size_t count = 0;
    moq_error err;
    fake_begin(&f, NULL, NULL);
    fake_add(&f, "a-b.weight", MOQ_BF16, "8,8");
    fake_add(&f, "a.weight", MOQ_BF16, "8,8");
    fake_add(&f, "a.v_input.weight", MOQ_F32, "4,4");
    fake_add(&f, "a.experts.down_proj", MOQ_BF16, "2,8,8");
    fake_add(&f, "a.experts.down_proj_bias", MOQ_BF16, "2,8");
    fake_add(&f, "a.moe.up_proj.weight", MOQ_BF16, "2,8,8");
    fake_add(&f, "a.norm.weight", MOQ_BF16, "8");
    fake_add(&f, "c.conv1d.weight", MOQ_BF16, "8,1,4");
    fake_add(&f, "c.A_log", MOQ_BF16, "8,8");
    fake_add(&f, "conv.weight", MOQ_F16, "8,8");
    fake_add(&f, "patch.weight", MOQ_BF16, "8,3,4,4");
    fake_add(&f, "q.weight", MOQ_F32, "8,4");
    fake_index(&f, NULL);
    CHECK_INT(moqi_collect_modules(&f.set, &f.q, &f.arena, &m, &count, NULL, &err), MOQ_OK);
    CHECK_INT(count, MOQI_COUNT(want));
    for (size_t i = 0; i < count && i < MOQI_COUNT(want); i++) CHECK_STR(m[i].name, want[i]);
    for (size_t i = 0; i < count; i++) {
        moq_linear w;
        CHECK_INT(moqi_bind_linear(&f.set, &f.q, &m[i], &w, &err), MOQ_OK);
        float x[128];
        moq_dequantize(&w, 0, w.rows * (w.experts ? w.experts : 1), x);
    }
    fake_end(&f);
}

static void test_bind_kv_spellings(void)
{
    static const struct { const char *k, *v; } rows[] = {
        {"m.k_proj.k_scale", "m.v_proj.v_scale"}, {"m.k_scale", "m.v_scale"}, {"m.attn.k_scale", "m.attn.v_scale"},
        {"m.qkv_proj.k_scale", "m.qkv_proj.v_scale"}, {"m.qkqkv_proj.k_scale", "m.qkqkv_proj.v_scale"}, {"m.kv_scale", NULL}, {"m.k_proj.k_scale", NULL}};
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        fake f;
        moq_kv kv;
        moq_error err;
        fake_begin(&f, "{\"quant_algo\":null,\"kv_cache_quant_algo\":\"FP8\",\"quantized_layers\":{}}", NULL);
        fake_add(&f, rows[i].k, MOQ_F32, i == 1 ? "4,1,1" : "1"); /* one for each head */
        if (rows[i].v) fake_add(&f, rows[i].v, MOQ_BF16, "");
        fake_index(&f, NULL);
        CHECK_INT(moqi_bind_kv(&f.set, &f.q, "m", &kv, &err), MOQ_OK);
        CHECK(kv.format == MOQ_KV_FP8 && kv.k_scale.count == (i == 1 ? 4u : 1u) && kv.v_scale.data && !kv.k_bias.data);
        CHECK(rows[i].v || kv.v_scale.data == kv.k_scale.data);
        CHECK_INT(moqi_bind_kv(&f.set, &f.q, "other", &kv, &err), MOQ_OK);
        CHECK(kv.format == MOQ_KV_FP8 && !kv.k_scale.data && !kv.v_scale.data); /* 1 */
        fake_end(&f);
    }
}

/* compressed-tensors stores global scales as divisors; input_scale is a multiplier everywhere. */
static void test_bind_divisors(void)
{
    static const char config[] = "{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"format\":\"nvfp4-pack-quantized\",\"config_groups\":{\"group_0\":"
        "{\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":4,\"type\":\"float\",\"strategy\":\"tensor_group\",\"group_size\":16},\"input_activations\":{\"num_bits\":4,"
        "\"type\":\"float\",\"strategy\":\"tensor_group\",\"group_size\":16,\"dynamic\":\"local\"}}},\"ignore\":[],\"version\":\"0.20.0\"}}";
    fake f;
    moq_linear w;
    moq_error err;
    for (int i = 0; i < 2; i++) {
        fake_begin(&f, NULL, config);
        fake_add(&f, "m.weight_packed", MOQ_U8, "48,32");
        fake_add(&f, "m.weight_scale", MOQ_F8_E4M3, "48,4");
        put_f32(fake_add(&f, "m.weight_global_scale", MOQ_F32, "1"), 1500.0f);
        if (i == 0) put_f32(fake_add(&f, "m.input_global_scale", MOQ_F32, "1"), 4.0f);
        if (i == 1) { expect(&f, MOQ_E_MISSING, "m.input_global_scale", NULL, NULL); break; }
        CHECK_INT(fake_bind(&f, "m", &w, NULL, &err), MOQ_OK);
        CHECK(w.global_mul == 1 && w.global_div == 1500.0f && w.input_scale == 0.25f);
        fake_end(&f);
    }
}

/* Whatever binds must be safe to read to its last element: random dtypes and shapes around the right ones, exact blocks, sanitizers. */
static void test_bind_random_shapes(void)
{
    static const char *const codes[] = {"m.weight", "m.weight_packed", "m.qweight", "m.experts.up_proj", "m.experts.up_proj_blocks"};
    static const char *const parts[5][7] = {
        {"m.weight_scale", "m.weight_scale_2", "m.input_scale", "m.bias", "m.weight_zero_point", "m.pre_quant_scale", "m.weight_scale_inv"},
        {"m.weight_scale", "m.weight_global_scale", "m.weight_shape", "m.weight_zero_point", "m.weight_g_idx", "m.bias", "m.input_zero_point"},
        {"m.scales", "m.qzeros", "m.g_idx", "m.bias", "m.input_scale", "m.weight_scale", "m.weight_shape"},
        {"m.experts.up_proj_weight_scale", "m.experts.up_proj_weight_scale_2", "m.experts.up_proj_input_scale", "m.experts.up_proj_bias", "m.x", "m.y", "m.z"},
        {"m.experts.up_proj_scales", "m.experts.up_proj_bias", "m.experts.up_proj_weight_scale", "m.x", "m.y", "m.z", "m.w"}};
    static const moq_dtype dtypes[] = {MOQ_U8, MOQ_F8_E4M3, MOQ_I8, MOQ_BF16, MOQ_F32, MOQ_I32, MOQ_F16, MOQ_F8_E8M0, MOQ_I64};
    int bound = 0, layouts = 0;
    uint32_t seen[64];
    for (int round = 0; round < 30000; round++) {
        fake f;
        moq_error err;
        moqi_module *m;
        size_t count;
        uint32_t kind = test_random() % 5;
        static const int some[] = {32, 64, 96, 40, 160};
        int rows0 = some[test_random() % 5], cols0 = some[test_random() % 5], g = test_random() & 1 ? 16 : 32; /* the sizes that one layer would have */
        int sizes[14] = {rows0, rows0, rows0, cols0, cols0, rows0 / 2, cols0 / 2, cols0 / g, cols0 / g, rows0 / g, rows0 / 8, cols0 / 8, 1, (int)(test_random() % 40) + 1};
        fake_begin(&f, NULL, NULL);
        for (int i = -1; i < 7; i++) {
            char shape[64];
            size_t n = 0;
            int rank = i < 0 ? (kind == 4 ? 4 : kind == 3 || test_random() % 8 == 0 ? 3 : 2)
                             : i == 0 && test_random() % 3 ? (kind > 2 ? 3 : 2) : i == 1 && test_random() % 2 ? 0 : (int)(test_random() % 4);
            if (i >= 0 && test_random() % 20 >= (uint32_t)(i == 0 ? 19 : i < 3 ? 10 : 2)) continue;
            shape[0] = 0;
            int dims[4];
            for (int k = 0; k < 4; k++) dims[k] = sizes[test_random() % 14];
            if (test_random() % 4) dims[rank - 2 > 0 ? rank - 2 : 0] = rows0; /* mostly the rows first */
            for (int k = 0; k < rank; k++)
                n += (size_t)snprintf(shape + n, sizeof shape - n, k ? ",%d" : "%d", k == 3 ? 16 : k == 0 && rank > 2 ? 2 : dims[k]);
            moq_dtype d = dtypes[test_random() % (i < 0 ? 4 : MOQI_COUNT(dtypes))];
            if (i == 1 && rank == 0) d = MOQ_F32;
            if (i < 0 && kind == 2) d = MOQ_I32;
            if (i < 0 && kind == 4) d = MOQ_U8;
            uint8_t *p = fake_add(&f, i < 0 ? codes[kind] : parts[kind][i], d, shape);
            const moq_tensor *t = &f.t[f.n - 1];
            if (d == MOQ_I64 && t->bytes == 16) { int64_t v[2] = {sizes[test_random() % 14], sizes[test_random() % 14]}; memcpy(p, v, 16); }
            if (d == MOQ_I32 && i >= 0 && (test_random() & 1)) for (uint64_t k = 0; k < t->bytes; k += 4) { int32_t v = (int32_t)(test_random() % 5) - 1; memcpy(p + k, &v, 4); }
        }
        fake_index(&f, NULL);
        if (moqi_collect_modules(&f.set, &f.q, &f.arena, &m, &count, NULL, &err) == MOQ_OK)
            for (size_t i = 0; i < count; i++) {
                moq_linear w;
                if (moqi_bind_linear(&f.set, &f.q, &m[i], &w, &err) < 0) { CHECK(err.text[0] && err.object[0]); continue; }
                int64_t rows = w.rows * (w.experts ? w.experts : 1);
                float *x = (float *)malloc(sizeof(float) * (size_t)(rows * w.cols));
                moq_dequantize(&w, 0, rows, x);
                free(x);
                CHECK(!w.bias.data || w.bias.count == (uint64_t)rows);
                CHECK(!w.pre_quant_scale.data || w.pre_quant_scale.count == (uint64_t)w.cols);
                if (!moq_scheme_is_quantized(&w.scheme)) continue;
                uint32_t kinds = kind << 16 | (uint32_t)w.scheme.weight.elem << 8 | (uint32_t)w.scheme.weight.scale;
                int k = 0;
                while (k < layouts && seen[k] != kinds) k++;
                if (k == layouts && layouts < 64) seen[layouts++] = kinds;
                bound++;
            }
        fake_end(&f);
    }
    CHECK(bound >= 100 && layouts >= 12);
    if (bound < 100 || layouts < 12) fprintf(stderr, "%d bound, %d kinds\n", bound, layouts);
}

static void test_bind_failing_allocations(void)
{
    fake f;
    moq_error err;
    moq_allocator a = test_allocator();
    long tries = 0;
    fake_begin(&f, NVFP4, NULL);
    add_nvfp4(&f, NULL);
    fake_add(&f, "b.v_input.weight", MOQ_F32, "4,4");
    fake_add(&f, "b.weight", MOQ_BF16, "8,8");
    for (long k = 1; k < 100; k++) {
        moqi_module *m = (moqi_module *)(void *)&f;
        size_t count = 7;
        fake_index(&f, &a);
        test_state.fail_at = k;
        moq_result r = moqi_collect_modules(&f.set, &f.q, &f.arena, &m, &count, NULL, &err);
        int reached = test_state.fail_at == 0;
        test_state.fail_at = 0;
        moqi_arena_drop(&f.arena);
        CHECK_INT(test_state.live_allocs, 0);
        if (!reached) { CHECK(r == MOQ_OK && count == 2); break; }
        CHECK(r == MOQ_E_NOMEM && m == NULL && count == 0 && strstr(err.text, "memory"));
        tries++;
    }
    CHECK(tries > 0);
    fake_end(&f);
}

/* A folder whose description asks for zero points or an activation order must hold them: the tensor's name is spoilt in the header. */
static void check_required(const char *dir, const char *part)
{
    moq_error err;
    size_t config_bytes = 0, model_bytes = 0, n = strlen(part);
    char path[1200];
    snprintf(path, sizeof path, "%s/%s/config.json", GOLDEN_DIR, dir);
    char *config = moq_read_file(path, 1 << 20, NULL, &config_bytes, &err);
    snprintf(path, sizeof path, "%s/%s/model.safetensors", GOLDEN_DIR, dir);
    char *model = moq_read_file(path, 1 << 24, NULL, &model_bytes, &err);
    CHECK(config && model);
    if (config && model) {
        for (size_t i = 8; i + n < model_bytes; i++)
            if (memcmp(model + i, part, n) == 0) model[i + n - 1] = 'q';
        moq_file files[2] = {{"config.json", config, config_bytes}, {"model.safetensors", model, model_bytes}};
        moq_checkpoint *ck = moq_open_memory(files, 2, NULL, &err);
        CHECK(ck == NULL && err.code == MOQ_E_MISSING && strstr(err.text, part));
        moq_close(ck);
    }
    moq_release(NULL, config, config_bytes + 1);
    moq_release(NULL, model, model_bytes + 1);
}

static void test_bind_missing_parts(void)
{
    check_required("compressed-tensors/llama-w4a16-g32-asym", "weight_zero_point");
    check_required("compressed-tensors/llama-w4a16-g32-actorder", "weight_g_idx");
    check_required("foreign/llama-awq-g128", "qzeros");
    check_required("foreign/llama-gptq-int4-g32-descact", "g_idx");
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_bind_golden_hashes);
    RUN(test_bind_golden_schemes);
    RUN(test_bind_golden_kv);
    RUN(test_bind_malformed_nvfp4);
    RUN(test_bind_malformed_others);
    RUN(test_bind_malformed_packed);
    RUN(test_bind_scalar_values);
    RUN(test_bind_findings);
    RUN(test_bind_modules);
    RUN(test_bind_kv_spellings);
    RUN(test_bind_divisors);
    RUN(test_bind_random_shapes);
    RUN(test_bind_failing_allocations);
    RUN(test_bind_missing_parts);
    return test_end();
}
