/* test_json.c - the parser's verdicts, its values, numbers against exact arithmetic, limits, failing allocations, the writer. */
#include "test.h"
#include <time.h>

static moq_json_doc *parse(const char *s, size_t n, moq_json_dialect d, moq_error *err)
{
    /* An exact-size copy, so that a sanitizer sees one byte too many, and released at once: a document keeps nothing of it. */
    moq_allocator a = test_allocator();
    uint8_t *copy = test_copy(s, n);
    moq_json_doc *doc = moq_json_parse((const char *)copy, n, d, 0, "t.json", &a, err);
    if (n) memset(copy, 'x', n);
    free(copy);
    if (!doc) CHECK_INT(test_state.live_allocs, 0);
    return doc;
}

static moq_json_doc *parse_text(const char *s, moq_json_dialect d) { return parse(s, strlen(s), d, NULL); }

/* The verdict: MOQ_OK or the code of the error, whose text must be whole. */
static moq_result verdict(const char *s, size_t n, moq_json_dialect d)
{
    moq_error err;
    moq_json_doc *doc = parse(s, n, d, &err);
    if (doc) {
        CHECK_INT(err.code, MOQ_OK);
        moq_json_destroy(doc);
        CHECK_INT(test_state.live_allocs, 0);
        return MOQ_OK;
    }
    CHECK(err.code < 0 && strlen(err.text) > 20 && strncmp(err.text, "t.json: ", 8) == 0);
    CHECK(err.code == MOQ_E_LIMIT || (err.offset >= 0 && (uint64_t)err.offset <= n));
    for (const char *p = err.text; *p; p++) CHECK(*p >= 0x20 && *p < 0x7f);
    return err.code;
}

typedef struct sample { const char *text; size_t bytes; } sample;
#define S(literal) {literal, sizeof(literal) - 1}

/* ---- what every RFC 8259 reader must accept ---- */

static const sample accepted[] = {
    /* arrays */
    S("[]"), S("[[]   ]"), S("[\"\"]"), S(" [1]"), S("[1] "), S("[false]"), S("[null, 1, \"1\", {}]"), S("[1\n]"), S("[1,null,null,null,2]"), S("[2] "), S("[[[[]]]]"), S("[[],[],{}]"),
    S("[\"a\",\"a\",\"a\"]"), S("\t[\r\n1\t,\r2 ]\n"), S("[1,\n1\n,\n1]"), S("[-0]"), S("[true,false,null]"),
    /* numbers */
    S("[123e65]"), S("[0e+1]"), S("[0e1]"), S("[ 4]"), S("[-0.000000000000000000000000000000000000000000000000000000000000000000000000000001]"), S("[20e1]"), S("[-123]"), S("[-1]"),
    S("[1E22]"), S("[1E-2]"), S("[1E+2]"), S("[123e45]"), S("[123.456e78]"), S("[1e-2]"), S("[1e+2]"), S("[123]"), S("[123.456789]"), S("[0]"), S("[0.0]"), S("[-0.0e-0]"), S("[10]"),
    S("[1e400]"), S("[18446744073709551616]"), S("[0.1e1]"), S("[1.0]"), S("0"), S("-1"), S("1.5e300"), S("[0e0]"), S("[0E-0]"),
    /* objects */
    S("{\"asd\":\"sdf\", \"dfg\":\"fgh\"}"), S("{\"asd\":\"sdf\"}"), S("{}"), S("{\"\":0}"), S("{\"foo\\u0000bar\": 42}"), S("{ \"min\": -1.0e+28, \"max\": 1.0e+28 }"),
    S("{\"x\":[{\"id\": \"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"}], \"id\": \"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"}"), S("{\"a\":[]}"), S("{\n\"a\": \"b\"\n}"),
    S("{\"title\":\"\\u041f\\u043e\\u043b\\u0442\\u043e\\u0440\\u0430\" }"), S("{\"a\":{\"a\":{\"a\":1}}}"), S("{\"a\":1,\"A\":2}"), S("{\"a\":1,\"a \":2}"), S("{\"a\" : 1 , \"b\" : 2}"), S("{\"a\":null,\"b\":true}"),
    /* strings */
    S("[\"\\u0060\\u012a\\u12AB\"]"), S("[\"\\uD801\\udc37\"]"), S("[\"\\ud83d\\ude39\\ud83d\\udc8d\"]"), S("[\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"]"), S("[\"\\\\u0000\"]"), S("[\"\\\"\"]"), S("[\"a/*b*/c/*d//e\"]"),
    S("[\"\\\\a\"]"), S("[\"\\\\n\"]"), S("[\"\\u0012\"]"), S("[\"\\uFFFF\"]"), S("[\"asd\"]"), S("[ \"asd\"]"), S("[\"\\uDBFF\\uDFFF\"]"), S("[\"new\\u00A0line\"]"), S("[\"\xf4\x8f\xbf\xbf\"]"), S("[\"\xef\xbf\xbf\"]"),
    S("[\"\\u0000\"]"), S("[\"\\u002c\"]"), S("[\"\xcf\x80\"]"), S("[\"\xf0\x9b\xbf\xbf\"]"), S("[\"asd \"]"), S("\" \""), S("[\"\\uD834\\uDd1e\"]"), S("[\"\\u0821\"]"), S("[\"\\u0123\"]"), S("[\"\xe2\x80\xa8\"]"),
    S("[\"\xe2\x80\xa9\"]"), S("[\"\\u0061\\u30af\\u30EA\\u30b9\"]"), S("[\"new\\u000Aline\"]"), S("[\"\x7f\"]"), S("[\"\\uA66D\"]"), S("[\"\xe2\x8d\x82\xe3\x88\xb4\xe2\x8d\x82\"]"), S("[\"\\u0022\"]"),
    S("[\"\\u005C\"]"), S("[\"\\u10FFFF\"]"), S("[\"\\u200B\"]"), S("[\"\\u2064\"]"), S("[\"\\uFDD0\"]"), S("[\"\\uFFFE\"]"), S("[\"\xe2\x82\xac\xf0\x9d\x84\x9e\"]"), S("[\"a\x7f""a\"]"), S("[\"\xf0\x90\x80\x80\"]"), S("[\"\xed\x9f\xbf\xee\x80\x80\"]"),
    /* the document */
    S("false"), S("42"), S("-0.1"), S("null"), S("\"asd\""), S("true"), S("\"\""), S("[\"a\"]\n"), S("[true]"), S(" [] "), S("\n\n{}\r\n"),
};

static void test_json_accepts(void)
{
    CHECK(MOQI_COUNT(accepted) >= 95);
    for (size_t i = 0; i < MOQI_COUNT(accepted); i++) {
        moq_result s = verdict(accepted[i].text, accepted[i].bytes, MOQ_JSON_STRICT), c = verdict(accepted[i].text, accepted[i].bytes, MOQ_JSON_CONFIG);
        if (s != MOQ_OK || c != MOQ_OK) { CHECK_STR(accepted[i].text, "accepted"); }
    }
}

/* ---- what it must refuse ---- */

