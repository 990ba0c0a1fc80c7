"""Updates of the entries that a mask sets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from taskloom.ops._backends import kernel
from taskloom.ops._checks import (
    check_floating,
    check_floating_like,
    check_packed,
    check_shape,
    check_untracked,
    check_writable,
    is_usual,
    mark_changed,
    plain_number,
)
from taskloom.ops._register import register
from taskloom.reference import masked as reference


def _check(op: str, target: Tensor, mask: Tensor, delta: Tensor) -> None:
    check_floating(op, "target", target)
    check_floating_like(op, "delta", delta, target, "target")
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype == torch.uint8:
        check_packed(op, "mask", mask, target.numel())
    elif mask.dtype == torch.bool:
        check_shape(op, "mask", mask, target.shape, "target")
    else:
        raise TypeError(f"{op}: mask: expected torch.bool or packed torch.uint8, got {mask.dtype}")


def masked_update(target: Tensor, mask: Tensor, delta: Tensor, scale: float = 1.0) -> Tensor:
    """Add a scaled delta at the entries that a mask sets.

    ``masked_update(base, packed, multi_task_vector)`` restores one task from shared weights, its :func:`task_mask` and the tasks' sum.

    Parameters
    ----------
    target
        Tensor of any shape; float32, bfloat16, float16 or float64.
    mask
        bool of target's shape, or packed uint8 of shape ``[ceil(numel / 8)]`` (:func:`pack_mask`; bits after the last entry are not
        looked at).
    delta
        Of target's shape and any of the dtypes above.
    scale
        Factor of ``delta``. Default 1.0.

    Returns
    -------
    Tensor
        A new contiguous tensor of target's shape and dtype: ``target + scale * delta`` where set, computed in float32 (float64 where a
        tensor is float64) and rounded once to the dtype; target's own bits elsewhere, also where delta is NaN.

    Raises
    ------
    TypeError
        If a tensor has another dtype, or ``scale`` is a tensor that requires grad.
    ValueError
        If the shapes do not fit.

    Notes
    -----
    Source: this library; as a task's reconstruction, TALL-masks, Wang et al., ICML 2024, arXiv 2405.07813, equation 2. Differentiable
    any number of times: the gradient of ``target`` is the output's, that of ``delta`` is ``scale`` times the output's where set and 0
    elsewhere.
    """
    op = "masked_update"
    if not is_usual(target, (delta,), (mask,)):
        _check(op, target, mask, delta)
    scale = plain_number(op, "scale", scale)
    run = kernel(op, target, mask, delta)
    if run is None:
        return reference.masked_update(target, mask, delta, scale)
    updated: Tensor = run(target, mask, delta, scale)
    return updated


def masked_update_(target: Tensor, mask: Tensor, delta: Tensor, scale: float = 1.0) -> Tensor:
    """Add a scaled delta at the entries that a mask sets, in place.

    Parameters
    ----------
    target
        Tensor of any shape and strides; float32, bfloat16, float16 or float64. Entries that are not set keep their bits.
    mask, delta, scale
        As in :func:`masked_update`. They may overlap ``target``: its values before the call count.

    Returns
    -------
    Tensor
        ``target``.

    Raises
    ------
    TypeError
        If a tensor has another dtype, or ``scale`` is a tensor that requires grad.
    ValueError
        If the shapes do not fit, or ``target`` repeats elements, as an expanded tensor does.
    RuntimeError
        If a tensor requires grad while gradients are recorded.

    Notes
    -----
    Source: this library.
    """
    op = "masked_update_"
    if not is_usual(target, (delta,), (mask,)):
        _check(op, target, mask, delta)
    scale = plain_number(op, "scale", scale)
    check_writable(op, "target", target)
    if is_grad_enabled() and (target.requires_grad or delta.requires_grad):
        check_untracked(op, "masked_update", target=target, delta=delta)
    run = kernel(op, target, mask, delta)
    if run is None:
        return reference.masked_update_(target, mask, delta, scale)
    run(target, mask, delta, scale)
    mark_changed(target)
    return target


def _fake_masked_update(target: Tensor, mask: Tensor, delta: Tensor, scale: float) -> Tensor:
    return target.new_empty(target.shape)


def _fake_masked_update_inplace(target: Tensor, mask: Tensor, delta: Tensor, scale: float) -> None:
    return None


def _setup_masked_update(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    _, mask, delta, ctx.scale = inputs
    ctx.save_for_backward(mask)
    ctx.delta_dtype = delta.dtype


def _masked_update_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    (mask,) = ctx.saved_tensors
    for_target, _, for_delta, _ = ctx.needs_input_grad
    delta = None
    if for_delta:
        zeros = gradient.new_zeros(gradient.shape, dtype=ctx.delta_dtype)
        delta = ctx.ops.masked_update.default(zeros, mask, gradient, ctx.scale)
    return gradient if for_target else None, None, delta, None


register("masked_update", fake=_fake_masked_update, backward=_masked_update_backward, setup_context=_setup_masked_update)
register("masked_update_", fake=_fake_masked_update_inplace, mutates=True)
