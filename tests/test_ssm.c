/* test_ssm.c - state-space mixers and head copies of the CPU backend against a slow second implementation in double. */
#include "test.h"

enum { MOST_ROWS = 20, SLOTS = 3 };

typedef struct mixer { moq_ssm_desc d; int64_t inner, width, in; float *data[6]; } mixer;

static float *random_vector(int64_t n, float scale, float shift)
{
    float *v = (float *)malloc((size_t)n * sizeof *v);
    for (int64_t i = 0; v && i < n; i++) v[i] = test_uniform() * scale + shift;
    return v;
}

static moq_view view_of(const float *v, int64_t n)
{
    moq_view w;
    w.data = v;
    w.dtype = MOQ_F32;
    w.count = (uint64_t)n;
    return w;
}

static void mixer_make(mixer *m, int heads, int dim, int state, int groups, int conv, int bias)
{
    memset(m, 0, sizeof *m);
    m->d.name = "layers.0.mixer";
    m->d.slots = SLOTS;
    m->d.heads = heads;
    m->d.head_dim = dim;
    m->d.state = state;
    m->d.groups = groups;
    m->d.conv = conv;
    m->d.eps = 1e-5f;
    m->inner = (int64_t)heads * dim;
    m->width = m->inner + 2 * (int64_t)groups * state;
    m->in = m->inner + m->width + heads;
    m->data[0] = random_vector(m->width * conv, 0.8f, 0);
    m->data[1] = random_vector(m->width, 0.5f, 0);
    m->data[2] = random_vector(heads, 1, -1);
    m->data[3] = random_vector(heads, 1, 0.5f);
    m->data[4] = random_vector(heads, 1, 0);
    m->data[5] = random_vector(m->inner, 1, 1);
    m->d.conv_weight = view_of(m->data[0], m->width * conv);
    if (bias) m->d.conv_bias = view_of(m->data[1], m->width);
    m->d.dt_bias = view_of(m->data[2], heads);
    m->d.a_log = view_of(m->data[3], heads);
    m->d.d = view_of(m->data[4], heads);
    m->d.norm = view_of(m->data[5], m->inner);
}

static void mixer_free(mixer *m)
{
    for (int i = 0; i < 6; i++) free(m->data[i]);
}

/* Channel i of the convolution of token t, from the whole text x [tokens, in]. */
static double oracle_channel(const mixer *m, const float *x, int64_t t, int64_t i)
{
    double sum = m->d.conv_bias.data ? (double)m->data[1][i] : 0;
    for (int64_t k = 0; k < m->d.conv; k++) {
        int64_t at = t - (m->d.conv - 1) + k;
        if (at >= 0) sum += (double)m->data[0][i * m->d.conv + k] * (double)x[at * m->in + m->inner + i];
    }
    return sum / (1 + exp(-sum));
}

/* Token t of a text, its state computed from the first token on without a recurrence:
   S_t = sum over s <= t of exp(a * (dt_{s+1} + .. + dt_t)) * dt_s * x_s B_s^T. */
static void oracle(const mixer *m, const float *x, int64_t t, double *y)
{
    const moq_ssm_desc *d = &m->d;
    int64_t part = m->inner / d->groups;
    for (int64_t h = 0; h < d->heads; h++) {
        int64_t g = h / (d->heads / d->groups);
        double a = -exp((double)m->data[3][h]), later = 0;
        for (int64_t p = 0; p < d->head_dim; p++) y[h * d->head_dim + p] = (double)m->data[4][h] * oracle_channel(m, x, t, h * d->head_dim + p);
        for (int64_t s = t; s >= 0; s--) {
            double dt = log(1 + exp((double)x[s * m->in + m->inner + m->width + h] + (double)m->data[2][h])), bc = 0;
            if (dt < (double)d->dt_min) dt = (double)d->dt_min;
            if (d->dt_max > 0 && dt > (double)d->dt_max) dt = (double)d->dt_max;
            for (int64_t n = 0; n < d->state; n++)
                bc += oracle_channel(m, x, s, m->inner + g * d->state + n) * oracle_channel(m, x, t, m->inner + (d->groups + g) * d->state + n);
            for (int64_t p = 0; p < d->head_dim; p++)
                y[h * d->head_dim + p] += exp(a * later) * dt * oracle_channel(m, x, s, h * d->head_dim + p) * bc;
            later += dt;
        }
    }
    for (int64_t g = 0; g < d->groups; g++) {
        double squares = 0;
        for (int64_t i = g * part; i < (g + 1) * part; i++) {
            double z = (double)x[t * m->in + i];
            y[i] *= z / (1 + exp(-z));
            squares += y[i] * y[i];
        }
        for (int64_t i = g * part; i < (g + 1) * part; i++) y[i] *= (double)m->data[5][i] / sqrt(squares / (double)part + (double)d->eps);
    }
}

