"""Controllable multi-task networks: widths by configuration, the sandwich step, distillation, calibration, export, operations."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from slim_networks import TARGETS, PlainNetwork, X, normal, slim_network, staged_network
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from torch.utils.flop_counter import FlopCounterMode

from taskloom.methods.channels.controllable_mtl import (
    SlimMultiTask,
    WidthConfig,
    calibrate,
    ci_kd_loss,
    count_flops,
    export,
    sandwich_step,
)

FULL = WidthConfig(1.0, {"a": 1.0, "b": 1.0})
MIXED = WidthConfig(0.5, {"a": 0.25, "b": 1.0})
PER_LAYER = WidthConfig((8, 0.75), {"a": 0.5, "b": (8,)})
LOSSES = {"a": cross_entropy, "b": cross_entropy}
BATCHES = [normal(6, 3, 8, 8, seed=seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only cost time at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(expected)
    for task, output in expected.items():
        torch.testing.assert_close(found[task], output, rtol=tolerance, atol=tolerance)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(one) if one.grad is None else one.grad.clone() for name, one in model.named_parameters()}


def test_full_width_is_the_plain_network() -> None:
    model, plain = slim_network().double(), PlainNetwork().double()
    plain.load_state_dict(model.state_dict())
    z = plain.encoder(X.double())
    _close(model(X.double(), FULL), {task: decoder(z) for task, decoder in plain.decoders.items()}, 1e-12)


def test_narrow_is_the_whole_network_with_its_other_channels_set_to_zero() -> None:
    model = slim_network().double()
    x, (first, depthwise, _, last, _) = X.double(), model.encoder

    def kept(y: Tensor, channels: int) -> Tensor:
        mask = torch.zeros(y.shape[1], dtype=torch.float64)
        mask[:channels] = 1
        return y * mask.view(1, -1, *[1] * (y.dim() - 2))

    def dense(conv: Any, y: Tensor) -> Tensor:
        return nn.functional.conv2d(y, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)

    z = kept(dense(last, kept(dense(depthwise, kept(dense(first, x), 8)), 8).relu()), 16).relu()
    expected = {}
    for task, hidden in (("a", 8), ("b", 32)):
        _, into, _, out = model.decoders[task]
        expected[task] = nn.functional.linear(
            kept(nn.functional.linear(z.flatten(1), into.weight, into.bias), hidden).relu(), out.weight, out.bias
        )
    _close(model(x, MIXED), expected, 1e-12)
    features = model.features(x, MIXED)
    assert isinstance(features, Tensor)
    torch.testing.assert_close(features, z[:, :16], rtol=1e-12, atol=1e-12)


def test_widths_per_layer() -> None:
    model = slim_network()
    assert model.parts == (("0",), ("3",))
    assert model.decoder_parts("a") == (("1",),)
    assert model.widths(PER_LAYER) == {"encoder.0": 8, "encoder.3": 0.75, "decoders.a": 0.5, "decoders.b.1": 8}
    plain = export(model, PER_LAYER, X)
    shapes = {name: tuple(one.shape) for name, one in plain.named_parameters() if name.endswith("weight")}
    assert shapes["encoder.0.weight"] == (8, 3, 3, 3)
    assert shapes["encoder.3.weight"] == (24, 8, 3, 3)
    assert shapes["decoders.a.1.weight"] == (16, 24 * 9)
    assert shapes["decoders.b.1.weight"] == (8, 24 * 9)


def test_parts_share_a_width() -> None:
    model = SlimMultiTask(slim_network().encoder, {"a": nn.Flatten()}, parts=[("0", "3")])
    found = model.features(X, WidthConfig((0.5,), {"a": 1.0}))
    expected = slim_network().features(X, WidthConfig(0.5, {"a": 1.0, "b": 1.0}))
    assert isinstance(found, Tensor)
    assert found.equal(expected)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["0"], "'3' is in none"),
        (["0", "3", "7"], "got '7'"),
        ([("0", "3"), "3"], "got '3' again"),
    ],
)
def test_parts_cover_the_encoder_once(parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlimMultiTask(slim_network().encoder, {"a": nn.Flatten()}, parts=parts)


def test_tasks_are_chosen() -> None:
    model = slim_network()
    only = model(X, MIXED, tasks=["b"])
    assert list(only) == ["b"]
    assert only["b"].equal(model(X, MIXED)["b"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(X, MIXED, tasks=["c"]), "no task 'c'; the tasks are a, b"),
        (lambda model: model(X, WidthConfig(1.0, {"a": 1.0})), "'b' is missing"),
        (lambda model: model(X, WidthConfig(1.0, {"a": 1.0, "b": 1.0, "c": 1.0})), "no task 'c'"),
        (lambda model: sandwich_step(model, X, TARGETS, {"a": cross_entropy}), "losses: expected every task, 'b' is missing"),
        (lambda model: sandwich_step(model, X, {**TARGETS, "c": X}, LOSSES), "targets: there is no task 'c'"),
        (lambda model: sandwich_step(model, X, TARGETS, LOSSES, weights={"a": 1.0}), "weights: expected every task"),
        (lambda model: count_flops(model, WidthConfig(1.0, {"a": 1.0}), X.shape), "'b' is missing"),
    ],
)
def test_unknown_and_missing_tasks(call: Any, message: str) -> None:
    with pytest.raises(KeyError, match=message):
        call(slim_network())


@pytest.mark.parametrize("width", [0.0, -0.5, 1.5, float("nan")])
def test_ratios_are_in_their_range(width: float) -> None:
    with pytest.raises(ValueError, match=r"encoder: expected a ratio in \(0, 1\]"):
        WidthConfig(width, {})
    with pytest.raises(ValueError, match=r"decoders\['a'\]: expected a ratio in \(0, 1\]"):
        WidthConfig(1.0, {"a": width})
    with pytest.raises(ValueError, match=r"encoder\[1\]: expected a ratio in \(0, 1\]"):
        WidthConfig((0.5, width), {})
    with pytest.raises(ValueError, match="widths: expected a ratio"):
        sandwich_step(slim_network(), X, TARGETS, LOSSES, widths=(width, 1.0))


def test_other_bad_widths() -> None:
    model = slim_network()
    for width in (1, True, "half", None):
        with pytest.raises(TypeError, match=r"encoder: expected a ratio such as 0\.5"):
            WidthConfig(width, {})
    with pytest.raises(ValueError, match=r"encoder\[0\]: expected at least 1 channel, got 0"):
        WidthConfig((0, 0.5), {})
    with pytest.raises(ValueError, match="expected 1 to 16 channels, got 17"):
        model(X, WidthConfig((17, 1.0), FULL.decoders))
    with pytest.raises(ValueError, match=r"config\.encoder: expected 2 widths, one per part, got 3"):
        model(X, WidthConfig((1.0, 1.0, 1.0), FULL.decoders))
    with pytest.raises(ValueError, match="x: expected 1 to 3 channels"):
        model(normal(2, 4, 8, 8), FULL)
    plain = SlimMultiTask(PlainNetwork().encoder, {"a": nn.Flatten()})
    assert plain(X, WidthConfig(1.0, {"a": 1.0}))["a"].shape == (4, 288)
    with pytest.raises(ValueError, match=r"config\.encoder: expected 1\.0 for a network without slim layers, got 0.5"):
        plain(X, WidthConfig(0.5, {"a": 1.0}))
    with pytest.raises(ValueError, match="decoders: expected one per task, got none"):
        SlimMultiTask(nn.Identity(), {})


def test_configurations_are_compared_by_their_widths() -> None:
    assert WidthConfig(0.5, {"a": 1.0, "b": 0.5}) == WidthConfig(0.5, {"b": 0.5, "a": 1.0})
    assert len({WidthConfig((1, 0.5), {}), WidthConfig((1.0, 0.5), {}), WidthConfig([1, 0.5], {})}) == 2
    assert WidthConfig(0.5, {}) != WidthConfig(0.25, {})
    assert pickle.loads(pickle.dumps(MIXED)) == MIXED


def test_gradients_stay_in_the_prefix_and_add() -> None:
    model = slim_network()
    narrow = WidthConfig(0.5, {"a": 0.25, "b": 0.25})

    def backward(config: WidthConfig) -> None:
        sum(output.square().sum() for output in model(X, config).values()).backward()

    backward(narrow)
    first = _gradients(model)
    assert first["encoder.3.weight"][:16, :8].count_nonzero() > 0
    for outside in (first["encoder.3.weight"][16:], first["encoder.3.weight"][:, 8:], first["encoder.0.bias"][8:]):
        assert not outside.any()
    assert not first["decoders.a.1.weight"][8:].any()
    assert not first["decoders.a.1.weight"][:, 16 * 9 :].any()
    assert not first["decoders.a.3.weight"][:, 8:].any()
    model.zero_grad()
    backward(MIXED)
    second = _gradients(model)
    model.zero_grad()
    backward(narrow)
    backward(MIXED)
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, first[name] + second[name], rtol=1e-6, atol=1e-6)


def test_narrow_outputs_do_not_depend_on_what_lies_outside() -> None:
    model = slim_network()
    narrower = WidthConfig((8, 8), {"a": 0.25, "b": 0.25})
    configs = [WidthConfig(0.5, {"a": 0.25, "b": 0.5}), narrower]
    before = [model(X, config) for config in configs]
    with torch.no_grad():
        model.encoder[0].weight[8:], model.encoder[0].bias[8:] = 7.0, torch.nan
        model.encoder[1].weight[8:] = torch.nan
        model.encoder[3].weight[16:], model.encoder[3].weight[:, 8:] = torch.inf, torch.nan
        model.decoders["a"][1].weight[8:], model.decoders["a"][1].weight[:, 16 * 9 :] = torch.nan, -3.0
        model.decoders["b"][3].weight[:, 16:] = torch.nan
    for config, expected in zip(configs, before, strict=True):
        found = model(X, config)
        assert all(found[task].equal(expected[task]) for task in expected)


@pytest.mark.parametrize("kind", [None, "layer", "group", "batch"])
@pytest.mark.parametrize("config", [MIXED, PER_LAYER, FULL])
def test_export_is_the_same_and_costs_the_same(kind: str | None, config: WidthConfig) -> None:
    model = slim_network(kind).eval()
    if kind == "batch" and config != FULL:
        with pytest.raises(RuntimeError, match="was not calibrated"):
            model(X, config)
        calibrate(model, config, [(batch, None) for batch in BATCHES])
    plain = export(model, config, X[:1])
    _close(plain(X), model(X, config), 1e-6)
    assert not [module for module in plain.modules() if type(module).__module__.startswith("taskloom")]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(X)
    assert counter.get_total_flops() == count_flops(model, config, X.shape) > 0


def test_exported_network_is_loaded_without_the_library(tmp_path: Path) -> None:
    model = slim_network("layer").eval()
    torch.save(export(model, MIXED, X), tmp_path / "plain.pt")
    torch.save((X, model(X, MIXED)), tmp_path / "expected.pt")
    script = (
        "import sys, torch; plain = torch.load(sys.argv[1], weights_only=False); x, expected = torch.load(sys.argv[2]);"
        "[torch.testing.assert_close(plain(x)[task], y, rtol=1e-5, atol=1e-6) for task, y in expected.items()];"
        "assert not any(name.split('.')[0] == 'taskloom' for name in sys.modules); print('same')"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "plain.pt"), str(tmp_path / "expected.pt")]
    assert subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip() == "same"


def test_training_makes_statistics_of_narrow_configurations_invalid() -> None:
    model = slim_network("batch")
    calibrate(model, MIXED, BATCHES, num_batches=2)
    model.eval()
    model(X, MIXED)
    sandwich_step(model.train(), X, TARGETS, LOSSES, samples=0)
    with pytest.raises(RuntimeError, match="was not calibrated"):
        model.eval()(X, MIXED)
    with pytest.raises(ValueError, match="expected at least one batch"):
        calibrate(model, MIXED, [])
    with pytest.raises(ValueError, match="expected SlimNorm2d layers of kind 'batch'"):
        calibrate(slim_network(), MIXED, BATCHES)


def test_operations_are_those_of_the_active_layers() -> None:
    model = slim_network()
    encoder = 3 * 9 * 8 * 64 + 9 * 8 * 64 + 8 * 9 * 16 * 9
    decoders = 16 * 9 * 8 + 8 * 5 + 16 * 9 * 32 + 32 * 7
    assert count_flops(model, MIXED, (1, 3, 8, 8)) == 2 * (encoder + decoders)
    assert count_flops(model, MIXED, (5, 3, 8, 8)) == 10 * (encoder + decoders)
    assert count_flops(slim_network("batch"), MIXED, (1, 3, 8, 8)) == 2 * (encoder + decoders)


def _summed_gradients(
    model: SlimMultiTask, x: Tensor, narrow: list[WidthConfig], gamma: float, weights: dict[str, float]
) -> dict[str, Tensor]:
    """The gradients of one loss over all configurations, with the teacher's features cut off."""

    def loss(config: WidthConfig) -> Tensor:
        outputs = model(x, config)
        return sum(weights[task] * cross_entropy(outputs[task], TARGETS[task]) for task in outputs)

    whole = model.features(x, FULL).detach()
    total = loss(FULL)
    for config in narrow:
        z = model.features(x, config)
        total = total + loss(config) + gamma * (1 - cosine_similarity(z.flatten(1), whole[:, : z.shape[1]].flatten(1))).mean()
    model.zero_grad()
    total.backward()
    return _gradients(model)


