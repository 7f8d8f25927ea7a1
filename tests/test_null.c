/* test_null.c - NULL for each pointer argument of each public function in turn: a refusal or a harmless answer, never a crash.
   Functions of a backend's table are not public functions: their pointers are the backend's business. */
#define MOQ_QUANTIZE
#include "test.h"

static moq_error e;

/* The call must say MOQ_E_ARG, and its text must name the function. */
#define REFUSES(call, name) \
    do { \
        moqi_clear(&e); \
        CHECK_INT((call), MOQ_E_ARG); \
        CHECK_INT(e.code, MOQ_E_ARG); \
        CHECK(strstr(e.text, name) != NULL); \
    } while (0)

/* The same for calls that return a pointer. */
#define NOTHING(call, name) \
    do { \
        moqi_clear(&e); \
        CHECK((call) == NULL); \
        CHECK(e.code < 0); \
        CHECK(strstr(e.text, name) != NULL); \
    } while (0)

static void test_null_files(void)
{
    size_t bytes = 1;
    NOTHING(moq_read_file(NULL, 10, NULL, &bytes, &e), "moq_read_file");
    CHECK_INT(bytes, 0);
    REFUSES(moq_write_file(NULL, "x", 1, &e), "moq_write_file");
    REFUSES(moq_write_file("x", NULL, 1, &e), "moq_write_file");
    CHECK(moq_read_file(NULL, 10, NULL, NULL, NULL) == NULL && moq_write_file(NULL, NULL, 0, NULL) < 0);
    CHECK(moq_fail(NULL, MOQ_E_ARG, NULL, "x") == MOQ_E_ARG && moq_result_name((moq_result)-99) && moq_result_text((moq_result)-99));
    void *p = moq_allocate(NULL, 3);
    CHECK(p != NULL);
    moq_release(NULL, p, 3);
    moq_release(NULL, NULL, 3);
}

static void test_null_json(void)
{
    static const char text[] = "{\"n\":1,\"b\":true}";
    CHECK(moq_json_parse(NULL, 5, MOQ_JSON_STRICT, 0, NULL, NULL, &e) == NULL && e.code == MOQ_E_JSON);
    moq_json_doc *doc = moq_json_parse(text, sizeof text - 1, MOQ_JSON_STRICT, 0, NULL, NULL, NULL);
    const moq_json *root = moq_json_root(doc), *n = moq_json_find(root, "n"), *b = moq_json_find(root, "b");
    CHECK(n && b);
    CHECK(moq_json_root(NULL) == NULL && moq_json_find(NULL, "n") == NULL && moq_json_find(root, NULL) == NULL && moq_json_at(NULL, 0) == NULL);
    CHECK(moq_json_first(NULL) == NULL && moq_json_next(NULL, n) == NULL && moq_json_next(root, NULL) == NULL);
    CHECK(!moq_json_int(NULL, NULL) && !moq_json_int(n, NULL) && !moq_json_u64(NULL, NULL) && !moq_json_u64(n, NULL));
    CHECK(!moq_json_float(NULL, NULL) && !moq_json_float(n, NULL) && !moq_json_bool(NULL, NULL) && !moq_json_bool(b, NULL));
    CHECK(moq_json_string(NULL) == NULL && !moq_json_is(NULL, "x") && !moq_json_is(n, NULL));
    moq_json_destroy(doc);
    moq_json_destroy(NULL);
}

static void test_null_numbers_and_schemes(void)
{
    float v[4] = {1, 2, 3, 4};
    char text[8];
    moq_scheme s = moq_get_recipe(0)->scheme;
    moq_kv_format format;
    CHECK(moq_dtype_find(NULL, 3) == MOQ_NONE && !moq_to_f32(MOQ_BF16, NULL, 4, v) && !moq_to_f32(MOQ_BF16, v, 2, NULL));
    CHECK(!moq_scheme_is_quantized(NULL) && moq_scheme_name(NULL, text, sizeof text) == 0 && text[0] == 0 && moq_scheme_name(&s, NULL, 0) > 0);
    CHECK(!moq_scheme_equal(NULL, &s) && !moq_scheme_equal(&s, NULL));
    CHECK(!moq_kv_format_find(NULL, &format) && !moq_kv_format_find("fp8", NULL) && moq_find_recipe(NULL) == NULL);
    CHECK(!moq_glob_match(NULL, "x") && !moq_glob_match("*", NULL) && !moq_is_slip(NULL, "x") && !moq_is_slip("x", NULL));
    moq_make_linear(NULL, "x", MOQ_F32, v, 2, 2);
}

