"""What the family computes through torch's own matrix products: gradients of merges, and rows through adapters grouped by task.

Nothing of the size of a weight is made beside what is returned: matrices that are not in the dtype of the arithmetic are converted a tile
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype

# Entries of a tile: a few megabytes.
TILE = 1 << 20


def _tiles(matrix: Tensor) -> Iterator[slice]:
    rows, columns = matrix.shape
    step = max(TILE // max(columns, 1), 1)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def _own(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor that shares memory with nothing."""
    return torch.empty(values.shape, dtype=dtype, device=values.device).copy_(values)


def lowrank_merge_backward(
    gradient: Tensor,
    base: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    weight: Tensor,
    row_scale: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients of a merge: two thin products of its gradient, for all adapters at once."""
    dtype = accumulation_dtype(gradient, base, weight, row_scale, *A, *B)
    ranks = [len(a) for a in A]
    right = torch.cat([a.to(dtype) for a in A]) if A else gradient.new_empty((0, gradient.shape[1]), dtype=dtype)
    left = torch.cat([b.to(dtype) for b in B], 1) if B else gradient.new_empty((gradient.shape[0], 0), dtype=dtype)
    shares = weight.to(dtype).repeat_interleave(torch.tensor(ranks, device=weight.device))
    weighted = left * shares
    scaled_left = weighted if row_scale is None else weighted * row_scale.to(dtype)[:, None]
    for_a, for_b, for_weight, for_scale = needed
    inner = torch.empty(left.shape, dtype=dtype, device=gradient.device)
    a_gradient = torch.zeros(right.shape, dtype=dtype, device=gradient.device)
    row_products = torch.zeros(len(gradient), dtype=dtype, device=gradient.device)
    for rows in _tiles(gradient):
        tile = gradient[rows].to(dtype)
        if for_b or for_weight or for_scale:
            torch.mm(tile, right.T, out=inner[rows])
        if for_a:
            a_gradient.addmm_(scaled_left[rows].T, tile)
        if for_scale:
            assert base is not None
            row_products[rows] = (tile * base[rows].to(dtype)).sum(1)
    found: list[Tensor] = []
    if for_a:
        found += [_own(one, a.dtype) for one, a in zip(a_gradient.split(ranks), A, strict=True)]
    scaled_inner = inner if row_scale is None else inner * row_scale.to(dtype)[:, None]
    if for_b:
        found += [_own(one, b.dtype) for one, b in zip((scaled_inner * shares).split(ranks, 1), B, strict=True)]
    if for_weight:
        products = (scaled_inner.double() * left).split(ranks, 1)
        found.append(_own(torch.stack([one.sum() for one in products]) if products else weight, weight.dtype))
    if for_scale:
        assert row_scale is not None
        found.append(_own(row_products + (inner * weighted).sum(1), row_scale.dtype))
    return found


def _groups(task: Tensor, tasks: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Rows in the order of their tasks, and each task's (task, begin, end) in it; rows without an adapter come first."""
    keys = task.clamp(min=-1).long() + 1
    order = torch.argsort(keys, stable=True)
    counts = torch.bincount(keys, minlength=tasks + 1).tolist()
    if len(counts) > tasks + 1:
        raise ValueError(f"task: expected values below {tasks}, the number of adapters, got {len(counts) - 2}")
    groups, begin = [], counts[0]
    for place, count in enumerate(counts[1:]):
        if count:
            groups.append((place, begin, begin + count))
        begin += count
    return order, groups


def _stacked(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All adapters as one: [T r, in] and [out, T r]."""
    tasks, rank, columns = A.shape
    return A.to(dtype).reshape(tasks * rank, columns), B.to(dtype).permute(1, 0, 2).reshape(B.shape[1], tasks * rank)


def lowrank_apply(x: Tensor, A: Tensor, B: Tensor, weight: Tensor, task: Tensor | None, start: Tensor | None) -> Tensor:
    """Start + the adapters' part: two thin products for each task that rows have, on rows sorted once."""
    dtype = accumulation_dtype(x, A, B, weight, start)
    rows, shares = x.to(dtype), weight.to(dtype)
    size = (len(x), B.shape[1])
    if task is None:
        right, left = _stacked(A, B, dtype)
        inner = (rows @ right.T) * shares.repeat_interleave(A.shape[1])
        y = inner @ left.T if start is None else torch.addmm(start.to(dtype), inner, left.T)
        return y.to(x.dtype)
    order, groups = _groups(task, len(A))
    rows = rows.index_select(0, order)
    y = rows.new_zeros(size) if start is None else start.to(dtype).index_select(0, order)
    for place, begin, end in groups:
        inner = (rows[begin:end] @ A[place].to(dtype).T).mul_(shares[place])
        y[begin:end].addmm_(inner, B[place].to(dtype).T)
    return torch.empty(size, dtype=x.dtype, device=x.device).index_copy_(0, order, y.to(x.dtype))


def lowrank_apply_backward(
    gradient: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: Tensor, task: Tensor | None, needed: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the adapters' part, by the same thin products."""
    dtype = accumulation_dtype(gradient, x, A, B, weight)
    rows, back, shares = x.to(dtype), gradient.to(dtype), weight.to(dtype)
    if task is None:
        found = _summed_gradients(back, rows, A, B, shares, dtype, needed)
    else:
        found = _grouped_gradients(back, rows, A, B, shares, task, needed)
    likes = (x, A, B, weight)
    return [_own(one, like.dtype) for one, like, wanted in zip(found, likes, needed, strict=True) if wanted]


def _summed_gradients(
    back: Tensor, rows: Tensor, A: Tensor, B: Tensor, shares: Tensor, dtype: torch.dtype, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tasks, rank, columns = A.shape
    right, left = _stacked(A, B, dtype)
    spread = shares.repeat_interleave(rank)
    inner_back = back @ left
    scaled = inner_back * spread
    inner = rows @ right.T if needed[2] or needed[3] else rows.new_zeros(len(rows), tasks * rank)
    none = rows.new_empty(0)
    return (
        scaled @ right if needed[0] else none,
        (scaled.T @ rows).reshape(tasks, rank, columns) if needed[1] else none,
        (back.T @ (inner * spread)).reshape(-1, tasks, rank).permute(1, 0, 2) if needed[2] else none,
        (inner * inner_back).double().sum(0).reshape(tasks, rank).sum(1) if needed[3] else none,
    )


def _grouped_gradients(
    back: Tensor, rows: Tensor, A: Tensor, B: Tensor, shares: Tensor, task: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order, groups = _groups(task, len(A))
    rows, back = rows.index_select(0, order), back.index_select(0, order)
    for_x, for_a, for_b, for_weight = (
        torch.zeros(shape if wanted else (0,), dtype=rows.dtype, device=rows.device)
        for shape, wanted in zip((rows.shape, A.shape, B.shape, shares.shape), needed, strict=True)
    )
    for place, begin, end in groups:
        one_rows, one_back = rows[begin:end], back[begin:end]
        a, b = A[place].to(rows.dtype), B[place].to(rows.dtype)
        inner_back = one_back @ b
        inner = one_rows @ a.T if needed[2] or needed[3] else None
        if needed[3] and inner is not None:
            for_weight[place] = (inner * inner_back).double().sum()
        scaled = inner_back.mul_(shares[place])
        if needed[0]:
            for_x[begin:end] = scaled @ a
        if needed[1]:
            torch.mm(scaled.T, one_rows, out=for_a[place])
        if needed[2] and inner is not None:
            torch.mm(one_back.T, inner.mul_(shares[place]), out=for_b[place])
    if needed[0]:
        for_x = torch.empty_like(for_x).index_copy_(0, order, for_x)
    return for_x, for_a, for_b, for_weight
