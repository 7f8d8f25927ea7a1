/* moq_quantize.h - the part of moq.c that writes checkpoints: the verbs quantize and convert.

   moq.c includes it once; it is no interface. All work is moq_quantize of the library; here are only options and messages.
   Options it reads besides the common ones: recipe, format, calib, calibration, save_calibration, max_memory, shard (texts), samples,
   seq, batch (numbers), exclude, rule (lists). */

/* ------------------------------------------------------------------------------------------------
   >>samples         rows of tokens to calibrate with
   ------------------------------------------------------------------------------------------------ */

/* Rows as llm_calibrate takes them, and how far a calibration is. */
typedef struct sample_set {
    token_rows tokens;
    const int32_t **rows;
    int32_t *lengths;
    llm_samples samples;
    const char *path, *source;
    llm_tokenizer *tok;
    size_t most, seq;
    int32_t vocab;         /* 0: not said */
    uint64_t pass, passes; /* of the model over all rows */
    uint64_t candidates;   /* of AutoQuantize, calibrated one by one before anything is scored; 0: no such search */
    int counted;           /* AutoQuantize has seen how many batches there are */
    int full;              /* no more rows are wanted */
    int calibrated;        /* the recipe asked for them */
    uint64_t pass_total;   /* tokens of a pass times layers; 0: it has not begun */
    uint64_t shown;        /* tokens times layers that the last report of this pass had */
    uint64_t layers_done;  /* of this pass, searches included: at `layer_time` seconds */
    double pass_start, layer_time;
} sample_set;

static void drop_samples(sample_set *s)
{
    llm_tokenizer_close(s->tok);
    free_tokens(&s->tokens);
    free(s->rows);
    free(s->lengths);
}

/* Adds one row, cut after --seq tokens. */
static void add_sample(sample_set *s, const int32_t *ids, size_t count)
{
    if (count > 0 && !s->full) tokens_row(&s->tokens, ids, count < s->seq ? count : s->seq);
    s->full = s->tokens.rows >= s->most;
}

/* Rows of --seq tokens; a last one of a single token says nothing. */
static void add_windows(sample_set *s, const int32_t *ids, size_t count)
{
    for (size_t at = 0; at < count && !s->full; at += s->seq)
        if (count - at > 1 || at == 0) add_sample(s, ids + at, count - at);
}

static int add_text(sample_set *s, const char *text, size_t bytes, int windows)
{
    size_t n = llm_encode(s->tok, text, bytes, LLM_BOS, NULL, 0);
    int32_t *ids;
    if (n == SIZE_MAX) return refuse("out of memory");
    ids = (int32_t *)take(n, sizeof *ids);
    llm_encode(s->tok, text, bytes, LLM_BOS, ids, n);
    if (windows) add_windows(s, ids, n);
    else add_sample(s, ids, n);
    free(ids);
    return 0;
}

/* A line of a .jsonl file: a text as it is, a conversation in the folder's own frame. */
static int add_row(void *user, const text_row *row)
{
    sample_set *s = (sample_set *)user;
    moq_error err;
    int32_t *ids;
    size_t n;
    int bad = row->text ? add_text(s, row->text, row->bytes, 0) : 0;
    if (!row->text) {
        n = llm_frame(s->tok, row->messages, row->count, 0, NULL, 0, &err);
        if (n == SIZE_MAX) return refuse_error(s->source, &err);
        ids = (int32_t *)take(n, sizeof *ids);
        llm_frame(s->tok, row->messages, row->count, 0, ids, n, &err);
        add_sample(s, ids, n);
        free(ids);
    }
    return bad ? bad : s->full ? NO_MORE_ROWS : 0;
}

static int read_samples(sample_set *s)
{
    int lines = ends_with(s->path, ".jsonl"), bad = 0;
    token_rows t;
    size_t bytes;
    char *text;
    if (!s->tok) {
        bad = read_tokens(&t, "calib", s->path);
        if (!bad) bad = check_tokens(&t, s->path, s->vocab, 0);
        for (size_t r = 0; !bad && r < t.rows; r++) {
            if (t.rows == 1) add_windows(s, t.ids, t.start[1]);
            else add_sample(s, t.ids + t.start[r], t.start[r + 1] - t.start[r]);
        }
        free_tokens(&t);
        return bad;
    }
    text = read_text(s->path, &bytes);
    if (!text) return 2;
    bad = lines ? each_row(s->path, text, bytes, add_row, s) : add_text(s, text, bytes, 1);
    free_file(text, bytes);
    return bad;
}

