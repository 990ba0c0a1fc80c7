"""What the kernels of prefix convolutions share: rows of pixels, taps of a kernel, and how launches are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.triton_kernels.launch import INTERPRETED, raw
from taskloom.triton_kernels.masked.entries import widened


@triton.jit
def operand(values, EXACT: tl.constexpr, WIDE: tl.constexpr):
    """Loaded entries as ``tl.dot`` takes them: in their own dtype, or where EXACT in that of the arithmetic."""
    result = widened(values, WIDE) if EXACT else values
    return result


@triton.jit
def pixel_rows(first, size, total, RAGGED: tl.constexpr, ROWS: tl.constexpr):
    """Sample and pixel of ROWS rows from ``first`` on. RAGGED: rows of a sample fill whole tiles; else those of all lie in one line."""
    row = first + tl.arange(0, ROWS)
    if RAGGED:
        padded = (size + ROWS - 1) // ROWS * ROWS
        sample = first // padded + tl.zeros((ROWS,), dtype=tl.int64)
        pixel = row - sample * padded
        inside = (pixel < size) & (row < total)
    else:
        sample = row // size
        pixel = row - sample * size
        inside = row < total
    return sample, pixel, inside


@triton.jit
def active(widths, width, first, size, RAGGED: tl.constexpr, ROWS: tl.constexpr):
    """How many channels the rows from ``first`` on have: their sample's, or all the same."""
    if RAGGED:
        padded = (size + ROWS - 1) // ROWS * ROWS
        count = tl.load(widths + first // padded)
    else:
        count = width
    return count


@triton.jit
def taps(depth, KX: tl.constexpr, TAPS: tl.constexpr):
    """Channel, row and column of the kernel that places along a weight's row belong to."""
    channel = depth // TAPS
    tap = depth - channel * TAPS
    return channel.to(tl.int64), tap // KX, tap % KX


@dataclass(frozen=True)
class Tiles:
    """Entries of a program's tiles: rows of pixels, columns of channels, and the depth of a sum."""

    rows: int
    columns: int
    depth: int

    def constants(self) -> dict[str, int]:
        """As kernels name them."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}


def _block(size: int, least: int, most: int) -> int:
    return min(most, max(least, triton.next_power_of_2(size)))


def tiles_for(rows: int, columns: int, depth: int) -> Tiles:
    """Tiles for a product of these sizes; the interpreter takes milliseconds for a program of any size."""
    if INTERPRETED:
        return Tiles(_block(rows, 16, 256), _block(columns, 16, 64), _block(depth, 16, 256))
    return Tiles(_block(rows, 16, 64), _block(columns, 16, 64), 32)


def whole_rows(samples: int, size: int, tiles: Tiles, ragged: bool) -> int:
    """Rows of all samples, each filled up to whole tiles where they are ragged."""
    return samples * (triton.cdiv(size, tiles.rows) * tiles.rows if ragged else size)


def given(tensor: Tensor) -> Tensor:
    """The tensor as kernels take it: the interpreter would multiply the bits of bfloat16, so it converts them itself."""
    return raw(tensor) if INTERPRETED else tensor


def constants_of(x: Tensor, weight: Tensor, steps: tuple[Sequence[int], Sequence[int], Sequence[int]]) -> dict[str, Any]:
    """Kernel size, stride, padding and dilation, and how products are taken."""
    (down, across), (top, left), (apart_y, apart_x) = steps
    return {
        "KY": weight.shape[2],
        "KX": weight.shape[3],
        "STEP_Y": down,
        "STEP_X": across,
        "TOP": top,
        "LEFT": left,
        "APART_Y": apart_y,
        "APART_X": apart_x,
        "EXACT": INTERPRETED or x.dtype in (torch.float32, torch.float64),
        "WIDE": x.dtype == torch.float64,
    }