static const sample refused[] = {
    /* arrays */
    S("[1 true]"), S("[a\xe5]"), S("[\"\": 1]"), S("[\"\"],"), S("[,1]"), S("[1,,2]"), S("[\"x\",,]"), S("[\"x\"]]"), S("[\"\",]"), S("[\"x\""), S("[x"), S("[3[ 4]]"), S("[\xff]"), S("[1:2]"), S("[,]"), S("[-]"),
    S("[   , \"\"]"), S("[\"a\",\n4\n,1,"), S("[1,]"), S("[\"\x0b""a\"\\f]"), S("[*]"), S("[\"\""), S("[1,"), S("[1,\n1\n,1"), S("[{}"), S("["), S("]"), S("[]]"), S("[[]"), S("[1}"), S("[1 2]"), S("[1;2]"),
    /* literals */
    S("[fals]"), S("[nul]"), S("[tru]"), S("[True]"), S("[FALSE]"), S("[Null]"), S("nul"), S("truee"), S("nulll"), S("[undefined]"), S("[None]"), S("t"), S("f"), S("n"),
    /* numbers */
    S("[++1234]"), S("[+1]"), S("[+Inf]"), S("[-01]"), S("[-1.0.]"), S("[-2.]"), S("[.-1]"), S("[.2e-3]"), S("[0.1.2]"), S("[0.3e+]"), S("[0.3e]"), S("[0.e1]"), S("[0E+]"), S("[0E]"), S("[0e+]"), S("[0e]"), S("[1.0e+]"),
    S("[1.0e-]"), S("[1.0e]"), S("[1 000.0]"), S("[1eE2]"), S("[2.e+3]"), S("[2.e-3]"), S("[2.e3]"), S("[9.e+]"), S("[Inf]"), S("[1+2]"), S("[0x1]"), S("[0x42]"), S("[-foo]"), S("[- 1]"), S("[-012]"), S("[-.123]"),
    S("[-1x]"), S("[1ea]"), S("[1e\xe5]"), S("[1.]"), S("[.123]"), S("[1.2a-3]"), S("[1.8011670033376514H-308]"), S("[012]"), S("[\xef\xbc\x91]"), S("[1_000]"), S("[00]"), S("[1,5e]"), S("01"), S("1."), S("-"), S("+0"), S(".5"), S("1e"), S("[nan]"), S("[--1]"), S("[1e5.5]"), S("[-inf]"),
    /* objects */
    S("[\"x\", truth]"), S("{[: \"x\"}\n"), S("{\"x\", null}"), S("{\"x\"::\"b\"}"), S("{\xf0\x9f\x87\xa8\xf0\x9f\x87\xad}"), S("{\"a\":\"a\" 123}"), S("{key: 'value'}"), S("{\"\xb9\":\"0\",}"), S("{\"a\" b}"), S("{:\"b\"}"), S("{\"a\" \"b\"}"), S("{\"a\":"), S("{\"a\""), S("{1:1}"),
    S("{9999E9999:1}"), S("{null:null,null:null}"), S("{\"id\":0,,,,,}"), S("{'a':0}"), S("{\"id\":0,}"), S("{\"a\":\"b\"}/**/"), S("{\"a\":\"b\"}/**//"), S("{\"a\":\"b\"}//"), S("{\"a\":\"b\"}/"), S("{\"a\":\"b\",,\"c\":\"d\"}"),
    S("{a: \"b\"}"), S("{\"a\":\"a"), S("{ \"foo\" : \"bar\", \"a\" }"), S("{\"a\":\"b\"}#"), S("{"), S("}"), S("{}}"), S("{\"a\":1]"), S("{\"a\":}"), S("{,}"), S("{,\"a\":1}"), S("{\"a\":1 \"b\":2}"), S("{\"a\":1;}"), S("{true:1}"), S("{{}:1}"), S("{[]:1}"),
    /* strings */
    S("[\"\\uD800\\\"]"), S("[\"\\uD800\\u\"]"), S("[\"\\uD800\\u1\"]"), S("[\"\\uD800\\u1x\"]"), S("[\xc3\xa9]"), S("[\"\\\x00\"]"), S("[\"\\\\\\\"]"), S("[\"\\\t\"]"), S("[\"\\\xf0\x9f\x8c\x80\"]"), S("[\"\\\"]"), S("[\"\\u00A\"]"), S("[\"\\uD834\\uDd\"]"),
    S("[\"\\uD800\\uD800\\x\"]"), S("[\"\\a\"]"), S("[\"\\uqqqq\"]"), S("[\"\\\xe5\"]"), S("[\\u0020\"asd\"]"), S("[\\n]"), S("\""), S("['single quote']"), S("abc"), S("[\"\\"), S("[\"a\x00""a\"]"), S("[\"new\nline\"]"), S("[\"\t\"]"), S("\"\\UA66D\""), S("[\"\\x00\"]"),
    S("\"asd"), S("[\"\\u\"]"), S("[\"\\u12\"]"), S("[\"\x01\"]"), S("[\"\x1f\"]"), S("[\"\\'\"]"), S("[\"\\0\"]"), S("`a`"), S("[\"a\"\"b\"]"),
    /* the document */
    S(""), S(" "), S("\n"), S("<.>"), S("[<null>]"), S("[1]x"), S("[\xe2\x81\xa0]"), S("[\x0c]"), S("\xef\xbb\xbf"), S("*"), S("{\"a\":/*comment*/\"b\"}"), S("[\"a\"] // x"), S("{\"a\": true} \"x\""), S("['"), S("[,"), S("{\"a\":\"b"), S("{'a'"), S("[\"\\{[\"\\{["),
    S("\xe5"), S("[1]\x00"), S("\xc2\xa0[1]"), S("[\xc2\x85""1]"), S("2@"), S("[][]"), S("1 2"), S("\"a\" \"b\""), S("{}{}"), S("[\x0b]"), S("nullnull"), S("# a\n{}"), S("//x\n[]"), S("[\xe2\x80\xa8]"),
};

static const sample config_only[] = {
    S("[NaN]"), S("[Infinity]"), S("[-Infinity]"), S("NaN"), S("{\"a\": Infinity, \"b\": -Infinity, \"c\": NaN}"), S("\xef\xbb\xbf{}"), S("\xef\xbb\xbf [1]"),
};

static const sample never_config[] = {
    S("[-NaN]"), S("[+NaN]"), S("[+Infinity]"), S("[nan]"), S("[NAN]"), S("[infinity]"), S("[Inf]"), S("[Infinit]"), S("[NaNN]"), S("[Infinity1]"), S("[--Infinity]"), S("\xef\xbb\xbf\xef\xbb\xbf{}"), S("{}\xef\xbb\xbf"), S("[- Infinity]"), S("[1e Infinity]"),
    S("{NaN: 1}"), S("[-N]"), S("[N]"), S("\xef\xbb"),
};

static void test_json_refuses(void)
{
    CHECK(MOQI_COUNT(refused) >= 188);
    for (size_t i = 0; i < MOQI_COUNT(refused); i++) {
        moq_result s = verdict(refused[i].text, refused[i].bytes, MOQ_JSON_STRICT), c = verdict(refused[i].text, refused[i].bytes, MOQ_JSON_CONFIG);
        if ((s != MOQ_E_JSON && s != MOQ_E_UTF8) || (c != MOQ_E_JSON && c != MOQ_E_UTF8)) { CHECK_STR(refused[i].text, "refused"); }
    }
    for (size_t i = 0; i < MOQI_COUNT(config_only); i++) {
        CHECK(verdict(config_only[i].text, config_only[i].bytes, MOQ_JSON_STRICT) < 0);
        CHECK_INT(verdict(config_only[i].text, config_only[i].bytes, MOQ_JSON_CONFIG), MOQ_OK);
    }
    for (size_t i = 0; i < MOQI_COUNT(never_config); i++) {
        CHECK(verdict(never_config[i].text, never_config[i].bytes, MOQ_JSON_STRICT) < 0);
        if (verdict(never_config[i].text, never_config[i].bytes, MOQ_JSON_CONFIG) >= 0) CHECK_STR(never_config[i].text, "refused");
    }
}

