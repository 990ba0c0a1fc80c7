"""Contracts of kernel_merge, kernel_quantile, kernel_linear and their backwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from contract import Case, Contract
from samples import weights
from torch import Tensor

import taskloom
from taskloom.ops.lowrank import kernel_linear_backward, kernel_merge_backward
from taskloom.reference.lowrank.kernel_merge import KERNELS, gate_threshold, kernel_values

SCALARS = {"mixk": (0.7, 0.4, 0.1), "sigmoid": (0.9, -0.05, 1.3), "rbf": (1.1, 0.05, 0.3)}


def factors(
    n: int, m: int, chunks: int = 2, width: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and coef of alternating signs."""
    coef = torch.tensor([1.0 - 0.25 * p if p % 2 == 0 else -0.9 for p in range(chunks)])
    return (
        weights(chunks, n, width, seed=seed, dtype=dtype),
        weights(chunks, m, width, seed=seed + 1, dtype=dtype),
        coef.to(torch.float64) if dtype == torch.float64 else coef,
    )


def scalars(kernel: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Alpha, gamma and beta of the kernels that have them."""
    return {
        name: torch.tensor(value, dtype=dtype) for name, value in zip(("alpha", "gamma", "beta"), SCALARS.get(kernel, ()), strict=False)
    }


def statistics(A: Tensor, B: Tensor, coef: Tensor, options: dict[str, Any], dtype: torch.dtype, sparsity: float) -> tuple[Tensor, Tensor]:
    """Threshold and row statistics by plain torch, in float64 and rounded."""
    kernel, gate = options.get("kernel", "mixk"), options.get("gate", "magnitude")
    wide = [options[name].double() if name in options else None for name in ("alpha", "gamma", "beta")]
    values = kernel_values(A.double(), B.double(), coef.double(), kernel, *wide)
    # Between two magnitudes for every gate: at one of them rounding would decide.
    threshold = torch.zeros(()) if gate is None else gate_threshold(values, sparsity, "magnitude")
    if kernel != "mixk":
        return threshold.to(dtype), torch.empty(0, dtype=dtype)
    scaled = kernel_values(A.double(), B.double(), coef.double(), "pwl", None, None, None) / wide[1]
    largest = scaled.amax(1) if scaled.shape[1] else torch.full((len(scaled),), -torch.inf, dtype=torch.float64)
    return threshold.to(dtype), torch.stack((largest, (scaled - largest[:, None]).exp().sum(1))).to(dtype)


def _quantile_cases() -> Iterator[Case]:
    for kernel, sparsity in zip(KERNELS, (0.113, 0.0, 0.613, 1.0, 0.9), strict=True):
        yield Case(f"{kernel} {sparsity}", factors(37, 83), {"kernel": kernel, "sparsity": sparsity, **scalars(kernel)})
    yield Case("soft", factors(37, 83), {"kernel": "pwl", "sparsity": 0.5, "gate": "soft"})
    yield Case("float64", factors(37, 83, dtype=torch.float64), {"sparsity": 0.7, **scalars("mixk", torch.float64)})
    yield Case("bfloat16", factors(65, 31, dtype=torch.bfloat16), {"kernel": "pwl", "sparsity": 0.3})


def kernel_merge_cases() -> Iterator[Case]:
    """The merges, of which the cases of the other ops are made."""
    for kernel, gate in zip(KERNELS, ("magnitude", "hard", "soft", None, "magnitude"), strict=True):
        yield Case(f"{kernel} {gate}", factors(71, 45), {"kernel": kernel, "gate": gate, "sparsity": 0.437, **scalars(kernel)})
    yield Case("mixk soft", factors(71, 45), {"gate": "soft", "sparsity": 0.437, **scalars("mixk")})
    for dtype in (torch.bfloat16, torch.float16):
        base = weights(45, 71, seed=5, dtype=dtype)
        yield Case(f"base {dtype}", factors(71, 45), {"sparsity": 0.313, "base": base, **scalars("mixk")})
        yield Case(f"factors {dtype}", factors(71, 45, dtype=dtype), {"sparsity": 0.313, **scalars("mixk", dtype)})
    yield Case("float64", factors(71, 45, dtype=torch.float64), {"sparsity": 0.313, **scalars("mixk", torch.float64)})
    for n, m in ((1, 70), (70, 1), (0, 3), (3, 0)):
        yield Case(f"{n} by {m}", factors(n, m), {"kernel": "pwl", "sparsity": 0.5, "gate": None})
    yield Case("1 chunk of 1", factors(30, 66, 1, 1), {"kernel": "pwl", "sparsity": 0.637})
    yield Case("tiles", factors(200, 150, 3, 5), {"sparsity": 0.9013, **scalars("mixk")})
    A, B, coef = factors(64, 80)
    strided = (A.transpose(1, 2).contiguous().transpose(1, 2), torch.cat((B, B), 2)[..., ::2], torch.stack((coef, coef), 1)[:, 0])
    yield Case("strided", strided, {"kernel": "pwl", "sparsity": 0.437, "base": weights(64, 80).t()})
    learned = tuple(one.requires_grad_() for one in factors(20, 30))
    yield Case("gradient", learned, {"sparsity": 0.437, **{name: one.requires_grad_() for name, one in scalars("mixk").items()}})


def merge_into(out: Tensor, A: Tensor, B: Tensor, coef: Tensor, **named: Any) -> Tensor:
    return taskloom.kernel_merge(A, B, coef, **named, out=out)


def _merge_into_cases() -> Iterator[Case]:
    chosen = ("mixk magnitude", "rbf None", "base torch.bfloat16", "factors torch.float16", "float64", "0 by 3", "3 by 0", "strided")
    for case in kernel_merge_cases():
        if case.name not in chosen:
            continue
        A, B, _ = case.args
        out = torch.full((B.shape[1], A.shape[1]), torch.nan, dtype=case.kwargs.get("base", A).dtype)
        yield Case(case.name, (out, *case.args), case.kwargs)


def _wide(tensors: Any) -> torch.dtype:
    return torch.float64 if any(isinstance(one, Tensor) and one.dtype == torch.float64 for one in tensors) else torch.float32


def _backward_cases() -> Iterator[Case]:
    for case in kernel_merge_cases():
        if case.name == "gradient" or case.name.startswith("base"):
            continue
        options = {name: value for name, value in case.kwargs.items() if name not in ("base", "sparsity")}
        A, B, coef = case.args
        found = statistics(A, B, coef, options, _wide(case.args), case.kwargs["sparsity"])
        gradient = weights(B.shape[1], A.shape[1], seed=7, dtype=A.dtype)
        yield Case(case.name, (gradient, A, B, coef, *found), options)


def _linear_cases() -> Iterator[Case]:
    chosen = (
        "mixk magnitude",
        "pwl hard",
        "rbf None",
        "base torch.bfloat16",
        "factors torch.float16",
        "float64",
        "0 by 3",
        "3 by 0",
        "gradient",
    )
    for case in kernel_merge_cases():
        if case.name in chosen:
            A, _, _ = case.args
            yield Case(case.name, (weights(6, A.shape[1], seed=3, dtype=A.dtype), *case.args), dict(case.kwargs))
    x, bias = weights(2, 3, 71, seed=3), weights(45, seed=4)
    yield Case("bias", (x, *factors(71, 45)), {"base": weights(45, 71), "bias": bias, "sparsity": 0.437})
    yield Case("one row", (x[0, 0], *factors(71, 45)), {"bias": bias.to(torch.float16), "sparsity": 0.437})
    yield Case("no rows", (x[:0], *factors(71, 45)), {"bias": bias, "sparsity": 0.437})
    yield Case("half inputs", (x.to(torch.bfloat16), *factors(71, 45)), {"base": weights(45, 71), "sparsity": 0.437})


def _linear_backward_cases() -> Iterator[Case]:
    for case in _linear_cases():
        if case.name in ("gradient", "no rows"):
            continue
        x, A, B, coef = case.args
        options = {name: value for name, value in case.kwargs.items() if name not in ("bias", "sparsity")}
        for name, value in scalars(options.get("kernel", "mixk")).items():
            options.setdefault(name, value)
        found = statistics(A, B, coef, options, _wide((*case.args, options.get("base"))), case.kwargs["sparsity"])
        gradient = weights(*x.shape[:-1], B.shape[1], seed=7, dtype=x.dtype)
        yield Case(case.name, (gradient, x, A, B, coef, *found), options)


CONTRACTS = (
    Contract("kernel_quantile", taskloom.kernel_quantile, _quantile_cases),
    Contract("kernel_merge", taskloom.kernel_merge, kernel_merge_cases),
    Contract("kernel_merge_out", merge_into, _merge_into_cases, mutates=(0,)),
    Contract("kernel_merge_backward", kernel_merge_backward, _backward_cases, single=2e-5),
    Contract("kernel_linear", taskloom.kernel_linear, _linear_cases, torch_products=True),
    Contract("kernel_linear_backward", kernel_linear_backward, _linear_backward_cases, single=2e-5, torch_products=True),
)
