/* test_os.c - files, atomic writing, clock, processors, and the thread pool. POSIX: FIFOs, links and rights are made here. */
#include "test.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#ifndef MOQ_NO_OS

extern int symlink(const char *to, const char *name); /* -std=c99 hides it */

static char root[256]; /* a fresh folder of this run */

static const char *at(const char *name)
{
    static char text[4][600];
    static int turn;
    turn = (turn + 1) & 3;
    snprintf(text[turn], sizeof text[turn], "%s/%s", root, name);
    return text[turn];
}

static void put(const char *name, const char *data, size_t bytes)
{
    FILE *f = fopen(at(name), "wb");
    CHECK(f != NULL);
    if (!f) return;
    CHECK_INT(fwrite(data, 1, bytes, f), bytes);
    fclose(f);
}

static void check_content(const char *name, const char *want, size_t bytes)
{
    moq_allocator a = test_allocator();
    moq_error err;
    size_t n = 99;
    char *s = moq_read_file(at(name), 1 << 20, &a, &n, &err);
    CHECK(s && n == bytes && memcmp(s, want, bytes) == 0 && s[n] == 0);
    if (s) moq_release(&a, s, n + 1);
    CHECK_INT(test_state.live_allocs, 0);
}

static int count_names(void)
{
    moqi_arena r = moqi_arena_make(NULL);
    const char **names;
    size_t n = 0;
    moq_error err;
    CHECK_INT(moqi_list_dir(root, &r, &names, &n, &err), MOQ_OK);
    for (size_t i = 1; i < n; i++) CHECK(strcmp(names[i - 1], names[i]) < 0);
    moqi_arena_drop(&r);
    return (int)n;
}

/* Descriptors in use, so that a leak on an error path shows. */
static int count_handles(void)
{
    int n = 0;
    for (int fd = 0; fd < 200; fd++) n += fcntl(fd, F_GETFD) != -1;
    return n;
}

static void test_os_read_file(void)
{
    moq_error err;
    size_t n;
    static char big[300001];
    for (size_t i = 0; i < sizeof big; i++) big[i] = (char)test_random();
    put("big", big, sizeof big);
    put("empty", "", 0);
    put("five", "a\0b\nc", 5);
    put("with space \xc3\xa9\xe2\x82\xac", "x", 1);
    check_content("big", big, sizeof big);
    check_content("empty", "", 0);
    check_content("five", "a\0b\nc", 5);
    check_content("with space \xc3\xa9\xe2\x82\xac", "x", 1);
    int before = count_handles();
    n = 5;
    CHECK(moq_read_file(at("five"), 4, NULL, &n, &err) == NULL && n == 0 && err.code == MOQ_E_LIMIT && strstr(err.text, "five") && strstr(err.text, "5 bytes"));
    CHECK(moq_read_file(at("nothing"), 100, NULL, &n, &err) == NULL && err.code == MOQ_E_NOTFOUND && err.os_code == ENOENT);
    CHECK_STR(err.file, "nothing");
    CHECK(strncmp(err.text, at("nothing"), strlen(at("nothing"))) == 0 && err.text[strlen(at("nothing"))] == ':'); /* the whole path, as it was given */
    CHECK(moq_write_file(at("nothing/at/all"), "x", 1, &err) < 0 && strncmp(err.text, at("nothing/at/all"), strlen(at("nothing/at/all"))) == 0);
    CHECK_STR(err.file, "all");
    CHECK(moq_read_file("no\xc3\xa9/x", 100, NULL, &n, &err) == NULL && strncmp(err.text, "no\\xc3\\xa9/x: ", 14) == 0);
    memset(big, 'd', 400); /* a path that would cut the sentence stays a base name */
    memcpy(big + 400, "/x", 3);
    CHECK(moq_read_file(big, 100, NULL, &n, &err) == NULL && strncmp(err.text, "x: ", 3) == 0);
    CHECK(moq_read_file(at("five/x"), 100, NULL, &n, &err) == NULL && err.code == MOQ_E_NOTFOUND);
    CHECK(moq_read_file(root, 100, NULL, &n, &err) == NULL && err.code == MOQ_E_IO && strstr(err.text, "folder"));
    CHECK(moq_read_file(NULL, 100, NULL, &n, &err) == NULL && err.code == MOQ_E_ARG);
    CHECK(moq_read_file("", 100, NULL, NULL, NULL) == NULL);
    CHECK(moq_read_file("", 100, NULL, &n, &err) == NULL && err.code == MOQ_E_ARG && strcmp(err.text, "moq_read_file: the path is empty") == 0);
    char *s = moq_read_file(at("five"), 5, NULL, NULL, NULL);
    CHECK(s != NULL);
    moq_release(NULL, s, 6);
    CHECK_INT(count_handles(), before);
}

