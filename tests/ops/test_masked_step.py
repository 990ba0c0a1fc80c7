"""masked_adamw_ and masked_sgd_ beside torch.optim, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import assert_same_bits
from samples import random_packed, weights
from torch import Tensor

import taskloom

NUMEL = 1003


def _stepped_by_torch(kind: Any, steps: int, **options: Any) -> Tensor:
    param = torch.nn.Parameter(weights(NUMEL))
    optimizer = kind([param], **options)
    for step in range(steps):
        param.grad = weights(NUMEL, seed=1 + step)
        optimizer.step()
    return param.detach()


def _forms() -> list[Tensor | None]:
    packed = random_packed(NUMEL)
    indices = taskloom.unpack_mask(packed, (NUMEL,)).nonzero().squeeze(1)
    return [packed, indices.int(), indices, None]


@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.3}, {"betas": (0.5, 0.7), "eps": 1e-3, "lr": 0.1}])
def test_adamw_is_torch_s_on_active_entries(options: dict[str, Any]) -> None:
    expected = _stepped_by_torch(torch.optim.AdamW, 5, **options)
    for active in _forms():
        param, count = weights(NUMEL), NUMEL if active is None else int(taskloom.unpack_mask(_forms()[0], (NUMEL,)).sum())
        first, second = torch.zeros(count), torch.zeros(count)
        for step in range(5):
            taskloom.masked_adamw_(param, weights(NUMEL, seed=1 + step), first, second, active, step + 1, **options)
        chosen = torch.ones(NUMEL, dtype=torch.bool) if active is None else taskloom.unpack_mask(_forms()[0], (NUMEL,))
        torch.testing.assert_close(param[chosen], expected[chosen], rtol=1e-6, atol=1e-7)
        assert_same_bits(param[~chosen], weights(NUMEL)[~chosen])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "maximize": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
)
def test_sgd_is_torch_s_on_active_entries(options: dict[str, Any]) -> None:
    expected = _stepped_by_torch(torch.optim.SGD, 4, lr=0.1, **options)
    packed = random_packed(NUMEL)
    chosen = taskloom.unpack_mask(packed, (NUMEL,))
    param = weights(NUMEL)
    buffer = torch.full((int(chosen.sum()),), torch.nan) if "momentum" in options else None
    for step in range(4):
        taskloom.masked_sgd_(param, weights(NUMEL, seed=1 + step), buffer, packed, step + 1, lr=0.1, **options)
    torch.testing.assert_close(param[chosen], expected[chosen], rtol=1e-6, atol=1e-6)
    assert_same_bits(param[~chosen], weights(NUMEL)[~chosen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_is_the_reference_bit_for_bit(dtype: torch.dtype) -> None:
    results = []
    for backend in ("native", "reference"):
        param, packed = weights(70001, dtype=dtype), random_packed(70001)
        count = int(taskloom.unpack_mask(packed, (70001,)).sum())
        first, second = torch.zeros(count), torch.zeros(count)
        with taskloom.backend(backend):
            for step in range(3):
                taskloom.masked_adamw_(param, weights(70001, seed=1 + step, dtype=dtype), first, second, packed, step + 1)
        results.append((param, first, second))
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)


def test_a_list_is_stepped_as_its_tensors_are() -> None:
    packed = random_packed(NUMEL)
    count = int(taskloom.unpack_mask(packed, (NUMEL,)).sum())

    def made() -> tuple[list[Tensor], ...]:
        zeros = [torch.zeros(count) for _ in range(3)]
        return [weights(NUMEL, seed=place) for place in range(3)], [weights(NUMEL, seed=9)] * 3, zeros, [one.clone() for one in zeros]

    together, apart = made(), made()
    taskloom.masked_adamw_(*together, [packed] * 3, [1, 2, 3])
    for place, tensors in enumerate(zip(*apart, strict=True)):
        taskloom.masked_adamw_(*tensors, packed, place + 1)
    for one, other in zip(together, apart, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            assert_same_bits(ours, theirs)


def test_a_step_tells_autograd() -> None:
    param, first, second = weights(16), torch.zeros(16), torch.zeros(16)
    versions = [tensor._version for tensor in (param, first, second)]
    taskloom.masked_adamw_(param, weights(16), first, second, None, 1)
    assert [tensor._version for tensor in (param, first, second)] == [version + 1 for version in versions]


def _refused(error: type[Exception], message: str, backend: str = "auto", **changed: Any) -> None:
    good = {"params": weights(20), "grads": weights(20), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3), "step": 1}
    arguments = {**good, "active": torch.tensor([1, 5, 19]), **changed}
    listed = [value for value in arguments.values() if isinstance(value, Tensor)]
    before = [value.clone() for value in listed]
    with taskloom.backend(backend), pytest.raises(error, match=message):
        taskloom.masked_adamw_(**arguments)
    for value, old in zip(listed, before, strict=True):
        assert_same_bits(value, old)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "indices", [torch.tensor([1, 5, 20]), torch.tensor([-1, 5, 6]), torch.tensor([1, 1, 5]), torch.tensor([5, 1, 6], dtype=torch.int32)]
)
def test_wrong_indices_are_refused(backend: str, indices: Tensor) -> None:
    _refused(RuntimeError, "ascending indices without repeats, from 0 to below 20", backend, active=indices)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_state_of_another_size_is_refused(backend: str) -> None:
    _refused(RuntimeError, r"exp_avg_sq\[0\]: expected 3 elements, one for each active entry, got 4", backend, exp_avg_sq=torch.zeros(4))


def test_wrong_arguments_are_refused() -> None:
    _refused(TypeError, r"params\[0\]: expected float32", params=torch.arange(20))
    _refused(TypeError, r"grads\[0\]: expected torch.float32 as params\[0\], got torch.float64", grads=weights(20).double())
    _refused(ValueError, r"grads\[0\]: expected shape \(20,\)", grads=weights(21))
    _refused(TypeError, r"exp_avg\[0\]: expected torch.float32, got torch.bfloat16", exp_avg=torch.zeros(3).bfloat16())
    _refused(TypeError, "pack_mask packs a bool mask", active=torch.ones(20, dtype=torch.bool))
    _refused(ValueError, r"active\[0\]: expected shape \(3,\), one bit", active=torch.zeros(4, dtype=torch.uint8))
    _refused(ValueError, r"step\[0\]: expected 1 for the first step or more, got 0", step=0)
    _refused(ValueError, "lr: expected a number that is not negative", lr=-1.0)
    _refused(ValueError, r"betas\[1\]: expected 0 <= beta < 1, got 1", betas=(0.9, 1.0))
    _refused(ValueError, "repeat elements", params=torch.zeros(1).expand(20))
    _refused(RuntimeError, "requires grad", params=weights(20).requires_grad_())


def test_shared_memory_is_refused() -> None:
    shared = weights(40)
    _refused(RuntimeError, "must not share memory", params=shared[:20], grads=shared[10:30])
    state = torch.zeros(3)
    _refused(RuntimeError, "must not share memory", exp_avg=state, exp_avg_sq=state)


def test_sgd_refuses_what_torch_refuses() -> None:
    param, grad = weights(5), weights(5)
    with pytest.raises(ValueError, match="momentum_buffer: expected one exactly where momentum is not 0"):
        taskloom.masked_sgd_(param, grad, None, None, 1, momentum=0.9)
    with pytest.raises(ValueError, match="nesterov: expected momentum and no dampening"):
        taskloom.masked_sgd_(param, grad, None, None, 1, nesterov=True)
