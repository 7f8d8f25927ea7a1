/* robot.c - a home robot: a scene and a request in, a plan out that is always valid, carried out in a world of text.

       cc -O2 robot.c -o robot -lm -pthread
       ./robot [FOLDER]                    three errands; in two of them the world is not as the robot remembers it
       ./robot [FOLDER] --eval FILE        requests with right answers, one {"system", "user", "assistant"} a line: how many plans are
                                           valid, can be carried out, and are exactly right

   The model cannot write anything but a plan: before each request a JSON Schema is made of what is in the scene, and llm_set_grammar
   holds the answer to it. Whether the plan works is another matter. When a step fails, the robot corrects what it remembers and asks again. */
#define MODELOPT_Q_IMPLEMENTATION
#include "../modelopt_q.h"
#define LLM_IMPLEMENTATION
#include "llm.h"
#include <stdio.h>

#define NAME 48
#define MOST 40

static const char *const furniture[] = {
    "bathroom basin", "bathroom cupboard", "bathroom washer", "bedroom bed", "bedroom desk", "bedroom drawer", "bedroom shelf", "garage rack",
    "garage toolbox", "garage workbench", "hallway bench", "hallway cabinet", "hallway coat rack", "kitchen counter", "kitchen fridge", "kitchen sink",
    "kitchen table", "living room armchair", "living room bookcase", "living room sofa", "living room tv stand"
};

/* ---- the world: who and what is where ---- */

typedef struct thing { char name[NAME], place[NAME]; } thing; /* place "": in the robot's hand */
typedef struct world { thing at[MOST]; int count; } world;

static thing *find(world *w, const char *name)
{
    for (int i = 0; i < w->count; i++)
        if (strcmp(w->at[i].name, name) == 0) return &w->at[i];
    return NULL;
}

/* People have names with a capital letter; the robot is neither a person nor a thing to carry. */
static int is_person(const thing *t) { return t->name[0] >= 'A' && t->name[0] <= 'Z'; }
static int is_object(const thing *t) { return !is_person(t) && strcmp(t->name, "robot") != 0; }

/* "red mug at kitchen table; Ana at hallway bench; robot at garage rack"; 0: not of this form. */
static int read_scene(world *w, const char *s)
{
    memset(w, 0, sizeof *w);
    while (*s && w->count < MOST) {
        thing *t = &w->at[w->count++];
        const char *at = strstr(s, " at "), *end = s + strcspn(s, ";");
        if (!at || at > end || at - s >= NAME || end - at - 4 >= NAME) return 0;
        memcpy(t->name, s, (size_t)(at - s));
        memcpy(t->place, at + 4, (size_t)(end - at - 4));
        s = *end ? end + 2 : end;
    }
    return find(w, "robot") != NULL;
}

static void write_scene(const world *w, char *out, size_t capacity)
{
    size_t n = 0;
    out[0] = 0;
    for (int i = 0; i < w->count && n < capacity; i++)
        n += (size_t)snprintf(out + n, capacity - n, "%s%s at %s", i ? "; " : "", w->at[i].name, w->at[i].place);
}

/* ---- what a plan may be ---- */

typedef struct text { char s[16384]; size_t n; } text;

static void add(text *t, const char *s)
{
    size_t n = strlen(s);
    if (t->n + n >= sizeof t->s) return; /* a scene has at most MOST names */
    memcpy(t->s + t->n, s, n + 1);
    t->n += n;
}

