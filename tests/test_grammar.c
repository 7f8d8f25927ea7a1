/* Structured output of examples/llm.h: schemas and grammars against an own slow validator, with models that choose at random.

   test_grammar --make FOLDER FILE N     for each line of FILE, a schema: N documents, one a line, or the refusal after "!"
                                         (tests/interop/schema.py compares them with another validator)
   test_grammar --schemas N              N random schemas, one a line
   test_grammar --bench FOLDER FILE N    what masks cost in N answers under the schema in FILE; FOLDER may be a number of pieces */
#include "test.h"
#include "golden.h"
#include "text.h"
#include <locale.h>
#include <regex.h>
#include <time.h>

#ifndef __SANITIZE_ADDRESS__
#define SCHEMAS 1000
#else
#define SCHEMAS 120
#endif

static int below(int n) { return (int)(test_random() % (uint32_t)n); }

/* ---- vocabularies ---- */

static moq_checkpoint *folder;

static llm_tokenizer *open_text(const text *json)
{
    static const char header[] = "{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}    ";
    static char tensors[sizeof header + 11];
    moq_file files[3];
    moq_error err;
    tensors[0] = (char)(sizeof header - 1);
    memcpy(tensors + 8, header, sizeof header - 1);
    files[0].name = "model.safetensors";
    files[0].data = tensors;
    files[0].bytes = 8 + sizeof header - 1 + 4;
    files[1].name = "config.json";
    files[1].data = "{\"eos_token_id\": 2}";
    files[1].bytes = strlen((const char *)files[1].data);
    files[2].name = "tokenizer.json";
    files[2].data = json->data;
    files[2].bytes = json->count;
    folder = moq_open_memory(files, 3, NULL, &err);
    llm_tokenizer *t = folder ? llm_tokenizer_open(folder, &err) : NULL;
    if (!t) fprintf(stderr, "%s\n", err.text);
    return t;
}

/* A vocabulary in the manner of SentencePiece: bytes, and `words` random pieces, many of them with quotes and brackets. */
static llm_tokenizer *open_pieces(int words)
{
    static const char *const parts[] = {"\\\"", "\\\":", "\\\",", "\\\"}", "}", "]", ",", "{\\\"", "[", ":", "tr", "ue", "null", "\\\\", "\\\\u", "\\\\n", "\\u00e9", "\\ud83d\\ude00",
                                        "\\u2581", "\\u2581\\u2581", "1", "23", ".", "-", "e", "],", "},{", "name", "0", "a", "b", "c", "d", "item", "x", "ing", "\\u2581the"};
    text t = {NULL, 0, 0};
    llm_tokenizer *k;
    int id = 3, count = (int)(sizeof parts / sizeof parts[0]);
    add(&t, "{\"added_tokens\": [{\"id\": 1, \"content\": \"<s>\", \"special\": true}, {\"id\": 2, \"content\": \"</s>\", \"special\": true}],"
            "\"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", \"pattern\": {\"String\": \"\\u2581\"}, \"content\": \" \"}, {\"type\": \"ByteFallback\"},"
            "{\"type\": \"Fuse\"}, {\"type\": \"Strip\", \"content\": \" \", \"start\": 1, \"stop\": 0}]},"
            "\"model\": {\"type\": \"BPE\", \"byte_fallback\": true, \"unk_token\": \"<unk>\", \"merges\": [], \"vocab\": {\"<unk>\": 0, \"<s>\": 1, \"</s>\": 2");
    for (int b = 0; b < 256; b++, id++) {
        char s[40];
        snprintf(s, sizeof s, ", \"<0x%02X>\": %d", b, id);
        add(&t, s);
    }
    for (int i = 0; i < words; i++, id++) { /* the number at the end keeps them different, and is part of the token */
        add(&t, ", \"");
        if (i < count) add(&t, parts[i]);
        else {
            for (int n = 1 + below(3); n > 0; n--) add(&t, parts[below(count)]);
            add_number(&t, "", i);
            if (below(2)) add(&t, parts[below(count)]);
            add(&t, "#");
        }
        add_number(&t, "\": ", id);
    }
    add(&t, "}}}");
    k = open_text(&t);
    free(t.data);
    return k;
}

static llm_tokenizer *open_demo_tokenizer(void)
{
    moq_error err;
    folder = moq_open(test_path("../examples/demo-model"), NULL, &err);
    llm_tokenizer *t = folder ? llm_tokenizer_open(folder, &err) : NULL;
    if (!t) fprintf(stderr, "%s\n", err.text);
    return t;
}

static void shut(llm_tokenizer *t)
{
    llm_tokenizer_close(t);
    moq_close(folder);
    folder = NULL;
}

/* ---- a slow validator, written from the specification and on nothing of llm.h ---- */

static const moq_json *schema_root;
static int plain; /* no UTF-8 locale for regexec */

static int valid(const moq_json *s, const moq_json *v);

static int same(const moq_json *a, const moq_json *b)
{
    if (a->type != b->type) return 0;
    if (a->type == MOQ_JSON_STRING) return strcmp(a->text, b->text) == 0;
    if (a->type == MOQ_JSON_NUMBER) return strtod(a->text, NULL) == strtod(b->text, NULL);
    if (a->type != MOQ_JSON_ARRAY && a->type != MOQ_JSON_OBJECT) return 1;
    if (a->count != b->count) return 0;
    for (uint32_t i = 0; i < a->count; i++) {
        const moq_json *x = moq_json_first(a);
        for (uint32_t k = 0; k < i; k++) x = moq_json_next(a, x);
        const moq_json *y = a->type == MOQ_JSON_OBJECT ? moq_json_find(b, x->key) : moq_json_at(b, i);
        if (!y || !same(x, y)) return 0;
    }
    return 1;
}

static int is_type(const char *name, const moq_json *v)
{
    double d = v->type == MOQ_JSON_NUMBER ? strtod(v->text, NULL) : 0;
    if (!strcmp(name, "null")) return v->type == MOQ_JSON_NULL;
    if (!strcmp(name, "boolean")) return v->type == MOQ_JSON_TRUE || v->type == MOQ_JSON_FALSE;
    if (!strcmp(name, "number")) return v->type == MOQ_JSON_NUMBER;
    if (!strcmp(name, "integer")) return v->type == MOQ_JSON_NUMBER && d == (double)(long long)d;
    if (!strcmp(name, "string")) return v->type == MOQ_JSON_STRING;
    if (!strcmp(name, "array")) return v->type == MOQ_JSON_ARRAY;
    return v->type == MOQ_JSON_OBJECT;
}

static double bound(const moq_json *s, const char *key, double otherwise)
{
    const moq_json *e = moq_json_find(s, key);
    return e ? strtod(e->text, NULL) : otherwise;
}

static int valid_string(const moq_json *s, const moq_json *v)
{
    const moq_json *p = moq_json_find(s, "pattern");
    size_t n = 0;
    for (const char *c = v->text; *c; c++) n += ((unsigned char)*c & 0xc0) != 0x80;
    if ((double)n < bound(s, "minLength", 0) || (double)n > bound(s, "maxLength", 1e9)) return 0;
    if (p) {
        regex_t x;
        if (regcomp(&x, p->text, REG_EXTENDED | REG_NOSUB) != 0) { fprintf(stderr, "regcomp: %s\n", p->text); return 0; }
        int r = regexec(&x, v->text, 0, NULL, 0);
        regfree(&x);
        if (r != 0) return 0;
    }
    return 1;
}

static int valid_inside(const moq_json *s, const moq_json *v)
{
    const moq_json *properties = moq_json_find(s, "properties"), *more = moq_json_find(s, "additionalProperties"), *prefix = moq_json_find(s, "prefixItems");
    const moq_json *items = moq_json_find(s, "items"), *required = moq_json_find(s, "required");
    int array = v->type == MOQ_JSON_ARRAY;
    size_t i = 0;
    if ((double)v->count < bound(s, array ? "minItems" : "minProperties", 0) || (double)v->count > bound(s, array ? "maxItems" : "maxProperties", 1e9)) return 0;
    for (const moq_json *e = moq_json_first(v); e; e = moq_json_next(v, e), i++) {
        const moq_json *d = array ? (prefix && i < prefix->count ? moq_json_at(prefix, i) : items) : moq_json_find(properties, e->key);
        if (!array && !d) d = more;
        if (d && !valid(d, e)) return 0;
    }
    for (i = 0; !array && required && i < required->count; i++)
        if (!moq_json_find(v, moq_json_at(required, i)->text)) return 0;
    return 1;
}

static int count_valid(const moq_json *list, const moq_json *v)
{
    int n = 0;
    for (uint32_t i = 0; list && i < list->count; i++) n += valid(moq_json_at(list, i), v);
    return n;
}

