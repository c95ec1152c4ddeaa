/* See popup.h. The numbers of sections are those of docs/artifact-format.md. */
#include "popup.h"

#include <float.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#pragma STDC FP_CONTRACT OFF /* every product is rounded on its own; a compiler may need -ffp-contract=off as well */

#define HEADER_LIMIT (16 << 20)
#define MANIFEST_LIMIT (8 << 20)
#define PROBE_LIMIT (4 << 20)
#define CODED_LIMIT ((uint64_t)1 << 40) /* weights of one coded mask; `big` has room for these */
#define COUNT(array) (sizeof(array) / sizeof *(array))
#define TRY(call) do { int code_ = (call); if (code_) return code_; } while (0)

enum { MANIFEST, MASKS, TENSORS, WEIGHTS }; /* the digests */

/* ---- errors, memory, bytes ---- */

/* Say what is wrong, with the name of the tensor `about` in front unless it is NULL. */
static int fail(popup_file *file, popup_error code, const popup_tensor *about, const char *format, ...) {
    size_t i, used = 0;
    va_list arguments;
    if (about) { /* a stranger's name comes without what could control a terminal */
        file->message[used++] = '\'';
        for (i = 0; i < about->name_size && i < 80; i++)
            file->message[used++] = (char)(about->name[i] < ' ' || about->name[i] > '~' ? '?' : about->name[i]);
        used += (size_t)snprintf(file->message + used, 8, i < about->name_size ? "...' " : "' ");
    }
    va_start(arguments, format);
    vsnprintf(file->message + used, sizeof file->message - used, format, arguments);
    va_end(arguments);
    return (int)code;
}

/* Take `count` zeroed objects of `size` bytes from the caller's memory; NULL if it is too small. */
static void *take(popup_file *file, size_t count, size_t size) {
    size_t skipped = (16 - (size_t)((uintptr_t)(file->memory + file->memory_used) % 16)) % 16;
    size_t left = file->memory_size - file->memory_used;
    char *taken = file->memory + file->memory_used;
    if (skipped > left || count > (left - skipped) / size) {
        fail(file, POPUP_MEMORY, NULL, "the file needs more than the %zu bytes of memory that the reader was given",
             file->memory_size);
        return NULL;
    }
    file->memory_used += skipped + count * size;
    return memset(taken + skipped, 0, count * size);
}

static int read_at(popup_file *file, uint64_t offset, void *to, size_t size) {
    if (size && file->read(file->from, offset, to, size))
        return fail(file, POPUP_IO, NULL, "%zu bytes at %" PRIu64 " cannot be read", size, offset);
    return POPUP_OK;
}

static uint64_t load_le(const uint8_t *from, size_t size) {
    uint64_t value = 0;
    while (size--)
        value = value << 8 | from[size];
    return value;
}

static void store_le(uint8_t *to, uint64_t value, size_t size) {
    for (; size--; value >>= 8)
        *to++ = (uint8_t)value;
}

static uint32_t float_bits(float value) { return ((union { float f; uint32_t bits; }){value}).bits; }
static float bits_float(uint32_t value) { return ((union { uint32_t bits; float f; }){value}).f; }
static uint32_t rotate32(uint32_t x, int n) { return x >> n | x << (32 - n); }
static uint64_t rotate64(uint64_t x, int n) { return x >> n | x << (64 - n); }

/* ---- SHA-256 (FIPS 180-4) ---- */

typedef struct {
    uint32_t state[8];
    uint64_t size;
    uint8_t block[64];
} sha256;

