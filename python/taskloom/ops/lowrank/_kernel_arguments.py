"""Checks and defaults of the arguments that the ops of kernel_merge share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taskloom.ops._backends import active_transform
from taskloom.ops._checks import check_apart, check_dtype, check_floating, is_same_memory
from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.lowrank.kernel_merge import GATES, KERNELS

# alpha, gamma and beta where none are given: a kernel that is neither scaled nor moved.
_NEUTRAL = {"mixk": (1.0, 1.0, 0.0), "sigmoid": (1.0, 0.0, 1.0), "rbf": (1.0, 0.0, 1.0)}


@dataclass(frozen=True)
class KernelArguments:
    """Checked arguments; the scalars are tensors of one value where the kernel has them, else None."""

    A: Tensor
    B: Tensor
    coef: Tensor
    alpha: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    kernel: str
    sparsity: float
    gate: str | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The tensors in the order of the schemas."""
        return self.A, self.B, self.coef, self.alpha, self.gamma, self.beta

    @property
    def given(self) -> tuple[Tensor, ...]:
        """The tensors that are there."""
        return tuple(one for one in self.tensors if one is not None)

    @property
    def gate_name(self) -> str:
        """The gate as the schemas have it."""
        return self.gate or "none"


def _check_factors(op: str, A: Tensor, B: Tensor, coef: Tensor) -> None:
    for name, tensor in (("A", A), ("B", B), ("coef", coef)):
        check_floating(op, name, tensor)
    for name, tensor, rows in (("A", A, "n"), ("B", B, "m")):
        if tensor.dim() != 3:
            raise ValueError(f"{op}: {name}: expected shape (chunks, {rows}, width), got {tuple(tensor.shape)}")
    if A.shape[0] == 0 or A.shape[2] == 0:
        raise ValueError(f"{op}: A: expected at least one chunk of at least one column, got shape {tuple(A.shape)}")
    if A.shape[0] != B.shape[0] or A.shape[2] != B.shape[2]:
        raise ValueError(f"{op}: B: expected {A.shape[0]} chunks of width {A.shape[2]} as A, got shape {tuple(B.shape)}")
    if coef.shape != (A.shape[0],):
        raise ValueError(f"{op}: coef: expected shape ({A.shape[0]},), one value for each chunk, got {tuple(coef.shape)}")


def _check_scalar(op: str, name: str, value: float | Tensor | None, neutral: float, like: Tensor, dtype: torch.dtype) -> Tensor:
    if value is None:
        return like.new_full((), neutral)
    if isinstance(value, Tensor):
        check_floating(op, name, value)
        if value.numel() != 1:
            raise ValueError(f"{op}: {name}: expected one value, got shape {tuple(value.shape)}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name}: expected a number or a tensor of one value, got {type(value).__name__}")
    return like.new_full((), float(value), dtype=dtype)


def _check_gamma(op: str, gamma: float | Tensor | None, dtype: torch.dtype) -> None:
    # The value of a tensor on a GPU would have to be waited for; there a gamma of 0 gives NaN.
    if torch.compiler.is_compiling() or gamma is None or active_transform() is not None:
        return
    if isinstance(gamma, Tensor):
        zero = gamma.device.type == "cpu" and type(gamma) in (Tensor, torch.nn.Parameter) and not gamma.detach().all()
    else:
        # Half of the smallest float32 is rounded to 0.
        zero = gamma == 0 or (dtype == torch.float32 and isinstance(gamma, (int, float)) and abs(gamma) <= 2.0**-150)
    if zero:
        raise ValueError(f"{op}: gamma: expected a value other than 0, by which mixk divides")


def check_sparsity(op: str, sparsity: float) -> float:
    """The sparsity as a float; raise unless it is in [0, 1]."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"{op}: sparsity: expected a number, got {type(sparsity).__name__}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"{op}: sparsity: expected a share from 0 to 1, got {sparsity}")
    return float(sparsity)


def check_kernel(op: str, kernel: str) -> None:
    """Raise ValueError unless there is a kernel of that name."""
    if kernel not in KERNELS:
        raise ValueError(f"{op}: kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")


def check_gate(op: str, gate: str | None) -> None:
    """Raise ValueError unless there is a gate of that name, or none is asked for."""
    if gate is not None and gate not in GATES:
        raise ValueError(f"{op}: gate: expected one of {', '.join(GATES)} or None, got {gate!r}")


def kernel_arguments(
    op: str,
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    kernel: str,
    alpha: float | Tensor | None,
    gamma: float | Tensor | None,
    beta: float | Tensor | None,
    sparsity: float,
    gate: str | None,
    *beside: Tensor | None,
) -> KernelArguments:
    """The arguments checked, with scalars as tensors; numbers in the dtype of the arithmetic, which ``beside`` has a say in too."""
    check_kernel(op, kernel)
    check_gate(op, gate)
    _check_factors(op, A, B, coef)
    share = check_sparsity(op, sparsity)
    scalars = {"alpha": alpha, "gamma": gamma, "beta": beta}
    if kernel not in _NEUTRAL:
        for name, value in scalars.items():
            if value is not None:
                raise ValueError(f"{op}: {name}: the kernel {kernel} has no {name}, expected None")
        return KernelArguments(A, B, coef, None, None, None, kernel, share, gate)
    like, neutral = coef.detach(), _NEUTRAL[kernel]
    given = (one for one in (A, B, *scalars.values(), *beside) if isinstance(one, Tensor))
    dtype = accumulation_dtype(coef, *given)
    if kernel == "mixk":
        _check_gamma(op, gamma, dtype)
    checked = [_check_scalar(op, name, value, start, like, dtype) for (name, value), start in zip(scalars.items(), neutral, strict=True)]
    return KernelArguments(A, B, coef, checked[0], checked[1], checked[2], kernel, share, gate)


def check_base(op: str, base: Tensor | None, m: int, n: int) -> None:
    """Raise unless base is None or a floating [m, n] matrix."""
    if base is None:
        return
    check_floating(op, "base", base)
    if base.shape != (m, n):
        raise ValueError(f"{op}: base: expected shape ({m}, {n}), (rows of B, rows of A), got {tuple(base.shape)}")


def check_out(op: str, out: Tensor, given: KernelArguments, base: Tensor | None) -> None:
    """Raise unless ``out`` is a matrix that the merge can be written to: base itself, or apart from everything that is read."""
    check_dtype(op, "out", out, given.A.dtype if base is None else base.dtype)
    shape = (given.B.shape[1], given.A.shape[1])
    if out.shape != shape:
        raise ValueError(f"{op}: out: expected shape {shape}, (rows of B, rows of A), got {tuple(out.shape)}")
    if not out.is_contiguous():
        raise ValueError(f"{op}: out: expected a contiguous tensor, got strides {out.stride()}")
    named = dict(zip(("A", "B", "coef", "alpha", "gamma", "beta"), given.tensors, strict=True)) | {"base": base}
    others = {name: one for name, one in named.items() if one is not None}
    if torch.is_grad_enabled() and any(one.requires_grad for one in (out, *others.values())):
        raise RuntimeError(f"{op}: out: writing into a tensor has no gradient; call it under torch.no_grad() or on detached tensors")
    if base is not None and is_same_memory(out, base):
        del others["base"]
    check_apart(op, out, called="out", **others)