static int valid(const moq_json *s, const moq_json *v)
{
    const moq_json *e;
    if (s->type == MOQ_JSON_TRUE) return 1;
    if (s->type == MOQ_JSON_FALSE) return 0;
    if ((e = moq_json_find(s, "$ref")) != NULL) { /* "#" or "#/$defs/name" */
        const moq_json *to = strcmp(e->text, "#") == 0 ? schema_root : moq_json_find(moq_json_find(schema_root, "$defs"), e->text + 8);
        if (!to || !valid(to, v)) return 0;
    }
    if ((e = moq_json_find(s, "type")) != NULL) {
        int ok = e->type == MOQ_JSON_STRING && is_type(e->text, v);
        for (uint32_t i = 0; e->type == MOQ_JSON_ARRAY && i < e->count; i++) ok |= is_type(moq_json_at(e, i)->text, v);
        if (!ok) return 0;
    }
    if ((e = moq_json_find(s, "const")) != NULL && !same(e, v)) return 0;
    if ((e = moq_json_find(s, "enum")) != NULL) {
        int ok = 0;
        for (uint32_t i = 0; i < e->count; i++) ok |= same(moq_json_at(e, i), v);
        if (!ok) return 0;
    }
    if (v->type == MOQ_JSON_NUMBER) {
        double d = strtod(v->text, NULL);
        if (d < bound(s, "minimum", -1e300) || d > bound(s, "maximum", 1e300)) return 0;
        if (moq_json_find(s, "exclusiveMinimum") && d <= bound(s, "exclusiveMinimum", 0)) return 0;
        if (moq_json_find(s, "exclusiveMaximum") && d >= bound(s, "exclusiveMaximum", 0)) return 0;
    }
    if (v->type == MOQ_JSON_STRING && !valid_string(s, v)) return 0;
    if ((v->type == MOQ_JSON_ARRAY || v->type == MOQ_JSON_OBJECT) && !valid_inside(s, v)) return 0;
    if ((e = moq_json_find(s, "allOf")) != NULL && count_valid(e, v) != (int)e->count) return 0;
    if ((e = moq_json_find(s, "anyOf")) != NULL && count_valid(e, v) < 1) return 0;
    if ((e = moq_json_find(s, "oneOf")) != NULL && count_valid(e, v) != 1) return 0;
    return 1;
}

/* ---- random schemas ---- */

static void random_schema(text *t, int depth);

static void random_number(text *t, int integer)
{
    static const char *const low[] = {"minimum", "exclusiveMinimum"}, *const high[] = {"maximum", "exclusiveMaximum"};
    char s[200];
    double a = (below(20001) - 10000) / (integer ? 1 : below(2) ? 1000.0 : 7.0), width = below(3) ? below(2000) / 16.0 : below(40) / 8.0;
    if (below(3) == 0) a = below(100) - 50;
    if (integer) { a = (double)(long)a; width += 2; }
    snprintf(s, sizeof s, "{\"type\": \"%s\"", integer ? "integer" : "number");
    add(t, s);
    if (below(4)) { snprintf(s, sizeof s, ", \"%s\": %.6g", low[below(2)], a); add(t, s); }
    if (below(4)) { snprintf(s, sizeof s, ", \"%s\": %.6g", high[below(2)], a + width + 0.5); add(t, s); }
    add(t, "}");
}

static void random_string(text *t)
{
    static const char *const patterns[] = {"^[a-z]{2,5}$", "^(ab|cd)+$", "^[A-Z][a-z]*( [A-Z][a-z]*)?$", "^[0-9]{3}-[0-9]{4}$", "^x", "y$", "[0-9]", "^(a|bc|def){1,3}z?$",
                                           "foo|^bar$|baz", "^[a-c]*\\\\.[x-z]+$", "^(red|green|blue) (book|mug)$",
                                           "^[^a-z]{1,4}$", "^a.c$"}; /* the last two need a locale */
    int low = below(6), with_low = below(2), with_high = below(2), pattern = below(3) == 0;
    add(t, "{\"type\": \"string\"");
    if (pattern) {
        add(t, ", \"pattern\": \"");
        add(t, patterns[below((int)(sizeof patterns / sizeof patterns[0]) - 2 * plain)]);
        add(t, "\"");
    }
    if (with_low && !pattern) add_number(t, ", \"minLength\": ", low);
    if (with_high) add_number(t, ", \"maxLength\": ", (pattern ? 8 : low) + below(below(3) ? 10 : 300));
    add(t, "}");
}

static void random_enum(text *t)
{
    static const char *const values[] = {"\"red\"", "\"green\"", "\"re\"", "1", "2.5", "null", "true", "\"a\\\"b\\\\\"", "\"\\u00e9\\n\"", "[1, {\"k\": \"v\"}]", "{\"a\": 1, \"b\": [ ]}", "\"\"", "-0.5e1", "\"\xf0\x9f\x98\x80\""};
    int first = below(14), n = 1 + below(6);
    if (below(4) == 0) { add(t, "{\"const\": "); add(t, values[first]); add(t, "}"); return; }
    add(t, "{\"enum\": [");
    for (int i = 0; i < n; i++) { if (i) add(t, ", "); add(t, values[(first + i) % 14]); }
    add(t, "]}");
}

static void random_array(text *t, int depth)
{
    int prefix = below(3) == 0 ? 1 + below(3) : 0, low = below(3), items = below(4);
    add(t, "{\"type\": \"array\"");
    if (prefix) {
        add(t, ", \"prefixItems\": [");
        for (int i = 0; i < prefix; i++) { if (i) add(t, ", "); random_schema(t, depth - 1); }
        add(t, "]");
    }
    if (items) {
        add(t, ", \"items\": ");
        if (items == 1 && prefix >= low) add(t, "false");
        else random_schema(t, depth - 1);
    }
    if (low) add_number(t, ", \"minItems\": ", low);
    if (below(2)) add_number(t, ", \"maxItems\": ", low + below(5));
    add(t, "}");
}

static void random_object(text *t, int depth)
{
    static const char *const names[] = {"name", "na", "x\\\"y", "kind", "\\u00fc", "item", "a", "list", "z"};
    int n = below(5), first = below(9), more = below(4), low = 0;
    add(t, "{\"type\": \"object\"");
    if (n) add(t, ", \"properties\": {");
    for (int i = 0; i < n; i++) {
        if (i) add(t, ", ");
        add(t, "\"");
        add(t, names[(first + i) % 9]);
        add(t, "\": ");
        random_schema(t, depth - 1);
    }
    if (n) add(t, "}");
    if (n && below(2)) {
        add(t, ", \"required\": [");
        for (int i = below(2); i < n; i += 1 + below(2)) { if (low++) add(t, ", "); add(t, "\""); add(t, names[(first + i) % 9]); add(t, "\""); }
        add(t, "]");
    }
    if (more == 1) add(t, ", \"additionalProperties\": false");
    if (more == 2) { add(t, ", \"additionalProperties\": "); random_schema(t, depth - 1); }
    if (below(5) == 0 && (more == 2 || n >= 2)) {
        add_number(t, ", \"minProperties\": ", more == 2 ? below(4) : 1 + below(2));
        if (below(2)) add_number(t, ", \"maxProperties\": ", 5);
    }
    add(t, "}");
}

/* Documents of `pattern` and free names nest, so every kind turns up inside every other. $defs: node is a tree, leaf a string. */
static void random_schema(text *t, int depth)
{
    int kind = below(depth > 0 ? 16 : 8);
    switch (kind) {
    case 0: add(t, below(2) ? "{\"type\": \"boolean\"}" : "{\"type\": [\"null\", \"integer\"]}"); break;
    case 1: case 2: random_number(t, kind == 1); break;
    case 3: case 4: random_string(t); break;
    case 5: case 6: random_enum(t); break;
    case 7: add(t, below(3) ? "{\"$ref\": \"#/$defs/leaf\"}" : below(2) ? "true" : "{}"); break;
    case 8: case 9: random_array(t, depth); break;
    case 10: case 11: case 12: random_object(t, depth); break;
    case 13:
        add(t, "{\"anyOf\": [");
        random_schema(t, depth - 1);
        add(t, ", ");
        random_schema(t, depth - 1);
        add(t, "]}");
        break;
    case 14:
        add(t, "{\"oneOf\": [{\"type\": \"object\", \"properties\": {\"kind\": {\"const\": \"a\"}, \"v\": ");
        random_schema(t, depth - 1);
        add(t, "}, \"required\": [\"kind\"]}, {\"type\": \"object\", \"properties\": {\"kind\": {\"const\": \"b\"}}, \"required\": [\"kind\"]}, {\"type\": \"null\"}]}");
        break;
    default:
        if (below(2)) { add(t, "{\"$ref\": \"#/$defs/node\"}"); break; }
        add(t, "{\"allOf\": [{\"properties\": {\"p\": {\"type\": \"integer\", \"minimum\": 3}}, \"required\": [\"p\"]}, {\"properties\": {\"q\": ");
        random_schema(t, depth - 1);
        add(t, ", \"p\": {\"maximum\": 20}}}], \"type\": \"object\"}");
    }
}

static void whole_schema(text *t)
{
    t->count = 0;
    add(t, "{\"$defs\": {\"leaf\": {\"type\": \"string\", \"maxLength\": 12}, \"node\": {\"type\": \"object\", \"properties\": {\"v\": {\"type\": \"integer\"}, "
           "\"children\": {\"type\": \"array\", \"items\": {\"$ref\": \"#/$defs/node\"}}}, \"required\": [\"v\"], \"additionalProperties\": false}}, \"allOf\": [");
    random_schema(t, 3);
    add(t, "]}");
}

/* ---- a model that knows nothing ---- */

