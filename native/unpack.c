/* popup-unpack FILE             check a popup artifact, and list its tensors
 * popup-unpack FILE OUT         write its state_dict as plain safetensors
 * popup-unpack FILE OUT FORMAT  write each tensor that has the format, f32, int8, 2bit or mask, as its bytes (U8)
 *
 * Status: 0, or the `popup_error`. Layers are written piece by piece: none is in memory as a whole.
 */
#include "popup.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void write_string(FILE *out, const char *text, size_t size) {
    putc('"', out);
    for (; size--; text++)
        if (*text == '"' || *text == '\\')
            fprintf(out, "\\%c", *text);
        else if (*text >= 0 && *text < ' ')
            fprintf(out, "\\u%04x", *text);
        else
            putc(*text, out);
    putc('"', out);
}

/* Write one header entry; return whether the tensor has the format. */
static int write_entry(FILE *out, const popup_tensor *entry, popup_format format, uint64_t *offset) {
    const popup_tensor *tensor = entry->target ? entry->target : entry;
    uint64_t size = popup_size(tensor, format, tensor->count);
    size_t i;
    if (tensor->count && !size)
        return 0;
    fputs(*offset ? "," : "", out);
    write_string(out, entry->name, entry->name_size);
    fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", format == POPUP_BYTES ? tensor->dtype : "U8");
    for (i = 0; format == POPUP_BYTES && i < tensor->dimensions; i++)
        fprintf(out, "%s%" PRIu64, i ? "," : "", tensor->shape[i]);
    if (format != POPUP_BYTES)
        fprintf(out, "%" PRIu64, size);
    fprintf(out, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", *offset, *offset + size);
    *offset += size;
    return 1;
}

static int write_tensor(FILE *out, popup_file *file, const popup_tensor *tensor, popup_format format) {
    static char buffer[8 * 4096];
    uint64_t left, size;
    popup_cursor cursor;
    int code = popup_begin(&cursor, file, tensor);
    tensor = tensor->target ? tensor->target : tensor;
    for (left = tensor->count; !code && left; left -= size) {
        size = left < 4096 ? left : 4096;
        code = popup_next(&cursor, format, buffer, size);
        if (!code)
            fwrite(buffer, 1, popup_size(tensor, format, size), out);
    }
    return code;
}

static int write_all(FILE *out, popup_file *file, popup_format format) {
    uint8_t prefix[8];
    uint64_t offset = 0, length;
    size_t i;
    int code = 0;
    fwrite("\0\0\0\0\0\0\0\0{", 1, 9, out);
    for (i = 0; i < file->count; i++)
        if (!write_entry(out, file->tensors[i], format, &offset) && format == POPUP_BYTES)
            return popup_read(file, file->tensors[i], format, NULL, 0); /* which says why not */
    putc('}', out);
    length = (uint64_t)ftell(out) - 8;
    for (; length % 8; length++)
        putc(' ', out);
    for (i = 0; i < 8; i++)
        prefix[i] = (uint8_t)(length >> 8 * i);
    for (i = 0; !code && i < file->count; i++)
        if (popup_size(file->tensors[i], format, 64))
            code = write_tensor(out, file, file->tensors[i], format);
    fseek(out, 0, SEEK_SET);
    fwrite(prefix, 1, sizeof prefix, out);
    return code;
}

static void list(const popup_file *file) {
    static const char *const kinds[] = {"masked", "generated", "constant", "alias", "stored"};
    size_t i, j;
    for (i = 0; i < file->count; i++) {
        const popup_tensor *tensor = file->tensors[i];
        const char *at;
        for (at = tensor->name; *at; at++)
            putchar(*at < ' ' || *at > '~' ? '?' : *at);
        printf("  %s %s [", kinds[tensor->kind], tensor->dtype);
        for (j = 0; j < tensor->dimensions; j++)
            printf("%s%" PRIu64, j ? ", " : "", tensor->shape[j]);
        printf(tensor->kind == POPUP_MASKED ? "] keeps %" PRIu64 " of %" PRIu64 "\n" : "]\n", tensor->kept,
               tensor->count);
    }
    printf("%zu tensors of %s/%s; the reader took %zu bytes\n", file->count, file->library, file->architecture,
           file->memory_used);
}

int main(int count, char **arguments) {
    static const char *const formats[] = {"bytes", "f32", "int8", "2bit", "mask"};
    popup_file file;
    popup_format format = POPUP_BYTES;
    size_t size = 1 << 16;
    void *memory = NULL;
    FILE *in = count > 1 ? fopen(arguments[1], "rb") : NULL, *out = NULL;
    long end;
    int code;
    while (count == 4 && format <= POPUP_MASK && strcmp(arguments[3], formats[format]))
        format = (popup_format)(format + 1);
    if (!in || count > 4 || format > POPUP_MASK || fseek(in, 0, SEEK_END) || (end = ftell(in)) < 0) {
        fputs("popup-unpack FILE [OUT [f32|int8|2bit|mask]]: expected a file that can be read\n", stderr);
        return POPUP_IO;
    }
    do {
        free(memory);
        memory = malloc(size);
        code = memory ? popup_open(&file, popup_stdio, in, (uint64_t)end, memory, size) : POPUP_ARGUMENT;
        size *= 2;
    } while (code == POPUP_MEMORY && size < (size_t)1 << 30);
    if (memory && !code)
        code = popup_check(&file, POPUP_LIMIT);
    if (memory && !code && count == 2 && !file.base)
        code = popup_verify(&file, POPUP_LIMIT);
    if (memory && !code && count > 2) {
        out = fopen(arguments[2], "wb");
        if (out)
            code = write_all(out, &file, format);
        if (!out || ferror(out) | fclose(out)) {
            perror(arguments[2]);
            code = code ? code : POPUP_IO;
        }
        if (code)
            remove(arguments[2]);
    } else if (memory && !code)
        list(&file);
    if (code)
        fprintf(stderr, "%s: %s\n", arguments[1], memory ? file.message : "out of memory");
    free(memory);
    fclose(in);
    return code;
}
