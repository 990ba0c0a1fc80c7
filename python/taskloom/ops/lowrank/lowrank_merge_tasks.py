"""One weight with each of several adapters alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating, check_shape
from taskloom.ops._register import register
from taskloom.ops.lowrank._factors import Numbers, adapter_weights, check_matrix
from taskloom.ops.lowrank.lowrank_merge import lowrank_merge_
from taskloom.reference import lowrank as reference
from taskloom.reference.arithmetic import accumulation_dtype


def _check_tasks(op: str, base: Tensor, A: Tensor, B: Tensor) -> None:
    check_matrix(op, "base", base)
    check_floating(op, "A", A)
    check_floating(op, "B", B)
    rows, columns = base.shape
    if A.dim() != 3 or A.shape[2] != columns:
        raise ValueError(f"{op}: A: expected shape (T, r, {columns}) for base {tuple(base.shape)}, got {tuple(A.shape)}")
    check_shape(op, "B", B, (A.shape[0], rows, A.shape[1]), "A and base")


def lowrank_merge_tasks(
    base: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Numbers = 1.0,
    *,
    scale: float | Sequence[float] = 1.0,
    select: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Merge each of several adapters into the same weight alone, reading the weight once for all of them.

    Parameters
    ----------
    base
        Shared weight of shape ``[out, in]``; float32, bfloat16, float16 or float64.
    A, B
        Factors of T adapters of one rank: ``[T, r, in]`` and ``[T, out, r]``, any of these dtypes.
    weight, scale
        As in :func:`lowrank_merge`, one per adapter.
    select
        Number of one adapter: only its merge is made, and written to ``out`` (as :func:`lowrank_merge_` does, without gradients).
    out
        With ``select``: the weight to write, ``[out, in]``; base itself is allowed only once, as it is then changed.

    Returns
    -------
    Tensor
        ``[T, out, in]`` in base's dtype, contiguous; with ``select`` ``out``. Each is what :func:`lowrank_merge` gives of that adapter.

    Raises
    ------
    TypeError
        If a tensor has another dtype, ``scale`` is no number, or ``select`` no integer.
    ValueError
        If shapes or counts do not fit, ``select`` is no adapter's number, or only one of ``select`` and ``out`` is given.

    Notes
    -----
    Source: ICM-LoRA, arXiv 2501.17635, whose generator makes an adapter per task; this library. Once differentiable with respect to all
    tensors; twice with ``taskloom.backend("reference")``.
    """
    op = "lowrank_merge_tasks"
    _check_tasks(op, base, A, B)
    weights = adapter_weights(op, weight, scale, len(A), base, A, B)
    if (select is None) != (out is None):
        raise ValueError(f"{op}: select and out: expected both or neither, as one names the task and the other where its merge goes")
    if select is not None and out is not None:
        if isinstance(select, bool) or not isinstance(select, int):
            raise TypeError(f"{op}: select: expected an integer, got {type(select).__name__}")
        if not 0 <= select < len(A):
            raise ValueError(f"{op}: select: expected the number of one of {len(A)} adapters, got {select}")
        return lowrank_merge_(out, A[select], B[select], weights[select], base=base)
    run = kernel(op, base, A, B, weights)
    if run is None:
        return reference.lowrank_merge_tasks(base, A, B, weights)
    merged: Tensor = run(base, A, B, weights)
    return merged


def _fake_merge_tasks(base: Tensor, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    return base.new_empty((A.shape[0], *base.shape))


def _setup_merge_tasks(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    base, A, B, weight = inputs
    ctx.save_for_backward(A, B, weight)
    ctx.base_dtype = base.dtype


def _merge_tasks_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    A, B, weight = ctx.saved_tensors
    for_base, *wanted = ctx.needs_input_grad
    through = gradient.sum(0, dtype=accumulation_dtype(gradient)).to(ctx.base_dtype) if for_base else None
    if not any(wanted):
        return through, None, None, None
    needed = [*wanted, False]
    found = [
        ctx.ops.lowrank_merge_backward.default(gradient[t], None, [A[t]], [B[t]], weight[t : t + 1], None, needed) for t in range(len(A))
    ]
    if not found:
        zeros = [torch.zeros_like(one) if needs else None for one, needs in zip((A, B, weight), wanted, strict=True)]
        return through, zeros[0], zeros[1], zeros[2]
    columns = iter(zip(*found, strict=True))
    first = torch.stack(next(columns)) if wanted[0] else None
    second = torch.stack(next(columns)) if wanted[1] else None
    third = torch.cat(next(columns)) if wanted[2] else None
    return through, first, second, third


register("lowrank_merge_tasks", fake=_fake_merge_tasks, backward=_merge_tasks_backward, setup_context=_setup_merge_tasks)