/* Writes a document with logits at random; mood: 0 any token, 1 prefers letters (it never wants to end), 2 prefers brackets. 0: failed. */
static int write_document(llmi_guide *g, const llm_tokenizer *t, int64_t budget, int mood, text *out)
{
    static float *logits;
    static int32_t capacity, *ids;
    int32_t count = llm_vocab(t), n = 0;
    llmi_place at = llmi_guide_begin(g);
    llm_sampling greedy;
    moq_error err;
    memset(&greedy, 0, sizeof greedy);
    if (capacity < count) {
        logits = (float *)realloc(logits, (size_t)count * sizeof *logits);
        ids = (int32_t *)realloc(ids, 100000 * sizeof *ids);
        capacity = count;
    }
    out->count = 0;
    while (!llmi_guide_finished(g, &at)) {
        for (int32_t i = 0; i < count; i++) {
            const llmi_token *x = &t->tokens[i];
            uint8_t first = x->shown_bytes ? (uint8_t)x->shown[0] : 0;
            logits[i] = test_uniform();
            if (mood == 1 && (first >= 0x80 || (first >= 'a' && first <= 'z'))) logits[i] += 3;
            if (mood == 2 && (first == '{' || first == '[' || first == '"' || first == ',')) logits[i] += 2;
        }
        int32_t id = llmi_guide_pick(g, &at, &greedy, logits, logits, count, budget - n, NULL, NULL, NULL, &err);
        if (id < 0) { fprintf(stderr, "%s\n", err.text); return 0; }
        if (llm_is_end(t, id)) break;
        if (n >= budget || n >= 99999) { fprintf(stderr, "longer than its budget of %lld\n", (long long)budget); return 0; }
        ids[n++] = id;
    }
    size_t need = llm_decode(t, ids, (size_t)n, 0, NULL, 0);
    text grown = {NULL, 0, 0};
    char *all = (char *)malloc(need + 1);
    (void)grown;
    llm_decode(t, ids, (size_t)n, 0, all, need + 1);
    add_bytes(out, all, need);
    free(all);
    return 1;
}

static llm_grammar *compile(const char *schema, moq_error *err)
{
    llm_grammar_desc d;
    memset(&d, 0, sizeof d);
    d.schema = schema;
    d.compact = below(2);
    d.allocator = test_allocator();
    return llm_grammar_create(&d, err);
}

/* Is the text a document that the schema accepts? */
static int accepts(const char *schema, const char *document, size_t bytes)
{
    moq_error err;
    moq_json_doc *s = moq_json_parse(schema, strlen(schema), MOQ_JSON_STRICT, 0, NULL, NULL, &err), *d = moq_json_parse(document, bytes, MOQ_JSON_STRICT, 0, NULL, NULL, &err);
    int ok = 0;
    if (d && s) {
        schema_root = moq_json_root(s);
        ok = valid(schema_root, moq_json_root(d));
    } else fprintf(stderr, "%s\n", err.text);
    moq_json_destroy(s);
    moq_json_destroy(d);
    return ok;
}

/* `count` random schemas on a vocabulary, three documents of each with little, some and much room. */
static void check_random(llm_tokenizer *t, int count)
{
    moq_allocator a = test_allocator();
    llmi_lexicon *x = t ? llmi_lexicon_make(t, &a) : NULL;
    text s = {NULL, 0, 0}, d = {NULL, 0, 0};
    int made = 0, refused = 0;
    CHECK(x);
    for (int i = 0; i < count && x; i++) {
        moq_error err;
        whole_schema(&s);
        llm_grammar *g = compile(s.data, &err);
        if (!g) {
            refused++;
            if (err.code != MOQ_E_GRAMMAR && err.code != MOQ_E_UNSUPPORTED) { CHECK(0); fprintf(stderr, "%s\n%s\n", err.text, s.data); }
            continue;
        }
        llmi_guide *guide = llmi_guide_make(g, x, &a, &err);
        CHECK(guide);
        for (int k = 0; k < 3 && guide; k++) {
            int64_t budget = llmi_guide_shortest(guide) + (k == 0 ? 0 : k == 1 ? below(30) : 200);
            if (!write_document(guide, t, budget, below(3), &d) || !accepts(s.data, d.data, d.count)) {
                CHECK(0);
                fprintf(stderr, "schema %s\ndocument %s\n", s.data, d.data);
                break;
            }
            made++;
        }
        llmi_guide_drop(guide);
        llm_grammar_destroy(g);
    }
    CHECK(refused * 3 < count); /* random bounds contradict each other now and then */
    printf("note: %d documents of %d random schemas valid, %d schemas refused\n", made, count - refused, refused);
    llmi_lexicon_drop(x);
    free(s.data);
    free(d.data);
    CHECK_INT(test_state.live_allocs, 0);
}

static void test_random_bytes(void)
{
    llm_tokenizer *t = open_demo_tokenizer();
    check_random(t, SCHEMAS / 2);
    shut(t);
}

static void test_random_pieces(void)
{
    llm_tokenizer *t = open_pieces(700);
    check_random(t, SCHEMAS / 2);
    shut(t);
}

/* ---- what is refused, and where ---- */