static void sha256_block(uint32_t state[8], const uint8_t *block) {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98,
        0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
        0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8,
        0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
        0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819,
        0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
        0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
        0xc67178f2};
    uint32_t w[64], s[8], x, y;
    int i;
    for (i = 0; i < 64; i++, block += 4)
        if (i < 16)
            w[i] = (uint32_t)block[0] << 24 | (uint32_t)block[1] << 16 | (uint32_t)block[2] << 8 | block[3];
        else
            w[i] = w[i - 16] + (rotate32(w[i - 15], 7) ^ rotate32(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
                   (rotate32(w[i - 2], 17) ^ rotate32(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(s, state, sizeof s);
    for (i = 0; i < 64; i++) {
        x = s[7] + (rotate32(s[4], 6) ^ rotate32(s[4], 11) ^ rotate32(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6]));
        y = (rotate32(s[0], 2) ^ rotate32(s[0], 13) ^ rotate32(s[0], 22)) + ((s[0] & s[1]) | (s[2] & (s[0] | s[1])));
        x += k[i] + w[i];
        s[7] = s[6], s[6] = s[5], s[5] = s[4], s[4] = s[3] + x;
        s[3] = s[2], s[2] = s[1], s[1] = s[0], s[0] = x + y;
    }
    for (i = 0; i < 8; i++)
        state[i] += s[i];
}

static void sha256_begin(sha256 *hash) {
    static const sha256 start = {{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                  0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}, 0, {0}};
    *hash = start;
}

static void sha256_add(sha256 *hash, const void *bytes, size_t size) {
    const uint8_t *from = bytes;
    while (size) {
        size_t at = hash->size % 64, part = 64 - at < size ? 64 - at : size;
        memcpy(hash->block + at, from, part);
        if (at + part == 64)
            sha256_block(hash->state, hash->block);
        hash->size += part, from += part, size -= part;
    }
}

static int sha256_is(sha256 *hash, const char *expected) {
    uint8_t end[72] = {0x80};
    char hex[65];
    size_t i, padding = 64 - (hash->size + 8) % 64;
    for (i = 0; i < 8; i++)
        end[padding + i] = (uint8_t)(hash->size * 8 >> (56 - 8 * i));
    sha256_add(hash, end, padding + 8);
    for (i = 0; i < 8; i++)
        snprintf(hex + 8 * i, 9, "%08" PRIx32, hash->state[i]);
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION /* so that a fuzzer comes past the digests */
    return 1 + 0 * expected[0];
#else
    return !memcmp(hex, expected, 64);
#endif
}

/* ---- 1. from a seed to weights: BLAKE2b (RFC 7693), Philox4x64-10, distributions ---- */

static void blake2b_mix(uint64_t *a, uint64_t *b, uint64_t *c, uint64_t *d, uint64_t x, uint64_t y) {
    *a += *b + x, *d = rotate64(*d ^ *a, 32);
    *c += *d, *b = rotate64(*b ^ *c, 24);
    *a += *b + y, *d = rotate64(*d ^ *a, 16);
    *c += *d, *b = rotate64(*b ^ *c, 63);
}

/* Hash "seed/purpose/stream" into the two words of a key. */
static void stream_key(uint64_t key[2], const char *seed, const char *purpose, const char *stream, size_t stream_size) {
    static const uint64_t iv[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                   0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
    static const char orders[10][17] = {"0123456789ABCDEF", "EA489FD61C02B753", "B8C052FDAE367194", "7931DCBE265A40F8",
                                        "905724AFE1BC683D", "2C6A0B834D75FE19", "C51FED4A0763928B", "DB7EC13950F4862A",
                                        "6FE9B308C2D714A5", "A2847615FB9E3CD0"};
    static const uint8_t person[17] = "popup-surgery/v1", lanes[8][4] = {
        {0, 4, 8, 12}, {1, 5, 9, 13}, {2, 6, 10, 14}, {3, 7, 11, 15},
        {0, 5, 10, 15}, {1, 6, 11, 12}, {2, 7, 8, 13}, {3, 4, 9, 14}};
    char first[40];
    size_t first_size = (size_t)snprintf(first, sizeof first, "%s/%s/", seed, purpose);
    size_t size = first_size + stream_size, done = 0, i, j;
    uint64_t h[8], v[16], m[16];
    memcpy(h, iv, sizeof h);
    h[0] ^= 0x01010000 ^ 16; /* depth 1, fanout 1, no key, a digest of 16 bytes */
    h[6] ^= load_le(person, 8), h[7] ^= load_le(person + 8, 8);
    do {
        uint8_t block[128] = {0};
        for (i = 0; i < 128 && done < size; i++, done++)
            block[i] = (uint8_t)(done < first_size ? first[done] : stream[done - first_size]);
        for (i = 0; i < 16; i++) {
            m[i] = load_le(block + 8 * i, 8);
            v[i] = i < 8 ? h[i] : iv[i - 8];
        }
        v[12] ^= done;
        v[14] ^= done < size ? 0 : UINT64_MAX; /* the last block */
        for (i = 0; i < 12; i++)
            for (j = 0; j < 8; j++) {
                const char *x = orders[i % 10] + 2 * j;
                blake2b_mix(v + lanes[j][0], v + lanes[j][1], v + lanes[j][2], v + lanes[j][3],
                            m[x[0] < 'A' ? x[0] - '0' : x[0] - 'A' + 10], m[x[1] < 'A' ? x[1] - '0' : x[1] - 'A' + 10]);
            }
        for (i = 0; i < 8; i++)
            h[i] ^= v[i] ^ v[i + 8];
    } while (done < size);
    key[0] = h[0], key[1] = h[1];
}

/* The high 64 bits of a product. */
static uint64_t multiply_high(uint64_t a, uint64_t b) {
    uint64_t al = a & UINT32_MAX, ah = a >> 32, bl = b & UINT32_MAX, bh = b >> 32;
    uint64_t middle = ah * bl + (al * bl >> 32), low = al * bh + (middle & UINT32_MAX);
    return ah * bh + (middle >> 32) + (low >> 32);
}

static uint64_t next_word(popup_cursor *cursor) {
    uint64_t x[4] = {0}, k0 = cursor->key[0], k1 = cursor->key[1], high0, high1;
    int round;
    if (cursor->word < 4)
        return cursor->words[cursor->word++];
    x[0] = ++cursor->counter;
    for (round = 0; round < 10; round++, k0 += 0x9E3779B97F4A7C15, k1 += 0xBB67AE8584CAA73B) {
        high0 = multiply_high(0xD2E7470EE14C6C93, x[0]), high1 = multiply_high(0xCA5A826395121157, x[2]);
        x[3] ^= high0 ^ k1, x[1] ^= high1 ^ k0; /* the new x[2] and x[0] */
        high0 = 0xD2E7470EE14C6C93 * x[0], high1 = 0xCA5A826395121157 * x[2];
        x[0] = x[1], x[1] = high1, x[2] = x[3], x[3] = high0;
    }
    memcpy(cursor->words, x, sizeof x);
    cursor->word = 1;
    return x[0];
}

/* Quantile of the normal distribution for 1e-11 < p < 0.5 (Wichura, 1988, algorithm AS 241). */
static double quantile(double p) {
    static const double centre[2][8] = {
        {2.5090809287301226727e+3, 3.3430575583588128105e+4, 6.7265770927008700853e+4, 4.5921953931549871457e+4,
         1.3731693765509461125e+4, 1.9715909503065514427e+3, 1.3314166789178437745e+2, 3.3871328727963666080e+0},
        {5.2264952788528545610e+3, 2.8729085735721942674e+4, 3.9307895800092710610e+4, 2.1213794301586595867e+4,
         5.3941960214247511077e+3, 6.8718700749205790830e+2, 4.2313330701600911252e+1, 1.0}};
    static const double tail[2][8] = {
        {7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e+0,
         3.64784832476320460504e+0, 5.76949722146069140550e+0, 4.63033784615654529590e+0, 1.42343711074968357734e+0},
        {1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
         6.89767334985100004550e-1, 1.67638483018380384940e+0, 2.05319162663775882187e+0, 1.0}};
    int i, central = p >= 0.075;
    const double q = p - 0.5, r = central ? 0.180625 - q * q : sqrt(-log(p)) - 1.6, (*c)[8] = central ? centre : tail;
    double top = 0, bottom = 0;
    for (i = 0; i < 8; i++)
        top = top * r + c[0][i], bottom = bottom * r + c[1][i];
    return central ? top * q / bottom : -(top / bottom);
}

/* Compute the lower half of the table of quantiles, of which the upper half is the mirror, and check its digest. */
static int make_quantiles(popup_file *file) {
    float *table = take(file, 32768, sizeof *table);
    uint8_t bytes[4];
    sha256 hash;
    int i;
    if (!table)
        return POPUP_MEMORY;
    sha256_begin(&hash);
    for (i = 0; i < 65536; i++) {
        if (i < 32768)
            table[i] = (float)quantile((i + 0.5) / 65536);
        store_le(bytes, float_bits(i < 32768 ? table[i] : -table[65535 - i]), 4);
        sha256_add(&hash, bytes, 4);
    }
    file->quantiles = table;
    if (!sha256_is(&hash, "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"))
        return fail(file, POPUP_UNSUPPORTED, NULL, "this machine's logarithm gives other quantiles of the normal "
                                                   "distribution than the format");
    return POPUP_OK;
}

/* Draw n of at most 64 values, in float32. */
static void draw(popup_cursor *cursor, float *values, unsigned n) {
    const popup_tensor *tensor = cursor->tensor;
    const float s = (float)tensor->std, bound = (float)(tensor->std * 1.7320508075688772);
    const float *quantiles = cursor->file->quantiles;
    uint64_t word = tensor->distribution == POPUP_SIGNED_CONSTANT ? next_word(cursor) : UINT64_MAX;
    unsigned i;
    if (tensor->distribution == POPUP_NORMAL)
        for (i = 0; i < n; i++, word >>= 16) {
            word = i % 4 ? word : next_word(cursor);
            values[i] = s * (word & 0x8000 ? -quantiles[~word & 0x7FFF] : quantiles[word & 0x7FFF]);
        }
    else if (tensor->distribution == POPUP_UNIFORM)
        for (i = 0; i < n; i++, word >>= 32) {
            word = i % 2 ? word : next_word(cursor);
            values[i] = bound * ((float)(2 * (int32_t)(word >> 8 & 0xFFFFFF) + 1 - (1 << 24)) * 0x1p-24f);
        }
    else
        for (i = 0; i < n; i++)
            values[i] = bits_float(float_bits(s) | (uint32_t)(~word >> i & 1) << 31);
}

/* ---- dtypes ---- */

static const struct {
    char name[8], sort; /* b: boolean, u, i: integers, f: floating, c: complex */
    uint8_t size, exponent, mantissa;
} types[] = {{"BOOL", 'b', 1, 0, 0},    {"U8", 'u', 1, 0, 0},  {"I8", 'i', 1, 0, 0},  {"F8_E4M3", 'f', 1, 4, 3},
             {"F8_E5M2", 'f', 1, 5, 2}, {"I16", 'i', 2, 0, 0}, {"U16", 'u', 2, 0, 0}, {"F16", 'f', 2, 5, 10},
             {"BF16", 'f', 2, 8, 7},    {"I32", 'i', 4, 0, 0}, {"U32", 'u', 4, 0, 0}, {"F32", 'f', 4, 8, 23},
             {"F64", 'f', 8, 11, 52},   {"I64", 'i', 8, 0, 0}, {"U64", 'u', 8, 0, 0}, {"C64", 'c', 8, 0, 0}};

static uint64_t double_bits(double value) { return ((union { double f; uint64_t bits; }){value}).bits; }

/* Round a float32 to nearest, ties to even, in a floating type; return its bits. */
static uint64_t narrow(unsigned type, float value) {
    int m = types[type].mantissa, e = types[type].exponent, place, shift = 23 - m;
    uint32_t bits = float_bits(value), rest = bits & 0x7FFFFF, rounded, infinity;
    if (m >= 23)
        return m == 23 ? bits : double_bits(value);
    infinity = (((1u << e) - 1) << m) + (e == 4 ? 7 : 0); /* F8_E4M3 has none, but NaN, which is all ones */
    place = (int)(bits >> 23 & 0xFF);
    rest |= place ? 0x800000 : 0; /* the leading one, which is not written */
    place = (place ? place : 1) - 127 + (1 << (e - 1)) - 1;
    if (place < 1) { /* the result is subnormal */
        shift = shift + 1 - place < 25 ? shift + 1 - place : 25;
        place = 1;
    }
    rounded = rest >> shift;
    rest &= (1u << shift) - 1;
    rounded += rest > 1u << (shift - 1) || (rest == 1u << (shift - 1) && rounded & 1);
    rounded += (uint32_t)(place - 1) << m;
    return (rounded < infinity ? rounded : infinity) | bits >> 31 << (e + m);
}

/* Return the value of an element of a floating type of at most 32 bits. */
static float widen(unsigned type, uint64_t bits) {
    int m = types[type].mantissa, e = types[type].exponent;
    uint32_t sign = (uint32_t)(bits >> (e + m) & 1) << 31, all = (1u << e) - 1;
    uint32_t exponent = (uint32_t)(bits >> m) & all, fraction = (uint32_t)bits & ((1u << m) - 1);
    float magnitude = (float)(exponent ? fraction | 1u << m : fraction);
    if (m == 23)
        return bits_float((uint32_t)bits);
    if (exponent == all && (e != 4 || fraction == 7)) /* infinity or NaN */
        return bits_float(sign | 0x7F800000 | fraction << (23 - m));
    magnitude = ldexpf(magnitude, (int)(exponent ? exponent : 1) - ((1 << (e - 1)) - 1) - m);
    return bits_float(sign | float_bits(magnitude));
}

/* ---- 3. JSON: a text is checked as a whole before any of it is used; there is a NUL behind it ---- */

typedef struct {
    char *at, *end;
} text;

#define SPACE " \t\n\r"

static long hexadecimal(const char *at) {
    static const char digits[] = "0123456789abcdefABCDEF";
    long value = 0;
    int i;
    for (i = 0; i < 4; i++, at++) {
        const char *digit = *at ? strchr(digits, *at) : NULL;
        if (!digit)
            return -1;
        value = value << 4 | (digit - digits < 16 ? digit - digits : digit - digits - 6);
    }
    return value;
}

/* Take one character of a string; −1 if it is malformed. */
static long take_character(char **at) {
    static const char escapes[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    const uint8_t *u = (const uint8_t *)*at;
    long c = *u++, low, least;
    int more = c < 0x80 ? 0 : c < 0xE0 ? 1 : c < 0xF0 ? 2 : 3;
    const char *escape = c == '\\' && *u ? strchr(escapes, *u) : NULL;
    if (escape) {
        *at += 2;
        return meant[escape - escapes];
    }
    if (c == '\\') {
        c = *u == 'u' ? hexadecimal(*at + 2) : -1;
        if (c < 0)
            return -1;
        *at += 6;
        if (c < 0xD800 || c > 0xDFFF)
            return c;
        low = c < 0xDC00 && **at == '\\' && (*at)[1] == 'u' ? hexadecimal(*at + 2) : -1;
        *at += 6; /* of a whole pair, as half a one is an error */
        return low < 0xDC00 || low > 0xDFFF ? -1 : 0x10000 + ((c & 0x3FF) << 10) + (low & 0x3FF);
    }
    *at += 1 + more;
    if (c < ' ' || (c >= 0x80 && c < 0xC2) || c > 0xF4)
        return -1;
    least = more == 3 ? 0x10000 : more == 2 ? 0x800 : 0;
    for (c &= more ? 0x3F >> more : 0x7F; more; more--, u++) {
        if ((*u & 0xC0) != 0x80)
            return -1;
        c = c << 6 | (*u & 0x3F);
    }
    return c < least || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF) ? -1 : c;
}

/* Compare checked strings by code points, as Python sorts. */
static int compare_strings(text a, text b) {
    while (a.at < a.end && b.at < b.end) {
        long x = take_character(&a.at), y = take_character(&b.at);
        if (x != y)
            return x < y ? -1 : 1;
    }
    return (a.at < a.end) - (b.at < b.end);
}

/* Return a number. The C library reads a point as the locale has it, so it gets none: 15e2 for 1.5e3. */
static double real(text number) {
    char copy[64];
    size_t size = 0;
    long exponent = 0, written = 0, sign = 1, places = 0;
    for (; number.at < number.end && (*number.at | 32) != 'e'; number.at++)
        if (*number.at == '.')
            places = 1;
        else
            copy[size++] = *number.at, exponent -= places;
    for (; number.at < number.end; number.at++)
        if (*number.at == '-')
            sign = -1;
        else if (*number.at >= '0' && *number.at <= '9' && written < 100000)
            written = 10 * written + (*number.at - '0');
    snprintf(copy + size, sizeof copy - size, "e%ld", exponent + sign * written);
    return strtod(copy, NULL);
}

/* The next functions take what their name says from a text, and return NULL, or why they could not. */
static const char *take_string(char **at, text *body) {
    if (**at != '"')
        return "has no string where one is expected";
    for (body->at = ++*at; **at != '"';)
        if (take_character(at) < 0)
            return "has a string that does not end, or with a malformed character";
    body->end = (*at)++;
    return NULL;
}

static size_t take_digits(char **at) {
    size_t count = strspn(*at, "0123456789");
    *at += count;
    return count;
}

static const char *take_number(char **at) {
    text number = {*at, NULL};
    char *digits = *at += **at == '-';
    size_t count = take_digits(at);
    if (!count || (count > 1 && *digits == '0'))
        return "has no value where one is expected";
    if (**at == '.' && (++*at, !take_digits(at)))
        return "has a number that ends in a point";
    if (**at == 'e' || **at == 'E') {
        *at += (*at)[1] == '+' || (*at)[1] == '-' ? 2 : 1;
        if (!take_digits(at))
            return "has a number without an exponent";
    }
    number.end = *at;
    if (number.end - number.at > 32)
        return "has a number of more than 32 characters";
    return fabs(real(number)) <= DBL_MAX ? NULL : "has a number that is infinite";
}

/* In a `strict` text no space is allowed, and keys are sorted, so that none is there twice. */
static const char *take_value(char **at, int depth, int strict) {
    static const char *const words[] = {"true", "false", "null"};
    const char *space = strict ? "" : SPACE, *why;
    char first = *(*at += strspn(*at, space)), close = first == '{' ? '}' : ']';
    text last = {NULL, NULL}, key;
    size_t i;
    for (i = 0; i < COUNT(words); i++)
        if (!strncmp(*at, words[i], strlen(words[i])))
            return *at += strlen(words[i]), NULL;
    if (first != '{' && first != '[')
        return first == '"' ? take_string(at, &key) : take_number(at);
    if (depth == 32)
        return "is nested more than 32 levels deep";
    ++*at;
    if (*(*at += strspn(*at, space)) == close)
        return ++*at, NULL;
    do {
        *at += strspn(*at, space);
        if (first == '{') {
            if ((why = take_string(at, &key)))
                return why;
            if (strict && last.at && compare_strings(last, key) >= 0)
                return "has a key twice, or keys that are not in order";
            last = key;
            if (*(*at += strspn(*at, space)) != ':')
                return "has a key without a value";
            ++*at;
        }
        if ((why = take_value(at, depth + 1, strict)))
            return why;
        *at += strspn(*at, space);
    } while (**at == ',' && ++*at);
    return **at == close ? ++*at, NULL : "has a list or an object that does not end";
}

/* Check that all of a text is one JSON object, and that a `strict` one is in ASCII. */
static int check_json(popup_file *file, const char *what, text whole, int strict) {
    char *at = whole.at + strspn(whole.at, strict ? "" : SPACE);
    const char *why = *at == '{' ? take_value(&at, 0, strict) : "is not a JSON object";
    if (!why && at + strspn(at, strict ? "" : SPACE) != whole.end)
        why = "has something behind its end";
    for (; strict && !why && whole.at < whole.end; whole.at++)
        why = *whole.at & 0x80 ? "has a character that is not escaped" : NULL;
    return why ? fail(file, POPUP_INVALID, NULL, "%s %s", what, why) : POPUP_OK;
}

/* ---- checked JSON: what a value is, and what is in it ---- */

static char *value_end(char *at) {
    take_value(&at, 0, 0);
    return at;
}

/* Take the next member of an object, or element of a list (whose `key` is NULL), behind its bracket. 0 at its end. */
static int next_item(text *rest, text *key, text *value) {
    rest->at += strspn(rest->at, SPACE ",");
    if (rest->at == rest->end)
        return 0;
    if (key) {
        take_string(&rest->at, key);
        rest->at += strspn(rest->at, SPACE ":");
    }
    value->at = rest->at;
    value->end = rest->at = value_end(rest->at);
    return 1;
}

/* What is between a value's quotes or brackets. */
static text inside(text value) { return (text){value.at + 1, value.end - 1}; }

static size_t count_items(text container) {
    text rest = inside(container), key, value;
    size_t count = 0;
    while (next_item(&rest, *container.at == '{' ? &key : NULL, &value))
        count++;
    return count;
}

static int is(text string, const char *expected) {
    size_t size = (size_t)(string.end - string.at);
    return size == strlen(expected) && !memcmp(string.at, expected, size);
}

static int find(text object, const char *name, text *value) {
    text rest = inside(object), key;
    while (next_item(&rest, &key, value))
        if (is(key, name))
            return 1;
    return 0;
}

/* Return what a value is: " { [ b(oolean) n(ull) i(nteger) f(loat). */
static char sort_of(text value) {
    if (strchr("\"{[n", *value.at))
        return *value.at;
    if (*value.at == 't' || *value.at == 'f')
        return 'b';
    return strcspn(value.at, ".eE") < (size_t)(value.end - value.at) ? 'f' : 'i';
}

/* Return whether a text is an integer from 0 to 2**64 - 1. */
static int whole_number(text value, uint64_t *number) {
    int valid = value.at < value.end;
    for (*number = 0; valid && value.at < value.end; value.at++) {
        uint64_t digit = (uint64_t)(*value.at - '0');
        valid = digit <= 9 && *number <= (UINT64_MAX - digit) / 10;
        *number = 10 * *number + digit;
    }
    return valid;
}

/* Turn a string's escapes into UTF-8 where it stands, with a NUL for the quote behind it. Return its size. */
static size_t unescape(text string) {
    static const uint8_t lead[] = {0, 0xC0, 0xE0, 0xF0};
    char *at = string.at;
    uint8_t *to = (uint8_t *)string.at;
    while (at < string.end) {
        unsigned long c = (unsigned long)take_character(&at);
        int more = c >= 0x10000 ? 3 : c >= 0x800 ? 2 : c >= 0x80 ? 1 : 0;
        *to++ = (uint8_t)(lead[more] | c >> 6 * more);
        while (more--)
            *to++ = (uint8_t)(0x80 | (c >> 6 * more & 0x3F));
    }
    *to = 0;
    return (size_t)(to - (uint8_t *)string.at);
}

/* ---- 2. the header: tensors, their names and places ---- */

static int compare_names(const char *a, size_t a_size, const char *b, size_t b_size) {
    int order = memcmp(a, b, a_size < b_size ? a_size : b_size); /* UTF-8 has the order of code points */
    return order ? order : (a_size > b_size) - (a_size < b_size);
}

static int by_name(const popup_tensor *a, const popup_tensor *b) {
    return compare_names(a->name, a->name_size, b->name, b->name_size);
}

static int by_place(const popup_tensor *a, const popup_tensor *b) {
    int order = (a->start > b->start) - (a->start < b->start);
    return order ? order : (a->stop > b->stop) - (a->stop < b->stop);
}

/* Shellsort, because the C library's qsort may take memory, or time by the square of the count. */
static void sort(const popup_tensor **list, size_t count, int (*order)(const popup_tensor *, const popup_tensor *)) {
    size_t gap = 1, i, j;
    while (gap < count / 3)
        gap = 3 * gap + 1;
    for (; gap; gap /= 3)
        for (i = gap; i < count; i++) {
            const popup_tensor *moved = list[i];
            for (j = i; j >= gap && order(list[j - gap], moved) > 0; j -= gap)
                list[j] = list[j - gap];
            list[j] = moved;
        }
}

/* Return the tensor of a sorted list whose name is `name` and then `suffix`, or NULL. */
static const popup_tensor *search(const popup_tensor *const *list, size_t count, const char *name, size_t size,
                                  const char *suffix) {
    while (count) {
        const popup_tensor *middle = list[count / 2];
        size_t first = middle->name_size < size ? middle->name_size : size;
        int order = compare_names(name, size, middle->name, first);
        if (!order)
            order = compare_names(suffix, strlen(suffix), middle->name + first, middle->name_size - first);
        if (!order)
            return middle;
        if (order > 0)
            list += count / 2 + 1, count -= count / 2 + 1;
        else
            count /= 2;
    }
    return NULL;
}

static int take_dtype(popup_file *file, text value, popup_tensor *tensor) {
    unsigned i;
    for (i = 0; *value.at == '"' && i < COUNT(types); i++)
        if (is(inside(value), types[i].name)) {
            tensor->type = i;
            tensor->dtype = types[i].name;
            tensor->element_size = types[i].size;
            return POPUP_OK;
        }
    return fail(file, POPUP_INVALID, tensor, "has an unknown dtype");
}

/* Take a shape, and its product unless that overflows, in bytes too. */
static int take_shape(popup_file *file, text value, popup_tensor *tensor) {
    text rest = inside(value), item;
    size_t i = 0, count = *value.at == '[' ? count_items(value) : SIZE_MAX;
    uint64_t *sizes = count <= 64 ? take(file, count, sizeof *sizes) : NULL;
    if (count > 64)
        return fail(file, POPUP_INVALID, tensor, "has a shape that is not a list of at most 64 sizes");
    if (!sizes)
        return POPUP_MEMORY;
    tensor->shape = sizes, tensor->dimensions = count, tensor->count = 1;
    while (next_item(&rest, NULL, &item))
        if (!whole_number(item, sizes + i++))
            return fail(file, POPUP_INVALID, tensor, "has a size that is not an integer from 0 to 2**64 - 1");
        else if (!sizes[i - 1])
            tensor->count = 0;
    for (i = 0; i < count && tensor->count; tensor->count *= sizes[i++])
        if (tensor->count > UINT64_MAX / 8 / sizes[i])
            return fail(file, POPUP_INVALID, tensor, "has a shape of too many elements");
    return POPUP_OK;
}

/* Take one tensor's entry in the header. */
static int take_part(popup_file *file, text key, text value, popup_tensor *part) {
    text dtype, shape, offsets, first, last, rest;
    part->kind = POPUP_STORED, part->distribution = POPUP_NOT_DRAWN;
    part->name = key.at, part->name_size = unescape(key);
    if (*value.at != '{' || count_items(value) != 3 || !find(value, "dtype", &dtype) ||
        !find(value, "shape", &shape) || !find(value, "data_offsets", &offsets))
        return fail(file, POPUP_INVALID, part, "is not a tensor; expected dtype, shape and data_offsets");
    TRY(take_dtype(file, dtype, part));
    TRY(take_shape(file, shape, part));
    rest = inside(offsets);
    if (*offsets.at != '[' || count_items(offsets) != 2 || !next_item(&rest, NULL, &first) ||
        !next_item(&rest, NULL, &last) || !whole_number(first, &part->start) || !whole_number(last, &part->stop))
        return fail(file, POPUP_INVALID, part, "has data_offsets that are not two integers from 0");
    if (part->stop < part->start || part->stop - part->start != part->count * part->element_size)
        return fail(file, POPUP_INVALID, part, "has another number of bytes than its shape and dtype need");
    return POPUP_OK;
}

/* Read the header, and give the manifest's text. */
static int read_header(popup_file *file, uint64_t size, text *manifest) {
    uint8_t prefix[8] = {0};
    uint64_t length, end = 0;
    text header, rest, key, value, metadata = {NULL, NULL};
    size_t i = 0;
    TRY(read_at(file, 0, prefix, size < 8 ? 0 : 8));
    length = load_le(prefix, 8);
    if (size < 8 || length > size - 8)
        return fail(file, POPUP_NOT_POPUP, NULL, "the file ends before its header; it is truncated or no safetensors");
    if (length > HEADER_LIMIT)
        return fail(file, POPUP_NOT_POPUP, NULL, "the header has %" PRIu64 " bytes; expected at most 16777216", length);
    if (!(header.at = take(file, (size_t)length + 1, 1)))
        return POPUP_MEMORY;
    header.end = header.at + length;
    TRY(read_at(file, 8, header.at, (size_t)length));
    TRY(check_json(file, "the header", header, 0));
    header.at += strspn(header.at, SPACE), header.end = value_end(header.at);
    file->data = 8 + length, file->data_size = size - file->data;
    file->part_count = count_items(header);
    file->parts = take(file, file->part_count, sizeof *file->parts);
    file->part_names = take(file, file->part_count, sizeof *file->part_names);
    if (!file->parts || !file->part_names)
        return POPUP_MEMORY;
    for (rest = inside(header); next_item(&rest, &key, &value);)
        if (!is(key, "__metadata__")) {
            file->part_names[i] = file->parts + i;
            TRY(take_part(file, key, value, file->parts + i++));
        } else if (metadata.at)
            return fail(file, POPUP_INVALID, NULL, "the header has the key __metadata__ twice");
        else
            metadata = value;
    if (!metadata.at || *metadata.at != '{' || count_items(metadata) != 1 ||
        !find(metadata, "popup_surgery", manifest) || *manifest->at != '"')
        return fail(file, POPUP_NOT_POPUP, NULL, "this is no popup artifact: its metadata is not one manifest");
    file->part_count = i;
    sort(file->part_names, file->part_count, by_place);
    for (i = 0; i < file->part_count; end = file->part_names[i++]->stop)
        if (file->part_names[i]->start != end)
            return fail(file, POPUP_INVALID, file->part_names[i], "does not begin where the tensor before it ends");
    if (end != file->data_size)
        return fail(file, POPUP_INVALID, NULL, "the data has %" PRIu64 " bytes; the tensors need %" PRIu64,
                    file->data_size, end);
    sort(file->part_names, file->part_count, by_name);
    *manifest = inside(*manifest);
    manifest->end = manifest->at + unescape(*manifest);
    return POPUP_OK;
}

/* ---- 2. the manifest: what each tensor is ---- */

/* Give a member of an object whose sort is one of `sorts`. */
static int need(popup_file *file, const popup_tensor *about, text object, const char *key, const char *sorts,
                text *value) {
    if (find(object, key, value) && strchr(sorts, sort_of(*value)))
        return POPUP_OK;
    return fail(file, POPUP_INVALID, about, "has no %s in the manifest, or one of a wrong type", key);
}

/* Take an entry of `masked` or `generated`. */
static int take_drawn(popup_file *file, text entry, popup_kind kind, popup_tensor *tensor) {
    static const char *const distributions[] = {"signed_constant", "unsigned_constant", "normal", "uniform", "base"};
    static const char *const notes[][2] = {{"scheme", "\""}, {"scaled", "b"}, {"k", "if"}, {"fan_in", "if"}};
    text name, stream, value;
    const popup_tensor *mask;
    unsigned i, masked = kind == POPUP_MASKED;
    if (*entry.at != '{' || !find(entry, "name", &name) || *name.at != '"')
        return fail(file, POPUP_INVALID, NULL, "the manifest has an entry that is not an object with a name");
    tensor->kind = kind;
    tensor->name = name.at + 1, tensor->name_size = (size_t)(name.end - name.at - 2);
    TRY(need(file, tensor, entry, "stream", "\"", &stream));
    TRY(need(file, tensor, entry, "dtype", "\"", &value));
    TRY(take_dtype(file, value, tensor));
    TRY(need(file, tensor, entry, "shape", "[", &value));
    TRY(take_shape(file, value, tensor));
    if (types[tensor->type].sort != 'f' || !tensor->count)
        return fail(file, POPUP_INVALID, tensor, "is empty or not of a floating dtype, and is to be drawn");
    TRY(need(file, tensor, entry, "distribution", "\"", &value));
    for (i = 0; i < POPUP_BASE + masked && !is(inside(value), distributions[i]); i++)
        ;
    if (i == POPUP_BASE + masked)
        return fail(file, POPUP_UNSUPPORTED, tensor, "has a distribution that this reader does not know");
    tensor->distribution = (popup_distribution)i;
    if (tensor->distribution == POPUP_BASE ? find(entry, "std", &value) : !find(entry, "std", &value))
        return fail(file, POPUP_INVALID, tensor, "has a std and a base, or neither");
    if (tensor->distribution != POPUP_BASE) {
        tensor->std = sort_of(value) == 'f' ? real(value) : 0;
        if (!(tensor->std * 1.7320508075688772 <= FLT_MAX && (float)tensor->std > 0))
            return fail(file, POPUP_INVALID, tensor, "has a std that is not a float above 0 that float32 can hold");
    }
    for (i = 0; i < COUNT(notes); i++)
        if (masked || find(entry, notes[i][0], &value))
            TRY(need(file, tensor, entry, notes[i][0], notes[i][1], &value));
    if (masked) {
        TRY(need(file, tensor, entry, "kept", "i", &value));
        if (!whole_number(value, &tensor->kept) || tensor->kept > tensor->count)
            return fail(file, POPUP_INVALID, tensor, "keeps more weights than it has, or fewer than 0");
        TRY(need(file, tensor, entry, "encoding", "\"", &value));
        tensor->range_coded = is(inside(value), "range_coded");
        if (!tensor->range_coded && !is(inside(value), "bitpack"))
            return fail(file, POPUP_UNSUPPORTED, tensor, "has an encoding that this reader does not know");
        if (tensor->distribution <= POPUP_UNSIGNED_CONSTANT)
            tensor->scale = tensor->element_size < 8 ? widen(tensor->type, narrow(tensor->type, (float)tensor->std))
                                                     : (float)tensor->std;
    } /* now that all is found, its strings may change */
    tensor->name_size = unescape(inside(name));
    tensor->stream = stream.at + 1, tensor->stream_size = unescape(inside(stream));
    if (!masked)
        return POPUP_OK;
    mask = search(file->part_names, file->part_count, tensor->name, tensor->name_size, ".mask");
    if (!mask || mask->element_size != 1 || strcmp(mask->dtype, "U8") || mask->dimensions != 1)
        return fail(file, POPUP_INVALID, tensor, "has no mask of U8 with one dimension");
    if (tensor->range_coded ? mask->count % 4 || !mask->count != (!tensor->kept || tensor->kept == tensor->count)
                            : mask->count != tensor->count / 8 + (tensor->count % 8 > 0))
        return fail(file, POPUP_INVALID, tensor, "has a mask of %" PRIu64 " bytes, which do not fit its shape and kept",
                    mask->count);
    if (tensor->range_coded && tensor->count >= CODED_LIMIT)
        return fail(file, POPUP_UNSUPPORTED, tensor, "has a coded mask of more weights than this reader decodes");
    tensor->start = mask->start, tensor->stop = mask->stop;
    file->parts[mask - file->parts].kind = POPUP_MASKED;
    return POPUP_OK;
}

/* Take a constant, whose value must be exact in its dtype, finite and not -0.0. */
static int take_constant(popup_file *file, text key, text entry, popup_tensor *tensor) {
    text value = entry, digits;
    uint64_t most;
    double number;
    int negative, valid = 0;
    tensor->kind = POPUP_CONSTANT, tensor->distribution = POPUP_NOT_DRAWN;
    tensor->name = key.at, tensor->name_size = unescape(key);
    if (*entry.at != '{')
        return fail(file, POPUP_INVALID, tensor, "is a constant that is not an object");
    TRY(need(file, tensor, entry, "dtype", "\"", &value));
    TRY(take_dtype(file, value, tensor));
    TRY(need(file, tensor, entry, "shape", "[", &value));
    TRY(take_shape(file, value, tensor));
    TRY(need(file, tensor, entry, "value", "bif", &value));
    negative = *value.at == '-', digits = value, digits.at += negative;
    if (types[tensor->type].sort == 'b') {
        valid = sort_of(value) == 'b';
        tensor->value = *value.at == 't';
    } else if (strchr("ui", types[tensor->type].sort)) {
        most = UINT64_MAX >> (64 - 8 * tensor->element_size + (types[tensor->type].sort == 'i'));
        valid = whole_number(digits, &tensor->value) && !(negative && types[tensor->type].sort == 'u') &&
                tensor->value <= most + (uint64_t)negative;
        tensor->value = negative ? 0 - tensor->value : tensor->value;
    } else if (types[tensor->type].sort == 'f' && sort_of(value) == 'f') {
        number = real(value);
        valid = !(number == 0 && negative) && (tensor->element_size == 8 || fabs(number) <= FLT_MAX);
        tensor->value = tensor->element_size == 8 ? double_bits(number) : valid ? narrow(tensor->type, (float)number) : 0;
        valid = valid && (tensor->element_size == 8 || (double)widen(tensor->type, tensor->value) == number);
    }
    if (!valid || !tensor->count)
        return fail(file, POPUP_INVALID, tensor, "is a constant that is empty, or whose value is not exact in %s",
                    tensor->dtype);
    return POPUP_OK;
}

/* Sort all names, each of which may be there once, and find what aliases are of. */
static int list_tensors(popup_file *file, popup_tensor *entries, size_t count) {
    const popup_tensor **list = take(file, file->part_count + count, sizeof *list);
    size_t i, all = file->part_count + count;
    if (!list)
        return POPUP_MEMORY;
    for (i = 0; i < all; i++)
        list[i] = i < count ? entries + i : file->parts + (i - count);
    sort(list, all, by_name);
    for (i = 1; i < all; i++)
        if (!by_name(list[i - 1], list[i]))
            return fail(file, POPUP_INVALID, list[i], "is in the file twice; expected each state_dict key in one place");
    for (i = 0; i < all; i++) /* drop the masks */
        if (list[i] < file->parts || list[i] >= file->parts + file->part_count || list[i]->kind == POPUP_STORED)
            list[file->count++] = list[i];
    file->tensors = list;
    for (i = 0; i < count; i++)
        if (entries[i].kind == POPUP_ALIAS) {
            entries[i].target = search(list, file->count, entries[i].stream, entries[i].stream_size, "");
            if (!entries[i].target || entries[i].target->kind == POPUP_ALIAS)
                return fail(file, POPUP_INVALID, entries + i, "is an alias of what is no tensor of its own");
        }
    return POPUP_OK;
}

static int take_probe(popup_file *file, text probe) {
    popup_tensor input = {"probe", 5, 0};
    text value, rest, item;
    int valid;
    if (*probe.at != '{')
        return fail(file, POPUP_INVALID, &input, "is not an object");
    TRY(need(file, &input, probe, "shape", "[", &value));
    TRY(take_shape(file, value, &input));
    TRY(need(file, &input, probe, "output", "[", &value));
    valid = input.count && input.count <= PROBE_LIMIT && count_items(value);
    for (rest = inside(value); next_item(&rest, NULL, &item);)
        valid = valid && strchr("if", sort_of(item));
    TRY(need(file, &input, probe, "rtol", "if", &value));
    return valid && real(value) > 0 ? POPUP_OK : fail(file, POPUP_INVALID, &input, "has values that none can have");
}

static int read_manifest(popup_file *file, text manifest) {
    enum { FORMAT, VERSION, REQUIRES, SEED, ARCHITECTURE, PROVENANCE, LISTS, DIGESTS = LISTS + 4, KEYS = DIGESTS + 4 };
    static const char *const keys[KEYS][2] = {
        {"format", "\""}, {"format_version", "i"}, {"requires", "["}, {"seed", "\""}, {"architecture", "{"},
        {"provenance", "{"}, {"masked", "["}, {"generated", "["}, {"constants", "{"}, {"aliases", "{"},
        {"manifest_sha256", "\""}, {"masks_sha256", "\""}, {"tensors_sha256", "\""}, {"weights_sha256", "\""}};
    static const char *const words[] = {"library", "name", "version", "tag", "sha256"};
    static const popup_tensor whole = {"the file", 8, 0};
    text v[KEYS], w[6] = {{NULL, NULL}}, b[5], rest, key, value;
    popup_tensor *entries;
    size_t counts[4], count = 0, i, j, n = 0;
    uint64_t seed;
    int coded = 0, based = 0, has_base;
    sha256 hash;
    if (manifest.end - manifest.at > MANIFEST_LIMIT)
        return fail(file, POPUP_INVALID, NULL, "the manifest has more than 8388608 characters");
    TRY(check_json(file, "the manifest", manifest, 1));
    for (i = 0; i < KEYS; i++)
        TRY(need(file, &whole, manifest, keys[i][0], keys[i][1], v + i));
    if (!is(v[FORMAT], "\"popup-surgery\""))
        return fail(file, POPUP_NOT_POPUP, NULL, "the format is not popup-surgery");
    if (!is(v[VERSION], "1") || (count_items(v[REQUIRES]) && !is(v[REQUIRES], "[\"range_coded\"]")))
        return fail(file, POPUP_UNSUPPORTED, NULL, "the file needs a newer reader: format_version %.*s, requires %.*s",
                    (int)(v[VERSION].end - v[VERSION].at), v[VERSION].at,
                    (int)(v[REQUIRES].end - v[REQUIRES].at < 80 ? v[REQUIRES].end - v[REQUIRES].at : 80), v[REQUIRES].at);
    for (i = 0; i < 4; i++) {
        value = inside(v[DIGESTS + i]);
        if (value.end - value.at != 64 || strspn(value.at, "0123456789abcdef") != 64)
            return fail(file, POPUP_INVALID, NULL, "%s is not a SHA-256", keys[DIGESTS + i][0]);
        memcpy(file->digests[i], value.at, 64);
    }
    sha256_begin(&hash); /* of the text without the member `manifest_sha256` and the comma that is always behind it */
    sha256_add(&hash, manifest.at, (size_t)(v[DIGESTS].at - manifest.at) - strlen("\"manifest_sha256\":"));
    sha256_add(&hash, v[DIGESTS].end + 1, (size_t)(manifest.end - v[DIGESTS].end) - 1);
    if (!sha256_is(&hash, file->digests[MANIFEST]))
        return fail(file, POPUP_DIGEST, NULL, "manifest_sha256 does not match: the manifest is damaged");
    value = inside(v[SEED]);
    if (!whole_number(value, &seed) || (*value.at == '0' && value.end - value.at > 1))
        return fail(file, POPUP_INVALID, NULL, "the seed is not a decimal string from 0 to 2**64 - 1");
    snprintf(file->seed, sizeof file->seed, "%" PRIu64, seed);
    file->provenance = v[PROVENANCE].at, file->provenance_size = (size_t)(v[PROVENANCE].end - v[PROVENANCE].at);
    for (i = 0; i < 3; i++)
        TRY(need(file, &whole, v[ARCHITECTURE], words[i], "\"", w + i));
    TRY(need(file, &whole, v[ARCHITECTURE], "kwargs", "{", &value));
    if (find(manifest, "probe", &value))
        TRY(take_probe(file, value));
    if ((has_base = find(manifest, "base", &value))) {
        if (*value.at != '{')
            return fail(file, POPUP_INVALID, NULL, "the base is not an object");
        for (i = 0; i < 5; i++)
            TRY(need(file, &whole, value, words[i], "\"", b + i));
        if (b[4].end - b[4].at != 66 || strspn(b[4].at + 1, "0123456789abcdef") != 64)
            return fail(file, POPUP_INVALID, NULL, "the base's sha256 is not a SHA-256");
        memcpy(file->base_sha256, b[4].at + 1, 64);
        unescape(inside(b[1])), file->base = b[1].at + 1;
    }
    unescape(inside(w[0])), file->library = w[0].at + 1;
    unescape(inside(w[1])), file->architecture = w[1].at + 1;
    for (i = 0; i < 4; count += counts[i++])
        counts[i] = count_items(v[LISTS + i]);
    if (!(entries = take(file, count, sizeof *entries)))
        return POPUP_MEMORY;
    file->masked = entries, file->masked_count = counts[0];
    for (i = 0; i < 4; i++)
        for (rest = inside(v[LISTS + i]); next_item(&rest, i < 2 ? NULL : &key, &value); n++)
            if (i < 2) {
                TRY(take_drawn(file, value, i ? POPUP_GENERATED : POPUP_MASKED, entries + n));
                coded |= entries[n].range_coded, based |= entries[n].distribution == POPUP_BASE;
                if (entries[n].distribution == POPUP_NORMAL && !file->quantiles)
                    TRY(make_quantiles(file));
            } else if (i == 2)
                TRY(take_constant(file, key, value, entries + n));
            else if (*value.at != '"')
                return fail(file, POPUP_INVALID, NULL, "the manifest has an alias of what is no string");
            else {
                entries[n].kind = POPUP_ALIAS, entries[n].distribution = POPUP_NOT_DRAWN, entries[n].dtype = "";
                entries[n].name = key.at, entries[n].name_size = unescape(key);
                entries[n].stream = value.at + 1, entries[n].stream_size = unescape(inside(value));
            }
    j = count_items(v[REQUIRES]);
    if (coded != (j > 0) || based != has_base)
        return fail(file, POPUP_INVALID, NULL, "the manifest's requires or base do not fit its masks");
    return list_tensors(file, entries, count);
}

/* ---- 6. range_coded masks: models of bytes or of gaps, in integers alone, and the coder ---- */

typedef struct {
    uint16_t limb[24]; /* base 65536, the lowest first: n ** 8 * 2**24 for n < CODED_LIMIT */
} big;

static big big_from(uint64_t high, uint64_t low) {
    big result = {{0}};
    int i;
    for (i = 0; i < 8; i++)
        result.limb[i] = (uint16_t)((i < 4 ? low : high) >> i % 4 * 16);
    return result;
}

static big times(big a, uint64_t factor) {
    uint64_t carry = 0;
    int i;
    for (i = 0; i < 24; i++, carry >>= 16)
        carry += a.limb[i] * factor, a.limb[i] = (uint16_t)carry;
    return a;
}

static int at_most(const big *a, const big *b) {
    int i = 23;
    while (i && a->limb[i] == b->limb[i])
        i--;
    return a->limb[i] <= b->limb[i];
}

/* 1 + weight * (2**24 - 256) // sum */
static uint32_t frequency(big weight, big sum) {
    uint32_t quotient = 0, bit;
    weight = times(weight, (1 << 24) - 256);
    for (bit = 1 << 23; bit; bit >>= 1) {
        big trial = times(sum, quotient | bit);
        quotient |= at_most(&trial, &weight) ? bit : 0;
    }
    return 1 + quotient;
}

/* Make frequencies cumulative, of which `largest` gets what they lack to 2**24. */
static void accumulate(uint32_t table[257], unsigned largest) {
    uint32_t sum = 0, i, each;
    for (i = 0; i < 256; i++)
        sum += table[i];
    table[largest] += (1 << 24) - sum;
    for (sum = 0, i = 0; i <= 256; i++, sum += each)
        each = i < 256 ? table[i] : 0, table[i] = sum;
}

static void model_bytes(popup_cursor *cursor, uint64_t n, uint64_t kept) {
    big sum = big_from(0, 1), weight;
    uint32_t by_count[9];
    unsigned i, j;
    for (i = 0; i < 8; i++)
        sum = times(sum, n); /* the binomial theorem */
    for (i = 0; i < 9; i++) {
        for (weight = big_from(0, 1), j = 0; j < 8; j++)
            weight = times(weight, j < i ? kept : n - kept);
        by_count[i] = frequency(weight, sum);
    }
    for (i = 0; i < 256; i++) {
        for (j = 0, cursor->symbols[0][i] = 0; j < 8; j++)
            cursor->symbols[0][i] += i >> j & 1;
        cursor->symbols[0][i] = by_count[cursor->symbols[0][i]];
    }
    accumulate(cursor->symbols[0], 2 * kept > n ? 255 : 0);
}

static void model_gaps(popup_cursor *cursor, uint64_t n, uint64_t others) {
    uint64_t weights[257], x = 0, rest = others, low, high, i;
    for (i = 0; i < 64; i++) { /* x = (others << 64) // n */
        rest *= 2, x = 2 * x + (rest >= n);
        rest -= rest >= n ? n : 0;
    }
    do {
        for (weights[1] = x, i = 1; i < 256; i++)
            weights[i + 1] = multiply_high(weights[i], x);
        for (low = 0, high = 1, i = 1; i < 256; i++)
            low += weights[i], high += low < weights[i];
        for (i = 0; i < 256; i++)
            cursor->symbols[cursor->digits][i] = frequency(i ? big_from(0, weights[i]) : big_from(1, 0),
                                                           big_from(high, low));
        accumulate(cursor->symbols[cursor->digits++], 0);
        x = weights[256];
    } while (others >> 8 * cursor->digits);
}

/* Have bytes in the window if any are left. */
static int fill_window(popup_file *file, popup_coder *coder) {
    if (coder->at < coder->end || coder->offset == coder->stop)
        return POPUP_OK;
    coder->end = sizeof coder->window;
    if (coder->stop - coder->offset < coder->end)
        coder->end = (size_t)(coder->stop - coder->offset);
    coder->at = 0, coder->offset += coder->end;
    return read_at(file, coder->offset - coder->end, coder->window, coder->end);
}

static int shift_coder(popup_cursor *cursor, popup_coder *coder) {
    uint32_t word = 0;
    TRY(fill_window(cursor->file, coder));
    if (coder->at < coder->end)
        word = (uint32_t)load_le(coder->window + coder->at, 4), coder->at += 4;
    else if (coder->missing++)
        return fail(cursor->file, POPUP_INVALID, cursor->tensor, "has a mask that ends too early");
    coder->point = coder->point << 32 | word, coder->lower <<= 32, coder->range <<= 32;
    return POPUP_OK;
}

static int next_symbol(popup_cursor *cursor, popup_coder *coder, const uint32_t table[257], uint64_t *symbol) {
    uint64_t scale = coder->range >> 24, place = (coder->point - coder->lower) / scale;
    unsigned low = 0, high = 256;
    if (place >> 24)
        return fail(cursor->file, POPUP_INVALID, cursor->tensor, "has a mask of bytes that no mask gives");
    while (high - low > 1)
        if (table[(low + high) / 2] <= place)
            low = (low + high) / 2;
        else
            high = (low + high) / 2;
    coder->lower += scale * table[low], coder->range = scale * (table[low + 1] - table[low]);
    *symbol = low;
    return coder->range >> 32 ? POPUP_OK : shift_coder(cursor, coder);
}

/* Read the next gap. The digits of 65,536 gaps stand apart, so that each digit has a coder of its own. */
static int next_gap(popup_cursor *cursor) {
    popup_coder *last = cursor->coders + cursor->digits - 1, ahead;
    uint64_t digit, i, j;
    if (!cursor->group) {
        cursor->group = cursor->gaps < 65536 ? cursor->gaps : 65536;
        for (ahead = *last, i = 0; i < cursor->digits; i++)
            for (cursor->coders[i] = ahead, j = 0; i + 1 < cursor->digits && j < cursor->group; j++)
                TRY(next_symbol(cursor, &ahead, cursor->symbols[i], &digit));
    }
    cursor->group--;
    for (cursor->gap = 0, i = 0; i < cursor->digits; i++) {
        TRY(next_symbol(cursor, cursor->coders + i, cursor->symbols[i], &digit));
        cursor->gap |= digit << 8 * i;
    }
    return POPUP_OK;
}

static int begin_coded(popup_cursor *cursor) {
    popup_coder *coder = cursor->coders;
    uint64_t n = cursor->tensor->count, kept = cursor->tensor->kept, rare = kept < n - kept ? kept : n - kept;
    TRY(shift_coder(cursor, coder));
    TRY(shift_coder(cursor, coder));
    coder->range = UINT64_MAX;
    if (64 * rare >= n)
        return model_bytes(cursor, n, kept), POPUP_OK;
    model_gaps(cursor, n, n - rare);
    cursor->coders[cursor->digits - 1] = *coder;
    cursor->gaps = rare;
    return next_gap(cursor);
}

/* Check that the words are those that a writer ends with: there is one file for one mask. */
static int end_coded(popup_cursor *cursor) {
    popup_coder *coder = cursor->coders + (cursor->digits ? cursor->digits - 1 : 0);
    uint64_t last = (coder->lower + UINT32_MAX) >> 32, one_more = (coder->lower + coder->range) >> 32 == last;
    if (cursor->gaps || coder->at < coder->end || coder->offset < coder->stop || coder->missing + one_more != 1 ||
        coder->point != last << 32)
        return fail(cursor->file, POPUP_INVALID, cursor->tensor, "has a mask of other bytes than a writer gives it");
    return POPUP_OK;
}

/* ---- masks and weights, 64 at a time ---- */

static int next_mask(popup_cursor *cursor, unsigned n, uint64_t *mask) {
    const popup_tensor *tensor = cursor->tensor;
    popup_coder *coder = cursor->coders;
    uint64_t all = UINT64_MAX >> (64 - n), symbol;
    unsigned i, at = 0, bytes = (n + 7) / 8;
    *mask = 0;
    if (tensor->kind != POPUP_MASKED || (tensor->range_coded && tensor->start == tensor->stop)) {
        *mask = tensor->kind != POPUP_MASKED || tensor->kept ? all : 0;
    } else if (!tensor->range_coded) {
        TRY(fill_window(cursor->file, coder));
        *mask = load_le(coder->window + coder->at, bytes), coder->at += bytes;
    } else if (!cursor->digits) {
        for (i = 0; i < bytes; i++) {
            TRY(next_symbol(cursor, coder, cursor->symbols[0], &symbol));
            *mask |= symbol << 8 * i;
        }
    } else {
        while (cursor->gaps && cursor->gap < n - at) {
            at += (unsigned)cursor->gap;
            *mask |= (uint64_t)1 << at++;
            if (--cursor->gaps)
                TRY(next_gap(cursor));
        }
        cursor->gap -= n - at;
        *mask = 2 * tensor->kept > tensor->count ? ~*mask & all : *mask;
    }
    if (*mask & ~all)
        return fail(cursor->file, POPUP_INVALID, tensor, "has a mask with padding bits that are not 0");
    for (symbol = *mask; symbol; symbol &= symbol - 1)
        cursor->ones++;
    return POPUP_OK;
}

/* Write n of at most 64 elements. */
static int write_elements(popup_cursor *cursor, popup_format format, uint64_t mask, unsigned n, uint8_t *to) {
    const popup_tensor *tensor = cursor->tensor;
    size_t size = tensor->element_size;
    uint64_t bits = 0;
    uint8_t stored[64 * 8];
    float values[64], value;
    unsigned i;
    if (format == POPUP_MASK)
        return store_le(to, mask, (n + 7) / 8), POPUP_OK;
    if (tensor->kind == POPUP_STORED)
        TRY(read_at(cursor->file, cursor->file->data + tensor->start + cursor->position * size, stored, n * size));
    else if (tensor->kind != POPUP_CONSTANT)
        draw(cursor, values, n);
    if (format == POPUP_2BIT)
        memset(to, 0, (n + 3) / 4);
    for (i = 0; i < n; i++) {
        value = tensor->kind == POPUP_STORED || tensor->kind == POPUP_CONSTANT || !(mask >> i & 1) ? 0 : values[i];
        if (format == POPUP_INT8 || format == POPUP_2BIT) {
            int ternary = (value > 0) - (value < 0);
            if (format == POPUP_INT8)
                to[i] = (uint8_t)ternary;
            else
                to[i / 4] |= (uint8_t)((ternary + 1) << i % 4 * 2);
            continue;
        }
        bits = tensor->kind == POPUP_STORED ? load_le(stored + i * size, size)
               : tensor->kind == POPUP_CONSTANT ? tensor->value : narrow(tensor->type, value);
        if (format == POPUP_BYTES)
            store_le(to + i * size, bits, size);
        else {
            value = size < 8 ? widen(tensor->type, bits) : value;
            memcpy(to + 4 * i, &value, 4);
        }
    }
    return POPUP_OK;
}

/* ---- what popup.h describes ---- */

int popup_open(popup_file *file, popup_reader *read, void *from, uint64_t size, void *memory, size_t memory_size) {
    static const popup_file empty;
    text manifest;
    *file = empty;
    file->read = read, file->from = from, file->memory = memory, file->memory_size = memory_size;
    TRY(read_header(file, size, &manifest));
    return read_manifest(file, manifest);
}

/* Check the digest of all masks, or of all effective weights in float32. */
static int check_masked(popup_file *file, popup_format format, const char *digest, uint64_t limit) {
    float values[1024];
    uint64_t left;
    size_t i, j, size;
    popup_cursor cursor;
    sha256 hash;
    sha256_begin(&hash);
    for (i = 0; i < file->masked_count; limit -= file->masked[i++].count) {
        if (file->masked[i].count > limit)
            return fail(file, POPUP_MEMORY, file->masked + i, "has more weights than the limit that was set leaves");
        TRY(popup_begin(&cursor, file, file->masked + i));
        for (left = file->masked[i].count; left; left -= size) {
            size = left < 1024 ? (size_t)left : 1024;
            TRY(popup_next(&cursor, format, values, size));
            for (j = 0; format == POPUP_F32 && j < size; j++)
                store_le((uint8_t *)(values + j), float_bits(values[j]), 4);
            sha256_add(&hash, values, format == POPUP_F32 ? 4 * size : (size + 7) / 8);
        }
    }
    if (!sha256_is(&hash, file->digests[format == POPUP_F32 ? WEIGHTS : MASKS]))
        return fail(file, POPUP_DIGEST, NULL, "%s does not match: the file is damaged", digest);
    return POPUP_OK;
}

int popup_check(popup_file *file, uint64_t limit) {
    uint8_t bytes[1024];
    uint64_t at;
    size_t i, j, size;
    sha256 hash;
    sha256_begin(&hash);
    for (i = 0; i < file->count; i++) {
        const popup_tensor *tensor = file->tensors[i];
        if (tensor->kind != POPUP_STORED)
            continue;
        sha256_add(&hash, tensor->name, tensor->name_size);
        sha256_add(&hash, "", 1), sha256_add(&hash, tensor->dtype, strlen(tensor->dtype) + 1);
        for (j = 0; j < tensor->dimensions; j++)
            sha256_add(&hash, bytes, (size_t)sprintf((char *)bytes, "%s%" PRIu64, j ? "," : "", tensor->shape[j]));
        sha256_add(&hash, "", 1);
        for (at = tensor->start; at < tensor->stop; at += size) {
            size = tensor->stop - at < sizeof bytes ? (size_t)(tensor->stop - at) : sizeof bytes;
            TRY(read_at(file, file->data + at, bytes, size));
            sha256_add(&hash, bytes, size);
            for (j = 0; types[tensor->type].sort == 'b' && j < size; j++)
                if (bytes[j] > 1)
                    return fail(file, POPUP_INVALID, tensor, "is BOOL and has bytes other than 0 and 1");
        }
    }
    if (!sha256_is(&hash, file->digests[TENSORS]))
        return fail(file, POPUP_DIGEST, NULL, "tensors_sha256 does not match: a stored tensor is damaged");
    return check_masked(file, POPUP_MASK, "masks_sha256", limit);
}

int popup_verify(popup_file *file, uint64_t limit) { return check_masked(file, POPUP_F32, "weights_sha256", limit); }

const popup_tensor *popup_find(const popup_file *file, const char *name) {
    return search(file->tensors, file->count, name, strlen(name), "");
}

/* Return whether a tensor can be written in a format. */
static int fits(const popup_tensor *tensor, popup_format format) {
    int drawn = tensor->kind == POPUP_MASKED || tensor->kind == POPUP_GENERATED;
    if (format == POPUP_MASK || tensor->distribution == POPUP_BASE)
        return format == POPUP_MASK && tensor->kind == POPUP_MASKED;
    if (format == POPUP_INT8 || format == POPUP_2BIT)
        return tensor->kind == POPUP_MASKED && tensor->distribution <= POPUP_UNSIGNED_CONSTANT;
    return format == POPUP_BYTES || (types[tensor->type].sort == 'f' && (drawn || tensor->element_size < 8));
}

size_t popup_size(const popup_tensor *tensor, popup_format format, uint64_t count) {
    static const unsigned bits[] = {0, 32, 8, 2, 1}; /* of an element, in the order of popup_format */
    uint64_t each;
    tensor = tensor->target ? tensor->target : tensor;
    each = format == POPUP_BYTES ? 8 * tensor->element_size : bits[format];
    count = fits(tensor, format) && count <= (UINT64_MAX - 7) / each ? (count * each + 7) / 8 : 0;
    return count <= SIZE_MAX ? (size_t)count : 0;
}

int popup_begin(popup_cursor *cursor, popup_file *file, const popup_tensor *tensor) {
    static const popup_cursor empty;
    *cursor = empty;
    tensor = tensor->target ? tensor->target : tensor;
    cursor->file = file, cursor->tensor = tensor, cursor->word = 4;
    if (tensor->distribution < POPUP_BASE)
        stream_key(cursor->key, file->seed, tensor->kind == POPUP_MASKED ? "weight" : "other", tensor->stream,
                   tensor->stream_size);
    cursor->coders[0].offset = file->data + tensor->start, cursor->coders[0].stop = file->data + tensor->stop;
    return tensor->range_coded && tensor->start < tensor->stop ? begin_coded(cursor) : POPUP_OK;
}

int popup_next(popup_cursor *cursor, popup_format format, void *buffer, uint64_t count) {
    const popup_tensor *tensor = cursor->tensor;
    uint64_t mask = 0, left = tensor->count - cursor->position;
    uint8_t *to = buffer;
    unsigned n;
    if (!fits(tensor, format))
        return fail(cursor->file, tensor->distribution == POPUP_BASE ? POPUP_UNSUPPORTED : POPUP_ARGUMENT, tensor,
                    tensor->distribution == POPUP_BASE ? "is a mask on weights of %s, which the file has not: read "
                    "the mask alone" : "cannot be written in that format", cursor->file->base);
    if (count > left || (count % 64 && count < left))
        return fail(cursor->file, POPUP_ARGUMENT, tensor, "is read in pieces of 64 elements, or what is left");
    for (; count; count -= n, cursor->position += n, to += popup_size(tensor, format, n)) {
        n = count < 64 ? (unsigned)count : 64;
        if (tensor->kind == POPUP_MASKED)
            TRY(next_mask(cursor, n, &mask));
        else mask = UINT64_MAX;
        TRY(write_elements(cursor, format, mask, n, to));
    }
    if (tensor->kind != POPUP_MASKED || cursor->position < tensor->count)
        return POPUP_OK;
    if (cursor->ones != tensor->kept)
        return fail(cursor->file, POPUP_INVALID, tensor, "keeps %" PRIu64 " weights; expected %" PRIu64, cursor->ones,
                    tensor->kept);
    return tensor->range_coded && tensor->start < tensor->stop ? end_coded(cursor) : POPUP_OK;
}

int popup_read(popup_file *file, const popup_tensor *tensor, popup_format format, void *buffer, size_t size) {
    const popup_tensor *target = tensor->target ? tensor->target : tensor;
    popup_cursor cursor;
    if (fits(target, format) && size != popup_size(target, format, target->count))
        return fail(file, POPUP_ARGUMENT, tensor, "needs a buffer of another size");
    TRY(popup_begin(&cursor, file, target));
    return popup_next(&cursor, format, buffer, target->count);
}

int popup_stdio(void *stream, uint64_t offset, void *to, size_t size) {
    if (offset > LONG_MAX || (ftell(stream) != (long)offset && fseek(stream, (long)offset, SEEK_SET)))
        return 1;
    return fread(to, 1, size, stream) != size;
}