/* What the model can take: config.json's max_position_embeddings, also where a text model lies inside a larger one. 0: not said. */
static size_t most_positions(const moq_checkpoint *ck)
{
    const moq_json *root = moq_get_config(ck), *v = moq_json_find(root, "max_position_embeddings");
    int64_t n = 0;
    if (!v) v = moq_json_find(moq_json_find(root, "text_config"), "max_position_embeddings");
    return moq_json_int(v, &n) && n > 0 ? (size_t)n : 0;
}

/* The bar of a pass. A layer's rows and what is searched with them take times of their own, so how long the rest takes is known by whole layers
   only: nothing is said during the first one, nor of a search after rows that went through the whole model at once. */
static int calibration_bar(sample_set *s, const char *what, uint64_t done, uint64_t total)
{
    const uint64_t tokens = s->tokens.rows ? s->tokens.start[s->tokens.rows] : 0, layers = tokens ? total / tokens : 0;
    char name[80], rest[48] = "";
    double now = moq_seconds(), left = -1;
    if (s->pass_start <= 0 || done < s->shown) {
        s->pass_start = now;
        s->layers_done = 0;
    }
    s->shown = done;
    if (done > 0 && tokens > 0 && (done - 1) / tokens > s->layers_done) {
        s->layers_done = (done - 1) / tokens;
        s->layer_time = now - s->pass_start;
    }
    if (layers <= 1 && done > 0 && done < total) left = (now - s->pass_start) * (double)(total - done) / (double)done;
    if (layers > 1 && s->layers_done > 0) left = s->layer_time * (double)layers / (double)s->layers_done - (now - s->pass_start);
    if (left >= 0) snprintf(rest, sizeof rest, "%.0f s left%s", left, s->passes > 1 ? " of this pass" : "");
    if (s->passes > 1) snprintf(name, sizeof name, "%s, pass %" PRIu64 " of %" PRIu64, what, s->pass + 1, s->passes);
    else snprintf(name, sizeof name, "%s", what);
    return draw_bar(name, s->pass_start, total > 0 ? 0.999 * (double)done / (double)total : 0, rest); /* it stays until the pass is over */
}

/* Tokens that pass through the model, times layers where they run one by one. Called for each row of each layer. */
static int on_samples(void *user, moq_stage stage, uint64_t done, uint64_t total)
{
    sample_set *s = (sample_set *)user;
    (void)stage;
    if (s->candidates && !s->counted) return progress_bar("counting batches", done, total, 0);
    if (s->candidates && s->pass >= s->candidates) return stop_requested != 0; /* scores are counted one by one */
    s->pass_total = total;
    return calibration_bar(s, "calibrating", done, total);
}

/* Passes of a calibration, bytes of everything else. */
static int on_quantize(void *user, moq_stage stage, uint64_t done, uint64_t total)
{
    sample_set *s = (sample_set *)user;
    if (stage != MOQ_STAGE_CALIBRATE) return on_progress(NULL, stage, done, total);
    s->calibrated = 1;
    if (done != s->pass) s->pass_total = s->shown = 0, s->pass_start = 0;
    s->pass = done;
    s->passes = total ? total : 1;
    if (done >= total) return draw_bar("", 0, 1, "");
    /* asked between two layers that are searched: every row of them was reported */
    return s->pass_total > 0 && !s->candidates ? calibration_bar(s, "searching", s->shown, s->pass_total) : stop_requested != 0;
}