@contextmanager
def noted_configs(model: SlimMultiTask) -> Iterator[list[WidthConfig]]:
    """The configurations that a model is run with inside the block, in order."""
    seen: list[WidthConfig] = []
    run = model.run

    def note(x: Tensor, config: WidthConfig, tasks: Any = None) -> Any:
        seen.append(config)
        return run(x, config, tasks)

    with patch.object(model, "run", note):
        yield seen


@pytest.mark.parametrize("samples", [0, 2])
def test_sandwich_step_adds_the_gradients_of_its_configurations(samples: int) -> None:
    model, weights = slim_network().double(), {"a": 1.0, "b": 0.25}
    generator = torch.Generator().manual_seed(3)
    with noted_configs(model) as seen:
        reported = sandwich_step(model, X.double(), TARGETS, LOSSES, samples, 0.7, generator, weights=weights)
    found = _gradients(model)
    assert seen[0] == FULL
    assert seen[1] == WidthConfig(0.25, {"a": 0.25, "b": 0.25})
    assert len(seen) == 2 + samples
    assert set(reported) == {"largest", "smallest", "distillation"} | ({"random"} if samples else set())
    assert not any(value.requires_grad for value in reported.values())
    for name, gradient in _summed_gradients(model, X.double(), seen[1:], 0.7, weights).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