static void test_null_safetensors(void)
{
    static const char empty[] = "\x02\0\0\0\0\0\0\0{}";
    NOTHING(moq_st_open(NULL, NULL, &e), "moq_st_open");
    NOTHING(moq_st_open_memory(NULL, 8, "x", NULL, &e), "moq_st_open_memory");
    moq_st *st = moq_st_open_memory(empty, 10, NULL, NULL, &e);
    CHECK(st != NULL);
    CHECK(moq_st_count(NULL) == 0 && moq_st_get(NULL, 0) == NULL && moq_st_find(NULL, "x") == NULL && moq_st_find(st, NULL) == NULL);
    CHECK(moq_st_metadata(NULL, "x") == NULL && moq_st_metadata(st, NULL) == NULL);
    moq_st_close(st);
    moq_st_close(NULL);
    REFUSES(moq_st_write(NULL, NULL, 0, NULL, 0, NULL, &e), "moq_st_write");
    REFUSES(moq_st_write("x", NULL, 1, NULL, 0, NULL, &e), "moq_st_write");
    REFUSES(moq_st_write("x", NULL, 0, NULL, 1, NULL, &e), "moq_st_write");
}

static void test_null_checkpoint(void)
{
    moq_linear l;
    moq_kv kv;
    NOTHING(moq_open(NULL, NULL, &e), "moq_open");
    NOTHING(moq_open_memory(NULL, 2, NULL, &e), "moq_open_memory");
    moq_checkpoint *ck = moq_open(GOLDEN_DIR "/modelopt/llama-fp8", NULL, &e);
    CHECK(ck != NULL);
    if (!ck) return;
    CHECK(moq_get_info(NULL) == NULL && moq_get_allocator(NULL) == NULL && moq_get_name(NULL) == NULL && moq_get_config(NULL) == NULL);
    NOTHING(moq_read_json(NULL, "config.json", MOQ_JSON_CONFIG, &e), "moq_read_text");
    NOTHING(moq_read_text(NULL, "config.json", NULL, &e), "moq_read_text");
    CHECK(moq_read_json(ck, NULL, MOQ_JSON_CONFIG, &e) == NULL && e.code == MOQ_E_PATH && moq_read_text(ck, NULL, NULL, &e) == NULL);
    CHECK(moq_tensor_count(NULL) == 0 && moq_get_tensor(NULL, 0) == NULL && moq_find_tensor(NULL, "x") == NULL && moq_find_tensor(ck, NULL) == NULL);
    CHECK(moq_get_shard_name(NULL, 0) == NULL && moq_module_count(NULL) == 0 && !moq_has_linear(NULL, "x") && !moq_has_linear(ck, NULL));
    REFUSES(moq_get_module(NULL, 0, &l, &e), "moq_get_module");
    REFUSES(moq_get_module(ck, 0, NULL, &e), "moq_get_module");
    REFUSES(moq_find_linear(NULL, "x", &l, &e), "moq_find_linear");
    REFUSES(moq_find_linear(ck, NULL, &l, &e), "moq_find_linear");
    REFUSES(moq_find_linear(ck, "x", NULL, &e), "moq_find_linear");
    REFUSES(moq_find_kv(NULL, "x", &kv, &e), "moq_find_kv");
    REFUSES(moq_find_kv(ck, NULL, &kv, &e), "moq_find_kv");
    REFUSES(moq_find_kv(ck, "x", NULL, &e), "moq_find_kv");
    REFUSES(moq_verify(NULL, 0, NULL, NULL, &e), "moq_verify");
    CHECK_INT(moq_verify(ck, 0, NULL, NULL, NULL), MOQ_OK);
    moq_close(ck);
    moq_close(NULL);
}