static void test_os_special_files(void)
{
    moq_error err;
    moqi_blob b;
    size_t n;
    /* A FIFO without a writer: opening it the plain way would hang for ever. */
    CHECK_INT(mkfifo(at("fifo"), 0600), 0);
    int before = count_handles();
    CHECK(moq_read_file(at("fifo"), 100, NULL, &n, &err) == NULL && err.code == MOQ_E_IO);
    CHECK(moqi_blob_open(&b, at("fifo"), "fifo", 0, NULL, &err) == MOQ_E_IO && b.data == NULL);
    CHECK_INT(moqi_sys_open(at("fifo")), -1); /* also past the first look at its kind */
    CHECK(moq_read_file("/dev/null", 100, NULL, &n, &err) == NULL && err.code == MOQ_E_IO);
    CHECK(!moqi_file_exists(at("fifo")) && !moqi_is_dir(at("fifo")) && moqi_is_dir(root) && !moqi_file_exists(root) && !moqi_is_dir(at("nothing")));
    put("target", "link", 4);
    CHECK_INT(symlink("target", at("link")), 0);
    CHECK_INT(symlink("gone", at("broken")), 0);
    CHECK_INT(symlink("loop", at("loop")), 0);
    check_content("link", "link", 4);
    CHECK(moq_read_file(at("broken"), 100, NULL, &n, &err) == NULL && err.code == MOQ_E_NOTFOUND);
    CHECK(moq_read_file(at("loop"), 100, NULL, &n, &err) == NULL && err.code == MOQ_E_IO && err.os_code == ELOOP);
    if (getuid() != 0) {
        put("secret", "x", 1);
        CHECK_INT(chmod(at("secret"), 0), 0);
        CHECK(moq_read_file(at("secret"), 100, NULL, &n, &err) == NULL && err.code == MOQ_E_IO && err.os_code == EACCES && strstr(err.text, "permission denied"));
    }
    CHECK_INT(count_handles(), before);
    CHECK_INT(unlink(at("fifo")) | unlink(at("link")) | unlink(at("broken")) | unlink(at("loop")), 0);
}

static void test_os_blob(void)
{
    moq_allocator a = test_allocator();
    moq_error err;
    moqi_blob b;
    static char data[100000];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (char)test_random();
    static const size_t sizes[] = {0, 1, 4095, 4096, 4097, sizeof data};
    int before = count_handles();
    for (size_t i = 0; i < MOQI_COUNT(sizes); i++)
        for (int read_all = 0; read_all < 2; read_all++) {
            put("blob", data, sizes[i]);
            CHECK_INT(moqi_blob_open(&b, at("blob"), NULL, read_all, &a, &err), MOQ_OK);
            CHECK(b.bytes == sizes[i] && b.data && memcmp(b.data, data, sizes[i]) == 0);
            CHECK_INT(b.mapped, !read_all && sizes[i] > 0);
            CHECK_INT(test_state.live_allocs, read_all && sizes[i] > 0);
            CHECK_INT(count_handles(), before); /* the mapping needs no handle */
            /* A new file in its place does not disturb the old bytes. */
            put("blob2", "other", 5);
            CHECK_INT(rename(at("blob2"), at("blob")), 0);
            CHECK(memcmp(b.data, data, sizes[i]) == 0);
            moqi_blob_close(&b, &a);
            CHECK(b.data == NULL && b.bytes == 0);
            moqi_blob_close(&b, &a);
            CHECK_INT(test_state.live_allocs, 0);
        }
    CHECK(moqi_blob_open(&b, root, "root", 0, &a, &err) == MOQ_E_IO && b.data == NULL);
    CHECK(moqi_blob_open(&b, at("nothing"), NULL, 0, &a, &err) == MOQ_E_NOTFOUND && b.data == NULL);
    put("blob", data, 5000);
    test_state.fail_at = 1;
    CHECK(moqi_blob_open(&b, at("blob"), NULL, 1, &a, &err) == MOQ_E_NOMEM && b.data == NULL && b.map == NULL);
    /* A file that shrinks between its size and its bytes: truncated, in both modes, and no signal. */
    for (int read_all = 0; read_all < 2; read_all++) {
        intptr_t file;
        memset(&b, 0, sizeof b);
        put("blob", data, 5000);
        CHECK_INT(moqi_file_open(at("blob"), "blob", &file, &b.bytes, &err), MOQ_OK);
        put("blob", data, 100);
        CHECK_INT(moqi_blob_load(&b, file, "blob", read_all, &a, &err), MOQ_E_TRUNCATED);
        moqi_blob_close(&b, &a);
        moqi_sys_close(file);
        CHECK(err.offset == 100 && strstr(err.text, "blob"));
    }
    CHECK_INT(test_state.live_allocs, 0);
    CHECK_INT(count_handles(), before);
}