def test_random_widths_are_independent_and_repeat() -> None:
    model = slim_network()
    with noted_configs(model) as seen:
        for _ in range(2):
            sandwich_step(model, X[:1], {task: one[:1] for task, one in TARGETS.items()}, LOSSES, 60, 0.0, torch.Generator().manual_seed(1))
        assert seen[:62] == seen[62:]
        drawn = seen[2:62]
        for widths in ([one.encoder for one in drawn], [one.decoders["a"] for one in drawn], [one.decoders["b"] for one in drawn]):
            assert set(widths) == {0.25, 0.5, 0.75, 1.0}
        assert len(set(drawn)) > 25
        seen.clear()
        sandwich_step(model, X, TARGETS, LOSSES, 8, 0.0, widths=(0.5, 1.0), decoder_widths=(1.0,), per_layer=True)
        assert seen[1] == WidthConfig(0.5, FULL.decoders)
        assert all(one.decoders == FULL.decoders for one in seen)
        assert {len(one.encoder) for one in seen[2:] if isinstance(one.encoder, tuple)} == {2}
        assert all(isinstance(one.encoder, tuple) for one in seen[2:])


def test_sandwich_step_refuses_bad_numbers() -> None:
    for options in ({"samples": -1}, {"gamma": -0.1}, {"gamma": float("nan")}):
        with pytest.raises(ValueError, match="expected samples and gamma of at least 0"):
            sandwich_step(slim_network(), X, TARGETS, LOSSES, **options)
    model = slim_network()
    with pytest.raises(ValueError, match="kind: expected one of prefix_cos, prefix_mse, attention"):
        sandwich_step(model, X, TARGETS, LOSSES, kind="cosine")
    with pytest.raises(ValueError, match="widths: expected at least one ratio"):
        sandwich_step(model, X, TARGETS, LOSSES, widths=())
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 1.5}, TypeError, "samples: expected an integer, got float"),
        ({"weights": {"a": -1.0, "b": 1.0}}, ValueError, "weights: expected finite numbers of at least 0, got -1.0 for task 'a'"),
        ({"weights": {"a": 1.0, "b": math.nan}}, ValueError, "weights: expected finite numbers of at least 0, got nan for task 'b'"),
        (
            {"losses": {"a": cross_entropy, "b": lambda output, target: cross_entropy(output, target, reduction="none")}},
            ValueError,
            r"losses: expected a scalar for task 'b', got shape \(4,\)",
        ),
    ],
)
def test_sandwich_step_refuses_what_would_train_something_else(options: Any, error: type[Exception], message: str) -> None:
    model = slim_network()
    with pytest.raises(error, match=f"sandwich_step: {message}"):
        sandwich_step(model, X, TARGETS, **{"losses": LOSSES, **options})
    assert all(one.grad is None for one in model.parameters())


