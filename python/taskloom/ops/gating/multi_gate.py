"""Many gates over one pool of experts: each adds up the experts that it may read, by weights of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taskloom.ops._backends import active_transform, kernel
from taskloom.ops._checks import check_dtype, check_floating, check_shape
from taskloom.ops._register import register
from taskloom.reference import gating as reference
from taskloom.reference.arithmetic import accumulation_dtype

ACTIVATIONS = ("softmax", "sigmoid")


def _check_mask(op: str, name: str, mask: Tensor, logits: Tensor) -> None:
    check_dtype(op, name, mask, torch.bool)
    check_shape(op, name, mask, logits.shape[1:], "the gates and experts of logits")


def _check_gates(
    op: str, logits: Tensor, z: Tensor, mask: Tensor | None, activation: str, self_logits: Tensor | None, self_mask: Tensor | None
) -> None:
    check_floating(op, "logits", logits)
    check_floating(op, "z", z)
    if logits.dim() != 3 or z.dim() != 3 or logits.shape[0] != z.shape[0] or logits.shape[2] != z.shape[1]:
        raise ValueError(
            f"{op}: logits, z: expected shapes [B, G, E] and [B, E, D] of one B and one E, got {tuple(logits.shape)} and {tuple(z.shape)}"
        )
    if logits.shape[1] == 0 or logits.shape[2] == 0:
        raise ValueError(f"{op}: logits: expected at least one gate and one expert, got shape {tuple(logits.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation: expected 'softmax' or 'sigmoid', got {activation!r}")
    if mask is not None:
        _check_mask(op, "mask", mask, logits)
    if self_logits is not None and self_mask is not None:
        check_floating(op, "self_logits", self_logits)
        check_shape(op, "self_logits", self_logits, logits.shape, "logits")
        _check_mask(op, "self_mask", self_mask, logits)
    elif self_logits is not None or self_mask is not None:
        given = "self_logits" if self_mask is None else "self_mask"
        raise ValueError(f"{op}: self_logits, self_mask: expected both or none, got only {given}")


def check_masks(op: str, mask: Tensor | None, self_mask: Tensor | None) -> None:
    """What kernels look at themselves, for the reference: every gate has an expert.

    Transforms and compiled code have no values to look at.
    """
    if torch.compiler.is_compiling() or active_transform() is not None:
        return
    for name, given in (("mask", mask), ("self_mask", self_mask)):
        if given is None:
            continue
        empty = torch.nonzero(~given.any(1))
        if len(empty):
            raise ValueError(f"{op}: {name}: expected an expert for every gate, got none for gate {int(empty[0])}")


def _run(op: str, mask: Tensor | None, self_mask: Tensor | None, run: Callable[..., Any], *arguments: Any) -> Any:
    """Run a kernel; where it found a gate without experts, say so in the wrapper's words."""
    try:
        return run(*arguments)
    except RuntimeError:
        if not torch.compiler.is_compiling():
            check_masks(op, mask, self_mask)
        raise


