/* Computes the layers of a file and counts the numbers that are not as NumPy has them: see test_machines.py, which writes the file. */
#include "threads.h"
#include "training.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A layer: these numbers, and behind them its arrays in the order in which `check` takes them. */
struct header { int64_t rows, dim, units, normalize, limit, each_output, has_bias, has_gain; };

static const char *at; /* where in the file we are */
static const void *take(int64_t bytes)
{
    const char *here = at;
    at += (bytes + 7) / 8 * 8;
    return here;
}
static const float *take_floats(int64_t count) { return take(4 * count); }

/* How many of the numbers that follow in the file are not these. NaN is NaN, whatever its other bits. */
static long differ(const float *found, int64_t count)
{
    const float *expected = take_floats(count);
    long wrong = 0;
    for (int64_t i = 0; i < count; i++)
        wrong += memcmp(found + i, expected + i, 4) && !(isnan(found[i]) && isnan(expected[i]));
    return wrong;
}

static long check(void)
{
    const struct header h = *(const struct header *)take(sizeof h);
    const int64_t bytes = packed_bytes(h.dim, h.units);
    const float *x = take_floats(h.rows * h.dim), *kernel = take_floats(h.dim * h.units);
    const float *bias = h.has_bias ? take_floats(h.units) : NULL, *gain = h.has_gain ? take_floats(h.dim) : NULL;
    uint8_t *packed = malloc(bytes);
    float *scale = malloc(4 * h.units), *outputs = malloc(4 * h.rows * h.units), *ternary = malloc(4 * h.dim * h.units);
    float *rounded = malloc(4 * h.rows * h.dim), *dx = malloc(4 * h.rows * h.dim), *dgain = malloc(4 * h.dim);

    keras_mml_ternarize(kernel, h.dim, h.units, (int)h.each_output, packed, scale, NULL);
    long wrong = memcmp(packed, take(bytes), bytes) != 0;
    wrong += differ(scale, h.units);
    const struct layer layer = {LINEAR, h.dim, h.units, packed, scale, bias, gain, h.normalize, h.limit};
    wrong += !keras_mml_run(&layer, 1, x, h.rows, outputs);
    wrong += differ(outputs, h.rows * h.units);

    const struct training training = {x, kernel, bias, gain, h.rows, h.dim, h.units, h.normalize, h.limit, h.each_output, outputs, rounded, ternary};
    wrong += !keras_mml_forward(&training);
    wrong += differ(outputs, h.rows * h.units) + differ(rounded, h.rows * h.dim) + differ(ternary, h.dim * h.units);
    if (h.normalize) {
        keras_mml_backward(rounded, x, gain, h.rows, h.dim, dx, dgain);
        wrong += differ(dx, h.rows * h.dim) + (gain ? differ(dgain, h.dim) : 0);
    }
    free(packed), free(scale), free(outputs), free(ternary), free(rounded), free(dx), free(dgain);
    return wrong;
}

int main(int count, char **arguments)
{
    FILE *file = count == 2 ? fopen(arguments[1], "rb") : NULL;
    if (!file)
        return 2;
    fseek(file, 0, SEEK_END);
    const long size = ftell(file);
    char *content = malloc((size_t)size);
    rewind(file);
    if (!content || fread(content, 1, (size_t)size, file) != (size_t)size)
        return 2;
    long layers = 0, wrong = 0;
    for (keras_mml_threads = 1; keras_mml_threads <= 3; keras_mml_threads += 2, keras_mml_worth_sharing = 0) /* alone, and shared by three */
        for (at = content; at < content + size; layers++)
            wrong += check();
    printf("%s: %ld layers, %ld numbers differ\n", keras_mml_instructions(), layers, wrong);
    return 0;
}
