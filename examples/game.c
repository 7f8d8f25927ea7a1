/* game.c - a game loop of 60 frames a second whose characters think without dropping a frame.

       cc -O2 game.c -o game -lm -pthread
       ./game [FOLDER [SECONDS]]

   Three robots share one model. Every frame moves and draws the world, then gives all of their minds together 3 milliseconds; what they
   say appears as it comes. Into a pipe nothing is drawn. Prints frame-time statistics at the end. */
#define MODELOPT_Q_IMPLEMENTATION
#include "../modelopt_q.h"
#define LLM_IMPLEMENTATION
#include "llm.h"
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#ifdef _WIN32
#include <io.h>
#include <windows.h>
#define isatty _isatty
#else
#include <unistd.h>
#endif

enum { ROBOTS = 3, FRAMES_A_SECOND = 60, THINKING = 3000 /* microseconds of a frame */, WIDTH = 72 };

static const struct { const char *name, *scene, *requests[2]; } cast[ROBOTS] = {
    {"Bolt", "green umbrella at hallway bench; green plate at bedroom drawer; green spoon at kitchen fridge; Chen at hallway coat rack; robot at garage toolbox",
     {"can you give the green plate to Chen?", "bring the green spoon to the hallway bench"}},
    {"Mica", "purple lamp at kitchen table; purple key at garage rack; black key at kitchen counter; red book at hallway bench; Ana at bathroom cupboard; robot at garage rack",
     {"put the purple lamp on the bedroom desk", "can you give the red book to Ana?"}},
    {"Tove", "yellow apple at living room tv stand; blue mug at hallway cabinet; purple book at living room armchair; Juno at bathroom washer; robot at bedroom shelf",
     {"bring the blue mug to Juno", "i need you to bring the black pillow to the bedroom desk for me"}}};

typedef struct robot {
    llm *mind;
    char speech[640], said[640]; /* as it comes; the last whole answer */
    int asked, silent; /* requests so far; frames since the last answer ended */
    double x, speed;
} robot;

static void sleep_until(double when)
{
    double left = when - moq_seconds();
#ifdef _WIN32
    if (left > 0) Sleep((DWORD)(left * 1e3));
#else
    struct timespec t;
    t.tv_sec = 0;
    t.tv_nsec = (long)(left * 1e9);
    if (left > 0) nanosleep(&t, NULL);
#endif
}

/* The world: robots roll to and fro. */
static void move(robot *r)
{
    r->x += r->speed / FRAMES_A_SECOND;
    if (r->x < 0 || r->x > WIDTH - 1) r->speed = -r->speed;
}

/* One cell a column and a line a robot, and below each what it says. */
static void draw(const robot *r, int frame)
{
    printf("\033[Hframe %d\033[K\n", frame);
    for (int i = 0; i < ROBOTS; i++)
        printf("%*s%s\033[K\n  %s\033[K\n\033[K\n", (int)r[i].x, "", cast[i].name, r[i].speech[0] ? r[i].speech : "...");
    fflush(stdout);
}

/* Takes what a robot has said; asks it for the next thing when it has been silent for a second. 1: it failed. */
static int listen(robot *r, int i, uint64_t *tokens)
{
    size_t n = strlen(r->speech);
    int state = llm_ready(r->mind);
    moq_error err;
    if (state == 1) snprintf(r->speech + n, sizeof r->speech - n, "%s", llm_piece(r->mind));
    if (state >= 0 || (r->asked && ++r->silent < FRAMES_A_SECOND)) return 0;
    llm_next(r->mind, &err); /* how the turn ended */
    if (r->asked && err.code != MOQ_OK) { puts(err.text); return 1; }
    *tokens += llm_get_stats(r->mind)->generated_tokens;
    memcpy(r->said, r->speech, sizeof r->said);
    llm_reset(r->mind);
    r->speech[0] = 0;
    r->silent = 0;
    return llm_say(r->mind, "system", cast[i].scene) < 0 || llm_say(r->mind, "user", cast[i].requests[r->asked++ % 2]) < 0;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
    int screen = isatty(1), seconds = argc > 2 ? atoi(argv[2]) : screen ? 20 : 4, frames = 0, late = 0, bad = 0;
    int most = (seconds > 0 && seconds < 3600 ? seconds : 20) * FRAMES_A_SECOND;
    double *work = (double *)malloc((size_t)most * sizeof *work), begin, sum = 0;
    uint64_t tokens = 0;
    moq_error err;
    llm_desc desc = {0};
    robot r[ROBOTS] = {0};
    desc.path = argc > 1 ? argv[1] : "demo-model";
    desc.context = 512;
    desc.slots = ROBOTS;                                          /* three conversations of one model */
    desc.threads = 1;                                             /* the game has better uses for the others */
    r[0].mind = work ? llm_open(&desc, &err) : NULL;
    for (int i = 0; i < ROBOTS && r[0].mind; i++) {
        if (i > 0) r[i].mind = llm_join(r[0].mind, &err);
        r[i].speed = 9 + 4 * i;
        bad |= !r[i].mind || listen(&r[i], i, &tokens);
    }
    if (!r[0].mind || bad) { printf("%s\nusage: %s [FOLDER [SECONDS]]\n", err.text, argv[0]); return 1; }
    if (screen) printf("\033[2J");
    for (begin = moq_seconds(); frames < most && !bad; frames++) {
        double start = moq_seconds();
        for (int i = 0; i < ROBOTS; i++) move(&r[i]);
        if (screen) draw(r, frames);
        llm_step_all(r[0].mind, THINKING);                        /* the only line that thinks */
        for (int i = 0; i < ROBOTS; i++) bad |= listen(&r[i], i, &tokens);
        sum += work[frames] = moq_seconds() - start;
        late += work[frames] > 1.0 / FRAMES_A_SECOND;
        sleep_until(begin + (frames + 1.0) / FRAMES_A_SECOND);
    }
    for (int i = 0; i < ROBOTS; i++) {
        tokens += llm_get_stats(r[i].mind)->generated_tokens;
        printf("%s, asked %d times: %s\n", cast[i].name, r[i].asked, r[i].said[0] ? r[i].said : r[i].speech); /* time may cut the last one */
    }
    qsort(work, (size_t)frames, sizeof *work, compare);
    printf("%d frames in %.1f s, %d late; work of a frame: mean %.2f ms, 99 %% under %.2f ms, longest %.2f ms; %d tokens a second\n", frames,
           moq_seconds() - begin, late, 1e3 * sum / frames, 1e3 * work[frames * 99 / 100], 1e3 * work[frames - 1], (int)((double)tokens / (moq_seconds() - begin)));
    for (int i = ROBOTS; i-- > 0;) llm_close(r[i].mind);
    free(work);
    return bad;
}
