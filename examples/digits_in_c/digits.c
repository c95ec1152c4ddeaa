/* Recognise a digit with the network of `popup-surgery train digits`, without Python and without a multiplication but
 * one for each output: weights are -1, 0 or 1, times one number for each layer.
 *
 *     cc -std=c99 -O2 -I native examples/digits_in_c/digits.c native/popup.c -lm -o digits
 *     ./digits runs/digits/digits.popup.safetensors examples/digits_in_c/seven.pgm
 */
#include "popup.h"

#include <stdio.h>
#include <string.h>

enum { SIDE = 8, CHANNELS = 16, FLAT = CHANNELS * (SIDE / 2) * (SIDE / 2), HIDDEN = 64, CLASSES = 10 };
#define MEAN 0.306f /* of the recipe: data.mean and data.std */
#define STD 0.376f

static unsigned char memory[1 << 16]; /* for the reader: its header and a list of five tensors */
static int8_t weights[FLAT * HIDDEN]; /* of the layer in use, which is at most this large */
static float scale;

/* Read the next layer's weights if they have this many. */
static int next_layer(popup_file *file, const char *name, size_t count) {
    const popup_tensor *tensor = popup_find(file, name);
    if (!tensor || tensor->count != count) {
        snprintf(file->message, sizeof file->message, "%s is missing, or another size than of the digits recipe", name);
        return 1;
    }
    scale = tensor->scale;
    return popup_read(file, tensor, POPUP_INT8, weights, count);
}

static float relu(float x) { return x > 0 ? x : 0; }

/* A 3 x 3 convolution with padding 1, and ReLU. */
static void convolve(const float *in, int channels, float *out) {
    for (int o = 0; o < CHANNELS; o++)
        for (int y = 0; y < SIDE; y++)
            for (int x = 0; x < SIDE; x++) {
                float sum = 0;
                for (int i = 0; i < channels * 9; i++) {
                    int row = y + i / 3 % 3 - 1, column = x + i % 3 - 1, sign = weights[o * channels * 9 + i];
                    if (sign && row >= 0 && row < SIDE && column >= 0 && column < SIDE) {
                        float value = in[(i / 9 * SIDE + row) * SIDE + column];
                        sum += sign > 0 ? value : -value;
                    }
                }
                out[(o * SIDE + y) * SIDE + x] = relu(scale * sum);
            }
}

static float largest(float a, float b) { return a > b ? a : b; }

/* The largest of each 2 x 2. */
static void pool(const float *in, float *out) {
    for (int i = 0; i < FLAT; i++) {
        const float *at = in + i / (SIDE / 2) * 2 * SIDE + i % (SIDE / 2) * 2;
        out[i] = largest(largest(at[0], at[1]), largest(at[SIDE], at[SIDE + 1]));
    }
}

static void linear(const float *in, int inputs, float *out, int outputs) {
    for (int o = 0; o < outputs; o++) {
        float sum = 0;
        for (int i = 0; i < inputs; i++) {
            int sign = weights[o * inputs + i];
            sum += sign > 0 ? in[i] : sign < 0 ? -in[i] : 0;
        }
        out[o] = scale * sum;
    }
}

static int run(popup_file *file, const float *image, float *logits) {
    static float first[CHANNELS * SIDE * SIDE], second[CHANNELS * SIDE * SIDE];
    if (next_layer(file, "features.0.weight", CHANNELS * 9)) return 1;
    convolve(image, 1, first);
    if (next_layer(file, "features.2.weight", CHANNELS * CHANNELS * 9)) return 1;
    convolve(first, CHANNELS, second);
    pool(second, first);
    if (next_layer(file, "classifier.1.weight", FLAT * HIDDEN)) return 1;
    linear(first, FLAT, second, HIDDEN);
    for (int i = 0; i < HIDDEN; i++) second[i] = relu(second[i]);
    if (next_layer(file, "classifier.3.weight", HIDDEN * HIDDEN)) return 1;
    linear(second, HIDDEN, first, HIDDEN);
    for (int i = 0; i < HIDDEN; i++) first[i] = relu(first[i]);
    if (next_layer(file, "classifier.5.weight", HIDDEN * CLASSES)) return 1;
    linear(first, HIDDEN, logits, CLASSES);
    return 0;
}

/* Read a grey image of 8 x 8 in the text form of PGM. */
static int read_image(const char *path, float *image) {
    int width = 0, height = 0, most = 0, value, count = 0;
    FILE *stream = fopen(path, "r");
    if (stream && fscanf(stream, "P2 %d %d %d", &width, &height, &most) == 3 && width == SIDE && height == SIDE && most > 0)
        for (; count < SIDE * SIDE && fscanf(stream, "%d", &value) == 1 && value >= 0 && value <= most; count++)
            image[count] = ((float)value / (float)most - MEAN) / STD;
    if (stream) fclose(stream);
    return count != SIDE * SIDE;
}

int main(int count, char **arguments) {
    float image[SIDE * SIDE], logits[CLASSES];
    popup_file file;
    FILE *stream = count == 3 ? fopen(arguments[1], "rb") : NULL;
    if (!stream || fseek(stream, 0, SEEK_END) || read_image(arguments[2], image)) {
        fputs("usage: digits FILE.popup.safetensors IMAGE.pgm, a grey image of 8 x 8 in the text form of PGM\n", stderr);
        return 1;
    }
    if (popup_open(&file, popup_stdio, stream, (uint64_t)ftell(stream), memory, sizeof memory) ||
        popup_check(&file, sizeof weights * 2) || run(&file, image, logits)) {
        fprintf(stderr, "%s: %s\n", arguments[1], file.message);
        return 1;
    }
    int best = 0;
    for (int i = 0; i < CLASSES; i++) {
        printf("%d %.6f\n", i, logits[i]);
        if (logits[i] > logits[best]) best = i;
    }
    printf("this is a %d\n", best);
    fclose(stream);
    return 0;
}
