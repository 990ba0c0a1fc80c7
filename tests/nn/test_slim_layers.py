"""Slim layers and the widths that reach them."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import torch
from models import SlimNet, normal
from torch import nn

from taskloom.nn import SlimConv2d, SlimLinear, SlimNorm2d, make_divisible, use_width
from taskloom.nn.slim_widths import configuration_name

X = normal(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("v", "expected"), [(12, 16), (4, 8), (11.2, 16), (9, 16), (8.4, 8), (3.9, 9), (16, 16), (20, 24), (19.9, 24), (1000.1, 1000)]
)
def test_make_divisible(v: float, expected: int) -> None:
    assert make_divisible(v) == expected


def test_make_divisible_by_others() -> None:
    assert make_divisible(7.5, 1) == 8
    assert make_divisible(5, 4) == 8
    assert make_divisible(3, 8, 16) == 16
    for divisor in (0, -8):
        with pytest.raises(ValueError, match=f"make_divisible: divisor: expected at least 1, got {divisor}"):
            make_divisible(8, divisor)
    with pytest.raises(ValueError, match="make_divisible: v: expected a finite number, got inf"):
        make_divisible(math.inf)


@pytest.mark.parametrize("settings", [{}, {"bias": False}])
def test_full_width_is_the_plain_layer(settings: dict[str, Any]) -> None:
    linear, conv = nn.Linear(6, 16, **settings).double(), nn.Conv2d(6, 16, 3, stride=2, padding=1, **settings).double()
    slim_linear, slim_conv = SlimLinear(6, 16, **settings).double(), SlimConv2d(6, 16, 3, stride=2, padding=1, **settings).double()
    slim_linear.load_state_dict(linear.state_dict())
    slim_conv.load_state_dict(conv.state_dict())
    conv.load_state_dict(slim_conv.state_dict())
    rows, image = normal(3, 6).double(), normal(2, 6, 7, 5).double()
    torch.testing.assert_close(slim_linear(rows), linear(rows), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slim_conv(image), conv(image), rtol=1e-12, atol=1e-12)
    assert slim_linear(normal(0, 6).double()).shape == (0, 16)


@pytest.mark.parametrize("padding", ["same", "valid", 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_paddings_are_those_of_torch(padding: Any, mode: Any) -> None:
    slim = SlimConv2d(4, 8, (3, 2), padding=padding, padding_mode=mode, dilation=2)
    plain = nn.Conv2d(4, 8, (3, 2), padding=padding, padding_mode=mode, dilation=2)
    plain.load_state_dict(slim.state_dict())
    x = normal(2, 4, 9, 8)
    torch.testing.assert_close(slim(x), plain(x), rtol=1e-5, atol=1e-5)


def test_widths_of_a_call() -> None:
    linear, conv = SlimLinear(16, 32), SlimConv2d(16, 32, 1, divisor=1)
    x = normal(3, 10)
    torch.testing.assert_close(linear(x, 0.5), x @ linear.weight[:16, :10].T + linear.bias[:16])
    assert linear(x, 3).shape == (3, 3)
    assert linear(x, 1.0).shape == (3, 32)
    assert linear(x, 1).shape == (3, 1)
    assert conv(normal(2, 16, 3, 3), 0.3).shape == (2, 10, 3, 3)
    assert linear(x, 0.2).shape == (3, 8)


@pytest.mark.parametrize("kind", ["layer", "group"])
def test_widths_of_a_model(kind: str) -> None:
    model = SlimNet(kind)
    shapes: list[int] = []
    handles = [
        module.register_forward_hook(lambda module, args, y: shapes.append(y.shape[1]))
        for module in model.modules()
        if isinstance(module, SlimConv2d | SlimLinear)
    ]
    full = model(X)
    assert shapes == [16, 16, 32, 24, 5, 24, 7]
    shapes.clear()
    with use_width(model, {"encoder": 0.5, "decoders.a": 0.25, "encoder.3": 24}):
        narrow = model(X)
        assert shapes == [8, 8, 24, 8, 5, 24, 7]
        shapes.clear()
        with use_width(model, 1.0):
            assert model(X)["a"].equal(full["a"])
        shapes.clear()
        model(X)
        assert shapes == [8, 8, 24, 8, 5, 24, 7]
    for handle in handles:
        handle.remove()
    assert not narrow["a"].equal(full["a"])
    assert model(X)["a"].equal(full["a"])


def test_narrow_steps_leave_the_rest_and_add() -> None:
    model = SlimNet()
    layer = model.encoder[3]
    with use_width(model, {"encoder": 0.5, "": 0.25}):
        sum(y.square().sum() for y in model(X).values()).backward()
        first = layer.weight.grad.clone()
        assert first[:16, :8].ne(0).any()
        assert first[16:].eq(0).all()
        assert first[:, 8:].eq(0).all()
    layer.weight.grad = None
    sum(y.square().sum() for y in model(X).values()).backward()
    whole = layer.weight.grad.clone()
    with use_width(model, {"encoder": 0.5, "": 0.25}):
        sum(y.square().sum() for y in model(X).values()).backward()
    torch.testing.assert_close(layer.weight.grad, first + whole, rtol=1e-5, atol=1e-6)


def test_what_is_outside_the_prefix_does_not_matter() -> None:
    model = SlimNet()
    with use_width(model, 0.5):
        before = model(X)
        with torch.no_grad():
            model.encoder[0].weight[8:].fill_(torch.nan)
            model.encoder[1].weight[8:].fill_(torch.nan)
            model.encoder[2].weight[8:].fill_(torch.nan)
            model.encoder[3].weight[16:].fill_(torch.nan)
            model.encoder[3].weight[:, 8:].fill_(torch.nan)
            model.decoders["a"][1].weight[16:].fill_(torch.nan)
            model.decoders["a"][1].weight[:, 16 * 9 :].fill_(torch.nan)
            model.decoders["a"][3].weight[:, 16:].fill_(torch.nan)
        assert model(X)["a"].equal(before["a"])


def test_names_of_configurations() -> None:
    model = SlimNet()
    assert configuration_name(model, 1.0) is None
    assert configuration_name(model, {"encoder": 1.0, "decoders.a": 1.0}) is None
    assert configuration_name(model, 0.5) == configuration_name(model, {"": 0.5, "encoder": 0.5}) == "0.5"
    first = configuration_name(model, {"encoder": 0.5, "decoders": 0.25, "decoders.a": 0.5})
    assert first == configuration_name(model, {"decoders.a": 0.5, "decoders": 0.25, "": 1.0, "encoder": 0.5, "decoders.b": 0.25})
    assert first != configuration_name(model, {"encoder": 0.5})


def test_threads_run_a_model_at_widths_of_their_own() -> None:
    model = SlimNet().eval()
    expected = {}
    for width in (0.25, 0.75):
        with use_width(model, width):
            expected[width] = model(X)
    barrier = threading.Barrier(2, timeout=60)
    # Every layer of one thread waits for the same layer of the other, so that both are inside their blocks all the time.
    handles = [
        layer.register_forward_pre_hook(lambda module, arguments: (barrier.wait(), None)[1])
        for layer in model.modules()
        if isinstance(layer, SlimConv2d | SlimLinear)
    ]
    found: dict[float, Any] = {}

    def work(width: float) -> None:
        with use_width(model, width):
            found[width] = model(X)

    threads = [threading.Thread(target=work, args=(width,)) for width in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    for width, outputs in expected.items():
        assert all(torch.equal(found[width][task], output) for task, output in outputs.items())
    assert all(module.width == 1.0 for module in model.modules() if isinstance(module, SlimConv2d | SlimLinear))


def test_copies_made_inside_a_block_are_whole() -> None:
    model = SlimNet()
    with use_width(model, 0.25):
        twin = copy.deepcopy(model)
        assert model.encoder[0].width == 0.25
        assert twin.encoder[0].width == 1.0
    with pytest.raises(AttributeError):
        model.encoder[0].width = 0.5


@pytest.mark.parametrize(
    ("widths", "error", "message"),
    [
        (0.0, ValueError, r"ratio in \(0, 1\], got 0.0"),
        (1.5, ValueError, r"ratio in \(0, 1\], got 1.5"),
        (1, TypeError, "got the integer 1"),
        ({"encoder": True}, TypeError, "got bool"),
        ({"encoder.0": 0}, ValueError, "'encoder.0': expected at least 1 channel, got 0"),
        ({"encoder": 16}, TypeError, "'encoder': expected a ratio for its layers, got the integer 16"),
        ({"": 16}, TypeError, "'': expected a ratio for its layers, got the integer 16"),
        ({0: 0.5}, TypeError, "expected paths of slim layers or of their parents, got 0"),
        ({"decoder": 0.5}, ValueError, "paths of slim layers or of their parents, got 'decoder'"),
        ({"encoder.5": 0.5}, ValueError, "got 'encoder.5', which has none"),
    ],
)
def test_wrong_widths(widths: Any, error: type[Exception], message: str) -> None:
    model = SlimNet()
    with pytest.raises(error, match=message), use_width(model, widths):
        pass
    assert all(module.width == 1.0 for module in model.modules() if isinstance(module, SlimConv2d | SlimLinear))


def test_wrong_widths_of_a_call() -> None:
    layer, depthwise = SlimLinear(4, 6), SlimConv2d(8, 8, 3, groups=8)
    for width, error in ((0, ValueError), (7, ValueError), (-0.5, ValueError), (torch.nan, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="SlimLinear: out_width"):
            layer(normal(2, 4), width)
    with pytest.raises(ValueError, match="x: expected 1 to 4 channels, those of weight, got 5"):
        layer(normal(2, 5))
    with pytest.raises(ValueError, match="out_channels: expected 4, those of the 4 groups"):
        depthwise(normal(2, 4, 5, 5), 6)


def test_autocast_as_torch_has_it() -> None:
    slim, plain = SlimConv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
    plain.load_state_dict(slim.state_dict())
    x = normal(2, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = slim(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, plain(x), rtol=1e-2, atol=1e-2)
    y.float().sum().backward()
    assert slim.weight.grad.dtype == torch.float32


def test_compiled_at_two_widths() -> None:
    model = torch.nn.Sequential(SlimConv2d(3, 16, 3), SlimNorm2d(16, "layer", relu=True))
    torch.compiler.reset()
    run = torch.compile(model, backend="eager", fullgraph=True)
    for width in (1.0, 0.5):
        with use_width(model, width):
            torch.testing.assert_close(run(X), model(X))
    torch.compiler.reset()


def test_layers_run_without_data() -> None:
    with torch.device("meta"):
        linear, conv, x = SlimLinear(16, 24), SlimConv2d(3, 16, 3, padding=1), torch.empty(2, 3, 8, 8)
    assert conv(x, 0.5).shape == (2, 8, 8, 8)
    assert linear(conv(x).mean((2, 3)), 0.5).shape == (2, 16)
