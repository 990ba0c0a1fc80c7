"""manifold_loss and its backward: a program takes some rows, and reads those of the table that they name."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.gating.indices import check_indices, row_blocks
from taskloom.triton_kernels.launch import flat, launch, raw
from taskloom.triton_kernels.masked.entries import load_entries, store_entries


@triton.jit
def _neighbour(ids, weight, slot, present, WIDE: tl.constexpr):
    """The table's rows of a slot of each row, their weights, and where there are any."""
    known = tl.load(ids + slot, mask=present, other=-1).to(tl.int64)
    factor = load_entries(weight, slot, present, WIDE)
    there = present & (known >= 0) & (factor != 0)
    return known, factor, there


@triton.jit
def manifold_loss_kernel(
    r, reference, ids, weight, loss, rows, neighbours, width, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The loss of some rows, neighbours in order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    total = tl.zeros([ROWS], tl.float64 if WIDE else tl.float32)
    slot = 0
    while slot < neighbours:
        known, factor, there = _neighbour(ids, weight, row * neighbours + slot, present, WIDE)
        squares = tl.zeros([ROWS, BLOCK], tl.float64 if WIDE else tl.float32)
        first = 0
        while first < width:
            column = first + tl.arange(0, BLOCK)
            taken = there[:, None] & (column < width)[None, :]
            apart = load_entries(r, row[:, None] * width + column[None, :], taken, WIDE)
            apart -= load_entries(reference, known[:, None] * width + column[None, :], taken, WIDE)
            squares += apart * apart
            first += BLOCK
        total += tl.where(there, factor * tl.sum(squares, axis=1), 0.0)
        slot += 1
    tl.store(loss + row, total, mask=present)


@triton.jit
def manifold_loss_backward_kernel(
    gradient, r, reference, ids, weight, dr, rows, neighbours, width, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of entries of some rows' gradients, neighbours in order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = row < rows
    inside = (column < width)[None, :]
    places = row[:, None] * width + column[None, :]
    values = load_entries(r, places, present[:, None] & inside, WIDE)
    pull = tl.zeros([ROWS, BLOCK], tl.float64 if WIDE else tl.float32)
    found = tl.zeros([ROWS], tl.int32)
    slot = 0
    while slot < neighbours:
        known, factor, there = _neighbour(ids, weight, row * neighbours + slot, present, WIDE)
        taken = there[:, None] & inside
        apart = values - load_entries(reference, known[:, None] * width + column[None, :], taken, WIDE)
        pull += tl.where(taken, factor[:, None] * apart, 0.0)
        found += there.to(tl.int32)
        slot += 1
    slope = 2 * load_entries(gradient, row, present, WIDE)
    store_entries(dr, places, tl.where((found > 0)[:, None], slope[:, None] * pull, 0.0), present[:, None] & inside)


def manifold_loss(r: Tensor, reference: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """Launch :func:`taskloom.manifold_loss`."""
    check_indices("manifold_loss", "ids", ids, -1, reference.shape[0], "a row of reference or -1 for none")
    dtype = accumulation_dtype(r, reference, weight)
    rows, width = r.shape
    loss = torch.empty(rows, dtype=dtype, device=r.device)
    blocks = row_blocks(width)
    given = (flat(r), flat(reference), ids.contiguous(), flat(weight), loss, rows, ids.shape[1], width)
    launch(manifold_loss_kernel, (triton.cdiv(rows, blocks["ROWS"]),), *given, WIDE=dtype == torch.float64, **blocks)
    return loss


def manifold_loss_backward(gradient: Tensor, r: Tensor, reference: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """Launch the backward op."""
    check_indices("manifold_loss_backward", "ids", ids, -1, reference.shape[0], "a row of reference or -1 for none")
    rows, width = r.shape
    dr = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    blocks = row_blocks(width)
    wide = accumulation_dtype(r, reference, weight) == torch.float64
    grid = (triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(width, blocks["BLOCK"]))
    given = (flat(gradient), flat(r), flat(reference), ids.contiguous(), flat(weight), raw(dr), rows, ids.shape[1], width)
    launch(manifold_loss_backward_kernel, grid, *given, WIDE=wide, **blocks)
    return dr