static void check_row(const mixer *m, const float *x, int64_t t, const float *got)
{
    double want[512], top = 0, worst = 0;
    CHECK(m->inner <= 512);
    oracle(m, x, t, want);
    for (int64_t i = 0; i < m->inner; i++) {
        top = fabs(want[i]) > top ? fabs(want[i]) : top;
        worst = fabs(want[i] - (double)got[i]) > worst ? fabs(want[i] - (double)got[i]) : worst;
    }
    CHECK(top > 1e-3);
    if (!(worst <= 2e-5 * top)) fprintf(stderr, "token %d: off by %g of %g\n", (int)t, worst, top);
    CHECK(worst <= 2e-5 * top);
}

static moq_backend *backend_of(int threads)
{
    moq_cpu_desc d;
    moq_error e;
    memset(&d, 0, sizeof d);
    d.threads = threads;
    moq_backend *be = moq_cpu_backend(&d, &e);
    CHECK(be != NULL);
    return be;
}

typedef struct ssm_case { int heads, dim, state, groups, conv, bias; float dt_min, dt_max; } ssm_case;

static const ssm_case ssm_cases[] = {{8, 32, 16, 2, 4, 1, 0, 0}, {6, 5, 7, 3, 4, 0, 0, 0}, {4, 16, 128, 1, 2, 1, 0.1f, 0.4f}, {3, 9, 1, 3, 1, 1, 0, 0.2f}};

/* Whole texts, single tokens, and rows of several slots mixed in one call give what the formula gives. */
static void test_ssm_formula(void)
{
    for (size_t i = 0; i < sizeof ssm_cases / sizeof *ssm_cases; i++) {
        const ssm_case *k = &ssm_cases[i];
        mixer m;
        moq_error e;
        int32_t slot[2 * MOST_ROWS], pos[2 * MOST_ROWS];
        moq_batch b = {MOST_ROWS, MOST_ROWS - 1, slot, pos};
        moq_backend *be = backend_of(i == 0 ? 3 : 1);
        mixer_make(&m, k->heads, k->dim, k->state, k->groups, k->conv, k->bias);
        m.d.dt_min = k->dt_min;
        m.d.dt_max = k->dt_max;
        moq_ssm *s = be->ssm_create(be, &m.d, &e);
        CHECK(s != NULL && be->ssm_bytes(be, &m.d) > (size_t)(m.inner * k->state * SLOTS * 4));
        float *x = random_vector(MOST_ROWS * m.in, 2, 0), *y = random_vector(2 * MOST_ROWS * m.inner, 1, 0), *mix = random_vector(2 * MOST_ROWS * m.in, 1, 0);
        for (int t = 0; t < MOST_ROWS; t++) { slot[t] = 1; pos[t] = t; }
        for (int again = 0; again < 2; again++) { /* position 0 forgets what the slot held */
            be->ssm(be, s, &b, x, y);
            for (int t = 0; t < MOST_ROWS; t++) check_row(&m, x, t, y + t * m.inner);
        }
        for (int t = 0; t < MOST_ROWS; t++) { /* the same text in slots 0 and 2, one token apart, token by token */
            b.rows = t ? 2 : 1;
            memcpy(mix, x + t * m.in, (size_t)m.in * sizeof *x);
            slot[0] = 2;
            pos[0] = t;
            if (t) memcpy(mix + m.in, x + (t - 1) * m.in, (size_t)m.in * sizeof *x);
            slot[1] = 0;
            pos[1] = t - 1;
            be->ssm(be, s, &b, mix, y);
            check_row(&m, x, t, y);
            if (t) check_row(&m, x, t - 1, y + m.inner);
        }
        be->ssm_copy(be, s, 1, 0); /* slot 0 is one token behind */
        b.rows = 1;
        slot[0] = 1;
        pos[0] = MOST_ROWS - 1;
        be->ssm(be, s, &b, x + (MOST_ROWS - 1) * m.in, y);
        check_row(&m, x, MOST_ROWS - 1, y);
        slot[0] = SLOTS; /* a slot that is not there: zeros, and nothing written elsewhere */
        be->ssm(be, s, &b, x, y);
        for (int64_t j = 0; j < m.inner; j++) CHECK(y[j] == 0);
        be->ssm_release(be, s);
        moq_backend_destroy(be);
        free(x);
        free(y);
        free(mix);
        mixer_free(&m);
    }
}

