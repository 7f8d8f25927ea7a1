/* moq_autoquant.h - the part of moq.c that chooses a format for every layer: the verb autoquant.

   moq.c includes it once, after moq_quantize.h, whose samples it uses; it is no interface. All work is moq_autoquant of the library.
   Options it reads besides the common ones: bits (number), recipes, method, search, save_search, calib, calibration, shard (texts),
   samples, seq, batch (numbers), exclude (list), active_experts (flag). */

/* ------------------------------------------------------------------------------------------------
   >>autoquant       a format for every layer within a budget of bits
   ------------------------------------------------------------------------------------------------ */

enum { MOST_RECIPES = 16 };

/* "A,B,C" as texts in `copy`, which is cut up. */
static int split_names(char *copy, const char **names, size_t *count)
{
    int last = 0;
    for (char *p = copy; !last; ) {
        size_t len = strcspn(p, ",");
        last = p[len] == 0;
        p[len] = 0;
        if (!len) return refuse("--recipes is A,B; a name between commas is missing");
        if (*count == MOST_RECIPES) return refuse("--recipes has more than %d names", MOST_RECIPES);
        if (check_recipe(p)) return 2;
        for (size_t i = 0; i < *count; i++)
            if (moq_find_recipe(p) == moq_find_recipe(names[i])) return refuse("--recipes names %s twice", p);
        names[(*count)++] = p;
        p += len + 1;
    }
    return 0;
}

static const char *recipe_name(const moq_recipe *r) { return r ? r->name : "none"; }

/* Bits of a weight of the whole folder, as `moq inspect` counts them. 0: not known. */
static double folder_bits(const char *path)
{
    uint64_t bytes = 0, elements = 0;
    size_t count = 0;
    module_row *rows = NULL;
    moq_checkpoint *ck = path ? moq_open(path, NULL, NULL) : NULL;
    if (ck && list_modules(ck, path, NULL, &rows, &count) == 0)
        for (size_t i = 0; i < count; i++) {
            bytes += rows[i].weight_bytes;
            elements += rows[i].elements;
        }
    free(rows);
    moq_close(ck);
    return bits_per(bytes, elements);
}

static void print_search(const moq_search *s, const char *target)
{
    const moq_search_info *info = moq_search_get_info(s);
    printf("%-52s %-20s  %s\n", "layers of one recipe", "chosen", "scores of all, the less the better");
    for (size_t i = 0; i < info->units; i++) {
        const moq_search_unit *u = moq_search_get_unit(s, i);
        printf("%-52s %-20s", u->name, recipe_name(u->recipes[u->choice]));
        for (int32_t k = 0; k < u->formats; k++) printf("  %s %.4g", recipe_name(u->recipes[k]), u->scores[k]);
        printf("\n");
    }
    printf("%zu units, %.4f bits a weight of linear layers", info->units, info->effective_bits);
    if (target) printf(" (%.3f with embeddings)", folder_bits(target));
    printf(", score %.6g (%s)\n", info->score, info->method == MOQ_SOLVE_SUM ? "gradient" : "KL divergence");
}

static void print_search_json(const moq_search *s, const char *target)
{
    const moq_search_info *info = moq_search_get_info(s);
    json_out j = json_to(stdout, 1);
    json_open(&j, NULL, '{');
    if (target) json_string(&j, "path", target);
    json_string(&j, "method", info->method == MOQ_SOLVE_SUM ? "gradient" : "kl");
    json_number(&j, "effective_bits", info->effective_bits);
    if (target) json_number(&j, "folder_bits", folder_bits(target));
    json_number(&j, "score", info->score);
    json_open(&j, "units", '[');
    for (size_t i = 0; i < info->units; i++) {
        const moq_search_unit *u = moq_search_get_unit(s, i);
        json_open(&j, NULL, '{');
        json_string(&j, "name", u->name);
        json_string(&j, "recipe", recipe_name(u->recipes[u->choice]));
        json_open(&j, "modules", '[');
        for (size_t k = 0; k < u->module_count; k++) json_string(&j, NULL, u->modules[k]);
        json_close(&j, ']');
        json_open(&j, "candidates", '[');
        for (int32_t k = 0; k < u->formats; k++) {
            json_open(&j, NULL, '{');
            json_string(&j, "recipe", recipe_name(u->recipes[k]));
            json_number(&j, "score", u->scores[k]);
            json_number(&j, "cost", u->costs[k]);
            json_close(&j, '}');
        }
        json_close(&j, ']');
        json_close(&j, '}');
    }
    json_close(&j, ']');
    json_close(&j, '}');
}

