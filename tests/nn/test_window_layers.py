"""WindowLinear, WindowConv2d, TaskWindow and RoutedResidual: torch's parameters, tables, and the residual form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskloom.nn import RoutedResidual, TaskWindow, WindowConv2d, WindowLinear

START = torch.tensor([0, 0, 1, 3, 6])
TASK = torch.tensor([4, 0, 3, 2])


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mask(start: Tensor, width: int) -> Tensor:
    channel = torch.arange(10)
    return ((channel >= start[:, None]) & (channel < start[:, None] + width)).double()


def test_layers_have_the_parameters_of_torch() -> None:
    for ours, theirs in (
        (WindowLinear(10, 7).double(), nn.Linear(10, 7).double()),
        (WindowConv2d(10, 7, 3, padding=1, stride=2).double(), nn.Conv2d(10, 7, 3, padding=1, stride=2).double()),
    ):
        assert isinstance(ours, type(theirs))
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        conv = isinstance(theirs, nn.Conv2d)
        x, start = normal(4, 10, 6, 6) if conv else normal(4, 3, 10), START[TASK]
        seen = mask(start, 4)[:, :, None, None] if conv else mask(start, 4)[:, None]
        torch.testing.assert_close(ours(x, start, 4), theirs(x * seen), rtol=1e-12, atol=1e-12)
        part = ours(x, start, 4, 2, 3)
        outside = part.movedim(1 if conv else -1, 0)[[0, 1, 5, 6]]
        assert not outside.any()


def test_layers_follow_autocast() -> None:
    layer, x = WindowLinear(10, 7), normal(4, 10).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, START[TASK], 4)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x, START[TASK], 4), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("named", "message"), [({"groups": 2}, "groups: expected 1, got 2"), ({"padding": "same"}, "padding: expected a number")]
)
def test_convolutions_that_are_refused(named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"WindowConv2d: {message}"):
        WindowConv2d(4, 6, 3, **named)
    with pytest.raises(ValueError, match="WindowConv2d: padding_mode: expected 'zeros', got 'circular'"):
        WindowConv2d(4, 6, 3, padding_mode="circular")


def test_table_of_one_width() -> None:
    window = TaskWindow(START, 4, 10)
    assert (window.num_tasks, window.channels) == (5, 10)
    start, width = window(TASK)
    assert start.tolist() == [6, 0, 3, 1]
    assert (start.dtype, width) == (torch.int32, 4)
    assert TaskWindow(START, torch.full((5,), 4), 10)(TASK)[1] == 4
    assert window(torch.tensor(3))[0].shape == ()
    assert not window.state_dict()
    assert [name for name, _ in window.named_buffers()] == ["start"]
    assert window.to("meta").start.is_meta
    assert "num_tasks=5, channels=10, width=4" in repr(window)


def test_table_of_several_widths() -> None:
    widths = torch.tensor([4, 5, 4, 4, 4])
    start, width = TaskWindow(START, widths, 10)(TASK)
    assert isinstance(width, Tensor)
    assert width.tolist() == widths[TASK].tolist()
    x, layer = normal(4, 10), WindowLinear(10, 7).double()
    expected = nn.functional.linear(
        torch.stack([mask(START[t : t + 1], int(widths[t]))[0] for t in TASK.tolist()]) * x, layer.weight, layer.bias
    )
    torch.testing.assert_close(layer(x, start, width), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((START.float(), 4, 10), TypeError, "start: expected a tensor of integers, got torch.float32"),
        ((START, torch.ones(5), 10), TypeError, "width: expected a tensor of integers, got torch.float32"),
        (([0, 1], 4, 10), TypeError, "start: expected a tensor of integers, got list"),
        ((START, 2.5, 10), TypeError, "width: expected an integer, got float"),
        ((START, 2, 10.0), TypeError, "channels: expected an integer, got float"),
        ((torch.full((2,), 1 << 62), torch.full((2,), 1 << 62), 10), ValueError, "start: expected windows of at least 1 channel within 10"),
        ((START[:0], 4, 10), ValueError, r"start: expected shape \(T,\) with at least one task, got \(0,\)"),
        ((START, START[:2], 10), ValueError, r"width: expected shape \(5,\) as start, got \(2,\)"),
        ((START, 5, 10), ValueError, "start: expected windows of at least 1 channel within 10, got start 6 and width 5 for task 4"),
        ((START, 0, 10), ValueError, "got start 0 and width 0 for task 0"),
        ((START - 1, 2, 10), ValueError, "got start -1 and width 2 for task 0"),
    ],
)
def test_tables_that_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"TaskWindow: .*{message}|TaskWindow: {message}"):
        TaskWindow(*arguments)


def test_tasks_that_are_refused() -> None:
    window = TaskWindow(START, 4, 10)
    with pytest.raises(TypeError, match=r"TaskWindow: task: expected integers, got torch\.float32"):
        window(TASK.float())
    with pytest.raises(IndexError, match="TaskWindow: task: expected 0 to 4, got 5"):
        window(torch.tensor([0, 5]))
    with pytest.raises(IndexError, match="TaskWindow: task: expected 0 to 4, got -1"):
        window(torch.tensor([0, -1]))


class Scaled(nn.Module):
    """A branch that takes no window, and one more argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 10).double()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.layer(x) * scale


