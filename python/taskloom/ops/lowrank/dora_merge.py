"""DoRA: rows of a merge scaled to learned norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating, check_shape
from taskloom.ops._register import register
from taskloom.ops.lowrank._factors import Numbers, adapter_weights, check_matrix, listed_factors
from taskloom.ops.lowrank.lowrank_merge import Factors, lowrank_merge
from taskloom.reference import lowrank as reference
from taskloom.reference.arithmetic import accumulation_dtype


def lowrank_norm(base: Tensor, A: Factors, B: Factors, weight: Numbers = 1.0, *, scale: float | Sequence[float] = 1.0) -> Tensor:
    """The 2-norm of every row of a weight with adapters merged into it, without merging them: DoRA's norm.

    Parameters
    ----------
    base, A, B, weight, scale
        As in :func:`lowrank_merge`.

    Returns
    -------
    Tensor
        float32 of shape ``[out]`` (float64 where a tensor is float64). Rows of the merge are regenerated a tile at a time and their
        squares summed in float64. That takes the reads and the arithmetic of the identity ``||W||^2 + 2 s <W, B A> + s^2 ||B A||^2``,
        and none of the cancellation that the identity has where an adapter nearly undoes a row.

    Raises
    ------
    TypeError, ValueError
        As :func:`lowrank_merge`.
    RuntimeError
        If a gradient flows into it: the op has none. Call it under ``torch.no_grad()``, as PEFT does.

    Notes
    -----
    Source: DoRA, Liu et al., ICML 2024, arXiv 2402.09353, section 4.3, which takes the norm for a constant in the backward pass.
    """
    op = "lowrank_norm"
    check_matrix(op, "base", base)
    right, left = listed_factors(op, A, B, base, "base")
    weights = adapter_weights(op, weight, scale, len(right), base, *right, *left)
    run = kernel(op, base, *right, *left, weights)
    if run is None:
        return reference.lowrank_norm(base, right, left, weights)
    norms: Tensor = run(base, right, left, weights)
    return norms


def dora_merge(base: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, weight: float | Tensor = 1.0, *, scale: float = 1.0) -> Tensor:
    """Merge a DoRA adapter: rows of ``base + weight * scale * B A``, scaled to the norms that ``magnitude`` holds.

    Parameters
    ----------
    base
        Weight of shape ``[out, in]``; float32, bfloat16, float16 or float64.
    A, B
        Factors ``[r, in]`` and ``[out, r]``; any of these dtypes.
    magnitude
        Norm of each row of the result, ``[out]``: PEFT's ``lora_magnitude_vector``.
    weight, scale
        A number or a tensor of one entry, and a number. Default 1.0.

    Returns
    -------
    Tensor
        ``[out, in]`` in base's dtype, contiguous, rounded once. A row of zeros gives NaN, as a quotient of zeros is.

    Raises
    ------
    TypeError, ValueError
        As :func:`lowrank_merge`.

    Notes
    -----
    Source: DoRA, Liu et al., ICML 2024, arXiv 2402.09353, equation 5. The norm of the sum is a constant to autograd, as in section 4.3
    and in PEFT; gradients flow to base, A, B, ``weight`` and ``magnitude``. Norms are :func:`lowrank_norm`'s, and the merge is
    :func:`lowrank_merge` with ``row_scale``: two reads of base and one write, nothing else of its size.
    """
    op = "dora_merge"
    check_matrix(op, "base", base)
    right, left = listed_factors(op, A, B, base, "base")
    if len(right) != 1:
        raise ValueError(f"{op}: A: expected the factor of one adapter, got {len(right)}")
    check_floating(op, "magnitude", magnitude)
    check_shape(op, "magnitude", magnitude, (len(base),), "one for each row of base")
    weights = adapter_weights(op, weight, scale, 1, base, magnitude, *right, *left)
    if kernel("lowrank_merge", base, *right, *left, weights, magnitude) is None:
        return reference.dora_merge(base, right[0], left[0], weights, magnitude)
    with torch.no_grad():
        norms = lowrank_norm(base, right, left, weights)
    return lowrank_merge(base, right, left, weights, row_scale=magnitude.to(accumulation_dtype(magnitude)) / norms)


def _fake_norm(base: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], weight: Tensor) -> Tensor:
    return base.new_empty(base.shape[0], dtype=accumulation_dtype(base, weight, *A, *B))


register("lowrank_norm", fake=_fake_norm)
