"""From one task's weights to another's."""

from __future__ import annotations

from torch import Tensor, is_grad_enabled

from taskloom.ops._backends import kernel
from taskloom.ops._checks import (
    check_apart,
    check_floating,
    check_floating_like,
    check_packed,
    check_untracked,
    check_writable,
    is_usual,
    mark_changed,
)
from taskloom.ops._register import register
from taskloom.reference import masked as reference


def masked_switch_(target: Tensor, base: Tensor, delta: Tensor, old_packed: Tensor, new_packed: Tensor) -> Tensor:
    """Switch weights from the entries of one mask to those of another, touching only what changes.

    ``target`` holds ``base + delta`` where ``old_packed`` is set and ``base`` elsewhere, as :func:`masked_update` makes it. Entries that
    ``new_packed`` sets anew become ``base + delta``, entries that it no longer sets become ``base``; so switching there and back restores
    every bit.

    Parameters
    ----------
    target
        Weights that change, of any shape and strides; float32, bfloat16, float16 or float64.
    base, delta
        Of target's shape and any of these dtypes.
    old_packed, new_packed
        uint8 of shape ``[ceil(numel / 8)]``, as :func:`pack_mask` gives; bits after the last entry are not looked at.

    Returns
    -------
    Tensor
        ``target``. Sums are computed in float32 (float64 where a tensor is float64) and rounded once to target's dtype; where base has
        target's dtype, its bits are copied.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If the shapes do not fit, or ``target`` shares memory with another argument or repeats elements.
    RuntimeError
        If a tensor requires grad while gradients are recorded.

    Notes
    -----
    Source: this library.
    """
    op = "masked_switch_"
    if not is_usual(target, (base, delta), (old_packed, new_packed)):
        check_floating(op, "target", target)
        check_floating_like(op, "base", base, target, "target")
        check_floating_like(op, "delta", delta, target, "target")
        check_packed(op, "old_packed", old_packed, target.numel())
        check_packed(op, "new_packed", new_packed, target.numel())
    check_writable(op, "target", target)
    if is_grad_enabled() and (target.requires_grad or base.requires_grad or delta.requires_grad):
        check_untracked(op, None, target=target, base=base, delta=delta)
    run = kernel(op, target, base, delta, old_packed, new_packed)
    if run is None or not target.is_cpu:
        check_apart(op, target, base=base, delta=delta, old_packed=old_packed, new_packed=new_packed)
    if run is None:
        return reference.masked_switch_(target, base, delta, old_packed, new_packed)
    try:
        run(target, base, delta, old_packed, new_packed)
    except RuntimeError:
        # The CPU kernel looks at addresses in a fraction of the time; it cannot name the argument.
        check_apart(op, target, base=base, delta=delta, old_packed=old_packed, new_packed=new_packed)
        raise
    mark_changed(target)
    return target


def _fake_masked_switch(target: Tensor, base: Tensor, delta: Tensor, old_packed: Tensor, new_packed: Tensor) -> None:
    return None


register("masked_switch_", fake=_fake_masked_switch, mutates=True)