/* Everything of --calib D. */
static int load_samples(sample_set *s, const options *o)
{
    moq_error err;
    moq_checkpoint *ck = moq_open(o->args[0], NULL, &err);
    size_t limit;
    int bad = 0;
    s->path = o->calib;
    s->source = o->args[0];
    s->most = o->samples ? (size_t)o->samples : 512;
    s->passes = 1;
    if (!ck) return refuse_error(o->args[0], &err);
    limit = most_positions(ck);
    s->vocab = (int32_t)config_int(ck, "vocab_size", 0);
    s->seq = o->seq ? (size_t)o->seq : limit && limit < 512 ? limit : 512;
    if (limit && s->seq > limit) bad = refuse("--seq %zu: %s was made for %zu tokens", s->seq, o->args[0], limit);
    if (!bad && (ends_with(s->path, ".jsonl") || ends_with(s->path, ".txt"))) {
        s->tok = llm_tokenizer_open(ck, &err);
        if (!s->tok) bad = refuse_error(o->args[0], &err);
    }
    if (!bad) bad = read_samples(s);
    moq_close(ck);
    if (bad) return bad;
    if (s->tokens.rows == 0) return refuse("%s: there is nothing in it to calibrate with; give text, or rows " ROW_SHAPES " in a .jsonl file", s->path);
    if (o->samples && !s->full)
        fprintf(stderr, "moq: note: %.200s: %zu row%s of up to %zu tokens; --samples asked for %zu\n",
                s->path, s->tokens.rows, s->tokens.rows == 1 ? "" : "s", s->seq, s->most);
    s->rows = (const int32_t **)take(s->tokens.rows, sizeof *s->rows);
    s->lengths = (int32_t *)take(s->tokens.rows, sizeof *s->lengths);
    for (size_t r = 0; r < s->tokens.rows; r++) {
        s->rows[r] = s->tokens.ids + s->tokens.start[r];
        s->lengths[r] = (int32_t)(s->tokens.start[r + 1] - s->tokens.start[r]);
    }
    s->samples.rows = s->rows;
    s->samples.lengths = s->lengths;
    s->samples.count = (int32_t)s->tokens.rows;
    s->samples.batch = o->batch ? (int32_t)o->batch : 8;
    s->samples.progress = on_samples;
    s->samples.progress_user = s;
    return 0;
}

/* ------------------------------------------------------------------------------------------------
   >>quantize        a float folder in, a quantized folder out
   ------------------------------------------------------------------------------------------------ */

/* "10000000000", "500M", "10G" (powers of ten). Returns 0 after complaining. */
static int parse_bytes(const char *option, const char *text, uint64_t *out)
{
    char *end = NULL;
    errno = 0;
    double n = strtod(text, &end), unit = 1;
    if (*end == 'K' || *end == 'k') unit = 1e3;
    if (*end == 'M' || *end == 'm') unit = 1e6;
    if (*end == 'G' || *end == 'g') unit = 1e9;
    if (unit > 1) end++;
    if (*end == 'B' || *end == 'b') end++;
    if (end == text || *end || errno || !(n * unit >= 1) || n * unit > 1e18) {
        refuse("--%s needs a number of bytes such as 500M or 10G, not '%s'", option, text);
        return 0;
    }
    *out = (uint64_t)(n * unit);
    return 1;
}

/* "PATTERN=RECIPE" of --rule. The texts are the caller's to free. */
static int split_rule(const char *text, moq_rule *rule)
{
    const char *equals = strrchr(text, '=');
    char *pattern;
    if (!equals || equals == text || !equals[1]) return refuse("--rule needs PATTERN=RECIPE, not '%s'", text);
    pattern = join(text, "", "");
    pattern[equals - text] = 0;
    rule->pattern = pattern;
    rule->recipe = equals + 1;
    return 0;
}

/* What was written, for people or for scripts. set: what it was calibrated with; NULL: nothing. */
static int report_folder(const options *o, const char *path, const sample_set *set)
{
    const size_t rows = set ? set->tokens.rows : 0, tokens = rows ? set->tokens.start[rows] : 0;
    moq_error err;
    moq_checkpoint *ck = moq_open(path, NULL, &err);
    const moq_info *info;
    if (!ck) return refuse_error(path, &err);
    info = moq_get_info(ck);
    if (o->json) {
        json_out j = json_to(stdout, 1);
        json_open(&j, NULL, '{');
        json_string(&j, "path", path);
        json_string(&j, "quant_algo", info->quant_algo);
        json_string(&j, "kv_cache", moq_kv_format_name(info->kv));
        json_int(&j, "total_bytes", (int64_t)info->total_bytes);
        json_int(&j, "shards", info->shards);
        if (rows) json_int(&j, "calibration_rows", (int64_t)rows);
        if (rows) json_int(&j, "calibration_tokens", (int64_t)tokens);
        json_close(&j, '}');
    } else {
        printf("%s: %s, KV cache %s", path, info->quant_algo[0] ? info->quant_algo : "not quantized", moq_kv_format_name(info->kv));
        print_bytes(", ", info->total_bytes);
        printf(" in %u file%s", info->shards, info->shards == 1 ? "" : "s");
        if (rows) printf(", calibrated with %zu row%s, %zu tokens in all", rows, rows == 1 ? "" : "s", tokens);
        printf("\n");
    }
    moq_close(ck);
    return 0;
}

