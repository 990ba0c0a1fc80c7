"""What a server of many adapters does, as a peer: one Triton launch takes each row down to its adapter's rank, one takes it up again.

Rows are gathered by their adapter's number inside the kernels (punica, arXiv 2310.18547); what is between the launches is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, OUTPUTS = 256, 128
# Parts that a row's columns are cut into: a batch alone does not keep a large GPU busy.
SPLITS = 8


@triton.jit
def shrink_kernel(x, A, task, inner, rows, columns, share, RANK: tl.constexpr, COLUMNS: tl.constexpr):
    """inner[part, row] = x[row] A[task[row]]^T over the columns of a part."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    adapter = tl.load(task + row).to(tl.int64)
    rank = tl.arange(0, RANK)
    total = tl.zeros([RANK], tl.float32)
    first = part * share
    last = tl.minimum(first + share, columns)
    while first < last:
        column = first + tl.arange(0, COLUMNS)
        values = tl.load(x + row * columns + column, mask=column < last, other=0).to(tl.float32)
        at = (adapter * RANK + rank)[:, None] * columns + column[None, :]
        factors = tl.load(A + at, mask=(column < last)[None, :], other=0).to(tl.float32)
        total += tl.sum(factors * values[None, :], 1)
        first += COLUMNS
    tl.store(inner + (part * rows + row) * RANK + rank, total)


@triton.jit
def expand_kernel(inner, B, task, out, rows, outputs, SPLITS: tl.constexpr, RANK: tl.constexpr, OUTPUTS: tl.constexpr):
    """out[row] = (the sum of the parts of inner[row]) B[task[row]]^T."""
    row = tl.program_id(0).to(tl.int64)
    adapter = tl.load(task + row).to(tl.int64)
    rank, part = tl.arange(0, RANK), tl.arange(0, SPLITS)
    values = tl.sum(tl.load(inner + (part[:, None] * rows + row) * RANK + rank[None, :]), 0)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    known = output < outputs
    at = (adapter * outputs + output)[:, None] * RANK + rank[None, :]
    factors = tl.load(B + at, mask=known[:, None], other=0).to(tl.float32)
    tl.store(out + row * outputs + output, tl.sum(factors * values[None, :], 1).to(out.dtype.element_ty), mask=known)


def shrink_expand(x: Tensor, A: Tensor, B: Tensor, task: Tensor) -> Tensor:
    """Each row of x [N, d] by its adapter of A [n, r, d] and B [n, m, r], all contiguous and r a power of two: [N, m]."""
    (rows, columns), (_, outputs, rank) = x.shape, B.shape
    inner = torch.empty(SPLITS, rows, rank, dtype=torch.float32, device=x.device)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    share = triton.cdiv(columns, SPLITS)
    shrink_kernel[(rows, SPLITS)](x, A, task, inner, rows, columns, share, RANK=rank, COLUMNS=COLUMNS)
    up = (rows, triton.cdiv(outputs, OUTPUTS))
    expand_kernel[up](inner, B, task, out, rows, outputs, SPLITS=SPLITS, RANK=rank, OUTPUTS=OUTPUTS)
    return out