static void test_ssm_threads(void)
{
    mixer m;
    moq_error e;
    int32_t slot[MOST_ROWS], pos[MOST_ROWS];
    moq_batch b = {MOST_ROWS, MOST_ROWS - 1, slot, pos};
    float *y[2];
    mixer_make(&m, 16, 32, 64, 8, 4, 1);
    float *x = random_vector(MOST_ROWS * m.in, 2, 0);
    for (int t = 0; t < MOST_ROWS; t++) { slot[t] = 0; pos[t] = t; }
    for (int i = 0; i < 2; i++) {
        moq_backend *be = backend_of(i ? 4 : 1);
        moq_ssm *s = be->ssm_create(be, &m.d, &e);
        y[i] = random_vector(MOST_ROWS * m.inner, 1, 0);
        CHECK(s != NULL);
        be->ssm(be, s, &b, x, y[i]);
        be->ssm_release(be, s);
        moq_backend_destroy(be);
    }
    CHECK(memcmp(y[0], y[1], (size_t)(MOST_ROWS * m.inner) * sizeof(float)) == 0);
    free(y[0]);
    free(y[1]);
    free(x);
    mixer_free(&m);
}

/* What cannot be made is refused with the layer's name. */
static void test_ssm_refuses(void)
{
    moq_error e;
    moq_backend *be = backend_of(1);
    for (int i = 0; i < 9; i++) {
        mixer m;
        mixer_make(&m, 4, 8, 4, 2, 4, 1);
        if (i == 0) m.d.groups = 3;
        if (i == 1) m.d.heads = 0;
        if (i == 2) m.d.slots = INT32_MAX, m.d.state = INT32_MAX;
        if (i == 3) m.d.conv_weight.count--;
        if (i == 4) m.d.conv_bias.count = 1;
        if (i == 5) m.d.a_log.data = NULL;
        if (i == 6) m.d.norm.dtype = MOQ_F4;
        if (i == 7) m.d.conv = 0;
        if (i == 8) m.d.dt_bias.count = 5;
        CHECK(be->ssm_create(be, &m.d, &e) == NULL);
        CHECK(e.code != MOQ_OK && strstr(e.text, "layers.0.mixer") != NULL);
        mixer_free(&m);
    }
    be->ssm_release(be, NULL);
    moq_backend_destroy(be);
}

static void test_ssm_failing_allocations(void)
{
    mixer m;
    moq_cpu_desc d;
    moq_error e;
    int done = 0;
    memset(&d, 0, sizeof d);
    d.threads = 1;
    d.allocator = test_allocator();
    mixer_make(&m, 64, 32, 16, 1, 4, 1);
    for (long k = 1; k < 20 && !done; k++) {
        moq_backend *be = moq_cpu_backend(&d, &e);
        CHECK(be != NULL);
        test_state.fail_at = k;
        moq_ssm *s = be->ssm_create(be, &m.d, &e);
        done = test_state.fail_at > 0;
        test_state.fail_at = 0;
        CHECK((s != NULL) == done && e.code == (done ? MOQ_OK : MOQ_E_NOMEM));
        be->ssm_release(be, s);
        moq_backend_destroy(be);
        CHECK_INT(test_state.live_allocs, 0);
    }
    CHECK(done);
    mixer_free(&m);
}

static void test_copy_heads(void)
{
    enum { ROWS = 3, HEADS = 4, WIDTH = 5 };
    float x[ROWS * 40], y[ROWS * 50];
    moq_backend *be = backend_of(1);
    for (int step = 0; step <= 7; step += 7) {
        moq_copy_desc c = {x, y + 2, 40, 50, step, 9, ROWS, HEADS, WIDTH};
        for (int i = 0; i < ROWS * 40; i++) x[i] = (float)i;
        for (int i = 0; i < ROWS * 50; i++) y[i] = -1;
        be->copy_heads(be, &c);
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 50; i++) {
                int at = i - 2, head = at >= 0 ? at / 9 : HEADS, in = at >= 0 ? at % 9 : WIDTH;
                CHECK_INT(y[r * 50 + i], head < HEADS && in < WIDTH ? r * 40 + head * step + in : -1);
            }
    }
    moq_backend_destroy(be);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_ssm_formula);
    RUN(test_ssm_threads);
    RUN(test_ssm_refuses);
    RUN(test_ssm_failing_allocations);
    RUN(test_copy_heads);
    return test_end();
}
