/* test_recipes.c - every recipe of the table, from tokens to a folder that opens and computes; SVDQuant against ModelOpt's factors. */
#define MOQ_QUANTIZE
#include "test.h"
#include "golden.h"

#include <unistd.h>

/* Rows of random tokens of every word: what is measured here needs no particular text. */
typedef struct token_set { int32_t tokens[8][24]; const int32_t *rows[8]; int32_t lengths[8]; llm_samples samples; } token_set;

static void make_tokens(token_set *g, uint32_t words)
{
    memset(g, 0, sizeof *g);
    for (int i = 0; i < 8; i++) {
        for (int k = 0; k < 24; k++) g->tokens[i][k] = (int32_t)(test_random() % words);
        g->rows[i] = g->tokens[i];
        g->lengths[i] = 24;
    }
    g->samples.rows = g->rows;
    g->samples.lengths = g->lengths;
    g->samples.count = 8;
    g->samples.batch = 4;
}

/* Logits of one row, [24, vocab]; free with free(). */
static float *logits_of(const char *dir, const token_set *g, int64_t *count)
{
    llm_desc d;
    moq_error err;
    memset(&d, 0, sizeof d);
    d.path = dir;
    d.context = 32;
    d.no_tokenizer = 1;
    d.threads = 1;
    llm *m = llm_open(&d, &err);
    if (!m) { printf("  %s: %s\n", dir, err.text); return NULL; }
    *count = 24 * (int64_t)llm_get_info(m)->vocab;
    float *out = (float *)malloc((size_t)*count * sizeof *out);
    if (llm_forward(m, 0, g->rows[0], 24, 0, out, NULL, &err) < 0) { printf("  %s: %s\n", dir, err.text); free(out); out = NULL; }
    llm_close(m);
    return out;
}

/* The source that has what a recipe covers. */
static const char *source_for(const char *recipe)
{
    if (strncmp(recipe, "mamba", 5) == 0) return "nemotron_h";
    return strstr(recipe, "experts_only") ? "qwen3_moe" : "llama";
}

/* Is every quantized layer of the folder what the recipe says (or, where names are given, as its name among them)? Returns how many there are. */
static int64_t check_layers(const moq_checkpoint *ck, const moq_recipe *recipe, const char *const (*names)[2])
{
    int64_t layers = 0;
    for (size_t i = 0; i < moq_module_count(ck); i++) {
        moq_linear w;
        moq_error err;
        char text[200];
        const char *want = NULL;
        if (moq_get_module(ck, i, &w, &err) != MOQ_OK) { printf("  %s\n", err.text); CHECK(0); continue; }
        moq_scheme_name(&w.scheme, text, sizeof text);
        for (size_t k = 0; names && names[k][0]; k++)
            if (moq_glob_match(names[k][0], w.name)) want = names[k][1];
        if (want && strcmp(text, want) != 0) printf("  %s is %s, expected %s\n", w.name, text, want);
        CHECK(!names || (want && strcmp(text, want) == 0));
        if (!moq_scheme_is_quantized(&w.scheme)) continue;
        layers++;
        if (names) continue;
        const moq_coding *have = &w.scheme.weight, *plan = &recipe->scheme.weight;
        int same = have->elem == plan->elem && have->scale == plan->scale;
        /* ModelOpt's folder says the same of mxfp4 with and without quantized inputs */
        if (strcmp(recipe->name, "mxfp4_mlp_weight_only") != 0) same = same && w.scheme.input.elem == recipe->scheme.input.elem;
        if (plan->group_cols > 0 && plan->group_cols < w.cols) same = same && have->group_cols == plan->group_cols;
        if (!same) printf("  %s of %s is %s\n", recipe->name, w.name, text);
        CHECK(same);
    }
    return layers;
}

/* What a case has beside its recipe. */
typedef struct recipe_more {
    const char *kv, *exclude;
    const moq_rule *rules;
    size_t rule_count;
    const char *const (*names)[2]; /* pattern and scheme of every module, the last that matches; ends with NULL */
    moq_kv_format format;
} recipe_more;

