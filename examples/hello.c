/* hello.c - one layer of a checkpoint folder, without an engine.

       cc -O2 hello.c -o hello -lm -pthread
       ./hello [FOLDER [MODULE]]

   Prints what the layer is and the length of y = x W^T for an x of ones. */
#define MODELOPT_Q_IMPLEMENTATION
#include "../modelopt_q.h"
#include <math.h>
#include <stdio.h>

int main(int argc, char **argv)
{
    const char *folder = argc > 1 ? argv[1] : "demo-model";
    const char *module = argc > 2 ? argv[2] : "model.layers.0.mlp.up_proj";
    int status = 1;
    moq_error err;
    moq_linear layer;                                    /* plain data: views, shape, scheme */
    moq_checkpoint *ck = moq_open(folder, NULL, &err);   /* maps the files, touches only headers */
    moq_backend *be = ck ? moq_cpu_backend(NULL, &err) : NULL;
    moq_weight *w = NULL;

    if (be && moq_find_linear(ck, module, &layer, &err) == MOQ_OK)
        w = be->prepare_linear(be, &layer, 1, &err);     /* repacked once for this backend */
    if (w && be->reserve(be, 1, &err) == MOQ_OK) {
        char name[64];
        double sum = 0;
        float *x = (float *)moq_allocate(NULL, (size_t)layer.cols * sizeof *x);
        float *y = (float *)moq_allocate(NULL, (size_t)layer.rows * sizeof *y);
        for (int64_t i = 0; x && i < layer.cols; i++) x[i] = 1;
        if (x && y) be->linear(be, w, x, 1, y);          /* y[rows] = x[cols] * W^T */
        for (int64_t i = 0; y && i < layer.rows; i++) sum += (double)y[i] * (double)y[i];
        moq_scheme_name(&layer.scheme, name, sizeof name);
        printf("%s: %s, %lld x %lld, |y| = %.4f\n", layer.name, name, (long long)layer.rows, (long long)layer.cols, sqrt(sum));
        status = x && y ? 0 : 1;
        moq_release(NULL, x, (size_t)layer.cols * sizeof *x);
        moq_release(NULL, y, (size_t)layer.rows * sizeof *y);
    } else puts(err.text);
    if (w) be->release_weight(be, w);
    moq_backend_destroy(be);                             /* closing or destroying NULL is allowed */
    moq_close(ck);
    return status;
}