static void test_refusals(void)
{
    static const struct { const char *schema; moq_result code; const char *where, *says; } cases[] = {
        {"{\"enum\": []}", MOQ_E_GRAMMAR, "#/enum", "none of its values"},
        {"{\"type\": \"string\", \"enum\": [1, 2]}", MOQ_E_GRAMMAR, "#/enum", "none of its values"},
        {"{\"type\": \"integer\", \"minimum\": 5, \"maximum\": 4}", MOQ_E_GRAMMAR, "#/minimum", "no integer"},
        {"{\"type\": \"integer\", \"exclusiveMinimum\": 4, \"exclusiveMaximum\": 5}", MOQ_E_GRAMMAR, "#/exclusiveMinimum", "no integer"},
        {"{\"type\": \"number\", \"exclusiveMinimum\": 1, \"maximum\": 1}", MOQ_E_GRAMMAR, "#/exclusiveMinimum", "no number"},
        {"{\"type\": \"string\", \"minLength\": 3, \"maxLength\": 2}", MOQ_E_GRAMMAR, "#/minLength", "above maxLength"},
        {"{\"type\": \"string\", \"format\": \"iri\"}", MOQ_E_UNSUPPORTED, "#/format", "known are date"},
        {"{\"type\": \"string\", \"format\": 3}", MOQ_E_GRAMMAR, "#/format", "must be a string"},
        {"{\"type\": \"string\", \"format\": \"date\", \"pattern\": \"^a$\"}", MOQ_E_UNSUPPORTED, "#/format", "second pattern or format"},
        {"{\"type\": \"string\", \"pattern\": \"^ab$\", \"minLength\": 3}", MOQ_E_GRAMMAR, "", "no finite"},
        {"{\"type\": \"array\", \"minItems\": 2, \"maxItems\": 1}", MOQ_E_GRAMMAR, "#/minItems", "above"},
        {"{\"type\": \"array\", \"items\": false, \"minItems\": 1}", MOQ_E_GRAMMAR, "#/minItems", "above"},
        {"{\"type\": \"object\", \"required\": [\"a\"], \"additionalProperties\": false}", MOQ_E_GRAMMAR, "#/required", "forbids"},
        {"{\"type\": \"object\", \"properties\": {\"a\": false}, \"required\": [\"a\"]}", MOQ_E_GRAMMAR, "#/required", "forbids"},
        {"{\"type\": \"object\", \"properties\": {\"a\": {\"properties\": {\"b\": {\"enum\": []}}}}}", MOQ_E_GRAMMAR, "#/properties/a/properties/b/enum", "none"},
        {"{\"type\": \"object\", \"properties\": {\"a\": {\"$ref\": \"#\"}}, \"required\": [\"a\"]}", MOQ_E_GRAMMAR, "#", "without end"},
        {"{\"type\": \"object\", \"minProperties\": 2, \"properties\": {\"a\": true}, \"additionalProperties\": false}", MOQ_E_GRAMMAR, "#/minProperties", "required"},
        {"{\"allOf\": [{\"type\": \"string\"}, {\"type\": \"null\"}]}", MOQ_E_GRAMMAR, "#/allOf/0/type", "exclude each other"},
        {"false", MOQ_E_GRAMMAR, "#", "nothing"},
        {"{\"$ref\": \"#\"}", MOQ_E_GRAMMAR, "#", "itself"},
        {"{\"anyOf\": [{\"$ref\": \"#\"}, {\"type\": \"null\"}]}", MOQ_E_GRAMMAR, "#", "itself"},
        {"{\"$ref\": \"#/$defs/none\"}", MOQ_E_GRAMMAR, "#/$ref", "names nothing"},
        {"{\"$ref\": \"http://x/y\"}", MOQ_E_GRAMMAR, "#/$ref", "names nothing"},
        {"{\"type\": \"strin\"}", MOQ_E_GRAMMAR, "#/type", "'strin' is no type (is 'string' meant?); types are null"},
        {"{\"type\": \"float\"}", MOQ_E_GRAMMAR, "#/type", "'float' is no type; types are null, boolean"},
        {"{\"type\": [\"string\", \"nul\"]}", MOQ_E_GRAMMAR, "#/type/1", "is 'null' meant?"},
        {"{\"type\": [\"string\", 3]}", MOQ_E_GRAMMAR, "#/type/1", "a number is no type"},
        {"{\"type\": [\"string\", [\"null\"]]}", MOQ_E_GRAMMAR, "#/type/1", "a list is no type"},
        {"{\"type\": []}", MOQ_E_GRAMMAR, "#/type", "an empty list is no type"},
        {"{\"type\": null}", MOQ_E_GRAMMAR, "#/type", "null is no type"},
        {"{\"type\": \"object\", \"requried\": [\"a\"]}", MOQ_E_GRAMMAR, "#/requried", "no keyword"},
        {"{\"type\": \"string\", \"minLength\": -1}", MOQ_E_GRAMMAR, "#/minLength", "whole number"},
        {"{\"type\": \"integer\", \"exclusiveMinimum\": true}", MOQ_E_GRAMMAR, "#/exclusiveMinimum", "must be a number"},
        {"{\"items\": {\"not\": {\"type\": \"null\"}}}", MOQ_E_UNSUPPORTED, "#/items/not", "cannot be enforced"},
        {"{\"type\": \"integer\", \"multipleOf\": 3}", MOQ_E_UNSUPPORTED, "#/multipleOf", "cannot be enforced"},
        {"{\"type\": \"array\", \"uniqueItems\": true}", MOQ_E_UNSUPPORTED, "#/uniqueItems", "cannot be enforced"},
        {"{\"type\": \"string\", \"pattern\": \"(?=a)b\"}", MOQ_E_UNSUPPORTED, "#/pattern", "look ahead"},
        {"{\"type\": \"string\", \"pattern\": \"\\\\bx\"}", MOQ_E_UNSUPPORTED, "#/pattern", "escape"},
        {"{\"type\": \"string\", \"pattern\": \"a^\"}", MOQ_E_UNSUPPORTED, "#/pattern", "'a^' holds ^ after the beginning, which the matcher does not know"},
        {"{\"type\": \"string\", \"pattern\": \"'holds' (?<=a)b\"}", MOQ_E_UNSUPPORTED, "#/pattern", "' holds a group other than"},
        {"{\"type\": \"string\", \"pattern\": \"[a[b]]\"}", MOQ_E_UNSUPPORTED, "#/pattern", "'[a[b]]' holds a set within a set"},
        {"{\"type\": \"string\", \"pattern\": \"a{5000}\"}", MOQ_E_UNSUPPORTED, "#/pattern", "too many repetitions"},
        {"{\"type\": \"string\", \"pattern\": \"[a-z\"}", MOQ_E_GRAMMAR, "#/pattern", "the pattern '[a-z' is malformed: a [ lacks its ]"},
        {"{\"type\": \"string\", \"pattern\": \"[\"}", MOQ_E_GRAMMAR, "#/pattern", "a [ lacks its ]"},
        {"{\"type\": \"string\", \"pattern\": \"^[^]\"}", MOQ_E_GRAMMAR, "#/pattern", "a [ lacks its ]"},
        {"{\"type\": \"string\", \"pattern\": \"([a-z\"}", MOQ_E_GRAMMAR, "#/pattern", "a [ lacks its ]"},
        {"{\"type\": \"string\", \"pattern\": \"[a\\\\]\"}", MOQ_E_GRAMMAR, "#/pattern", "a [ lacks its ]"},
        {"{\"type\": \"string\", \"pattern\": \"a\\\\\"}", MOQ_E_GRAMMAR, "#/pattern", "malformed: nothing follows the \\ at the end"},
        {"{\"type\": \"string\", \"pattern\": \"[a\\\\\"}", MOQ_E_GRAMMAR, "#/pattern", "nothing follows the \\ at the end"},
        {"{\"type\": \"string\", \"pattern\": \"(ab\"}", MOQ_E_GRAMMAR, "#/pattern", "malformed: a ( lacks its )"},
        {"{\"type\": \"string\", \"pattern\": \"ab)\"}", MOQ_E_GRAMMAR, "#/pattern", "malformed: a ) lacks its ("},
        {"{\"type\": \"string\", \"pattern\": \"a)(b\"}", MOQ_E_GRAMMAR, "#/pattern", "a ) lacks its ("},
        {"{\"type\": \"string\", \"pattern\": \"a)|(b\"}", MOQ_E_GRAMMAR, "#/pattern", "a ) lacks its ("},
        {"{\"type\": \"string\", \"pattern\": \"*a\"}", MOQ_E_GRAMMAR, "#/pattern", "malformed: a quantifier (* + ? {) has nothing before it"},
        {"{\"type\": \"string\", \"pattern\": \"^(a|+)$\"}", MOQ_E_GRAMMAR, "#/pattern", "has nothing before it to repeat"},
        {"{\"type\": \"string\", \"pattern\": \"a{3,1}\"}", MOQ_E_GRAMMAR, "#/pattern", "malformed: in {n,m} m is below n"},
        {"{\"type\": \"string\", \"pattern\": \"a{3\"}", MOQ_E_GRAMMAR, "#/pattern", "a { begins none of {n}, {n,} and {n,m}"},
        {"{\"type\": \"string\", \"pattern\": \"[z-a]\"}", MOQ_E_GRAMMAR, "#/pattern", "malformed: a range such as [z-a] ends before it begins"},
        {"{\"type\": \"string\", \"pattern\": \"\\\\p{L\"}", MOQ_E_GRAMMAR, "#/pattern", "malformed: \\p lacks its name, or \\p{ its }"},
        {"{\"type\": \"string\", \"pattern\": \"\\\\x{41\"}", MOQ_E_GRAMMAR, "#/pattern", "lacks the number of a character"},
        {"{\"type\": \"string\", \"format\": \"regex\"}", MOQ_E_UNSUPPORTED, "#/format", "known are"},
        {"{\"oneOf\": [{\"type\": \"integer\"}, {\"type\": \"number\"}]}", MOQ_E_UNSUPPORTED, "#/oneOf/1", "exactly one"},
        {"{\"oneOf\": [{\"type\": \"object\", \"properties\": {\"a\": true}}, {\"type\": \"object\"}]}", MOQ_E_UNSUPPORTED, "#/oneOf/1", "exactly one"},
        {"[1]", MOQ_E_GRAMMAR, "#", "a list is no schema"},
        {"\"string\"", MOQ_E_GRAMMAR, "#", "write {\"type\": \"string\"}"},
        {"\"strung\"", MOQ_E_GRAMMAR, "#", "a text 'strung' is no schema"},
        {"{\"properties\": {\"x\": \"integer\"}}", MOQ_E_GRAMMAR, "#/properties/x", "write {\"type\": \"integer\"}"},
        {"{\"properties\": {\"x\": 3}}", MOQ_E_GRAMMAR, "#/properties/x", "a number is no schema"},
        {"{", MOQ_E_JSON, "", ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        moq_error err;
        llm_grammar *g = compile(cases[i].schema, &err);
        CHECK(!g);
        CHECK_INT(err.code, cases[i].code);
        if (*cases[i].where) CHECK_STR(err.object, cases[i].where);
        if (!strstr(err.text, cases[i].says)) { CHECK(0); fprintf(stderr, "%s\n%s\n", cases[i].schema, err.text); }
        llm_grammar_destroy(g);
    }
    CHECK_INT(test_state.live_allocs, 0);
}

/* ---- which texts a grammar holds ---- */

static llm_tokenizer *words;
static llmi_lexicon *lexicon;

/* 2: a whole text of the grammar, 1: the beginning of one, 0: neither. Tokens are single bytes. */
static int follow(const llm_grammar *g, const char *s)
{
    moq_error err;
    llmi_guide *guide = llmi_guide_make(g, lexicon, NULL, &err);
    llmi_place at = llmi_guide_begin(guide);
    int moved = 1;
    at.fresh = 0; /* spaces count from the beginning */
    for (; *s && moved == 1; s++) moved = llmi_guide_advance(guide, &at, words->byte_ids[(uint8_t)*s]);
    if (moved == 1 && llmi_pool_at(&guide->configs, at.config)[LLMI_C_FLAGS] & LLMI_COMPLETE) moved = 2;
    llmi_guide_drop(guide);
    return moved;
}

static void check_texts(llm_grammar *g, const char *what, const char *const *list)
{
    int want = 2;
    for (; *list; list++) {
        if (strcmp(*list, "#1") == 0 || strcmp(*list, "#0") == 0) { want = (*list)[1] - '0'; continue; }
        if (g && follow(g, *list) != want) { CHECK(0); fprintf(stderr, "%s: %s gives %d, not %d\n", what, *list, follow(g, *list), want); }
    }
    llm_grammar_destroy(g);
}

/* Documents that must be possible ("#1": beginnings, "#0": impossible ones). */
static void test_languages(void)
{
    static const struct { const char *schema, *texts[24]; } cases[] = {
        {"{\"type\": \"integer\", \"minimum\": -12, \"maximum\": 105}", {"-12", "-9", "0", "7", "99", "105", "#1", "-", "#0", "-13", "-0", "106", "1000", "01", "1.", "+"}},
        {"{\"type\": \"number\", \"minimum\": 0.25, \"exclusiveMaximum\": 1.5}", {"0.25", "0.3", "1", "1.0", "1.49999", "#1", "0", "0.2", "1.", "#0", "1.5", "0.24", "2", "-"}},
        {"{\"type\": \"number\", \"exclusiveMaximum\": 0}", {"-1", "-0.5", "-123.25", "#1", "-0", "-0.0", "#0", "0", "1"}},
        {"{\"type\": \"number\"}", {"0", "-0", "1e5", "1.5E-10", "-12.25", "#1", "1.", "1e", "-", "#0", "00", ".5", "1e100", "0x"}},
        {"{\"type\": \"string\", \"maxLength\": 2}", {"\"\"", "\"ab\"", "\"\\u00e9\\n\"", "\"\xc3\xa9\xf0\x9f\x98\x80\"", "\"\\\"\\\\\"", "#1", "\"\\u", "\"\xf0\x9f", "#0", "\"abc", "\"\n", "\"\\ud800", "\"\\u0000", "\"\xc0"}},
        {"{\"type\": \"string\", \"pattern\": \"^a[\\\"\\\\\\\\]+$\"}", {"\"a\\\"\"", "\"a\\\\\\\"\"", "#0", "\"a\"", "\"ab"}},
        {"{\"const\": {\"b\": [1, null], \"a\": \"x\"}}", {"{\"b\":[1,null],\"a\":\"x\"}", "#0", "{\"a\""}},
        {"{\"enum\": [\"a\", \"ab\", \"abc\", 1, 12]}", {"\"a\"", "\"ab\"", "\"abc\"", "1", "12", "#1", "\"abc", "#0", "\"b", "13", "2"}},
        {"{\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"null\"}, \"b\": {\"type\": \"null\"}}, \"required\": [\"b\"]}",
         {"{\"b\":null}", "{\"a\":null,\"b\":null}", "#1", "{\"a\":null", "#0", "{}", "{\"b\":null,", "{\"c", "{\"a\":null}"}},
        {"{\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"null\"}}, \"additionalProperties\": {\"type\": \"boolean\"}}",
         {"{}", "{\"a\":null}", "{\"b\":true}", "{\"a\":null,\"aa\":false,\"b\":true}", "#1", "{\"a\":null,\"a", "#0", "{\"a\":true", "{\"b\":true,\"b\"", "{\"b\":true,\"a\"", "{\"\""}},
        {"{\"type\": \"array\", \"prefixItems\": [{\"const\": 1}, {\"const\": 2}], \"items\": {\"const\": 3}, \"minItems\": 1, \"maxItems\": 4}",
         {"[1]", "[1,2]", "[1,2,3]", "[1,2,3,3]", "#0", "[]", "[2", "[1,3", "[1,2,3,3,", "[1,2,2"}},
        {"{\"type\": [\"string\", \"null\"], \"maxLength\": 1}", {"null", "\"x\"", "#0", "1", "\"xx"}},
        {"{\"$ref\": \"#/$defs/t\", \"$defs\": {\"t\": {\"type\": \"array\", \"items\": {\"$ref\": \"#/$defs/t\"}}}}", {"[]", "[[],[[]]]", "#1", "[[[[", "#0", "[1", "[]]"}},
        {"{\"oneOf\": [{\"type\": \"integer\", \"maximum\": 3}, {\"type\": \"integer\", \"minimum\": 4, \"maximum\": 6}]}", {"3", "4", "6", "-7", "#0", "7"}},
        {"{\"type\": \"string\", \"pattern\": \"^[^]|a]$|^[](]b$\"}", {"\"c\"", "\"]b\"", "\"(b\"", "#1", "\"]", "#0", "\"|", "\"a", "\"cb"}},
        {"{\"oneOf\": [{\"const\": \"ab\"}, {\"type\": \"string\", \"pattern\": \"^\\\\d+$\"}]}", {"\"ab\"", "\"12\"", "#1", "\"1", "#0", "\"ac", "\"a1"}},
        {"{\"allOf\": [{\"minimum\": 2}, {\"maximum\": 8}], \"type\": \"integer\", \"anyOf\": [{\"maximum\": 3}, {\"minimum\": 7}]}", {"2", "3", "7", "8", "#0", "4", "6", "9", "1"}},
        {"{\"type\": \"string\", \"format\": \"date\"}", {"\"2024-02-28\"", "\"1999-12-31\"", "#0", "\"2024-02-30", "\"2024-13", "\"2023-04-31", "\"24-"}},
        {"{\"type\": \"string\", \"format\": \"time\"}",
         {"\"00:00:00Z\"", "\"23:59:59.123456+13:59\"", "\"12:30:01-00:00\"", "#1", "\"12:30:01", "#0", "\"24:", "\"12:60", "\"12:30:60", "\"12:30:01.Z", "\"12:30:01+14", "\"12:30:01z"}},
        {"{\"type\": \"string\", \"format\": \"date-time\"}", {"\"2024-02-28T23:59:59Z\"", "\"1999-12-31T00:00:00.5-08:00\"", "#1", "\"2024-02-28T", "#0", "\"2024-02-28 ", "\"2024-02-29", "\"2024-00"}},
        {"{\"type\": \"string\", \"format\": \"uuid\"}",
         {"\"01234567-89ab-cdef-0123-456789abcdef\"", "#1", "\"01234567-89ab-cdef-0123-456789abcde", "#0", "\"0123456-", "\"01234567-89AB", "\"g", "\"01234567-89ab-cdef-0123-456789abcdef0"}},
        {"{\"type\": \"string\", \"format\": \"ipv4\"}", {"\"0.0.0.0\"", "\"255.255.255.255\"", "\"192.168.1.20\"", "#1", "\"1.2.3.", "#0", "\"256", "\"1.2.3.4.", "\"01", "\"1..", "\"1.2.3.300"}},
        {"{\"type\": \"string\", \"format\": \"hostname\"}", {"\"a.b\"", "\"robot-7.kitchen.example\"", "#1", "\"a.", "\"a-", "#0", "\"-", "\".", "\"a..", "\"a_", "\"7", "\"a.b.c.d.e"}},
        {"{\"type\": \"string\", \"format\": \"email\"}", {"\"a@b.c\"", "\"First.last-2@mail.example.org\"", "#1", "\"a@b", "\"a.", "#0", "\"@", "\".a", "\"a@@", "\"a b", "\"a..b", "\"a@b.c@"}},
        {"{\"type\": \"string\", \"format\": \"uri\"}", {"\"http://a.b\"", "\"https://a.b/c_d/~e.f/\"", "#1", "\"http", "\"https://a", "#0", "\"ftp", "\"http:/a", "\"http://a.b//", "\"http://a.b/ ", "\"http://a.b?"}},
        {"{\"type\": \"string\", \"format\": \"date\", \"minLength\": 10, \"maxLength\": 10}", {"\"2024-02-28\"", "#0", "\"2024-02-28T"}},
        {"{\"type\": \"integer\", \"minimum\": 18446744073709551616, \"maximum\": 18446744073709551617}", {"18446744073709551616", "18446744073709551617", "#0", "18446744073709551615", "18446744073709551618"}},
        {"{\"type\": \"object\", \"minProperties\": 1, \"maxProperties\": 1, \"properties\": {\"a\": {\"const\": 1}, \"b\": {\"const\": 2}}}", {"{\"a\":1}", "{\"b\":2}", "#0", "{}", "{\"a\":1,"}},
    };
    moq_error err;
    words = open_pieces(0);
    lexicon = llmi_lexicon_make(words, NULL);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        llm_grammar *g = compile(cases[i].schema, &err);
        if (!g) { CHECK(0); fprintf(stderr, "%s\n%s\n", cases[i].schema, err.text); continue; }
        check_texts(g, cases[i].schema, cases[i].texts);
    }
    llmi_lexicon_drop(lexicon);
    shut(words);
}