/* Is the first part of `name` the last part of the path? */
static int ends_in(const char *path, const char *name)
{
    size_t n = strcspn(name, "/"), length = path ? strlen(path) : 0, base;
    while (length > 1 && path[length - 1] == '/') length--;
    for (base = length; base > 0 && path[base - 1] != '/'; base--) {}
    return n > 0 && length - base == n && strncmp(path + base, name, n) == 0;
}

/* Source and target may end alike. What is wrong with such a folder as a whole is wrong with the target, where the source can be read. */
static int means_target(const moq_error *err, const char *source, const char *target)
{
    int whole = err->code == MOQ_E_ARG || err->code == MOQ_E_NOTFOUND || err->code == MOQ_E_IO;
    return whole && ends_in(target, err->file) && access(source, R_OK | X_OK) == 0;
}

/* The path that an error is about: a file of the target (the first of `others`) comes as FOLDER/FILE, others by their last part; what else there
   is belongs to the source. */
static const char *blamed_path(const moq_error *err, const char *source, const char *const *others, int count)
{
    if (!strchr(err->file, '/') && ends_in(source, err->file) && !means_target(err, source, others[0])) return source;
    for (int i = 0; i < count; i++)
        if (ends_in(others[i], err->file)) return others[i];
    return source;
}

/* Of a --format or --to that names none: the option is what is wrong, no folder. 0: something else is. */
static int refuse_container(const char *option, const char *name, const moq_error *err)
{
    const char *use = strstr(err->text, "; use ");
    if (!name || err->code != MOQ_E_UNSUPPORTED || strcmp(err->object, name) != 0) return 0;
    return refuse("--%s: '%s' is no container that can be written%s", option, name, use ? use : "");
}

/* Options that contradict each other or lack what they need. */
static int check_quantize(const options *o)
{
    if (!o->recipe) return refuse("quantize needs --recipe NAME; moq recipes lists them, moq help quantize has an example");
    if (o->calibration && (ends_with(o->calibration, ".txt") || ends_with(o->calibration, ".jsonl")))
        return refuse("%s: --calibration takes recorded values, a .safetensors file; text to calibrate with goes to --calib", o->calibration);
    if (o->calib && o->calibration) return refuse("--calib measures what --calibration reads from a file; give one of them");
    if (o->save_calibration && !o->calib) return refuse("--save-calibration keeps what --calib D measures; give that too");
    if (!o->calib && (o->samples || o->seq || o->batch)) return refuse("--samples, --seq and --batch are about --calib D; give that too");
    return 0;
}

static int verb_quantize(const options *o)
{
    moq_quantize_desc d;
    moq_rule rules[MAX_LIST];
    moq_error err;
    sample_set set;
    int bad = check_quantize(o);
    if (bad) return bad;
    memset(&d, 0, sizeof d);
    memset(&set, 0, sizeof set);
    d.source = o->args[0];
    d.target = o->args[1];
    d.recipe = o->recipe;
    d.kv = o->kv && strcmp(o->kv, "auto") != 0 ? o->kv : NULL;
    d.exclude = o->exclude.item;
    d.exclude_count = (size_t)o->exclude.count;
    d.rules = rules;
    d.calibration = o->calibration;
    d.format = o->format;
    d.threads = (int)o->threads;
    d.progress = on_quantize;
    d.progress_user = &set;
    d.log = on_log;
    d.log_user = (void *)(uintptr_t)o->args[0];
    if (o->shard && !parse_bytes("shard", o->shard, &d.shard_bytes)) return 2;
    if (o->max_memory && !parse_bytes("max-memory", o->max_memory, &d.max_memory)) return 2;
    set.samples.max_memory = d.max_memory;
    set.samples.scratch = d.target;
    if (o->calib) {
        bad = load_samples(&set, o);
        set.samples.logits = o->rule.count > 0 || moq_find_recipe(o->recipe) == moq_find_recipe("nvfp4_fp8_mha"); /* only then can the head be meant */
        d.calibrate = llm_calibrate;
        d.data = &set.samples;
        d.save_calibration = o->save_calibration;
        if (!bad) bad = open_backend(o, o->kernel, &d.backend);
    }
    for (int i = 0; i < o->rule.count && !bad; i++) {
        bad = split_rule(o->rule.item[i], &rules[i]);
        if (!bad) d.rule_count++;
    }
    moq_result made = bad ? MOQ_OK : moq_quantize(&d, &err);
    draw_bar("", 0, 1, ""); /* gone before the error or the result */
    if (made != MOQ_OK) {
        const char *others[] = {o->args[1], o->calibration, o->save_calibration};
        bad = refuse_container("format", o->format, &err);
        if (!bad) bad = refuse_error(blamed_path(&err, o->args[0], others, COUNT(others)), &err);
    }
    moq_backend_destroy(d.backend);
    for (size_t i = 0; i < d.rule_count; i++) free((void *)(uintptr_t)rules[i].pattern);
    if (!bad) bad = report_folder(o, o->args[1], set.calibrated ? &set : NULL);
    drop_samples(&set);
    return bad;
}

