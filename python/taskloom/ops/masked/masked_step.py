"""Fused optimiser steps whose state exists for active entries only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from taskloom.ops._backends import kernel
from taskloom.ops._checks import FLOATING, check_floating, check_packed, check_shape, check_writable
from taskloom.ops._register import register
from taskloom.reference import masked as reference
from taskloom.reference.masked.masked_step import active_indices

_INDICES = (torch.int32, torch.int64)

Listed = Tensor | Sequence[Tensor]


def _listed(op: str, name: str, value: Any, count: int) -> list[Any]:
    listed = [value] if value is None or isinstance(value, Tensor) else list(value)
    if len(listed) != count:
        raise ValueError(f"{op}: {name}: expected {count} tensors as params, got {len(listed)}")
    return listed


def _check_active(op: str, place: int, active: Any, param: Tensor) -> Tensor:
    if isinstance(active, Tensor) and active.dtype == torch.uint8 and active.shape == ((param.numel() + 7) // 8,):
        return active
    name = f"active[{place}]"
    if active is None:
        return torch.empty(0, dtype=torch.bool, device=param.device)
    if not isinstance(active, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor or None, got {type(active).__name__}")
    if active.dtype == torch.uint8:
        check_packed(op, name, active, param.numel())
    elif active.dtype not in _INDICES:
        hint = " (pack_mask packs a bool mask)" if active.dtype == torch.bool else ""
        raise TypeError(f"{op}: {name}: expected packed uint8, int32 or int64 indices, got {active.dtype}{hint}")
    elif active.dim() != 1:
        raise ValueError(f"{op}: {name}: expected indices of one dimension, got shape {tuple(active.shape)}")
    return active


def _check_params(op: str, params: list[Tensor], grads: list[Tensor]) -> None:
    recorded = torch.is_grad_enabled()
    for place, (param, grad) in enumerate(zip(params, grads, strict=True)):
        # A model has hundreds of parameters: names are made only for an error.
        if not (isinstance(param, Tensor) and param.dtype in FLOATING and not is_compiling() and param.is_contiguous()):
            check_floating(op, f"params[{place}]", param)
            check_writable(op, f"params[{place}]", param)
        if recorded and param.requires_grad:
            raise RuntimeError(f"{op}: params[{place}] requires grad and the op is in place; use torch.no_grad()")
        if isinstance(grad, Tensor) and grad.dtype == param.dtype and grad.shape == param.shape and grad.layout == torch.strided:
            continue
        check_floating(op, f"grads[{place}]", grad)
        if grad.layout != torch.strided:
            raise TypeError(f"{op}: grads[{place}]: expected a dense tensor, got layout {grad.layout}")
        check_shape(op, f"grads[{place}]", grad, param.shape, f"params[{place}]")
        raise TypeError(f"{op}: grads[{place}]: expected {param.dtype} as params[{place}], got {grad.dtype}")


def _check_state(op: str, name: str, state: list[Tensor], params: list[Tensor]) -> None:
    for place, (one, param) in enumerate(zip(state, params, strict=True)):
        wanted = torch.float64 if param.dtype == torch.float64 else torch.float32
        if not isinstance(one, Tensor) or one.dtype != wanted:
            got = one.dtype if isinstance(one, Tensor) else type(one).__name__
            raise TypeError(f"{op}: {name}[{place}]: expected {wanted}, got {got}")
        if one.dim() != 1 or not one.is_contiguous():
            raise ValueError(
                f"{op}: {name}[{place}]: expected a contiguous tensor of one dimension, got shape {tuple(one.shape)}, "
                f"strides {one.stride()}"
            )


def _check_numbers(op: str, step: list[float], **numbers: float) -> None:
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{op}: {name}: expected a number that is not negative, got {number}")
    for place, count in enumerate(step):
        if not count >= 1:
            raise ValueError(f"{op}: step[{place}]: expected 1 for the first step or more, got {count}")


def _check_sizes(op: str, params: list[Tensor], active: list[Tensor], state: dict[str, list[Tensor]]) -> None:
    """What the kernel checks of values, for the reference."""
    for place, (param, entries) in enumerate(zip(params, active, strict=True)):
        indices = active_indices(entries, param.numel())
        inside = indices.numel() == 0 or bool((indices[0] >= 0) & (indices[-1] < param.numel()) & (indices[1:] > indices[:-1]).all())
        if not inside:
            raise RuntimeError(f"active[{place}]: expected ascending indices without repeats, from 0 to below {param.numel()}")
        for name, tensors in state.items():
            if tensors[place].numel() != indices.numel():
                raise RuntimeError(
                    f"{name}[{place}]: expected {indices.numel()} elements, one for each active entry, got {tensors[place].numel()}"
                )


def _mark_changed(tensors: list[Tensor]) -> None:
    if is_compiling():
        return
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def _steps(op: str, step: float | Sequence[float], count: int) -> list[float]:
    steps = [float(one) for one in step] if isinstance(step, Sequence) else [float(step)] * count
    if len(steps) != count:
        raise ValueError(f"{op}: step: expected {count} numbers as params, got {len(steps)}")
    return steps


def _run(
    op: str,
    params: Listed,
    grads: Listed,
    active: Any,
    state: dict[str, Listed],
    defined: Callable[..., None],
    step: float | Sequence[float],
    **numbers: Any,
) -> None:
    listed = [params] if isinstance(params, Tensor) else list(params)
    count = len(listed)
    gradients = _listed(op, "grads", grads, count)
    _check_params(op, listed, gradients)
    entries = [_check_active(op, place, one, listed[place]) for place, one in enumerate(_listed(op, "active", active, count))]
    states = {name: _listed(op, name, one, count) for name, one in state.items()}
    for name, one in states.items():
        _check_state(op, name, one, listed)
    steps = _steps(op, step, count)
    _check_numbers(op, steps, lr=numbers["lr"], weight_decay=numbers["weight_decay"])
    if count == 0:
        return
    changed = [*listed, *(tensor for one in states.values() for tensor in one)]
    if listed[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op} cannot be captured in a CUDA graph: a replay would repeat the lr and step of the capture")
    call = kernel(op, *changed, *gradients, *entries)
    if call is None:
        _check_sizes(op, listed, entries, states)
    given = {"momentum_buffer": []} if op == "masked_sgd_" and not states else states
    (call or defined)(listed, gradients, *given.values(), entries, steps, *numbers.values())
    if call is not None:
        _mark_changed(changed)


def masked_adamw_(
    params: Listed,
    grads: Listed,
    exp_avg: Listed,
    exp_avg_sq: Listed,
    active: Tensor | Sequence[Tensor | None] | None,
    step: float | Sequence[float],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> None:
    """Make one AdamW step of the active entries of parameters, in place, in one pass.

    Parameters
    ----------
    params
        A tensor, or a sequence of tensors that are stepped in one call; any shapes and strides, float32, bfloat16, float16 or float64.
        Entries that are not active keep their bits: neither the gradient nor weight decay touches them.
    grads
        One per parameter, of its shape and dtype.
    exp_avg, exp_avg_sq
        Moments, one contiguous vector per parameter with one element for each active entry, in order of their flat indices; float32, or
        float64 where the parameter is. Zero before the first step.
    active
        Per parameter: packed uint8 of shape ``[ceil(numel / 8)]`` (:func:`pack_mask`), ascending flat indices (int32 or int64), or None
        for all entries.
    step
        Number of this step, from 1; one for all parameters, or one per parameter.
    lr, betas, eps, weight_decay, maximize
        As in :class:`torch.optim.AdamW`.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes or the lengths of lists do not fit, a number is out of range, or a parameter repeats elements.
    RuntimeError
        If a state has not one element for each active entry, indices do not ascend or leave the parameter, a parameter or a state shares
        memory with another argument, or a parameter requires grad while gradients are recorded. Nothing has changed then.

    Notes
    -----
    Loshchilov and Hutter, arXiv 1711.05101; the state of active entries alone is this library's. Arithmetic is float32 (float64 where the
    parameter is float64), each operation rounded, the parameter rounded once to its dtype; bias corrections are computed in double.
    """
    op = "masked_adamw_"
    beta1, beta2 = betas
    for name, number in (("betas[0]", beta1), ("betas[1]", beta2)):
        if not 0 <= number < 1:
            raise ValueError(f"{op}: {name}: expected 0 <= beta < 1, got {number}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps: expected a number that is not negative, got {eps}")
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    numbers = {"lr": float(lr), "beta1": float(beta1), "beta2": float(beta2), "eps": float(eps), "weight_decay": float(weight_decay)}
    _run(op, params, grads, active, state, reference.masked_adamw_, step, **numbers, maximize=maximize)


def masked_sgd_(
    params: Listed,
    grads: Listed,
    momentum_buffer: Listed | None,
    active: Tensor | Sequence[Tensor | None] | None,
    step: float | Sequence[float],
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    """Make one SGD step of the active entries of parameters, in place, in one pass.

    Parameters
    ----------
    params, grads, active, step
        As in :func:`masked_adamw_`.
    momentum_buffer
        One vector per parameter, as ``exp_avg`` of :func:`masked_adamw_`; in step 1 it becomes the gradient (with weight decay), whatever
        it held. None exactly where ``momentum`` is 0.
    lr, momentum, dampening, weight_decay, nesterov, maximize
        As in :class:`torch.optim.SGD`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`masked_adamw_`; ValueError also for Nesterov momentum without momentum or with dampening.

    Notes
    -----
    The rule of :class:`torch.optim.SGD`; arithmetic as in :func:`masked_adamw_`.
    """
    op = "masked_sgd_"
    if not momentum >= 0:
        raise ValueError(f"{op}: momentum: expected a number that is not negative, got {momentum}")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(f"{op}: nesterov: expected momentum and no dampening with it, got momentum {momentum}, dampening {dampening}")
    if (momentum_buffer is None) != (momentum == 0):
        raise ValueError(f"{op}: momentum_buffer: expected one exactly where momentum is not 0, got momentum {momentum}")
    state = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    numbers = {"lr": float(lr), "momentum": float(momentum), "dampening": float(dampening), "weight_decay": float(weight_decay)}
    _run(op, params, grads, active, state, reference.masked_sgd_, step, **numbers, nesterov=nesterov, maximize=maximize)


def _fake_step(*args: Any) -> None:
    return None


register("masked_adamw_", fake=_fake_step, mutates=True)
register("masked_sgd_", fake=_fake_step, mutates=True)