static llm_grammar *compile_gbnf(const char *s, moq_error *err)
{
    llm_grammar_desc d;
    memset(&d, 0, sizeof d);
    d.gbnf = s;
    d.allocator = test_allocator();
    return llm_grammar_create(&d, err);
}

static void test_gbnf(void)
{
    static const struct { const char *grammar, *texts[24]; } cases[] = {
        {"root ::= \"yes\" | \"no\"", {"yes", "no", "#1", "y", "", "#0", "yesno", "n0"}},
        {"# moves\nroot ::= move (\" \" move)*   # one or more\nmove ::= [a-h] [1-8] [^a-z ]?\n", {"a1", "h8+ b2", "c3\xc3\xa9", "#1", "a1 ", "#0", "i", "a9", "a1b"}},
        {"root ::= item{2,3} end\nitem ::= \"<\" root? \">\" |\n  \"x\"\nend ::= \".\"", {"xx.", "<>x<>.", "<xx.>x.", "#1", "x", "#0", "x.", "xxxx"}},
        {"root ::= (\"a\" | \"b\"\n | \"c\")+ \"\\n\"", {"abc\n", "c\n", "#0", "\n", "ad"}},
        {"root ::= [0-9]{3} . \"\\x41\\u00e9\" [\\]\\-a]{2,}", {"123zA\xc3\xa9]-", "000\xf0\x9f\x98\x80" "A\xc3\xa9" "aaa", "#1", "123zA\xc3\xa9]", "#0", "12z", "123zB"}},
        {"root ::= expr\nexpr ::= term ((\"+\" | \"-\") term)*\nterm ::= \"(\" expr \")\" | [0-9]+", {"1", "1+(2-3)+44", "((1))", "#1", "((1)", "1+", "#0", "+", "()"}},
        {"root ::= \"\" | \"a\" root", {"", "a", "aaa", "#0", "b"}},
        {"root ::= (\"x\"*)* \"y\"", {"y", "xxxy", "#0", "z"}},
    };
    static const struct { const char *grammar, *says; } bad[] = {
        {"root ::= root \"a\" | \"a\"", "begins with itself"}, {"root ::= e root | \"x\"\ne ::= \"\"", "begins with itself"}, {"a ::= \"x\"", "no rule 'root'"}, {"root ::= b", "line 1 uses the rule 'b'"},
        {"root ::= \"a", "not closed"}, {"root ::= [a", "not closed"}, {"root ::= (\"a\"", "( without )"}, {"root ::= \"a\" )", ") without ("}, {"root ::= \"a\"{3,2}", "m under n"},
        {"root ::= [z-a]", "out of order"}, {"root ::= \"a\"\nroot ::= \"b\"", "second time"}, {"root ::= \"\\q\"", "escape"}, {"root := \"a\"", "::= was expected"},
        {"root ::= a\na ::= \"x\" a", "without end"}, {"root ::= *", "no literal"}, {"root ::= \"a\"**", "two quantifiers"},
    };
    moq_error err;
    words = open_pieces(0);
    lexicon = llmi_lexicon_make(words, NULL);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        llm_grammar *g = compile_gbnf(cases[i].grammar, &err);
        if (!g) { CHECK(0); fprintf(stderr, "%s\n%s\n", cases[i].grammar, err.text); continue; }
        check_texts(g, cases[i].grammar, cases[i].texts);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        llm_grammar *g = compile_gbnf(bad[i].grammar, &err);
        if (g || !strstr(err.text, bad[i].says)) { CHECK(0); fprintf(stderr, "%s\n%s\n", bad[i].grammar, g ? "accepted" : err.text); }
        CHECK(g || err.code == MOQ_E_GRAMMAR);
        llm_grammar_destroy(g);
    }
    CHECK_INT(test_state.live_allocs, 0);
    llmi_lexicon_drop(lexicon);
    shut(words);
}