static int verb_convert(const options *o)
{
    moq_convert_desc d;
    moq_error err;
    if (o->kv) return refuse("--kv is not for 'convert', which keeps the KV cache that the folder asks for; quantize writes another, run takes any");
    if (!o->to) return refuse("convert needs --to modelopt, --to compressed-tensors or --to gpt-oss; try: moq help convert");
    memset(&d, 0, sizeof d);
    d.source = o->args[0];
    d.target = o->args[1];
    d.to = o->to;
    d.recipe = o->recipe;
    d.threads = (int)o->threads;
    d.progress = on_progress;
    d.log = on_log;
    d.log_user = (void *)(uintptr_t)o->args[0];
    if (o->shard && !parse_bytes("shard", o->shard, &d.shard_bytes)) return 2;
    if (moq_convert(&d, &err) != MOQ_OK) {
        int bad = refuse_container("to", o->to, &err);
        return bad ? bad : refuse_error(blamed_path(&err, o->args[0], (const char *const *)&o->args[1], 1), &err);
    }
    return report_folder(o, o->args[1], NULL);
}

/* ------------------------------------------------------------------------------------------------
   >>encode          bench --encode: how fast weights are quantized
   One thread, BF16 weights with outliers that fit the cache; a copy of the same bytes is timed in between, best of many.
   ------------------------------------------------------------------------------------------------ */

static int bench_encode(const options *o)
{
    static const char *const recipes[] = {"fp8", "fp8_per_channel_per_token", "fp8_2d_blockwise_weight_only", "int8", "int4_awq", "nvfp4", "mxfp4",
                                          "mxfp8", "mxint8", "mxfp6"};
    enum { ROWS = 256, COLS = 4096 };
    size_t bytes = (size_t)ROWS * COLS * 2;
    uint16_t *weights = (uint16_t *)take(bytes, 1), *copy = (uint16_t *)take(bytes, 1);
    uint8_t *codes = (uint8_t *)take(bytes, 1), *scales = (uint8_t *)take(bytes, 1);
    uint64_t state = 1;
    int bad = 0;
    json_out j = json_to(stdout, 2);
    for (size_t i = 0; i < (size_t)ROWS * COLS; i++) weights[i] = moq_bf16_encode((float)random_value(&state));
    if (o->json) { json_open(&j, NULL, '{'); json_open(&j, "rows", '['); }
    else printf("%-30s %10s %12s\n", "recipe", "GB/s BF16", "of a copy");
    for (int k = 0; k < COUNT(recipes) && !bad && !stop_requested; k++) {
        moq_encode_desc d;
        moq_error err;
        double best = 1e9, plain = 1e9;
        memset(&d, 0, sizeof d);
        d.scheme = moq_find_recipe(recipes[k])->scheme;
        d.data = weights;
        d.dtype = MOQ_BF16;
        d.rows = ROWS;
        d.cols = COLS;
        for (int i = 0; i < 60 && !bad; i++) {
            double start = moq_seconds(), middle, end;
            memcpy(copy, weights, bytes);
            middle = moq_seconds();
            if (moq_encode(&d, codes, scales, NULL, &err) != MOQ_OK) bad = refuse_error(recipes[k], &err);
            end = moq_seconds();
            if (middle - start < plain) plain = middle - start;
            if (end - middle < best) best = end - middle;
        }
        if (o->json) {
            json_open(&j, NULL, '{');
            json_string(&j, "recipe", recipes[k]);
            json_number(&j, "gbps", (double)bytes / best / 1e9);
            json_number(&j, "copy_ratio", plain / best);
            json_close(&j, '}');
        } else printf("%-30s %10.2f %12.3f\n", recipes[k], (double)bytes / best / 1e9, plain / best);
    }
    if (o->json) { json_close(&j, ']'); json_close(&j, '}'); }
    free(weights);
    free(copy);
    free(codes);
    free(scales);
    return bad;
}
