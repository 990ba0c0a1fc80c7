"""Chooses which implementation of an op runs: native, Triton or the reference; and says why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from taskloom.ops._compile import constant_under_compile
from taskloom.ops._library import CUDA, cuda_obstacle, native_devices
from taskloom.ops._triton import triton_obstacle

Backend = Literal["native", "triton", "reference"]
Transforms = Literal["reference", "refuse"]
# What runs an op where autograd has nothing to do, and where it has; None for the reference.
Calls = tuple[Callable[..., Any] | None, Callable[..., Any] | None]

BACKENDS = ("auto", "native", "triton", "reference")
_ORDER: tuple[Backend, ...] = ("native", "triton", "reference")

_innermost_transform = torch._C._functorch.peek_interpreter_stack


@dataclass(frozen=True)
class Op:
    """What the choice of a backend depends on for one op: its kernels' devices, and what it does under a torch.func transform.

    ``transforms`` is ``reference`` where the reference is differentiable and serves under forward AD and torch.func transforms, and
    ``refuse`` where a derivative would mean nothing. ``autograd`` tells whether autograd has something to do at its calls. ``calls`` keeps
    what was chosen, by device and by what was asked for.
    """

    name: str
    native: frozenset[str]
    transforms: Transforms
    autograd: bool = False
    calls: dict[Any, Calls] = field(default_factory=dict, compare=False, repr=False)


def direct_call(overload: Any) -> Callable[..., Any]:
    """What an overload calls in the end: its own ``__call__`` does nothing else."""
    call: Callable[..., Any] = getattr(overload, "_op", overload)
    return call


def _below_autograd(call: Callable[..., Any]) -> Callable[..., Any]:
    guard = torch._C._AutoDispatchBelowAutograd

    def below(*arguments: Any, **named: Any) -> Any:
        with guard():
            return call(*arguments, **named)

    return below


OPS: dict[str, Op] = {}
# What the native CPU kernel of an op would do with given arguments, in a sentence; for ops that have more than one way.
_PATHS: dict[str, Callable[..., str]] = {}
# Compositions of ops, by name, and the op whose backends they have.
_COMPOSED: dict[str, str] = {}


def register_op(name: str, *, transforms: Transforms, autograd: bool) -> None:
    """Make an op of the loaded libraries known to :func:`choose`."""
    OPS[name] = Op(name, native_devices(name), transforms, autograd)


def describe_path(name: str, path: Callable[..., str], composed_with: str | None = None) -> None:
    """Let :func:`explain` say which of an op's ways on the CPU its arguments take; ``path`` takes those of its public wrapper.

    What is no op of its own, but a composition, names the op ``composed_with`` whose backends it has.
    """
    _PATHS[name] = path
    if composed_with is not None:
        _COMPOSED[name] = composed_with


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


class _Requested:
    # A plain attribute, because torch.compile guards on it and so compiles anew when the backend changes.
    name = _checked(os.environ.get("TASKLOOM_BACKEND") or "auto", "TASKLOOM_BACKEND")


_requested = _Requested()


def requested_backend() -> str:
    """The backend that was asked for, by a block or by TASKLOOM_BACKEND."""
    return _requested.name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run ops on one backend inside the block, for the whole process.

    Parameters
    ----------
    name
        ``"auto"``: native where a kernel for the device was built, then Triton on GPUs, then the reference. ``"native"``,
        ``"triton"``, ``"reference"``: that one or an error. The variable TASKLOOM_BACKEND sets what holds outside of any block
        (default ``"auto"``).

    Raises
    ------
    ValueError
        If there is no backend of that name.
    """
    before = _requested.name
    _requested.name = _checked(name, "backend")
    try:
        yield
    finally:
        _requested.name = before


@constant_under_compile
def active_transform() -> str | None:
    """The innermost torch.func transform or forward AD that is active, by the name that users know; None outside of any."""
    interpreter: Any = _innermost_transform()
    if interpreter is not None:
        return f"torch.func's {interpreter.key().name.lower()} transform"
    return "forward-mode AD" if forward_ad._current_level >= 0 else None


def _device(name: str, tensors: tuple[Tensor, ...]) -> torch.device:
    device = tensors[0].device
    for other in tensors[1:]:
        if other.device != device:
            raise ValueError(f"{name}: all tensors must be on one device, got {device} and {other.device}")
    return device


def _obstacle(op: Op, candidate: Backend, device: torch.device) -> str | None:
    """Why a backend cannot serve an op on a device; None where it can."""
    if candidate == "reference":
        return None
    if candidate == "triton":
        return triton_obstacle(str(device))
    kind = device.type
    if kind in op.native or kind == "meta":
        return cuda_obstacle(str(device)) if kind == "cuda" else None
    if kind == "cuda" and not CUDA.loaded:
        return f"the CUDA library is not loaded: {CUDA.reason}"
    return f"no native kernel for {kind} tensors"


def kernels(chosen: Backend) -> Any:
    """The ops that run a chosen backend's kernels: ``torch.ops.taskloom``, or the Triton twins."""
    return torch.ops.taskloom_triton if chosen == "triton" else torch.ops.taskloom


