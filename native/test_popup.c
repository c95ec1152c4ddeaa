/* test-popup FILE...: known answers, then each artifact read whole and damaged. Run by `make check`. */
#include <assert.h>
#include <stdlib.h>

/* The locale must not matter, so no point may come to strtod: another locale would stop there. */
static double pointless_strtod(const char *number, char **end) {
    const char *at;
    for (at = number; *at; at++)
        assert((*at >= '0' && *at <= '9') || *at == '-' || *at == 'e');
    return strtod(number, end);
}
#define strtod pointless_strtod
#include "popup.c"

static uint8_t memory[1 << 20];

typedef struct {
    const uint8_t *bytes;
    size_t size;
} buffer;

static int from_buffer(void *from, uint64_t offset, void *to, size_t size) {
    const buffer *source = from;
    assert(offset <= source->size && size <= source->size - offset); /* never outside of the file */
    memcpy(to, source->bytes + offset, size);
    return 0;
}

static double number(const char *digits) {
    char copy[40];
    strcpy(copy, digits);
    return real((text){copy, copy + strlen(copy)});
}

static void test_hashes(void) {
    sha256 hash = sha256_start;
    uint64_t key[2];
    char name[300];
    sha256_add(&hash, "abc", 3);
    assert(sha256_is(&hash, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"));
    hash = sha256_start;
    memset(name, 'a', sizeof name);
    sha256_add(&hash, name, 119); /* the padding takes a block of its own */
    assert(sha256_is(&hash, "31eba51c313a5c08226adf18d4a359cfdfd8d2e816b13f4af952f7ea6584dcfb"));
    stream_key(key, "3", "weight", name, 300); /* three blocks */
    assert(key[0] == 0x20f85a1463c9e86d && key[1] == 0xcf095f8726177310);
    stream_key(key, "3", "weight", name, 119); /* 128 bytes: one block */
    assert(key[0] == 0x0353e45c581c4f5f && key[1] == 0x010f16efb136d60b);
}

/* The worked stream of docs/artifact-format.md, and the last of vectors.json's. */
static void test_streams(void) {
    popup_cursor cursor = {.word = 4};
    stream_key(cursor.key, "0", "weight", "conv1.weight", 12);
    assert(next_word(&cursor) == 0x00ae8f532e3560dd && next_word(&cursor) == 0xa560fb63c331fd6e);
    cursor = (popup_cursor){.word = 4};
    stream_key(cursor.key, "9", "other", "pos_embed", 9);
    assert(next_word(&cursor) == 0x3dbdaabd9702f121 && next_word(&cursor) == 0x30b878788b0b3ce5);
    assert(next_word(&cursor) == 0x99e6dc0946a61154 && next_word(&cursor) == 0x776b38b4b8fa6cb5);
    assert(next_word(&cursor) == 0x01523d5bc2b0f0f3); /* of the next counter */
}

static void test_numbers(void) {
    assert(number("1.5e3") == 1500 && number("-0.25") == -0.25 && number("123456.789E-5") == 1.23456789);
    assert(number("0.4969039949999533") == 0x1.fcd4669f1b2f2p-2 && number("5.684341886080802e-14") == 0x1p-44);
    assert(!isfinite(number("1e99999999999999999999999999999")) && number("1e-99999999999999999999999999999") == 0);
}

/* Each element of a small dtype is itself when widened and rounded again. */
static void test_dtypes(void) {
    unsigned type;
    uint64_t bits;
    for (type = 0; type < COUNT(types); type++)
        for (bits = 0; types[type].sort == 'f' && types[type].size < 4 && bits >> 8 * types[type].size == 0; bits++) {
            float value = widen(type, bits);
            if (value == value)
                assert(narrow(type, value) == bits);
        }
    assert(narrow(7, 65519.0f) == 0x7BFF && narrow(7, 65520.0f) == 0x7C00);      /* F16: the largest, and infinity */
    assert(narrow(7, 0x1p-25f) == 0 && narrow(7, 0x1.000002p-25f) == 1);         /* a tie goes to even */
    assert(narrow(8, 0x1.01p0f) == 0x3F80 && narrow(8, -0x1.03p0f) == 0xBF82);   /* BF16 */
    assert(narrow(3, 464.0f) == 0x7E && narrow(3, -1e9f) == 0xFE);               /* F8_E4M3 has no infinity */
}

static int open_buffer(popup_file *file, buffer *source, size_t size) {
    return popup_open(file, from_buffer, source, source->size, memory, size);
}

/* Return POPUP_OK, or what popup_open, popup_check or a read says. The digest is of all that is read. */
static int read_all(popup_file *file, buffer *source, size_t size, sha256 *hash) {
    static char whole[1 << 17], pieces[1 << 17];
    size_t i;
    int format;
    TRY(open_buffer(file, source, size));
    TRY(popup_check(file, POPUP_LIMIT));
    for (i = 0; i < file->count; i++)
        for (format = POPUP_BYTES; format <= POPUP_MASK; format++) {
            const popup_tensor *tensor = file->tensors[i]->target ? file->tensors[i]->target : file->tensors[i];
            size_t bytes = popup_size(tensor, (popup_format)format, tensor->count);
            popup_cursor cursor;
            if (!bytes)
                continue;
            assert(bytes <= sizeof whole && popup_find(file, file->tensors[i]->name) == file->tensors[i]);
            TRY(popup_read(file, file->tensors[i], (popup_format)format, whole, bytes));
            TRY(popup_begin(&cursor, file, tensor));
            while (cursor.position < tensor->count) {
                uint64_t left = tensor->count - cursor.position, at = popup_size(tensor, format, cursor.position);
                TRY(popup_next(&cursor, (popup_format)format, pieces + (cursor.position ? at : 0), left < 64 ? left : 64));
            }
            assert(!memcmp(whole, pieces, bytes));
            sha256_add(hash, file->tensors[i]->name, file->tensors[i]->name_size);
            sha256_add(hash, whole, bytes);
        }
    return POPUP_OK;
}

/* A masked constant is the same in each format. */
static void compare_formats(popup_file *file) {
    static float wide[1 << 15];
    static int8_t narrow_[1 << 15];
    static uint8_t two[1 << 13], mask[1 << 12];
    size_t i, j;
    for (i = 0; i < file->masked_count; i++) {
        const popup_tensor *tensor = file->masked + i;
        assert(!popup_read(file, tensor, POPUP_MASK, mask, popup_size(tensor, POPUP_MASK, tensor->count)));
        if (tensor->distribution > POPUP_UNSIGNED_CONSTANT)
            continue;
        assert(!popup_read(file, tensor, POPUP_F32, wide, popup_size(tensor, POPUP_F32, tensor->count)));
        assert(!popup_read(file, tensor, POPUP_INT8, narrow_, popup_size(tensor, POPUP_INT8, tensor->count)));
        assert(!popup_read(file, tensor, POPUP_2BIT, two, popup_size(tensor, POPUP_2BIT, tensor->count)));
        for (j = 0; j < tensor->count; j++) {
            assert(wide[j] == tensor->scale * narrow_[j] && (two[j / 4] >> j % 4 * 2 & 3) == narrow_[j] + 1);
            assert((mask[j / 8] >> j % 8 & 1) == (narrow_[j] != 0));
        }
    }
}

static void test_file(const char *path) {
    static uint8_t bytes[1 << 16], kept;
    popup_file file;
    sha256 hash = sha256_start, again;
    size_t i, tried = 0, refused = 0;
    FILE *stream = fopen(path, "rb");
    buffer source = {bytes, stream ? fread(bytes, 1, sizeof bytes, stream) : 0};
    char message[320];
    assert(stream && source.size && source.size < sizeof bytes);
    fclose(stream);
    if (read_all(&file, &source, sizeof memory, &hash) || (!file.base && popup_verify(&file, POPUP_LIMIT))) {
        printf("%s: %s\n", path, file.message);
        exit(1);
    }
    compare_formats(&file);
    size_t used = file.memory_used + 16, step = file.quantiles ? 23 : 1; /* a table of quantiles takes its time */
    assert(popup_open(&file, from_buffer, &source, source.size, NULL, 0) == POPUP_MEMORY);
    for (i = 0; i < used - 16; i += i < 4096 ? 16 : 997) { /* too little memory is said, and never exceeded */
        memset(memory + i, 0xA5, 16);
        assert(open_buffer(&file, &source, i) == POPUP_MEMORY && memory[i] == 0xA5 && memory[i + 15] == 0xA5);
    }
    for (i = 0; i < source.size; tried++, i += step) { /* what is read all the same is what was written */
        kept = bytes[i];
        bytes[i] ^= (uint8_t)(1 << i % 8);
        again = sha256_start;
        if (read_all(&file, &source, used, &again)) {
            refused++;
            assert(strlen(file.message) > 10 && strlen(file.message) < sizeof file.message - 1);
        } else
            assert(!memcmp(hash.state, again.state, sizeof hash.state) && hash.size == again.size);
        bytes[i] = kept;
    }
    for (i = source.size; i-- > 0;) {
        buffer shorter = {bytes, i};
        assert(open_buffer(&file, &shorter, used));
    }
    snprintf(message, sizeof message, "%zu of %zu damaged files refused", refused, tried);
    printf("%s: %s, %zu bytes of memory\n", path, message, used - 16);
}

int main(int count, char **paths) {
    int i;
    test_hashes();
    test_streams();
    test_numbers();
    test_dtypes();
    for (i = 1; i < count; i++)
        test_file(paths[i]);
    puts("all passed");
    return 0;
}
