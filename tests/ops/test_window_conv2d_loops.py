"""The CPU loops of window_conv2d: shapes around their panels and tiles, every CPU level, any number of threads."""

from __future__ import annotations

import pytest
import torch
from contract import assert_close, assert_same_bits
from samples import weights
from torch import Tensor

import taskloom
from taskloom import _native
from taskloom.ops import _library
from taskloom.ops.routed import _conv_loops
from taskloom.reference import routed as reference

Pair = tuple[int, int]
LEVELS = [level for level in _native.build_info()["levels"] if level <= _native.detected_cpu_level()]

# Outputs, channels, size, kernel, stride, padding, dilation: panels have 32 outputs, parts 64, tiles up to 14 pixels of a row, or of
# several where rows have fewer than 8, chains about 512 products.
GEOMETRIES = {
    "one row of a tile": (32, 5, (3, 14), (3, 3), (1, 1), (1, 1), (1, 1)),
    "tiles of a row": (65, 4, (3, 31), (3, 3), (1, 1), (1, 1), (1, 1)),
    "several chains": (33, 131, (4, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
    "rows in a tile": (70, 9, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    "narrow": (16, 9, (23, 1), (3, 1), (1, 1), (1, 0), (1, 1)),
    "narrow, strided": (31, 9, (15, 11), (3, 3), (2, 2), (1, 1), (1, 1)),
    "strided": (40, 9, (11, 45), (3, 3), (2, 3), (1, 1), (1, 1)),
    "dilated": (16, 9, (11, 21), (3, 2), (1, 2), (2, 3), (2, 3)),
    "narrow, dilated": (16, 9, (9, 12), (2, 3), (2, 1), (3, 1), (3, 4)),
    "more padding than input": (16, 3, (2, 3), (3, 3), (1, 1), (7, 9), (1, 1)),
    "a step over taps": (16, 9, (13, 40), (2, 2), (4, 4), (0, 0), (1, 1)),
    "one tap": (129, 9, (6, 17), (1, 1), (1, 1), (0, 0), (1, 1)),
    "many taps": (16, 5, (25, 25), (23, 23), (1, 1), (3, 3), (1, 1)),
    "pixels far apart": (16, 9, (260, 310), (2, 1), (50, 50), (1, 1), (1, 1)),
    "one pixel": (64, 70, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1)),
}  # fmt: skip


def has_convolved_gradient(geometry: tuple[int, int, Pair, Pair, Pair, Pair, Pair]) -> bool:
    """Whether an input's gradient is a convolution of the whole of the output's."""
    kernel, stride, padding, dilation = geometry[3:]
    return stride == (1, 1) and all(one <= apart * (taps - 1) for one, apart, taps in zip(padding, dilation, kernel, strict=True))


def by_loops(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, geometry: tuple[Pair, Pair, Pair]) -> Tensor:
    """What the loops write, in memory of zeros; rows of ``windows`` are first channel, channels, first output, outputs."""
    sizes = [
        (size + 2 * beside - apart * (taps - 1) - 1) // step + 1
        for size, taps, step, beside, apart in zip(x.shape[2:], weight.shape[2:], *geometry, strict=True)
    ]
    y = torch.zeros((len(x), len(weight), *sizes), dtype=x.dtype)
    torch.ops.taskloom_loops.window_conv2d.default(x, weight, bias, windows, *map(list, geometry), False, y)
    return y


def sample_windows(samples: int, channels: int, outputs: int) -> Tensor:
    """Windows of all, some, one and no channels, and of some and all outputs."""
    rows = [[0, channels, 0, outputs], [channels // 3, channels // 2, outputs // 3, outputs // 2], [channels - 1, 1, outputs - 1, 1]]
    rows += [[channels, 0, 0, outputs], [1, channels - 1, 3, 0]]
    return torch.tensor(rows)[torch.arange(samples) % len(rows)].contiguous()


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.usefixtures("restored_threads", "restored_level")
def test_every_level_and_number_of_threads(geometry: tuple[int, int, Pair, Pair, Pair, Pair, Pair]) -> None:
    outputs, channels, size, kernel, *rest = geometry
    sizes = (rest[0], rest[1], rest[2])
    windows = sample_windows(5, channels, outputs)
    x, weight, bias = weights(5, channels, *size), weights(outputs, channels, *kernel, seed=1), weights(outputs, seed=2)
    for n, (first, seen, *_) in enumerate(windows.tolist()):
        x[n, :first], x[n, first + seen :] = torch.nan, torch.inf
    start, width, out_start, out_width = windows.unbind(1)
    window, out_window = (start, channels, width), (out_start, outputs, out_width)
    expected = reference.window_conv2d(x.double(), weight.double(), bias.double(), *window, *out_window, *sizes)
    found: list[Tensor] = []
    for level in LEVELS:
        _library.force_cpu_level(level)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(by_loops(x, weight, bias, windows, sizes))
    assert_close(found[0], expected.float())
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("geometry", [one for one in GEOMETRIES.values() if has_convolved_gradient(one)], ids=str)
@pytest.mark.usefixtures("restored_threads", "restored_level")
def test_inputs_gradient(geometry: tuple[int, int, Pair, Pair, Pair, Pair, Pair]) -> None:
    outputs, channels, size, kernel, _, padding, dilation = geometry
    beside = tuple(apart * (taps - 1) - one for apart, taps, one in zip(dilation, kernel, padding, strict=True))
    windows = sample_windows(5, channels, outputs)
    x, weight = weights(5, channels, *size), weights(outputs, channels, *kernel, seed=1)
    start, width, out_start, out_width = windows.unbind(1)
    window, out_window = (start, channels, width), (out_start, outputs, out_width)
    sizes = ((1, 1), padding, dilation)
    gradient = weights(*reference.window_conv2d(x, weight, None, *window, *out_window, *sizes).shape, seed=3)
    given = (gradient.double(), x.double(), weight.double(), *window, *out_window, *sizes, (True, False, False))
    expected = reference.window_conv2d_backward(*given)[0]
    turned = windows[:, [2, 3, 0, 1]].contiguous()
    found: list[Tensor] = []
    for level in LEVELS:
        _library.force_cpu_level(level)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made = torch.zeros_like(x)
            run = torch.ops.taskloom_loops.window_conv2d.default
            run(gradient, weight, None, turned, [1, 1], list(beside), list(dilation), True, made)
            found.append(made)
    assert_close(found[0], expected.float())
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.skipif(LEVELS[-1] != _conv_loops.LEVEL, reason="the op takes the loops at level v4 only")
@pytest.mark.parametrize("side", [5, 12])
def test_the_op_takes_them_backward(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = weights(4, 90, side, side).requires_grad_(), weights(48, 90, 3, 3, seed=1)
    named = {"start": torch.tensor([0, 37, 37, 50]), "width": 40, "padding": 1}
    calls: list[int] = []
    own = _conv_loops.convolve_backward
    monkeypatch.setattr(_conv_loops, "convolve_backward", lambda *given: (calls.append(1), own(*given)))
    found = {}
    for backend in ("native", "reference"):
        with taskloom.backend(backend):
            y = taskloom.window_conv2d(x, weight, **named)
            found[backend] = torch.autograd.grad(y, x, weights(*y.shape, seed=3))[0]
    assert calls == [1]
    assert_close(found["native"], found["reference"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("restored_level")
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    x, weight = weights(2, 40, 9, 15, dtype=dtype), weights(50, 40, 3, 3, seed=1, dtype=dtype)
    windows, sizes = torch.tensor([[3, 20, 0, 50], [10, 20, 0, 50]]), ((1, 1), (1, 1), (1, 1))
    for level in LEVELS:
        _library.force_cpu_level(level)
        exact = by_loops(x.float(), weight.float(), None, windows, sizes)
        assert_same_bits(by_loops(x, weight, None, windows, sizes), exact.to(dtype))


@pytest.mark.skipif(LEVELS[-1] != _conv_loops.LEVEL, reason="the op takes the loops at level v4 only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_op_takes_them(dtype: torch.dtype) -> None:
    x, weight, bias = weights(3, 40, 9, 15, dtype=dtype), weights(48, 40, 3, 3, seed=1, dtype=dtype), weights(48, seed=2, dtype=dtype)
    start = torch.tensor([0, 20, 7])
    named = {"start": start, "width": 20, "padding": 1}
    assert "loops" in str(taskloom.explain("window_conv2d", x, weight, **named))
    windows = torch.stack([start, *(torch.full((3,), value) for value in (20, 0, 48))], 1)
    with taskloom.backend("native"):
        got = taskloom.window_conv2d(x, weight, bias, **named)
    assert_same_bits(got, by_loops(x, weight, bias, windows, ((1, 1), (1, 1), (1, 1))))
    with taskloom.backend("reference"):
        assert_close(got, taskloom.window_conv2d(x, weight, bias, **named))


@pytest.mark.skipif(LEVELS[-1] != _conv_loops.LEVEL, reason="the op takes the loops at level v4 only")
@pytest.mark.usefixtures("restored_level")
def test_where_the_op_does_not_take_them() -> None:
    x, weight, named = weights(3, 40, 9, 15), weights(48, 40, 3, 3), {"start": 4, "width": 20}

    def taken(x: Tensor, weight: Tensor) -> bool:
        return "loops" in str(taskloom.explain("window_conv2d", x, weight, **named))

    assert taken(x, weight)
    assert not taken(x, weight[:, :, :1, :1])
    assert not taken(x, weight[:15])
    assert not taken(x.to(memory_format=torch.channels_last), weight)
    assert not taken(x.double(), weight.double())
    _library.force_cpu_level("v3")
    assert not taken(x, weight)


def test_what_the_loops_refuse() -> None:
    x, weight, y = weights(2, 6, 5, 5), weights(16, 6, 3, 3), torch.zeros(2, 16, 3, 3)
    run = torch.ops.taskloom_loops.window_conv2d.default
    fitting = torch.tensor([[0, 6, 0, 16], [2, 4, 0, 16]])
    for place, wrong in ((0, -1), (1, 7), (2, 1), (3, 17)):
        windows = fitting.clone()
        windows[0, place] = wrong
        with pytest.raises(RuntimeError, match="windows: expected those of"):
            run(x, weight, None, windows, [1, 1], [0, 0], [1, 1], False, y)
    with pytest.raises(RuntimeError, match="y: expected"):
        run(x, weight, None, fitting, [1, 1], [1, 1], [1, 1], False, y)
    with pytest.raises(RuntimeError, match="contiguous"):
        run(x.transpose(2, 3), weight, None, fitting, [1, 1], [0, 0], [1, 1], False, y)
    with pytest.raises(RuntimeError, match="got float64"):
        run(x.double(), weight.double(), None, fitting, [1, 1], [0, 0], [1, 1], False, y.double())
    assert not y.any()
