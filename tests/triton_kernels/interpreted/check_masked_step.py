"""masked_adamw_ and masked_sgd_ beyond their contract: borders of programs, many parameters, what stays, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import assert_same_bits
from samples import random_packed, set_tail, weights, with_specials
from torch import Tensor

import taskloom
from taskloom.optim import MaskedAdamW
from taskloom.triton_kernels.masked import masked_step

SIZES = (1, 63, 64, 65, 500, 0, 129)

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_step, "entries_per_program", lambda numel, on_gpu=64: 64)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    launch = masked_step.launch

    def noted(kernel: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(masked_step, "launch", noted)
    return names


def _indices(packed: Tensor, numel: int) -> Tensor:
    return taskloom.unpack_mask(packed, (numel,)).nonzero().squeeze(1)


def _made(kinds: tuple[str, ...], dtype: torch.dtype = torch.float32) -> tuple[list[Any], list[Any], list[Any], list[Any], list[Any]]:
    """Parameters, gradients, two states and active entries, named in turn by each kind."""
    params, grads, active, counts = [], [], [], []
    for place, size in enumerate(SIZES):
        packed, kind = random_packed(size, seed=place), kinds[place % len(kinds)]
        indices = _indices(packed, size)
        params.append(weights(size, seed=place, dtype=dtype))
        grads.append(weights(size, seed=50 + place, dtype=dtype))
        active.append({"packed": set_tail(packed, size), "int32": indices.int(), "int64": indices, "all": None}[kind])
        counts.append(size if kind == "all" else len(indices))
    states = [[weights(count, seed=seed + place).abs() for place, count in enumerate(counts)] for seed in (100, 200)]
    return params, grads, *states, active


def _same_on_both(kinds: tuple[str, ...], step: Callable[..., None], dtype: torch.dtype = torch.float32) -> None:
    results = []
    for backend in ("triton", "native"):
        made = _made(kinds, dtype)
        with taskloom.backend(backend):
            step(*made)
        results.append([tensor for place in (0, 2, 3) for tensor in made[place]])
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)


def _adamw(params: Any, grads: Any, first: Any, second: Any, active: Any) -> None:
    taskloom.masked_adamw_(params, grads, first, second, active, [1.0 + place for place in range(len(params))], lr=0.01)


def _sgd(params: Any, grads: Any, first: Any, second: Any, active: Any) -> None:
    steps = [1.0 + place % 2 for place in range(len(params))]
    taskloom.masked_sgd_(params, grads, first, active, steps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, maximize=True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("step", [_adamw, _sgd])
@pytest.mark.parametrize("kinds", [("packed",), ("int32",), ("packed", "all", "int64", "int32")], ids="-".join)
def test_borders_of_programs_and_parameters(kinds: tuple[str, ...], step: Callable[..., None]) -> None:
    _same_on_both(kinds, step)


@pytest.mark.usefixtures("small_blocks")
def test_bfloat16_is_rounded_once() -> None:
    _same_on_both(("packed", "all"), _adamw, torch.bfloat16)


def test_parameters_of_a_dtype_and_kind_share_one_launch(launched: list[str]) -> None:
    _adamw(*_made(("packed",)))
    assert launched == ["count_active_kernel", "masked_adamw_kernel"]
    launched.clear()
    _sgd(*_made(("packed", "all", "int64")))
    assert launched == ["count_active_kernel", "check_indices_kernel", *["masked_sgd_kernel"] * 3]


def test_entries_that_are_not_active_keep_their_bits() -> None:
    param, packed = with_specials(300), random_packed(300)
    before, chosen = param.clone(), taskloom.unpack_mask(random_packed(300), (300,))
    count = int(chosen.sum())
    taskloom.masked_adamw_(param, with_specials(300, seed=1), torch.zeros(count), torch.zeros(count), packed, 1, weight_decay=0.5)
    assert_same_bits(param[~chosen], before[~chosen])


def test_strided_parameters_are_stepped_in_place() -> None:
    grid = weights(8, 24)
    before = grid.clone()
    taskloom.masked_sgd_(grid[:, ::2], torch.ones(8, 12), None, None, 1, lr=1.0)
    assert_same_bits(grid[:, 1::2], before[:, 1::2])
    assert_same_bits(grid[:, ::2], before[:, ::2] - 1)


def test_the_first_step_ignores_what_the_buffer_held() -> None:
    buffer = torch.full((5,), torch.nan)
    taskloom.masked_sgd_(weights(5), weights(5, seed=1), buffer, None, 1, momentum=0.9)
    assert_same_bits(buffer, weights(5, seed=1))


def _refused(message: str, **changed: Any) -> None:
    good = {"params": weights(20), "grads": weights(20), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3), "step": 1}
    arguments = {**good, "active": torch.tensor([1, 5, 19]), **changed}
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    before = [value.clone() for value in tensors]
    with pytest.raises(RuntimeError, match=message):
        taskloom.masked_adamw_(**arguments)
    for value, old in zip(tensors, before, strict=True):
        assert_same_bits(value, old)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("indices", [[1, 5, 20], [-1, 5, 6], [1, 1, 5], [5, 1, 6]])
def test_wrong_indices_are_refused(indices: list[int]) -> None:
    message = r"active\[0\]: expected ascending indices without repeats, from 0 to below 20"
    for dtype in (torch.int32, torch.int64):
        _refused(message, active=torch.tensor(indices, dtype=dtype))


@pytest.mark.usefixtures("small_blocks")
def test_indices_ascend_from_one_program_to_the_next() -> None:
    indices = torch.arange(70)
    indices[64:] -= 1
    state = {"exp_avg": torch.zeros(70), "exp_avg_sq": torch.zeros(70)}
    _refused("ascending indices without repeats", params=weights(80), grads=weights(80), active=indices, **state)


def test_states_of_another_size_are_refused() -> None:
    _refused(r"exp_avg_sq\[0\]: expected 3 elements, one for each active entry, got 4", exp_avg_sq=torch.zeros(4))
    packed = torch.tensor([0b10001, 1, 0xFF], dtype=torch.uint8)
    _refused(r"exp_avg\[0\]: expected 7 elements, one for each active entry, got 3", active=packed)
    _refused(r"exp_avg\[0\]: expected 20 elements, one for each active entry, got 3", active=None)


def test_an_error_in_one_parameter_leaves_all_as_they_were() -> None:
    params, grads, first, second, active = _made(("packed", "all"))
    first[4] = torch.zeros(3)
    before = [tensor.clone() for tensor in (*params, *first, *second)]
    with pytest.raises(RuntimeError, match=r"exp_avg\[4\]: expected \d+ elements, one for each active entry, got 3"):
        _adamw(params, grads, first, second, active)
    for tensor, old in zip((*params, *first, *second), before, strict=True):
        assert_same_bits(tensor, old)


def test_shared_memory_is_refused() -> None:
    shared, state = weights(40), torch.zeros(3)
    _refused("must not share memory", params=shared[:20], grads=shared[10:30])
    _refused("must not share memory", exp_avg=state, exp_avg_sq=state)


def test_the_optimiser_steps_as_on_the_native_kernels() -> None:
    results = []
    for backend in ("triton", "native"):
        params = [torch.nn.Parameter(weights(30, 7)), torch.nn.Parameter(weights(30, seed=1)), torch.nn.Parameter(weights(90, 9, seed=2))]
        masks = [weights(30, 7, seed=3) > 0, None, torch.arange(0, 810, 50)]
        with taskloom.backend(backend):
            optimizer = MaskedAdamW(params, masks, lr=0.05)
            for _ in range(3):
                sum((param.square().sum() for param in params), torch.zeros(())).backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours.detach(), theirs.detach())
