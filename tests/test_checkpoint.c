/* test_checkpoint.c - folders: index and shard rows, config files, the same verdict from files and from memory, verification, golden folders. */
#define _POSIX_C_SOURCE 200809L
#include "test.h"
#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef GOLDEN_DIR
#define GOLDEN_DIR TEST_DIR "/data/golden"
#endif

/* ---- a folder under construction: files in memory, also written to a temporary folder ---- */

typedef struct folder { moq_file file[64]; size_t count; char path[900]; } folder;

static folder new_folder(const char *name)
{
    folder f;
    memset(&f, 0, sizeof f);
    mkdir(test_path("build"), 0777);
    mkdir(test_path("build/tmp"), 0777);
    mkdir(test_path("build/tmp/ck"), 0777);
    snprintf(f.path, sizeof f.path, "%s/%s", test_path("build/tmp/ck"), name);
    mkdir(f.path, 0777);
    return f;
}

static void add_bytes(folder *f, const char *name, const void *data, size_t n)
{
    moq_file *x = NULL;
    for (size_t i = 0; i < f->count; i++)
        if (strcmp(f->file[i].name, name) == 0) x = &f->file[i];
    if (!x) {
        char *copy = (char *)malloc(strlen(name) + 1);
        strcpy(copy, name);
        x = &f->file[f->count++];
        x->name = copy;
    } else free((void *)(uintptr_t)x->data);
    x->data = test_copy(data, n);
    x->bytes = n;
    char path[1200];
    snprintf(path, sizeof path, "%s/%s", f->path, name);
    FILE *o = fopen(path, "wb");
    CHECK(o && fwrite(data, 1, n, o) == n);
    if (o) fclose(o);
}

static void add_text(folder *f, const char *name, const char *text) { add_bytes(f, name, text, strlen(text)); }

static void drop_file(folder *f, const char *name)
{
    char path[1200];
    snprintf(path, sizeof path, "%s/%s", f->path, name);
    remove(path);
    for (size_t i = 0; i < f->count; i++)
        if (strcmp(f->file[i].name, name) == 0) {
            free((void *)(uintptr_t)f->file[i].name);
            free((void *)(uintptr_t)f->file[i].data);
            f->file[i] = f->file[--f->count];
            return;
        }
}

static void end_folder(folder *f)
{
    while (f->count) {
        char name[300];
        snprintf(name, sizeof name, "%s", f->file[0].name);
        drop_file(f, name);
    }
    CHECK(rmdir(f->path) == 0);
    rmdir(test_path("build/tmp/ck"));
}

/* A safetensors file: name, dtype, shape as JSON, bytes and how many of them; the data lies in the order given. */
typedef struct piece { const char *name, *dtype, *shape; const void *data; size_t n; } piece;

