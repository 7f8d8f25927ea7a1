/* test_scheme.c - names of schemes and KV formats, the recipe table. */
#include "test.h"

#define WRONG(what) (test_state.broken++, fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, what))

static moq_scheme scheme_of(const char *recipe)
{
    moq_scheme none;
    const moq_recipe *r = moq_find_recipe(recipe);
    memset(&none, 0, sizeof none);
    CHECK(r != NULL);
    return r ? r->scheme : none;
}

static const char *name_of(const moq_scheme *s)
{
    static char text[160];
    CHECK(moq_scheme_name(s, text, sizeof text) < sizeof text);
    return text;
}

/* The names that users see for every recipe. */
static void test_scheme_names_of_recipes(void)
{
    static const char *const rows[][2] = {
        {"fp8", "fp8"}, {"fp8_per_channel_per_token", "fp8_pc_pt"}, {"fp8_2d_blockwise_weight_only", "fp8_pb_wo"}, {"int8", "int8"},
        {"int8_weight_only", "w8a16"}, {"int8_smoothquant", "int8_sq"}, {"int4_blockwise_weight_only", "int4_g128"}, {"int4_awq", "int4_awq"},
        {"w4a8_awq_beta", "w4a8_awq"}, {"nvfp4", "nvfp4"}, {"w4a16_nvfp4", "w4a16_nvfp4"}, {"w4a8_nvfp4_fp8", "w4a8_nvfp4_fp8"},
        {"nvfp4_awq_lite", "nvfp4_awq"}, {"nvfp4_awq_clip", "nvfp4"}, {"nvfp4_svdquant", "nvfp4_svd"}, {"nvfp4_mlp_weight_only", "w4a16_nvfp4_g32"},
        {"mxfp4", "mxfp4"}, {"mxfp4_mlp_weight_only", "w4a16_mxfp4"}, {"w4a8_mxfp4_fp8", "w4a8_mxfp4_fp8"}, {"mxfp8", "mxfp8"}, {"mxfp6", "mxfp6"},
        {"mxint8", "mxint8"}, {"mxfp6_e2m3", "mxfp6_e2m3"}};
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        moq_scheme s = scheme_of(rows[i][0]);
        CHECK_STR(name_of(&s), rows[i][1]);
    }
}

/* Suffixes: what is not a row of its own is a row and what differs. */
static void test_scheme_suffixes(void)
{
    moq_scheme s = scheme_of("int4_blockwise_weight_only");
    s.weight.zero_point = 1;
    CHECK_STR(name_of(&s), "int4_g128_zp");
    s.act_order = 1;
    s.weight.group_cols = 32;
    CHECK_STR(name_of(&s), "int4_g32_zp_actorder");
    s = scheme_of("int4_blockwise_weight_only");
    s.weight.group_cols = MOQ_ALL;
    s.weight.scale = MOQ_BF16;
    CHECK_STR(name_of(&s), "int4_pc_sbf16");
    s.hadamard = 1;
    CHECK_STR(name_of(&s), "int4_pc_sbf16_hadamard");
    s = scheme_of("mxfp4");
    s.input.rule = MOQ_RULE_E8M0_ROUND;
    CHECK_STR(name_of(&s), "mxfp4_arule2");
    s = scheme_of("nvfp4_svdquant");
    s.lora_rank = 16;
    CHECK_STR(name_of(&s), "nvfp4_svd_r16");
    s = scheme_of("fp8_2d_blockwise_weight_only");
    s.weight.group_rows = 64;
    CHECK_STR(name_of(&s), "fp8_pb_wo_b64x128");
    memset(&s, 0, sizeof s);
    s.weight.elem = MOQ_BF16;
    CHECK_STR(name_of(&s), "bf16");
    CHECK(!moq_scheme_is_quantized(&s));
    s.weight.elem = MOQ_F32;
    CHECK_STR(name_of(&s), "f32");
    s.weight.elem = MOQ_I3;
    s.weight.group_rows = 1;
    s.weight.group_cols = 64;
    s.weight.scale = MOQ_F16;
    CHECK_STR(name_of(&s), "w-i3-a-none_g64_sf16");
    CHECK(moq_scheme_is_quantized(&s));
    s.weight.elem = MOQ_NONE;
    CHECK(!moq_scheme_is_quantized(&s));
}

static int32_t pick(const int32_t *values, uint32_t n) { return values[test_random() % n]; }

