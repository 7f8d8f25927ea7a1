/* text.h - growable text, of which tests of tokenizers and grammars build their JSON. */
#ifndef TEXT_H
#define TEXT_H

typedef struct text { char *data; size_t count, capacity; } text;

static void add_bytes(text *t, const char *s, size_t n)
{
    if (t->count + n + 1 > t->capacity) {
        t->capacity = (t->count + n + 1) * 2;
        t->data = (char *)realloc(t->data, t->capacity);
    }
    memcpy(t->data + t->count, s, n);
    t->count += n;
    t->data[t->count] = 0;
}

static void add(text *t, const char *s) { add_bytes(t, s, strlen(s)); }

static void add_number(text *t, const char *before, long v)
{
    char s[100];
    snprintf(s, sizeof s, "%s%ld", before, v);
    add(t, s);
}
#endif
