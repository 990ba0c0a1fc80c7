"""The entries that a packed mask sets, next to each other, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import FLOATING, check_packed
from taskloom.ops._register import register
from taskloom.reference import masked as reference


def _check_movable(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype.itemsize > 8:
        raise TypeError(f"{op}: {name}: expected elements of at most 8 bytes, got {tensor.dtype}")


def masked_compress(values: Tensor, packed: Tensor) -> Tensor:
    """Take the values at the set entries of a mask, in order: the sparse storage of a tensor beside its mask.

    Parameters
    ----------
    values
        Tensor of any shape and any dtype of at most 8 bytes; it is read in the order of its indices.
    packed
        uint8 of shape ``[ceil(numel / 8)]``, as :func:`pack_mask` gives; bits after the last entry are not looked at.

    Returns
    -------
    Tensor
        One-dimensional, of values' dtype, as many elements as the mask sets. ``torch.compile`` and ``torch.export`` see an unbacked
        size (``torch._dynamo.config.capture_dynamic_output_shape_ops``).

    Raises
    ------
    TypeError
        If ``values`` has larger elements, or ``packed`` is no uint8 tensor.
    ValueError
        If ``packed`` has another number of bytes than the values need.

    Notes
    -----
    Source: this library. Differentiable any number of times with respect to ``values``. :func:`masked_restore` is its inverse.
    """
    op = "masked_compress"
    _check_movable(op, "values", values)
    check_packed(op, "packed", packed, values.numel())
    run = kernel(op, values, packed)
    if run is None:
        return reference.masked_compress(values, packed)
    compressed: Tensor = run(values, packed)
    return compressed


def _check_length(compressed: Tensor, packed: Tensor, numel: int) -> None:
    _, histogram = reference.mask_count([packed], numel, 1)
    expected = int(histogram[1])
    if compressed.shape[0] != expected:
        raise ValueError(
            f"masked_restore: compressed: expected {expected} elements, one for each set entry, got {compressed.shape[0]}"
        ) from None


def masked_restore(compressed: Tensor, packed: Tensor, base: Tensor) -> Tensor:
    """Put values back at the set entries of a mask: the inverse of :func:`masked_compress`.

    Parameters
    ----------
    compressed
        One-dimensional, an element for each entry that the mask sets, in order; of base's dtype, or floating point as base is (it is
        converted to base's dtype then).
    packed
        uint8 of shape ``[ceil(numel / 8)]``, as :func:`pack_mask` gives; bits after the last entry are not looked at.
    base
        Tensor of any shape and any dtype of at most 8 bytes: the values at the other entries.

    Returns
    -------
    Tensor
        A new tensor of base's shape and dtype, contiguous.

    Raises
    ------
    TypeError
        If the dtypes differ and are not both floating point, or ``packed`` is no uint8 tensor.
    ValueError
        If ``compressed`` has other than one dimension or another length than the mask sets entries (in compiled code: RuntimeError; in
        the native CUDA kernel: an assertion on the device, for which nobody waits), or ``packed`` has another number of bytes than base
        needs.

    Notes
    -----
    Source: this library. Differentiable any number of times with respect to ``compressed`` and ``base``.
    """
    op = "masked_restore"
    _check_movable(op, "compressed", compressed)
    _check_movable(op, "base", base)
    check_packed(op, "packed", packed, base.numel())
    if compressed.dim() != 1:
        raise ValueError(f"{op}: compressed: expected one dimension, got shape {tuple(compressed.shape)}")
    if compressed.dtype != base.dtype:
        if compressed.dtype not in FLOATING or base.dtype not in FLOATING:
            raise TypeError(f"{op}: compressed: expected {base.dtype} as base, got {compressed.dtype}")
        compressed = compressed.to(base.dtype)
    run = kernel(op, compressed, packed, base)
    if run is None:
        _check_length(compressed, packed, base.numel())
        return reference.masked_restore(compressed, packed, base)
    try:
        restored: Tensor = run(compressed, packed, base)
    except RuntimeError:
        # The kernel counts the set entries anyway; counting them here first would read the mask twice.
        _check_length(compressed, packed, base.numel())
        raise
    return restored


def _fake_masked_compress(values: Tensor, packed: Tensor) -> Tensor:
    return values.new_empty((torch.library.get_ctx().new_dynamic_size(),))


def _fake_masked_restore(compressed: Tensor, packed: Tensor, base: Tensor) -> Tensor:
    return base.new_empty(base.shape)


def _setup_masked_compress(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    values, packed = inputs
    ctx.save_for_backward(packed)
    ctx.shape = values.shape


def _masked_compress_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (packed,) = ctx.saved_tensors
    return ctx.ops.masked_restore.default(gradient, packed, gradient.new_zeros(ctx.shape)), None


def _setup_masked_restore(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    compressed, packed, _ = inputs
    ctx.save_for_backward(packed)
    ctx.length = compressed.shape[0]


def _masked_restore_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    (packed,) = ctx.saved_tensors
    for_compressed, _, for_base = ctx.needs_input_grad
    compressed = ctx.ops.masked_compress.default(gradient, packed) if for_compressed else None
    base = ctx.ops.masked_restore.default(gradient.new_zeros((ctx.length,)), packed, gradient) if for_base else None
    return compressed, None, base


register("masked_compress", fake=_fake_masked_compress, backward=_masked_compress_backward, setup_context=_setup_masked_compress)
register("masked_restore", fake=_fake_masked_restore, backward=_masked_restore_backward, setup_context=_setup_masked_restore)
