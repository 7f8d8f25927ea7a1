/* moq_picture.h - the part of moq.c that draws: inspect --png.

   moq.c includes it once; it is no interface. The PNG writer and the letters come from the system's stb package (libstb-dev), which the
   Makefile looks for; without it the option says so. */

/* ------------------------------------------------------------------------------------------------
   >>picture         where the bits and the error went, layer by layer
   A row for each layer of the model: on the left the bytes of its parts, side by side and coloured by bits per weight; on the right a
   table of bits, or against a source of signal-to-noise ratios, with one column for each kind of part.
   ------------------------------------------------------------------------------------------------ */

#ifndef MOQ_PNG
static int draw_picture(const options *o, const moq_checkpoint *ck, const module_row *rows, size_t count)
{
    (void)ck; (void)rows; (void)count;
    return refuse("--png %s: this build cannot write pictures; install stb (Debian: libstb-dev) and run make -C tools again", o->png);
}
#else

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wsign-compare"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#endif
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_IMAGE_WRITE_STATIC
#include "stb_image_write.h"
#include "stb_easy_font.h"
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

typedef struct canvas { int w, h; uint8_t *rgb; } canvas;

typedef struct color { uint8_t r, g, b; } color;

static color rgb(int hex)
{
    color c;
    c.r = (uint8_t)(hex >> 16);
    c.g = (uint8_t)(hex >> 8 & 255);
    c.b = (uint8_t)(hex & 255);
    return c;
}

static void fill_rect(canvas *c, int x0, int y0, int x1, int y1, color k)
{
    for (int y = y0 < 0 ? 0 : y0; y < y1 && y < c->h; y++)
        for (int x = x0 < 0 ? 0 : x0; x < x1 && x < c->w; x++) {
            uint8_t *p = c->rgb + 3 * ((size_t)y * (size_t)c->w + (size_t)x);
            p[0] = k.r;
            p[1] = k.g;
            p[2] = k.b;
        }
}

/* Letters are rectangles of whole pixels, so they may be drawn at any whole scale. Returns the width. */
static int draw_text(canvas *c, int x, int y, int scale, const char *text, color k)
{
    static float quads[60000]; /* [quads][4][x, y, z, color] */
    char copy[200];
    snprintf(copy, sizeof copy, "%s", text);
    int n = stb_easy_font_print(0, 0, copy, NULL, quads, (int)sizeof quads);
    for (int i = 0; c && i < n; i++) {
        const float *q = quads + 16 * i;
        fill_rect(c, x + scale * (int)q[0], y + scale * (int)q[1], x + scale * (int)q[8], y + scale * (int)q[9], k);
    }
    return scale * stb_easy_font_width(copy);
}

static void draw_centered(canvas *c, int x0, int x1, int y, const char *text, color k)
{
    draw_text(c, x0 + (x1 - x0 - draw_text(NULL, 0, 0, 1, text, k)) / 2 + 1, y, 1, text, k);
}

/* ---- what is drawn ---- */

enum { MOST_KINDS = 24, MOST_LINES = 400 };   /* the last kind is "other": modules of no layer, and what would be one kind too many */

/* One part of one layer: all modules of that kind, experts together. */
typedef struct cell { uint64_t elements, bytes; distance d; int seen, compared; } cell;

typedef struct line { long layer; char name[24]; uint64_t bytes; cell cell[MOST_KINDS]; } line;

typedef struct picture {
    line *lines;
    int line_count, kind_count;
    char kinds[MOST_KINDS][24];
} picture;

/* "model.layers.3.mlp.experts.7.gate_proj" -> 3 and "exp gate"; what is in no layer is -1 and its own name. */
static void split_name(const char *name, long *layer, char *kind, size_t capacity)
{
    const char *at = strstr(name, "layers."), *last = strrchr(name, '.'), *experts = strstr(name, "experts.");
    char text[120];
    *layer = at ? strtol(at + 7, NULL, 10) : -1;
    snprintf(text, sizeof text, "%s%s", strstr(name, "shared_expert") ? "shared " : experts ? "exp " : "", last ? last + 1 : name);
    char *proj = strstr(text, "_proj");
    if (proj) *proj = 0;
    else if (at && !experts && last && strcmp(last, ".gate") == 0) snprintf(text, sizeof text, "router");
    snprintf(kind, capacity, "%.*s", (int)capacity - 1, text);
}