/* ---- masks are exact ---- */

/* On every step, every token's bit against advancing by it, at several budgets; also at the start, where spaces are stripped. */
static void check_masks(llm_tokenizer *t, const char *schema, int steps)
{
    moq_error err;
    llmi_lexicon *x = llmi_lexicon_make(t, NULL);
    llm_grammar *g = compile(schema, &err);
    llmi_guide *guide = g && x ? llmi_guide_make(g, x, NULL, &err) : NULL;
    long wrong = 0, allowed = 0;
    float *logits = (float *)malloc((size_t)llm_vocab(t) * sizeof *logits), *mixed = (float *)malloc((size_t)llm_vocab(t) * sizeof *logits);
    CHECK(guide);
    llmi_place at = llmi_guide_begin(guide);
    for (int i = 0; i < steps && !llmi_guide_finished(guide, &at); i++) {
        int64_t rest = llmi_guide_rest(guide, &at), left = i % 3 == 0 ? 100000 : rest + below(12);
        uint32_t *mask = (uint32_t *)malloc(guide->words * sizeof *mask);
        int32_t choice = -1, seen = 0, best = -1;
        llm_sampling greedy;
        llmi_place after = at;
        for (int32_t id = 0; id < llm_vocab(t); id++) logits[id] = (float)below(100000); /* ties are allowed: the lower id wins */
        memset(&greedy, 0, sizeof greedy);
        memcpy(mask, llmi_guide_mask(guide, &at, left), guide->words * sizeof *mask);
        for (int32_t id = 0; id < llm_vocab(t); id++) {
            llmi_place to = at;
            int bit = (int)(mask[id >> 5] >> (id & 31) & 1), may = 0;
            if (llm_is_end(t, id)) {
                may = (llmi_pool_at(&guide->configs, at.config)[LLMI_C_FLAGS] & LLMI_COMPLETE) != 0;
            } else if (llmi_guide_advance(guide, &to, id) == 1) {
                may = llmi_guide_rest(guide, &to) < left;
                if (may && below(++seen) == 0) choice = id;
            }
            wrong += bit != may && !(bit && at.key >= 0); /* a taken name is found out when it is complete */
            allowed += bit;
            if (may && (best < 0 || logits[id] > logits[best])) best = id;
        }
        wrong += llmi_guide_pick(guide, &after, &greedy, logits, mixed, llm_vocab(t), left, NULL, NULL, NULL, &err) != best;
        free(mask);
        CHECK(choice >= 0);
        if (choice < 0 || llmi_guide_advance(guide, &at, choice) != 1) break;
    }
    CHECK_INT(wrong, 0);
    CHECK(allowed > 0);
    free(logits);
    free(mixed);
    llmi_guide_drop(guide);
    llm_grammar_destroy(g);
    llmi_lexicon_drop(x);
}

/* Draws under a grammar have the shares of the allowed tokens among themselves, although most are made without a mask; the same state
   gives the same token. filtered: with top_k, which counts allowed tokens only. */
static void check_draws(int filtered)
{
    enum { DRAWS = 20000, MOST = 1024, PADDING = 250 }; /* rows of the model's table behind the tokenizer's last token, liked best of all */
    moq_error err;
    llm_tokenizer *t = open_pieces(300);
    llmi_lexicon *x = llmi_lexicon_make(t, NULL);
    llm_grammar *g = compile("{\"type\": \"string\", \"maxLength\": 3}", &err);
    llmi_guide *guide = g && x ? llmi_guide_make(g, x, NULL, &err) : NULL;
    float logits[MOST], mixed[MOST], scratch[MOST];
    int32_t index[MOST], seen[MOST], known = llm_vocab(t), count = known + PADDING;
    double share[MOST], total = 0, worst = 0;
    uint64_t state = 7, again = 7;
    llm_sampling s;
    llmi_place at = llmi_guide_begin(guide);
    CHECK(guide && count <= MOST);
    CHECK_INT(llmi_guide_advance(guide, &at, t->byte_ids['"']), 1);
    const uint32_t *mask = llmi_guide_mask(guide, &at, 100);
    char may[MOST];
    memset(&s, 0, sizeof s);
    s.temperature = 0.7f;
    s.top_k = filtered ? 5 : 0;
    for (int32_t i = 0; i < count; i++) {
        may[i] = i < known && (mask[i >> 5] >> (i & 31) & 1);
        logits[i] = 3 * test_uniform();
        if (!may[i]) logits[i] += i < known ? 1 : 2; /* what may not come is liked better */
        seen[i] = 0;
    }
    for (int32_t i = 0; i < count; i++) {
        int32_t better = 0;
        for (int32_t k = 0; k < count; k++) better += may[k] && (logits[k] > logits[i] || (logits[k] == logits[i] && k < i));
        share[i] = may[i] && (!filtered || better < 5) ? exp((double)logits[i] / 0.7) : 0;
        total += share[i];
    }
    for (int n = 0; n < DRAWS; n++) {
        llmi_place to = at, too = at;
        int32_t id = llmi_guide_pick(guide, &to, &s, logits, mixed, count, 100, &state, scratch, index, &err);
        CHECK(n > 20 || llmi_guide_pick(guide, &too, &s, logits, mixed, count, 100, &again, scratch, index, &err) == id);
        if (id < 0 || share[id] <= 0) { CHECK(0); break; }
        seen[id]++;
    }
    for (int32_t i = 0; i < count; i++) {
        double p = share[i] / total, off = fabs(seen[i] - DRAWS * p) / sqrt(DRAWS * p * (1 - p) + 1);
        if (off > worst) worst = off;
    }
    CHECK(worst < 5); /* standard deviations */
    s.temperature = 0; /* greedy, the best eight are padding */
    llmi_place to = at;
    int32_t best = -1, id = llmi_guide_pick(guide, &to, &s, logits, mixed, count, 100, NULL, NULL, NULL, &err);
    for (int32_t i = 0; i < count; i++)
        if (may[i] && (best < 0 || logits[i] > logits[best])) best = i;
    CHECK_INT(id, best);
    llmi_guide_drop(guide);
    llm_grammar_destroy(g);
    llmi_lexicon_drop(x);
    shut(t);
}

static void test_draws(void)
{
    check_draws(0);
    check_draws(1);
}

static void test_masks(void)
{
    static const char *const schemas[] = {
        ("{\"type\": \"array\", \"items\": {\"type\": \"object\", \"properties\": {\"name\": {\"type\": \"string\", \"minLength\": 3, \"maxLength\": 9}, \"x\": {\"type\": \"number\"}},"
        "\"required\": [\"name\"]}, \"minItems\": 3}"),
        "{\"type\": \"array\", \"items\": {\"type\": \"string\", \"minLength\": 12, \"maxLength\": 40}, \"minItems\": 2}",
        "{\"type\": \"array\", \"items\": {\"anyOf\": [{\"type\": \"string\", \"maxLength\": 4}, {\"enum\": [\"abcdefg\", \"ab\", 12]}, {\"type\": \"string\", \"minLength\": 30}]}, \"minItems\": 4}",
        "{}", "{\"type\": \"object\", \"additionalProperties\": {\"enum\": [\"a\", 1]}, \"minProperties\": 2}",
    };
    for (int k = 0; k < 2; k++) {
        llm_tokenizer *t = k ? open_pieces(400) : open_demo_tokenizer();
        for (size_t i = 0; i < sizeof schemas / sizeof schemas[0]; i++) check_masks(t, schemas[i], 60);
        shut(t);
    }
}

/* ---- schemas and grammars made to hurt ---- */

static size_t live_bytes, peak_bytes;
static void *count_alloc(void *user, size_t bytes, size_t align)
{
    (void)user;
    (void)align;
    live_bytes += bytes;
    if (live_bytes > peak_bytes) peak_bytes = live_bytes;
    return malloc(bytes ? bytes : 1);
}

static void count_release(void *user, void *p, size_t bytes)
{
    (void)user;
    if (p) live_bytes -= bytes;
    free(p);
}

/* Compile t (emptied) within a bounded time and memory: a grammar, or a refusal that says why. */
static void bounded(text *t, int gbnf, int refused, const char *says)
{
    llm_grammar_desc d;
    moq_error err;
    memset(&d, 0, sizeof d);
    memset(&err, 0, sizeof err);
    if (gbnf) d.gbnf = t->data;
    else d.schema = t->data;
    d.bytes = t->count;
    d.allocator.alloc = count_alloc;
    d.allocator.release = count_release;
    live_bytes = peak_bytes = 0;
    double start = test_seconds();
    llm_grammar *g = llm_grammar_create(&d, &err);
    double spent = test_seconds() - start;
    CHECK(spent < 20); /* with a sanitizer; what is bounded wrongly takes hours */
    CHECK(peak_bytes < (size_t)96 << 20);
    CHECK(refused ? !g && err.code < 0 && strstr(err.text, says) : g != NULL);
    if ((g == NULL) != refused || (refused && !strstr(err.text, says))) fprintf(stderr, "%.60s..: %s\n", t->data, err.text);
    llm_grammar_destroy(g);
    CHECK(live_bytes == 0);
    t->count = 0;
}

/* `count` times `each`, in which %d stands for the number and for the next one. */
static void add_times(text *t, int count, const char *between, const char *each)
{
    char s[300];
    for (int i = 0; i < count; i++) {
        if (i) add(t, between);
        snprintf(s, sizeof s, each, i, i + 1, i + 1);
        add(t, s);
    }
}