/* A scheme with each field drawn from the values that occur, near a row of the table or far from all. */
static moq_scheme random_scheme(void)
{
    static const int32_t groups[] = {0, 1, 16, 32, 128, MOQ_ALL};
    static const moq_dtype elems[] = {MOQ_NONE, MOQ_F4, MOQ_F8_E4M3, MOQ_I4, MOQ_I8, MOQ_I3, MOQ_BF16}, scales[] = {MOQ_NONE, MOQ_F8_E4M3, MOQ_F8_E8M0, MOQ_F32, MOQ_BF16};
    moq_scheme s = moq_get_recipe(test_random() % moq_recipe_count())->scheme;
    for (uint32_t changes = test_random() % 4; changes > 0; changes--) {
        moq_coding *c = test_random() & 1 ? &s.weight : &s.input;
        switch (test_random() % 12) {
        case 0: c->elem = elems[test_random() % MOQI_COUNT(elems)]; break;
        case 1: c->group_rows = pick(groups, 6); break;
        case 2: c->group_cols = pick(groups, 6); break;
        case 3: c->scale = scales[test_random() % MOQI_COUNT(scales)]; break;
        case 4: c->has_global ^= 1; break;
        case 5: c->dynamic ^= 1; break;
        case 6: c->zero_point ^= 1; break;
        case 7: c->rule = (uint8_t)(test_random() % 3); break;
        case 8: s.pre_quant_scale ^= 1; break;
        case 9: s.act_order ^= 1; break;
        case 10: s.requantize_fp8 ^= 1; break;
        default: s.lora_rank = (uint16_t)(test_random() % 4 * 16); break;
        }
    }
    return s;
}

/* Equality of every field, spelled out a second time. */
static int same_scheme(const moq_scheme *a, const moq_scheme *b)
{
    const moq_coding *x[2], *y[2];
    x[0] = &a->weight; x[1] = &a->input; y[0] = &b->weight; y[1] = &b->input;
    for (int i = 0; i < 2; i++)
        if (x[i]->elem != y[i]->elem || x[i]->group_rows != y[i]->group_rows || x[i]->group_cols != y[i]->group_cols || x[i]->scale != y[i]->scale ||
            x[i]->has_global != y[i]->has_global || x[i]->dynamic != y[i]->dynamic || x[i]->zero_point != y[i]->zero_point || x[i]->rule != y[i]->rule)
            return 0;
    return a->pre_quant_scale == b->pre_quant_scale && a->act_order == b->act_order && a->requantize_fp8 == b->requantize_fp8 && a->hadamard == b->hadamard &&
           a->lora_rank == b->lora_rank;
}

/* Different schemes have different names, equal ones the same. */
static void test_scheme_names_are_unique(void)
{
    enum { N = 1500 };
    static moq_scheme s[N];
    static char names[N][160];
    int equal = 0;
    for (int i = 0; i < N; i++) {
        s[i] = random_scheme();
        CHECK(moq_scheme_name(&s[i], names[i], sizeof names[i]) < sizeof names[i]);
    }
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < i; j++) {
            int same = same_scheme(&s[i], &s[j]);
            equal += same;
            if (same != moq_scheme_equal(&s[i], &s[j]) || same != (strcmp(names[i], names[j]) == 0)) {
                WRONG("two schemes and their names disagree");
                fprintf(stderr, "%s %s %d\n", names[i], names[j], same);
                return;
            }
        }
    }
    CHECK(equal > 1000);
}

/* Every capacity gives the same length and a terminated prefix. */
static void test_scheme_name_capacity(void)
{
    moq_scheme s = scheme_of("w4a8_nvfp4_fp8");
    const char *full = "w4a8_nvfp4_fp8";
    for (size_t n = 0; n < 20; n++) {
        char text[32];
        memset(text, '!', sizeof text);
        CHECK_INT(moq_scheme_name(&s, text, n), strlen(full));
        if (n > 0) CHECK_INT(strlen(text), n <= strlen(full) ? n - 1 : strlen(full));
        if (n > 0) CHECK(strncmp(text, full, strlen(text)) == 0);
        CHECK(text[n] == '!');
    }
}

