/* moq_quantize.h - the part of moq.c that writes checkpoints: the verb quantize.

   moq.c includes it once; it is no interface. All work is moq_quantize of the library; here are only options and messages.
   Options it reads besides the common ones: recipe, format, calibration, save_calibration, shard (texts), exclude, rule (lists). */

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

/* What was written, for people or for scripts. */
static int report_folder(const options *o, const char *path)
{
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
        json_close(&j, '}');
    } else {
        printf("%s: %s, KV cache %s, %.3f GB in %u file%s\n", path, info->quant_algo[0] ? info->quant_algo : "not quantized", moq_kv_format_name(info->kv),
               (double)info->total_bytes / 1e9, info->shards, info->shards == 1 ? "" : "s");
    }
    moq_close(ck);
    return 0;
}

static int verb_quantize(const options *o)
{
    moq_quantize_desc d;
    moq_rule rules[MAX_LIST];
    moq_error err;
    int bad = 0;
    if (!o->recipe) return refuse("quantize needs --recipe NAME; moq recipes lists them");
    memset(&d, 0, sizeof d);
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
    d.progress = on_progress;
    d.log = on_log;
    d.log_user = (void *)(uintptr_t)o->args[0];
    if (o->shard && !parse_bytes("shard", o->shard, &d.shard_bytes)) return 2;
    for (int i = 0; i < o->rule.count && !bad; i++) {
        bad = split_rule(o->rule.item[i], &rules[i]);
        if (!bad) d.rule_count++;
    }
    if (!bad && moq_quantize(&d, &err) != MOQ_OK) bad = refuse_error(err.file[0] && strstr(o->args[1], err.file) ? o->args[1] : o->args[0], &err);
    for (size_t i = 0; i < d.rule_count; i++) free((void *)(uintptr_t)rules[i].pattern);
    return bad ? bad : report_folder(o, o->args[1]);
}
