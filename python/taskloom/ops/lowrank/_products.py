"""What the family computes through torch's own matrix products: gradients of merges, and rows through adapters grouped by task.

Nothing of the size of a weight is made beside what is returned: matrices that are not in the dtype of the arithmetic are converted a tile
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype, without_autocast

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


@without_autocast
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
    for_a, for_b, for_weight, for_scale = needed
    ranks = [len(a) for a in A]
    right, left = _joined(A, 0, dtype, gradient), _joined(B, 1, dtype, gradient)
    shares = weight.to(dtype)
    if len(ranks) != 1:
        shares = shares.repeat_interleave(torch.tensor(ranks, device=weight.device))
    scales = None if row_scale is None else row_scale.to(dtype)[:, None]
    weighted = left * shares
    inner, for_right, row_products = _thin_products(
        gradient,
        base if for_scale else None,
        right if for_b or for_weight or for_scale else None,
        (weighted if scales is None else weighted * scales) if for_a else None,
        dtype,
    )
    found: list[Tensor] = []
    if for_right is not None:
        found += _parts(for_right, ranks, 0, A)
    scaled_inner = inner if inner is None or scales is None else inner * scales
    if for_b and scaled_inner is not None:
        found += _parts(scaled_inner * shares, ranks, 1, B)
    if for_weight and scaled_inner is not None:
        products = [one.sum() for one in (scaled_inner.double() * left).split(ranks, 1)] if ranks else []
        found.append(torch.stack(products).to(weight.dtype) if products else torch.zeros_like(weight))
    if inner is not None and row_products is not None and row_scale is not None:
        found.append((row_products + (inner * weighted).sum(1)).to(row_scale.dtype))
    return found


def _joined(factors: Sequence[Tensor], dim: int, dtype: torch.dtype, gradient: Tensor) -> Tensor:
    """The factors of all adapters as one: ranks along ``dim``."""
    if not factors:
        rows, columns = gradient.shape
        return gradient.new_empty((rows, 0) if dim else (0, columns), dtype=dtype)
    wide = [one.to(dtype) for one in factors]
    return wide[0] if len(wide) == 1 else torch.cat(wide, dim)


def _parts(joined: Tensor, ranks: list[int], dim: int, likes: Sequence[Tensor]) -> list[Tensor]:
    """The adapters' own parts of a fresh tensor, which share no memory."""
    if len(ranks) == 1:
        return [joined.to(likes[0].dtype)]
    return [_own(one, like.dtype) for one, like in zip(joined.split(ranks, dim), likes, strict=True)] if ranks else []


def _thin_products(
    gradient: Tensor, base: Tensor | None, right: Tensor | None, left: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``gradient right^T``, ``left^T gradient`` and the inner products of gradient's and base's rows: of each whose other side is given."""
    if gradient.dtype == dtype and base is None:
        return None if right is None else gradient @ right.T, None if left is None else left.T @ gradient, None
    rows, columns = gradient.shape
    inner = None if right is None else gradient.new_empty((rows, len(right)), dtype=dtype)
    for_right = None if left is None else gradient.new_zeros((left.shape[1], columns), dtype=dtype)
    row_products = None if base is None else gradient.new_zeros(rows, dtype=dtype)
    for tile in _tiles(gradient):
        values = gradient[tile].to(dtype)
        if inner is not None and right is not None:
            torch.mm(values, right.T, out=inner[tile])
        if for_right is not None and left is not None:
            for_right.addmm_(left[tile].T, values)
        if row_products is not None and base is not None:
            row_products[tile] = (values * base[tile].to(dtype)).sum(1)
    return inner, for_right, row_products


def _groups(task: Tensor, tasks: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Rows in the order of their tasks, and each task's (task, begin, end) in it; rows without an adapter come first."""
    keys = task.long().clamp(min=-1) + 1
    order = torch.argsort(keys, stable=True)
    counts = torch.bincount(keys, minlength=tasks + 1).tolist()
    if len(counts) > tasks + 1:
        raise ValueError(f"lowrank_apply: task: expected values below {tasks}, the number of adapters, got {len(counts) - 2}")
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


@without_autocast
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


@without_autocast
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