/* From tokens to a folder that opens with the schemes asked for and computes finite logits near to the source's. */
static void recipe_case(const char *recipe, const char *source, const recipe_more *more, double limit)
{
    token_set g;
    moq_quantize_desc d;
    moq_error err;
    int64_t n = 0, m = 0, layers = 0;
    double num = 0, den = 0;
    char target[1200], from[1200];
    snprintf(target, sizeof target, "%s", test_path("build/recipe-out"));
    snprintf(from, sizeof from, "%s", golden("sources/%s", source));
    remove_dir(target);
    make_tokens(&g, 256);
    g.samples.logits = strcmp(recipe, "nvfp4_fp8_mha") == 0 || (more && more->rules); /* only then is the head quantized */
    memset(&d, 0, sizeof d);
    d.source = from;
    d.target = target;
    d.recipe = recipe;
    d.calibrate = llm_calibrate;
    d.data = &g.samples;
    d.threads = 1;
    if (more) {
        d.kv = more->kv;
        d.exclude = &more->exclude;
        d.exclude_count = more->exclude != NULL;
        d.rules = more->rules;
        d.rule_count = more->rule_count;
    }
    moq_result r = moq_quantize(&d, &err);
    if (r != MOQ_OK) printf("  %s of %s: %s\n", recipe, source, err.text);
    CHECK_INT(r, MOQ_OK);
    if (r != MOQ_OK) return;
    moq_checkpoint *ck = moq_open(target, NULL, &err);
    CHECK(ck != NULL);
    if (ck) layers = check_layers(ck, moq_find_recipe(recipe), more ? more->names : NULL);
    if (ck && more) CHECK_STR(moq_kv_format_name(moq_get_info(ck)->kv), moq_kv_format_name(more->format));
    moq_close(ck);
    float *a = logits_of(from, &g, &n), *b = logits_of(target, &g, &m);
    CHECK(a && b && n == m && (layers > 0 || strcmp(recipe, "none") == 0));
    for (int64_t i = 0; a && b && i < n; i++) {
        num += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        den += (double)a[i] * (double)a[i];
    }
    double off = sqrt(num / (den > 0 ? den : 1));
    CHECK(off < limit); /* four bits throughout move the logits of these models by a half */
    CHECK(off > 0 || (strcmp(recipe, "none") == 0 && more && more->format == MOQ_KV_WIDE));
    printf("  %-36s %-11s %-13s %3lld layers, logits off by %.3f\n", recipe, source, more && more->kv ? more->kv : more && more->rules ? "mixed" : "", (long long)layers, off);
    free(a);
    free(b);
    remove_dir(target);
}

static void test_recipes_all(void)
{
    int done = 0;
    for (size_t i = 0; i < moq_recipe_count(); i++) {
        const moq_recipe *r = moq_get_recipe(i);
        const char *source = source_for(r->name);
        if (!is_there(golden("sources/%s/model.safetensors", source))) { printf("  %-36s its source %s is not in this set\n", r->name, source); continue; }
        recipe_case(r->name, source, NULL, 0.9);
        done++;
    }
    CHECK(done > 20);
}

/* Recipes of smoothing on a mixture of experts: INT4 experts are smoothed with one vector a projection, the others stay plain. */
static void test_recipes_experts(void)
{
    static const char *const names[] = {"int4_awq", "w4a8_awq_beta", "nvfp4_awq_lite", "int8_smoothquant", "nvfp4_svdquant", "nvfp4_awq_clip",
                                        "nvfp4_w4a4_weight_local_hessian", "nvfp4_gptq", "int4_gptq"};
    if (!is_there(golden("sources/%s/model.safetensors", "qwen3_moe"))) { printf("  qwen3_moe is not in this set\n"); test_state.skipped++; return; }
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) recipe_case(names[i], "qwen3_moe", NULL, 0.9);
}

/* Every family: four bits with dynamic blocks, eight bits, and integers with a search. What a format cannot hold is left out by name. */
static void test_recipes_families(void)
{
    static const char *const sources[] = {"llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"};
    int done = 0;
    for (size_t i = 0; i < sizeof sources / sizeof *sources; i++) {
        recipe_more more;
        char file[200];
        snprintf(file, sizeof file, "sources/%s/model.safetensors", sources[i]);
        if (!is_there(golden("%s", file))) continue;
        memset(&more, 0, sizeof more);
        recipe_case("nvfp4", sources[i], NULL, 1);
        recipe_case("fp8", sources[i], NULL, 0.5);
        /* 64 inputs are no group of 128; stacks of experts have no INT4 layout */
        more.exclude = strcmp(sources[i], "deepseek_v3") == 0 ? "*_b_proj*" : strcmp(sources[i], "gpt_oss") == 0 ? "*experts*" : NULL;
        recipe_case("int4_awq", sources[i], &more, 1);
        done++;
    }
    printf("  %d families\n", done);
    CHECK(done > 0);
}

