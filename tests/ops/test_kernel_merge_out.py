"""What is particular to kernel_merge's out=: where it may lie, what it refuses, and that a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases_kernel_merge import factors, scalars
from contract import assert_same_bits
from samples import weights
from torch import Tensor

import taskloom

N, M = 301, 403
backends = pytest.mark.parametrize("backend", ["native", "reference"])


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("kernel", "gate"), [("mixk", "magnitude"), ("mixk", None), ("pwl", "soft"), ("rbf", "hard"), ("linear", None)])
@pytest.mark.usefixtures("poisoned_memory")
def test_over_base_and_beside_it(backend: str, dtype: torch.dtype, kernel: str, gate: str | None) -> None:
    n, m = (N, M) if backend == "native" else (31, 43)
    A, B, coef = factors(n, m)
    base = weights(m, n, seed=5, dtype=dtype)
    named: dict[str, Any] = {"kernel": kernel, "gate": gate, "sparsity": 0.437, **scalars(kernel)}
    with taskloom.backend(backend):
        expected = taskloom.kernel_merge(A, B, coef, base=base, **named)
        beside = torch.full_like(base, torch.nan)
        assert taskloom.kernel_merge(A, B, coef, base=base, out=beside, **named) is beside
        # The same memory under another name.
        held = base.clone()
        assert taskloom.kernel_merge(A, B, coef, base=held.view(m, n), out=held, **named) is held
    assert_same_bits(beside, expected)
    assert_same_bits(held, expected)


@backends
def test_autograd_sees_the_change(backend: str) -> None:
    A, B, coef = factors(6, 5)
    weight = weights(5, 6)
    x = weights(3, 6).requires_grad_()
    y = x @ weight.T
    with taskloom.backend(backend), torch.no_grad():
        taskloom.kernel_merge(A, B, coef, base=weight, out=weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def bad_outs() -> dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[Exception], str]]:
    """By name: what makes of the arguments those that are refused, the error, and what it says."""
    value, runtime = ValueError, RuntimeError

    def tracked(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"A": given["A"].requires_grad_()}

    return {
        "list": (lambda given: {"out": [1.0]}, TypeError, "out: expected a tensor, got list"),
        "dtype": (lambda given: {"out": given["out"].half()}, TypeError, "out: expected torch.float32, got torch.float16"),
        "shape": (lambda given: {"out": given["out"].t()}, value, r"out: expected shape \(5, 6\), \(rows of B, rows of A\), got \(6, 5\)"),
        "strides": (lambda given: {"out": weights(6, 5).t()}, value, r"out: expected a contiguous tensor, got strides \(1, 5\)"),
        "repeated": (lambda given: {"out": weights(6).expand(5, 6)}, value, r"out: expected a contiguous tensor, got strides \(0, 1\)"),
        "out tracked": (lambda given: {"out": given["out"].requires_grad_()}, runtime, "out: writing into a tensor has no gradient"),
        "A tracked": (tracked, runtime, "out: writing into a tensor has no gradient"),
        "base beside": (
            lambda given: {"base": given["held"][1:6], "out": given["held"][:5]},
            value,
            "out: must not share memory with base",
        ),
        "a factor": (lambda given: {"out": given["B"].view(-1)[:30].view(5, 6)}, value, "out: must not share memory with B"),
        "device": (lambda given: {"out": given["out"].to("meta")}, value, "all tensors must be on one device, got cpu and meta"),
        "sparsity": (lambda given: {"sparsity": 2}, value, "sparsity: expected a share from 0 to 1, got 2"),
    }


@pytest.mark.parametrize(("change", "error", "message"), bad_outs().values(), ids=bad_outs())
def test_a_refused_out_is_as_it_was(change: Callable[[dict[str, Tensor]], Any], error: type[Exception], message: str) -> None:
    A, B, coef = factors(6, 5)
    given = {"A": A, "B": B, "coef": coef, "base": weights(5, 6), "out": weights(5, 6, seed=3), "held": weights(6, 6, seed=4)}
    arguments: dict[str, Any] = given | change(given)
    held = arguments.pop("held")
    tensors = [one for one in (*arguments.values(), held) if isinstance(one, Tensor) and not one.is_meta]
    before = [one.detach().clone() for one in tensors]
    with pytest.raises(error, match=message):
        taskloom.kernel_merge(**arguments)
    for now, then in zip(tensors, before, strict=True):
        assert_same_bits(now.detach(), then)


def test_tracked_tensors_are_taken_where_nothing_is_recorded() -> None:
    A, B, coef = (one.requires_grad_() for one in factors(6, 5))
    out = weights(5, 6).requires_grad_()
    with torch.no_grad():
        expected = taskloom.kernel_merge(A, B, coef, sparsity=0.3, base=out)
        assert_same_bits(taskloom.kernel_merge(A, B, coef, sparsity=0.3, base=out, out=out), expected)