static void test_null_layers(void)
{
    float data[4] = {1, 2, 3, 4}, out[4] = {9, 9, 9, 9};
    int16_t codes[4];
    moq_linear l, part;
    moq_make_linear(&l, "x", MOQ_F32, data, 2, 2);
    REFUSES(moq_slice_rows(NULL, 0, 1, 1, &part, &e), "moq_slice_rows");
    REFUSES(moq_slice_rows(&l, 0, 1, 1, NULL, &e), "moq_slice_rows");
    REFUSES(moq_slice_cols(NULL, 0, 1, &part, &e), "moq_slice_cols");
    REFUSES(moq_slice_cols(&l, 0, 1, NULL, &e), "moq_slice_cols");
    REFUSES(moq_slice_expert(NULL, 0, &part, &e), "moq_slice_expert");
    REFUSES(moq_slice_expert(&l, 0, NULL, &e), "moq_slice_expert");
    moq_get_codes(NULL, 0, 0, 2, codes);
    moq_get_codes(&l, 0, 0, 2, NULL);
    moq_dequantize(NULL, 0, 1, out);
    moq_dequantize(&l, 0, 1, NULL);
    moq_round_input(NULL, data, out);
    moq_round_input(&l, NULL, out);
    moq_round_input(&l, data, NULL);
    moq_round_kv(MOQ_KV_FP8, 1, NULL, NULL, 4, out);
    moq_round_kv(MOQ_KV_FP8, 1, NULL, data, 4, NULL);
    CHECK(out[0] == 9 && out[3] == 9);
    moq_backend *be = moq_cpu_backend(NULL, &e);
    CHECK(be != NULL);
    moq_backend_destroy(be);
    moq_backend_destroy(NULL);
}

static void test_null_quantizing(void)
{
    float data[4] = {1, 2, 3, 4}, one;
    uint64_t a, b;
    uint8_t codes[8], scales[8];
    int32_t choice;
    char text[16];
    moq_encode_desc d;
    moq_solve_desc s;
    memset(&d, 0, sizeof d);
    memset(&s, 0, sizeof s);
    d.scheme = moq_find_recipe("fp8")->scheme;
    d.dtype = MOQ_F32;
    d.rows = d.cols = 2;
    REFUSES(moq_encode_bytes(NULL, &a, &b, &e), "moq_encode_bytes");
    REFUSES(moq_encode_bytes(&d, NULL, &b, &e), "moq_encode_bytes");
    REFUSES(moq_encode_bytes(&d, &a, NULL, &e), "moq_encode_bytes");
    REFUSES(moq_encode(NULL, codes, scales, &one, &e), "moq_encode");
    REFUSES(moq_encode(&d, codes, scales, &one, &e), "moq_encode");
    REFUSES(moq_find_amax(NULL, &one, &one, &e), "moq_find_amax");
    REFUSES(moq_find_amax(&d, &one, &one, &e), "moq_find_amax");
    d.data = data;
    CHECK_INT(moq_find_amax(&d, NULL, NULL, &e), MOQ_OK);
    REFUSES(moq_encode(&d, codes, NULL, &one, &e), "moq_encode");
    CHECK_INT(moq_encode(&d, NULL, scales, NULL, &e), MOQ_OK);
    CHECK(moq_observing_backend(NULL, NULL, NULL, &e) == NULL && e.code == MOQ_E_ARG);
    moq_end_batch(NULL);
    NOTHING(moq_calibrate(NULL, &e), "moq_calibrate");
    moq_stats_destroy(NULL);
    CHECK(moq_stats_count(NULL) == 0 && moq_get_stat(NULL, 0) == NULL && moq_find_stat(NULL, "x") == NULL);
    REFUSES(moq_stats_save(NULL, "x", &e), "moq_stats_save");
    REFUSES(moq_solve(NULL, &choice, NULL, NULL, &e), "moq_solve");
    REFUSES(moq_solve(&s, NULL, NULL, NULL, &e), "moq_solve");
    CHECK(moq_unit_name(NULL, text, sizeof text) == 0 && moq_recipe_bits(NULL) == 16);
    REFUSES(moq_quantize(NULL, &e), "moq_quantize");
}

static void test_null_searches(void)
{
    char data[4];
    moq_forget_pages(NULL);
    moq_forget_tensor(NULL, NULL);
    NOTHING(moq_autoquant(NULL, &e), "moq_autoquant");
    CHECK(moq_search_get_info(NULL) == NULL && moq_search_get_unit(NULL, 0) == NULL);
    REFUSES(moq_spill_put(NULL, 0, data, sizeof data, &e), "moq_spill");
    REFUSES(moq_spill_get(NULL, 0, data, sizeof data, &e), "moq_spill");
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_null_files);
    RUN(test_null_json);
    RUN(test_null_numbers_and_schemes);
    RUN(test_null_safetensors);
    RUN(test_null_checkpoint);
    RUN(test_null_layers);
    RUN(test_null_quantizing);
    RUN(test_null_searches);
    return test_end();
}