static void add_tensors(folder *f, const char *file, const piece *p, size_t count)
{
    size_t cap = 1000 + count * 200, n = 8, data = 0;
    for (size_t i = 0; i < count; i++) data += p[i].n;
    char *text = (char *)malloc(cap + data);
    n += (size_t)snprintf(text + n, cap - n, "{");
    data = 0;
    for (size_t i = 0; i < count; i++) {
        n += (size_t)snprintf(text + n, cap - n, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", i ? "," : "", p[i].name, p[i].dtype, p[i].shape, data, data + p[i].n);
        data += p[i].n;
    }
    text[n++] = '}';
    for (size_t i = 0; i < 8; i++) text[i] = (char)((n - 8) >> (8 * i));
    for (size_t i = 0; i < count; i++) {
        if (p[i].n) memcpy(text + n, p[i].data, p[i].n);
        n += p[i].n;
    }
    add_bytes(f, file, text, n);
    free(text);
}

static const uint8_t zeros[4096];

/* A file with BF16 vectors of the names given, one element each. */
static void add_vectors(folder *f, const char *file, const char *const *names, size_t count)
{
    piece p[16];
    for (size_t i = 0; i < count; i++) {
        p[i].name = names[i];
        p[i].dtype = "BF16";
        p[i].shape = "[1]";
        p[i].data = zeros;
        p[i].n = 2;
    }
    add_tensors(f, file, p, count);
}

/* ---- one verdict from three ways of opening ---- */

typedef struct findings { int fatal, all; char text[40][800]; moq_result code[40]; int is_fatal[40]; } findings;

static void log_finding(void *user, moq_log_level level, moq_result code, const char *text)
{
    findings *f = (findings *)user;
    (void)level;
    if (f->all < 40) {
        snprintf(f->text[f->all], 800, "%s", text);
        f->code[f->all] = code;
    }
    f->all++;
}

static void take_finding(void *user, int fatal, const moq_error *e)
{
    findings *f = (findings *)user;
    if (f->all < 40) f->is_fatal[f->all] = fatal;
    f->fatal += fatal != 0;
    log_finding(user, MOQ_LOG_INFO, e->code, e->text);
}

static int has_finding(const findings *f, const char *a, const char *b)
{
    for (int i = 0; i < f->all && i < 40; i++)
        if (strstr(f->text[i], a) && (!b || strstr(f->text[i], b))) return 1;
    return 0;
}

static int printable(const char *s)
{
    for (; *s; s++)
        if ((unsigned char)*s < 0x20 || (unsigned char)*s > 0x7e) return 0;
    return 1;
}

static moq_open_desc counted(uint32_t flags, findings *log)
{
    moq_open_desc d;
    memset(&d, 0, sizeof d);
    d.allocator = test_allocator();
    d.flags = flags;
    if (log) {
        memset(log, 0, sizeof *log);
        d.log = log_finding;
        d.log_user = log;
    }
    return d;
}

static int open_descriptors(void)
{
    int n = 0;
    DIR *d = opendir("/proc/self/fd");
    if (!d) return 0;
    while (readdir(d)) n++;
    closedir(d);
    return n;
}

/* how: 0 mapped, 1 read, 2 memory. */
static moq_checkpoint *open_how(const folder *f, int how, const moq_open_desc *desc, moq_error *e)
{
    return how == 2 ? moq_open_memory(f->file, f->count, desc, e) : moq_open(f->path, desc, e);
}

static void expect_flags(const char *id, const folder *f, uint32_t flags, int memory, moq_result code, const char *a, const char *b)
{
    for (int how = 0; how < (memory ? 3 : 2); how++) {
        moq_open_desc d = counted(flags | (how == 1 ? MOQ_OPEN_READ : 0), NULL);
        moq_error e;
        memset(&e, 0x55, sizeof e);
        int descriptors = open_descriptors();
        moq_checkpoint *ck = open_how(f, how, &d, &e);
        moq_result r = ck ? MOQ_OK : e.code;
        if (r != code || (r != MOQ_OK && ((a && !strstr(e.text, a)) || (b && !strstr(e.text, b)) || !printable(e.text)))) {
            test_state.broken++;
            fprintf(stderr, "%s (%d): %s, expected %s naming '%s' '%s': %s\n", id, how, moq_result_name(r), moq_result_name(code), a ? a : "", b ? b : "", ck ? "" : e.text);
        }
        moq_close(ck);
        CHECK_INT(test_state.live_allocs, 0);
        CHECK_INT(open_descriptors(), descriptors);
        test_state.live_allocs = 0;
    }
}

static void expect(const char *id, const folder *f, moq_result code, const char *a, const char *b) { expect_flags(id, f, 0, 1, code, a, b); }

#define MAP(rows) "{\"metadata\":{\"total_size\":8},\"weight_map\":{" rows "}}"
#define INDEX "model.safetensors.index.json"

/* Two shards with two vectors each. */
static folder sharded(const char *name)
{
    static const char *const one[] = {"a", "b"}, *const two[] = {"c", "d"};
    folder f = new_folder(name);
    add_text(&f, "config.json", "{\"model_type\":\"llama\"}");
    add_vectors(&f, "model-00001-of-00002.safetensors", one, 2);
    add_vectors(&f, "model-00002-of-00002.safetensors", two, 2);
    return f;
}

#define S1 "model-00001-of-00002.safetensors"
#define S2 "model-00002-of-00002.safetensors"
#define FULL MAP("\"a\":\"" S1 "\",\"b\":\"" S1 "\",\"c\":\"" S2 "\",\"d\":\"" S2 "\"")

/* ---- index and shards ---- */

static void test_checkpoint_index_rows(void)
{
    folder f = sharded("index");
    add_text(&f, INDEX, FULL);
    expect("good", &f, MOQ_OK, NULL, NULL);
    add_text(&f, INDEX, "{\"metadata\":{}}");
    expect("I1a", &f, MOQ_E_HEADER, "weight_map", INDEX);
    add_text(&f, INDEX, "{\"weight_map\":[]}");
    expect("I1b", &f, MOQ_E_HEADER, "weight_map", NULL);
    add_text(&f, INDEX, "{\"weight_map\":{\"a\":5}}");
    expect("I1c", &f, MOQ_E_HEADER, "'a'", NULL);
    add_text(&f, INDEX, "[]");
    expect("I1d", &f, MOQ_E_HEADER, "weight_map", NULL);
    add_text(&f, INDEX, "{\"weight_map\":{}}");
    expect("I1e", &f, MOQ_E_MISSING, "weight_map", NULL);
    add_text(&f, INDEX, "{\"weight_map\":{\"a\":NaN}}");
    expect("strict", &f, MOQ_E_JSON, INDEX, NULL);
    add_text(&f, INDEX, MAP("\"a\":\"" S1 "\",\"b\":\"" S1 "\",\"c\":\"" S2 "\",\"d\":\"gone.safetensors\""));
    expect("I7", &f, MOQ_E_MISSING, "gone.safetensors", NULL);
    add_text(&f, INDEX, MAP("\"a\":\"" S1 "\",\"b\":\"" S1 "\",\"c\":\"" S2 "\",\"d\":\"" S2 "\",\"e\":\"" S2 "\""));
    expect("I9a", &f, MOQ_E_MISSING, "'e'", S2);
    add_text(&f, INDEX, MAP("\"a\":\"" S1 "\",\"b\":\"" S2 "\",\"c\":\"" S2 "\",\"d\":\"" S2 "\""));
    expect("I9b", &f, MOQ_E_MISSING, "'b'", S2);
    add_text(&f, INDEX, MAP("\"a\":\"" S1 "\",\"b\":\"" S1 "\",\"c\":\"" S2 "\""));
    expect("I10", &f, MOQ_E_MISMATCH, "'d'", S2);
    add_text(&f, INDEX, MAP("\"a\":\"" S1 "\",\"a\":\"" S1 "\""));
    expect("twice", &f, MOQ_E_DUPLICATE, "'a'", NULL);
    static const char *const again[] = {"c", "b"};
    add_text(&f, INDEX, FULL);
    add_vectors(&f, S2, again, 2);
    expect("I11", &f, MOQ_E_DUPLICATE, "'b'", S1);
    end_folder(&f);
}

static void test_checkpoint_paths_refused(void)
{
    static const char *const bad[] = {"../x.safetensors", "/etc/x.safetensors", "C:\\\\x.safetensors", "\\\\\\\\host\\\\share.safetensors", "a\\\\..\\\\b.safetensors", "a:b.safetensors",
        "NUL.safetensors", "con.safetensors", "Com1.safetensors", "lpt9.x.safetensors", "a\\u0000b.safetensors", "a\\nb.safetensors", "", ".", "..", "a/b.safetensors", "a/../b.safetensors",
        "model.bin", "x.safetensors.", "x.safetensors "};
    folder f = sharded("paths");
    char text[1200], name[320];
    for (size_t i = 0; i < MOQI_COUNT(bad); i++) {
        snprintf(text, sizeof text, "{\"weight_map\":{\"key1\":\"%s\"}}", bad[i]);
        add_text(&f, INDEX, text);
        expect(bad[i], &f, MOQ_E_PATH, "'key1'", NULL);
        if (strchr(bad[i], '/') == NULL || strstr(bad[i], "..") || bad[i][0] == '/') expect_flags(bad[i], &f, MOQ_OPEN_SUBFOLDERS, 1, MOQ_E_PATH, "'key1'", NULL);
    }
    memset(name, 'n', 300);
    strcpy(name + 300, ".safetensors");
    snprintf(text, sizeof text, "{\"weight_map\":{\"key1\":\"%s\"}}", name);
    add_text(&f, INDEX, text);
    expect("I5", &f, MOQ_E_PATH, "255", NULL);
    /* ordinary names that only look like devices */
    CHECK(moqi_path_problem("console.safetensors", 19, 0, ".safetensors") == NULL);
    CHECK(moqi_path_problem("com.safetensors", 15, 0, ".safetensors") == NULL);
    CHECK(moqi_path_problem("com10.safetensors", 17, 0, ".safetensors") == NULL);
    CHECK(moqi_path_problem("a..b.safetensors", 16, 0, ".safetensors") == NULL);
    end_folder(&f);
}

static void test_checkpoint_subfolder(void)
{
    static const char *const one[] = {"a"};
    folder f = new_folder("sub");
    char path[1000];
    snprintf(path, sizeof path, "%s/part", f.path);
    mkdir(path, 0777);
    add_text(&f, "config.json", "{}");
    add_vectors(&f, "part/x.safetensors", one, 1);
    add_text(&f, INDEX, "{\"weight_map\":{\"a\":\"part/x.safetensors\"}}");
    expect("I6a", &f, MOQ_E_PATH, "part/x.safetensors", NULL);
    expect_flags("I6b", &f, MOQ_OPEN_SUBFOLDERS, 1, MOQ_OK, NULL, NULL);
    drop_file(&f, "part/x.safetensors");
    rmdir(path);
    end_folder(&f);
}

/* Only programs compiled with MOQ_QUANTIZE quantize while loading, and only folders: nothing is opened as if nothing had been asked. */
static void test_checkpoint_quantize_refused(void)
{
    folder f = sharded("quantize");
    moq_open_desc d;
    moq_error err;
    moq_file file;
    memset(&d, 0, sizeof d);
    memset(&file, 0, sizeof file);
    d.quantize = "mxfp4";
    d.allocator = test_allocator();
    CHECK(!moq_open(f.path, &d, &err) && err.code == MOQ_E_UNSUPPORTED && strstr(err.text, "compiled without MOQ_QUANTIZE"));
    CHECK(!moq_open_memory(&file, 0, &d, &err) && err.code == MOQ_E_UNSUPPORTED && strstr(err.text, "from a folder"));
    CHECK_INT(test_state.live_allocs, 0);
    end_folder(&f);
}

static void test_checkpoint_shard_is_no_file(void)
{
    folder f = sharded("nofile");
    char path[1000];
    add_text(&f, INDEX, FULL);
    drop_file(&f, S2);
    snprintf(path, sizeof path, "%s/" S2, f.path);
    CHECK(mkdir(path, 0777) == 0);
    expect_flags("I8 folder", &f, 0, 0, MOQ_E_IO, S2, NULL);
    rmdir(path);
    CHECK(mkfifo(path, 0666) == 0);
    expect_flags("I8 pipe", &f, 0, 0, MOQ_E_IO, S2, NULL); /* must not wait for a writer */
    remove(path);
    CHECK(symlink(S2, path) == 0);
    expect_flags("I17", &f, 0, 0, MOQ_E_IO, S2, NULL);
    remove(path);
    CHECK(symlink(S1, path) == 0); /* a link to a readable file is followed: all tensors are there twice */
    expect_flags("D2", &f, 0, 0, MOQ_E_DUPLICATE, "'a'", NULL);
    remove(path);
    end_folder(&f);
    f = sharded("nolink"); /* GPTQ's own file counts only where ModelOpt's is not */
    snprintf(path, sizeof path, "%s/quantize_config.json", f.path);
    CHECK(symlink("nowhere", path) == 0);
    expect_flags("no hf_quant_config.json", &f, 0, 0, MOQ_E_IO, "quantize_config.json", NULL);
    add_text(&f, "hf_quant_config.json", "{\"quantization\":{\"quant_algo\":null}}");
    expect_flags("described by hf_quant_config.json", &f, 0, 0, MOQ_OK, NULL, NULL);
    remove(path);
    end_folder(&f);
}

static void test_checkpoint_total_size(void)
{
    static const struct { const char *value; moq_result code; int finding; } rows[] = {{"8", MOQ_OK, 0}, {"8.0", MOQ_OK, 0}, {"9", MOQ_OK, 1}, {"-8", MOQ_OK, 1}, {"1e400", MOQ_OK, 1},
        {"\"8\"", MOQ_E_CONFIG, 0}, {"null", MOQ_E_CONFIG, 0}};
    folder f = sharded("total");
    char text[600];
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        findings log;
        moq_error e;
        snprintf(text, sizeof text, "{\"metadata\":{\"total_size\":%s},\"weight_map\":{\"a\":\"" S1 "\",\"b\":\"" S1 "\",\"c\":\"" S2 "\",\"d\":\"" S2 "\"}}", rows[i].value);
        add_text(&f, INDEX, text);
        expect("I12", &f, rows[i].code, "total_size", NULL);
        moq_open_desc d = counted(0, &log);
        moq_checkpoint *ck = moq_open(f.path, &d, &e);
        CHECK_INT(has_finding(&log, "total_size", NULL), rows[i].finding);
        if (ck) { /* moq_verify tells what opening found */
            findings again;
            memset(&again, 0, sizeof again);
            CHECK_INT(moq_verify(ck, 0, take_finding, &again, &e), MOQ_OK);
            CHECK_INT(has_finding(&again, "total_size", NULL), rows[i].finding);
            CHECK_INT(again.fatal, 0);
        }
        moq_close(ck);
    }
    end_folder(&f);
}