/* ---- where RFC 8259 leaves the choice: ours, fixed ---- */

static const struct { sample s; moq_result strict, config; } choices[] = {
    {S("[123.456e-789]"), MOQ_OK, MOQ_OK}, {S("[0.4e00669999999999999999999999999999999999999999999999999999999999999999999999969999999006]"), MOQ_OK, MOQ_OK},
    {S("[-1e+9999]"), MOQ_OK, MOQ_OK}, {S("[1.5e+9999]"), MOQ_OK, MOQ_OK}, {S("[-123123e100000]"), MOQ_OK, MOQ_OK}, {S("[123123e100000]"), MOQ_OK, MOQ_OK}, {S("[123e-10000000]"), MOQ_OK, MOQ_OK},
    {S("[-123123123123123123123123123123]"), MOQ_OK, MOQ_OK}, {S("[100000000000000000000]"), MOQ_OK, MOQ_OK}, {S("[-237462374673276894279832749832423479823246327846]"), MOQ_OK, MOQ_OK},
    {S("{\"\\uDFAA\":0}"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\\uDADA\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\\uD888\\u1234\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\xe6\x97\xa5\xd1\x88\xfa\"]"), MOQ_E_UTF8, MOQ_E_UTF8},
    {S("[\"\\uD800\\n\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\\uDd1ea\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\\uD800\\uD800\\n\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\\ud800\"]"), MOQ_E_UTF8, MOQ_E_UTF8},
    {S("[\"\\uD800\\uE000\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\\uD800\\uDBFF\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\\uD800\\uFFFF\"]"), MOQ_E_UTF8, MOQ_E_UTF8},
    {S("[\"\\ud800abc\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\xff\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\\uDd1e\\uD834\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\xe9\"]"), MOQ_E_UTF8, MOQ_E_UTF8},
    {S("[\"\\uDFAA\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\xed\xa0\x80\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\xc0\xaf\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\xfc\x83\xbf\xbf\xbf\xbf\"]"), MOQ_E_UTF8, MOQ_E_UTF8},
    {S("[\"\xfc\x80\x80\x80\x80\x80\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\xe0\xff\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\x81\"]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\"\xf4\xbf\xbf\xbf\"]"), MOQ_E_UTF8, MOQ_E_UTF8},
    {S("\xff\xfe[\x00\"\x00\xe9\x00\"\x00]\x00"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("\x00[\x00\"\x00\xe9\x00\"\x00]"), MOQ_E_UTF8, MOQ_E_UTF8}, {S("[\x00\"\x00\xe9\x00\"\x00]\x00"), MOQ_E_UTF8, MOQ_E_UTF8},
    {S("\xef\xbb\xbf{}"), MOQ_E_UTF8, MOQ_OK}, {S("{\"a\":1,\"a\":2}"), MOQ_E_DUPLICATE, MOQ_E_DUPLICATE}, {S("{\"a\":1,\"\\u0061\":1}"), MOQ_E_DUPLICATE, MOQ_E_DUPLICATE},
};

static void test_json_choices(void)
{
    for (size_t i = 0; i < MOQI_COUNT(choices); i++) {
        CHECK_INT(verdict(choices[i].s.text, choices[i].s.bytes, MOQ_JSON_STRICT), choices[i].strict);
        CHECK_INT(verdict(choices[i].s.text, choices[i].s.bytes, MOQ_JSON_CONFIG), choices[i].config);
    }
}

/* ---- messages ---- */

static void check_message(const char *s, moq_result code, int64_t offset, const char *part)
{
    moq_error err;
    moq_json_doc *doc = parse(s, strlen(s), MOQ_JSON_STRICT, &err);
    CHECK(doc == NULL);
    CHECK_INT(err.code, code);
    CHECK_INT(err.offset, offset);
    CHECK_STR(err.file, "t.json");
    if (!strstr(err.text, part)) CHECK_STR(err.text, part);
}

static void test_json_messages(void)
{
    check_message("{\"a\": 1,\n \"b\": tru}", MOQ_E_JSON, 15, "line 2, column 7");
    check_message("{\"\xc3\xa9\xe2\x82\xac\": x}", MOQ_E_JSON, 10, "line 1, column 8: found 'x'");
    check_message("[1, 2,]", MOQ_E_JSON, 6, "the comma before it must go");
    check_message("{\"a\": 1, }", MOQ_E_JSON, 9, "the comma before it must go");
    check_message("{'a': 1}", MOQ_E_JSON, 1, "double quotes");
    check_message("[1] // x", MOQ_E_JSON, 4, "no comments");
    check_message("[NaN]", MOQ_E_JSON, 1, "not JSON");
    check_message("[1", MOQ_E_JSON, 2, "probably incomplete");
    check_message("[\"abc", MOQ_E_JSON, 1, "not closed");
    check_message("[\"\x01\"]", MOQ_E_JSON, 2, "control byte");
    check_message("[\"\\q\"]", MOQ_E_JSON, 2, "unknown escape");
    check_message("{\"layer \x1b\": 1, \"layer \x1b\": 2}", MOQ_E_JSON, 8, "control byte");
    check_message("{\"a\": {\"dtype\": 1,\n\"x\": 2, \"dtype\": 3}}", MOQ_E_DUPLICATE, 36, "key 'dtype'");
    check_message("\xff\xfe{", MOQ_E_UTF8, 0, "UTF-16");
    check_message("[\"a\xff\"]", MOQ_E_UTF8, 3, "0xff");
    moq_error err;
    moq_json_doc *doc = parse_text("{\"a\\u001bb\": 1, \"a\\u001bb\": 2}", MOQ_JSON_STRICT);
    CHECK(doc == NULL);
    CHECK(moq_json_parse("{\"a\\u001bb\": 1, \"a\\u001bb\": 2}", 30, MOQ_JSON_STRICT, 0, NULL, NULL, &err) == NULL);
    CHECK(strstr(err.text, "a\\x1bb") != NULL);
    CHECK(moq_json_parse(NULL, 0, MOQ_JSON_STRICT, 0, NULL, NULL, NULL) == NULL);
}

/* ---- values ---- */

static void test_json_tree(void)
{
    static const char text[] = " {\"a\": [1, {\"x\": []}, \"s\\n\\ud83d\\ude00\"], \"b\": {}, \"\": false, \"n\\u0000n\": -1.50e3} ";
    moq_json_doc *doc = parse_text(text, MOQ_JSON_STRICT);
    const moq_json *r = moq_json_root(doc), *a = moq_json_find(r, "a");
    CHECK(r && r->type == MOQ_JSON_OBJECT && r->count == 4 && r->skip == 9 && r->offset == 1 && r->key == NULL);
    CHECK(a && a->type == MOQ_JSON_ARRAY && a->count == 3 && a->skip == 5 && a->offset == 7);
    CHECK_STR(a->key, "a");
    CHECK(moq_json_at(a, 0)->type == MOQ_JSON_NUMBER && moq_json_at(a, 3) == NULL);
    CHECK(moq_json_find(moq_json_at(a, 1), "x")->count == 0);
    CHECK_STR(moq_json_string(moq_json_at(a, 2)), "s\n\xf0\x9f\x98\x80");
    CHECK_INT(moq_json_at(a, 2)->text_bytes, 6);
    CHECK(moq_json_is(moq_json_at(a, 2), "s\n\xf0\x9f\x98\x80") && !moq_json_is(moq_json_at(a, 2), "s") && !moq_json_is(a, "s") && !moq_json_is(NULL, "s"));
    CHECK(moq_json_find(r, "b")->skip == 1 && moq_json_find(r, "")->type == MOQ_JSON_FALSE && moq_json_find(r, "n") == NULL);
    const moq_json *e = moq_json_at(NULL, 0);
    int n = 0;
    for (e = moq_json_first(r); e; e = moq_json_next(r, e)) n++;
    CHECK_INT(n, 4);
    e = r + 8;
    CHECK(e->key_bytes == 3 && memcmp(e->key, "n\0n", 3) == 0);
    CHECK_STR(e->text, "-1.50e3");
    CHECK(moq_json_first(NULL) == NULL && moq_json_next(NULL, NULL) == NULL && moq_json_find(a, "a") == NULL && moq_json_at(r, 0) == NULL);
    CHECK(moq_json_first(moq_json_find(r, "b")) == NULL && moq_json_string(r) == NULL && moq_json_root(NULL) == NULL);
    moq_json_destroy(doc);
    moq_json_destroy(NULL);
    CHECK_INT(test_state.live_allocs, 0);
}

static void check_int(const char *s, int ok, int64_t want)
{
    moq_json_doc *doc = parse_text(s, MOQ_JSON_CONFIG);
    int64_t v = 77;
    CHECK_INT(moq_json_int(moq_json_root(doc), &v), ok);
    CHECK_INT(v, ok ? want : 77);
    moq_json_destroy(doc);
}

static void check_u64(const char *s, int ok, uint64_t want)
{
    moq_json_doc *doc = parse_text(s, MOQ_JSON_CONFIG);
    uint64_t v = 77;
    CHECK_INT(moq_json_u64(moq_json_root(doc), &v), ok);
    CHECK(v == (ok ? want : 77));
    moq_json_destroy(doc);
}

static void test_json_integers(void)
{
    check_int("0", 1, 0);
    check_int("-0", 1, 0);
    check_int("9223372036854775807", 1, INT64_MAX);
    check_int("9223372036854775808", 0, 0);
    check_int("-9223372036854775808", 1, INT64_MIN);
    check_int("-9223372036854775809", 0, 0);
    check_int("1.0", 0, 0);
    check_int("1e2", 0, 0);
    check_int("1E2", 0, 0);
    check_int("\"1\"", 0, 0);
    check_int("true", 0, 0);
    check_int("Infinity", 0, 0);
    check_int("NaN", 0, 0);
    check_int("-Infinity", 0, 0);
    check_int("{\"__float__\": \"Infinity\"}", 0, 0);
    check_int("99999999999999999999999999999999999999999999", 0, 0);
    check_u64("18446744073709551615", 1, UINT64_MAX);
    check_u64("18446744073709551616", 0, 0);
    check_u64("-1", 0, 0);
    check_u64("-0", 0, 0);
    check_u64("2.0", 0, 0);
    check_u64("2e0", 0, 0);
    check_u64("NaN", 0, 0);
    int b = 5;
    int64_t i = 5;
    double d = 5;
    uint64_t u = 5;
    CHECK(!moq_json_int(NULL, &i) && !moq_json_u64(NULL, &u) && !moq_json_float(NULL, &d) && !moq_json_bool(NULL, &b));
    moq_json_doc *doc = parse_text("[true, false, null]", MOQ_JSON_STRICT);
    const moq_json *r = moq_json_root(doc);
    CHECK(moq_json_bool(moq_json_at(r, 0), &b) && b == 1 && moq_json_bool(moq_json_at(r, 1), &b) && b == 0 && !moq_json_bool(moq_json_at(r, 2), &b) && !moq_json_bool(r, &b));
    moq_json_destroy(doc);
}

/* ---- floats against exact arithmetic ----
   Oracle: D * 10^e is compared with the midpoints around the answer m * 2^k, as integers: digits as decimal strings,
   multiplied by small numbers one by one. Nothing but addition of digits, so nothing shared with the header. */

typedef struct digits { uint8_t d[2600]; int n; } digits; /* decimal, lowest first */

static void digits_mul(digits *x, int m)
{
    int carry = 0;
    for (int i = 0; i < x->n; i++) {
        carry += x->d[i] * m;
        x->d[i] = (uint8_t)(carry % 10);
        carry /= 10;
    }
    for (; carry; carry /= 10) x->d[x->n++] = (uint8_t)(carry % 10);
}

static int digits_compare(const digits *a, const digits *b)
{
    if (a->n != b->n) return a->n < b->n ? -1 : 1;
    for (int i = a->n - 1; i >= 0; i--)
        if (a->d[i] != b->d[i]) return a->d[i] < b->d[i] ? -1 : 1;
    return 0;
}

/* Compares the decimal spelled in s (no sign) with m * 2^k. */
static int compare_with(const char *s, uint64_t m, int k)
{
    static digits a, b;
    int e = 0, point = 0;
    a.n = b.n = 0;
    const char *p = s;
    char all[2000];
    int n = 0;
    for (; *p && *p != 'e' && *p != 'E'; p++) {
        if (*p == '.') { point = 1; continue; }
        all[n++] = *p;
        e -= point;
    }
    if (*p) e += atoi(p + 1);
    for (int i = n - 1; i >= 0; i--) a.d[a.n++] = (uint8_t)(all[i] - '0');
    while (a.n && !a.d[a.n - 1]) a.n--;
    for (; m; m /= 10) b.d[b.n++] = (uint8_t)(m % 10);
    if (e > 0) { memmove(a.d + e, a.d, (size_t)a.n); memset(a.d, 0, (size_t)e); if (a.n) a.n += e; }
    if (e < 0) { memmove(b.d - e, b.d, (size_t)b.n); memset(b.d, 0, (size_t)-e); if (b.n) b.n -= e; }
    for (; k > 0; k--) digits_mul(&b, 2);
    for (; k < 0; k++) digits_mul(&a, 2);
    return digits_compare(&a, &b);
}

static void check_float(const char *s)
{
    double v = -7;
    char text[2100];
    snprintf(text, sizeof text, "%s", s);
    CHECK(moqi_read_decimal(text, &v));
    uint64_t b;
    memcpy(&b, &v, 8);
    CHECK((b >> 63) == (s[0] == '-'));
    b &= ~((uint64_t)1 << 63);
    const char *digits_of = s + (s[0] == '-');
    /* b as mantissa and exponent; the midpoint above is (2m + 1) * 2^(k-1), the one below (2m - 1) * 2^(k-1) except at powers of two. */
    int field = (int)(b >> 52), k = (field ? field : 1) - 1075;
    uint64_t m = (b & 0xfffffffffffffu) | (uint64_t)(field > 0) << 52;
    int up = compare_with(digits_of, 2 * m + 1, k - 1);
    int power = field > 1 && (b & 0xfffffffffffffu) == 0;
    int down = m == 0 ? 1 : power ? compare_with(digits_of, 4 * m - 1, k - 2) : compare_with(digits_of, 2 * m - 1, k - 1);
    int right = (up < 0 || (up == 0 && !(m & 1))) && (down > 0 || (down == 0 && !(m & 1)));
    if (!right) { CHECK(right); fprintf(stderr, "  %s -> %.17g\n", s, v); }
}

static void test_json_floats(void)
{
    static const char *const hard[] = {
        "0", "-0", "0.0", "0e5", "1", "10", "0.1", "0.3", "1e23", "8.5e22", "1e22", "9007199254740993", "9007199254740992", "9007199254740991", "9007199254740995", "9007199254740993.0000000000000000000000000000000001",
        "5e-324", "4.9406564584124654e-324", "2.4703282292062327e-324", "2.4703282292062328e-324", "2.47e-324", "7.4e-324", "1e-323", "2.2250738585072011e-308", "2.2250738585072012e-308", "2.2250738585072014e-308",
        "2.225073858507201136057409796709131975934819546351645648023426109724822222021076945516529523908135087914149158913039621106870086438694594645527657207407820621743379988141063267329253552286881372149012981122451451889849057222307285255133155755015914397476397983411801999323962548289017107081850690630666655994938275772572015763062690663332647565300009245888316433037779791869612049497390377829704905051080609940730262937128958950003583799967207254304360284078895771796150945516748243471030702609144621572289880258182545180325707018860872113128079512233426288368622321503775666622503982534335974568884423900265498198385487948292206894721689831099698365846814022854243330660339850886445804001034933970427567186443383770486037861622771738545623065874679014086723327636718751234567890123456789012345678901e-308",
        "1.7976931348623157e308", "1.7976931348623158e308", "1.797693134862315807e308", "123456789012345678901234567890", "1e-400", "0.000001", "3.141592653589793238462643383279502884197169399375105820974944592307816406286",
        "6.9294956446009195e15", "3.7455744005952583e15", "2.2250738585072011360574097967091319759348195463516456480e-308", "1e308", "100000000000000016777215", "100000000000000016777216", "179769313486231580793728971405301e276",
        "0.500000000000000166533453693773481063544750213623046875", "3.518437208883201171875e13", "62.5364939768271845828", "8.10109172351e-10", "1.50000000000000011102230246251565", "32.1e-1", "9214843084008499", "30078505129381147446200",
        "1777820000000000000001", "0.00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000001e110", "1234567890123456789012345678901234567890e-50", "-1.5e-5", "-2.5",
    };
    for (size_t i = 0; i < MOQI_COUNT(hard); i++) check_float(hard[i]);
    /* 2^53 + 1 lies half way: one digit far behind decides, wherever it stands. */
    char far[1300];
    for (size_t zeros = 700; zeros < 1200; zeros += 37) {
        snprintf(far, sizeof far, "9007199254740993.");
        memset(far + 17, '0', zeros);
        memcpy(far + 17 + zeros, "1", 2);
        check_float(far);
        far[17 + zeros] = '0';
        check_float(far);
    }
    double v = 3;
    CHECK(!moqi_read_decimal("1e309", &v) && !moqi_read_decimal("1.7976931348623159e308", &v) && !moqi_read_decimal("-1e999999999999999999999999", &v) && v > 2.9);
    CHECK(moqi_read_decimal("1e-999999999999999999999999", &v) && v < 1e-300);
    CHECK(moqi_read_decimal("0e999999999999999999999999", &v) && v < 1e-300);
}

static void test_json_floats_random(void)
{
    char text[120];
    for (int i = 0; i < 1200; i++) {
        int n = 0, want = 1 + (int)(test_random() % 25), point = (int)(test_random() % 30);
        for (int k = 0; k < want; k++) {
            text[n++] = (char)('0' + test_random() % 10);
            if (k == point && k + 1 < want) text[n++] = '.';
        }
        int e = i % 3 ? (int)(test_random() % 60) - 30 : (int)(test_random() % 600) - 320;
        snprintf(text + n, sizeof text - (size_t)n, "e%d", e);
        double v;
        if (moqi_read_decimal(text, &v)) check_float(text);
    }
    /* Exact halfway points between neighbours, and one unit in their last place to either side. */
    for (int i = 0; i < 300; i++) {
        static digits x;
        uint64_t m = ((uint64_t)1 << 53) + ((uint64_t)(test_random() & 0x1fffff) << 32 | test_random());
        m = m * 2 + 1; /* 54 bits and an odd last one */
        int k = (int)(test_random() % 60);
        x.n = 0;
        for (uint64_t r = m; r; r /= 10) x.d[x.n++] = (uint8_t)(r % 10);
        for (int j = 0; j < k; j++) digits_mul(&x, i % 2 ? 2 : 5); /* m * 2^k, or m / 2^k = m * 5^k / 10^k */
        for (int turn = 0; turn < 2; turn++) {
            char s[200];
            int n = 0;
            for (int j = x.n - 1; j >= 0; j--) s[n++] = (char)('0' + x.d[j]);
            snprintf(s + n, sizeof s - (size_t)n, "e%d", i % 2 ? 0 : -k);
            check_float(s);
            if (x.d[0] < 9) x.d[0]++;
        }
    }
}

static void test_json_float_fields(void)
{
    static const struct { const char *text; int ok; uint64_t bits; } table[] = {
        {"1.5", 1, 0x3ff8000000000000u}, {"-0", 1, 0x8000000000000000u}, {"3", 1, 0x4008000000000000u}, {"Infinity", 1, 0x7ff0000000000000u}, {"-Infinity", 1, 0xfff0000000000000u},
        {"NaN", 1, 0x7ff8000000000000u}, {"{\"__float__\": \"Infinity\"}", 1, 0x7ff0000000000000u}, {"{\"__float__\": \"-Infinity\"}", 1, 0xfff0000000000000u},
        {"{\"__float__\": \"NaN\"}", 1, 0x7ff8000000000000u}, {"{\"__float__\": \"1.0\"}", 0, 0}, {"{\"__float__\": 1.0}", 0, 0}, {"{\"__float__\": Infinity}", 0, 0}, {"{\"__float__\": \"Infinity\", \"x\": 1}", 0, 0},
        {"{\"float\": \"Infinity\"}", 0, 0}, {"\"Infinity\"", 0, 0}, {"\"1.5\"", 0, 0}, {"[1.5]", 0, 0}, {"{}", 0, 0}, {"null", 0, 0}, {"true", 0, 0}, {"1e400", 0, 0}, {"-1e400", 0, 0}, {"1e-400", 1, 0},
    };
    for (size_t i = 0; i < MOQI_COUNT(table); i++) {
        moq_json_doc *doc = parse_text(table[i].text, MOQ_JSON_CONFIG);
        double v = 42, untouched = 42;
        uint64_t b;
        CHECK_INT(moq_json_float(moq_json_root(doc), &v), table[i].ok);
        memcpy(&b, &v, 8);
        if (!table[i].ok) CHECK(memcmp(&v, &untouched, 8) == 0);
        else if (b != table[i].bits) CHECK_STR(table[i].text, "other bits");
        moq_json_destroy(doc);
    }
}

static void test_json_long_numbers(void)
{
    /* 400 digits: an integer field refuses, a float field is right; 4 M digits: linear time. */
    size_t n = 4000000;
    char *s = (char *)malloc(n + 8);
    uint64_t u = 1;
    double v = 1;
    memset(s, '9', n);
    s[400] = 0;
    moq_json_doc *doc = parse(s, 400, MOQ_JSON_STRICT, NULL);
    CHECK(doc && !moq_json_u64(moq_json_root(doc), &u) && !moq_json_float(moq_json_root(doc), &v));
    moq_json_destroy(doc);
    memset(s, '1', 308);
    s[308] = 0;
    check_float(s);
    s[308] = '1';
    s[1] = '.';
    s[400] = '9';
    double before = test_seconds();
    doc = parse(s, n, MOQ_JSON_STRICT, NULL);
    CHECK(doc && moq_json_float(moq_json_root(doc), &v) && v > 1.11 && v < 1.12);
    CHECK(test_seconds() - before < 5);
    moq_json_destroy(doc);
    free(s);
}

/* ---- limits, size, time ---- */

static void test_json_depth(void)
{
    static char text[2100];
    for (int depth = 1; depth <= 100; depth++)
        for (int object = 0; object < 2; object++) {
            int n = 0;
            moq_error err;
            for (int i = 0; i < depth; i++) n += snprintf(text + n, sizeof text - (size_t)n, object ? "{\"a\":" : "[");
            n += snprintf(text + n, sizeof text - (size_t)n, "0");
            for (int i = 0; i < depth; i++) n += snprintf(text + n, sizeof text - (size_t)n, object ? "}" : "]");
            CHECK_INT(verdict(text, (size_t)n, MOQ_JSON_STRICT), depth <= 64 ? MOQ_OK : MOQ_E_LIMIT);
            moq_json_doc *doc = moq_json_parse(text, (size_t)n, MOQ_JSON_STRICT, 8, NULL, NULL, &err);
            CHECK((doc != NULL) == (depth <= 8));
            if (!doc) CHECK(err.code == MOQ_E_LIMIT && err.offset == 8 * (object ? 5 : 1));
            moq_json_destroy(doc);
        }
    /* Siblings do not add up, and a bomb of 20 MB costs little. */
    CHECK_INT(verdict("[[],[],[[]],[[[]]],[]]", 22, MOQ_JSON_STRICT), MOQ_OK);
    size_t n = 20000000;
    char *bomb = (char *)malloc(n);
    for (int kind = 0; kind < 3; kind++) {
        double before = test_seconds();
        for (size_t i = 0; i < n; i++) bomb[i] = kind == 0 ? '[' : kind == 1 ? "{\"a\":"[i % 5] : i == 0 ? '[' : ',';
        moq_result r = verdict(bomb, n, MOQ_JSON_STRICT);
        CHECK_INT(r, kind == 2 ? MOQ_E_JSON : MOQ_E_LIMIT);
        CHECK(test_seconds() - before < 5);
    }
    free(bomb);
}

/* {"PREFIX0":0,"PREFIX1":0,...} */
static char *many_keys(size_t count, int duplicate, size_t *bytes)
{
    static const char prefix[] = "model.language_model.layers.17.self_attn.some_projection.weight_scale_";
    char *s = (char *)malloc(count * (sizeof prefix + 16) + 16);
    size_t n = 0;
    s[n++] = '{';
    for (size_t i = 0; i < count; i++)
        n += (size_t)sprintf(s + n, "%s\"%s%zu\":0", i ? "," : "", prefix, duplicate && i == count - 1 ? (count - 1) / 2 : i);
    s[n++] = '}';
    *bytes = n;
    return s;
}

static void test_json_many_keys(void)
{
    static const size_t counts[] = {2, 11, 12, 13, 14, 100, 60000, 1000000};
    for (size_t k = 0; k < MOQI_COUNT(counts); k++) {
        size_t n;
        for (int duplicate = 0; duplicate < 2; duplicate++) {
            char *s = many_keys(counts[k], duplicate, &n), name[32];
            moq_error err;
            double before = test_seconds();
            moq_json_doc *doc = moq_json_parse(s, n, MOQ_JSON_STRICT, 8, NULL, NULL, &err);
            double seconds = test_seconds() - before;
            CHECK((doc == NULL) == duplicate);
            CHECK(seconds < 0.5 + (double)counts[k] * 5e-5); /* quadratic would take an hour */
            snprintf(name, sizeof name, "scale_%u", (unsigned)((counts[k] - 1) / 2));
            if (duplicate) CHECK(err.code == MOQ_E_DUPLICATE && strstr(err.object, name));
            else CHECK_INT(moq_json_root(doc)->count, counts[k]);
            moq_json_destroy(doc);
            free(s);
        }
    }
}

static void test_json_first_duplicate(void)
{
    /* Two pairs: the one whose second member comes first is named, whatever the sort makes of it. */
    char text[600];
    for (int big = 0; big < 2; big++) {
        int n = snprintf(text, sizeof text, "{\"p\":1,\"q\":1,");
        for (int i = 0; i < (big ? 30 : 1); i++) n += snprintf(text + n, sizeof text - (size_t)n, "\"k%d\":1,", i);
        n += snprintf(text + n, sizeof text - (size_t)n, "\"q\":2,\"p\":2}");
        moq_error err;
        CHECK(parse(text, (size_t)n, MOQ_JSON_STRICT, &err) == NULL);
        CHECK_STR(err.object, "q");
    }
}

static void test_json_long_string(void)
{
    size_t n = 10000000 / 6 * 6;
    char *s = (char *)malloc(n + 2);
    s[0] = s[n + 1] = '"';
    for (size_t i = 0; i < n; i += 6) memcpy(s + 1 + i, "\\u0061", 6);
    double before = test_seconds();
    moq_json_doc *doc = parse(s, n + 2, MOQ_JSON_STRICT, NULL);
    CHECK(doc && moq_json_root(doc)->text_bytes == n / 6);
    CHECK(test_seconds() - before < 5);
    moq_json_destroy(doc);
    free(s);
}

static void test_json_memory_bound(void)
{
    /* Nodes are 40 bytes: the densest text, "[0,0,...]", costs 20 times itself plus doubling; a header much less. */
    size_t n = 1000001;
    char *s = (char *)malloc(n);
    for (size_t i = 0; i < n; i++) s[i] = i == 0 ? '[' : i == n - 1 ? ']' : i % 2 ? '0' : ',';
    moq_json_doc *doc = parse(s, n, MOQ_JSON_STRICT, NULL);
    CHECK(doc && doc->count == n / 2 + 1 && doc->capacity <= 2 * doc->count && doc->text_capacity == n + 1);
    moq_json_destroy(doc);
    free(s);
}

static const char sample_document[] =
    "{\"a\": [1, -2.5e3, \"x\\u00e9\\ud83d\\ude00\", null, true, false, {}, []],\n \"b\": {\"c\": {\"d\": [[[0]]]}},"
    "\"k0\":0,\"k1\":1,\"k2\":2,\"k3\":3,\"k4\":4,\"k5\":5,\"k6\":6,\"k7\":7,\"k8\":8,\"k9\":9,\"k10\":10,\"k11\":11,\"\xe2\x82\xac\":\"\xf0\x9d\x84\x9e\"}";

static void test_json_every_prefix_fails(void)
{
    size_t n = sizeof sample_document - 1;
    CHECK_INT(verdict(sample_document, n, MOQ_JSON_STRICT), MOQ_OK);
    for (size_t k = 0; k < n; k++) CHECK(verdict(sample_document, k, MOQ_JSON_STRICT) < 0);
    /* A number may end early and be a number. */
    for (size_t k = 1; k < 8; k++) CHECK_INT(verdict("-12.5e10", k, MOQ_JSON_STRICT), k == 1 || k == 4 || k == 6 ? MOQ_E_JSON : MOQ_OK);
}

static void test_json_every_flip(void)
{
    /* Every bit flip: accepted or refused with a whole message, never a crash; accepted ones read back as one tree. */
    char text[sizeof sample_document];
    int fine = 0, bad = 0;
    for (size_t i = 0; i < sizeof text - 1; i++)
        for (int bit = 0; bit < 8; bit++) {
            memcpy(text, sample_document, sizeof text);
            text[i] = (char)(text[i] ^ (1 << bit));
            moq_json_doc *doc = parse(text, sizeof text - 1, MOQ_JSON_CONFIG, NULL);
            if (!doc) { bad++; continue; }
            const moq_json *r = moq_json_root(doc);
            CHECK(r->skip == doc->count);
            fine++;
            moq_json_destroy(doc);
        }
    CHECK(fine > 100 && bad > 100);
}

static void test_json_failing_allocations(void)
{
    /* 400 elements of 2 bytes: growth by doubling happens too; 14 keys: so does the search of duplicates by sorting. */
    static char text[4000];
    int n = snprintf(text, sizeof text, "%.*s,\"z\":[0", (int)sizeof sample_document - 2, sample_document);
    for (int i = 0; i < 600; i++) n += snprintf(text + n, sizeof text - (size_t)n, ",0");
    n += snprintf(text + n, sizeof text - (size_t)n, "]}");
    moq_allocator a = test_allocator();
    for (int forever = 0; forever < 2; forever++) {
        int k = 1;
        for (;; k++) {
            moq_error err;
            test_state.fail_at = k;
            test_state.fail_forever = forever;
            moq_json_doc *doc = moq_json_parse(text, (size_t)n, MOQ_JSON_STRICT, 0, "t.json", &a, &err);
            test_state.fail_at = 0;
            if (doc) { moq_json_destroy(doc); break; }
            CHECK_INT(err.code, MOQ_E_NOMEM);
            CHECK_INT(test_state.live_allocs, 0);
        }
        CHECK(k > 5);
        CHECK_INT(test_state.live_allocs, 0);
    }
}

/* ---- UTF-8: the classes of Markus Kuhn's stress test, as ranges ---- */

static int valid(const char *s, size_t n)
{
    uint8_t *copy = test_copy(s, n);
    size_t bad = 999;
    int ok = moqi_utf8_valid(copy, n, &bad);
    CHECK(ok ? bad == 999 : bad <= n);
    free(copy);
    return ok;
}

/* Raw encoding of any value in any length, also where that is forbidden. */
static size_t raw_utf8(uint32_t c, size_t len, char *out)
{
    static const uint8_t lead[] = {0, 0, 0xc0, 0xe0, 0xf0, 0xf8, 0xfc};
    for (size_t i = len - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3f));
    out[0] = (char)(lead[len] | c);
    return len;
}