static void test_os_list_dir(void)
{
    moq_allocator a = test_allocator();
    moq_error err;
    const char **names;
    size_t n;
    char name[32];
    CHECK_INT(mkdir(at("dir"), 0700), 0);
    moqi_arena r = moqi_arena_make(&a);
    CHECK_INT(moqi_list_dir(at("dir"), &r, &names, &n, &err), MOQ_OK);
    CHECK_INT(n, 0);
    for (int i = 0; i < 200; i++) {
        snprintf(name, sizeof name, "dir/%d", (i * 73) % 200);
        put(name, "", 0);
    }
    CHECK_INT(moqi_list_dir(at("dir"), &r, &names, &n, &err), MOQ_OK);
    CHECK_INT(n, 200);
    for (size_t i = 1; i < n; i++) CHECK(strcmp(names[i - 1], names[i]) < 0);
    CHECK(moqi_list_dir(at("nothing"), &r, &names, &n, &err) == MOQ_E_NOTFOUND && names == NULL && n == 0);
    CHECK(moqi_list_dir(at("dir/5"), &r, &names, &n, &err) < 0);
    moqi_arena_drop(&r);
    int before = count_handles();
    for (int k = 1;; k++) {
        r = moqi_arena_make(&a);
        test_state.fail_at = k;
        moq_result e = moqi_list_dir(at("dir"), &r, &names, &n, &err);
        test_state.fail_at = 0;
        moqi_arena_drop(&r);
        CHECK(e == MOQ_OK || (e == MOQ_E_NOMEM && names == NULL));
        CHECK_INT(test_state.live_allocs, 0);
        if (e == MOQ_OK) break;
    }
    CHECK_INT(count_handles(), before);
    for (int i = 0; i < 200; i++) {
        snprintf(name, sizeof name, "dir/%d", i);
        CHECK_INT(unlink(at(name)), 0);
    }
    CHECK_INT(rmdir(at("dir")), 0);
}

