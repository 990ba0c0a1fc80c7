"""Matrix products on views of windows, by torch's own; nothing of the size of a weight is made beside what is returned."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from taskloom.ops.routed._windows import Keys

# Entries of a tile that is converted, masked or gathered: a few megabytes.
TILE = 1 << 20
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def tiles(count: int, size: int) -> Iterator[slice]:
    """Parts of ``count`` rows of ``size`` entries each, of at most TILE entries."""
    step = max(TILE // max(size, 1), 1)
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def in_rows(tensor: Tensor) -> Tensor:
    """The tensor with the strides of a fresh one, copied only where it is not contiguous: where a size is 1, torch's results may differ."""
    return tensor.contiguous().flatten().view(tensor.shape)


@cache
def _multiplies_bfloat16() -> bool:
    """Whether the processor has products of bfloat16 that are summed in float32: elsewhere torch's are slower than those of float32."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


@cache
def onednn_dtypes() -> frozenset[torch.dtype]:
    """What oneDNN convolves here."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    return frozenset({torch.float32, torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {torch.float32})


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that factors are multiplied in whose product is rounded to ``dtype`` once: their own, or that of the arithmetic."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not _multiplies_bfloat16()):
        return torch.float32
    return dtype


def zeroed_outside(values: Tensor, keys: Keys) -> Tensor:
    """The contiguous values [N, P, C, ...], after they were made 0 outside of each sample's window of channels."""
    torch.ops.taskloom_loops.zero_outside.default(values, torch.from_numpy(keys))
    return values


def masked_parts(x: Tensor, keys: Keys) -> Iterator[tuple[slice, Tensor]]:
    """Samples of x [N, P, C, ...] a tile at a time: which, and their values with zeros outside of the windows."""
    for part in tiles(len(x), x[:1].numel()):
        yield part, zeroed_outside(x[part].clone(memory_format=torch.contiguous_format), keys[part])


def _is_taken_whole(left: Tensor, right: Tensor, out: Tensor) -> bool:
    """Whether torch copies no factor."""
    return left.is_contiguous() and out.is_contiguous() and (right.is_contiguous() or right.T.is_contiguous())


def product(left: Tensor, right: Tensor, out: Tensor, start: Tensor | None = None) -> None:
    """Write ``left right``, plus ``start`` which is spread to out's shape; 16-bit factors are taken a tile at a time.

    Torch copies a view of them that is not contiguous, or they are multiplied as float32: :func:`product_dtype`.
    """
    dtype = product_dtype(out.dtype)
    if left.dtype == right.dtype == out.dtype == dtype and (dtype != torch.bfloat16 or _is_taken_whole(left, right, out)):
        if start is None:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(start, left, right, out=out)
        return
    begin = None if start is None else start.to(dtype).expand(out.shape)
    for columns in tiles(right.shape[1], right.shape[0]):
        wide = right[:, columns].to(dtype)
        for rows in tiles(left.shape[0], max(left.shape[1], wide.shape[1])):
            narrow = left[rows].to(dtype)
            out[rows, columns] = narrow @ wide if begin is None else torch.addmm(begin[rows, columns], narrow, wide)


def add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Add ``left right`` to out, which is in the dtype of the arithmetic; factors of other dtypes are converted a tile at a time."""
    if left.dtype == right.dtype == out.dtype:
        out.addmm_(left, right)
        return
    for inner in tiles(left.shape[1], max(left.shape[0], right.shape[1])):
        out.addmm_(left[:, inner].to(out.dtype), right[inner].to(out.dtype))