def test_sandwich_step_with_a_gradient_scaler() -> None:
    model = slim_network()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sandwich_step(
        model, X, TARGETS, LOSSES, generator=torch.Generator().manual_seed(1), backward=lambda loss: scaler.scale(loss).backward()
    )
    scaler.unscale_(optimizer)
    scaled = _gradients(model)
    model.zero_grad()
    sandwich_step(model, X, TARGETS, LOSSES, generator=torch.Generator().manual_seed(1))
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(scaled[name], gradient, rtol=1e-6, atol=1e-7)


def test_training_repeats_bit_by_bit() -> None:
    def trained(seed: int) -> list[Tensor]:
        model = slim_network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            optimizer.zero_grad()
            sandwich_step(model, X, TARGETS, LOSSES, generator=generator)
            optimizer.step()
        return [one.detach() for one in model.parameters()]

    first, second, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(one, same) for one, same in zip(first, second, strict=True))
    assert not all(torch.equal(one, same) for one, same in zip(first, other, strict=True))


def test_threads_run_configurations_of_their_own() -> None:
    """A server that answers two users with one model."""
    model = slim_network().eval()
    expected = {config: model(X, config) for config in (MIXED, WidthConfig(1.0, {"a": 1.0, "b": 0.25}))}
    barrier = threading.Barrier(2, timeout=60)
    for layer in (model.encoder[0], model.encoder[3], model.decoders["a"][1], model.decoders["b"][1]):
        layer.register_forward_pre_hook(lambda module, arguments: (barrier.wait(), None)[1])
    found: dict[WidthConfig, dict[str, Tensor]] = {}

    def work(config: WidthConfig) -> None:
        found[config] = model(X, config)

    threads = [threading.Thread(target=work, args=(config,)) for config in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for config, outputs in expected.items():
        _close(found[config], outputs, 0)


def test_copies_and_saved_models_are_the_same() -> None:
    model = slim_network("batch").eval()
    calibrate(model, MIXED, BATCHES)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    fresh = slim_network("batch").eval()
    with torch.no_grad():
        fresh.encoder[0].weight.zero_()
    fresh.load_state_dict(torch.load(saved))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        _close(twin(X, MIXED), model(X, MIXED), 0)
        _close(twin(X, FULL), model(X, FULL), 0)


@torch.no_grad()
def test_compiled_at_several_configurations() -> None:
    model = slim_network().eval()
    torch.compiler.reset()
    run = torch.compile(model, backend="eager")
    for config in (MIXED, FULL, MIXED):
        _close(run(X, config), model(X, config), 1e-6)
    torch.compiler.reset()


def test_sandwich_step_under_autocast() -> None:
    model = slim_network("layer")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sandwich_step(model, X, TARGETS, LOSSES, samples=0)
    exact = sandwich_step(model, X, TARGETS, LOSSES, samples=0)
    assert all(one.grad is not None and one.grad.isfinite().all() for one in model.parameters())
    for name, value in exact.items():
        torch.testing.assert_close(mixed[name].float(), value, rtol=0.05, atol=0.02)


def test_every_stage_may_be_distilled() -> None:
    model = staged_network()
    targets, config = {"a": TARGETS["a"] % 3, "b": TARGETS["b"] % 3}, WidthConfig(0.25, {"a": 0.25, "b": 0.25})
    whole, narrow = model.features(X, FULL), model.features(X, config)
    stages = [ci_kd_loss(student, teacher) for student, teacher in zip(narrow, whole, strict=True)]
    last = sandwich_step(model, X, targets, LOSSES, samples=0)["distillation"]
    torch.testing.assert_close(last, stages[1].detach())
    every = sandwich_step(model, X, targets, LOSSES, samples=0, every_stage=True)["distillation"]
    torch.testing.assert_close(every, torch.stack(stages).mean().detach())
    plain = export(model, config, X)
    _close(plain(X), model.eval()(X, config), 1e-6)


def test_distances_are_those_of_their_formulas() -> None:
    student, teacher = normal(5, 6, 3, 4).double(), normal(5, 8, 3, 4, seed=1).double()
    prefix = teacher[:, :6]
    cosine = cosine_similarity(student.flatten(1), prefix.flatten(1))
    torch.testing.assert_close(ci_kd_loss(student, teacher), (1 - cosine).mean(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ci_kd_loss(student, teacher, "prefix_mse"), (student - prefix).pow(2).mean())
    maps = [normalize(z.pow(2).mean(1).flatten(1)) for z in (student, teacher)]
    torch.testing.assert_close(ci_kd_loss(student, teacher, "attention"), (maps[0] - maps[1]).pow(2).sum(1).mean())
    own = ci_kd_loss(student, teacher, lambda z, whole: (z.mean() - whole.mean()).abs())
    torch.testing.assert_close(own, (student.mean() - teacher.mean()).abs())


@pytest.mark.parametrize("kind", ["prefix_cos", "prefix_mse", "attention"])
def test_distances_of_what_is_the_same_are_zero(kind: str) -> None:
    z = normal(5, 6, 3, 4).requires_grad_()
    found = ci_kd_loss(z, z, kind)
    assert found.item() == 0
    teacher = normal(5, 8, 3, 4, seed=1).requires_grad_()
    ci_kd_loss(z, teacher, kind).backward()
    assert teacher.grad is None
    assert z.grad is not None
    assert z.grad.any()
    torch.testing.assert_close(ci_kd_loss([z, z], [z, teacher], kind), ci_kd_loss(z, teacher, kind) / 2)
    half = ci_kd_loss(z.bfloat16(), teacher.bfloat16(), kind)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, ci_kd_loss(z, teacher, kind), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 7.0, 1e4])