static void test_checkpoint_without_index(void)
{
    static const char *const one[] = {"a"}, *const two[] = {"b"}, *const three[] = {"c"};
    folder f = new_folder("numbered");
    add_text(&f, "config.json", "{}");
    expect("nothing", &f, MOQ_E_NOTFOUND, "model.safetensors", NULL);
    add_vectors(&f, "other.safetensors", one, 1);
    expect("D7 other name", &f, MOQ_E_NOTFOUND, NULL, NULL);
    add_text(&f, "optimizer.bin", "x"); /* a trainer's: there are safetensors files */
    moq_error e;
    CHECK(moq_open(f.path, NULL, &e) == NULL && !strstr(e.text, "PyTorch"));
    drop_file(&f, "other.safetensors");
    expect("a folder of pickles", &f, MOQ_E_NOTFOUND, "PyTorch", "save the model as .safetensors");
    drop_file(&f, "optimizer.bin");
    add_text(&f, "small.gguf", "GGUF");
    expect("a folder of GGUF", &f, MOQ_E_NOTFOUND, "GGUF is not read", "take the folder");
    char path[1000];
    snprintf(path, sizeof path, "%s/small.gguf", f.path);
    CHECK(moq_open(path, NULL, &e) == NULL && e.code == MOQ_E_NOTFOUND && strstr(e.text, "is a file") && strstr(e.text, "GGUF is not read; take the folder"));
    drop_file(&f, "small.gguf");
    add_vectors(&f, "model-00001-of-00003.safetensors", one, 1);
    add_vectors(&f, "model-00003-of-00003.safetensors", three, 1);
    expect("I15", &f, MOQ_E_MISSING, "number 2", "00002-of-00003");
    add_vectors(&f, "model-00002-of-00003.safetensors", two, 1);
    expect("D7", &f, MOQ_OK, NULL, NULL);
    add_vectors(&f, "logits.safetensors", one, 1); /* not a shard, not looked at */
    expect("D7 more", &f, MOQ_OK, NULL, NULL);
    drop_file(&f, "logits.safetensors");
    drop_file(&f, "model-00003-of-00003.safetensors");
    expect("I15 last", &f, MOQ_E_MISSING, "number 3", NULL);
    add_vectors(&f, "model-00003-of-00003.safetensors", three, 1);
    add_vectors(&f, "consolidated-00001-of-00001.safetensors", one, 1);
    expect("D7 two sets", &f, MOQ_E_NOTFOUND, "consolidated-00001-of-00001", "different sets");
    drop_file(&f, "consolidated-00001-of-00001.safetensors");
    add_vectors(&f, "model.safetensors", two, 1);
    expect("D7 both", &f, MOQ_E_NOTFOUND, "model-00001-of-00003", "side by side");
    moq_checkpoint *ck;
    drop_file(&f, "model.safetensors");
    ck = moq_open_memory(f.file, f.count, NULL, &e);
    CHECK(ck && moq_tensor_count(ck) == 3 && moq_get_info(ck)->shards == 3);
    if (ck) {
        CHECK_STR(moq_get_shard_name(ck, moq_find_tensor(ck, "b")->shard), "model-00002-of-00003.safetensors");
        CHECK(moq_get_shard_name(ck, 3) == NULL && moq_get_tensor(ck, 3) == NULL && moq_find_tensor(ck, "x") == NULL);
    }
    moq_close(ck);
    end_folder(&f);
}

static void test_checkpoint_index_and_single(void)
{
    static const char *const lone[] = {"lone"};
    folder f = sharded("both");
    findings log;
    moq_error e;
    add_text(&f, INDEX, FULL);
    add_vectors(&f, "model.safetensors", lone, 1);
    for (int missing = 0; missing < 2; missing++)
        for (int how = 0; how < 3; how++) {
            moq_open_desc d = counted(how == 1 ? MOQ_OPEN_READ : 0, &log);
            if (missing && how == 0) drop_file(&f, S2);
            moq_checkpoint *ck = open_how(&f, how, &d, &e);
            CHECK(ck && moq_tensor_count(ck) == (missing ? 1u : 4u)); /* D8: the index wins if its shards exist */
            CHECK(has_finding(&log, "model.safetensors", "index"));
            moq_close(ck);
        }
    end_folder(&f);
}

