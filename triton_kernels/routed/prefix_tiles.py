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

# Pixels of an image that 32-bit numbers reach, with those of a tile behind them.
MOST_PIXELS = (1 << 31) - 1 - 256


@triton.jit
def operand(values, EXACT: tl.constexpr, WIDE: tl.constexpr):
    """Loaded entries as ``tl.dot`` takes them: in their own dtype, or where EXACT in that of the arithmetic."""
    result = widened(values, WIDE) if EXACT else values
    return result


@triton.jit
def pixel_rows(tile, size, rows, RAGGED: tl.constexpr, ROWS: tl.constexpr):
    """Sample and pixel of a tile's ROWS rows, and which of them there are.

    RAGGED: rows of a sample fill whole tiles; else those of all samples lie in one line. A pixel is a 32-bit number: wider ones are divided
    by a call, for every row.
    """
    place = tl.arange(0, ROWS)
    if RAGGED:
        sample = sample_of(tile, size, ROWS).to(tl.int64) + tl.zeros((ROWS,), dtype=tl.int64)
        pixel = (tile % tiles_of(size, ROWS)) * ROWS + place
        inside = pixel < size
    else:
        first = tile.to(tl.int64) * ROWS
        before = first // size
        ahead = (first - before * size).to(tl.int32) + place
        sample = before + ahead // size
        pixel = ahead % size
        inside = first + place < rows
    return sample, pixel, inside


@triton.jit
def tiles_of(size, ROWS: tl.constexpr):
    """Tiles that the pixels of one sample fill."""
    return (size + ROWS - 1) // ROWS


@triton.jit
def sample_of(tile, size, ROWS: tl.constexpr):
    """The sample whose pixels are in a tile of a ragged launch."""
    return tile // tiles_of(size, ROWS)


@triton.jit
def active(widths, width, tile, size, RAGGED: tl.constexpr, ROWS: tl.constexpr):
    """How many channels a tile's rows have: their sample's, or all the same."""
    count = tl.load(widths + sample_of(tile, size, ROWS)) if RAGGED else width
    return count


@triton.jit
def inside_of(y, z, height, width):
    """Whether rows y and columns z lie in an image."""
    return (y >= 0) & (y < height) & (z >= 0) & (z < width)


@triton.jit
def taps(depth, KX: tl.constexpr, TAPS: tl.constexpr):
    """Channel, row and column of the kernel that places along a weight's row belong to."""
    channel = depth // TAPS
    tap = depth - channel * TAPS
    return channel.to(tl.int64), tap // KX, tap % KX


@triton.jit
def patches(
    x, sample, row, column, inside, channel, ky, kx, known, height, width, x_sample, x_channel, x_row, x_column,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, APART_Y: tl.constexpr, APART_X: tl.constexpr,
):  # fmt: skip
    """The input that pixels of the output see through places along a weight's row, [pixels, places]; 0 in the padding."""
    top, left = row * STEP_Y - TOP, column * STEP_X - LEFT
    down, across = ky * APART_Y, kx * APART_X
    read = inside[:, None] & known[None, :] & inside_of(top[:, None] + down[None, :], left[:, None] + across[None, :], height, width)
    # Only sums of 64 bits, and no products, for every pair of a pixel and a place.
    corner = sample * x_sample + top.to(tl.int64) * x_row + left.to(tl.int64) * x_column
    beside = channel * x_channel + down.to(tl.int64) * x_row + across.to(tl.int64) * x_column
    return tl.load(x + (corner[:, None] + beside[None, :]), mask=read, other=0)


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
    """Rows of all samples, each filled up to whole tiles where they are ragged; raise where a pixel is no 32-bit number."""
    if size > MOST_PIXELS:
        raise ValueError(f"prefix convolution: expected at most {MOST_PIXELS} pixels in an image, got {size}")
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
