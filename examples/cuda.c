/* cuda.c - chat.c on an NVIDIA GPU: the line that makes the backend is new.

       nvcc -O2 -arch=native cuda.c ../modelopt_q_cuda.cu -o cuda          H100, H200: -gencode=arch=compute_90a,code=sm_90a
       ./cuda [FOLDER]

   Prints three scenes with a request each, the plan as JSON while it is generated, and the tokens per second. */
#define MODELOPT_Q_IMPLEMENTATION
#include "../modelopt_q.h"
#define LLM_IMPLEMENTATION
#include "llm.h"
#include <stdio.h>

static const struct { const char *scene, *request; } tasks[] = {
    {"green umbrella at hallway bench; green plate at bedroom drawer; green spoon at kitchen fridge; Chen at hallway coat rack; robot at garage toolbox",
     "can you give the green plate to Chen?"},
    {"purple lamp at kitchen table; purple key at garage rack; black key at kitchen counter; red book at hallway bench; green mug at kitchen counter; Ana at bathroom cupboard; robot at garage rack",
     "i need you to move both the purple key and the green mug to the hallway coat rack."},
    {"yellow apple at living room tv stand; purple lamp at kitchen counter; blue mug at hallway cabinet; purple book at living room armchair; Juno at bathroom washer; robot at bedroom shelf",
     "i need you to bring the black pillow to the bedroom desk for me"}
};

int main(int argc, char **argv)
{
    moq_error err;
    llm_desc desc = {0};                                /* zero means: choose for me */
    const char *piece;
    llm *bot;
    desc.path = argc > 1 ? argv[1] : "demo-model";
    if (!(desc.backend = moq_cuda_backend(0, &err))) { puts(err.text); return 1; } /* the first GPU */
    bot = llm_open(&desc, &err);
    if (!bot) { printf("%s\nusage: %s [FOLDER]\n", err.text, argv[0]); return 1; }
    for (int i = 0; i < 3; i++) {
        const llm_stats *s = llm_get_stats(bot);
        printf("scene  %s\nuser   %s\nrobot  ", tasks[i].scene, tasks[i].request);
        llm_say(bot, "system", tasks[i].scene);
        llm_say(bot, "user", tasks[i].request);
        while ((piece = llm_next(bot, &err)) != NULL) { /* whole characters, never half of one */
            fputs(piece, stdout);
            fflush(stdout);
            if (s->generated_tokens >= 512) break;      /* some models never end by themselves */
        }
        if (err.code != MOQ_OK) { puts(err.text); break; }
        printf("\n       %d tokens read, %d written, %.0f tokens per second\n\n", (int)s->prompt_tokens, (int)s->generated_tokens,
               s->generate_seconds > 0 ? (double)s->generated_tokens / s->generate_seconds : 0.0);
        llm_reset(bot);                                 /* the next scene is a new conversation */
    }
    llm_close(bot);
    moq_backend_destroy(desc.backend);
    return err.code == MOQ_OK ? 0 : 1;
}