/* Every format of the cache that has a place in a folder, with and without quantized layers. */
static void test_recipes_kv(void)
{
    static const struct { const char *name; moq_kv_format format; } cases[] = {
        {"none", MOQ_KV_WIDE}, {"fp8", MOQ_KV_FP8}, {"fp8_cast", MOQ_KV_FP8}, {"fp8_affine", MOQ_KV_FP8}, {"nvfp4", MOQ_KV_NVFP4}, {"nvfp4_cast", MOQ_KV_NVFP4},
        {"nvfp4_affine", MOQ_KV_NVFP4_AFFINE}, {"nvfp4_rotate", MOQ_KV_NVFP4}}; /* rotation is not stored; fp8_affine is told by its biases */
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        recipe_more more;
        memset(&more, 0, sizeof more);
        more.kv = cases[i].name;
        more.format = cases[i].format;
        recipe_case("nvfp4_awq_lite", "llama", &more, 0.9);
        recipe_case("none", "llama", &more, 0.5);
    }
}

/* Rules name a module, a module's quantizer or a container of experts; the last that matches decides, and an exclusion beats them all. */
static void test_recipes_mixed(void)
{
    static const moq_rule dense[] = {
        {"*.mlp.*", "fp8"}, {"*.layers.1.mlp.down_proj", "int8_weight_only"}, {"*.q_proj.weight_quantizer", "none"}, {"lm_head", "mxfp8"}, {"*.layers.0.self_attn.v_proj", "fp8"}};
    static const char *const dense_names[][2] = {
        {"*", "bf16"}, {"*_proj", "nvfp4"}, {"*.mlp.*", "fp8"}, {"*.layers.1.mlp.down_proj", "w8a16"}, {"*.q_proj", "bf16"}, {"lm_head", "mxfp8"},
        {"*.layers.0.self_attn.v_proj", "bf16"}, {NULL, NULL}};
    static const moq_rule experts[] = {{"*.mlp.experts", "nvfp4"}, {"*.layers.1.*o_proj*", "int4_awq"}};
    static const char *const expert_names[][2] = {{"*", "bf16"}, {"*_proj", "fp8"}, {"*.experts.*", "nvfp4"}, {"*.layers.1.*o_proj", "int4_awq"}, {NULL, NULL}};
    recipe_more more;
    memset(&more, 0, sizeof more);
    more.rules = dense;
    more.rule_count = sizeof dense / sizeof *dense;
    more.exclude = "*layers.0.self_attn.v_proj*";
    more.names = dense_names;
    more.kv = "fp8";
    more.format = MOQ_KV_FP8;
    recipe_case("nvfp4", "llama", &more, 0.9);
    if (!is_there(golden("sources/%s/model.safetensors", "qwen3_moe"))) return;
    memset(&more, 0, sizeof more);
    more.rules = experts;
    more.rule_count = 2;
    more.names = expert_names;
    recipe_case("fp8", "qwen3_moe", &more, 0.9);
}

