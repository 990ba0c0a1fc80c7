"""Entries of tensors and bits of packed masks in kernels: what every kernel of the family loads and stores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_offsets(BLOCK: tl.constexpr):
    """The entries of this program, 64-bit."""
    return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def widened(values, WIDE: tl.constexpr):
    """Loaded values as float32, or float64 where WIDE; int16 holds the bits of bfloat16."""
    if values.dtype == tl.int16:
        result = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif values.dtype == tl.float16:
        result = values.to(tl.float32)
    else:
        result = values
    if WIDE:
        result = result.to(tl.float64)
    return result


@triton.jit
def load_entries(pointer, offsets, inside, WIDE: tl.constexpr):
    """Entries in the dtype of the arithmetic; 0 outside."""
    return widened(tl.load(pointer + offsets, mask=inside, other=0), WIDE)


@triton.jit
def listed_pointer(addresses, place, like, ALIGNED: tl.constexpr):
    """The pointer at a place of a table of addresses, of the type of ``like``."""
    pointer = tl.load(addresses + place).to(like.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def narrowed(values, pointer):
    """Values rounded once, to nearest even, to what a pointer points to; float64 goes through float32 to 16 bits, as in torch."""
    if pointer.dtype.element_ty == tl.int16:
        single = values.to(tl.float32)
        bits = single.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = tl.where(single != single, 0x7FC0, rounded).to(tl.int16)
    elif pointer.dtype.element_ty == tl.float16:
        result = values.to(tl.float32).to(tl.float16)
    else:
        result = values.to(pointer.dtype.element_ty)
    return result


@triton.jit
def store_entries(pointer, offsets, values, inside):
    """Store values, rounded to the dtype that is there."""
    tl.store(pointer + offsets, narrowed(values, pointer), mask=inside)


@triton.jit
def load_bits(packed, offsets, inside):
    """Whether each entry is set in a packed mask; false outside."""
    return ((tl.load(packed + offsets // 8, mask=inside, other=0).to(tl.int32) >> (offsets % 8).to(tl.int32)) & 1) != 0


@triton.jit
def store_bits(packed, first, numel, flags, BLOCK: tl.constexpr):
    """Pack flags of BLOCK entries, the first of which is ``first``, a multiple of 8; flags from numel on must be false."""
    bits = tl.reshape(flags.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
    byte = tl.sum(bits, axis=1)
    places = first // 8 + tl.arange(0, BLOCK // 8)
    tl.store(packed + places, byte.to(tl.uint8), mask=places * 8 < numel)


@triton.jit
def divided(numerator, denominator, WIDE: tl.constexpr):
    """A quotient rounded to nearest: Triton's own division of float32 is approximate."""
    quotient = numerator / denominator if WIDE else tl.div_rn(numerator, denominator)
    return quotient


@triton.jit
def magnitude_bits(values, WIDE: tl.constexpr):
    """The bits of |values|, as int32 (int64 where WIDE): ordered as the magnitudes are, with NaN above infinity."""
    if WIDE:
        return values.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
