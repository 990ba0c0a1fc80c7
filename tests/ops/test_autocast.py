"""Under autocast the lowrank ops compute as they say: nothing that was promised in float32 is done in 16 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import taskloom

GENERATOR = torch.Generator().manual_seed(0)
X, W = torch.randn(20, 16, generator=GENERATOR), torch.randn(12, 16, generator=GENERATOR)
A, B = torch.randn(3, 4, 16, generator=GENERATOR), torch.randn(3, 12, 4, generator=GENERATOR)
TASK = torch.arange(20) % 4 - 1
ROWS, COLUMNS = taskloom.rmm_fit(torch.randn(3, 12, 4, generator=GENERATOR), 2), taskloom.rmm_fit(A.mT.contiguous(), 2)
FACTORS = torch.randn(2, 16, 3, generator=GENERATOR), torch.randn(2, 12, 3, generator=GENERATOR), torch.tensor([0.5, -0.5])

FLOAT32: dict[str, Callable[[], Tensor]] = {
    "lowrank_merge": lambda: taskloom.lowrank_merge(W, A[0], B[0]),
    "lowrank_norm": lambda: taskloom.lowrank_norm(W, A[0], B[0]),
    "kernel_merge": lambda: taskloom.kernel_merge(*FACTORS, kernel="linear", gate=None),
    "rmm_linear": lambda: taskloom.rmm_linear(X, TASK.clamp(min=0), *ROWS, *COLUMNS),
    "rmm_reconstruct": lambda: taskloom.rmm_reconstruct(*ROWS[:2], ROWS[2][1]),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", FLOAT32)
def test_float32_stays_float32(name: str, backend: str) -> None:
    with taskloom.backend(backend):
        expected = FLOAT32[name]()
        with torch.autocast("cpu", torch.bfloat16):
            found = FLOAT32[name]()
            assert (X @ W.T).dtype == torch.bfloat16
    assert found.equal(expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("task", [None, TASK], ids=["sum", "task"])
@pytest.mark.parametrize("based", [False, True])
def test_inputs_are_cast_as_for_a_linear_layer(backend: str, task: Tensor | None, based: bool) -> None:
    base = (W, torch.ones(12)) if based else (None, None)
    narrow = (W.bfloat16(), torch.ones(12).bfloat16()) if based else (None, None)
    with taskloom.backend(backend):
        expected = taskloom.lowrank_apply(X.bfloat16(), A, B, 0.5, task, *narrow)
        with torch.autocast("cpu", torch.bfloat16):
            for x in (X, X.bfloat16()):
                found = taskloom.lowrank_apply(x, A, B, 0.5, task, *base)
                assert found.dtype == torch.bfloat16
                assert found.equal(expected)
            assert taskloom.lowrank_apply(X.double(), A, B, 0.5, task).dtype == torch.float64
            with pytest.raises(TypeError, match=r"lowrank_apply: base: expected torch.float64 as x, got torch.float32"):
                taskloom.lowrank_apply(X.double(), A, B, 0.5, task, W)


@pytest.mark.parametrize("task", [None, TASK], ids=["sum", "task"])
def test_gradients_in_an_autocast_region(task: Tensor | None) -> None:
    def gradients(autocast: bool, x: Tensor) -> list[Tensor]:
        leaves = [one.clone().requires_grad_() for one in (x, A, B, W)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            applied = taskloom.lowrank_apply(leaves[0], leaves[1], leaves[2], 0.5, task)
            merged = taskloom.lowrank_merge(leaves[3], list(leaves[1]), list(leaves[2]))
            served = taskloom.rmm_linear(leaves[0].float(), TASK.clamp(min=0), *ROWS, *COLUMNS)
            (applied.float().sum() + merged.square().sum() + served.square().sum()).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    for found, expected in zip(gradients(True, X.bfloat16()), gradients(False, X.bfloat16()), strict=True):
        assert found.equal(expected)


def test_compiled() -> None:
    def run(x: Tensor) -> Tensor:
        y = taskloom.lowrank_apply(x, A, B, 0.5, TASK, W)
        with taskloom.backend("reference"):
            return y + taskloom.lowrank_apply(x, A, B, 0.25, None, W)

    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(X), run(X))