/* The place of a kind, in the order in which a layer computes; the last place of all, for the moment, when there are too many. */
static int find_column(picture *p, const char *kind)
{
    for (int i = 0; i < p->kind_count; i++)
        if (strcmp(p->kinds[i], kind) == 0) return i;
    if (p->kind_count == MOST_KINDS - 1) return MOST_KINDS - 1;
    snprintf(p->kinds[p->kind_count], sizeof p->kinds[0], "%s", kind);
    return p->kind_count++;
}

/* The line of a layer, in ascending order; lines of no layer come first (embedding) or last (head). */
static line *find_line(picture *p, long layer, const char *name)
{
    for (int i = 0; i < p->line_count; i++)
        if (p->lines[i].layer == layer && (layer >= 0 || strcmp(p->lines[i].name, name) == 0)) return &p->lines[i];
    if (p->line_count == MOST_LINES) return NULL;
    line *l = &p->lines[p->line_count++];
    memset(l, 0, sizeof *l);
    l->layer = layer;
    snprintf(l->name, sizeof l->name, "%s", name);
    return l;
}

static int lines_by_place(const void *a, const void *b)
{
    const line *x = (const line *)a, *y = (const line *)b;
    int px = x->layer >= 0 ? 1 : strstr(x->name, "embed") ? 0 : 2, py = y->layer >= 0 ? 1 : strstr(y->name, "embed") ? 0 : 2;
    if (px != py) return px - py;
    return x->layer < y->layer ? -1 : x->layer > y->layer;
}

/* "other" moves next to the last kind that there is. */
static void close_columns(picture *p)
{
    int used = 0, to = p->kind_count;
    for (int i = 0; i < p->line_count; i++) used |= p->lines[i].cell[MOST_KINDS - 1].seen;
    if (!used) return;
    snprintf(p->kinds[to], sizeof p->kinds[0], "other");
    p->kind_count = to + 1;
    for (int i = 0; i < p->line_count && to < MOST_KINDS - 1; i++) {
        p->lines[i].cell[to] = p->lines[i].cell[MOST_KINDS - 1];
        memset(&p->lines[i].cell[MOST_KINDS - 1], 0, sizeof(cell));
    }
}

static void gather(picture *p, const module_row *rows, size_t count, const moq_checkpoint *source)
{
    static const char *const order[] = {"in", "out", "q_a", "q_b", "kv_a", "kv_b", "q", "k", "v", "qkv", "o", "gate_up", "gate", "up", "down", "router",
                                        "exp gate_up", "exp gate", "exp up", "exp down", "shared gate", "shared up", "shared down"};
    for (int pass = 0; pass < COUNT(order) + 1; pass++)
        for (size_t i = 0; i < count; i++) {
            char kind[24];
            long layer;
            moq_linear truth;
            split_name(rows[i].l.name, &layer, kind, sizeof kind);
            int named = 0;
            for (int k = 0; k < COUNT(order); k++) named |= strcmp(kind, order[k]) == 0;
            if (pass < COUNT(order) ? strcmp(kind, order[pass]) != 0 : named) continue;
            int column = layer < 0 ? MOST_KINDS - 1 : find_column(p, kind);
            line *l = find_line(p, layer, kind);
            if (!l) continue;
            cell *c = &l->cell[column];
            distance d;
            c->seen = 1;
            c->elements += rows[i].elements;
            c->bytes += rows[i].weight_bytes;
            l->bytes += rows[i].weight_bytes;
            if (!source || moq_find_linear(source, rows[i].l.name, &truth, NULL) != MOQ_OK || !module_distance(&rows[i].l, &truth, &d)) continue;
            c->compared = 1;
            c->d.error += d.error;
            c->d.power += d.power;
        }
    qsort(p->lines, (size_t)p->line_count, sizeof *p->lines, lines_by_place);
    close_columns(p);
}

/* ---- colours ---- */

static double bits_of(const cell *c) { return c->elements ? 8.0 * (double)c->bytes / (double)c->elements : 0; }

static color mix(color a, color b, double t)
{
    color c;
    c.r = (uint8_t)(a.r + (b.r - a.r) * t);
    c.g = (uint8_t)(a.g + (b.g - a.g) * t);
    c.b = (uint8_t)(a.b + (b.b - a.b) * t);
    return c;
}

