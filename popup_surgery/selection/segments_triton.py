"""The kernels behind `segments`: a radix select over many groups at once, their masked weights, and scores' gradients.

Each program works on one block of one member, a weight with its score, and finds it through a table: int64, on the
device. The table's first numbers say, block by block, where the row of the block's member begins in it. A row has the
numbers listed below. So a kernel takes any number of tensors, and nothing is copied from the host when they stay where
they are.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .radix_triton import find

BLOCK = 4096  # elements of one program
WARPS = 8

SCORE = tl.constexpr(0)  # address of the scores
WEIGHT = tl.constexpr(1)  # address of the raw weights
KIND = tl.constexpr(2)  # dtype of the raw weights: 0 float32, 1 float16, 2 bfloat16
SIZE = tl.constexpr(3)  # number of elements
FIRST = tl.constexpr(4)  # the member's first block
CHANNELS = tl.constexpr(5)  # in memory the elements stand as [rows, points, channels], in their order as
POINTS = tl.constexpr(6)  # [rows, channels, points]; both are 1 where these are the same
GROUP = tl.constexpr(7)  # place of the group's histograms
START = tl.constexpr(8)  # the group's first block
KEPT = tl.constexpr(9)  # how many weights of the group are kept
BUCKET = tl.constexpr(10)  # the bucket, which has a buffer for masked weights and one for gradients
MADE = tl.constexpr(11)  # place of the masked weights in their buffer, in bytes
MADE_KIND = tl.constexpr(12)  # their dtype, and that of their gradients
PLACE = tl.constexpr(13)  # the member's place in its bucket
GRADIENT = tl.constexpr(14)  # place of the scores' gradients in their buffer, in elements
COLUMNS = 15


@triton.jit
def _member(table, block, BLOCK: tl.constexpr):
    """Return the row of a block's member, and the places of the block's elements in it."""
    row = table + tl.load(table + block)
    index = (block - tl.load(row + FIRST)).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    return row, index, index < tl.load(row + SIZE)


@triton.jit
def _in_memory(row, index):
    """Return where in memory the elements are that stand at `index` in row-major order."""
    channels = tl.load(row + CHANNELS).to(tl.int32)
    points = tl.load(row + POINTS).to(tl.int32)
    inside = index % (channels * points)
    return index - inside + inside % points * channels + inside // points


@triton.jit
def _magnitudes(row, place, inside):
    score = tl.load(row + SCORE).to(tl.pointer_type(tl.int32))
    return tl.load(score + place, inside, 0) & 0x7FFFFFFF


@triton.jit
def _load(address, kind, place, wanted, BLOCK: tl.constexpr):
    """Return numbers of any kind as float32, and +0.0 where they are not wanted."""
    found = tl.zeros([BLOCK], tl.float32)
    if kind == 0:
        found = tl.load(address.to(tl.pointer_type(tl.float32)) + place, wanted, 0.0)
    elif kind == 1:
        found = tl.load(address.to(tl.pointer_type(tl.float16)) + place, wanted, 0.0).to(tl.float32)
    else:
        found = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + place, wanted, 0.0).to(tl.float32)
    return found


@triton.jit
def _store(address, kind, place, values, inside):
    if kind == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + place, values, inside)
    elif kind == 1:
        tl.store(address.to(tl.pointer_type(tl.float16)) + place, values.to(tl.float16), inside)
    else:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + place, values.to(tl.bfloat16), inside)


@triton.jit
def _among(addresses, place, COUNT: tl.constexpr):
    """Return the address at a place that only the device knows."""
    found = addresses[0].to(tl.int64)
    for i in tl.static_range(1, COUNT):
        found = tl.where(place == i, addresses[i].to(tl.int64), found)
    return found


@triton.jit
def count(table, counts, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    """Count in each group how often each value of the digit after the first DIGITS ones occurs."""
    row, index, inside = _member(table, tl.program_id(0), BLOCK)
    value = _magnitudes(row, index, inside)
    counts += tl.load(row + GROUP)
    if DIGITS > 0:
        threshold, _, _ = find(counts, tl.load(row + KEPT).to(tl.int32), DIGITS)
        inside = inside & ((value ^ threshold) >> (32 - 8 * DIGITS) == 0)
    found = tl.histogram((value >> (24 - 8 * DIGITS)) & 255, 256, mask=inside)
    bins = tl.arange(0, 256)
    tl.atomic_add(counts + 256 * DIGITS + bins, found, found > 0)


@triton.jit
def count_ties(table, counts, ties, BLOCK: tl.constexpr):
    """Count each block's magnitudes at the threshold, if not all of the group's are kept."""
    block = tl.program_id(0)
    row, index, inside = _member(table, block, BLOCK)
    threshold, needed, there = find(counts + tl.load(row + GROUP), tl.load(row + KEPT).to(tl.int32), 4)
    if needed < there:
        value = _magnitudes(row, _in_memory(row, index), inside)
        tl.store(ties + block, tl.sum((inside & (value == threshold)).to(tl.int32)))


@triton.jit
def write(table, counts, ties, buffers, BUFFERS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the masked weights: the weight where it is kept, else +0.0."""
    block = tl.program_id(0)
    row, index, inside = _member(table, block, BLOCK)
    threshold, needed, there = find(counts + tl.load(row + GROUP), tl.load(row + KEPT).to(tl.int32), 4)
    place = index
    before = 0
    if needed < there:  # ties go by the row-major order, and only they ask for it
        place = _in_memory(row, index)
        start = tl.load(row + START).to(tl.int32)
        while start < block:  # Triton 3.6 interprets no range of numbers from the device
            others = start + tl.arange(0, 1024)
            before += tl.sum(tl.load(ties + others, others < block, 0))
            start += 1024
    value = _magnitudes(row, place, inside)
    tied = value == threshold
    tied = tied & ((needed == there) | (before + tl.cumsum(tied.to(tl.int32)) <= needed))
    kept = inside & ((value > threshold) | tied)
    weight = _load(tl.load(row + WEIGHT), tl.load(row + KIND), place, kept, BLOCK)
    made = _among(buffers, tl.load(row + BUCKET), BUFFERS) + tl.load(row + MADE)
    _store(made, tl.load(row + MADE_KIND), place, weight, inside)


@triton.jit(do_not_specialize=["first"])
def differentiate(table, first, gradients, found, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Write the gradients of a bucket's scores: that of the masked weight, times the weight, times the score's sign."""
    row, index, inside = _member(table, first + tl.program_id(0), BLOCK)
    gradient = _among(gradients, tl.load(row + PLACE), COUNT)
    given = _load(gradient, tl.load(row + MADE_KIND), index, inside, BLOCK)
    weight = _load(tl.load(row + WEIGHT), tl.load(row + KIND), index, inside, BLOCK)
    score = tl.load(tl.load(row + SCORE).to(tl.pointer_type(tl.float32)) + index, inside, 0.0)
    sign = (score > 0).to(tl.float32) - (score < 0).to(tl.float32)
    tl.store(found + tl.load(row + GRADIENT) + index, given * weight * sign, inside)
