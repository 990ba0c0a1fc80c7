"""Entries of a matrix that a kernel makes of two thin factors, generated in tiles [rows j, columns i]: every pass takes them from here, so
that what one pass counts the next one gates.

Factors come as [chunks, width, rows] in the dtype of the arithmetic; ``numbers`` holds alpha, gamma and beta.
"""

from __future__ import annotations

import triton
import triton.language as tl

from taskloom.triton_kernels.masked.entries import divided, load_entries


@triton.jit
def exponential(x, WIDE: tl.constexpr):
    """The exponential to about one unit in the last place: Triton's own is approximate. What would be subnormal is 0."""
    lowest: tl.constexpr = -708.39641853226408 if WIDE else -87.33654
    highest: tl.constexpr = 709.78271289338397 if WIDE else 88.72283
    kept = tl.where(x < lowest, lowest, tl.where(x > highest, highest, x))
    power = tl.floor(kept * 1.4426950408889634 + 0.5)
    if WIDE:
        rest = (kept - power * 6.93147180369123816490e-01) - power * 1.90821492927058770002e-10
        total = tl.zeros_like(rest) + 1.0
        for term in tl.static_range(13):
            total = total * (rest * (1.0 / (13 - term))) + 1.0
        # Half of the power of two, doubled after, so that the largest one does not overflow on its own; NaN has no integer.
        place = tl.where(x == x, power, 0.0).to(tl.int64)
        scale = ((place + 1022) << 52).to(tl.float64, bitcast=True)
    else:
        rest = (kept - power * 0.693359375) - power * -2.12194440e-4
        total = tl.zeros_like(rest) + 1.0
        for term in tl.static_range(7):
            total = total * (rest * (1.0 / (7 - term))) + 1.0
        place = tl.where(x == x, power, 0.0).to(tl.int32)
        scale = ((place + 126) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < lowest, 0.0, tl.where(x > highest, float("inf"), (total * scale) * 2.0))


@triton.jit
def square_root(x, WIDE: tl.constexpr):
    """A root rounded to nearest: Triton's own of float32 is approximate."""
    return tl.sqrt(x) if WIDE else tl.sqrt_rn(x)


@triton.jit
def zero_tile(WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of zeros in the dtype of the arithmetic."""
    return tl.zeros([ROWS, COLUMNS], tl.float64 if WIDE else tl.float32)


@triton.jit
def add_chunk(total, a, b, chunk, i, j, n, m, width, DISTANCE: tl.constexpr):
    """Add a chunk's squared distances, or its products, of rows i of A and rows j of B."""
    k = 0
    while k < width:
        row = (chunk * width + k).to(tl.int64)
        own = tl.load(a + row * n + i, mask=i < n, other=0.0)[None, :]
        other = tl.load(b + row * m + j, mask=j < m, other=0.0)[:, None]
        if DISTANCE:
            apart = own - other
            total += apart * apart
        else:
            total += own * other
        k += 1
    return total


@triton.jit
def chunk_part(a, b, chunk, i, j, n, m, width, KERNEL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What a chunk gives to the kernels that weight their chunks: distances, or products."""
    part = add_chunk(zero_tile(WIDE, ROWS, COLUMNS), a, b, chunk, i, j, n, m, width, KERNEL != "linear")
    return part if KERNEL == "linear" else square_root(part, WIDE)


@triton.jit
def mixed_tile(a, b, coef, i, j, n, m, chunks, width, KERNEL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The weighted sum of the chunks' parts; for sigmoid and rbf, whose chunks are one vector, their plain sum."""
    total = zero_tile(WIDE, ROWS, COLUMNS)
    chunk = 0
    while chunk < chunks:
        if KERNEL == "sigmoid" or KERNEL == "rbf":
            total = add_chunk(total, a, b, chunk, i, j, n, m, width, KERNEL == "rbf")
        else:
            total += tl.load(coef + chunk) * chunk_part(a, b, chunk, i, j, n, m, width, KERNEL, WIDE, ROWS, COLUMNS)
        chunk += 1
    return total


@triton.jit
def load_row_stats(stats, i, n, KERNEL: tl.constexpr, WIDE: tl.constexpr):
    """Of rows i for mixk: the maximum of M / gamma, and one over the sum of exponentials."""
    if KERNEL == "mixk":
        top = tl.load(stats + i, mask=i < n, other=0.0)
        share = divided(1.0, tl.load(stats + n + i, mask=i < n, other=1.0), WIDE)
    else:
        top = i
        share = i
    return top, share


@triton.jit
def curved_tile(mixed, numbers, top, share, KERNEL: tl.constexpr, WIDE: tl.constexpr):
    """The non-linear part of a kernel: softmax, exponential or sigmoid."""
    if KERNEL == "mixk":
        curved = exponential(mixed * divided(1.0, tl.load(numbers + 1), WIDE) - top[None, :], WIDE) * share[None, :]
    elif KERNEL == "rbf":
        curved = exponential(-tl.load(numbers + 2) * mixed, WIDE)
    elif KERNEL == "sigmoid":
        curved = divided(1.0, 1.0 + exponential(-tl.load(numbers + 2) * mixed, WIDE), WIDE)
    else:
        curved = mixed
    return curved


@triton.jit
def entry_tile(mixed, curved, numbers, KERNEL: tl.constexpr):
    """The entries from both parts of a kernel."""
    if KERNEL == "mixk":
        entries = mixed + tl.load(numbers) * curved + tl.load(numbers + 2)
    elif KERNEL == "rbf" or KERNEL == "sigmoid":
        entries = tl.load(numbers) * curved + tl.load(numbers + 1)
    else:
        entries = mixed
    return entries


@triton.jit
def gate_factor(entries, threshold, GATE: tl.constexpr, SLOPE: tl.constexpr):
    """What an entry is multiplied by, or with SLOPE what its gradient is multiplied by."""
    size = tl.abs(entries)
    if GATE == "magnitude":
        factor = size
    elif GATE == "soft":
        factor = size + (size - threshold) if SLOPE else size - threshold
    else:
        factor = tl.zeros_like(size) + 1.0
    return factor if GATE == "none" else tl.where(size > threshold, factor, 0.0)


@triton.jit
def gradient_tile(gradient, entries, threshold, i, j, n, m, GATE: tl.constexpr, WIDE: tl.constexpr):
    """The gradient of the entries from that of the merged matrix [m, n]; 0 outside."""
    inside = (j < m)[:, None] & (i < n)[None, :]
    given = load_entries(gradient, j[:, None] * n + i[None, :], inside, WIDE)
    return tl.where(inside, given * gate_factor(entries, threshold, GATE, True), 0.0)