static void test_checkpoint_many(void)
{
    folder f = new_folder("many");
    size_t cap = 1000000, n = 0;
    char *text = (char *)malloc(cap);
    moq_error e;
    add_text(&f, "config.json", "{}");
    n += (size_t)snprintf(text, cap, "{\"weight_map\":{");
    for (int i = 0; i < 5000; i++) n += (size_t)snprintf(text + n, cap - n, "%s\"t%d\":\"m-%d.safetensors\"", i ? "," : "", i, i);
    snprintf(text + n, cap - n, "}}");
    add_text(&f, INDEX, text);
    expect("I13", &f, MOQ_E_LIMIT, "MOQ_MAX_SHARDS", NULL);
    piece *p = (piece *)malloc(10000 * sizeof *p);
    char (*names)[16] = (char (*)[16])malloc(10000 * 16);
    n = (size_t)snprintf(text, cap, "{\"weight_map\":{");
    for (int i = 0; i < 10000; i++) {
        piece one = {names[i], "U8", "[1]", zeros, 1};
        snprintf(names[i], 16, "t%05d", i);
        p[i] = one;
        n += (size_t)snprintf(text + n, cap - n, "%s\"%s\":\"one.safetensors\"", i ? "," : "", names[i]);
    }
    snprintf(text + n, cap - n, "}}");
    add_text(&f, INDEX, text);
    add_tensors(&f, "one.safetensors", p, 10000);
    expect("I14", &f, MOQ_OK, NULL, NULL);
    moq_checkpoint *ck = moq_open(f.path, NULL, &e);
    CHECK(ck && moq_tensor_count(ck) == 10000 && moq_get_info(ck)->shards == 1 && moq_get_info(ck)->total_bytes == 10000);
    for (size_t i = 0; ck && i < 10000; i += 97) CHECK(strcmp(moq_get_tensor(ck, i)->name, names[i]) == 0 && moq_find_tensor(ck, names[i]) == moq_get_tensor(ck, i));
    moq_close(ck);
    free(p);
    free(names);
    free(text);
    end_folder(&f);
}

static void test_checkpoint_one_corrupt_shard(void)
{
    folder f = new_folder("corrupt");
    char file[64], name[16];
    add_text(&f, "config.json", "{}");
    for (int i = 1; i <= 30; i++) {
        const char *names[1] = {name};
        snprintf(name, sizeof name, "t%d", i);
        snprintf(file, sizeof file, "model-%05d-of-00030.safetensors", i);
        add_vectors(&f, file, names, 1);
    }
    expect("30 shards", &f, MOQ_OK, NULL, NULL);
    add_text(&f, "model-00017-of-00030.safetensors", "\002\0\0\0\0\0\0\0[]");
    add_bytes(&f, "model-00017-of-00030.safetensors", "\002\0\0\0\0\0\0\0[]", 10);
    expect("I16", &f, MOQ_E_HEADER, "model-00017-of-00030.safetensors", "'['");
    end_folder(&f);
}

/* ---- config files and the folder itself ---- */

static void test_checkpoint_config_rows(void)
{
    static const char *const one[] = {"a"};
    folder f = new_folder("my folder \xc3\xa9");
    char path[1000];
    moq_error e;
    add_vectors(&f, "model.safetensors", one, 1);
    expect_flags("C1", &f, 0, 0, MOQ_E_NOTFOUND, "my folder", "config.json");
    CHECK(moq_open_memory(f.file, f.count, NULL, &e) == NULL && e.code == MOQ_E_NOTFOUND && strstr(e.text, "config.json"));
    snprintf(path, sizeof path, "%s/config.json", f.path);
    CHECK(mkdir(path, 0777) == 0);
    expect_flags("C2", &f, 0, 0, MOQ_E_IO, "config.json", NULL);
    rmdir(path);
    FILE *big = fopen(path, "wb");
    CHECK(big && fseek(big, 64 * 1024 * 1024, SEEK_SET) == 0 && fputc('}', big) == '}');
    if (big) fclose(big);
    expect_flags("C3", &f, 0, 0, MOQ_E_LIMIT, "config.json", "67108865");
    remove(path);
    add_text(&f, "config.json", "[1]");
    expect("no object", &f, MOQ_E_CONFIG, "config.json", NULL);
    add_text(&f, "config.json", "{\"a\":1,\"a\":2}");
    expect("twice", &f, MOQ_E_DUPLICATE, "config.json", "'a'");
    add_text(&f, "config.json", "{\"a\":");
    expect("cut", &f, MOQ_E_JSON, "config.json", NULL);
    add_text(&f, "config.json", "\xef\xbb\xbf{\"model_type\":\"nemotron_h\",\"x\":Infinity,\"y\":[NaN,-Infinity]}");
    expect("config dialect", &f, MOQ_OK, NULL, NULL);
    add_text(&f, "hf_quant_config.json", "{");
    expect("hf", &f, MOQ_E_JSON, "hf_quant_config.json", NULL);
    drop_file(&f, "hf_quant_config.json");
    add_text(&f, "generation_config.json", "{\"top_k\":5}");
    snprintf(path, sizeof path, "%s///", f.path);
    moq_checkpoint *ck = moq_open(path, NULL, &e); /* F10 */
    CHECK(ck != NULL);
    if (ck) {
        size_t bytes = 0;
        int64_t k = 0;
        CHECK_STR(moq_get_name(ck), "my folder \xc3\xa9");
        CHECK_STR(moq_get_info(ck)->model_type, "nemotron_h");
        CHECK_STR(moq_get_info(ck)->family_name, "none");
        CHECK(moq_json_is(moq_json_find(moq_get_config(ck), "model_type"), "nemotron_h"));
        moq_json_doc *doc = moq_read_json(ck, "generation_config.json", MOQ_JSON_CONFIG, &e);
        CHECK(moq_json_int(moq_json_find(moq_json_root(doc), "top_k"), &k) && k == 5);
        moq_json_destroy(doc);
        char *text = moq_read_text(ck, "generation_config.json", &bytes, &e);
        CHECK(text && bytes == 11 && strcmp(text, "{\"top_k\":5}") == 0);
        moq_release(moq_get_allocator(ck), text, bytes + 1);
        CHECK(moq_read_json(ck, "tokenizer.json", MOQ_JSON_STRICT, &e) == NULL && e.code == MOQ_E_NOTFOUND);
        CHECK(moq_read_text(ck, "../x", &bytes, &e) == NULL && e.code == MOQ_E_PATH);
        CHECK(moq_read_text(ck, "", &bytes, &e) == NULL && e.code == MOQ_E_PATH);
        CHECK(moq_read_text(ck, NULL, &bytes, &e) == NULL && e.code == MOQ_E_PATH);
    }
    moq_close(ck);
    snprintf(path, sizeof path, "%s/config.json", f.path);
    CHECK(moq_open(path, NULL, &e) == NULL && e.code == MOQ_E_NOTFOUND && strstr(e.text, "is a file"));
    CHECK(moq_open("/no/such/folder", NULL, &e) == NULL && e.code == MOQ_E_NOTFOUND && strstr(e.text, "folder"));
    CHECK(strncmp(e.text, "/no/such/folder: no such folder;", 32) == 0);
    CHECK(moq_open("no/such/folder//", NULL, &e) == NULL && strncmp(e.text, "no/such/folder//: no such folder;", 33) == 0);
    CHECK(moq_open(NULL, NULL, &e) == NULL && e.code == MOQ_E_ARG);
    CHECK(moq_open("", NULL, &e) == NULL && e.code == MOQ_E_ARG && strcmp(e.text, "moq_open: the path is empty") == 0);
    CHECK(moq_open_memory(NULL, 0, NULL, &e) == NULL && e.code == MOQ_E_NOTFOUND && strstr(e.text, "among the 0 files given"));
    CHECK(moq_open_memory(NULL, 2, NULL, &e) == NULL && e.code == MOQ_E_ARG);
    CHECK(moq_open(path, NULL, NULL) == NULL);
    moq_close(NULL);
    end_folder(&f);
}

/* ---- layers and values ---- */

