"""Radix select on a GPU, in Triton: finds the magnitude that exactly `kept` weights reach, by digits of eight bits.

Each pass takes the magnitudes that begin with the digits found so far, and counts how often each next digit occurs. The
passes after it read the digit off these counts themselves, so that neither the host nor a kernel in between has to. The
counts are integers, so the result does not depend on the order of addition.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements of one program
WARPS = 8


# How `find` works, for the 2 largest of 2.0 = 0x40000000, 1.5 = 0x3FC00000, 1.0 = 0x3F800000 and 0.5 = 0x3F000000:
# first digit   0x40 occurs once, 0x3F 3 times. `upward` is 1 at 0x40 and 4 from 0x3F down, so it reaches 2 in the 64
#               bins 0x00 … 0x3F: the digit is 64 − 1 = 0x3F. Of its 3 magnitudes, 2 − (4 − 3) = 1 is still to be kept.
# second digit  of those 3: 0xC0, 0x80 and 0x00, each once. `upward` reaches 1 from 0xC0 down: the digit is 0xC0.
# the others    0x00 and 0x00. The threshold is 0x3FC00000 = 1.5; 1 magnitude is exactly that, and 1 is kept: no tie.
@triton.jit
def find(counts, kept, DIGITS: tl.constexpr):
    """Return the first digits of the threshold, and how many magnitudes begin with them: those to keep, and all."""
    bins = tl.arange(0, 256)
    threshold = 0
    there = 0
    for i in tl.static_range(DIGITS):
        found = tl.load(counts + 256 * i + bins)
        upward = tl.sum(found) - tl.cumsum(found) + found  # with this digit or a higher one
        digit = tl.sum((upward >= kept).to(tl.int32)) - 1
        there = tl.sum(tl.where(bins == digit, found, 0))
        kept -= tl.sum(tl.where(bins == digit, upward, 0)) - there
        threshold |= digit << (24 - 8 * i)
    return threshold, kept, there


@triton.jit
def _magnitudes(bits, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return index, index < n, tl.load(bits + index, index < n, 0) & 0x7FFFFFFF


@triton.jit(do_not_specialize=["kept"])
def _count(bits, n, counts, kept, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    """Count how often each value of the digit after the first DIGITS ones occurs."""
    _, inside, value = _magnitudes(bits, n, BLOCK)
    if DIGITS > 0:
        threshold, _, _ = find(counts, kept, DIGITS)
        inside = inside & ((value ^ threshold) >> (32 - 8 * DIGITS) == 0)
    found = tl.histogram((value >> (24 - 8 * DIGITS)) & 255, 256, mask=inside)
    bins = tl.arange(0, 256)
    tl.atomic_add(counts + 256 * DIGITS + bins, found, found > 0)


@triton.jit(do_not_specialize=["kept"])
def _count_ties(bits, n, counts, kept, BLOCK: tl.constexpr):
    """Count each program's magnitudes at the threshold, if not all of them are kept."""
    threshold, needed, there = find(counts, kept, 4)
    if needed < there:
        _, inside, value = _magnitudes(bits, n, BLOCK)
        tl.store(counts + 1024 + tl.program_id(0), tl.sum((inside & (value == threshold)).to(tl.int32)))


@triton.jit(do_not_specialize=["kept"])
def _choose(bits, n, counts, kept, mask, BLOCK: tl.constexpr):
    """Write the mask."""
    threshold, needed, there = find(counts, kept, 4)
    index, inside, value = _magnitudes(bits, n, BLOCK)
    ties = value == threshold
    if needed < there:
        before = 0
        for start in range(0, tl.program_id(0), 1024):
            others = start + tl.arange(0, 1024)
            before += tl.sum(tl.load(counts + 1024 + others, others < tl.program_id(0), 0))
        ties = ties & (before + tl.cumsum(ties.to(tl.int32)) <= needed)
    tl.store(mask + index, (value > threshold) | ties, inside)


def largest(bits: Tensor, kept: int) -> Tensor:
    """Return the mask, bool [n], of the `kept` largest magnitudes. Ties go to the lower index. The host never waits.

    Args:
        bits: bit patterns of float32 numbers, int32 [n], contiguous, on a GPU; n below 2³¹ − 4096.
        kept: from 1 to n.
    """
    n = len(bits)
    programs = (triton.cdiv(n, BLOCK),)
    counts = torch.zeros(1024 + programs[0], dtype=torch.int32, device=bits.device)
    mask = torch.empty(n, dtype=torch.bool, device=bits.device)
    with torch.cuda.device_of(bits):
        for digits in range(4):
            _count[programs](bits, n, counts, kept, digits, BLOCK, num_warps=WARPS)
        _count_ties[programs](bits, n, counts, kept, BLOCK, num_warps=WARPS)
        _choose[programs](bits, n, counts, kept, mask, BLOCK, num_warps=WARPS)
    return mask
