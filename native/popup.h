/* Read popup artifacts, the subnetworks of random networks that docs/artifact-format.md describes. C99.
 *
 * It needs the C library and its maths alone, allocates nothing and has no state: all that it holds is in `popup_file`,
 * `popup_cursor` and the memory that the caller gives. Files are taken to be hostile. Functions return POPUP_OK or an
 * error; then `message` says in a sentence what is wrong. One `popup_file` belongs to one thread at a time.
 *     popup_open(&file, popup_stdio, stream, size, memory, sizeof memory);  header, manifest, sizes: all but the data
 *     popup_check(&file, POPUP_LIMIT);                                      the data's digests
 *     popup_read(&file, popup_find(&file, "conv1.weight"), POPUP_F32, weights, sizeof weights);
 */
#ifndef POPUP_H
#define POPUP_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    POPUP_OK,
    POPUP_IO,          /* the bytes cannot be read */
    POPUP_NOT_POPUP,   /* this is no popup artifact */
    POPUP_INVALID,     /* the file breaks a rule of the format: it is damaged, or was made to do harm */
    POPUP_DIGEST,      /* a digest does not match: the file is damaged */
    POPUP_UNSUPPORTED, /* the file needs what is not here: a newer reader, or the weights of a base */
    POPUP_MEMORY,      /* the caller gave too little memory, or set a limit that the file exceeds */
    POPUP_ARGUMENT     /* the call is wrong: a buffer of another size, a format that the tensor cannot have */
} popup_error;

typedef enum { POPUP_MASKED, POPUP_GENERATED, POPUP_CONSTANT, POPUP_ALIAS, POPUP_STORED } popup_kind;

/* POPUP_BASE: pretrained weights, which the file does not have. Only their mask can be read. */
typedef enum {
    POPUP_SIGNED_CONSTANT, POPUP_UNSIGNED_CONSTANT, POPUP_NORMAL, POPUP_UNIFORM, POPUP_BASE, POPUP_NOT_DRAWN
} popup_distribution;

/* How elements are written. A masked tensor is 0 where its mask is. */
typedef enum {
    POPUP_BYTES, /* in the tensor's own dtype, little-endian, as a safetensors file would hold it */
    POPUP_F32,   /* float: a floating tensor that float32 holds exactly */
    POPUP_INT8,  /* int8_t -1, 0 and 1, to be multiplied by `scale`: masked signed and unsigned constants */
    POPUP_2BIT,  /* the same plus 1, four to a byte, the lowest bits first; unused bits are 0 */
    POPUP_MASK   /* the mask, eight to a byte, the lowest bit first; unused bits are 0 */
} popup_format;

/* One entry of the network's state_dict. */
typedef struct popup_tensor {
    const char *name; /* UTF-8: `name_size` bytes and a NUL */
    size_t name_size;
    popup_kind kind;
    popup_distribution distribution;
    const char *dtype;                 /* as safetensors calls it; "" for an alias */
    size_t element_size, dimensions;   /* bytes of an element; sizes of the shape, at most 64 */
    const uint64_t *shape;
    uint64_t count, kept;              /* elements; ones of the mask */
    float scale;                       /* of masked constants: the one magnitude of the weights; otherwise 0 */
    const struct popup_tensor *target; /* of an alias: the tensor that it is; otherwise NULL */
    /* private */
    const char *stream;
    size_t stream_size;
    double std;
    uint64_t start, stop, value; /* the bytes of a stored tensor or a mask, in the data; a constant's element */
    unsigned type;
    int range_coded;
} popup_tensor;

/* Read `size` bytes at `offset` of the file into `to`. Return 0, or anything else if that fails. */
typedef int popup_reader(void *from, uint64_t offset, void *to, size_t size);

typedef struct {
    char message[320];                         /* what went wrong last */
    size_t count, masked_count, memory_used;   /* `memory_used` bytes of the caller's */
    const popup_tensor **tensors;              /* the state_dict: `count` entries, sorted by name */
    const popup_tensor *masked;                /* the `masked_count` masked ones, in the manifest's order */
    const char *library, *architecture, *base; /* "timm", "resnet50"; the network that masks are on, or NULL */
    char base_sha256[65];
    const char *provenance; /* the manifest's free part: a JSON object of `provenance_size` bytes */
    size_t provenance_size;
    /* private */
    popup_reader *read;
    void *from;
    char *memory, seed[24], digests[4][65];
    size_t memory_size, part_count;
    uint64_t data;
    popup_tensor *parts;
    const popup_tensor **part_names;
    const float *quantiles;
} popup_file;

/* Open a file of `size` bytes: check its header and manifest, and that all in them fits. No tensor is read.
 *
 * `memory` has to stay while the file is used. It takes the header (at most 16 MiB), about 300 bytes a tensor, and 128
 * KiB if a distribution is normal. Where it is too small, the error is POPUP_MEMORY: try again with twice as much. */
int popup_open(popup_file *file, popup_reader *read, void *from, uint64_t size, void *memory, size_t memory_size);

/* Read all of the file, and check its masks, its stored tensors and their digests. Masks of more than `limit` weights
 * in all are refused: a coded one may have very many in very few bytes. */
int popup_check(popup_file *file, uint64_t limit);
#define POPUP_LIMIT ((uint64_t)1 << 33) /* for a caller who does not know how many weights to expect */
/* Draw all masked weights, and check their digest. Those of a base are not at hand: refused. */
int popup_verify(popup_file *file, uint64_t limit);

/* Return the tensor of a name, or NULL. */
const popup_tensor *popup_find(const popup_file *file, const char *name);
/* Return the bytes that `count` elements of a tensor take in a format; 0 if it has none such, or they overflow. */
size_t popup_size(const popup_tensor *tensor, popup_format format, uint64_t count);

/* Write a whole tensor into `size` bytes, which `popup_size` gives. Its mask is checked, but not its digest. */
int popup_read(popup_file *file, const popup_tensor *tensor, popup_format format, void *buffer, size_t size);

typedef struct { uint64_t lower, range, point, offset, stop, at, end; uint8_t window[256]; int missing; } popup_coder;
typedef struct { /* private */
    popup_file *file;
    const popup_tensor *tensor;
    uint64_t position, ones, key[2], counter, words[4]; /* the last three are the stream's */
    uint64_t gaps, gap, group;    /* gaps that are to come, what is left of this one, how many of its group are left */
    unsigned word, digits;        /* digits of a gap; 0 if bytes are coded, or nothing */
    popup_coder coders[5];        /* for each digit, or for bytes */
    uint32_t symbols[5][257];     /* their cumulative frequencies */
} popup_cursor;

/* The same piece by piece, for a buffer smaller than a layer: `popup_begin`, and then each `popup_next` writes the next
 * `count` elements, a multiple of 64 or what is left. A cursor has about 7 KiB. */
int popup_begin(popup_cursor *cursor, popup_file *file, const popup_tensor *tensor);
int popup_next(popup_cursor *cursor, popup_format format, void *buffer, uint64_t count);

/* A `popup_reader` for a `FILE *`. Where `long` has 32 bits, it reads the first 2 GiB. */
int popup_stdio(void *stream, uint64_t offset, void *to, size_t size);

#ifdef __cplusplus
}
#endif
#endif