/* An NVFP4 layer, an FP8 layer with KV scales, a BF16 norm; each value can be spoiled. */
typedef struct model { float global, fp8_scale, input_scale, k_scale; uint8_t block[8], fp8[64], codes[64]; uint16_t norm[4], pre[32]; } model;

static model good_model(void)
{
    model m;
    memset(&m, 0, sizeof m);
    m.global = 0.01f;
    m.fp8_scale = m.input_scale = 0.5f;
    m.k_scale = 0.25f;
    for (int i = 0; i < 8; i++) m.block[i] = (uint8_t)(0x38 + i);
    for (int i = 0; i < 64; i++) { m.fp8[i] = (uint8_t)(i * 2 % 0x70); m.codes[i] = (uint8_t)(0x11 * (i % 15 + 1)); }
    for (int i = 0; i < 4; i++) m.norm[i] = 0x3f80;
    for (int i = 0; i < 32; i++) m.pre[i] = 0x3f80;
    return m;
}

static void add_model(folder *f, const model *m)
{
    piece p[] = {{"l.self_attn.k_proj.weight", "F8_E4M3", "[4,16]", m->fp8, 64}, {"l.self_attn.k_proj.weight_scale", "F32", "[]", &m->fp8_scale, 4},
        {"l.self_attn.k_proj.input_scale", "F32", "[]", &m->input_scale, 4}, {"l.self_attn.k_proj.k_scale", "F32", "[]", &m->k_scale, 4},
        {"l.up.weight", "U8", "[4,16]", m->codes, 64}, {"l.up.weight_scale", "F8_E4M3", "[4,2]", m->block, 8}, {"l.up.weight_scale_2", "F32", "[]", &m->global, 4},
        {"l.up.pre_quant_scale", "BF16", "[32]", m->pre, 64}, {"l.norm.weight", "BF16", "[4]", m->norm, 8}};
    add_tensors(f, "model.safetensors", p, MOQI_COUNT(p));
}

static folder quantized(const char *name)
{
    folder f = new_folder(name);
    model m = good_model();
    add_text(&f, "config.json", "{\"model_type\":\"llama\"}");
    add_text(&f, "hf_quant_config.json", "{\"producer\":{\"name\":\"modelopt\",\"version\":\"0.47.0\"},\"quantization\":{\"quant_algo\":\"MIXED_PRECISION\",\"kv_cache_quant_algo\":\"FP8\","
             "\"quantized_layers\":{\"l.self_attn.k_proj\":{\"quant_algo\":\"FP8\"},\"l.up\":{\"quant_algo\":\"NVFP4_AWQ\",\"group_size\":16}}}}");
    add_model(&f, &m);
    return f;
}

static void test_checkpoint_layers(void)
{
    folder f = quantized("layers");
    for (int how = 0; how < 3; how++) {
        moq_error e;
        moq_linear w, again;
        moq_kv kv;
        moq_open_desc d = counted(how == 1 ? MOQ_OPEN_READ : 0, NULL);
        moq_checkpoint *ck = open_how(&f, how, &d, &e);
        CHECK(ck != NULL);
        if (!ck) { fprintf(stderr, "%s\n", e.text); continue; }
        CHECK_INT(moq_module_count(ck), 2);
        CHECK_INT(moq_find_linear(ck, "l.up", &w, &e), MOQ_OK);
        CHECK(w.rows == 4 && w.cols == 32 && w.scheme.weight.elem == MOQ_F4 && w.global_mul == 0.01f && w.pre_quant_scale.count == 32);
        CHECK_INT(moq_get_module(ck, 1, &again, &e), MOQ_OK);
        CHECK(again.name == w.name && again.codes.data == w.codes.data && again.scales.data == w.scales.data && moq_scheme_equal(&again.scheme, &w.scheme));
        CHECK_INT(moq_get_module(ck, 0, &w, &e), MOQ_OK);
        CHECK_STR(w.name, "l.self_attn.k_proj");
        CHECK(w.scheme.weight.elem == MOQ_F8_E4M3 && w.input_scale == 0.5f);
        CHECK(moq_has_linear(ck, "l.up") && !moq_has_linear(ck, "l.norm") && !moq_has_linear(ck, ""));
        CHECK_INT(moq_find_linear(ck, "l.up.weight", &w, &e), MOQ_E_NOTFOUND);
        CHECK(strstr(e.text, "without '.weight'") && w.codes.data == NULL);
        CHECK_INT(moq_get_module(ck, 2, &w, &e), MOQ_E_ARG);
        CHECK_INT(moq_find_kv(ck, "l.self_attn", &kv, &e), MOQ_OK);
        CHECK(kv.format == MOQ_KV_FP8 && kv.k_scale.count == 1 && kv.v_scale.count == 1);
        CHECK(moq_get_info(ck)->family == MOQ_FAMILY_MODELOPT && moq_get_info(ck)->kv == MOQ_KV_FP8);
        CHECK_STR(moq_get_info(ck)->producer, "modelopt 0.47.0");
        CHECK_STR(moq_get_info(ck)->family_name, "modelopt");
        CHECK_STR(moq_get_info(ck)->quant_algo, "MIXED_PRECISION");
        findings found;
        memset(&found, 0, sizeof found);
        CHECK_INT(moq_verify(ck, MOQ_VERIFY_DEEP, take_finding, &found, &e), MOQ_OK);
        CHECK_INT(found.fatal, 0);
        moq_close(ck);
        CHECK_INT(test_state.live_allocs, 0);
    }
    end_folder(&f);
}

static float bits(uint32_t b)
{
    float v;
    memcpy(&v, &b, 4);
    return v;
}

/* Spoils one value; what opening says, what moq_verify says. */
static void value_row(folder *f, const char *id, const model *m, moq_result opened, moq_result verified, uint32_t flags, const char *a, const char *b)
{
    moq_error e;
    findings found;
    memset(&found, 0, sizeof found);
    add_model(f, m);
    moq_open_desc d = counted(0, NULL);
    moq_checkpoint *ck = moq_open_memory(f->file, f->count, &d, &e);
    moq_result r = ck ? MOQ_OK : e.code;
    if (r != opened || (r != MOQ_OK && !strstr(e.text, a))) { test_state.broken++; fprintf(stderr, "%s: open says %s %s\n", id, moq_result_name(r), ck ? "" : e.text); }
    if (ck) {
        r = moq_verify(ck, flags, take_finding, &found, &e);
        if (r != verified || (a && !has_finding(&found, a, b)) || (r != MOQ_OK) != (found.fatal > 0) || (r != MOQ_OK && e.code != r)) {
            test_state.broken++;
            fprintf(stderr, "%s: verify says %s, %d findings, %d fatal: %s\n", id, moq_result_name(r), found.all, found.fatal, found.all ? found.text[0] : "");
        }
    }
    moq_close(ck);
    CHECK_INT(test_state.live_allocs, 0);
}