/* Few bits are dark teal, many are pale sand; between the stops colours are mixed. */
static color bits_color(double bits)
{
    static const struct { double bits; int hex; } stops[] = {{3, 0x0b4f6c}, {4.5, 0x147d92}, {6.3, 0x45a29e}, {8.3, 0x9cc5a1}, {16, 0xe8dcb5}};
    for (int i = 1; i < COUNT(stops); i++)
        if (bits <= stops[i].bits) {
            double t = (bits - stops[i - 1].bits) / (stops[i].bits - stops[i - 1].bits);
            return mix(rgb(stops[i - 1].hex), rgb(stops[i].hex), t < 0 ? 0 : t);
        }
    return rgb(stops[COUNT(stops) - 1].hex);
}

/* Noisy is dark red, 20 dB (a tenth) amber, 40 dB and more pale green; exact is white. */
static color snr_color(double db)
{
    static const struct { double db; int hex; } stops[] = {{10, 0x9b2226}, {17, 0xd9662b}, {23, 0xf2b84b}, {32, 0xe9e3a6}, {45, 0xb7d7a8}};
    if (isinf(db)) return rgb(0xffffff);
    for (int i = 1; i < COUNT(stops); i++)
        if (db <= stops[i].db) {
            double t = (db - stops[i - 1].db) / (stops[i].db - stops[i - 1].db);
            return mix(rgb(stops[i - 1].hex), rgb(stops[i].hex), t < 0 ? 0 : t);
        }
    return rgb(stops[COUNT(stops) - 1].hex);
}

static color ink_on(color c) { return c.r * 3 + c.g * 6 + c.b < 1150 ? rgb(0xffffff) : rgb(0x1d2b33); }

static double snr_of(const cell *c) { return c->d.error > 0 ? 10 * log10(c->d.power / c->d.error) : INFINITY; }

/* ---- drawing ---- */

enum { PIC_NAME = 110, PIC_BARS = 560, PIC_CELL = 72, PIC_LINE = 20, PIC_TOP = 112, PIC_BOTTOM = 104, PIC_EDGE = 28 };

static void draw_bars(canvas *c, const picture *p, int y, const line *l, uint64_t most)
{
    uint64_t before = 0;
    for (int k = 0; k < p->kind_count; k++) {
        const cell *e = &l->cell[k];
        if (!e->seen) continue;
        int x0 = PIC_NAME + (int)((double)PIC_BARS * (double)before / (double)most), x1;
        before += e->bytes;
        x1 = PIC_NAME + (int)((double)PIC_BARS * (double)before / (double)most);
        color fill = bits_color(bits_of(e));
        fill_rect(c, x0, y + 1, x1 - 1 > x0 ? x1 - 1 : x0 + 1, y + PIC_LINE - 2, fill);
        const char *name = l->layer < 0 ? l->name : p->kinds[k];
        if (draw_text(NULL, 0, 0, 1, name, fill) + 8 < x1 - x0) draw_centered(c, x0, x1, y + 6, name, ink_on(fill));
    }
}

static void draw_cells(canvas *c, const picture *p, int x, int y, const line *l, int snr)
{
    char text[24];
    for (int k = 0; k < p->kind_count; k++, x += PIC_CELL) {
        const cell *e = &l->cell[k];
        if (!e->seen || (snr && !e->compared)) { fill_rect(c, x, y + 1, x + PIC_CELL - 2, y + PIC_LINE - 2, rgb(0xf1efe9)); continue; }
        double v = snr ? snr_of(e) : bits_of(e);
        color fill = snr ? snr_color(v) : bits_color(v);
        fill_rect(c, x, y + 1, x + PIC_CELL - 2, y + PIC_LINE - 2, fill);
        snprintf(text, sizeof text, isinf(v) ? "exact" : snr ? "%.1f" : "%.2f", v);
        draw_centered(c, x, x + PIC_CELL - 2, y + 6, text, ink_on(fill));
    }
}

static void draw_legend(canvas *c, int x, int y, int snr)
{
    static const double bits[] = {4.25, 4.5, 6.25, 8.25, 16}, dbs[] = {10, 15, 20, 25, 30, 40, 50};
    const double *values = snr ? dbs : bits;
    int n = snr ? COUNT(dbs) : COUNT(bits);
    color ink = rgb(0x1d2b33);
    char text[24];
    draw_text(c, x, y, 1, snr ? "signal-to-noise ratio of the weights, dB (20 dB: errors of a tenth)" : "bits per weight, scales included", ink);
    for (int i = 0; i < n; i++) {
        color fill = snr ? snr_color(values[i]) : bits_color(values[i]);
        fill_rect(c, x + 58 * i, y + 16, x + 58 * i + 56, y + 38, fill);
        snprintf(text, sizeof text, "%g", values[i]);
        draw_centered(c, x + 58 * i, x + 58 * i + 56, y + 23, text, ink_on(fill));
    }
}