/* Every combination that does not fit is one clear line, and nothing is written. */
static void test_recipes_refused(void)
{
    static const struct { const char *source, *recipe, *says; } cases[] = {
        {"llama", "nvfp4_experts_only", "covers no layer"}, {"llama", "nvfp5", "no recipe"}, {"gpt_oss", "int4_awq", "stack of experts"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        token_set g;
        moq_quantize_desc d;
        moq_error err;
        char target[1200];
        if (!is_there(golden("sources/%s/model.safetensors", cases[i].source))) continue;
        snprintf(target, sizeof target, "%s", test_path("build/recipe-refused"));
        make_tokens(&g, 256);
        memset(&d, 0, sizeof d);
        d.source = golden("sources/%s", cases[i].source);
        d.target = target;
        d.recipe = cases[i].recipe;
        d.calibrate = llm_calibrate;
        d.data = &g.samples;
        d.threads = 1;
        CHECK(moq_quantize(&d, &err) < 0);
        CHECK(strstr(err.text, cases[i].says) != NULL);
        CHECK(!is_there(target));
    }
}

/* Squared error of a folder's layer, low-rank branch included, against the source; p: its pre_quant_scale. */
static double branch_error(moq_checkpoint *ck, moq_checkpoint *source, const char *name, double *norm)
{
    moq_linear w, s;
    moq_error err;
    static float row[1024], want[1024], p[1024], a[32 * 1024], b[1024 * 32];
    double sum = 0;
    *norm = 0;
    if (moq_find_linear(ck, name, &w, &err) < 0 || moq_find_linear(source, name, &s, &err) < 0 || !w.lora_a.data || w.cols > 1024) return -1;
    int64_t rank = w.scheme.lora_rank;
    moq_to_f32(w.lora_a.dtype, w.lora_a.data, (size_t)(rank * w.cols), a);
    moq_to_f32(w.lora_b.dtype, w.lora_b.data, (size_t)(rank * w.rows), b);
    moq_to_f32(w.pre_quant_scale.dtype, w.pre_quant_scale.data, (size_t)w.cols, p);
    for (int64_t r = 0; r < w.rows; r++) {
        moq_dequantize(&w, r, 1, row);
        moq_dequantize(&s, r, 1, want);
        for (int64_t c = 0; c < w.cols; c++) {
            double v = (double)row[c];
            for (int64_t k = 0; k < rank; k++) v += (double)b[r * rank + k] * (double)a[k * w.cols + c];
            v = v * (double)p[c] - (double)want[c];
            sum += v * v;
            *norm += (double)want[c] * (double)want[c];
        }
    }
    return sum;
}

/* From ModelOpt's recorded vectors (which are BF16, so bytes cannot be equal): as close to the source as ModelOpt's own, layer by layer. */
static void test_recipes_svdquant(void)
{
    moq_quantize_desc d;
    moq_error err;
    char target[1200];
    int layers = 0;
    double worst = 0;
    if (!is_there(golden("modelopt/%s/calibration.safetensors", "llama-nvfp4_svdquant")) || !is_there(golden("sources/%s/model.safetensors", "llama"))) {
        printf("  its golden is not in this set\n");
        test_state.skipped++;
        return;
    }
    snprintf(target, sizeof target, "%s", test_path("build/recipe-svd"));
    remove_dir(target);
    memset(&d, 0, sizeof d);
    d.source = golden("sources/%s", "llama");
    d.target = target;
    d.recipe = "nvfp4_svdquant";
    d.calibration = golden("modelopt/%s/calibration.safetensors", "llama-nvfp4_svdquant");
    d.threads = 1;
    CHECK_INT(moq_quantize(&d, &err), MOQ_OK);
    moq_checkpoint *ours = moq_open(target, NULL, &err), *theirs = moq_open(golden("modelopt/%s", "llama-nvfp4_svdquant"), NULL, &err);
    moq_checkpoint *source = moq_open(d.source, NULL, &err);
    CHECK(ours && theirs && source);
    CHECK_INT((int)moq_tensor_count(ours), (int)moq_tensor_count(theirs));
    for (size_t i = 0; i < moq_tensor_count(theirs); i++) {
        const moq_tensor *t = moq_get_tensor(theirs, i), *u = moq_find_tensor(ours, t->name);
        CHECK(u && u->dtype == t->dtype && u->bytes == t->bytes);
    }
    for (size_t i = 0; i < moq_module_count(theirs); i++) {
        moq_linear w;
        double norm;
        if (moq_get_module(theirs, i, &w, &err) < 0 || !w.lora_a.data) continue;
        double a = branch_error(ours, source, w.name, &norm), b = branch_error(theirs, source, w.name, &norm);
        CHECK(a >= 0 && a <= b * 1.02 && b <= a * 1.02);
        if (b > 0 && fabs(a / b - 1) > worst) worst = fabs(a / b - 1);
        layers++;
    }
    printf("  %d layers: squared error against the source within %.2f %% of ModelOpt's\n", layers, 100 * worst);
    CHECK(layers == 14);
    moq_close(ours);
    moq_close(theirs);
    moq_close(source);
    remove_dir(target);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_recipes_all);
    RUN(test_recipes_experts);
    RUN(test_recipes_families);
    RUN(test_recipes_kv);
    RUN(test_recipes_mixed);
    RUN(test_recipes_refused);
    RUN(test_recipes_svdquant);
    return test_end();
}