static void test_utf8_every_code_point(void)
{
    char s[8], mine[8];
    for (uint32_t c = 0; c < 0x110000; c++) {
        size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
        int surrogate = c >= 0xd800 && c < 0xe000;
        raw_utf8(c, n, s);
        CHECK(moqi_utf8_valid((const uint8_t *)s, n, NULL) == !surrogate);
        if (!surrogate) CHECK(moqi_utf8_put(c, mine) == n && memcmp(s, mine, n) == 0);
        if (c % 61) continue;
        for (size_t longer = n + 1; longer <= 6; longer++) { /* overlong */
            raw_utf8(c, longer, s);
            CHECK(!valid(s, longer));
        }
    }
    for (uint32_t c = 0x110000; c < 0x7fffffff - 100003; c += 100003) {
        size_t n = c < 0x200000 ? 4 : c < 0x4000000 ? 5 : 6;
        raw_utf8(c, n, s);
        CHECK(!valid(s, n));
    }
}

static void test_utf8_every_pair(void)
{
    /* All two- and three-byte strings against the definition: decode by hand, re-encode, compare. */
    for (uint32_t v = 0; v < 0x10000; v++) {
        char s[2] = {(char)(v >> 8), (char)(v & 0xff)}, t[8];
        uint32_t a = v >> 8, b = v & 0xff, c = (a & 0x1f) << 6 | (b & 0x3f);
        int two = (a >= 0xc0 && a < 0xe0 && b >= 0x80 && b < 0xc0 && c >= 0x80 && raw_utf8(c, 2, t) == 2 && memcmp(s, t, 2) == 0);
        CHECK(valid(s, 2) == (two || (a < 0x80 && b < 0x80)));
    }
    for (uint32_t v = 0xe00000; v < 0x1000000; v += 7) {
        char s[3] = {(char)(v >> 16), (char)(v >> 8 & 0xff), (char)(v & 0xff)};
        uint32_t a = v >> 16, b = v >> 8 & 0xff, d = v & 0xff, c = (a & 0xf) << 12 | (b & 0x3f) << 6 | (d & 0x3f);
        int three = a < 0xf0 && b >= 0x80 && b < 0xc0 && d >= 0x80 && d < 0xc0 && c >= 0x800 && !(c >= 0xd800 && c < 0xe000);
        CHECK(moqi_utf8_valid((const uint8_t *)s, 3, NULL) == three);
    }
}