static void draw_all(canvas *c, const picture *p, const options *o, const moq_checkpoint *ck, int snr)
{
    const moq_info *info = moq_get_info(ck);
    color ink = rgb(0x1d2b33), soft = rgb(0x6b7780);
    char text[200];
    const char *source = snr && strrchr(o->against, '/') && strrchr(o->against, '/')[1] ? strrchr(o->against, '/') + 1 : snr ? o->against : "";
    uint64_t most = 1, elements = 0, bytes = 0;
    int table = PIC_NAME + PIC_BARS + PIC_EDGE, y = PIC_TOP;
    for (int i = 0; i < p->line_count; i++) {
        if (p->lines[i].bytes > most) most = p->lines[i].bytes;
        for (int k = 0; k < p->kind_count; k++) elements += p->lines[i].cell[k].elements;
        bytes += p->lines[i].bytes;
    }
    fill_rect(c, 0, 0, c->w, c->h, rgb(0xfbfaf7));
    draw_text(c, PIC_EDGE, 22, 2, moq_get_name(ck), ink);
    snprintf(text, sizeof text, "%s   %s %s   %.1f MB of weights   %.2f bits per weight%s%s", info->model_type, info->family_name, info->quant_algo,
             (double)bytes / 1e6, elements ? 8.0 * (double)bytes / (double)elements : 0.0, snr ? "   against " : "", snr ? source : "");
    draw_text(c, PIC_EDGE, 52, 1, text, soft);
    snprintf(text, sizeof text, "bytes of each layer (full width: %.*f MB)", most < 10000000 ? 3 : 1, (double)most / 1e6);
    draw_text(c, PIC_NAME, PIC_TOP - 18, 1, text, soft);
    for (int k = 0; k < p->kind_count; k++) draw_centered(c, table + k * PIC_CELL, table + (k + 1) * PIC_CELL, PIC_TOP - 18, p->kinds[k], soft);
    draw_text(c, table, PIC_TOP - 36, 1, snr ? "error of each part: signal-to-noise ratio in dB" : "bits per weight of each part", ink);
    draw_text(c, PIC_NAME, PIC_TOP - 36, 1, "where the bytes are", ink);
    for (int i = 0; i < p->line_count; i++, y += PIC_LINE) {
        const line *l = &p->lines[i];
        if (l->layer >= 0) snprintf(text, sizeof text, "layer %ld", l->layer);
        else snprintf(text, sizeof text, "%s", l->name);
        for (size_t n = strlen(text); n > 1 && draw_text(NULL, 0, 0, 1, text, ink) > PIC_NAME - PIC_EDGE - 4; n--) snprintf(text + n - 2, 2, ".");
        draw_text(c, PIC_EDGE, y + 6, 1, text, ink);
        draw_bars(c, p, y, l, most);
        draw_cells(c, p, table, y, l, snr);
    }
    draw_legend(c, PIC_NAME, y + 24, 0);
    if (snr) draw_legend(c, table, y + 24, 1);
}

static int draw_picture(const options *o, const moq_checkpoint *ck, const module_row *rows, size_t count)
{
    picture p;
    canvas c;
    moq_error err;
    int bad = 0;
    moq_checkpoint *source = o->against ? open_folder(o->against, 0, NULL, 0, &err) : NULL;
    if (o->against && !source) return refuse_error(o->against, &err);
    memset(&p, 0, sizeof p);
    p.lines = (line *)take(MOST_LINES, sizeof *p.lines);
    gather(&p, rows, count, source);
    c.w = PIC_NAME + PIC_BARS + PIC_EDGE + (p.kind_count > 7 ? p.kind_count : 7) * PIC_CELL + PIC_EDGE;
    c.h = PIC_TOP + p.line_count * PIC_LINE + PIC_BOTTOM;
    c.rgb = (uint8_t *)take((size_t)c.w * (size_t)c.h, 3);
    draw_all(&c, &p, o, ck, source != NULL);
    if (stop_requested) bad = refuse("stopped");
    else if (!stbi_write_png(o->png, c.w, c.h, 3, c.rgb, c.w * 3)) bad = refuse("%s: the picture cannot be written: %s", o->png, strerror(errno));
    moq_close(source);
    free(c.rgb);
    free(p.lines);
    return bad;
}
#endif