def test_prefix_cos_does_not_depend_on_scale(scale: float) -> None:
    student, teacher = normal(5, 6, 3, 4), normal(5, 8, 3, 4, seed=1)
    torch.testing.assert_close(ci_kd_loss(scale * student, teacher), ci_kd_loss(student, teacher), rtol=0, atol=1e-6)


def test_features_of_zeros_have_finite_gradients() -> None:
    student, teacher = normal(3, 4), normal(3, 6, seed=1)
    student[1] = 0
    student.requires_grad_()
    found = ci_kd_loss(student, teacher)
    torch.testing.assert_close(found, (1 - cosine_similarity(student, teacher[:, :4])).mean())
    found.backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 10


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "message"),
    [
        (normal(2, 6, 3), normal(2, 4, 3), "prefix_cos", "at most the teacher's 4 channels, got 6"),
        (normal(2, 4, 3), normal(2, 4, 5), "prefix_mse", "that differ in C only"),
        (normal(2, 4, 3), normal(3, 4, 3), "prefix_cos", "that differ in C only"),
        (normal(4), normal(4), "prefix_cos", "that differ in C only"),
        (normal(2, 4), normal(2, 4), "attention", "expected positions"),
        (normal(2, 4), normal(2, 4), "l2", "kind: expected one of"),
        ([normal(2, 4)], [normal(2, 4), normal(2, 4)], "prefix_cos", "as many stages, got 1 and 2"),
        ([], [], "prefix_cos", "as many stages, got 0 and 0"),
    ],
)
def test_features_that_cannot_be_compared(student: Any, teacher: Any, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ci_kd_loss(student, teacher, kind)