static void test_hostile(void)
{
    text t = {NULL, 0, 0};
    add(&t, "{\"enum\": ["); /* a large enum is sorted once, not searched for each value */
    for (int i = 0; i < 20000; i++) {
        char s[60];
        snprintf(s, sizeof s, "%s\"%x-%d\"", i ? "," : "", (unsigned)i * 2654435761u, i % 7);
        add(&t, s);
    }
    add(&t, "]}");
    bounded(&t, 0, 0, "");
    add_times(&t, 2000, "", "{\"items\": ");
    bounded(&t, 0, 1, "nested deeper");
    add(&t, "{\"$ref\": \"#/$defs/d0\", \"$defs\": {"); /* two ways to one schema are one: 2^12 otherwise */
    add_times(&t, 12, ",", "\"d%d\": {\"anyOf\": [{\"$ref\": \"#/$defs/d%d\"}, {\"$ref\": \"#/$defs/d%d\"}]}");
    add(&t, ", \"d12\": {\"type\": \"null\"}}}");
    bounded(&t, 0, 0, "");
    add(&t, "{\"$ref\": \"#/$defs/d0\", \"$defs\": {");
    add_times(&t, 300, ",", "\"d%d\": {\"anyOf\": [{\"$ref\": \"#/$defs/d%d\"}, {\"$ref\": \"#/$defs/d%d\"}]}");
    add(&t, ", \"d300\": {\"type\": \"null\"}}}");
    bounded(&t, 0, 1, "more than 32 schemas");
    add(&t, "{\"enum\": [1], \"$ref\": \"#/$defs/d0\", \"$defs\": {"); /* and a value that would be checked in 2^100 ways */
    add_times(&t, 100, ",", "\"d%d\": {\"anyOf\": [{\"$ref\": \"#/$defs/d%d\", \"minimum\": 2}, {\"$ref\": \"#/$defs/d%d\"}]}");
    add(&t, ", \"d100\": {\"type\": \"null\"}}}");
    bounded(&t, 0, 1, "");
    add(&t, "{\"type\": \"object\", \"allOf\": [");
    add_times(&t, 14, ",", "{\"anyOf\": [{\"required\": [\"a%d\"]}, {\"required\": [\"b%d\"]}]}");
    add(&t, "]}");
    bounded(&t, 0, 1, "");
    add(&t, "{\"oneOf\": [");
    add_times(&t, 800, ",", "{\"type\": \"object\", \"properties\": {\"k\": {\"const\": %d}}, \"required\": [\"k\"]}");
    add(&t, "]}");
    bounded(&t, 0, 1, "takes too long to check");
    add(&t, "{\"$ref\": \"#/$defs/d0\", \"$defs\": {\"d1000\": {\"$ref\": \"#/$defs/d0\"}, "); /* a ring that may end anywhere */
    add_times(&t, 1000, ",", "\"d%d\": {\"type\": \"object\", \"properties\": {\"x\": {\"$ref\": \"#/$defs/d%d\"}}}");
    add(&t, "}}");
    bounded(&t, 0, 0, "");
    add(&t, "{\"$ref\": \"#/$defs/d0\", \"$defs\": {"); /* chains: of bare references, forwards and backwards, and through members */
    add_times(&t, 100000, ",", "\"d%d\": {\"$ref\": \"#/$defs/d%d\"}");
    add(&t, "}}");
    bounded(&t, 0, 1, "more than 32 schemas");
    add(&t, "{\"$ref\": \"#/$defs/d100000\", \"$defs\": {\"d0\": {}, ");
    for (int i = 0; i < 100000; i++) {
        char s[60];
        snprintf(s, sizeof s, "%s\"d%d\": {\"items\": {\"$ref\": \"#/$defs/d%d\"}}", i ? "," : "", i + 1, i);
        add(&t, s);
    }
    add(&t, "}}");
    bounded(&t, 0, 1, "more than 20000 combinations");
    add(&t, "{\"$ref\": \"#/$defs/d0\", \"$defs\": {");
    add_times(&t, 100000, ",", "\"d%d\": {\"properties\": {\"x\": {\"$ref\": \"#/$defs/d%d\"}}}");
    add(&t, "}}");
    bounded(&t, 0, 1, "more than 20000 combinations");
    add(&t, "{\"type\": \"object\", \"properties\": {");
    add_times(&t, 25000, ",", "\"p%d\": {\"minimum\": 1}");
    add(&t, "}}");
    bounded(&t, 0, 1, "more than 20000 combinations");
    static const char *const refused[] = {"^(a{1,1000}){1,1000}$", "^(a?){1000}a{1000}$", "(.*a.*){30}", "^(((((a{10}){10}){10}){10}){10}){10}$", "^((((a|b)*)*)*)*$", "^[^x]{0,100000}$"};
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        add(&t, "{\"type\": \"string\", \"minLength\": 50, \"maxLength\": 2000, \"pattern\": \"");
        add(&t, refused[i]);
        add(&t, "\"}");
        bounded(&t, 0, 1, "");
    }
    add(&t, "root ::= ");
    add_times(&t, 100000, "", "(");
    bounded(&t, 1, 1, "nested too deeply");
    add_times(&t, 5000, "\n", "r%d ::= r%d r%d");
    add(&t, "\nr5000 ::= \"a\"\nroot ::= r0\n");
    bounded(&t, 1, 1, "more rules");
    add_times(&t, 1000, "\n", "r%d ::= r%d r%d");
    add(&t, "\nr1000 ::= \"a\"\nroot ::= r0\n");
    bounded(&t, 1, 1, "no finite text");
    add(&t, "root ::= ((\"a\"{1,3000}){1,3000}){1,3000}\n");
    bounded(&t, 1, 0, "");
    free(t.data);
}

/* Every byte of a text changed, and every length: a grammar, or an error with a text. */
static void damage(const char *good, int gbnf)
{
    size_t n = strlen(good);
    int made = 0;
    moq_error first;
    llm_grammar *whole = gbnf ? compile_gbnf(good, &first) : compile(good, &first);
    CHECK(whole != NULL);
    if (!whole) fprintf(stderr, "%s\n", first.text);
    llm_grammar_destroy(whole);
    for (size_t i = 0; i < n; i++)
        for (int k = 0; k < 4; k++) {
            llm_grammar_desc d;
            moq_error err;
            uint8_t *s = test_copy(good, k == 3 ? i + 1 : n); /* the last length is the whole text */
            memset(&d, 0, sizeof d);
            if (k < 3) s[i] = (uint8_t)(k == 0 ? good[i] ^ 1 : k == 1 ? "\"{}[]9|*(\\"[i % 10] : (int)(test_random() & 0xff));
            if (gbnf) d.gbnf = (const char *)s;
            else d.schema = (const char *)s;
            d.bytes = k == 3 ? i + 1 : n;
            d.allocator = test_allocator();
            llm_grammar *g = llm_grammar_create(&d, &err);
            made += g != NULL;
            if (!g) CHECK(err.code < 0 && err.code != MOQ_E_NOMEM && err.text[0]);
            llm_grammar_destroy(g);
            free(s);
            CHECK_INT(test_state.live_allocs, 0);
        }
    CHECK(made > 20);
}

static void test_damaged(void)
{
    damage("{\"$defs\":{\"a/b\":{\"type\":[\"integer\",\"null\"],\"minimum\":-2.5e1,\"exclusiveMaximum\":77}},\"type\":\"object\",\"properties\":{\"x\":{\"$ref\":\"#/$defs/a~1b\"},"
           "\"y\":{\"type\":\"string\",\"pattern\":\"^[a-c]{2,3}(x|\\\\d)+$\",\"maxLength\":9},\"z\":{\"oneOf\":[{\"const\":[1,{\"a\":null}]},{\"enum\":[\"p\",true]}]}},"
           "\"required\":[\"x\"],\"additionalProperties\":{\"type\":\"array\",\"prefixItems\":[{}],\"items\":false,\"minItems\":1},\"maxProperties\":4}", 0);
    damage("root ::= (\"a\" | [b-d\\n] word){1,3} \" \"? # end\nword ::= [^\\x01-\\x20\"\\\\]{2,5}\n  | \"\\\"\" root\n", 1);
}

/* Every failing allocation is an error and leaks nothing. */
static void test_no_memory(void)
{
    static const char schema[] = "{\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"string\", \"pattern\": \"^[a-z]{2,4}$\", \"maxLength\": 3}, \"b\": {\"enum\": [1, \"x\", [2]]},"
                                 "\"c\": {\"type\": \"number\", \"minimum\": 0.5}}, \"required\": [\"a\"], \"additionalProperties\": {\"type\": \"array\"}}";
    llm_tokenizer *t = open_demo_tokenizer();
    moq_allocator a = test_allocator();
    text d = {NULL, 0, 0};
    int done = 0, tries = 0;
    for (int k = 1; !done && k < 20000; k += 1 + k / 40, tries++) {
        moq_error err;
        memset(&err, 0, sizeof err);
        test_state.fail_at = k;
        llm_grammar *g = compile(schema, &err);
        llmi_lexicon *x = g ? llmi_lexicon_make(t, &a) : NULL;
        llmi_guide *guide = x ? llmi_guide_make(g, x, &a, &err) : NULL;
        done = guide != NULL && test_state.fail_at > 0;
        if (guide) {
            static float logits[4096];
            llm_sampling greedy;
            llmi_place at = llmi_guide_begin(guide);
            memset(&greedy, 0, sizeof greedy);
            for (int n = 0; n < 40 && !llmi_guide_finished(guide, &at); n++) {
                for (int32_t i = 0; i < llm_vocab(t); i++) logits[i] = test_uniform();
                if (llmi_guide_pick(guide, &at, &greedy, logits, logits, llm_vocab(t), 1000, NULL, NULL, NULL, &err) < 0) { CHECK_INT(err.code, MOQ_E_NOMEM); break; }
            }
            done = test_state.fail_at > 0;
        } else if (err.code != MOQ_OK) CHECK_INT(err.code, MOQ_E_NOMEM);
        test_state.fail_at = 0;
        llmi_guide_drop(guide);
        llmi_lexicon_drop(x);
        llm_grammar_destroy(g);
        CHECK_INT(test_state.live_allocs, 0);
    }
    CHECK(tries > 60);
    CHECK(done);
    free(d.data);
    shut(t);
}

