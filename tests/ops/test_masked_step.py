"""masked_adamw_ and masked_sgd_ beside torch.optim, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import assert_close, assert_same_bits
from samples import random_packed, weights
from torch import Tensor

import taskloom
from taskloom import _native
from taskloom.ops import _library

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


def _clustered(numel: int) -> Tensor:
    """Whole stretches that are active or not, and sparse and dense ones between them."""
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(5)) < torch.linspace(0, 0.2, numel)
    mask[numel // 3 : numel // 2] = True
    mask[numel // 2 : numel // 2 + 3000] = False
    return taskloom.pack_mask(mask)


@pytest.mark.parametrize("level", [level for level in _native.build_info()["levels"] if level <= _native.detected_cpu_level()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.usefixtures("restored_level")
def test_every_density_is_stepped_alike_on_every_level(dtype: torch.dtype, level: str) -> None:
    numel = 9007
    masks = [random_packed(numel, density=density) for density in (0.0, 0.004, 0.0125, 0.1, 0.5, 0.98, 1.0)] + [_clustered(numel)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    _library.force_cpu_level(level)
    results = []
    for backend in ("native", "reference"):
        params = [weights(numel, seed=place, dtype=dtype) for place in range(len(masks))]
        grads = [weights(numel, seed=20 + place, dtype=dtype) for place in range(len(masks))]
        counts = [int(taskloom.unpack_mask(mask, (numel,)).sum()) for mask in masks]
        states = [[weights(count, seed=seed, dtype=wide).abs() for count in counts] for seed in (40, 41)]
        with taskloom.backend(backend):
            taskloom.masked_adamw_(params, grads, *states, masks, 2, lr=0.1)
            taskloom.masked_sgd_(params, grads, states[0], masks, 2, lr=0.1, momentum=0.9, nesterov=True)
        results.append([*params, *states[0], *states[1]])
    for ours, theirs in zip(*results, strict=True):
        # torch's root of float64 is not always the nearest number.
        assert_close(ours, theirs) if dtype == torch.float64 else assert_same_bits(ours, theirs)


def test_parameters_at_odd_addresses() -> None:
    packed = random_packed(5000)
    count = int(taskloom.unpack_mask(packed, (5000,)).sum())
    results = []
    for start in (0, 1):
        param, grad = weights(5001).roll(start)[start : 5000 + start], weights(5001, seed=1).roll(start)[start : 5000 + start]
        first, second = torch.zeros(count + start)[start:], torch.zeros(count + start)[start:]
        taskloom.masked_adamw_(param, grad, first, second, packed, 1)
        results.append((param, first, second))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


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