static void test_checkpoint_values(void)
{
    static const uint32_t bad[] = {0x7fc00000u, 0x7f800000u, 0xff800000u, 0xbf800000u};
    folder f = quantized("values");
    model m;
    for (size_t i = 0; i < 4; i++) {
        m = good_model(); m.global = bits(bad[i]);
        value_row(&f, "N1 N4", &m, MOQ_E_SCALE, MOQ_OK, 0, "l.up.weight_scale_2", NULL);
        m = good_model(); m.input_scale = bits(bad[i]);
        value_row(&f, "N13", &m, MOQ_E_SCALE, MOQ_OK, 0, "k_proj.input_scale", NULL);
        m = good_model(); m.k_scale = bits(bad[i]);
        value_row(&f, "N16", &m, MOQ_E_SCALE, MOQ_OK, 0, "l.self_attn.k_proj.k_scale", NULL);
    }
    m = good_model(); m.global = 0;
    value_row(&f, "N2", &m, MOQ_E_SCALE, MOQ_OK, 0, "l.up.weight_scale_2", NULL);
    memset(m.codes, 0, sizeof m.codes);
    value_row(&f, "N3", &m, MOQ_OK, MOQ_OK, 0, "l.up.weight_scale_2", "0");
    m = good_model(); m.input_scale = 0;
    value_row(&f, "N13 zero", &m, MOQ_E_SCALE, MOQ_OK, 0, "input_scale", NULL);
    m = good_model(); m.k_scale = 0;
    value_row(&f, "N16 zero", &m, MOQ_E_SCALE, MOQ_OK, 0, "k_scale", NULL);
    m = good_model(); m.global = bits(0x000116c2u); /* 1e-40 */
    value_row(&f, "N5", &m, MOQ_OK, MOQ_OK, 0, "l.up.weight_scale_2", "subnormal");
    m = good_model(); m.block[5] = 0x7f;
    value_row(&f, "N6", &m, MOQ_OK, MOQ_E_SCALE, 0, "l.up.weight_scale'", "row 2, group 1");
    m.block[5] = 0xff;
    value_row(&f, "N6", &m, MOQ_OK, MOQ_E_SCALE, 0, "1 of 8 values is NaN", "row 2, group 1");
    m = good_model(); m.block[3] = 0xb8;
    value_row(&f, "N7", &m, MOQ_OK, MOQ_E_SCALE, 0, "negative", "row 1, group 1");
    m = good_model(); m.block[3] = 0x80;
    value_row(&f, "N7 -0", &m, MOQ_OK, MOQ_OK, 0, "zero", "row 1, group 1");
    m = good_model(); m.block[2] = m.block[4] = 0;
    value_row(&f, "N8", &m, MOQ_OK, MOQ_OK, 0, "2 of 8 values are zero", "row 1, group 0");
    m = good_model(); m.global = 3e38f;
    value_row(&f, "N11", &m, MOQ_OK, MOQ_E_SCALE, 0, "l.up.weight", "F32");
    for (int i = 0; i < 8; i++) m.block[i] = 0x38; /* 1: the same global scale is fine */
    value_row(&f, "N11 ok", &m, MOQ_OK, MOQ_OK, 0, NULL, NULL);
    m = good_model(); m.fp8[40] = 0x7f; m.fp8[41] = 0xff;
    value_row(&f, "N12 shallow", &m, MOQ_OK, MOQ_OK, 0, NULL, NULL);
    value_row(&f, "N12", &m, MOQ_OK, MOQ_E_SCALE, MOQ_VERIFY_DEEP, "2 of 64 values are NaN", "row 2, column 8");
    m = good_model(); m.pre[7] = 0;
    value_row(&f, "N15 zero", &m, MOQ_OK, MOQ_OK, 0, "pre_quant_scale", "element 7");
    m.pre[7] = 0x7f80;
    value_row(&f, "N15 inf", &m, MOQ_OK, MOQ_E_SCALE, 0, "pre_quant_scale", "element 7");
    m.pre[7] = 0x7fc0;
    value_row(&f, "N15 nan", &m, MOQ_OK, MOQ_E_SCALE, 0, "pre_quant_scale", "NaN");
    m = good_model(); m.norm[3] = 0x7fc0;
    value_row(&f, "BF16 shallow", &m, MOQ_OK, MOQ_OK, 0, NULL, NULL);
    value_row(&f, "BF16 NaN", &m, MOQ_OK, MOQ_E_SCALE, MOQ_VERIFY_DEEP, "l.norm.weight", "element 3");
    m.norm[3] = 0xff80;
    value_row(&f, "BF16 inf", &m, MOQ_OK, MOQ_OK, MOQ_VERIFY_DEEP, "l.norm.weight", "infinite");
    end_folder(&f);
}

/* E8M0 scales, scales of nobody, scales that nothing reads. */
static void test_checkpoint_other_scales(void)
{
    uint8_t codes[64], scale[4] = {127, 0, 1, 254};
    float one = 1;
    folder f = new_folder("e8m0");
    moq_error e;
    findings found;
    memset(codes, 0x21, sizeof codes);
    add_text(&f, "config.json", "{}");
    for (int i = 0; i < 3; i++) {
        piece p[] = {{"m.weight", "U8", "[4,16]", codes, 64}, {"m.weight_scale", "U8", "[4,1]", scale, 4}, {"gone.weight_scale", "F32", "[]", &one, 4}, {"m.some_scale_of_mine", "F32", "[]", &one, 4}};
        if (i == 1) scale[2] = 255;
        if (i == 2) p[1].dtype = "F8_E8M0";
        add_tensors(&f, "model.safetensors", p, 4);
        memset(&found, 0, sizeof found);
        moq_checkpoint *ck = moq_open_memory(f.file, f.count, NULL, &e);
        CHECK(ck != NULL);
        if (!ck) { fprintf(stderr, "%s\n", e.text); continue; }
        moq_result r = moq_verify(ck, 0, take_finding, &found, &e);
        CHECK_INT(r, i ? MOQ_E_SCALE : MOQ_OK); /* N9, N10 */
        CHECK(i == 0 || (strstr(e.text, "m.weight_scale") && strstr(e.text, "row 2, group 0")));
        CHECK(has_finding(&found, "gone.weight_scale", NULL)); /* Q4 */
        CHECK(has_finding(&found, "m.some_scale_of_mine", NULL));
        CHECK_INT(moq_verify(ck, 0, NULL, NULL, NULL), r); /* without a listener */
        moq_close(ck);
    }
    end_folder(&f);
}

/* ---- failures of the host ---- */

static void test_checkpoint_failing_allocations(void)
{
    folder f = quantized("alloc");
    moq_error e;
    static const char *const one[] = {"x"};
    add_vectors(&f, "b.safetensors", one, 1);
    add_text(&f, INDEX, "{\"weight_map\":{\"x\":\"b.safetensors\",\"l.self_attn.k_proj.weight\":\"model.safetensors\",\"l.self_attn.k_proj.weight_scale\":\"model.safetensors\","
             "\"l.self_attn.k_proj.input_scale\":\"model.safetensors\",\"l.self_attn.k_proj.k_scale\":\"model.safetensors\",\"l.up.weight\":\"model.safetensors\",\"l.up.weight_scale\":\"model.safetensors\","
             "\"l.up.weight_scale_2\":\"model.safetensors\",\"l.up.pre_quant_scale\":\"model.safetensors\",\"l.norm.weight\":\"model.safetensors\"}}");
    expect("good", &f, MOQ_OK, NULL, NULL);
    for (int how = 0; how < 3; how++)
        for (int forever = 0; forever < 2; forever++)
            for (long k = 1;; k++) {
                moq_open_desc d = counted(how == 1 ? MOQ_OPEN_READ : 0, NULL);
                long before = test_state.total_allocs;
                test_state.fail_at = k;
                test_state.fail_forever = forever;
                moq_checkpoint *ck = open_how(&f, how, &d, &e);
                int fired = test_state.total_allocs - before >= k;
                test_state.fail_at = 0;
                if (fired && !ck) CHECK_INT(e.code, MOQ_E_NOMEM);
                if (fired && ck) fprintf(stderr, "allocation %ld failed unnoticed\n", k);
                CHECK(fired ? ck == NULL : ck != NULL);
                moq_close(ck);
                CHECK_INT(test_state.live_allocs, 0);
                if (!fired) { CHECK(k > 20); break; }
            }
    end_folder(&f);
}

