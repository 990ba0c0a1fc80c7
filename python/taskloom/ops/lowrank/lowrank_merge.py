"""Products of thin factors added to a weight: one adapter or several, out of place or in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, is_grad_enabled

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating, check_shape, check_untracked, check_writable, mark_changed, plain_number
from taskloom.ops._register import implement_on_cpu, register
from taskloom.ops.lowrank import _products
from taskloom.ops.lowrank._factors import Numbers, adapter_weights, check_matrix, check_numbers, listed_factors
from taskloom.reference import lowrank as reference
from taskloom.reference.arithmetic import accumulation_dtype

Factors = Tensor | Sequence[Tensor]


def _checked_scale(op: str, row_scale: Tensor, rows: int) -> Tensor:
    check_floating(op, "row_scale", row_scale)
    check_shape(op, "row_scale", row_scale, (rows,), "one for each row of base")
    return row_scale.to(accumulation_dtype(row_scale))


def lowrank_merge(
    base: Tensor, A: Factors, B: Factors, weight: Numbers = 1.0, *, scale: float | Sequence[float] = 1.0, row_scale: Tensor | None = None
) -> Tensor:
    """Add the products of adapters' thin factors to a weight: ``base + sum_i weight_i * scale_i * B_i A_i``, in one pass.

    Parameters
    ----------
    base
        Weight of shape ``[out, in]``; float32, bfloat16, float16 or float64.
    A, B
        One factor, or a sequence of one per adapter: A ``[r, in]`` and B ``[out, r]`` as PEFT has them (``lora_A.weight``,
        ``lora_B.weight``). Ranks may differ; any of these dtypes. No adapter at all gives base.
    weight
        One number for all adapters, one per adapter, or a floating-point tensor of shape ``[n]`` or ``[]``, which may require grad.
        Default 1.0.
    scale
        Constant factor of the weight, one number or one per adapter: PEFT's ``lora_alpha / r``. Default 1.0.
    row_scale
        Factor of each row of the sum, ``[out]``, which may require grad; default None: ones.

    Returns
    -------
    Tensor
        ``[out, in]``, contiguous, in base's dtype. Products are summed in float32 (float64 where a tensor is float64), adapter after
        adapter and rank after rank by fused multiply-adds, added to base, scaled and rounded once. The bits do not depend on the number of
        threads or the CPU level.

    Raises
    ------
    TypeError
        If a tensor has another dtype, or ``scale`` is no number.
    ValueError
        If shapes, ranks or counts do not fit.

    Notes
    -----
    Source: LoRA, Hu et al., ICLR 2022, arXiv 2106.09685, section 4.1; several adapters as one product of concatenated factors.

    Beside the result only the factors are copied, in the dtype of the arithmetic. The gradients of A, B, ``weight`` and ``row_scale``
    (:func:`lowrank_merge_backward`) never form a product ``B A`` either; that of base is the output's, rows scaled. Once differentiable;
    twice with ``taskloom.backend("reference")``.
    """
    op = "lowrank_merge"
    check_matrix(op, "base", base)
    right, left = listed_factors(op, A, B, base, "base")
    weights = adapter_weights(op, weight, scale, len(right), base, *right, *left)
    rows = () if row_scale is None else (_checked_scale(op, row_scale, len(base)),)
    run = kernel(op, base, *right, *left, weights, *rows)
    if run is None:
        return reference.lowrank_merge(base, right, left, weights, *rows)
    merged: Tensor = run(base, right, left, weights, rows[0] if rows else None)
    return merged


def lowrank_merge_(
    target: Tensor,
    A: Factors,
    B: Factors,
    weight: Numbers = 1.0,
    *,
    scale: float | Sequence[float] = 1.0,
    row_scale: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """Add the products of adapters' thin factors to a weight in place, or write a base and the products over it.

    Parameters
    ----------
    target
        Weight of shape ``[out, in]`` and any strides; float32, bfloat16, float16 or float64.
    A, B, weight, scale, row_scale
        As in :func:`lowrank_merge`.
    base
        What the products are added to, of target's shape; default None: what target holds. It may be the target, or overlap it.

    Returns
    -------
    Tensor
        ``target``, with the values of :func:`lowrank_merge`, rounded once to its dtype.

    Raises
    ------
    TypeError
        If a tensor has another dtype, or ``scale`` is no number.
    ValueError
        If shapes, ranks or counts do not fit, or ``target`` repeats elements, as an expanded tensor does.
    RuntimeError
        If a tensor requires grad while gradients are recorded.

    Notes
    -----
    Source: as :func:`lowrank_merge`.
    """
    op = "lowrank_merge_"
    check_matrix(op, "target", target)
    if base is not None:
        check_matrix(op, "base", base)
        check_shape(op, "base", base, target.shape, "target")
    right, left = listed_factors(op, A, B, target, "target")
    check_writable(op, "target", target)
    weights = adapter_weights(op, weight, scale, len(right), target, *right, *left)
    rows = () if row_scale is None else (_checked_scale(op, row_scale, len(target)),)
    start = () if base is None else (base,)
    if is_grad_enabled():
        named = {f"A[{place}]": one for place, one in enumerate(right)} | {f"B[{place}]": one for place, one in enumerate(left)}
        named |= {"weight": weights} | dict(zip(("base",), start, strict=False)) | dict(zip(("row_scale",), rows, strict=False))
        check_untracked(op, "lowrank_merge", target=target, **named)
    run = kernel(op, target, *start, *right, *left, weights, *rows)
    if run is None:
        return reference.lowrank_merge_(target, base, right, left, weights, *rows)
    run(target, base, right, left, weights, rows[0] if rows else None)
    mark_changed(target)
    return target


def lowrank_unmerge_(
    target: Tensor,
    A: Factors,
    B: Factors,
    weight: float | Sequence[float] = 1.0,
    *,
    scale: float | Sequence[float] = 1.0,
    base: Tensor | None = None,
) -> Tensor:
    """Take merged adapters out of a weight again, in place.

    Parameters
    ----------
    target
        What :func:`lowrank_merge_` wrote, ``[out, in]``.
    A, B, weight, scale
        As they were merged; numbers only.
    base
        The weight before the merge, if it was kept. Then target gets its bits, and the factors are not looked at beyond their shapes.

    Returns
    -------
    Tensor
        ``target``. Without a base the products are subtracted, which restores the weight only up to the rounding of the merge: about
        one unit in the last place of the larger of the two values.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`lowrank_merge_`.

    Notes
    -----
    Source: this library.
    """
    op = "lowrank_unmerge_"
    if base is not None:
        check_matrix(op, "target", target)
        check_matrix(op, "base", base)
        check_shape(op, "base", base, target.shape, "target")
        listed_factors(op, A, B, target, "target")
        check_writable(op, "target", target)
        check_untracked(op, None, target=target)
        return target.copy_(base)
    check_numbers(op, "weight", weight)
    weights = [weight] if isinstance(weight, (int, float)) else list(weight)
    negative = [-plain_number(op, "weight", one) for one in weights]
    return lowrank_merge_(target, A, B, negative[0] if isinstance(weight, (int, float)) else negative, scale=scale)


def lowrank_merge_backward(
    gradient: Tensor,
    base: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    weight: Tensor,
    row_scale: Tensor | None = None,
    needed: Sequence[bool] = (True, True, True, False),
) -> list[Tensor]:
    """The gradients of :func:`lowrank_merge`'s factors, weights and row scales, from two thin products of the output's gradient.

    With G the gradient, its rows scaled: ``dA_i = w_i B_i^T G``, ``dB_i = w_i G A_i^T``, ``dw_i = <G A_i^T, B_i>``. A gradient that is not
    in the dtype of the arithmetic is converted a few megabytes at a time.

    Parameters
    ----------
    gradient
        ``[out, in]``.
    base
        The merge's; only read for the gradient of ``row_scale``, and may be None without it.
    A, B
        Lists of factors, as in :func:`lowrank_merge`.
    weight
        float32 or float64, ``[n]``.
    row_scale
        float32 or float64, ``[out]``, or None.
    needed
        Whether the gradients of A, B, ``weight`` and ``row_scale`` are wanted. Default: all but the last.

    Returns
    -------
    list of Tensor
        Those that are wanted, in that order, each in the dtype and shape of what it is the gradient of.

    Notes
    -----
    Source: ICM-Fusion's merge; this library. On a CPU and on a GPU the products are torch's own, whose bits may depend on the number of
    threads. Not differentiable.
    """
    op = "lowrank_merge_backward"
    tensors = [one for one in (base, weight, row_scale) if one is not None]
    run = kernel(op, gradient, *A, *B, *tensors)
    if run is None:
        return reference.lowrank_merge_backward(gradient, base, A, B, weight, row_scale, needed)
    found: list[Tensor] = run(gradient, base, list(A), list(B), weight, row_scale, list(needed))
    return found


def _fake_merge(base: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], weight: Tensor, row_scale: Tensor | None) -> Tensor:
    return base.new_empty(base.shape)


def _fake_merge_inplace(
    target: Tensor, base: Tensor | None, A: Sequence[Tensor], B: Sequence[Tensor], weight: Tensor, row_scale: Tensor | None
) -> None:
    return None


def _fake_merge_backward(
    gradient: Tensor,
    base: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    weight: Tensor,
    row_scale: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    listed = (list(A), list(B), [weight], [] if row_scale is None else [row_scale])
    return [one.new_empty(one.shape) for wanted, ones in zip(needed, listed, strict=True) if wanted for one in ones]


def _setup_merge(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor, Tensor | None], output: Tensor) -> None:
    base, A, B, weight, row_scale = inputs
    # The base is read again only for the gradient of its rows' factors.
    kept = None if row_scale is None else base
    ctx.save_for_backward(kept, weight, row_scale, *A, *B)
    ctx.adapters, ctx.base_dtype = len(A), base.dtype


def _merge_backward(
    ctx: Any, gradient: Tensor
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None, Tensor | None]:
    base, weight, row_scale, *factors = ctx.saved_tensors
    count = ctx.adapters
    A, B = factors[:count], factors[count:]
    for_base, for_a, for_b, for_weight, for_scale = ctx.needs_input_grad
    needed = [any(for_a), any(for_b), for_weight, for_scale and row_scale is not None]
    found: list[Tensor | None] = []
    if any(needed):
        found = list(ctx.ops.lowrank_merge_backward.default(gradient, base, A, B, weight, row_scale, needed))
    none: list[Tensor | None] = [None] * count
    first = [found.pop(0) for _ in range(count)] if needed[0] else none
    second = [found.pop(0) for _ in range(count)] if needed[1] else none
    third = found.pop(0) if needed[2] else None
    fourth = found.pop(0) if needed[3] else None
    through = None
    if for_base:
        through = gradient if row_scale is None else (row_scale[:, None] * gradient).to(ctx.base_dtype)
    return through, first, second, third, fourth


implement_on_cpu("lowrank_merge_backward", _products.lowrank_merge_backward)
register("lowrank_merge", fake=_fake_merge, backward=_merge_backward, setup_context=_setup_merge)
register("lowrank_merge_", fake=_fake_merge_inplace, mutates=True)
register("lowrank_merge_backward", fake=_fake_merge_backward)
