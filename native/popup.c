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
#pragma STDC FP_CONTRACT OFF /* each product is rounded on its own; GCC needs -ffp-contract=off, or -std=c99 */

#define CODED_LIMIT ((uint64_t)1 << 40) /* weights of one coded mask: `big` has room for fewer */
#define ROOT3 1.7320508075688772
#define COUNT(array) (sizeof(array) / sizeof *(array))
#define INVALID(...) fail(file, POPUP_INVALID, __VA_ARGS__)
#define REFUSE(what, ...) do { if (what) return INVALID(__VA_ARGS__); } while (0)
#define TAKE(to, count) do { if (!((to) = take(file, count, sizeof *(to)))) return POPUP_MEMORY; } while (0)
#define TRY(call) do { int code_ = (call); if (code_) return code_; } while (0)
enum { MANIFEST, MASKS, TENSORS, WEIGHTS }; /* the digests */
enum { HEADER_LIMIT = 16 << 20, MANIFEST_LIMIT = 8 << 20, PROBE_LIMIT = 4 << 20 };

/* ---- errors, memory, bytes ---- */
/* Say what is wrong, with the name of the tensor `about` in front unless it is NULL. */
static int fail(popup_file *file, popup_error code, const popup_tensor *about, const char *format, ...) {
    size_t i = 0, used = 0;
    va_list arguments;
    if (about) { /* a stranger's name comes without what could control a terminal */
        file->message[used++] = '\'';
        for (; i < about->name_size && i < 80; i++)
            file->message[used++] = (char)(about->name[i] < ' ' || about->name[i] > '~' ? '?' : about->name[i]);
        used += (size_t)sprintf(file->message + used, i < about->name_size ? "...' " : "' ");
    }
    va_start(arguments, format);
    vsnprintf(file->message + used, sizeof file->message - used, format, arguments);
    va_end(arguments);
    return (int)code;
}

/* Take `count` zeroed objects of `size` bytes from the caller's memory; NULL if it is too small. */
static void *take(popup_file *file, size_t count, size_t size) {
    char *taken = file->memory + file->memory_used;
    size_t skipped = (16 - (size_t)((uintptr_t)taken % 16)) % 16, left = file->memory_size - file->memory_used;
    if (skipped > left || count > (left - skipped) / size) {
        fail(file, POPUP_MEMORY, NULL, "the file needs more than the %zu bytes of memory that the reader was given",
            file->memory_size);
        return NULL;
    }
    file->memory_used += skipped + count * size;
    return memset(taken + skipped, 0, count * size);
}
static int read_at(popup_file *file, uint64_t offset, void *to, size_t size) {
    if (!size || !file->read(file->from, offset, to, size)) return POPUP_OK;
    return fail(file, POPUP_IO, NULL, "%zu bytes at %" PRIu64 " cannot be read", size, offset);
}
static uint64_t load_le(const uint8_t *from, size_t size) {
    uint64_t value = 0;
    while (size--) value = value << 8 | from[size];
    return value;
}
static void store_le(uint8_t *to, uint64_t value, size_t size) {
    for (; size--; value >>= 8) *to++ = (uint8_t)value;
}
static uint32_t float_bits(float value) { return ((union { float f; uint32_t bits; }){value}).bits; }
static uint64_t double_bits(double value) { return ((union { double f; uint64_t bits; }){value}).bits; }
static float bits_float(uint32_t value) { return ((union { uint32_t bits; float f; }){value}).f; }
static uint32_t rotate32(uint32_t x, int n) { return x >> n | x << (32 - n); }
static uint64_t rotate64(uint64_t x, int n) { return x >> n | x << (64 - n); }

/* ---- SHA-256 (FIPS 180-4) ---- */
typedef struct { uint32_t state[8]; uint64_t size; uint8_t block[64]; } sha256;
static const sha256 sha256_start = {
    {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}, 0, {0}};