static void test_os_write_file(void)
{
    moq_error err;
    static char data[200000];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (char)test_random();
    int names = count_names(), handles = count_handles();
    CHECK_INT(moq_write_file(at("out"), data, sizeof data, &err), MOQ_OK);
    check_content("out", data, sizeof data);
    CHECK_INT(moq_write_file(at("out"), "new", 3, &err), MOQ_OK);
    check_content("out", "new", 3);
    CHECK_INT(moq_write_file(at("out"), NULL, 0, &err), MOQ_OK);
    check_content("out", "", 0);
    CHECK_INT(moq_write_file(at("out"), NULL, 1, &err), MOQ_E_ARG);
    CHECK_INT(moq_write_file(NULL, data, 1, &err), MOQ_E_ARG);
    CHECK(moq_write_file("", data, 1, &err) == MOQ_E_ARG && strcmp(err.text, "moq_write_file: the path is empty") == 0);
    CHECK_INT(count_names(), names + 1); /* no temporary file is left */
    struct stat st;
    CHECK_INT(chmod(at("out"), 0640), 0);
    CHECK_INT(moq_write_file(at("out"), "mode", 4, &err), MOQ_OK);
    CHECK(stat(at("out"), &st) == 0 && (st.st_mode & 0777) == 0640);
    CHECK(moq_write_file(at("no/such/folder"), "x", 1, &err) == MOQ_E_NOTFOUND && strstr(err.text, "folder"));
    CHECK(moq_write_file(root, "x", 1, &err) == MOQ_E_IO);
    char path[5000];
    memset(path, 'a', sizeof path);
    path[sizeof path - 1] = 0;
    CHECK_INT(moq_write_file(path, "x", 1, &err), MOQ_E_ARG);
    check_content("out", "mode", 4);
    CHECK_INT(count_names(), names + 1);
    CHECK_INT(count_handles(), handles);
    CHECK_INT(unlink(at("out")), 0);
}

static void test_os_writer_keeps_the_old_file(void)
{
    moq_error err;
    moqi_writer w, v;
    put("keep", "old", 3);
    int names = count_names(), handles = count_handles();
    CHECK_INT(moqi_writer_open(&w, at("keep"), &err), MOQ_OK);
    CHECK_INT(moqi_writer_put(&w, "new content", 11, &err), MOQ_OK);
    check_content("keep", "old", 3);
    moqi_writer_abort(&w);
    moqi_writer_abort(&w);
    check_content("keep", "old", 3);
    CHECK_INT(count_names(), names);
    /* Two writers at once: each has its own temporary file, the last commit wins whole. */
    CHECK_INT(moqi_writer_open(&w, at("keep"), &err), MOQ_OK);
    CHECK_INT(moqi_writer_open(&v, at("keep"), &err), MOQ_OK);
    CHECK_INT(moqi_writer_put(&w, "first", 5, &err), MOQ_OK);
    CHECK_INT(moqi_writer_put(&v, "second", 6, &err), MOQ_OK);
    CHECK_INT(moqi_writer_commit(&v, &err), MOQ_OK);
    check_content("keep", "second", 6);
    CHECK_INT(moqi_writer_commit(&w, &err), MOQ_OK);
    check_content("keep", "first", 5);
    /* A failing write: the descriptor is closed under the writer's feet. */
    CHECK_INT(moqi_writer_open(&w, at("keep"), &err), MOQ_OK);
    int real = (int)w.file, readonly = open(at("keep"), O_RDONLY);
    CHECK(dup2(readonly, real) == real);
    CHECK(moqi_writer_put(&w, "x", 1, &err) == MOQ_E_IO && err.os_code == EBADF && w.file == -1);
    close(readonly);
    check_content("keep", "first", 5);
    CHECK_INT(count_names(), names);
    /* A failing rename: the target has become a folder. */
    CHECK_INT(moqi_writer_open(&w, at("turned"), &err), MOQ_OK);
    CHECK_INT(moqi_writer_put(&w, "x", 1, &err), MOQ_OK);
    CHECK_INT(mkdir(at("turned"), 0700), 0);
    CHECK_INT(moqi_writer_commit(&w, &err), MOQ_E_IO);
    CHECK_INT(count_names(), names + 1);
    CHECK_INT(rmdir(at("turned")), 0);
    /* A device is never replaced by a file. */
    CHECK_INT(moqi_writer_open(&w, "/dev/null", &err), MOQ_E_IO);
    CHECK(strstr(err.text, "device") != NULL);
    /* No space at all. */
    if (access("/dev/full", W_OK) == 0) {
        CHECK_INT(moqi_writer_open(&w, at("keep"), &err), MOQ_OK);
        int full = open("/dev/full", O_WRONLY);
        CHECK(dup2(full, (int)w.file) == (int)w.file);
        CHECK(moqi_writer_put(&w, "x", 1, &err) == MOQ_E_IO && err.os_code == ENOSPC && strstr(err.text, "no space left"));
        close(full);
        check_content("keep", "first", 5);
    }
    CHECK_INT(count_names(), names);
    CHECK_INT(count_handles(), handles);
}