static struct { int stop_at, calls; uint64_t last, total; } steps;

static int stop_at(void *user, moq_stage stage, uint64_t done, uint64_t total)
{
    (void)user;
    CHECK(stage == MOQ_STAGE_LOAD || stage == MOQ_STAGE_VERIFY);
    CHECK(done <= total && (done == 0 || done >= steps.last));
    steps.last = done;
    steps.total = total;
    return ++steps.calls == steps.stop_at;
}

static void test_checkpoint_progress(void)
{
    folder f = sharded("progress");
    moq_error e;
    for (int k = 1; k < 50; k++) {
        moq_open_desc d = counted(0, NULL);
        d.progress = stop_at;
        memset(&steps, 0, sizeof steps);
        steps.stop_at = k;
        moq_checkpoint *ck = moq_open(f.path, &d, &e);
        int loads = steps.calls;
        if (steps.calls >= k) CHECK(!ck && e.code == MOQ_E_CANCELLED);
        else {
            CHECK(ck && steps.last == steps.total);
            moq_result r = ck ? moq_verify(ck, 0, NULL, NULL, &e) : MOQ_OK;
            CHECK_INT(r, steps.calls >= k ? MOQ_E_CANCELLED : MOQ_OK);
            if (steps.calls < k) { CHECK(loads >= 2 && steps.calls > loads && steps.last == steps.total); moq_close(ck); break; }
            CHECK(ck && moq_tensor_count(ck) == 4); /* still usable */
        }
        moq_close(ck);
        CHECK_INT(test_state.live_allocs, 0);
        CHECK(k < 49);
    }
    end_folder(&f);
}

/* Forgotten tensors read as before, and so do their neighbours; memory that no file stands behind must be left alone. */
static void test_checkpoint_forget(void)
{
    enum { BYTES = 300000 }; /* several times what is forgotten at once, so that whole pages lie inside */
    static const char *const names[] = {"a", "b", "c"};
    uint8_t *stored = (uint8_t *)malloc(3 * BYTES);
    piece p[3];
    folder f = new_folder("forget");
    for (int i = 0; i < 3 * BYTES; i++) stored[i] = (uint8_t)(test_random() >> 24);
    for (int i = 0; i < 3; i++) {
        p[i].name = names[i];
        p[i].dtype = "BF16";
        p[i].shape = "[150000]";
        p[i].data = stored + i * BYTES;
        p[i].n = BYTES;
    }
    add_text(&f, "config.json", "{\"model_type\":\"llama\"}");
    add_tensors(&f, "model.safetensors", p, 3);
    for (int how = 0; how < 3; how++) {
        moq_open_desc d = counted(how == 1 ? MOQ_OPEN_READ : 0, NULL);
        moq_error e;
        moq_checkpoint *ck = open_how(&f, how, &d, &e);
        const moq_tensor *t[3] = {NULL, NULL, NULL};
        CHECK(ck != NULL);
        for (int i = 0; i < 3; i++) t[i] = moq_find_tensor(ck, names[i]);
        CHECK(t[0] && t[1] && t[2]);
        for (int forgotten = 0; forgotten < 3 && ck && t[0] && t[1] && t[2]; forgotten++) {
            for (int i = 0; i < 3; i++) CHECK(t[i]->bytes == BYTES && memcmp(t[i]->data, stored + i * BYTES, BYTES) == 0); /* looked at */
            moq_forget_tensor(ck, t[forgotten]);
            for (int i = 0; i < 3; i++) CHECK(memcmp(t[i]->data, stored + i * BYTES, BYTES) == 0);
        }
        moq_forget_tensor(ck, NULL);
        moq_forget_tensor(NULL, t[0]);
        moq_close(ck);
        CHECK_INT(test_state.live_allocs, 0);
    }
    end_folder(&f);
    free(stored);
}

/* Opening touches no tensor data: a folder of 10 GB that is all hole. */
static void test_checkpoint_sparse(void)
{
    if (sizeof(long) < 8 || sizeof(void *) < 8) { test_state.skipped++; return; }
    folder f = new_folder("sparse");
    char path[1000], text[400] = "........";
    moq_error e;
    add_text(&f, "config.json", "{}");
    size_t n = 8 + (size_t)snprintf(text + 8, sizeof text - 8, "{\"m.weight\":{\"dtype\":\"BF16\",\"shape\":[50000,100000],\"data_offsets\":[0,10000000000]}}");
    for (size_t i = 0; i < 8; i++) text[i] = (char)((n - 8) >> (8 * i));
    snprintf(path, sizeof path, "%s/model.safetensors", f.path);
    FILE *o = fopen(path, "wb");
    CHECK(o && fwrite(text, 1, n, o) == n && fseek(o, (long)(n + 9999999999u), SEEK_SET) == 0 && fputc(1, o) == 1);
    if (o) fclose(o);
    moq_open_desc d = counted(0, NULL);
    double t = moq_seconds();
    moq_checkpoint *ck = moq_open(f.path, &d, &e);
    t = moq_seconds() - t;
    CHECK(ck != NULL);
    if (!ck) fprintf(stderr, "%s\n", e.text);
    moq_linear w;
    CHECK(ck && moq_find_linear(ck, "m", &w, &e) == MOQ_OK && w.rows == 50000 && w.cols == 100000 && ((const uint8_t *)w.codes.data)[9999999999u] == 1);
    moq_close(ck);
    printf("note: a sparse folder of 10 GB opened in %.2f ms\n", t * 1e3);
    CHECK(t < 1);
    remove(path);
    end_folder(&f);
}

/* ---- real folders ---- */

static char *slurp(const char *dir, const char *name, size_t *n)
{
    char path[2000];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return moq_read_file(path, 1u << 30, NULL, n, NULL);
}

/* Every weight that expected.json lists is a module with that shape. */
static void check_expected(const moq_checkpoint *ck, const char *dir)
{
    moq_error e;
    size_t n = 0, modules = 0;
    char *text = slurp(dir, "expected.json", &n), name[300];
    moq_json_doc *doc = text ? moq_json_parse(text, n, MOQ_JSON_STRICT, 0, "expected.json", NULL, &e) : NULL;
    const moq_json *tensors = moq_json_find(moq_json_root(doc), "tensors");
    CHECK(tensors != NULL);
    for (const moq_json *v = moq_json_first(tensors); v; v = moq_json_next(tensors, v)) {
        moq_linear w;
        const moq_json *shape = moq_json_find(v, "shape");
        int64_t d[3] = {0, 0, 0};
        snprintf(name, sizeof name, "%s", v->key);
        if (strchr(name, '[')) continue; /* one expert of a stack that is listed as a whole too */
        if (moqi_ends(name, ".weight") && !moq_has_linear(ck, name)) name[strlen(name) - 7] = 0;
        for (size_t i = 0; i < 3; i++) moq_json_int(moq_json_at(shape, i), &d[i]);
        if (moq_find_linear(ck, name, &w, &e) != MOQ_OK) { test_state.broken++; fprintf(stderr, "%s: %s\n", dir, e.text); continue; }
        modules++;
        if (shape->count == 3) CHECK(w.experts == d[0] && w.rows == d[1] && w.cols == d[2]);
        else CHECK(w.experts == 0 && w.rows == d[0] && w.cols == d[1]);
        CHECK(moq_scheme_is_quantized(&w.scheme));
    }
    CHECK(modules > 0);
    moq_json_destroy(doc);
    moq_release(NULL, text, n + 1);
}

