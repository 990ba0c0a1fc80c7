"""From one task's weights to another's."""

from __future__ import annotations

from torch import Tensor

from taskloom.ops._backends import choose, kernels
from taskloom.ops._checks import check_apart, check_floating, check_packed, check_shape, check_untracked, check_writable, mark_changed
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
    check_floating(op, "target", target)
    for name, tensor in (("base", base), ("delta", delta)):
        check_floating(op, name, tensor)
        check_shape(op, name, tensor, target.shape, "target")
    check_packed(op, "old_packed", old_packed, target.numel())
    check_packed(op, "new_packed", new_packed, target.numel())
    check_writable(op, "target", target)
    check_untracked(op, None, target=target, base=base, delta=delta)
    chosen = choose(op, target, base, delta, old_packed, new_packed)
    check_apart(op, target, base=base, delta=delta, old_packed=old_packed, new_packed=new_packed)
    if chosen == "reference":
        return reference.masked_switch_(target, base, delta, old_packed, new_packed)
    kernels(chosen).masked_switch_.default(target, base, delta, old_packed, new_packed)
    mark_changed(target)
    return target


def _fake_masked_switch(target: Tensor, base: Tensor, delta: Tensor, old_packed: Tensor, new_packed: Tensor) -> None:
    return None


register("masked_switch_", fake=_fake_masked_switch, mutates=True)