#endif

static void test_os_clock_and_processors(void)
{
    double a = moq_seconds(), b = moq_seconds();
    for (int i = 0; i < 1000; i++) {
        double c = moq_seconds();
        CHECK(c >= b);
        b = c;
    }
    CHECK(b - a < 1);
#ifndef MOQ_NO_OS
    CHECK(a > 0 && b > a);
#endif
    int n = moq_cpu_count();
    CHECK(n >= 1 && n <= 4096);
    uint32_t f = moqi_cpu_flags();
    const char *words = moq_cpu_features();
    static const struct { uint32_t flag; const char *word; } table[] = {
        {MOQI_CPU_AVX2, "avx2"}, {MOQI_CPU_FMA, "fma"}, {MOQI_CPU_F16C, "f16c"}, {MOQI_CPU_AVX512, "avx512"}, {MOQI_CPU_AVXVNNI, "avx_vnni"}, {MOQI_CPU_BF16, "bf16"},
        {MOQI_CPU_VBMI, "vbmi"}, {MOQI_CPU_AMX, "amx"}, {MOQI_CPU_NEON, "neon"}, {MOQI_CPU_DOTPROD, "dotprod"}, {MOQI_CPU_I8MM, "i8mm"},
    };
    for (size_t i = 0; i < MOQI_COUNT(table); i++) CHECK(((f & table[i].flag) != 0) == (strstr(words, table[i].word) != NULL));
    CHECK(((f & MOQI_CPU_VNNI) != 0) == (strstr(words, " vnni") != NULL));
    CHECK(moqi_cpu_flags() == f && moq_cpu_features() == words);
#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOQ_NO_SIMD)
    __builtin_cpu_init();
    CHECK(!(f & MOQI_CPU_AVX2) == !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")));
    CHECK(!(f & MOQI_CPU_AVX512) == !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")));
#endif
}

static void test_os_base_name(void)
{
    CHECK_STR(moqi_base_name("a/b/c.txt"), "c.txt");
    CHECK_STR(moqi_base_name("c.txt"), "c.txt");
    CHECK_STR(moqi_base_name("/a/b/"), "b/");
    CHECK_STR(moqi_base_name("/a/b//"), "b//");
    CHECK_STR(moqi_base_name("C:\\a\\b"), "b");
    CHECK_STR(moqi_base_name(""), "");
}

/* ---- pool ---- */

#define MAX_TASKS 5000
#define MAX_WORKERS 16

typedef struct work {
    moqi_pool *pool;
    int tasks;
    int calls[MAX_TASKS];                  /* how often each index ran */
    struct { int inside; char pad[60]; } worker[MAX_WORKERS]; /* 1 while that worker number is in use */
    int bad;                               /* a worker number out of range or used twice at one time */
    uint64_t value[MAX_TASKS];
} work;

static void do_work(void *arg, int index, int worker)
{
    work *w = (work *)arg;
    if (index < 0 || index >= w->tasks || worker < 0 || worker >= w->pool->workers || w->worker[worker].inside) { w->bad = 1; return; }
    w->worker[worker].inside = 1;
    w->calls[index]++;
    uint64_t v = (uint64_t)index + 1;
    for (int i = 0; i < 50 + index % 7 * 30; i++) v = v * 6364136223846793005u + 1442695040888963407u;
    w->value[index] = v;
    w->worker[worker].inside = 0;
}

static void check_run(work *w, int tasks)
{
    w->tasks = tasks;
    memset(w->calls, 0, sizeof w->calls);
    moqi_pool_run(w->pool, tasks, do_work, w);
    for (int i = 0; i < tasks; i++) CHECK(w->calls[i] == 1);
    CHECK(w->calls[tasks < MAX_TASKS ? tasks : 0] == (tasks == MAX_TASKS));
    CHECK_INT(w->bad, 0);
}

static void test_pool_runs_every_task_once(void)
{
    static const int workers[] = {1, 2, 3, 5, 8, 16}, tasks[] = {0, 1, 2, 3, 7, 16, 17, 100, MAX_TASKS};
    static work w;
    static uint64_t first[MAX_TASKS];
    for (size_t k = 0; k < MOQI_COUNT(workers); k++) {
        moq_error err;
        memset(&w, 0, sizeof w);
        w.pool = moqi_pool_create(workers[k], NULL, &err);
        CHECK(w.pool != NULL);
        if (!w.pool) continue;
        for (int again = 0; again < 20; again++)
            for (size_t t = 0; t < MOQI_COUNT(tasks); t++) check_run(&w, tasks[t]);
        if (k == 0) memcpy(first, w.value, sizeof first);
        CHECK(memcmp(first, w.value, sizeof first) == 0);
        moqi_pool_destroy(w.pool);
    }
}

static void test_pool_tiny_runs(void)
{
    static work w;
    moq_error err;
    for (int workers = 2; workers <= 4; workers++) {
        memset(&w, 0, sizeof w);
        w.pool = moqi_pool_create(workers, NULL, &err);
        int total = 0, runs = 4000;
        for (int i = 0; i < runs; i++) {
            int n = 1 + i % 4;
            w.tasks = n;
            moqi_pool_run(w.pool, n, do_work, &w);
            total += n;
        }
        int sum = 0;
        for (int i = 0; i < 4; i++) sum += w.calls[i];
        CHECK_INT(sum, total);
        CHECK_INT(w.bad, 0);
        moqi_pool_destroy(w.pool);
    }
}

static void outer(void *arg, int index, int worker)
{
    work *w = (work *)arg; /* one per outer task */
    (void)worker;
    w[index].tasks = 10 + index;
    moqi_pool_run(w[index].pool, w[index].tasks, do_work, &w[index]);
}

static void test_pool_nested(void)
{
    work *w = (work *)calloc(8, sizeof *w);
    moq_error err;
    moqi_pool *p = moqi_pool_create(4, NULL, &err);
    for (int i = 0; i < 8; i++) w[i].pool = p;
    for (int again = 1; again <= 50; again++) {
        moqi_pool_run(p, 8, outer, w);
        for (int i = 0; i < 8; i++) {
            CHECK_INT(w[i].bad, 0);
            for (int k = 0; k < 10 + i; k++) CHECK(w[i].calls[k] == again);
        }
    }
    moqi_pool_destroy(p);
    free(w);
}

static void test_pool_create_and_destroy(void)
{
    moq_allocator a = test_allocator();
    moq_error err;
    for (int i = 0; i < 60; i++) {
        moqi_pool *p = moqi_pool_create(i % 7 - 1, &a, &err);
        CHECK(p && p->workers >= 1);
        moqi_pool_destroy(p);
        CHECK_INT(test_state.live_allocs, 0);
    }
    test_state.fail_at = 1;
    CHECK(moqi_pool_create(4, &a, &err) == NULL && err.code == MOQ_E_NOMEM);
    moqi_pool_destroy(NULL);
    CHECK_INT(test_state.live_allocs, 0);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
#ifndef MOQ_NO_OS
    const char *temp = getenv("TMPDIR");
    snprintf(root, sizeof root, "%s/moq-test-os-%ld", temp && temp[0] ? temp : "/tmp", (long)getpid());
    if (mkdir(root, 0700) != 0) { printf("cannot make %s\n0 passed, 1 failed\n", root); return 1; }
    RUN(test_os_read_file);
    RUN(test_os_special_files);
    RUN(test_os_blob);
    RUN(test_os_list_dir);
    RUN(test_os_write_file);
    RUN(test_os_writer_keeps_the_old_file);
    moqi_arena r = moqi_arena_make(NULL);
    const char **names;
    size_t n;
    if (moqi_list_dir(root, &r, &names, &n, NULL) == MOQ_OK)
        for (size_t i = 0; i < n; i++) unlink(at(names[i]));
    moqi_arena_drop(&r);
    if (rmdir(root) != 0) fprintf(stderr, "%s could not be removed\n", root);
#endif
    RUN(test_os_clock_and_processors);
    RUN(test_os_base_name);
    RUN(test_pool_runs_every_task_once);
    RUN(test_pool_tiny_runs);
    RUN(test_pool_nested);
    RUN(test_pool_create_and_destroy);
    return test_end();
}