static void check_golden(const char *dir, int quantized_folder)
{
    static const char *const names[] = {"config.json", "hf_quant_config.json", "quantize_config.json", "model.safetensors"};
    moq_error e;
    findings found;
    moq_file files[4];
    size_t count = 0;
    moq_checkpoint *ck = moq_open(dir, NULL, &e);
    CHECK(ck != NULL);
    if (!ck) { fprintf(stderr, "%s: %s\n", dir, e.text); return; }
    memset(&found, 0, sizeof found);
    CHECK_INT(moq_verify(ck, MOQ_VERIFY_DEEP, take_finding, &found, &e), MOQ_OK);
    if (found.fatal) fprintf(stderr, "%s: %s\n", dir, e.text);
    CHECK((moq_get_info(ck)->family != MOQ_FAMILY_NONE) == quantized_folder);
    for (int i = 0; i < 4; i++) {
        size_t n = 0;
        files[count].data = slurp(dir, names[i], &n);
        files[count].name = names[i];
        files[count].bytes = n;
        if (files[count].data) count++;
    }
    moq_open_desc d = counted(0, NULL);
    moq_checkpoint *twin = moq_open_memory(files, count, &d, &e); /* the same layers from memory */
    CHECK(twin && moq_tensor_count(twin) == moq_tensor_count(ck) && moq_module_count(twin) == moq_module_count(ck));
    for (size_t i = 0; twin && i < moq_module_count(ck); i++) {
        moq_linear a, b;
        CHECK_INT(moq_get_module(ck, i, &a, &e), MOQ_OK);
        CHECK_INT(moq_get_module(twin, i, &b, &e), MOQ_OK);
        CHECK(strcmp(a.name, b.name) == 0 && moq_scheme_equal(&a.scheme, &b.scheme) && a.rows == b.rows && a.cols == b.cols && a.packing.bits == b.packing.bits &&
              a.packing.row_stride == b.packing.row_stride && a.packing.col_stride == b.packing.col_stride);
        CHECK(moq_has_linear(ck, a.name));
    }
    for (size_t i = 0; twin && i < moq_tensor_count(ck); i++) {
        const moq_tensor *a = moq_get_tensor(ck, i), *b = moq_get_tensor(twin, i);
        CHECK(strcmp(a->name, b->name) == 0 && a->bytes == b->bytes && memcmp(a->data, b->data, (size_t)a->bytes) == 0 && moq_find_tensor(ck, a->name) == a);
        CHECK(i == 0 || strcmp(moq_get_tensor(ck, i - 1)->name, a->name) < 0);
    }
    if (quantized_folder) check_expected(ck, dir);
    moq_close(twin);
    CHECK_INT(test_state.live_allocs, 0);
    for (size_t i = 0; i < count; i++) moq_release(NULL, (void *)(uintptr_t)files[i].data, files[i].bytes + 1);
    moq_close(ck);
}

static void test_checkpoint_golden(void)
{
    static const char *const groups[] = {"modelopt", "compressed-tensors", "foreign", "sources"};
    int folders = 0;
    for (int g = 0; g < 4; g++) {
        char path[1200];
        snprintf(path, sizeof path, "%s/%s", GOLDEN_DIR, groups[g]);
        DIR *d = opendir(path);
        CHECK(d != NULL);
        for (struct dirent *x = d ? readdir(d) : NULL; x; x = readdir(d)) {
            if (x->d_name[0] == '.') continue;
            char dir[1600];
            snprintf(dir, sizeof dir, "%s/%s", path, x->d_name);
            char st_path[1700];
            snprintf(st_path, sizeof st_path, "%s/model.safetensors", dir);
            if (g == 3 && !moqi_file_exists(st_path)) continue; /* a source of which only the inputs are here */
            check_golden(dir, g < 3);
            folders++;
        }
        if (d) closedir(d);
    }
    printf("note: %d golden folders\n", folders);
    CHECK(folders > 20);
}

/* A real folder with every single bit of its headers flipped, and cut at many places: an error or an equal meaning, never a crash. */
static void test_checkpoint_golden_damaged(void)
{
    static const char *const dirs[] = {GOLDEN_DIR "/modelopt/llama-nvfp4", GOLDEN_DIR "/modelopt/llama-fp8"};
    static const char *const names[] = {"config.json", "hf_quant_config.json", "model.safetensors"};
    for (size_t k = 0; k < MOQI_COUNT(dirs); k++) {
        moq_file files[3];
        size_t n[3] = {0, 0, 0}, opened = 0, tried = 0;
        moq_error e;
        for (int i = 0; i < 3; i++) {
            files[i].data = slurp(dirs[k], names[i], &n[i]);
            files[i].name = names[i];
            files[i].bytes = n[i];
        }
        if (!files[0].data || !files[1].data || !files[2].data) {
            printf("note: %s is not in this set\n", dirs[k]);
            for (int i = 0; i < 3; i++) moq_release(NULL, (void *)(uintptr_t)files[i].data, n[i] + 1);
            continue;
        }
        size_t header = 8 + (size_t)moqi_load_u64(files[2].data);
        for (int i = 0; i < 3; i++) {
            uint8_t *p = (uint8_t *)(uintptr_t)files[i].data;
            size_t end = i == 2 ? header : n[i];
            for (size_t bit = 0; bit < end * 8; bit += i == 2 ? 61 : 29) {
                p[bit / 8] ^= (uint8_t)(1u << (bit & 7));
                moq_open_desc d = counted(0, NULL);
                moq_checkpoint *ck = moq_open_memory(files, 3, &d, &e);
                CHECK(ck || (e.code < 0 && e.text[0] && printable(e.text)));
                opened += ck != NULL;
                tried++;
                moq_close(ck);
                p[bit / 8] ^= (uint8_t)(1u << (bit & 7));
            }
        }
        for (size_t cut = 0; cut < n[2]; cut += 1 + (cut > header ? n[2] / 50 : header / 60)) {
            files[2].bytes = cut;
            moq_open_desc d = counted(0, NULL);
            CHECK(moq_open_memory(files, 3, &d, &e) == NULL && (e.code == MOQ_E_TRUNCATED || e.code == MOQ_E_LIMIT));
        }
        CHECK_INT(test_state.live_allocs, 0);
        printf("note: %zu of %zu damaged copies of %s still open\n", opened, tried, moqi_base_name(dirs[k]));
        CHECK(opened * 2 < tried);
        for (int i = 0; i < 3; i++) moq_release(NULL, (void *)(uintptr_t)files[i].data, n[i] + 1);
    }
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_checkpoint_index_rows);
    RUN(test_checkpoint_paths_refused);
    RUN(test_checkpoint_subfolder);
    RUN(test_checkpoint_quantize_refused);
    RUN(test_checkpoint_shard_is_no_file);
    RUN(test_checkpoint_total_size);
    RUN(test_checkpoint_without_index);
    RUN(test_checkpoint_index_and_single);
    RUN(test_checkpoint_many);
    RUN(test_checkpoint_one_corrupt_shard);
    RUN(test_checkpoint_config_rows);
    RUN(test_checkpoint_layers);
    RUN(test_checkpoint_values);
    RUN(test_checkpoint_other_scales);
    RUN(test_checkpoint_failing_allocations);
    RUN(test_checkpoint_progress);
    RUN(test_checkpoint_forget);
    RUN(test_checkpoint_sparse);
    RUN(test_checkpoint_golden);
    RUN(test_checkpoint_golden_damaged);
    return test_end();
}
