"""The norms of channel windows beyond their contracts: the masked eager form, what is read, derivatives, errors, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import compiled
from contract import assert_same_bits
from samples import weights
from torch import Tensor

import taskloom

F64 = torch.float64
STARTS, WIDTHS = torch.tensor([0, 5, 17, 9]), torch.tensor([24, 1, 7, 12])
Norm = Callable[..., Tensor]


def mask_of(start: Tensor, width: int | Tensor, channels: int) -> Tensor:
    place = torch.arange(channels)
    return ((place >= start[:, None]) & (place < (start + width)[:, None])).double()


def eager_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, start: Tensor, width: int | Tensor) -> Tensor:
    """As the official DiT code with DTR has it."""
    masked = mask_of(start, width, x.shape[-1])[:, None].to(x.dtype) * x
    return F.layer_norm(masked, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def eager_group_norm(x: Tensor, weight: Tensor, bias: Tensor, start: Tensor, width: int | Tensor) -> Tensor:
    masked = mask_of(start, width, x.shape[1])[..., None, None].to(x.dtype) * x
    return F.silu(F.group_norm(masked, 4, weight, bias, eps=1e-5))


def layer_inputs(dtype: torch.dtype = F64) -> list[Tensor]:
    shapes = ((4, 5, 24), (4, 24), (4, 24))
    return [weights(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def group_inputs(dtype: torch.dtype = F64) -> list[Tensor]:
    shapes = ((4, 24, 3, 5), (24,), (24,))
    return [weights(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def layer_norm(x: Tensor, shift: Tensor, scale: Tensor, start: Tensor = STARTS, width: int | Tensor = 7) -> Tensor:
    return taskloom.window_layer_norm(x, shift, scale, start=start, width=width)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, start: Tensor = STARTS, width: int | Tensor = 7) -> Tensor:
    return taskloom.window_group_norm_silu(x, weight, bias, groups=4, start=start, width=width)


NORMS = [
    pytest.param(layer_norm, layer_inputs, eager_layer_norm, id="layer"),
    pytest.param(group_norm, group_inputs, eager_group_norm, id="group"),
]
norms = pytest.mark.parametrize(("norm", "inputs", "eager"), NORMS)


@norms
@pytest.mark.parametrize("width", [7, 0, WIDTHS])
def test_is_the_norm_of_a_masked_input(norm: Norm, inputs: Any, eager: Norm, width: int | Tensor) -> None:
    given = inputs()
    start = torch.zeros(4, dtype=torch.int64) if isinstance(width, Tensor) else STARTS
    y, expected = norm(*given, start, width), eager(*given, start, width)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    slope = weights(*y.shape, seed=9, dtype=F64)
    ours, theirs = torch.autograd.grad(y, given, slope), torch.autograd.grad(expected, given, slope)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@norms
def test_a_window_of_all_channels_is_the_plain_norm(norm: Norm, inputs: Any, eager: Norm) -> None:
    given = inputs()
    everything = torch.zeros(4, dtype=torch.int64)
    torch.testing.assert_close(norm(*given, everything, 24), eager(*given, everything, 24), rtol=1e-12, atol=1e-12)


@norms
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_channels_outside_are_not_read(norm: Norm, inputs: Any, eager: Norm, backend: str) -> None:
    x, *others = inputs(torch.float32)
    mask = mask_of(STARTS, 7, 24).bool()
    mask = (mask[:, None] if norm is layer_norm else mask[..., None, None]).expand(x.shape)
    poisoned = torch.where(mask, x, torch.nan).detach().requires_grad_()
    with taskloom.backend(backend):
        y = norm(poisoned, *others)
        assert_same_bits(y, norm(x, *others))
        gradients = torch.autograd.grad(y.square().sum(), [poisoned, *others])
    assert all(bool(one.isfinite().all()) for one in gradients)
    assert not gradients[0][~mask].any()
    assert bool((gradients[0][mask] != 0).all())


@norms
def test_gradients(norm: Norm, inputs: Any, eager: Norm) -> None:
    given = inputs()
    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(norm, given, fast_mode=True)
    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(norm, given, fast_mode=True)


@norms
def test_the_order_of_samples_does_not_matter(norm: Norm, inputs: Any, eager: Norm) -> None:
    x, first, second = inputs(torch.float32)
    order = torch.tensor([2, 0, 3, 1])
    others = (first[order], second[order]) if norm is layer_norm else (first, second)
    assert_same_bits(norm(x[order], *others, STARTS[order]), norm(x, first, second)[order])


@norms
def test_nothing_of_the_size_of_x_is_made_beside_the_results(norm: Norm, inputs: Any, eager: Norm) -> None:
    given = inputs(torch.float32)
    made: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            known = {one.data_ptr() for one in torch.utils._pytree.tree_leaves(args) if isinstance(one, Tensor)}
            leaves = [one for one in torch.utils._pytree.tree_leaves(result) if isinstance(one, Tensor)]
            made.extend(one.numel() for one in leaves if one.data_ptr() not in known)
            return result

    slope = torch.ones_like(given[0])
    with Sizes(), taskloom.backend("native"):
        torch.autograd.grad(norm(*given), given, slope)
    assert sum(one >= given[0].numel() for one in made) == 2


def test_statistics_have_gradients_too() -> None:
    x, shift, scale = layer_inputs()
    maps, weight, bias = group_inputs()
    ops = torch.ops.taskloom

    def rows(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.window_layer_norm.default(x, shift, scale, STARTS, 7, None, 1e-6, False))

    def groups(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.window_group_norm_silu.default(x.flatten(2), weight, bias, 4, STARTS, 7, None, 1e-5, False))

    assert torch.autograd.gradcheck(rows, (x, shift, scale), fast_mode=True)
    assert torch.autograd.gradcheck(groups, (maps, weight, bias), fast_mode=True)
    (mean_only,) = torch.autograd.grad(rows(x, shift, scale)[1].sum(), x)
    torch.testing.assert_close(mean_only, mask_of(STARTS, 7, 24)[:, None].expand(x.shape) / 24)


def test_variance_far_from_zero_is_as_sound_as_torchs() -> None:
    x = weights(4, 5, 240) + 1000
    exact = F.layer_norm(x.double(), (240,), eps=1e-6)
    y = taskloom.window_layer_norm(x, start=torch.tensor(0), width=240)
    torchs = (F.layer_norm(x, (240,), eps=1e-6) - exact).norm()
    assert (y - exact).norm() <= 2 * torchs + 1e-6 * exact.norm()
    maps = x.reshape(4, 24, 50)
    exact = F.silu(F.group_norm(maps.double(), 4))
    y = taskloom.window_group_norm_silu(maps, groups=4, start=torch.tensor(0), width=24)
    assert (y - exact).norm() <= 2 * (F.silu(F.group_norm(maps, 4)) - exact).norm() + 1e-6 * exact.norm()


@norms
def test_transforms(norm: Norm, inputs: Any, eager: Norm) -> None:
    x, *others = inputs()

    def loss(x: Tensor) -> Tensor:
        return norm(x, *others).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    _, tangent = torch.func.jvp(loss, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected.sum())


@norms
def test_compiled(norm: Norm, inputs: Any, eager: Norm, fresh_compiler: None) -> None:
    given = inputs(torch.float32)
    run = compiled(lambda x, first, second, start: norm(x, first, second, start).square().sum())
    for count in (4, 3):
        cut = [one.detach()[:count].requires_grad_() if one.shape[0] == 4 else one for one in given]
        ours = torch.autograd.grad(run(*cut, STARTS[:count]), cut)
        theirs = torch.autograd.grad(norm(*cut, STARTS[:count]).square().sum(), cut)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


X, MAPS = torch.zeros(3, 5, 24), torch.zeros(3, 24, 5)
START = torch.tensor([0, 5, 17])
LAYER_ERRORS = [
    ({"x": X.long()}, TypeError, "x: expected float32"),
    ({"x": X[0, 0]}, ValueError, r"x: expected shape \[N, ..., C\] with at least one channel, got \(24,\)"),
    ({"x": X[..., :0]}, ValueError, r"x: expected shape \[N, ..., C\] with at least one channel, got \(3, 5, 0\)"),
    ({"shift": torch.zeros(24)}, ValueError, r"shift: expected shape \(3, 24\) as x's samples and channels, got \(24,\)"),
    ({"scale": torch.zeros(3, 24).long()}, TypeError, "scale: expected float32"),
]
WINDOW_ERRORS = [
    ({"start": START.float()}, TypeError, "start: expected integers, got torch.float32"),
    ({"start": START[:2]}, ValueError, r"start: expected shape \(3,\) as x has samples, or \(\), got \(2,\)"),
    ({"width": 25}, ValueError, "width: expected 0 to 24, the number of channels, got 25"),
    ({"width": 2.0}, TypeError, "width: expected an integer or a tensor of integers, got float"),
    ({"width": 8}, ValueError, "start: expected windows within 24 channels, got 17 to 24 for sample 2"),
    ({"start": START + (1 << 63) - 18}, ValueError, "start: expected windows within 24 channels, got 9223372036854775790 to"),
    ({"start": START - 1}, ValueError, "start: expected windows within 24 channels, got -1 to 5 for sample 0"),
    ({"width": torch.tensor([7, -1, 7])}, ValueError, "width: expected no negative width, got -1 for sample 1"),
]
GROUP_ERRORS = [
    ({"x": MAPS[..., :0]}, ValueError, r"x: expected shape \[N, C, ...\] with at least one channel and one place in it, got \(3, 24, 0\)"),
    ({"groups": 5}, ValueError, "groups: expected a divisor of 24, the channels of x, got 5"),
    ({"groups": 2.0}, TypeError, "groups: expected an integer, got float"),
    ({"weight": torch.zeros(3)}, ValueError, r"weight: expected shape \(24,\) as x's channels, got \(3,\)"),
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("changed", "error", "message"), LAYER_ERRORS + WINDOW_ERRORS)
def test_layer_norm_errors(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with taskloom.backend(backend), pytest.raises(error, match=f"window_layer_norm: .*{message}"):
        taskloom.window_layer_norm(**{"x": X, "start": START, "width": 7} | changed)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("changed", "error", "message"), GROUP_ERRORS + WINDOW_ERRORS)
def test_group_norm_errors(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with taskloom.backend(backend), pytest.raises(error, match=f"window_group_norm_silu: .*{message}"):
        taskloom.window_group_norm_silu(**{"x": MAPS, "groups": 4, "start": START, "width": 7} | changed)