def choose(name: str, *tensors: Tensor) -> Backend:
    """The backend that serves op ``name`` for ``tensors``, by what was asked for.

    Raises
    ------
    RuntimeError
        If the backend that was forced cannot serve, or a transform is active that the op does not support.
    ValueError
        If the tensors are on different devices.
    """
    op = OPS[name]
    device = _device(name, tensors)
    requested = _requested.name
    transform = active_transform()
    if transform is not None and requested != "reference":
        if op.transforms == "refuse":
            raise RuntimeError(f"{name} does not work under {transform}: its result has no derivative and no batching rule")
        if requested != "auto":
            raise RuntimeError(f"{name}: backend {requested!r} cannot serve under {transform}; the reference can")
        return "reference"
    if requested == "auto":
        return next(candidate for candidate in _ORDER if _obstacle(op, candidate, device) is None)
    forced = next(candidate for candidate in _ORDER if candidate == requested)
    obstacle = _obstacle(op, forced, device)
    if obstacle is not None:
        raise RuntimeError(f"{name}: backend {requested!r} was asked for, but {obstacle}")
    return forced


def _resolved(op: Op, key: Any, tensors: tuple[Tensor, ...]) -> Calls:
    chosen = choose(op.name, *tensors)
    if chosen == "reference":
        calls: Calls = (None, None)
    else:
        call = direct_call(getattr(kernels(chosen), op.name).default)
        calls = (_below_autograd(call) if op.autograd else call, call)
    op.calls[key] = calls
    return calls


def kernel(name: str, *tensors: Tensor) -> Callable[..., Any] | None:
    """What to call for op ``name`` and ``tensors``, by what was asked for; None where the reference serves.

    The choice is :func:`choose`'s, and its errors; it is kept, because a call of a small op takes a microsecond or two.
    """
    # torch.compile wants an op that it can trace, and a transform may change from call to call.
    if not is_compiling() and forward_ad._current_level < 0 and _innermost_transform() is None:
        op = OPS[name]
        key: Any = _requested.name
        for tensor in tensors:
            if not tensor.is_cpu:
                key = key, _device(name, tensors)
                break
        calls = op.calls.get(key) or _resolved(op, key, tensors)
        return calls[op.autograd and is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)]
    chosen = choose(name, *tensors)
    found: Callable[..., Any] | None = None if chosen == "reference" else getattr(kernels(chosen), name).default
    return found


@dataclass(frozen=True)
class Explanation:
    """Which backend an op would take: the chosen one (None: it would raise), and per backend why it cannot serve (None: it can).

    ``path`` says in a sentence which way the op would go there, where it has more than one and its arguments were given.
    """

    op: str
    requested: str
    device: str
    chosen: Backend | None
    obstacles: dict[Backend, str | None]
    path: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device} (backend {self.requested!r}): {self.chosen or 'none, it raises'}"]
        lines += [f"  {name:<10}{obstacle or 'can serve'}" for name, obstacle in self.obstacles.items()]
        if self.path is not None:
            lines.append(f"  path: {self.path}")
        return "\n".join(lines)


def explain(op: str, *tensors: Tensor | None, device: str | None = None, **arguments: Any) -> Explanation:
    """Say which backend an op would take, and why not the others.

    Parameters
    ----------
    op
        Name of an op, such as ``"pack_mask"``, or of a composition of ops that has more than one way, such as ``"window_norm_linear"``.
    *tensors
        Its tensors, None for one that is left out; they give the device.
    device
        The device (``"cpu"``, ``"cuda"``, ``"cuda:1"``) where there are no tensors at hand; default ``"cpu"``.
    **arguments
        The op's other arguments by name, as ``start=`` and ``width=`` of ``"window_linear"``: where its kernel on the CPU has more than one
        way, :attr:`Explanation.path` says which one these would take.

    Raises
    ------
    ValueError
        If there is no op of that name, or the tensors are on different devices.
    TypeError
        If arguments were given, and the op has one way only.
    """
    kernels_of = OPS.get(_COMPOSED.get(op, op))
    if kernels_of is None:
        from difflib import get_close_matches

        names = sorted([*OPS, *_COMPOSED])
        close = get_close_matches(op, names, n=1)
        raise ValueError(f"op: {op!r} is unknown, the ops are {', '.join(names)}" + (f"; did you mean {close[0]!r}?" if close else ""))
    present = tuple(tensor for tensor in tensors if tensor is not None)
    where = _device(op, present) if present else torch.device(device or "cpu")
    obstacles = {candidate: _obstacle(kernels_of, candidate, where) for candidate in _ORDER}
    requested = _requested.name
    able = [candidate for candidate in _ORDER if obstacles[candidate] is None and requested in ("auto", candidate)]
    chosen = able[0] if able else None
    if arguments and op not in _PATHS:
        raise TypeError(f"{op} has one way only on each backend, so that {', '.join(arguments)} would change nothing")
    path = _PATHS[op](*tensors, **arguments) if arguments and chosen == "native" and where.type == "cpu" else None
    return Explanation(op, requested, where.type, chosen, obstacles, path)