/* {"enum": [..]} of the objects, the people, or the places. */
static void add_names(text *t, const world *w, char kind)
{
    int n = 0;
    add(t, "{\"enum\":[");
    for (int i = 0; i < w->count; i++) {
        const thing *x = &w->at[i];
        int repeated = 0;
        if (kind == 'o' ? !is_object(x) : kind == 'p' ? !is_person(x) : 0) continue;
        if (kind == 'f') {
            for (size_t k = 0; k < sizeof furniture / sizeof *furniture; k++) repeated |= strcmp(furniture[k], x->place) == 0;
            for (int k = 0; k < i; k++) repeated |= strcmp(w->at[k].place, x->place) == 0;
        }
        if (repeated) continue;
        add(t, n++ ? ",\"" : "\"");
        add(t, kind == 'f' ? x->place : x->name);
        add(t, "\"");
    }
    for (size_t k = 0; kind == 'f' && k < sizeof furniture / sizeof *furniture; k++) {
        add(t, n++ ? ",\"" : "\"");
        add(t, furniture[k]);
        add(t, "\"");
    }
    add(t, "]}");
}

/* One kind of step: its word, and a member with one of the names. */
static void add_step(text *t, const world *w, const char *word, const char *first, char first_kind, const char *second, char second_kind)
{
    add(t, "{\"type\":\"object\",\"properties\":{\"do\":{\"const\":\"");
    add(t, word);
    add(t, "\"},\"");
    add(t, first);
    add(t, "\":");
    add_names(t, w, first_kind);
    if (second) { add(t, ",\""); add(t, second); add(t, "\":"); add_names(t, w, second_kind); }
    add(t, "},\"required\":[\"do\",\"");
    add(t, first);
    if (second) { add(t, "\",\""); add(t, second); }
    add(t, "\"],\"additionalProperties\":false}");
}

/* Only what is in the scene can be picked, only those who are there can be given something. */
static void write_schema(text *t, const world *w)
{
    int objects = 0, people = 0;
    for (int i = 0; i < w->count; i++) { objects += is_object(&w->at[i]); people += is_person(&w->at[i]); }
    t->n = 0;
    add(t, "{\"type\":\"object\",\"properties\":{\"say\":{\"type\":\"string\",\"maxLength\":120},\"plan\":{\"type\":\"array\",\"maxItems\":16,\"items\":{\"oneOf\":[");
    add_step(t, w, "go", "to", 'f', NULL, 0);
    if (objects) { add(t, ","); add_step(t, w, "pick", "what", 'o', NULL, 0); }
    if (objects) { add(t, ","); add_step(t, w, "place", "what", 'o', "on", 'f'); }
    if (objects && people) { add(t, ","); add_step(t, w, "give", "what", 'o', "to", 'p'); }
    add(t, "]}}},\"required\":[\"say\",\"plan\"],\"additionalProperties\":false}");
}

/* ---- asking ---- */

/* The plan for a request, as text; 0 and an error. */
static int ask(llm *bot, const world *w, const char *scene, const char *request, text *answer, moq_error *err)
{
    static text schema;
    llm_grammar_desc d = {0};
    llm_grammar *plans;
    const char *piece;
    write_schema(&schema, w);
    d.schema = schema.s;
    d.compact = 1;                                       /* as the model was trained */
    plans = llm_grammar_create(&d, err);
    answer->n = 0;
    answer->s[0] = 0;
    llm_reset(bot);                                      /* every request stands for itself */
    if (!plans || llm_set_grammar(bot, plans, 0, err) != MOQ_OK) { llm_grammar_destroy(plans); return 0; }
    llm_say(bot, "system", scene);
    llm_say(bot, "user", request);
    while ((piece = llm_next(bot, err)) != NULL) add(answer, piece);
    llm_set_grammar(bot, NULL, 0, NULL);                 /* the grammar must outlive its use */
    llm_grammar_destroy(plans);
    return err->code == MOQ_OK;
}

/* ---- carrying out ---- */