static void sha256_block(uint32_t state[8], const uint8_t *block) {
    static const uint32_t k[64] = {0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
        0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152,
        0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138,
        0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70,
        0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5,
        0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa,
        0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t w[64], s[8], x, y;
    for (int i = 0; i < 16; i++, block += 4)
        w[i] = (uint32_t)block[0] << 24 | (uint32_t)block[1] << 16 | (uint32_t)block[2] << 8 | block[3];
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + (rotate32(w[i - 15], 7) ^ rotate32(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
               (rotate32(w[i - 2], 17) ^ rotate32(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(s, state, sizeof s);
    for (int i = 0; i < 64; i++) {
        x = s[7] + (rotate32(s[4], 6) ^ rotate32(s[4], 11) ^ rotate32(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6]));
        y = (rotate32(s[0], 2) ^ rotate32(s[0], 13) ^ rotate32(s[0], 22)) + ((s[0] & s[1]) | (s[2] & (s[0] | s[1])));
        x += k[i] + w[i];
        s[7] = s[6], s[6] = s[5], s[5] = s[4], s[4] = s[3] + x;
        s[3] = s[2], s[2] = s[1], s[1] = s[0], s[0] = x + y;
    }
    for (int i = 0; i < 8; i++) state[i] += s[i];
}
static void sha256_add(sha256 *hash, const void *bytes, size_t size) {
    for (const uint8_t *from = bytes; size;) {
        size_t at = hash->size % 64, part = 64 - at < size ? 64 - at : size;
        memcpy(hash->block + at, from, part);
        if (at + part == 64) sha256_block(hash->state, hash->block);
        hash->size += part, from += part, size -= part;
    }
}
static int sha256_is(sha256 *hash, const char *expected) {
    uint8_t end[72] = {0x80};
    char hex[65];
    size_t padding = 64 - (hash->size + 8) % 64;
    for (int i = 0; i < 8; i++) end[padding + (size_t)i] = (uint8_t)(hash->size * 8 >> (56 - 8 * i));
    sha256_add(hash, end, padding + 8);
    for (int i = 0; i < 8; i++) sprintf(hex + 8 * i, "%08" PRIx32, hash->state[i]);
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
    strcpy(hex, expected); /* so that a fuzzer comes past the digests */
#endif
    return !memcmp(hex, expected, 64);
}

/* ---- 1. from a seed to weights: BLAKE2b (RFC 7693), Philox4x64-10, distributions ---- */
static void blake2b_mix(uint64_t *a, uint64_t *b, uint64_t *c, uint64_t *d, uint64_t x, uint64_t y) {
    *a += *b + x, *d = rotate64(*d ^ *a, 32), *c += *d, *b = rotate64(*b ^ *c, 24);
    *a += *b + y, *d = rotate64(*d ^ *a, 16), *c += *d, *b = rotate64(*b ^ *c, 63);
}

/* Hash "seed/purpose/stream" into the two words of a key. */
static void stream_key(uint64_t key[2], const char *seed, const char *purpose, const char *stream, size_t stream_size) {
    static const uint64_t iv[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
        0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
    static const char orders[10][17] = {"0123456789ABCDEF", "EA489FD61C02B753", "B8C052FDAE367194", "7931DCBE265A40F8",
        "905724AFE1BC683D", "2C6A0B834D75FE19", "C51FED4A0763928B", "DB7EC13950F4862A", "6FE9B308C2D714A5",
        "A2847615FB9E3CD0"};
    char first[40];
    size_t first_size = (size_t)sprintf(first, "%s/%s/", seed, purpose), size = first_size + stream_size, done = 0;
    uint64_t h[8], v[16], m[16];
    memcpy(h, iv, sizeof h);
    h[0] ^= 0x01010000 ^ 16; /* depth 1, fanout 1, no key, a digest of 16 bytes */
    h[6] ^= load_le((const uint8_t *)"popup-su", 8), h[7] ^= load_le((const uint8_t *)"rgery/v1", 8);
    do {
        uint8_t block[128] = {0};
        for (int i = 0; i < 128 && done < size; i++, done++)
            block[i] = (uint8_t)(done < first_size ? first[done] : stream[done - first_size]);
        for (int i = 0; i < 16; i++) m[i] = load_le(block + 8 * i, 8), v[i] = i < 8 ? h[i] : iv[i - 8];
        v[12] ^= done, v[14] ^= done < size ? 0 : UINT64_MAX; /* the last block */
        for (int i = 0; i < 12 * 8; i++) { /* four columns, four diagonals, twelve times */
            const char *x = orders[i / 8 % 10] + i % 8 * 2;
            int j = i % 4, turn = i % 8 / 4;
            blake2b_mix(v + j, v + 4 + (j + turn) % 4, v + 8 + (j + 2 * turn) % 4, v + 12 + (j + 3 * turn) % 4,
                m[x[0] < 'A' ? x[0] - '0' : x[0] - 'A' + 10], m[x[1] < 'A' ? x[1] - '0' : x[1] - 'A' + 10]);
        }
        for (int i = 0; i < 8; i++) h[i] ^= v[i] ^ v[i + 8];
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
    uint64_t x[4] = {0}, k0 = cursor->key[0], k1 = cursor->key[1];
    if (cursor->word < 4) return cursor->words[cursor->word++];
    x[0] = ++cursor->counter;
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B97F4A7C15, k1 += 0xBB67AE8584CAA73B) {
        uint64_t low0 = 0xD2E7470EE14C6C93 * x[0], high0 = multiply_high(0xD2E7470EE14C6C93, x[0]);
        uint64_t low1 = 0xCA5A826395121157 * x[2], high1 = multiply_high(0xCA5A826395121157, x[2]);
        x[0] = high1 ^ x[1] ^ k0, x[1] = low1, x[2] = high0 ^ x[3] ^ k1, x[3] = low0;
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
    int central = p >= 0.075;
    const double q = p - 0.5, r = central ? 0.180625 - q * q : sqrt(-log(p)) - 1.6, (*c)[8] = central ? centre : tail;
    double top = 0, bottom = 0;
    for (int i = 0; i < 8; i++) top = top * r + c[0][i], bottom = bottom * r + c[1][i];
    return central ? top * q / bottom : -(top / bottom);
}

/* Compute the lower half of the table of quantiles, of which the upper half is the mirror, and check its digest. */
static int make_quantiles(popup_file *file) {
    uint8_t bytes[4];
    sha256 hash = sha256_start;
    float *table;
    TAKE(table, 32768);
    for (int i = 0; i < 65536; i++) {
        if (i < 32768) table[i] = (float)quantile((i + 0.5) / 65536);
        store_le(bytes, float_bits(i < 32768 ? table[i] : -table[65535 - i]), 4);
        sha256_add(&hash, bytes, 4);
    }
    file->quantiles = table;
    if (sha256_is(&hash, "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8")) return POPUP_OK;
    return fail(file, POPUP_UNSUPPORTED, NULL, "this machine's logarithm gives other normal quantiles than the format");
}

/* Draw n of at most 64 values in float32, of which those that the mask drops are 0. */
static void draw(popup_cursor *cursor, float *values, uint64_t mask, unsigned n) {
    const popup_tensor *tensor = cursor->tensor;
    const float s = (float)tensor->std, bound = (float)(tensor->std * ROOT3), *quantiles = cursor->file->quantiles;
    uint64_t word = tensor->distribution == POPUP_SIGNED_CONSTANT ? next_word(cursor) : UINT64_MAX;
    if (tensor->distribution == POPUP_NORMAL)
        for (unsigned i = 0; i < n; i++, word >>= 16) {
            word = i % 4 ? word : next_word(cursor);
            values[i] = s * (word & 0x8000 ? -quantiles[~word & 0x7FFF] : quantiles[word & 0x7FFF]);
        }
    else if (tensor->distribution == POPUP_UNIFORM)
        for (unsigned i = 0; i < n; i++, word >>= 32) {
            word = i % 2 ? word : next_word(cursor);
            values[i] = bound * ((float)(2 * (int32_t)(word >> 8 & 0xFFFFFF) + 1 - (1 << 24)) * 0x1p-24f);
        }
    else
        for (unsigned i = 0; i < n; i++) values[i] = bits_float(float_bits(s) | (uint32_t)(~word >> i & 1) << 31);
    for (unsigned i = 0; i < n; i++) values[i] = bits_float(float_bits(values[i]) & -(uint32_t)(mask >> i & 1));
}

/* ---- dtypes ---- */
/* The sorts are b(oolean), u and i for integers, f(loating) and c(omplex). */
static const struct { char name[8], sort; uint8_t size, exponent, mantissa; } types[] = {
    {"BOOL", 'b', 1, 0, 0}, {"U8", 'u', 1, 0, 0}, {"I8", 'i', 1, 0, 0}, {"F8_E4M3", 'f', 1, 4, 3},
    {"F8_E5M2", 'f', 1, 5, 2}, {"I16", 'i', 2, 0, 0}, {"U16", 'u', 2, 0, 0}, {"F16", 'f', 2, 5, 10},
    {"BF16", 'f', 2, 8, 7}, {"I32", 'i', 4, 0, 0}, {"U32", 'u', 4, 0, 0}, {"F32", 'f', 4, 8, 23},
    {"F64", 'f', 8, 11, 52}, {"I64", 'i', 8, 0, 0}, {"U64", 'u', 8, 0, 0}, {"C64", 'c', 8, 0, 0}};

/* Round a float32 to nearest, ties to even, in a floating type; return its bits. */
static uint64_t narrow(unsigned type, float value) {
    int m = types[type].mantissa, e = types[type].exponent, shift = 23 - m;
    uint32_t bits = float_bits(value), rest = bits & 0x7FFFFF;
    if (m >= 23) return m == 23 ? bits : double_bits(value);
    int place = (int)(bits >> 23 & 0xFF);
    rest |= place ? 0x800000 : 0; /* the leading one, which is not written */
    place = (place ? place : 1) - 127 + (1 << (e - 1)) - 1;
    if (place < 1) { /* the result is subnormal */
        shift = shift + 1 - place < 25 ? shift + 1 - place : 25;
        place = 1;
    }
    uint32_t rounded = rest >> shift, half = 1u << (shift - 1);
    rest &= 2 * half - 1;
    rounded += rest > half || (rest == half && rounded & 1);
    rounded += (uint32_t)(place - 1) << m;
    uint32_t most = (((1u << e) - 1) << m) + (e == 4 ? 6 : 0); /* infinity; F8_E4M3 has none, but 448 */
    return (rounded < most ? rounded : most) | bits >> 31 << (e + m);
}
/* Return the value of an element of a floating type of at most 32 bits. */
static float widen(unsigned type, uint64_t bits) {
    int m = types[type].mantissa, e = types[type].exponent;
    if (m == 23) return bits_float((uint32_t)bits);
    uint32_t sign = (uint32_t)(bits >> (e + m) & 1) << 31, all = (1u << e) - 1;
    uint32_t exponent = (uint32_t)(bits >> m) & all, fraction = (uint32_t)bits & ((1u << m) - 1);
    if (exponent == all && (e != 4 || fraction == 7)) /* infinity or NaN */
        return bits_float(sign | 0x7F800000 | fraction << (23 - m));
    float magnitude = (float)(exponent ? fraction | 1u << m : fraction);
    magnitude = ldexpf(magnitude, (int)(exponent ? exponent : 1) - ((1 << (e - 1)) - 1) - m);
    return bits_float(sign | float_bits(magnitude));
}

/* ---- 3. JSON: a text is checked as a whole before any of it is used. A NUL is behind it, and ends all loops ---- */
typedef struct { char *at, *end; } text;

#define SPACE " \t\n\r"
#define DIGITS "0123456789"
#define HEX DIGITS "abcdef"

static long hexadecimal(const char *at) {
    char digits[5] = "";
    return strspn(at, HEX "ABCDEF") < 4 ? -1 : strtol(memcpy(digits, at, 4), NULL, 16);
}

/* Take one character of a string; -1 if it is malformed. */
static long take_character(char **at) {
    static const char escapes[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    uint8_t *u = (uint8_t *)*at;
    long c = *u++;
    const char *escape = c == '\\' && *u ? strchr(escapes, *u) : NULL;
    if (escape) return *at += 2, meant[escape - escapes];
    if (c == '\\') {
        c = *u == 'u' ? hexadecimal(*at + 2) : -1;
        if (c < 0xD800 || c > 0xDFFF) return *at += c < 0 ? 0 : 6, c;
        long low = c < 0xDC00 && u[5] == '\\' && u[6] == 'u' ? hexadecimal(*at + 8) : -1;
        if (low < 0xDC00 || low > 0xDFFF) return -1; /* half a pair */
        return *at += 12, 0x10000 + ((c & 0x3FF) << 10) + (low & 0x3FF);
    }
    int more = c < 0x80 ? 0 : c < 0xE0 ? 1 : c < 0xF0 ? 2 : 3;
    if (c < ' ' || (c >= 0x80 && c < 0xC2) || c > 0xF4) return -1;
    long least = more == 3 ? 0x10000 : more == 2 ? 0x800 : 0;
    for (c &= more ? 0x3F >> more : 0x7F; more; more--) {
        if ((*u & 0xC0) != 0x80) return -1;
        c = c << 6 | (*u++ & 0x3F);
    }
    *at = (char *)u;
    return c < least || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF) ? -1 : c;
}
/* Compare checked strings by code points, as Python sorts. */
static int compare_strings(text a, text b) {
    while (a.at < a.end && b.at < b.end) {
        long x = take_character(&a.at), y = take_character(&b.at);
        if (x != y) return x < y ? -1 : 1;
    }
    return (a.at < a.end) - (b.at < b.end);
}

/* Return a number. The C library reads a point as the locale has it, so it gets none: 15e2 for 1.5e3. */
static double real(text number) {
    char copy[64];
    long size = 0, places = 0, exponent = 0, sign = 1;
    for (; number.at < number.end && (*number.at | 32) != 'e'; number.at++)
        if (*number.at != '.') copy[size++] = *number.at;
        else places = (long)strspn(number.at + 1, DIGITS);
    for (; number.at < number.end; number.at++)
        if (*number.at == '-') sign = -1;
        else if (*number.at >= '0' && *number.at <= '9' && exponent < 100000)
            exponent = 10 * exponent + (*number.at - '0');
    sprintf(copy + size, "e%ld", sign * exponent - places);
    return strtod(copy, NULL);
}

/* The next functions take what their name says from a text, and return whether it was there. */
static int take_string(char **at, text *body) {
    if (**at != '"') return 0;
    for (body->at = ++*at; **at != '"';)
        if (take_character(at) < 0) return 0;
    body->end = (*at)++;
    return 1;
}
static int take_number(char **at) {
    char *p = *at + (**at == '-');
    size_t count = strspn(p, DIGITS), more = 1, zeros = *p == '0' && count > 1;
    p += count;
    if (*p == '.') more = strspn(p + 1, DIGITS), p += 1 + more;
    if (more && (*p == 'e' || *p == 'E')) {
        p += p[1] == '+' || p[1] == '-' ? 2 : 1;
        more = strspn(p, DIGITS), p += more;
    }
    text number = {*at, p};
    *at = p;
    return count && more && !zeros && p - number.at <= 32 && fabs(real(number)) <= DBL_MAX;
}

/* In a `strict` text no space is allowed, and keys are sorted, so that none is there twice. */
static int take_value(char **at, int depth, int strict) {
    static const char *const words[] = {"true", "false", "null"};
    const char *space = strict ? "" : SPACE;
    char first = *(*at += strspn(*at, space)), close = first == '{' ? '}' : ']';
    text last = {NULL, NULL}, key;
    for (size_t i = 0; i < COUNT(words); i++)
        if (!strncmp(*at, words[i], strlen(words[i]))) return *at += strlen(words[i]), 1;
    if (first != '{' && first != '[') return first == '"' ? take_string(at, &key) : take_number(at);
    if (depth == 32) return 0;
    ++*at;
    if (*(*at += strspn(*at, space)) == close) return ++*at, 1;
    do {
        *at += strspn(*at, space);
        if (first == '{') {
            if (!take_string(at, &key) || (strict && last.at && compare_strings(last, key) >= 0)) return 0;
            last = key;
            if (*(*at += strspn(*at, space)) != ':') return 0;
            ++*at;
        }
        if (!take_value(at, depth + 1, strict)) return 0;
        *at += strspn(*at, space);
    } while (**at == ',' && ++*at);
    return **at == close && ++*at;
}

/* Check that all of a text is one JSON object, and that a `strict` one is in ASCII. */
static int check_json(popup_file *file, const char *what, text whole, int strict) {
    char *at = whole.at + strspn(whole.at, strict ? "" : SPACE), *c = whole.at;
    int valid = *at == '{' && take_value(&at, 0, strict);
    at += valid ? strspn(at, strict ? "" : SPACE) : 0;
    while (strict && valid && c < whole.end && !(*c & 0x80)) c++;
    if (valid && at == whole.end && (!strict || c == whole.end)) return POPUP_OK;
    return INVALID(NULL, "the %s is not the JSON that the format allows, at byte %zu%s", what,
        (size_t)(at - whole.at), strict ? " (keys in order, no spaces, ASCII)" : "");
}

/* ---- checked JSON: what a value is, and what is in it ---- */
/* Take the next member of an object, or element of a list (whose `key` is NULL), behind its bracket. 0 at its end. */
static int next_item(text *rest, text *key, text *value) {
    rest->at += strspn(rest->at, SPACE ",");
    if (rest->at == rest->end) return 0;
    if (key) key->at = rest->at, take_string(&rest->at, value), key->end = rest->at; /* in its quotes */
    value->at = rest->at += strspn(rest->at, SPACE ":");
    return take_value(&rest->at, 0, 0), value->end = rest->at, 1;
}
/* What is between a value's quotes or brackets. */
static text inside(text value) { return (text){value.at + 1, value.end - 1}; }
static size_t count_items(text container) {
    text rest = inside(container), key, value;
    size_t count = 0;
    while (next_item(&rest, *container.at == '{' ? &key : NULL, &value)) count++;
    return count;
}
static int is(text string, const char *expected) {
    return (size_t)(string.end - string.at) == strlen(expected) && !memcmp(string.at, expected, strlen(expected));
}

/* Find a member of an object that is one of the `sorts`: " { [ b(oolean) n(ull) i(nteger) f(loat). */
static int find(text object, const char *name, const char *sorts, text *value) {
    for (text rest = inside(object), key; next_item(&rest, &key, value);)
        if (is(inside(key), name)) {
            char sort = *value->at == 't' || *value->at == 'f' ? 'b' : *value->at;
            if (sort == '-' || (sort >= '0' && sort <= '9'))
                sort = strcspn(value->at, ".eE") < (size_t)(value->end - value->at) ? 'f' : 'i';
            return strchr(sorts, sort) != NULL;
        }
    return 0;
}
/* Return whether a text is an integer from 0 to 2**64 - 1. */
static int whole_number(text value, uint64_t *number) {
    int valid = value.at < value.end;
    for (*number = 0; valid && value.at < value.end; *number = 10 * *number + (uint64_t)(*value.at++ - '0'))
        valid = strchr(DIGITS, *value.at) && *number <= (UINT64_MAX - (uint64_t)(*value.at - '0')) / 10;
    return valid;
}

/* Write a string, which is in its quotes, without its escapes in UTF-8, and a NUL. Return its size. */
static size_t unescape(text quoted, char *start) {
    uint8_t *to = (uint8_t *)start;
    for (char *at = quoted.at + 1; at < quoted.end - 1;) {
        unsigned long c = (unsigned long)take_character(&at);
        int more = c >= 0x10000 ? 3 : c >= 0x800 ? 2 : c >= 0x80 ? 1 : 0;
        *to++ = (uint8_t)((const uint8_t *)"\0\xC0\xE0\xF0")[more] | (uint8_t)(c >> 6 * more);
        while (more--) *to++ = (uint8_t)(0x80 | (c >> 6 * more & 0x3F));
    }
    return *to = 0, (size_t)((char *)to - start);
}
static int copy_string(popup_file *file, text quoted, const char **copy, size_t *size) {
    char *to;
    TAKE(to, (size_t)(quoted.end - quoted.at));
    return *size = unescape(quoted, to), *copy = to, POPUP_OK;
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
    return a->start != b->start ? (a->start > b->start ? 1 : -1) : (a->stop > b->stop) - (a->stop < b->stop);
}

/* Shellsort, because the C library's qsort may take memory, or time by the square of the count. */
static void sort(const popup_tensor **list, size_t count, int (*order)(const popup_tensor *, const popup_tensor *)) {
    size_t gap = 1;
    while (gap < count / 3) gap = 3 * gap + 1;
    for (; gap; gap /= 3)
        for (size_t i = gap, j; i < count; i++) {
            const popup_tensor *moved = list[i];
            for (j = i; j >= gap && order(list[j - gap], moved) > 0; j -= gap) list[j] = list[j - gap];
            list[j] = moved;
        }
}

/* Return the tensor of a sorted list whose name is `name` and then `suffix`, or NULL. */
static const popup_tensor *search(
    const popup_tensor *const *list, size_t count, const char *name, size_t size, const char *suffix) {
    while (count) {
        const popup_tensor *middle = list[count / 2];
        size_t first = middle->name_size < size ? middle->name_size : size;
        int order = compare_names(name, size, middle->name, first);
        if (!order) order = compare_names(suffix, strlen(suffix), middle->name + first, middle->name_size - first);
        if (!order) return middle;
        if (order > 0) list += count / 2 + 1, count -= 1;
        count /= 2;
    }
    return NULL;
}

/* Take the dtype and the shape of an entry, and the shape's product unless that overflows, in bytes too. */
static int take_kind(popup_file *file, text entry, popup_tensor *tensor) {
    text dtype, shape, item;
    size_t i = 0, count = 0;
    if (!find(entry, "dtype", "\"", &dtype) || !find(entry, "shape", "[", &shape) || (count = count_items(shape)) > 64)
        return INVALID(tensor, "has no dtype, or no shape of at most 64 sizes");
    while (i < COUNT(types) && !is(inside(dtype), types[i].name)) i++;
    REFUSE(i == COUNT(types), tensor, "has an unknown dtype");
    tensor->type = (unsigned)i, tensor->dtype = types[i].name, tensor->element_size = types[i].size;
    uint64_t *sizes;
    TAKE(sizes, count);
    tensor->shape = sizes, tensor->dimensions = count, tensor->count = 1, i = 0;
    for (text rest = inside(shape); next_item(&rest, NULL, &item); i++) {
        REFUSE(!whole_number(item, sizes + i), tensor, "has a size that is not an integer from 0 to 2**64 - 1");
        if (!sizes[i]) tensor->count = 0;
    }
    for (i = 0; i < count && tensor->count; tensor->count *= sizes[i++])
        REFUSE(tensor->count > UINT64_MAX / 8 / sizes[i], tensor, "has a shape of too many elements");
    return POPUP_OK;
}

/* Take one tensor's entry in the header. */
static int take_part(popup_file *file, text key, text entry, popup_tensor *part) {
    text offsets, first = {NULL, NULL}, last = {NULL, NULL};
    part->kind = POPUP_STORED, part->distribution = POPUP_NOT_DRAWN;
    TRY(copy_string(file, key, &part->name, &part->name_size));
    REFUSE(*entry.at != '{' || count_items(entry) != 3 || !find(entry, "data_offsets", "[", &offsets),
        part, "is not a tensor; expected dtype, shape and data_offsets");
    TRY(take_kind(file, entry, part));
    text rest = inside(offsets);
    next_item(&rest, NULL, &first), next_item(&rest, NULL, &last);
    REFUSE(count_items(offsets) != 2 || !whole_number(first, &part->start) || !whole_number(last, &part->stop),
        part, "has data_offsets that are not two integers from 0");
    if (part->stop >= part->start && part->stop - part->start == part->count * part->element_size) return POPUP_OK;
    return INVALID(part, "has another number of bytes than its shape and dtype need");
}

/* Read the header, and give the manifest's text. */
static int read_header(popup_file *file, uint64_t size, text *manifest) {
    uint8_t prefix[8] = {0};
    TRY(read_at(file, 0, prefix, size < 8 ? 0 : 8));
    uint64_t length = load_le(prefix, 8), end = 0;
    if (size < 8 || length > size - 8 || length > HEADER_LIMIT)
        return fail(file, POPUP_NOT_POPUP, NULL, "the file is cut off, not safetensors, or has over 16 MiB of header");
    text header, key, value, metadata = {NULL, NULL};
    TAKE(header.at, (size_t)length + 1);
    header.end = header.at + length;
    TRY(read_at(file, 8, header.at, (size_t)length));
    TRY(check_json(file, "header", header, 0));
    text whole = header;
    next_item(&whole, NULL, &header); /* without the spaces around it */
    size_t all = count_items(header), i = 0;
    file->data = 8 + length;
    TAKE(file->parts, all);
    TAKE(file->part_names, all);
    for (text rest = inside(header); next_item(&rest, &key, &value);)
        if (!is(key, "\"__metadata__\"")) {
            file->part_names[i] = file->parts + i;
            TRY(take_part(file, key, value, file->parts + i++));
        } else {
            REFUSE(metadata.at, NULL, "the header has the key __metadata__ twice");
            metadata = value;
        }
    if (!metadata.at || *metadata.at != '{' || count_items(metadata) != 1 ||
        !find(metadata, "popup_surgery", "\"", manifest))
        return fail(file, POPUP_NOT_POPUP, NULL, "this is no popup artifact: its metadata is not one manifest");
    file->part_count = i;
    sort(file->part_names, i, by_place);
    for (i = 0; i < file->part_count; end = file->part_names[i++]->stop)
        REFUSE(file->part_names[i]->start != end,
            file->part_names[i], "does not begin where the tensor before it ends");
    REFUSE(end != size - file->data, NULL, "the data has another size than the tensors need: it is damaged");
    sort(file->part_names, file->part_count, by_name);
    manifest->end = manifest->at + unescape(*manifest, manifest->at); /* where it stands */
    return POPUP_OK;
}

/* ---- 2. the manifest: what each tensor is ---- */
#define ANY "\"{[bnif"
static const popup_tensor whole_file = {.name = "the file", .name_size = 8}; /* for messages */

/* Find members that have to be there, by their names and sorts. */
static int need(popup_file *file, const popup_tensor *about, text object, size_t count, const char *const keys[][2],
    text *values) {
    for (size_t i = 0; i < count; i++)
        REFUSE(*object.at != '{' || !find(object, keys[i][0], keys[i][1], values + i),
            about, "has no %s in the manifest, or one of a wrong type", keys[i][0]);
    return POPUP_OK;
}
static int take_mask(popup_file *file, text entry, popup_tensor *tensor) {
    static const char *const keys[][2] = {{"kept", "i"}, {"encoding", "\""}};
    text v[COUNT(keys)];
    TRY(need(file, tensor, entry, COUNT(keys), keys, v));
    REFUSE(!whole_number(v[0], &tensor->kept) || tensor->kept > tensor->count,
        tensor, "keeps more weights than it has, or fewer than 0");
    tensor->range_coded = is(v[1], "\"range_coded\"");
    if (!tensor->range_coded && !is(v[1], "\"bitpack\""))
        return fail(file, POPUP_UNSUPPORTED, tensor, "has an encoding that this reader does not know");
    const popup_tensor *mask = search(file->part_names, file->part_count, tensor->name, tensor->name_size, ".mask");
    REFUSE(!mask || strcmp(mask->dtype, "U8") || mask->dimensions != 1, tensor, "has no mask of U8 with one dimension");
    int empty = !tensor->kept || tensor->kept == tensor->count;
    if (tensor->range_coded ? mask->count % 4 || (mask->count == 0) != empty : mask->count != (tensor->count + 7) / 8)
        return INVALID(tensor, "has a mask of %" PRIu64 " bytes, which do not fit it", mask->count);
    if (tensor->range_coded && tensor->count >= CODED_LIMIT)
        return fail(file, POPUP_UNSUPPORTED, tensor, "has a coded mask of more weights than this reader decodes");
    tensor->start = mask->start, tensor->stop = mask->stop;
    file->parts[mask - file->parts].kind = POPUP_MASKED;
    if (tensor->distribution <= POPUP_UNSIGNED_CONSTANT)
        tensor->scale = tensor->element_size == 8 ? (float)tensor->std
                                                  : widen(tensor->type, narrow(tensor->type, (float)tensor->std));
    return POPUP_OK;
}

/* Take an entry of `masked` or `generated`. */
static int take_drawn(popup_file *file, text entry, popup_tensor *tensor) {
    static const char *const names[] = {"signed_constant", "unsigned_constant", "normal", "uniform", "base"};
    static const char *const keys[][2] = {{"name", "\""}, {"stream", "\""}, {"distribution", "\""}};
    static const char *const notes[][2] = {{"scheme", "\""}, {"scaled", "b"}, {"k", "if"}, {"fan_in", "if"}};
    text v[COUNT(keys)], value;
    unsigned i = 0, known = tensor->kind == POPUP_MASKED ? COUNT(names) : POPUP_BASE;
    TRY(need(file, &whole_file, entry, COUNT(keys), keys, v));
    TRY(copy_string(file, v[0], &tensor->name, &tensor->name_size));
    TRY(copy_string(file, v[1], &tensor->stream, &tensor->stream_size));
    TRY(take_kind(file, entry, tensor));
    while (i < known && !is(inside(v[2]), names[i])) i++;
    if (i == known) return fail(file, POPUP_UNSUPPORTED, tensor, "has an unknown distribution");
    tensor->distribution = (popup_distribution)i;
    tensor->std = find(entry, "std", "f", &value) ? real(value) : 0;
    if (i == POPUP_BASE ? find(entry, "std", ANY, &value) : !(tensor->std * ROOT3 <= FLT_MAX && (float)tensor->std > 0))
        return INVALID(tensor, "has a std that is not a float above 0 that float32 holds, or a base");
    REFUSE(types[tensor->type].sort != 'f' || !tensor->count,
        tensor, "is to be drawn, but is empty or not of a floating dtype");
    for (i = 0; i < COUNT(notes); i++)
        if (tensor->kind == POPUP_MASKED || find(entry, notes[i][0], ANY, &value))
            TRY(need(file, tensor, entry, 1, notes + i, &value));
    if (tensor->distribution == POPUP_NORMAL && !file->quantiles) TRY(make_quantiles(file));
    return tensor->kind == POPUP_MASKED ? take_mask(file, entry, tensor) : POPUP_OK;
}

/* Take a constant, whose value must be exact in its dtype, finite and not -0.0. */
static int take_constant(popup_file *file, text entry, popup_tensor *tensor) {
    static const char *const keys[][2] = {{"value", "bif"}};
    text value, ignored;
    TRY(need(file, tensor, entry, 1, keys, &value));
    TRY(take_kind(file, entry, tensor));
    char sort = types[tensor->type].sort;
    uint64_t negative = *value.at == '-', most = UINT64_MAX >> (64 - 8 * tensor->element_size) >> (sort == 'i');
    int valid = 0, small = tensor->element_size < 8;
    if (sort == 'b') {
        valid = find(entry, "value", "b", &ignored), tensor->value = *value.at == 't';
    } else if (sort == 'f' && find(entry, "value", "f", &ignored)) {
        double number = real(value);
        valid = (number != 0 || !negative) && (!small || fabs(number) <= FLT_MAX);
        tensor->value = small && valid ? narrow(tensor->type, (float)number) : double_bits(number);
        if (small && valid) valid = (double)widen(tensor->type, tensor->value) == number;
    } else if (sort == 'i' || sort == 'u') {
        valid = whole_number((text){value.at + negative, value.end}, &tensor->value);
        valid = valid && (sort == 'i' ? tensor->value <= most + negative : !negative && tensor->value <= most);
        tensor->value = negative ? 0 - tensor->value : tensor->value;
    }
    if (valid && tensor->count) return POPUP_OK;
    return INVALID(tensor, "is an empty constant, or one whose value %s does not hold", tensor->dtype);
}

/* Sort all names, each of which may be there once, and find what aliases are of. */
static int list_tensors(popup_file *file, popup_tensor *entries, size_t count) {
    size_t all = file->part_count + count;
    const popup_tensor **list;
    TAKE(list, all);
    for (size_t i = 0; i < all; i++) list[i] = i < count ? entries + i : file->parts + (i - count);
    sort(list, all, by_name);
    for (size_t i = 1; i < all; i++)
        REFUSE(!by_name(list[i - 1], list[i]), list[i], "is in the file twice; expected each name in one place");
    for (size_t i = 0; i < all; i++) /* drop the masks, which have no name in the network */
        if (list[i]->kind != POPUP_MASKED || list[i]->stream) list[file->count++] = list[i];
    file->tensors = list;
    for (size_t i = 0; i < count; i++)
        if (entries[i].kind == POPUP_ALIAS) {
            entries[i].target = search(list, file->count, entries[i].stream, entries[i].stream_size, "");
            REFUSE(!entries[i].target || entries[i].target->kind == POPUP_ALIAS,
                entries + i, "is an alias of what is no tensor of its own");
        }
    return POPUP_OK;
}

/* Take what the lists of the manifest have: masked, generated, constants and aliases, in this order. */
static int take_lists(popup_file *file, const text lists[4], int names_coded) {
    size_t count = 0;
    int ok = 0, coded = 0, based = 0;
    text key, value;
    for (int i = 0; i < 4; i++) count += count_items(lists[i]);
    popup_tensor *entries, *tensor;
    TAKE(entries, count);
    file->masked = tensor = entries, file->masked_count = count_items(lists[0]);
    for (int i = 0; i < 4; i++)
        for (text rest = inside(lists[i]); next_item(&rest, i < 2 ? NULL : &key, &value); tensor++) {
            tensor->kind = (popup_kind)i, tensor->distribution = POPUP_NOT_DRAWN, tensor->dtype = "";
            if (i >= 2) TRY(copy_string(file, key, &tensor->name, &tensor->name_size));
            if (i < 2) ok = take_drawn(file, value, tensor);
            else if (i == 2) ok = take_constant(file, value, tensor);
            else if (*value.at == '"') ok = copy_string(file, value, &tensor->stream, &tensor->stream_size);
            else ok = fail(file, POPUP_INVALID, tensor, "is an alias of what is no name");
            TRY(ok);
            coded |= tensor->range_coded, based |= tensor->distribution == POPUP_BASE;
        }
    REFUSE(coded != names_coded || based != (file->base != NULL),
        NULL, "the manifest's requires or base do not fit its masks");
    return list_tensors(file, entries, count);
}

static int take_probe(popup_file *file, text probe) {
    static const char *const keys[][2] = {{"output", "["}, {"rtol", "if"}, {"shape", "["}};
    popup_tensor input = {.name = "probe", .name_size = 5};
    text v[3], item;
    uint64_t size, count = 1;
    TRY(need(file, &input, probe, 3, keys, v));
    int valid = count_items(v[0]) && real(v[1]) > 0 && count_items(v[2]) <= 64;
    for (text rest = inside(v[0]); valid && next_item(&rest, NULL, &item);) valid = strchr("-" DIGITS, *item.at) != 0;
    for (text rest = inside(v[2]); valid && next_item(&rest, NULL, &item); count *= size)
        valid = whole_number(item, &size) && size && size <= PROBE_LIMIT / count;
    return valid ? POPUP_OK : fail(file, POPUP_INVALID, &input, "has a shape, an output or an rtol that none can have");
}
/* Take a string that is a SHA-256. */
static int take_digest(popup_file *file, const char *name, text quoted, char digest[65]) {
    REFUSE(quoted.end - quoted.at != 66 || strspn(quoted.at + 1, HEX) != 64, NULL, "%s is not a SHA-256", name);
    return memcpy(digest, quoted.at + 1, 64), POPUP_OK;
}

static int read_manifest(popup_file *file, text manifest) {
    enum { FORMAT, VERSION, REQUIRES, SEED, ARCHITECTURE, PROVENANCE, LISTS, DIGESTS = LISTS + 4, KEYS = DIGESTS + 4 };
    static const char *const keys[KEYS][2] = {{"format", "\""}, {"format_version", "i"}, {"requires", "["},
        {"seed", "\""}, {"architecture", "{"}, {"provenance", "{"}, {"masked", "["}, {"generated", "["},
        {"constants", "{"}, {"aliases", "{"}, {"manifest_sha256", "\""}, {"masks_sha256", "\""},
        {"tensors_sha256", "\""}, {"weights_sha256", "\""}};
    static const char *const words[][2] = {
        {"library", "\""}, {"name", "\""}, {"version", "\""}, {"kwargs", "{"}, {"tag", "\""}, {"sha256", "\""}};
    text v[KEYS], w[4], value;
    uint64_t seed;
    size_t size;
    sha256 hash = sha256_start;
    REFUSE(manifest.end - manifest.at > MANIFEST_LIMIT, NULL, "the manifest has more than 8388608 characters");
    TRY(check_json(file, "manifest", manifest, 1));
    TRY(need(file, &whole_file, manifest, KEYS, keys, v));
    REFUSE(!is(v[FORMAT], "\"popup-surgery\""), NULL, "the format is not popup-surgery");
    int coded = is(v[REQUIRES], "[\"range_coded\"]"), known = is(v[VERSION], "1") && (coded || is(v[REQUIRES], "[]"));
    if (!known) return fail(file, POPUP_UNSUPPORTED, NULL, "the file needs a newer reader: version %.*s, requires %.*s",
        (int)(v[VERSION].end - v[VERSION].at), v[VERSION].at, (int)(v[REQUIRES].end - v[REQUIRES].at), v[REQUIRES].at);
    for (int i = 0; i < 4; i++) TRY(take_digest(file, keys[DIGESTS + i][0], v[DIGESTS + i], file->digests[i]));
    /* of the text without the member and the comma behind it, which is there as keys are sorted */
    sha256_add(&hash, manifest.at, (size_t)(v[DIGESTS].at - manifest.at) - strlen("\"manifest_sha256\":"));
    sha256_add(&hash, v[DIGESTS].end + 1, (size_t)(manifest.end - v[DIGESTS].end) - 1);
    if (!sha256_is(&hash, file->digests[MANIFEST]))
        return fail(file, POPUP_DIGEST, NULL, "manifest_sha256 does not match: the manifest is damaged");
    value = inside(v[SEED]);
    REFUSE(!whole_number(value, &seed) || (*value.at == '0' && value.end - value.at > 1),
        NULL, "the seed is not a decimal string from 0 to 2**64 - 1");
    sprintf(file->seed, "%" PRIu64, seed);
    file->provenance = v[PROVENANCE].at, file->provenance_size = (size_t)(v[PROVENANCE].end - v[PROVENANCE].at);
    TRY(need(file, &whole_file, v[ARCHITECTURE], 4, words, w));
    TRY(copy_string(file, w[0], &file->library, &size));
    TRY(copy_string(file, w[1], &file->architecture, &size));
    if (find(manifest, "probe", ANY, &value)) TRY(take_probe(file, value));
    if (find(manifest, "base", ANY, &value)) {
        text b[6];
        TRY(need(file, &whole_file, value, 3, words, b));
        TRY(need(file, &whole_file, value, 2, words + 4, b + 4));
        TRY(take_digest(file, "the base's sha256", b[5], file->base_sha256));
        TRY(copy_string(file, b[1], &file->base, &size));
    }
    return take_lists(file, v + LISTS, coded);
}

/* ---- 6. range_coded masks: models of bytes or of gaps, in integers alone, and the coder ---- */
typedef struct { uint16_t limb[24]; } big; /* base 65536, the lowest first: up to n**8 * 2**24 for n < CODED_LIMIT */

static big times(big a, uint64_t factor) {
    uint64_t carry = 0;
    for (int i = 0; i < 24; i++, carry >>= 16) carry += a.limb[i] * factor, a.limb[i] = (uint16_t)carry;
    return a;
}
static int at_most(const big *a, const big *b) {
    int i = 23;
    while (i && a->limb[i] == b->limb[i]) i--;
    return a->limb[i] <= b->limb[i];
}
/* 1 + weight * (2**24 - 256) // sum */
static uint32_t frequency(big weight, big sum) {
    uint32_t quotient = 0;
    weight = times(weight, (1 << 24) - 256);
    for (uint32_t bit = 1 << 23; bit; bit >>= 1) {
        big trial = times(sum, quotient | bit);
        quotient |= at_most(&trial, &weight) ? bit : 0;
    }
    return 1 + quotient;
}
/* Make frequencies cumulative. The one with the largest weight gets what they lack to 2**24. */
static void accumulate(uint32_t table[257], unsigned largest) {
    uint32_t sum = 0;
    for (int i = 0; i < 256; i++) sum += table[i];
    table[largest] += (1 << 24) - sum;
    table[256] = 1 << 24;
    for (int i = 255; i >= 0; i--) table[i] = table[i + 1] - table[i];
}

static void model_bytes(uint32_t table[257], uint64_t n, uint64_t kept) {
    const big one = {{1}};
    big sum = one; /* of all weights, by the binomial theorem */
    uint32_t by_count[9];
    uint8_t ones[256] = {0};
    for (int i = 0; i < 8; i++) sum = times(sum, n);
    for (int i = 0; i < 9; i++) {
        big weight = one;
        for (int j = 0; j < 8; j++) weight = times(weight, j < i ? kept : n - kept);
        by_count[i] = frequency(weight, sum);
    }
    for (unsigned i = 0; i < 256; i++) ones[i] = (uint8_t)(ones[i / 2] + i % 2), table[i] = by_count[ones[i]];
    accumulate(table, 2 * kept > n ? 255 : 0);
}

static void model_gaps(popup_cursor *cursor, uint64_t n, uint64_t others) {
    uint64_t x = 0, rest = others;
    for (int i = 0; i < 64; i++) { /* x = (others << 64) // n */
        rest *= 2, x = 2 * x + (rest >= n);
        rest -= rest >= n ? n : 0;
    }
    do {
        uint64_t weights[257] = {0, x}, low = x, high = 1; /* the first is 2**64, and the sum begins with it */
        for (int i = 1; i < 256; i++) weights[i + 1] = multiply_high(weights[i], x);
        for (int i = 2; i < 256; i++) low += weights[i], high += low < weights[i];
        uint32_t *table = cursor->symbols[cursor->digits++];
        big sum = {{0}}, weight = {{[4] = 1}};
        for (int i = 0; i < 8; i++) sum.limb[i] = (uint16_t)((i < 4 ? low : high) >> i % 4 * 16);
        for (int i = 0; i < 256; i++) {
            for (int j = 0; i && j < 5; j++) weight.limb[j] = (uint16_t)(j < 4 ? weights[i] >> 16 * j : 0);
            table[i] = frequency(weight, sum);
        }
        accumulate(table, 0);
        x = weights[256];
    } while (others >> 8 * cursor->digits);
}
/* Have bytes in the window if any are left. */
static int fill_window(popup_file *file, popup_coder *coder) {
    if (coder->at < coder->end || coder->offset == coder->stop) return POPUP_OK;
    uint64_t left = coder->stop - coder->offset;
    coder->at = 0, coder->end = left < sizeof coder->window ? (size_t)left : sizeof coder->window;
    coder->offset += coder->end;
    return read_at(file, coder->offset - coder->end, coder->window, coder->end);
}
static int shift_coder(popup_cursor *cursor, popup_coder *coder) {
    popup_file *file = cursor->file;
    uint64_t word = 0;
    TRY(fill_window(file, coder));
    if (coder->at < coder->end) word = load_le(coder->window + coder->at, 4), coder->at += 4;
    else if (coder->missing++) return INVALID(cursor->tensor, "has a mask that ends too early");
    coder->point = coder->point << 32 | word, coder->lower <<= 32, coder->range <<= 32;
    return POPUP_OK;
}
static int next_symbol(popup_cursor *cursor, popup_coder *coder, const uint32_t table[257], uint64_t *symbol) {
    popup_file *file = cursor->file;
    uint64_t scale = coder->range >> 24, place = (coder->point - coder->lower) / scale;
    unsigned low = 0, high = 256;
    REFUSE(place >> 24, cursor->tensor, "has a mask of bytes that no mask gives");
    while (high - low > 1)
        if (table[(low + high) / 2] <= place) low = (low + high) / 2;
        else high = (low + high) / 2;
    coder->lower += scale * table[low], coder->range = scale * (table[low + 1] - table[low]);
    *symbol = low;
    return coder->range >> 32 ? POPUP_OK : shift_coder(cursor, coder);
}

/* Read the next gap. The digits of 65,536 gaps stand together, so that each digit gets a coder of its own. */
static int next_gap(popup_cursor *cursor) {
    uint64_t digit;
    if (!cursor->group) {
        popup_coder ahead = cursor->coders[cursor->digits - 1];
        cursor->group = cursor->gaps < 65536 ? cursor->gaps : 65536;
        for (unsigned i = 0; i < cursor->digits; i++) {
            cursor->coders[i] = ahead;
            for (uint64_t j = 0; i + 1 < cursor->digits && j < cursor->group; j++)
                TRY(next_symbol(cursor, &ahead, cursor->symbols[i], &digit));
        }
    }
    cursor->group--, cursor->gap = 0;
    for (unsigned i = 0; i < cursor->digits; i++) {
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
    if (64 * rare >= n) return model_bytes(cursor->symbols[0], n, kept), POPUP_OK;
    model_gaps(cursor, n, n - rare);
    cursor->coders[cursor->digits - 1] = *coder;
    cursor->gaps = rare;
    return next_gap(cursor);
}
/* Check that the words are those that a writer ends with: a mask has one encoding. */
static int end_coded(popup_cursor *cursor) {
    popup_file *file = cursor->file;
    const popup_coder *coder = cursor->coders + (cursor->digits ? cursor->digits - 1 : 0);
    uint64_t last = (coder->lower + UINT32_MAX) >> 32, one_more = (coder->lower + coder->range) >> 32 == last;
    if (!cursor->gaps && coder->at == coder->end && coder->offset == coder->stop && coder->missing == !one_more &&
        coder->point == last << 32)
        return POPUP_OK;
    return INVALID(cursor->tensor, "has a mask of other bytes than a writer gives it");
}

/* ---- masks and weights, 64 at a time ---- */
static int next_mask(popup_cursor *cursor, unsigned n, uint64_t *mask) {
    popup_file *file = cursor->file;
    const popup_tensor *tensor = cursor->tensor;
    uint64_t all = UINT64_MAX >> (64 - n), symbol;
    unsigned bytes = (n + 7) / 8;
    *mask = 0;
    if (tensor->range_coded && tensor->start == tensor->stop) *mask = tensor->kept ? all : 0;
    else if (!tensor->range_coded) {
        TRY(fill_window(file, cursor->coders));
        *mask = load_le(cursor->coders->window + cursor->coders->at, bytes), cursor->coders->at += bytes;
    } else if (!cursor->digits) {
        for (unsigned i = 0; i < bytes; i++, *mask |= symbol << 8 * (i - 1))
            TRY(next_symbol(cursor, cursor->coders, cursor->symbols[0], &symbol));
    } else {
        unsigned at = 0;
        while (cursor->gaps && cursor->gap < n - at) {
            at += (unsigned)cursor->gap;
            *mask |= (uint64_t)1 << at++;
            if (--cursor->gaps) TRY(next_gap(cursor));
        }
        cursor->gap -= n - at;
        *mask = 2 * tensor->kept > tensor->count ? *mask ^ all : *mask;
    }
    for (symbol = *mask; symbol; symbol &= symbol - 1) cursor->ones++;
    if (!(*mask & ~all)) return POPUP_OK;
    return INVALID(tensor, "has a mask with padding bits that are not 0");
}

/* Write n of at most 64 elements. */
static int write_elements(popup_cursor *cursor, popup_format format, uint64_t mask, unsigned n, uint8_t *to) {
    const popup_tensor *tensor = cursor->tensor;
    size_t size = tensor->element_size;
    uint8_t stored[64 * 8];
    float values[64] = {0};
    if (format == POPUP_MASK) return store_le(to, mask, (n + 7) / 8), POPUP_OK;
    if (tensor->kind == POPUP_STORED)
        TRY(read_at(cursor->file, cursor->file->data + tensor->start + cursor->position * size, stored, n * size));
    else if (tensor->kind != POPUP_CONSTANT) draw(cursor, values, mask, n);
    if (format == POPUP_INT8)
        for (unsigned i = 0; i < n; i++) to[i] = (uint8_t)((values[i] > 0) - (values[i] < 0));
    else if (format == POPUP_2BIT)
        for (unsigned i = 0; i < n; i++)
            to[i / 4] = (uint8_t)((i % 4 ? to[i / 4] : 0) | (1 + (values[i] > 0) - (values[i] < 0)) << i % 4 * 2);
    else if (format == POPUP_F32 && size == 4 && tensor->kind <= POPUP_GENERATED) memcpy(to, values, 4 * n);
    else
        for (unsigned i = 0; i < n; i++) {
            uint64_t bits = tensor->kind == POPUP_STORED ? load_le(stored + i * size, size)
                : tensor->kind == POPUP_CONSTANT ? tensor->value : narrow(tensor->type, values[i]);
            if (format == POPUP_F32 && size < 8) values[i] = widen(tensor->type, bits);
            if (format == POPUP_F32) memcpy(to + 4 * i, values + i, 4);
            else store_le(to + i * size, bits, size);
        }
    return POPUP_OK;
}

/* ---- what popup.h describes ---- */
int popup_open(popup_file *file, popup_reader *read, void *from, uint64_t size, void *memory, size_t memory_size) {
    text manifest;
    *file = (popup_file){.read = read, .from = from, .memory = memory, .memory_size = memory_size};
    if (!memory) file->memory = file->message, file->memory_size = 0; /* nothing can be added to NULL */
    TRY(read_header(file, size, &manifest));
    return read_manifest(file, manifest);
}

/* Check the digest of all masks, or of all effective weights in float32. */
static int check_masked(popup_file *file, popup_format format, uint64_t limit) {
    float values[512];
    popup_cursor cursor;
    sha256 hash = sha256_start;
    for (const popup_tensor *tensor = file->masked; tensor < file->masked + file->masked_count; tensor++) {
        if (tensor->count > limit)
            return fail(file, POPUP_MEMORY, tensor, "has more weights than are left of the limit that the caller set");
        limit -= tensor->count;
        TRY(popup_begin(&cursor, file, tensor));
        for (size_t part = 0; cursor.position < tensor->count;) {
            part = tensor->count - cursor.position < 512 ? (size_t)(tensor->count - cursor.position) : 512;
            TRY(popup_next(&cursor, format, values, part));
            for (size_t i = 0; format == POPUP_F32 && i < part; i++)
                store_le((uint8_t *)(values + i), float_bits(values[i]), 4);
            sha256_add(&hash, values, popup_size(tensor, format, part));
        }
    }
    if (sha256_is(&hash, file->digests[format == POPUP_F32 ? WEIGHTS : MASKS])) return POPUP_OK;
    return fail(file, POPUP_DIGEST, NULL, "%s_sha256 does not match: the file is damaged",
        format == POPUP_F32 ? "weights" : "masks");
}
int popup_check(popup_file *file, uint64_t limit) {
    uint8_t bytes[1024];
    sha256 hash = sha256_start;
    for (size_t i = 0; i < file->count; i++) {
        const popup_tensor *tensor = file->tensors[i];
        if (tensor->kind != POPUP_STORED) continue;
        sha256_add(&hash, tensor->name, tensor->name_size + 1);
        sha256_add(&hash, tensor->dtype, strlen(tensor->dtype) + 1);
        for (size_t j = 0; j < tensor->dimensions; j++)
            sha256_add(&hash, bytes, (size_t)sprintf((char *)bytes, "%s%" PRIu64, j ? "," : "", tensor->shape[j]));
        sha256_add(&hash, "", 1);
        for (uint64_t at = tensor->start, size; at < tensor->stop; at += size) {
            size = tensor->stop - at < sizeof bytes ? tensor->stop - at : sizeof bytes;
            TRY(read_at(file, file->data + at, bytes, (size_t)size));
            sha256_add(&hash, bytes, (size_t)size);
            for (size_t j = 0; types[tensor->type].sort == 'b' && j < size; j++)
                REFUSE(bytes[j] > 1, tensor, "is BOOL and has bytes other than 0 and 1");
        }
    }
    if (sha256_is(&hash, file->digests[TENSORS])) return check_masked(file, POPUP_MASK, limit);
    return fail(file, POPUP_DIGEST, NULL, "tensors_sha256 does not match: a stored tensor is damaged");
}
int popup_verify(popup_file *file, uint64_t limit) { return check_masked(file, POPUP_F32, limit); }
const popup_tensor *popup_find(const popup_file *file, const char *name) {
    return search(file->tensors, file->count, name, strlen(name), "");
}
/* Return whether a tensor can be written in a format. */
static int fits(const popup_tensor *tensor, popup_format format) {
    int masked = tensor->kind == POPUP_MASKED, drawn = masked || tensor->kind == POPUP_GENERATED;
    if (format == POPUP_MASK || tensor->distribution == POPUP_BASE) return format == POPUP_MASK && masked;
    if (format == POPUP_INT8 || format == POPUP_2BIT) return masked && tensor->distribution <= POPUP_UNSIGNED_CONSTANT;
    return format == POPUP_BYTES || (types[tensor->type].sort == 'f' && (drawn || tensor->element_size < 8));
}
size_t popup_size(const popup_tensor *tensor, popup_format format, uint64_t count) {
    static const size_t bits[] = {0, 32, 8, 2, 1}; /* of an element, in the order of popup_format */
    if (tensor->target) tensor = tensor->target;
    size_t each = format == POPUP_BYTES ? 8 * tensor->element_size : bits[format];
    if (!fits(tensor, format) || count > (UINT64_MAX - 7) / each || (count * each + 7) / 8 > SIZE_MAX) return 0;
    return (size_t)((count * each + 7) / 8);
}
int popup_begin(popup_cursor *cursor, popup_file *file, const popup_tensor *tensor) {
    if (tensor->target) tensor = tensor->target;
    *cursor = (popup_cursor){.file = file, .tensor = tensor, .word = 4};
    cursor->coders[0].offset = file->data + tensor->start, cursor->coders[0].stop = file->data + tensor->stop;
    if (tensor->distribution < POPUP_BASE)
        stream_key(cursor->key, file->seed, tensor->kind == POPUP_MASKED ? "weight" : "other", tensor->stream,
            tensor->stream_size);
    return tensor->range_coded && tensor->start < tensor->stop ? begin_coded(cursor) : POPUP_OK;
}

int popup_next(popup_cursor *cursor, popup_format format, void *buffer, uint64_t count) {
    popup_file *file = cursor->file;
    const popup_tensor *tensor = cursor->tensor;
    uint64_t left = tensor->count - cursor->position, mask = UINT64_MAX;
    if (!fits(tensor, format) && tensor->distribution == POPUP_BASE)
        return fail(file, POPUP_UNSUPPORTED, tensor, "masks weights of %.80s: POPUP_MASK alone reads it", file->base);
    if (!fits(tensor, format)) return fail(file, POPUP_ARGUMENT, tensor, "cannot be written in that format");
    if (count > left || (count % 64 && count < left))
        return fail(file, POPUP_ARGUMENT, tensor, "is read in multiples of 64 elements, or what is left");
    for (uint8_t *to = buffer; count;) {
        unsigned n = count < 64 ? (unsigned)count : 64;
        if (tensor->kind == POPUP_MASKED) TRY(next_mask(cursor, n, &mask));
        TRY(write_elements(cursor, format, mask, n, to));
        count -= n, cursor->position += n, to += popup_size(tensor, format, n);
    }
    if (tensor->kind != POPUP_MASKED || cursor->position < tensor->count) return POPUP_OK;
    if (tensor->range_coded && tensor->start < tensor->stop) TRY(end_coded(cursor));
    if (cursor->ones == tensor->kept) return POPUP_OK;
    return INVALID(tensor, "keeps %" PRIu64 " weights; expected %" PRIu64, cursor->ones, tensor->kept);
}
int popup_read(popup_file *file, const popup_tensor *tensor, popup_format format, void *buffer, size_t size) {
    popup_cursor cursor;
    if (tensor->target) tensor = tensor->target;
    if (fits(tensor, format) && size != popup_size(tensor, format, tensor->count))
        return fail(file, POPUP_ARGUMENT, tensor, "needs a buffer of another size");
    TRY(popup_begin(&cursor, file, tensor));
    return popup_next(&cursor, format, buffer, tensor->count);
}
int popup_stdio(void *stream, uint64_t offset, void *to, size_t size) {
    if (offset > LONG_MAX || (ftell(stream) != (long)offset && fseek(stream, (long)offset, SEEK_SET))) return 1;
    return fread(to, 1, size, stream) != size;
}