def branches() -> list[tuple[nn.Module, nn.Module, tuple[Tensor, ...]]]:
    """A branch, the same of a masked input, and what else they take."""
    first, second, scaled, gelu = WindowLinear(10, 12).double(), nn.Linear(12, 10).double(), Scaled(), nn.GELU()
    plain = nn.Linear(10, 12).double()
    plain.load_state_dict(first.state_dict())
    alone = WindowLinear(10, 10).double()
    alone_plain = nn.Linear(10, 10).double()
    alone_plain.load_state_dict(alone.state_dict())
    return [
        (nn.Sequential(first, gelu, second, gelu), nn.Sequential(plain, gelu, second, gelu), ()),
        (alone, alone_plain, ()),
        (scaled, scaled, (torch.tensor(0.5),)),
    ]


@pytest.mark.parametrize("which", range(3))
def test_residual(which: int) -> None:
    branch, plain, more = branches()[which]
    block = RoutedResidual(branch, TaskWindow(START, 4, 10))
    x = normal(4, 3, 10).requires_grad_()
    seen = mask(START[TASK], 4)[:, None]
    ours, theirs = block(x, TASK, *more), x + plain(seen * x, *more)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    back = normal(4, 3, 10)
    (for_x,) = torch.autograd.grad(ours, x, back)
    (expected,) = torch.autograd.grad(theirs, x, back)
    torch.testing.assert_close(for_x, expected, rtol=1e-12, atol=1e-12)
    # Channels that the branch does not see have the identity's gradient, to the bit.
    outside = (seen == 0).expand_as(back)
    assert for_x[outside].equal(back[outside])


def test_residual_of_images() -> None:
    conv, plain = WindowConv2d(10, 10, 3, padding=1).double(), nn.Conv2d(10, 10, 3, padding=1).double()
    plain.load_state_dict(conv.state_dict())
    x, seen = normal(4, 10, 5, 5), mask(START[TASK], 4)[:, :, None, None]
    window = TaskWindow(START, 4, 10)
    expected = x + plain(seen * x)
    for branch in (conv, nn.Sequential(conv, nn.Identity()), plain):
        torch.testing.assert_close(RoutedResidual(branch, window, channel_dim=1)(x, TASK), expected, rtol=1e-12, atol=1e-12)


def test_residual_of_all_channels_is_the_plain_block() -> None:
    branch, plain, _ = branches()[0]
    block = RoutedResidual(branch, TaskWindow(torch.zeros(5, dtype=torch.int64), 10, 10))
    x = normal(4, 3, 10)
    torch.testing.assert_close(block(x, TASK), x + plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("samples", [2, 4])
def test_residual_of_masks(samples: int) -> None:
    """What gives masks in the place of windows, as the random channels of DTR's ablation do."""

    class Masks(nn.Module):
        def forward(self, task: torch.Tensor) -> torch.Tensor:
            return (torch.arange(10) + task[:, None]) % 3 > 0

    masks, task = Masks(), TASK[:samples]
    plain, x = nn.Linear(10, 10).double(), normal(samples, 3, 10)
    expected = x + plain(masks(task)[:, None] * x)
    torch.testing.assert_close(RoutedResidual(plain, masks)(x, task), expected, rtol=1e-12, atol=1e-12)
    conv, image = nn.Conv2d(10, 10, 1).double(), normal(samples, 10, 5, 5)
    expected = image + conv(masks(task)[:, :, None, None] * image)
    torch.testing.assert_close(RoutedResidual(conv, masks, channel_dim=1)(image, task), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="RoutedResidual: window: expected windows for WindowLinear, got a mask"):
        RoutedResidual(WindowLinear(10, 10).double(), masks)(x, task)
    with pytest.raises(ValueError, match=r"RoutedResidual: window: expected a mask of bools \(\d, 8\), got torch.bool"):
        RoutedResidual(plain, masks)(x[:, :, :8], task)


@pytest.mark.parametrize("width", [4, torch.tensor([4, 4, 5, 1, 2])])
def test_tables_without_data_come_back(width: Tensor | int) -> None:
    window = TaskWindow(START, width, 10)
    expected = [one if isinstance(one, int) else one.tolist() for one in window(TASK)]
    empty = copy.deepcopy(window).to("meta").to_empty(device="cpu")
    with torch.device("meta"):
        made_there = TaskWindow(START, width, 10)
    for one in (empty, made_there, copy.deepcopy(empty)):
        assert [found if isinstance(found, int) else found.tolist() for found in one(TASK)] == expected


class Twice(nn.Sequential):
    """A sequence with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_branch_with_its_own_forward_is_called() -> None:
    block = RoutedResidual(Twice(WindowLinear(10, 10)), TaskWindow(START, 4, 10))
    x = normal(4, 3, 10)
    torch.testing.assert_close(block(x, TASK), x + 2 * mask(START[TASK], 4)[:, None] * x)


@pytest.mark.parametrize(
    ("shape", "channel_dim", "message"),
    [
        ((4, 10, 5, 6), -1, r"x: expected the window's 10 channels along dimension -1 \(channel_dim\), got \(4, 10, 5, 6\)"),
        ((3, 5, 10), -1, r"start: expected shape \(3,\) as x has samples, or \(\), got \(4,\)"),
        ((10, 10), 0, "x: expected samples and, along dimension 0, channels"),
        ((4, 10), 2, "x: expected samples and, along dimension 2, channels"),
    ],
)
def test_inputs_of_a_plain_branch_that_do_not_fit(shape: tuple[int, ...], channel_dim: int, message: str) -> None:
    block = RoutedResidual(nn.Identity(), TaskWindow(START, 4, 10), channel_dim)
    with pytest.raises(ValueError, match=f"RoutedResidual: {message}"):
        block(normal(*shape), TASK)