/* Names of the command line, in its order, with ModelOpt's constants where there are any. */
static void test_scheme_recipes(void)
{
    static const char *const rows[][2] = {
        {"fp8", "FP8_DEFAULT_CFG"}, {"fp8_per_channel_per_token", "FP8_PER_CHANNEL_PER_TOKEN_CFG"},
        {"fp8_2d_blockwise_weight_only", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"}, {"int8", "INT8_DEFAULT_CFG"}, {"int8_weight_only", "INT8_WEIGHT_ONLY_CFG"},
        {"int8_smoothquant", "INT8_SMOOTHQUANT_CFG"}, {"int4_blockwise_weight_only", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"}, {"int4_awq", "INT4_AWQ_CFG"},
        {"w4a8_awq_beta", "W4A8_AWQ_BETA_CFG"}, {"nvfp4", "NVFP4_DEFAULT_CFG"}, {"w4a16_nvfp4", "W4A16_NVFP4_CFG"}, {"w4a8_nvfp4_fp8", "W4A8_NVFP4_FP8_CFG"},
        {"nvfp4_awq_lite", "NVFP4_AWQ_LITE_CFG"}, {"nvfp4_awq_clip", "NVFP4_AWQ_CLIP_CFG"}, {"nvfp4_awq_full", "NVFP4_AWQ_FULL_CFG"},
        {"nvfp4_svdquant", "NVFP4_SVDQUANT_DEFAULT_CFG"}, {"nvfp4_four_over_six", "NVFP4_FOUR_OVER_SIX_CFG"},
        {"nvfp4_w4a4_weight_mse_fp8_sweep", "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG"}, {"nvfp4_w4a4_weight_local_hessian", "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG"},
        {"nvfp4_mse", NULL}, {"int4_mse", NULL}, {"nvfp4_act_headroom", NULL}, {"nvfp4_gptq", "general/ptq/nvfp4_default-kv_none-gptq"}, {"int4_gptq", NULL}, {"nvfp4_mlp_only", "NVFP4_MLP_ONLY_CFG"}, {"nvfp4_mlp_weight_only", "NVFP4_MLP_WEIGHT_ONLY_CFG"},
        {"nvfp4_omlp_only", "NVFP4_OMLP_ONLY_CFG"}, {"nvfp4_experts_only", "NVFP4_EXPERTS_ONLY_CFG"}, {"nvfp4_experts_only_mse", NULL},
        {"nvfp4_experts_only_input_scale1", NULL},
        {"nvfp4_fp8_mha", "NVFP4_FP8_MHA_CONFIG"}, {"mxfp4", "MXFP4_DEFAULT_CFG"}, {"mxfp4_mlp_weight_only", "MXFP4_MLP_WEIGHT_ONLY_CFG"},
        {"w4a8_mxfp4_fp8", "W4A8_MXFP4_FP8_CFG"}, {"mxfp8", "MXFP8_DEFAULT_CFG"}, {"mxfp6", "MXFP6_DEFAULT_CFG"}, {"mxfp6_e2m3", NULL},
        {"mxint8", "MXINT8_DEFAULT_CFG"},
        {"mamba_moe_fp8_aggressive", "MAMBA_MOE_FP8_AGGRESSIVE_CFG"}, {"mamba_moe_fp8_conservative", "MAMBA_MOE_FP8_CONSERVATIVE_CFG"},
        {"mamba_moe_nvfp4_aggressive", "MAMBA_MOE_NVFP4_AGGRESSIVE_CFG"}, {"mamba_moe_nvfp4_conservative", "MAMBA_MOE_NVFP4_CONSERVATIVE_CFG"}};
    CHECK_INT(moq_recipe_count(), MOQI_COUNT(rows));
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        char other_case[64];
        const moq_recipe *r = moq_find_recipe(rows[i][0]);
        CHECK(r != NULL && r == moq_get_recipe(i));
        if (!r) continue;
        CHECK_STR(r->name, rows[i][0]);
        CHECK(r->covers[0] && r->calibration[0] && moq_scheme_is_quantized(&r->scheme));
        for (size_t k = 0; k <= strlen(r->modelopt); k++) other_case[k] = moqi_lower(r->modelopt[k]);
        CHECK(moq_find_recipe(other_case) == r);
        if (rows[i][1]) CHECK(moq_find_recipe(rows[i][1]) == r);
    }
    CHECK(moq_get_recipe(moq_recipe_count()) == NULL);
    CHECK(moq_find_recipe("NVFP4_AWQ_Lite") != NULL);
    CHECK(moq_find_recipe("nvfp3") == NULL && moq_find_recipe("") == NULL && moq_find_recipe("fp8 ") == NULL);
}

static void test_scheme_kv_formats(void)
{
    moq_kv_format f = MOQ_KV_INT8;
    for (int i = 0; i < (int)MOQ_KV_FORMAT_COUNT; i++) {
        CHECK(moq_kv_format_find(moq_kv_format_name((moq_kv_format)i), &f));
        CHECK_INT(f, i);
    }
    CHECK_STR(moq_kv_format_name(MOQ_KV_NVFP4_ROTATE), "nvfp4_rotate");
    CHECK(moq_kv_format_find("none", &f) && f == MOQ_KV_WIDE);
    CHECK(moq_kv_format_find("FP8_CAST", &f) && f == MOQ_KV_FP8);
    CHECK(moq_kv_format_find("nvfp4_cast", &f) && f == MOQ_KV_NVFP4);
    CHECK(!moq_kv_format_find("fp7", &f) && f == MOQ_KV_NVFP4);
    CHECK_STR(moq_kv_format_name((moq_kv_format)MOQ_KV_FORMAT_COUNT), "?");
    CHECK_STR(moq_kv_format_name((moq_kv_format)-1), "?");
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_scheme_names_of_recipes);
    RUN(test_scheme_suffixes);
    RUN(test_scheme_names_are_unique);
    RUN(test_scheme_name_capacity);
    RUN(test_scheme_recipes);
    RUN(test_scheme_kv_formats);
    return test_end();
}