/* One step in the world; NULL, or why it cannot be done. */
static const char *act(world *w, const moq_json *step)
{
    const char *word = moq_json_string(moq_json_find(step, "do")), *what = moq_json_string(moq_json_find(step, "what"));
    const char *to = moq_json_string(moq_json_find(step, "to")), *on = moq_json_string(moq_json_find(step, "on"));
    thing *robot = find(w, "robot"), *object = what ? find(w, what) : NULL, *person = to ? find(w, to) : NULL;
    if (strcmp(word, "go") == 0) { snprintf(robot->place, NAME, "%s", to); return NULL; }
    if (!object) return "there is no such thing";
    if (strcmp(word, "pick") == 0) {
        for (int i = 0; i < w->count; i++)
            if (w->at[i].place[0] == 0) return "the hand is full";
        if (strcmp(object->place, robot->place) != 0) return "it is not here";
        object->place[0] = 0;
        return NULL;
    }
    if (object->place[0]) return "it is not in the hand";
    if (strcmp(word, "place") == 0 && strcmp(on, robot->place) != 0) return "that is somewhere else";
    if (strcmp(word, "give") == 0 && (!person || strcmp(person->place, robot->place) != 0)) return "nobody of that name is here";
    snprintf(object->place, NAME, "%s", robot->place);
    return NULL;
}

static void print_step(const moq_json *step)
{
    for (const moq_json *e = moq_json_first(step); e; e = moq_json_next(step, e))
        printf("%s%s", strcmp(e->key, "do") == 0 || strcmp(e->key, "what") == 0 ? " " : strcmp(e->key, "on") == 0 ? " on " : " to ", moq_json_string(e));
}

/* Every step of a plan; the index of the one that failed, -1: all were done. tell: print them. */
static int carry_out(world *w, const moq_json *plan, int tell)
{
    int index = 0;
    for (const moq_json *step = moq_json_first(plan); step; step = moq_json_next(plan, step), index++) {
        const char *why = act(w, step);
        if (tell) {
            printf("  %s", why ? "failed:" : "done:  ");
            print_step(step);
            if (why) printf(" (%s)", why);
            putchar('\n');
        }
        if (why) return index;
    }
    return -1;
}

/* After a failure: what is in the hand is put down, what was carried before stays where it was put, and the robot asks where that is
   which it did not find. */
static void look(world *belief, world *real, const moq_json *step)
{
    static const char *const keys[] = {"what", "to"};
    const char *here = find(real, "robot")->place;
    snprintf(find(belief, "robot")->place, NAME, "%s", here);
    for (int i = 0; i < real->count; i++) {
        thing *t = &real->at[i], *b = find(belief, t->name);
        if (t->place[0] == 0) {
            printf("  done:   put down %s at %s\n", t->name, here);
            snprintf(t->place, NAME, "%s", here);
        }
        if (b && is_object(t) && strcmp(t->place, here) == 0) snprintf(b->place, NAME, "%s", here);
    }
    for (int i = 0; i < 2; i++) {
        const char *name = moq_json_string(moq_json_find(step, keys[i]));
        thing *b = name ? find(belief, name) : NULL, *t = name ? find(real, name) : NULL;
        if (b && t && strcmp(b->place, t->place) != 0) {
            printf("  seen:   %s at %s\n", name, t->place);
            snprintf(b->place, NAME, "%s", t->place);
        }
    }
}

/* A request until it is done. `surprise` "red mug at kitchen sink": where something really is. */
static int errand(llm *bot, const char *scene, const char *request, const char *surprise, moq_error *err)
{
    static text answer;
    static world belief, truth, moved;
    char memory[2048];
    int failed = 0;
    if (!read_scene(&belief, scene)) return 0;
    truth = belief;
    if (surprise) {
        snprintf(memory, sizeof memory, "%s; robot at x", surprise);
        read_scene(&moved, memory);
        snprintf(find(&truth, moved.at[0].name)->place, NAME, "%s", moved.at[0].place);
    }
    printf("\nscene:  %s\n", scene);
    if (surprise) printf("but:    %s\n", surprise);
    printf("user:   %s\n", request);
    for (int attempt = 0; attempt < 4; attempt++) {
        write_scene(&belief, memory, sizeof memory);
        if (!ask(bot, &belief, memory, request, &answer, err)) return 0;
        moq_json_doc *doc = moq_json_parse(answer.s, answer.n, MOQ_JSON_STRICT, 0, "plan", NULL, err);
        if (!doc) return 0;
        const moq_json *root = moq_json_root(doc), *plan = moq_json_find(root, "plan");
        printf("robot:  %s\n", moq_json_string(moq_json_find(root, "say")));
        failed = carry_out(&truth, plan, 1);
        if (failed >= 0) look(&belief, &truth, moq_json_at(plan, (size_t)failed));
        moq_json_destroy(doc);
        if (failed < 0) { printf("  finished after %d plan%s\n", attempt + 1, attempt ? "s" : ""); return 1; }
    }
    printf("  given up\n");
    return 1;
}

