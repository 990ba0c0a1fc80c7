"""expert_combine and its backward: a program takes some tokens' entries, or some slots' rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.ops.gating.expert_combine import check_rows_once
from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.gating.indices import check_indices, row_blocks
from taskloom.triton_kernels.launch import flat, launch, raw
from taskloom.triton_kernels.masked.entries import load_entries, store_entries

# Slots that are loaded without waiting for each other.
_UNROLLED = tl.constexpr(16)


@triton.jit
def _weighed_row(y, weight, inverse, slot, present, column, width, WIDE: tl.constexpr):
    """The weighed entries of the row of a slot of each token."""
    row = tl.load(inverse + slot, mask=present, other=0).to(tl.int64)
    taken = present[:, None] & (column < width)[None, :]
    values = load_entries(y, row[:, None] * width + column[None, :], taken, WIDE)
    return load_entries(weight, slot, present, WIDE)[:, None] * values


@triton.jit
def expert_combine_kernel(
    y, weight, inverse, out, tokens, width, SLOTS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of entries of some tokens, slots in order."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = token < tokens
    sums = tl.zeros([ROWS, BLOCK], tl.float64 if WIDE else tl.float32)
    if SLOTS <= _UNROLLED:
        for slot in tl.static_range(SLOTS):
            sums += _weighed_row(y, weight, inverse, token * SLOTS + slot, present, column, width, WIDE)
    else:
        for slot in range(SLOTS):
            sums += _weighed_row(y, weight, inverse, token * SLOTS + slot, present, column, width, WIDE)
    store_entries(out, token[:, None] * width + column[None, :], sums, present[:, None] & (column < width)[None, :])


@triton.jit
def expert_combine_backward_kernel(
    gradient,
    y,
    weight,
    inverse,
    dy,
    dweight,
    lines,
    slots,
    width,
    FOR_Y: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some slots of some tokens: the gradient of each one's row, and of its weight."""
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = line < lines
    token = line // slots
    row = tl.load(inverse + line, mask=present, other=0).to(tl.int64)
    factor = load_entries(weight, line, present, WIDE)[:, None]
    products = tl.zeros([ROWS, BLOCK], tl.float64 if WIDE else tl.float32)
    first = 0
    while first < width:
        column = first + tl.arange(0, BLOCK)
        taken = present[:, None] & (column < width)[None, :]
        places = row[:, None] * width + column[None, :]
        slopes = load_entries(gradient, token[:, None] * width + column[None, :], taken, WIDE)
        if FOR_WEIGHT:
            products += slopes * load_entries(y, places, taken, WIDE)
        if FOR_Y:
            store_entries(dy, places, factor * slopes, taken)
        first += BLOCK
    if FOR_WEIGHT:
        store_entries(dweight, line, tl.sum(products, axis=1), present)


def _tokens(weight: Tensor) -> int:
    return weight.shape[:-1].numel()


def expert_combine(y: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Launch :func:`taskloom.expert_combine`."""
    check_indices("expert_combine", "inverse", inverse, 0, y.shape[0], "a row of y")
    tokens, width, slots = _tokens(weight), y.shape[1], weight.shape[-1]
    out = torch.empty((*weight.shape[:-1], width), dtype=y.dtype, device=y.device)
    blocks = row_blocks(width)
    grid = (triton.cdiv(tokens, blocks["ROWS"]), triton.cdiv(width, blocks["BLOCK"]))
    wide = accumulation_dtype(y, weight) == torch.float64
    given = (flat(y), flat(weight), inverse.contiguous(), raw(out), tokens, width)
    launch(expert_combine_kernel, grid, *given, SLOTS=slots, WIDE=wide, **blocks)
    return out


def expert_combine_backward(
    gradient: Tensor, y: Tensor, weight: Tensor, inverse: Tensor, for_y: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    """Launch the backward op."""
    check_indices("expert_combine_backward", "inverse", inverse, 0, y.shape[0], "a row of y")
    if for_y:
        check_rows_once("expert_combine_backward", y, inverse)
    lines, slots, width = weight.numel(), weight.shape[-1], y.shape[1]
    # Where a row is named twice on a GPU, another is not written.
    dy = torch.zeros(y.shape if for_y else (0,), dtype=y.dtype, device=y.device)
    dweight = torch.empty(weight.shape if for_weight else (0,), dtype=weight.dtype, device=y.device)
    blocks = row_blocks(width)
    wide = accumulation_dtype(y, weight) == torch.float64
    given = (flat(gradient), flat(y), flat(weight), inverse.contiguous(), raw(dy), raw(dweight), lines, slots, width)
    grid = (triton.cdiv(lines, blocks["ROWS"]),)
    launch(expert_combine_backward_kernel, grid, *given, FOR_Y=for_y, FOR_WEIGHT=for_weight, WIDE=wide, **blocks)
    return dy, dweight
