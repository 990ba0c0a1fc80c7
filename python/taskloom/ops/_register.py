"""Registers what belongs to an op beside its kernels: fake kernel, autograd, and its row in the table of ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from taskloom.ops._backends import Transforms, register_op
from taskloom.ops._triton import define_twin

_library = torch.library.Library("taskloom", "IMPL")
_loops = torch.library.Library("taskloom_loops", "IMPL")


def implement_on_cpu(name: str, function: Callable[..., Any]) -> None:
    """Make a composition of torch's own kernels the native CPU kernel of an op; before :func:`register`."""
    _library.impl(name, function, "CPU")


def implement_for_kernels(name: str, function: Callable[..., Any]) -> None:
    """Make a function the op of no public name that a compiled CPU kernel calls for what it leaves to torch."""
    _loops.impl(name, function, "CPU")


def _refuse_backward(name: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(f"{name} has no gradient; call it under torch.no_grad() or on detached tensors")

    return backward


def _with_ops(setup_context: Callable[..., None] | None, ops: Any) -> Callable[..., None]:
    def setup(ctx: Any, inputs: Any, output: Any, **keyword_only: Any) -> None:
        ctx.ops = ops
        if setup_context is not None:
            setup_context(ctx, inputs, output, **keyword_only)

    return setup


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    discrete: bool = False,
    mutates: bool = False,
) -> None:
    """Register one op of the loaded library.

    Parameters
    ----------
    name
        The op's name in ``torch.ops.taskloom``.
    fake
        Shapes, strides and dtypes of the outputs from those of the inputs; safe for symbolic sizes. The package that defines it tells the
        op's family.
    backward, setup_context
        As :func:`torch.library.register_autograd` takes them. An op without them raises when a gradient flows into it. A backward calls
        ops as ``ctx.ops.NAME.default``: native ones, or their Triton twins where the twin ran forward.
    discrete
        Whether no output is floating point: autograd has nothing to do then, and is left out because it costs microseconds a call.
    mutates
        Whether the op changes an argument; autograd knows nothing of such ops, so their wrappers refuse tensors that require grad.
    """
    family = fake.__module__.split(".")[2]
    for qualified, ops in ((f"taskloom::{name}", torch.ops.taskloom), (define_twin(name, family), torch.ops.taskloom_triton)):
        torch.library.register_fake(qualified, fake)
        if not (discrete or mutates):
            setup = _with_ops(setup_context, ops)
            torch.library.register_autograd(qualified, backward or _refuse_backward(name), setup_context=setup)
    transforms: Transforms = "reference" if discrete or backward is not None else "refuse"
    register_op(name, transforms=transforms, autograd=not (discrete or mutates))