/* ---- measuring ---- */

static int measure(llm *bot, const char *path, moq_error *err)
{
    static text answer;
    size_t bytes;
    char *all = moq_read_file(path, (uint64_t)1 << 30, NULL, &bytes, err), *end;
    int asked = 0, valid = 0, done = 0, right = 0, ok = all != NULL;
    for (char *line = all; ok && *line; line = end) {
        size_t n = strcspn(line, "\n");
        end = line + n + (line[n] == '\n');
        moq_json_doc *row = moq_json_parse(line, n, MOQ_JSON_STRICT, 0, path, NULL, err), *doc = NULL;
        const char *scene = moq_json_string(moq_json_find(moq_json_root(row), "system")), *user = moq_json_string(moq_json_find(moq_json_root(row), "user"));
        const char *want = moq_json_string(moq_json_find(moq_json_root(row), "assistant"));
        world w;
        ok = row && scene && user && want && read_scene(&w, scene) && ask(bot, &w, scene, user, &answer, err);
        if (ok) {
            asked++;
            doc = moq_json_parse(answer.s, answer.n, MOQ_JSON_STRICT, 0, "plan", NULL, err);
            const moq_json *plan = moq_json_find(moq_json_root(doc), "plan");
            valid += plan != NULL && plan->type == MOQ_JSON_ARRAY && moq_json_string(moq_json_find(moq_json_root(doc), "say")) != NULL;
            done += plan != NULL && carry_out(&w, plan, 0) < 0;
            right += strcmp(answer.s, want) == 0;
        }
        moq_json_destroy(doc);
        moq_json_destroy(row);
    }
    moq_release(NULL, all, all ? bytes + 1 : 0);
    if (ok) printf("%d requests: %d valid plans, %d carried out, %d exactly right\n", asked, valid, done, right);
    return ok;
}

int main(int argc, char **argv)
{
    moq_error err = {0};
    llm_desc desc = {0};
    int eval = argc > 2 && strcmp(argv[argc - 2], "--eval") == 0, folders = argc - 1 - 2 * eval, ok;
    desc.path = folders > 0 ? argv[1] : "demo-model";
    llm *bot = llm_open(&desc, &err);
    if (!bot) { printf("%s\nusage: %s [FOLDER] [--eval FILE]\n", err.text, argv[0]); return 1; }
    if (eval) ok = measure(bot, argv[argc - 1], &err);
    else {
        ok = errand(bot, "green plate at bedroom drawer; green spoon at kitchen fridge; Chen at hallway coat rack; robot at garage toolbox",
                    "can you give the green plate to Chen?", NULL, &err) &&
             errand(bot, "red mug at kitchen table; blue key at garage rack; Ana at bathroom cupboard; robot at garage rack",
                    "please put the red mug on the hallway bench", "red mug at kitchen sink", &err) &&
             errand(bot, "yellow book at bedroom shelf; white lamp at hallway cabinet; Ben at kitchen table; robot at hallway bench",
                    "Ben wants the yellow book, please", "Ben at living room sofa", &err);
    }
    if (!ok) puts(err.code != MOQ_OK ? err.text : "a scene is not of the form \"thing at place; ...; robot at place\"");
    llm_close(bot);
    return ok ? 0 : 1;
}
