"""Normalisation behind slim layers, its calibration, and models exported at a width."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SlimNet, normal
from torch import Tensor, nn

from taskloom.nn import SlimConv2d, SlimLinear, SlimNorm2d, calibrate, export, use_width

X = normal(4, 3, 8, 8)
BATCHES = [normal(6, 3, 8, 8, seed=seed) for seed in range(3)]
MIXED = {"encoder": 0.5, "decoders.a": 0.25}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_full_width_is_batch_norm(momentum: float | None) -> None:
    plain, slim = nn.BatchNorm2d(6, momentum=momentum).double(), SlimNorm2d(6, momentum=momentum).double()
    with torch.no_grad():
        plain.weight.copy_(normal(6)), plain.bias.copy_(normal(6, seed=1))
    slim.load_state_dict(plain.state_dict())
    for seed in range(3):
        x = normal(4, 6, 3, 5, seed=seed).double()
        torch.testing.assert_close(slim(x), plain(x), rtol=1e-12, atol=1e-12)
    assert list(slim.state_dict()) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(slim.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slim.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)
    plain.load_state_dict(slim.state_dict())


def test_kinds_without_a_batch() -> None:
    layer, group = SlimNorm2d(12, "layer", relu=True), SlimNorm2d(12, "group", groups=4)
    x = normal(3, 6, 5, 4)
    torch.testing.assert_close(layer(x), nn.GroupNorm(1, 6)(x).relu(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x[:, :, 0, 0]), nn.LayerNorm(6)(x[:, :, 0, 0]).relu(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(group(x), nn.GroupNorm(2, 6)(x), rtol=1e-5, atol=1e-6)
    group.load_state_dict(nn.GroupNorm(4, 12).state_dict())
    with pytest.raises(ValueError, match="expected a multiple of the 3 channels of a group, got 4"):
        group(x[:, :4])


def test_a_plain_checkpoint_of_a_model() -> None:
    model = nn.Sequential(SlimConv2d(3, 16, 3), SlimNorm2d(16), nn.Flatten(), SlimLinear(16 * 36, 5))
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 36, 5))
    plain(X)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model.eval()(X), plain.eval()(X), rtol=1e-5, atol=1e-5)


def test_evaluation_before_calibration_is_an_error() -> None:
    model = SlimNet("batch").eval()
    model(X)
    for widths in (0.5, MIXED):
        with use_width(model, widths), pytest.raises(RuntimeError, match="was not calibrated"):
            model(X)
    with pytest.raises(RuntimeError, match="configuration 8 channels was not calibrated"):
        SlimNorm2d(16).eval()(normal(2, 8, 3, 3))


def test_calibration_is_the_average_of_batches() -> None:
    model = SlimNet("batch")
    model.encoder[0].train()
    running = model.encoder[1].running_mean.clone()
    calibrate(model, 0.5, [(batch, None) for batch in BATCHES])
    assert model.encoder[0].training
    norm, conv = model.encoder[1], model.encoder[0]
    mean, var = norm.calibrated["0.5"]
    values = [nn.functional.conv2d(batch, conv.weight[:8], padding=1) for batch in BATCHES]
    torch.testing.assert_close(mean, torch.stack([one.mean((0, 2, 3)) for one in values]).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var, torch.stack([one.var((0, 2, 3)) for one in values]).mean(0), rtol=1e-4, atol=1e-5)
    assert norm.running_mean.equal(running)
    model.eval()
    with use_width(model, 0.5):
        y = model(X)["a"]
        assert model(X[:2])["a"].allclose(y[:2], atol=1e-5)
    with use_width(model, MIXED), pytest.raises(RuntimeError, match="not calibrated"):
        model(X)


def test_calibrations_are_kept_side_by_side_and_saved() -> None:
    model = SlimNet("batch")
    for widths in (0.5, MIXED, 1.0):
        calibrate(model, widths, iter(BATCHES), num_batches=2)
    other = SlimNet("batch", seed=1)
    other.load_state_dict(model.state_dict())
    for widths in (0.5, MIXED, 1.0):
        with use_width(model.eval(), widths), use_width(other.eval(), widths):
            assert model(X)["b"].equal(other(X)["b"])
    assert model.encoder[1].num_batches_tracked == 2
    model.train()
    model(X)
    with use_width(model.eval(), 0.5), pytest.raises(RuntimeError, match="or was before training"):
        model(X)
    assert not any("calibrated" in key for key in model.state_dict())


def test_a_failed_calibration_changes_nothing() -> None:
    model = SlimNet("batch").eval()
    calibrate(model, 0.5, BATCHES)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(model, 0.5, [])
    with pytest.raises(ValueError, match="x: expected"):
        calibrate(model, 0.5, [X, normal(2, 4, 8, 8)])
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    with use_width(model, 0.5):
        model(X)


def test_what_cannot_be_calibrated() -> None:
    with pytest.raises(ValueError, match="expected SlimNorm2d layers of kind 'batch', got none"):
        calibrate(SlimNet("layer"), 0.5, BATCHES)
    model = nn.Sequential(SlimConv2d(3, 8, 1), SlimNorm2d(8), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="in the place of BatchNorm2d '2'"):
        calibrate(model, 1.0, BATCHES)
    with pytest.raises(ValueError, match="calibrate: num_batches: expected at least 1, got -1"):
        calibrate(SlimNet("batch"), 0.5, BATCHES, -1)
    with pytest.raises(TypeError, match="or give forward"):
        calibrate(SlimNet("batch"), 0.5, [{"x": X}])
    model = SlimNet("batch")
    calibrate(model, 0.5, [{"x": X}], forward=lambda batch: model(batch["x"]))


def test_switchable_widths() -> None:
    norm = SlimNorm2d(16, widths=[0.5, 1.0, 12])
    plain = nn.BatchNorm2d(16)
    plain(normal(4, 16, 3, 3))
    with torch.no_grad():
        plain.weight.copy_(normal(16, seed=1))
    norm.load_state_dict(plain.state_dict())
    assert norm.narrow is not None
    assert norm.narrow["8"].weight.equal(plain.weight[:8])
    x = normal(4, 8, 3, 3, seed=2)
    with pytest.raises(RuntimeError, match="the width of 8 channels has no statistics"):
        norm.eval()(x)
    expected = nn.BatchNorm2d(8)
    expected.load_state_dict(norm.narrow["8"].state_dict())
    for _ in range(2):
        torch.testing.assert_close(norm.train()(x), expected(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.eval()(x), expected.eval()(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one of the widths 8, 12, 16, which have statistics, got 4"):
        norm(x[:, :4])
    other = SlimNorm2d(16, widths=[8, 12])
    other.load_state_dict(norm.state_dict())
    assert other.eval()(x).equal(norm(x))
    model = nn.Sequential(SlimConv2d(3, 16, 3), norm)
    calibrate(model, {"0": 12}, BATCHES)
    assert norm.narrow["12"].num_batches_tracked == 3


@pytest.mark.parametrize("kind", ["layer", "group", "batch"])
@pytest.mark.parametrize("widths", [1.0, 0.5, MIXED, {"encoder.0": 8, "decoders": 0.5}])
def test_export_is_the_model_at_its_width(kind: str, widths: Any) -> None:
    model = SlimNet(kind)
    if kind == "batch":
        with pytest.raises(RuntimeError, match="not calibrated") if widths != 1.0 else _nothing():
            export(model, widths, X)
        calibrate(model, widths, BATCHES)
    model.eval()
    plain = export(model, widths, X)
    assert not any(type(module).__module__.startswith("taskloom") for module in plain.modules())
    with use_width(model, widths):
        for name, y in model(BATCHES[0]).items():
            torch.testing.assert_close(plain(BATCHES[0])[name], y, rtol=1e-6, atol=1e-6)
    before = [one.clone() for one in plain.parameters()]
    with torch.no_grad():
        for one in model.parameters():
            one.zero_()
    assert all(one.equal(old) for one, old in zip(plain.parameters(), before, strict=True))


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_an_exported_model_needs_no_library(tmp_path: Path) -> None:
    model = nn.Sequential(SlimConv2d(3, 16, 3), SlimNorm2d(16, "layer", relu=True), nn.Flatten(), SlimLinear(16 * 36, 5, slim_output=False))
    plain = export(model, 0.5, X)
    assert plain[0].weight.shape == (8, 3, 3, 3)
    assert plain[3].weight.shape == (5, 8 * 36)
    torch.save((plain, X, plain(X)), tmp_path / "model.pt")
    check = (
        "import sys; sys.modules['taskloom'] = None\nimport torch\n"
        f"model, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert torch.allclose(model(x), y, atol=1e-6)\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
    assert isinstance(export(SlimLinear(8, 16), 0.5, normal(2, 8)), nn.Linear)


def test_what_cannot_be_exported() -> None:
    class Explicit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = SlimLinear(8, 16), SlimLinear(8, 8)

        def forward(self, x: Tensor, how: str) -> Tensor:
            if how == "explicit":
                return self.layer(x, 0.5)
            return self.layer(x) if how == "once" else self.layer(x) + self.layer(x[:, :4])

    model, x = Explicit(), normal(2, 8)
    for how, message in (
        ("explicit", "'layer' is called with an out_width"),
        ("twice", "at several widths"),
        ("once", "'other' is not reached"),
    ):
        with pytest.raises(ValueError, match=message):
            export(model, 0.5, x, how)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "instance"}, "kind: expected one of layer, group, batch, got 'instance'"),
        ({"kind": "layer", "widths": [0.5]}, "widths: expected None for kind 'layer'"),
        ({"kind": "group", "groups": 5}, "groups: expected a divisor of 16"),
        ({"groups": 2}, r"groups: expected a divisor of 16 channels \(1 unless"),
        ({"widths": [1.5]}, r"widths: expected a ratio in \(0, 1\]"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlimNorm2d(16, **arguments)


def test_settings_of_wrong_types() -> None:
    with pytest.raises(TypeError, match="SlimNorm2d: groups: expected an integer, got float"):
        SlimNorm2d(16, "group", groups=2.0)
    with pytest.raises(TypeError, match="SlimNorm2d: widths: expected a sequence of ratios or integers, got float"):
        SlimNorm2d(16, widths=0.5)


def test_more_channels_than_there_are() -> None:
    with pytest.raises(ValueError, match="x: expected at most 4 channels, got 5"):
        SlimNorm2d(4)(normal(2, 5, 3, 3))
