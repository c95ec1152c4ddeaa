/* What a fuzzer calls: opens, checks and reads whatever bytes it gets. See the Makefile.
 *
 * It is built with FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION, so that digests always match. Because a changed header has
 * another length, each input is tried a second time with the length that fits: up to the last closing brace.
 */
#include "popup.h"

#include <string.h>

typedef struct {
    const uint8_t *bytes;
    size_t size;
    uint64_t header; /* its length, which is put in place of the file's */
} input;

static int from_input(void *from, uint64_t offset, void *to, size_t size) {
    const input *source = from;
    size_t i;
    if (offset > source->size || size > source->size - offset)
        __builtin_trap(); /* popup.c must not read behind the end */
    memcpy(to, source->bytes + offset, size);
    for (i = 0; i < size && offset + i < 8; i++)
        ((uint8_t *)to)[i] = (uint8_t)(source->header >> 8 * (offset + i));
    return 0;
}

static void read_everything(input *source) {
    static uint8_t memory[1 << 19], out[1 << 16];
    popup_file file;
    size_t i;
    int format;
    if (popup_open(&file, from_input, source, source->size, memory, sizeof memory))
        return;
    (void)popup_check(&file, 1 << 16);
    (void)popup_verify(&file, 1 << 16);
    for (i = 0; i < file.count; i++)
        for (format = POPUP_BYTES; format <= POPUP_MASK; format++) {
            const popup_tensor *tensor = file.tensors[i]->target ? file.tensors[i]->target : file.tensors[i];
            size_t size = popup_size(tensor, (popup_format)format, tensor->count);
            if (size <= sizeof out)
                (void)popup_read(&file, tensor, (popup_format)format, out, size);
        }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    input source = {bytes, size, 0};
    size_t end = size, i;
    for (i = 0; i < 8 && i < size; i++)
        source.header |= (uint64_t)bytes[i] << 8 * i;
    read_everything(&source);
    while (end > 8 && bytes[end - 1] != '}')
        end--;
    if (end > 8 && source.header != end - 8) {
        source.header = end - 8;
        read_everything(&source);
    }
    return 0;
}