static void test_utf8_stress_classes(void)
{
    char s[64];
    CHECK(valid("\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5", 11) && valid("", 0));
    /* first and last of each length; other boundaries */
    CHECK(valid("\0", 1) && valid("\xc2\x80", 2) && valid("\xe0\xa0\x80", 3) && valid("\xf0\x90\x80\x80", 4) && !valid("\xf8\x88\x80\x80\x80", 5) && !valid("\xfc\x84\x80\x80\x80\x80", 6));
    CHECK(valid("\x7f", 1) && valid("\xdf\xbf", 2) && valid("\xef\xbf\xbf", 3) && !valid("\xf7\xbf\xbf\xbf", 4));
    CHECK(valid("\xed\x9f\xbf", 3) && valid("\xee\x80\x80", 3) && valid("\xef\xbf\xbd", 3) && valid("\xf4\x8f\xbf\xbf", 4) && !valid("\xf4\x90\x80\x80", 4));
    /* lonely bytes: all continuation bytes, all lead bytes followed by a space, impossible bytes */
    for (int c = 0x80; c < 0x100; c++) {
        s[0] = (char)c;
        s[1] = ' ';
        CHECK(!valid(s, 1) && !valid(s, 2));
    }
    CHECK(!valid("\xfe", 1) && !valid("\xff", 1) && !valid("\xfe\xfe\xff\xff", 4));
    /* last byte missing, alone, followed by ASCII and by the next sequence */
    static const char *const whole[] = {"\xc2\x80", "\xe0\xa0\x80", "\xef\xbf\xbf", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"};
    for (size_t i = 0; i < MOQI_COUNT(whole); i++)
        for (size_t cut = 1; cut < strlen(whole[i]); cut++) {
            memcpy(s, whole[i], cut);
            s[cut] = 'a';
            memcpy(s + cut + 1, whole[i], strlen(whole[i]) + 1);
            CHECK(!valid(s, cut) && !valid(s, cut + 1) && !valid(s, cut + 1 + strlen(whole[i])) && valid(s + cut, 1 + strlen(whole[i])));
        }
    /* surrogates, single and paired */
    CHECK(!valid("\xed\xa0\x80", 3) && !valid("\xed\xaf\xbf", 3) && !valid("\xed\xb0\x80", 3) && !valid("\xed\xbf\xbf", 3) && !valid("\xed\xa0\x80\xed\xb0\x80", 6) && !valid("\xed\xaf\xbf\xed\xbf\xbf", 6));
    /* overlong NUL and slash */
    CHECK(!valid("\xc0\x80", 2) && !valid("\xe0\x80\x80", 3) && !valid("\xf0\x80\x80\x80", 4) && !valid("\xc0\xaf", 2) && !valid("\xe0\x80\xaf", 3) && !valid("\xc1\xbf", 2) && !valid("\xe0\x9f\xbf", 3) && !valid("\xf0\x8f\xbf\xbf", 4));
    /* a bad byte at every place of a text, so that the eight-byte path ends in the right place */
    for (size_t n = 1; n < 40; n++)
        for (size_t at = 0; at < n; at++) {
            size_t bad = 0;
            memset(s, 'a', n);
            s[at] = (char)0xff;
            CHECK(!moqi_utf8_valid((const uint8_t *)s, n, &bad) && bad == at);
        }
}

/* ---- writer ---- */

static void check_out(moqi_json_out *o, const char *want)
{
    CHECK_INT(o->failed, MOQ_OK);
    moqi_json_raw(o, "", 1); /* NUL */
    CHECK_STR((const char *)o->b.data, want);
    moqi_buffer_drop(&o->b);
    CHECK_INT(test_state.live_allocs, 0);
}

static void write_sample(moqi_json_out *o)
{
    moqi_json_begin(o, '{');
    moqi_json_put_key(o, "empty");
    moqi_json_begin(o, '[');
    moqi_json_end(o, ']');
    moqi_json_put_key(o, "list");
    moqi_json_begin(o, '[');
    moqi_json_put_int(o, INT64_MIN);
    moqi_json_put_u64(o, UINT64_MAX);
    moqi_json_put_bool(o, 1);
    moqi_json_put_null(o);
    moqi_json_begin(o, '{');
    moqi_json_end(o, '}');
    moqi_json_end(o, ']');
    moqi_json_put_key(o, "q\"\\\n\x01\xc3\xa9");
    moqi_json_put_text(o, "a\0b", 3);
    moqi_json_put_key(o, "raw");
    moqi_json_put_raw(o, "[1,2]");
    moqi_json_end(o, '}');
}

static void test_json_writer(void)
{
    moq_allocator a = test_allocator();
    moqi_json_out o;
    moqi_json_out_make(&o, &a, 0);
    write_sample(&o);
    check_out(&o, "{\"empty\":[],\"list\":[-9223372036854775808,18446744073709551615,true,null,{}],\"q\\\"\\\\\\n\\u0001\xc3\xa9\":\"a\\u0000b\",\"raw\":[1,2]}");
    moqi_json_out_make(&o, &a, 1);
    write_sample(&o);
    check_out(&o, "{\n    \"empty\": [],\n    \"list\": [\n        -9223372036854775808,\n        18446744073709551615,\n        true,\n        null,\n        {}\n    ],\n"
                  "    \"q\\\"\\\\\\n\\u0001\xc3\xa9\": \"a\\u0000b\",\n    \"raw\": [1,2]\n}");
    moqi_json_out_make(&o, &a, 0);
    moqi_json_put_string(&o, "bad \xff");
    CHECK_INT(o.failed, MOQ_E_UTF8);
    moqi_buffer_drop(&o.b);
    for (int k = 1; k < 4; k++) {
        moqi_json_out_make(&o, &a, 1);
        test_state.fail_at = k;
        for (int i = 0; i < 20; i++) write_sample(&o);
        test_state.fail_at = 0;
        CHECK_INT(o.failed, MOQ_E_NOMEM);
        moqi_buffer_drop(&o.b);
        CHECK_INT(test_state.live_allocs, 0);
    }
}

static void check_spelling(double v, const char *want)
{
    char text[40];
    size_t n = moqi_write_double(v, text, sizeof text);
    CHECK_STR(text, want);
    CHECK_INT(n, strlen(want));
}

static void test_json_write_double(void)
{
    static const struct { double v; const char *text; } table[] = {
        {0.0, "0.0"}, {-0.0, "-0.0"}, {1.0, "1.0"}, {-1.5, "-1.5"}, {0.1, "0.1"}, {0.0001, "0.0001"}, {0.00001, "1e-05"}, {1e-6, "1e-06"}, {1.25e-7, "1.25e-07"}, {123456789.0, "123456789.0"}, {1e15, "1000000000000000.0"},
        {1e16, "1e+16"}, {1.5e16, "1.5e+16"}, {9999999999999998.0, "9999999999999998.0"}, {1e22, "1e+22"}, {1e23, "1e+23"}, {1e100, "1e+100"}, {5e-324, "5e-324"}, {1.7976931348623157e308, "1.7976931348623157e+308"},
        {2.2250738585072014e-308, "2.2250738585072014e-308"}, {0.30000000000000004, "0.30000000000000004"}, {1.0 / 3, "0.3333333333333333"}, {2.0 / 3, "0.6666666666666666"}, {9007199254740993.0, "9007199254740992.0"},
        {500000.0, "500000.0"}, {0.02, "0.02"}, {3.141592653589793, "3.141592653589793"}, {99.99, "99.99"}, {0.999999999999999889, "0.9999999999999999"}, {123.456, "123.456"}, {0.00099999999999999, "0.00099999999999999"},
    };
    for (size_t i = 0; i < MOQI_COUNT(table); i++) check_spelling(table[i].v, table[i].text);
    for (int i = 0; i < 4000; i++) {
        uint64_t b = (uint64_t)test_random() << 32 | test_random(), back;
        double v, r = 0;
        char text[40];
        if (i % 4 == 0) b = (b & 0x800fffffffffffffu) | (uint64_t)(1000 + test_random() % 60) << 52;
        if ((b >> 52 & 0x7ff) == 0x7ff) continue;
        memcpy(&v, &b, 8);
        moqi_write_double(v, text, sizeof text);
        CHECK_INT(verdict(text, strlen(text), MOQ_JSON_STRICT), MOQ_OK);
        CHECK(moqi_read_decimal(text, &r));
        memcpy(&back, &r, 8);
        if (back != b) { CHECK(back == b); fprintf(stderr, "  %a -> %s\n", v, text); }
    }
    moqi_json_out o;
    moqi_json_out_make(&o, NULL, 0);
    moqi_json_begin(&o, '[');
    for (int i = 0; i < 3; i++) {
        static const uint64_t special[] = {0x7ff0000000000000u, 0xfff0000000000000u, 0x7ff8000000000000u};
        double v;
        memcpy(&v, &special[i], 8);
        moqi_json_put_float(&o, v);
    }
    moqi_json_put_float(&o, 0.5);
    moqi_json_end(&o, ']');
    check_out(&o, "[{\"__float__\":\"Infinity\"},{\"__float__\":\"-Infinity\"},{\"__float__\":\"NaN\"},0.5]");
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_json_accepts);
    RUN(test_json_refuses);
    RUN(test_json_choices);
    RUN(test_json_messages);
    RUN(test_json_tree);
    RUN(test_json_integers);
    RUN(test_json_floats);
    RUN(test_json_floats_random);
    RUN(test_json_float_fields);
    RUN(test_json_long_numbers);
    RUN(test_json_depth);
    RUN(test_json_many_keys);
    RUN(test_json_first_duplicate);
    RUN(test_json_long_string);
    RUN(test_json_memory_bound);
    RUN(test_json_every_prefix_fails);
    RUN(test_json_every_flip);
    RUN(test_json_failing_allocations);
    RUN(test_utf8_every_code_point);
    RUN(test_utf8_every_pair);
    RUN(test_utf8_stress_classes);
    RUN(test_json_writer);
    RUN(test_json_write_double);
    return test_end();
}
