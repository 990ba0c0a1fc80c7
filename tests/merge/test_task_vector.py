"""Task vectors in memory: differences, algebra, products, and what they are applied to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import taskloom
from taskloom import TaskVector

SHAPES = {"encoder.weight": (7, 13), "encoder.bias": (13,), "scale": (), "empty": (0, 3), "deep": (2, 1, 3, 5)}


def state_dict(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in SHAPES.items()}
    return {**tensors, "steps": torch.tensor(seed), "flags": torch.tensor([True, False])}


def vector(seed: int, regime: str = "nonlinear") -> TaskVector:
    return TaskVector(state_dict(0), state_dict(seed), regime=regime)


def test_difference_is_of_the_floating_point_tensors_in_order() -> None:
    base, tuned = state_dict(0), state_dict(1)
    tau = TaskVector(base, tuned)
    assert tau.names == tuple(SHAPES)
    assert list(tau) == list(SHAPES)
    assert len(tau) == 5
    assert "steps" not in tau
    assert tau.numel == 7 * 13 + 13 + 1 + 30
    assert tau.shapes == SHAPES
    assert tau.dtype == torch.float32
    assert tau.regime == "nonlinear"
    for name, delta in tau.items():
        torch.testing.assert_close(delta, tuned[name] - base[name], rtol=0, atol=0)


def test_small_bfloat16_updates_survive() -> None:
    base = {"w": torch.tensor([1.0, 100.0], dtype=torch.bfloat16)}
    tuned = {"w": torch.tensor([1.0078125, 99.5], dtype=torch.bfloat16)}
    tau = TaskVector(base, tuned)
    assert tau["w"].tolist() == [0.0078125, -0.5]
    assert torch.equal(tau.apply_to(base)["w"], tuned["w"])


def test_float64_where_either_is() -> None:
    base, tuned = state_dict(0), state_dict(1)
    tuned["scale"] = tuned["scale"].double()
    tau = TaskVector(base, tuned)
    assert tau.dtypes["scale"] == torch.float64
    assert tau.dtypes["deep"] == torch.float32
    assert tau.dtype == torch.float64
    assert TaskVector(base, tuned, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_from_models_stores_float16() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.25)
    tau = TaskVector.from_models(model, tuned)
    assert tau.dtype == torch.float16
    assert tau.names == ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    assert not any(delta.requires_grad for delta in tau.values())
    with pytest.raises(ValueError, match=r"'w': the difference overflows torch.float16 at entry 1"):
        TaskVector.from_models({"w": torch.zeros(2)}, {"w": torch.tensor([0.0, 1e5])})


def test_what_is_done_to_the_models_later_changes_nothing() -> None:
    base, tuned = state_dict(0), state_dict(1)
    tau, given = TaskVector(base, tuned), TaskVector.from_deltas({"w": tuned["scale"]})
    before, scale = tau["deep"].clone(), float(tuned["scale"])
    tuned["deep"].zero_()
    tuned["scale"].zero_()
    assert torch.equal(tau["deep"], before)
    assert float(given["w"]) == scale


def test_algebra() -> None:
    one, two = vector(1), vector(2)
    for made, expected in (
        (one + two, lambda a, b: a + b),
        (one - two, lambda a, b: a - b),
        (-one + 0 * two, lambda a, b: -a),
        (0.5 * one, lambda a, b: 0.5 * a),
        (np.float32(0.5) * one * 3, lambda a, b: 1.5 * a),
        (one / 4, lambda a, b: a / 4),
        (sum([one, two, one]), lambda a, b: 2 * a + b),
    ):
        assert isinstance(made, TaskVector)
        wanted: Callable[[Tensor, Tensor], Tensor] = expected
        for name, delta in made.items():
            torch.testing.assert_close(delta, wanted(one[name], two[name]), rtol=1e-6, atol=1e-7)


def test_inverses_are_exact() -> None:
    one, two = vector(1), vector(2)
    negated = -one
    for same in (-negated, one + two - two, two + one - two, one * 4 / 4):
        assert all(torch.equal(same[name], one[name]) for name in one)
    assert all(not delta.any() for delta in (one - one).values())
    assert (one - one).dtype == torch.float32
    assert (0 * one).norm() == 0


def test_products() -> None:
    one, two = vector(1), vector(2)
    flat = [np.concatenate([delta.double().numpy().ravel() for delta in tau.values()]) for tau in (one, two)]
    assert one.dot(two) == pytest.approx(flat[0] @ flat[1], rel=1e-12)
    assert one.norm() == pytest.approx(np.linalg.norm(flat[0]), rel=1e-12)
    assert one.cosine(two) == pytest.approx(flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]), rel=1e-12)
    assert one.cosine(one) == pytest.approx(1, rel=1e-15)
    assert one.cosine(-3 * one) == pytest.approx(-1, rel=1e-6)
    assert (one + two).dot(one - two) == pytest.approx(one.norm() ** 2 - two.norm() ** 2, rel=1e-5)
    with pytest.raises(ValueError, match="the second vector is zero"):
        one.cosine(0 * two)


def test_apply_to_a_state_dict() -> None:
    base, tuned = state_dict(0), state_dict(1)
    tau = TaskVector(base, tuned)
    target = {**base, "other": torch.ones(2, dtype=torch.float16)}
    kept = {name: tensor.clone() for name, tensor in target.items()}
    made = tau.apply_to(target, 0.5)
    assert list(made) == list(target)
    for name, tensor in made.items():
        expected = base[name] + 0.5 * (tuned[name] - base[name]) if name in SHAPES else target[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(target[name], kept[name])
    assert made["other"].data_ptr() != target["other"].data_ptr()
    half = tau.apply_to({name: tensor.half() if name in SHAPES else tensor for name, tensor in base.items()})
    assert half["deep"].dtype == torch.float16


def test_apply_to_a_module() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    tau = TaskVector.from_deltas({"0.weight": torch.full((3, 5), 2.0), "1.running_mean": torch.ones(3)})
    before = copy.deepcopy(model.state_dict())
    changed = tau.apply_to(model, -0.5)
    assert changed is not model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(changed.state_dict()["0.weight"], before["0.weight"] - 1)
    weight = model[0].weight
    assert tau.apply_to_(model) is model
    assert model[0].weight is weight
    torch.testing.assert_close(weight.detach(), before["0.weight"] + 2)
    torch.testing.assert_close(model.state_dict()["1.running_mean"], before["1.running_mean"] + 1)
    assert weight.requires_grad


def test_a_failing_apply_to_changes_nothing() -> None:
    model = nn.Linear(2, 3).half()
    before = copy.deepcopy(model.state_dict())
    tau = TaskVector.from_deltas({"weight": torch.ones(3, 2), "bias": torch.full((3,), 6e4)})
    with pytest.raises(ValueError, match=r"'bias': the target plus 2\.0 times the delta overflows torch\.float16"):
        tau.apply_to_(model, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(KeyError, match="Linear lacks 'other'"):
        TaskVector.from_deltas({"weight": torch.ones(3, 2), "other": torch.ones(1)}).apply_to_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_regimes_do_not_mix() -> None:
    one, two = vector(1), vector(2, regime="linear")
    assert two.regime == "linear"
    assert (two * 2 - two).regime == "linear"
    for mix in (lambda: one + two, lambda: one - two, lambda: one.dot(two)):
        with pytest.raises(ValueError, match=r"nonlinear, the second linear"):
            mix()
    assert (one.as_regime("linear") + two).regime == "linear"
    assert one.regime == "nonlinear"
    with pytest.raises(ValueError, match="expected 'linear' or 'nonlinear', got 'lin'"):
        one.as_regime("lin")


def test_materialize_and_to() -> None:
    one, two = vector(1), vector(2)
    assert one.materialize() is one
    both = (one + 0.5 * two).materialize()
    assert both["deep"].data_ptr() == both["deep"].data_ptr()
    assert all(torch.equal(both[name], (one + 0.5 * two)[name]) for name in one)
    narrow = one.to(dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow["deep"], one["deep"].bfloat16())
    with pytest.raises(ValueError, match=r"'scale': the delta overflows torch.float16"):
        TaskVector.from_deltas({"scale": torch.tensor(1e6)}).to(dtype=torch.float16)
    with pytest.raises(ValueError, match="expected cpu or a cuda device, got meta"):
        one.to(device="meta")


def test_bad_models() -> None:
    base = {"a": torch.ones(2), "b": torch.ones(3), "n": torch.tensor(1)}
    with pytest.raises(KeyError, match=r"finetuned lacks 'b'; base lacks 'c'"):
        TaskVector(base, {"a": torch.ones(2), "c": torch.ones(3), "n": torch.tensor(1)})
    with pytest.warns(UserWarning, match="finetuned lacks 'b'"):
        assert TaskVector(base, {"a": torch.ones(2), "n": torch.tensor(1)}, strict=False).names == ("a",)
    with pytest.raises(ValueError, match=r"'b': has shape \(2,\) in finetuned, expected \(3,\)"):
        TaskVector(base, {**base, "b": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'b' of finetuned: holds nan at entry 1"):
        TaskVector(base, {**base, "b": torch.tensor([1.0, math.nan, 1.0])})
    with pytest.raises(TypeError, match=r"'b': is torch.float32 in base and torch.int64 in finetuned"):
        TaskVector(base, {**base, "b": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(TypeError, match="complex64"):
        TaskVector({"c": torch.ones(2, dtype=torch.complex64)}, {"c": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="got one on meta"):
        TaskVector(base, {**base, "b": torch.ones(3, device="meta")})
    with pytest.raises(ValueError, match="at least one floating-point tensor"):
        TaskVector({"n": torch.tensor(1)}, {"n": torch.tensor(1)})
    with pytest.raises(TypeError, match=r"base: expected a state dict or an nn\.Module, got list"):
        TaskVector([torch.ones(2)], base)
    with pytest.raises(TypeError, match=r"expected float32, bfloat16, float16 or float64, got torch\.int8"):
        TaskVector(base, base, dtype=torch.int8)


def test_bad_algebra() -> None:
    one = vector(1)
    other = TaskVector.from_deltas({"w": torch.ones(2)})
    with pytest.raises(KeyError, match="the vectors' names differ"):
        one + other
    with pytest.raises(ValueError, match=r"'w' has shape \(3,\) in the second vector, expected \(2,\)"):
        other.dot(TaskVector.from_deltas({"w": torch.ones(3)}))
    with pytest.raises(ZeroDivisionError):
        one / 0
    with pytest.raises(ValueError, match="finite"):
        one * math.inf
    for wrong in (lambda: one + 1, lambda: one * one, lambda: True * one, lambda: one + {"w": torch.ones(2)}):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(KeyError, match="has no tensor 'nothing'"):
        one["nothing"]


def test_is_a_key_and_shows_itself() -> None:
    one = vector(1)
    assert {one: 2.0}[one] == 2.0
    assert one != vector(1)
    assert repr(one + vector(2)) == "TaskVector(5 tensors, 135 entries, torch.float32, nonlinear, 2 terms)"
    assert taskloom.merge.TaskVector is TaskVector