def multi_gate_combine(
    logits: Tensor,
    z: Tensor,
    mask: Tensor | None = None,
    *,
    activation: str = "softmax",
    self_logits: Tensor | None = None,
    self_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add up the experts' outputs by the weights of each of many gates: ``out[b, g] = sum_e probs[b, g, e] * z[b, e]``.

    Parameters
    ----------
    logits
        ``[B, G, E]``: what each gate says of each expert; float32, bfloat16, float16 or float64.
    z
        ``[B, E, D]``: the experts' outputs, of any of these dtypes. They are read once for all gates.
    mask
        ``[G, E]``, bool: which experts a gate may read; default None: all. The others have weight 0 and no gradient from that gate, and an
        expert that no gate may read is not read at all.
    activation
        ``"softmax"`` (default) over a gate's experts, or ``"sigmoid"`` of each of them.
    self_logits, self_mask
        A second gate of each gate, over experts of its own, whose sum is added to ``out``: ``[B, G, E]`` and ``[G, E]``, bool. Its weights
        are a softmax over the row's experts, and the sigmoid where a row has only one. Default None: none.

    Returns
    -------
    out : Tensor
        ``[B, G, D]`` in z's dtype; computed in float32 (float64 where a tensor is float64), experts in order, and rounded once.
    probs : Tensor
        ``[B, G, E]``, the weights, without the second gate's; float32, or float64 where a tensor is float64.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit, the activation is unknown, only one of ``self_logits`` and ``self_mask`` is given, or a gate has no expert (in
        compiled code a RuntimeError; on a GPU nobody waits to say so, and the gate's ``out`` is NaN).

    Notes
    -----
    Source: the multi-gate of HoME, arXiv 2408.05430, with its self gate; with masks it is also the gate of MMoE, CGC and PLE.

    Differentiable once with respect to logits, z and self_logits, by ``out`` and ``probs``; twice with ``taskloom.backend("reference")``.
    Backward computes the weights again and keeps only the inputs. NaN, and in a softmax +inf or a row of -inf alone, make NaN of the row
    of their gate and of nothing else; -inf beside finite logits, and either infinity in a sigmoid, are weights of 0 or 1. Logits of masked
    experts are not looked at. On the CPU the bits depend neither on the number of threads nor on the CPU
    level, and a row's not on the batch that it is in.
    """
    op = "multi_gate_combine"
    _check_gates(op, logits, z, mask, activation, self_logits, self_mask)
    beside = [one for one in (mask, self_logits, self_mask) if one is not None]
    run = kernel(op, logits, z, *beside)
    arguments = (logits, z, mask, activation, self_logits, self_mask)
    if run is None:
        check_masks(op, mask, self_mask)
        return reference.multi_gate_combine(*arguments)
    found: tuple[Tensor, Tensor] = _run(op, mask, self_mask, run, *arguments)
    return found


def multi_gate_combine_backward(
    gradient: Tensor,
    logits: Tensor,
    z: Tensor,
    mask: Tensor | None = None,
    *,
    activation: str = "softmax",
    self_logits: Tensor | None = None,
    self_mask: Tensor | None = None,
    for_probs: Tensor | None = None,
    for_logits: bool = True,
    for_z: bool = True,
    for_self: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`multi_gate_combine`.

    Parameters
    ----------
    gradient
        ``[B, G, D]``, that of ``out``.
    logits, z, mask, activation, self_logits, self_mask
        As in the op.
    for_probs
        ``[B, G, E]``, the gradient of ``probs``; default None: none.
    for_logits, for_z, for_self
        Which gradients are wanted. Default: all.

    Returns
    -------
    dlogits, dz, dself_logits : Tensor
        In the shapes and dtypes of logits, z and self_logits; empty where not wanted or not there. Masked entries are 0, and so is that of
        an expert that no gate may read.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "multi_gate_combine_backward"
    _check_gates(op, logits, z, mask, activation, self_logits, self_mask)
    check_floating(op, "gradient", gradient)
    check_shape(op, "gradient", gradient, (*logits.shape[:2], z.shape[2]), "the op's result")
    if for_probs is not None:
        check_floating(op, "for_probs", for_probs)
        check_shape(op, "for_probs", for_probs, logits.shape, "logits")
    beside = [one for one in (for_probs, mask, self_logits, self_mask) if one is not None]
    run = kernel(op, gradient, logits, z, *beside)
    arguments = (gradient, for_probs, logits, z, mask, activation, self_logits, self_mask, for_logits, for_z, for_self)
    if run is None:
        check_masks(op, mask, self_mask)
        return reference.multi_gate_combine_backward(*arguments)
    found: tuple[Tensor, Tensor, Tensor] = _run(op, mask, self_mask, run, *arguments)
    return found


class GateStatistics(NamedTuple):
    """How gates use their experts.

    Attributes
    ----------
    mean
        ``[G, E]``, the mean of the weights over the batch.
    entropy
        ``[G]``, the mean over the batch of ``-sum_e p_e log p_e``, in nats.
    """

    mean: Tensor
    entropy: Tensor


def gate_statistics(probs: Tensor) -> GateStatistics:
    """The mean weights of each gate and their mean entropy, of the weights that :func:`multi_gate_combine` returned.

    Parameters
    ----------
    probs
        ``[B, G, E]`` with at least one row; floating point.

    Returns
    -------
    GateStatistics
        ``mean`` and ``entropy`` in the dtype of probs; differentiable.

    Raises
    ------
    TypeError
        If probs has another dtype.
    ValueError
        If it has another number of dimensions or no row.

    Notes
    -----
    Source: this library. An entropy near 0 tells that a gate has settled on one expert, one near ``log E`` that it does not choose. Weights
    of 0, as those of masked experts, add nothing to it.
    """
    check_floating("gate_statistics", "probs", probs)
    if probs.dim() != 3 or probs.shape[0] == 0:
        raise ValueError(f"gate_statistics: probs: expected shape [B, G, E] with at least one row, got {tuple(probs.shape)}")
    # A logarithm of 0 has no gradient that one could use; 1 gives 0 as well.
    logs = torch.where(probs > 0, probs, 1).log()
    return GateStatistics(probs.mean(0), -(probs * logs).sum(2).mean(0))


def _fake_combine(
    logits: Tensor, z: Tensor, mask: Tensor | None, activation: str, self_logits: Tensor | None, self_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, gates, _ = logits.shape
    probs = logits.new_empty(logits.shape, dtype=accumulation_dtype(logits, z, self_logits))
    return z.new_empty((batch, gates, z.shape[2])), probs


def _fake_backward(
    gradient: Tensor,
    for_probs: Tensor | None,
    logits: Tensor,
    z: Tensor,
    mask: Tensor | None,
    activation: str,
    self_logits: Tensor | None,
    self_mask: Tensor | None,
    for_logits: bool,
    for_z: bool,
    for_self: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits.new_empty(logits.shape if for_logits else (0,)),
        z.new_empty(z.shape if for_z else (0,)),
        logits.new_empty(0) if self_logits is None or not for_self else self_logits.new_empty(self_logits.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, z, mask, activation, self_logits, self_mask = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, z, mask, self_logits, self_mask)
    ctx.activation = activation


def _backward(ctx: Any, gradient: Tensor | None, for_probs: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, z, mask, self_logits, self_mask = ctx.saved_tensors
    wants_logits, wants_z, _, _, wants_self, _ = ctx.needs_input_grad
    slopes = z.new_zeros((*logits.shape[:2], z.shape[2])) if gradient is None else gradient
    gates = (logits, z, mask, ctx.activation, self_logits, self_mask)
    found = ctx.ops.multi_gate_combine_backward.default(slopes, for_probs, *gates, wants_logits, wants_z, wants_self)
    dlogits, dz, dself = (one if want else None for one, want in zip(found, (wants_logits, wants_z, wants_self), strict=True))
    return dlogits, dz, None, None, dself, None


register("multi_gate_combine", fake=_fake_combine, backward=_backward, setup_context=_setup)
register("multi_gate_combine_backward", fake=_fake_backward)