/* ---- in a conversation ---- */

static void test_conversation(void)
{
    moq_error err;
    llm_desc desc;
    const char *piece;
    text d = {NULL, 0, 0};
    static const char schema[] = "{\"type\": \"object\", \"properties\": {\"say\": {\"type\": \"string\", \"maxLength\": 200}, \"n\": {\"type\": \"integer\"}}, \"required\": [\"say\", \"n\"]}";
    memset(&desc, 0, sizeof desc);
    desc.path = test_path("../examples/demo-model");
    desc.allocator = test_allocator();
    desc.context = 256;
    desc.slots = 2;
    llm *m = llm_open(&desc, &err), *n;
    llm_grammar *g = compile(schema, &err), *other = compile_gbnf("root ::= \"yes\" | \"no\"", &err);
    CHECK(m && g && other);
    CHECK_INT(llm_set_grammar(m, g, 5, &err), MOQ_E_LIMIT);
    for (int k = 0; k < 6 && m; k++) { /* greedy and warm, short and long, alone and forked in the middle */
        llm_sampling s;
        memset(&s, 0, sizeof s);
        s.temperature = k < 2 ? 0.0f : 3.0f;
        s.seed = (uint64_t)k;
        llm_set_sampling(m, &s);
        CHECK_INT(llm_set_grammar(m, g, k % 2 ? 25 : 0, &err), MOQ_OK);
        llm_say(m, "system", "red mug at kitchen table; Ana at bathroom cupboard; robot at garage rack");
        llm_say(m, "user", "can you bring me the red mug?");
        d.count = 0;
        n = NULL;
        for (int i = 0; (piece = llm_next(m, &err)) != NULL; i++) {
            add(&d, piece);
            if (i == 2) {
                CHECK_INT(llm_set_grammar(m, NULL, 0, &err), MOQ_E_STATE);
                CHECK(llm_copy_state(m, NULL, 0, &err) == SIZE_MAX);
                n = llm_fork(m, &err);
                CHECK(n);
            }
        }
        CHECK_INT(err.code, MOQ_OK);
        CHECK(accepts(schema, d.data, d.count));
        CHECK(k % 2 == 0 || llm_get_stats(m)->generated_tokens <= 25);
        if (n) { /* the fork writes the rest of the same answer */
            size_t rest = 0;
            while ((piece = llm_next(n, &err)) != NULL) {
                size_t bytes = strlen(piece);
                rest += bytes;
            }
            CHECK_INT(err.code, MOQ_OK);
            CHECK(rest > 0 && rest < d.count);
            llm_close(n);
        }
        llm_reset(m);
    }
    CHECK_INT(llm_set_grammar(m, other, 0, &err), MOQ_OK);
    llm_say(m, "user", "is it red?");
    for (d.count = 0; (piece = llm_next(m, &err)) != NULL;) add(&d, piece);
    CHECK(strcmp(d.data, "yes") == 0 || strcmp(d.data, "no") == 0);
    CHECK_INT(llm_set_grammar(m, NULL, 0, &err), MOQ_OK);
    llm_close(m);
    llm_grammar_destroy(g);
    llm_grammar_destroy(other);
    free(d.data);
    CHECK_INT(test_state.live_allocs, 0);
}

/* ---- for other validators ---- */

static char *read_all(const char *path)
{
    FILE *f = fopen(path, "rb");
    text t = {NULL, 0, 0};
    char part[65536];
    size_t n;
    while (f && (n = fread(part, 1, sizeof part, f)) > 0) add_bytes(&t, part, n);
    if (f) fclose(f);
    return t.data;
}

static int make_documents(const char *path, const char *file, int count)
{
    moq_error err;
    folder = moq_open(path, NULL, &err);
    llm_tokenizer *t = folder ? llm_tokenizer_open(folder, &err) : NULL;
    char *all = read_all(file), *end;
    llmi_lexicon *x = t ? llmi_lexicon_make(t, NULL) : NULL;
    text d = {NULL, 0, 0};
    test_state.seed = 0x853c49e6748fea9bu;
    for (char *line = all; x && line && *line; line = end) {
        end = strchr(line, '\n');
        if (end) *end++ = 0;
        else end = line + strlen(line);
        llm_grammar *g = compile(line, &err);
        llmi_guide *guide = g ? llmi_guide_make(g, x, NULL, &err) : NULL;
        if (!guide) { printf("!%s\n", err.text); continue; }
        for (int i = 0; i < count; i++) {
            if (!write_document(guide, t, llmi_guide_shortest(guide) + (i % 3 ? 100 : 5), i % 3, &d)) return 1;
            printf("%s\n", d.data);
        }
        llmi_guide_drop(guide);
        llm_grammar_destroy(g);
    }
    printf("\n");
    return 0;
}

/* What a grammar costs beside a token's pass through the model, on answers that the schema leads: greedy, where masks are made only when the
   model's first choices are refused, and with top_p, which needs one for every token. Processor time: other programs do not count. */
static int bench(const char *path, const char *schema, int count)
{
    moq_error err;
    llm_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.path = path;
    desc.threads = 1;
    desc.context = 512;
    int words_only = atoi(path);
    llm *m = words_only ? NULL : llm_open(&desc, &err);
    llm_tokenizer *t = words_only ? open_pieces(words_only) : NULL;
    const llm_tokenizer *used = m ? llm_get_tokenizer(m) : t;
    llm_grammar *g = compile(schema, &err);
    double start = own_seconds();
    llmi_lexicon *x = used && g ? llmi_lexicon_make(used, NULL) : NULL;
    double tree = own_seconds() - start;
    if (!x) { puts(err.text); return 1; }
    size_t vocab = (size_t)(m ? llm_get_info(m)->vocab : llm_vocab(t));
    float *logits = (float *)malloc(vocab * sizeof *logits), *mixed = (float *)malloc(vocab * sizeof *logits), *scratch = (float *)malloc(vocab * sizeof *logits);
    int32_t *index = (int32_t *)malloc(vocab * sizeof *index);
    for (int filtered = 0; filtered < 2; filtered++) {
        llm_sampling s;
        double pass = 0, mask = 0, worst = 0;
        int tokens = 0, over = 0;
        start = own_seconds();
        llmi_guide *guide = llmi_guide_make(g, x, NULL, &err);
        double made = own_seconds() - start;
        if (!guide) { puts(err.text); return 1; }
        memset(&s, 0, sizeof s);
        s.temperature = filtered ? 1.0f : 0.0f;
        s.top_p = filtered ? 0.95f : 0.0f;
        for (int k = 0; k < count; k++) {
            uint64_t state = (uint64_t)k;
            llmi_place at = llmi_guide_begin(guide);
            int32_t id = 5 + k;
            for (int32_t n = 0; n < 200 && !llmi_guide_finished(guide, &at); n++) {
                start = own_seconds();
                for (size_t i = 0; i < vocab && !m; i++) logits[i] = 200 * test_uniform();
                if (m && llm_forward(m, 0, &id, 1, n, NULL, logits, &err) < 0) { puts(err.text); return 1; }
                pass += own_seconds() - start;
                start = own_seconds();
                id = llmi_guide_pick(guide, &at, &s, logits, mixed, (int32_t)vocab, 200 - n, &state, scratch, index, &err);
                double spent = own_seconds() - start;
                start = own_seconds();
                llm_sample(&s, logits, (int32_t)vocab, &state, scratch, index); /* is needed without a grammar too */
                spent -= own_seconds() - start;
                mask += spent;
                over += spent > 1e-3;
                if (spent > worst) worst = spent;
                tokens++;
                if (id < 0 || llm_is_end(used, id)) break;
            }
        }
        printf("%s: %d tokens of %zu: pass %.1f us, grammar %.1f us (%.2f %%), slowest %.2f ms, %d over 1 ms; tree of the vocabulary %.1f ms, made in %.1f ms\n",
               filtered ? "top_p " : "greedy", tokens, vocab, pass / tokens * 1e6, mask / tokens * 1e6, 100 * mask / pass, worst * 1e3, over, tree * 1e3, made * 1e3);
        llmi_guide_drop(guide);
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 5 && strcmp(argv[1], "--bench") == 0) return bench(argv[2], read_all(argv[3]), atoi(argv[4]));
    if (argc == 5 && strcmp(argv[1], "--make") == 0) return make_documents(argv[2], argv[3], atoi(argv[4]));
    if (argc == 3 && strcmp(argv[1], "--schemas") == 0) {
        text s = {NULL, 0, 0};
        test_state.seed = 0x853c49e6748fea9bu;
        for (int i = 0; i < atoi(argv[2]); i++) { whole_schema(&s); printf("%s\n", s.data); }
        return 0;
    }
    if (!setlocale(LC_CTYPE, "C.UTF-8") && !setlocale(LC_CTYPE, "en_US.UTF-8")) printf("note: no UTF-8 locale: patterns with . and [^] are not tested\n"), plain = 1;
    test_begin(argc, argv);
    RUN(test_refusals);
    RUN(test_languages);
    RUN(test_gbnf);
    RUN(test_masks);
    RUN(test_draws);
    RUN(test_hostile);
    RUN(test_damaged);
    RUN(test_no_memory);
    RUN(test_conversation);
    RUN(test_random_bytes);
    RUN(test_random_pieces);
    return test_end();
}