/* Options that contradict each other or lack what they need. */
static int check_autoquant(const options *o)
{
    if (!(o->bits > 0)) return refuse("autoquant needs --bits X, the bits of a weight on average");
    if (!o->search && !o->recipes) return refuse("autoquant needs --recipes A,B, what to choose from; moq recipes lists them");
    if (o->search && o->recipes) return refuse("--search reads recorded scores, whose recipes are known; leave --recipes out");
    if (!o->search && !o->calib) return refuse("autoquant needs --calib D to score layers with, or --search FILE of recorded scores");
    if (o->method && strcmp(o->method, "gradient") != 0 && strcmp(o->method, "kl") != 0) return refuse("--method is gradient or kl, not '%s'", o->method);
    if (!o->calib && (o->samples || o->seq || o->batch)) return refuse("--samples, --seq and --batch are about --calib D; give that too");
    return 0;
}

/* Steps of the search: first each candidate is calibrated, whose rows on_samples counts, then come the scores. */
static int on_search(void *user, moq_stage stage, uint64_t done, uint64_t total)
{
    sample_set *s = (sample_set *)user;
    if (stage != MOQ_STAGE_CALIBRATE) return on_progress(NULL, stage, done, total);
    s->counted = 1;
    s->pass = done;
    if (done < s->candidates) return stop_requested != 0;
    return total > s->candidates ? progress_bar("scoring", done - s->candidates, total - s->candidates, 0) : stop_requested != 0;
}

static int verb_autoquant(const options *o)
{
    moq_autoquant_desc d;
    const char *names[MOST_RECIPES];
    moq_error err;
    sample_set set;
    char *copy = o->recipes ? join(o->recipes, "", "") : NULL;
    int bad = check_autoquant(o);
    moq_search *s = NULL;
    memset(&d, 0, sizeof d);
    memset(&set, 0, sizeof set);
    d.source = o->args[0];
    d.target = o->arg_count > 1 ? o->args[1] : NULL;
    d.effective_bits = o->bits;
    d.recipes = names;
    if (!bad && copy) bad = split_names(copy, names, &d.recipe_count);
    d.method = o->method && strcmp(o->method, "kl") == 0 ? MOQ_SOLVE_THRESHOLD : MOQ_SOLVE_SUM;
    d.active_experts = o->active_experts;
    d.exclude = o->exclude.item;
    d.exclude_count = (size_t)o->exclude.count;
    d.kv = o->kv && strcmp(o->kv, "auto") != 0 ? o->kv : NULL;
    d.search = o->search;
    d.save_search = o->save_search;
    d.calibration = o->calibration;
    d.threads = (int)o->threads;
    d.progress = on_search;
    d.progress_user = &set;
    d.log = on_log;
    d.log_user = (void *)(uintptr_t)o->args[0];
    if (!bad && o->shard && !parse_bytes("shard", o->shard, &d.shard_bytes)) bad = 2;
    if (!bad && o->calib) {
        bad = load_samples(&set, o);
        set.samples.logits = 1;
        for (size_t i = 0; i < d.recipe_count; i++) set.candidates += strcmp(names[i], "none") != 0;
        set.passes = set.candidates ? set.candidates : 1;
        d.forward = llm_calibrate;
        d.data = &set.samples;
    }
    if (!bad && !(s = moq_autoquant(&d, &err))) {
        const char *others[] = {d.target, o->search, o->save_search, o->calibration};
        progress_bar("", 1, 1, 0); /* gone before the error */
        bad = refuse_error(blamed_path(&err, d.source, others, COUNT(others)), &err);
    }
    progress_bar("", 1, 1, 0); /* gone before the result */
    if (s && o->json) print_search_json(s, d.target);
    else if (s) print_search(s, d.target);
    moq_search_destroy(s);
    drop_samples(&set);
    free(copy);
    return bad;
}
