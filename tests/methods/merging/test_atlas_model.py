"""AtlasModel: the invariants of aTLAS's card (numbers in brackets), and bad input."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from atlas_samples import encoder, error, rows, spread, tuned, vectors, with_state
from torch import Tensor, nn

from taskloom.merge.task_vector import TaskVector
from taskloom.methods.merging.atlas import AtlasModel


def _naive(model: nn.Module, task_vectors: list[dict[str, Tensor]], coef: Tensor) -> dict[str, Tensor]:
    """The formula, in autograd's own operations; coef [n, m]."""
    return {
        name: base.detach()
        + sum((coef[t, b] * vector[name].to(base.dtype) for t, vector in enumerate(task_vectors)), torch.zeros_like(base))
        for b, (name, base) in enumerate(model.named_parameters())
    }


@pytest.mark.parametrize("settings", [{}, {"granularity": "vector"}, {"partitions": 7}, {"matrices_only": True}, {"linearized": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_coefficients_give_the_base(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """[1]."""
    model, x = encoder(dtype), rows(dtype=dtype)
    expected = model(x)
    adapter = AtlasModel(model, vectors(model, dtype=torch.float16), **settings)
    assert torch.equal(adapter(x), expected)
    assert [name for name, one in adapter.named_parameters() if one.requires_grad] == ["coef"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_one_hot_coefficients_give_a_fine_tuning(dtype: torch.dtype, tolerance: float) -> None:
    """[2]."""
    model, x = encoder(), rows()
    states = [tuned(model, seed) for seed in (1, 2)]
    task_vectors = [TaskVector.from_models(model, state, dtype=dtype) for state in states]
    adapter = AtlasModel(model, task_vectors)
    with torch.no_grad():
        adapter.coef[1] = 1
    for name, weight in adapter.materialize().items():
        assert error(weight, states[1][name]) <= (1.2e-7 if dtype == torch.float32 else tolerance)
    assert error(adapter(x), with_state(model, states[1])(x)) <= tolerance


@pytest.mark.parametrize("granularity", ["block", "vector"])
def test_equal_blocks_give_task_arithmetic(granularity: Any) -> None:
    """[3]."""
    model, x = encoder(), rows()
    task_vectors, numbers = vectors(model), torch.tensor([0.4, -0.7, 1.3])
    adapter = AtlasModel(model, task_vectors, granularity=granularity)
    with torch.no_grad():
        adapter.coef.copy_(numbers if granularity == "vector" else numbers[:, None].expand_as(adapter.coef))
    scaled = _naive(model.double(), task_vectors, numbers.double()[:, None].expand(3, 6))
    expected = functional_result(model, scaled, x.double())
    assert error(adapter.to(torch.float32)(x), expected) <= 1e-6


def functional_result(model: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The model's result with other weights."""
    result: Tensor = torch.func.functional_call(model, weights, (x,))
    return result


@pytest.mark.parametrize("granularity", ["block", "vector"])
def test_gradients_are_the_naive_formulas(granularity: Any) -> None:
    """[4]."""
    model, x = encoder(), rows()
    task_vectors = vectors(model, dtype=torch.float16)
    adapter = AtlasModel(model, task_vectors, granularity=granularity)
    spread(adapter.coef)
    adapter(x).square().sum().backward()
    coef = adapter.coef.detach().clone().requires_grad_()
    blocks = coef[:, None].expand(3, 6) if granularity == "vector" else coef
    functional_result(model, _naive(model, task_vectors, blocks), x).square().sum().backward()
    assert adapter.coef.grad is not None
    assert coef.grad is not None
    assert error(adapter.coef.grad, coef.grad) <= 1e-4


@pytest.mark.parametrize("settings", [{}, {"granularity": "vector"}, {"partitions": 2}, {"linearized": True}])
def test_gradcheck(settings: dict[str, Any]) -> None:
    """[4]."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2, bias=False)).double()
    adapter, x = AtlasModel(model, vectors(model, 2 if settings.get("partitions", 1) == 1 else 1), **settings), rows(2, 3, torch.float64)
    spread(adapter.coef)
    assert adapter.coef.dtype == torch.float64

    def result(coef: Tensor) -> Any:
        return torch.func.functional_call(adapter, {"coef": coef}, (x,))

    coef = adapter.coef.detach().requires_grad_()
    assert torch.autograd.gradcheck(result, (coef,))
    if adapter.coef.dim() == 3:
        assert torch.autograd.gradgradcheck(result, (coef,))


def test_the_linearised_model_is_the_first_order_expansion() -> None:
    model, x = encoder(torch.float64), rows(dtype=torch.float64)
    adapter, task_vectors = AtlasModel(model, vectors(model), linearized=True), vectors(model)
    spread(adapter.coef)
    plain = AtlasModel(model, task_vectors)
    step = 1e-5
    with torch.no_grad():
        plain.coef.copy_(adapter.coef * step)
        forward = plain(x)
        plain.coef.neg_()
        expected = model(x) + (forward - plain(x)) / (2 * step)
    assert error(adapter(x), expected) <= 1e-8
    with torch.no_grad():
        once = adapter(x) - model(x)
        adapter.coef.mul_(3)
        assert error(adapter(x) - model(x), 3 * once) <= 1e-12
    for method in (adapter.materialize, adapter.merge_):
        with pytest.raises(RuntimeError, match="linearized"):
            method()


def test_attention_can_be_linearised() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 8)
    adapter = AtlasModel(layer, vectors(layer), linearized=True)
    assert error(adapter(x), layer(x)) <= 1e-6
    adapter(x).sum().backward()
    assert adapter.coef.grad is not None
    assert adapter.coef.grad.isfinite().all()


def test_merging_and_materializing_equal_forward() -> None:
    """[8]."""
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model), partitions=4)
    spread(adapter.coef)
    with torch.no_grad():
        expected = adapter(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = adapter.materialize()
    assert list(state) == list(before)
    assert error(with_state(model, state)(x), expected) <= 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert adapter.merge_() is model
    assert error(model(x), expected) <= 1e-6
    assert torch.equal(adapter(x), model(x))
    with pytest.raises(RuntimeError, match="merged"):
        adapter.merge_()
    with pytest.raises(RuntimeError, match="does not require grad"):
        adapter(x).sum().backward()


def test_what_is_not_finite_is_not_merged() -> None:
    model = encoder(torch.float16)
    before = copy.deepcopy(model.state_dict())
    adapter = AtlasModel(model, [{name: torch.full_like(one, 1000) for name, one in model.named_parameters()}])
    for value, message in ((1000.0, "composed weights: expected finite values, '0.weight'"), (float("nan"), "finite coefficients")):
        with torch.no_grad():
            adapter.coef.fill_(value)
        with pytest.raises(ValueError, match=message):
            adapter.merge_()
    assert not adapter.merged
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_the_penalty_is_the_mean_of_the_blocks_norms() -> None:
    model = encoder()
    adapter = AtlasModel(model, vectors(model), partitions=2)
    spread(adapter.coef)
    coef = adapter.coef.detach()
    assert adapter.penalty(1).item() == pytest.approx(0.5 * float(coef.abs().sum(0).mean()))
    assert adapter.penalty(2, factor=2.0).item() == pytest.approx(2 * float(coef.square().sum(0).sqrt().mean()))
    fresh = AtlasModel(model, vectors(model))
    fresh.penalty(2).backward()
    assert fresh.coef.grad is not None
    assert not fresh.coef.grad.any()
    third: Any = 3
    with pytest.raises(ValueError, match="p: expected 1 or 2, got 3"):
        adapter.penalty(third)


def test_blocks_can_be_chosen() -> None:
    model, x = encoder(), rows()
    some = [{name: value for name, value in vector.items() if name.startswith("3.")} for vector in vectors(model)]
    adapter = AtlasModel(model, some, target_modules=["3"])
    assert adapter.block_names == ("3.weight", "3.bias")
    assert AtlasModel(model, vectors(model), matrices_only=True).block_names == ("0.weight", "3.weight")
    assert AtlasModel(model, vectors(model), target_modules="all-linear").block_names == ("0.weight", "0.bias", "3.weight", "3.bias")
    assert AtlasModel(model, vectors(model), target_modules="1|3").block_names == ("1.weight", "1.bias", "3.weight", "3.bias")
    spread(adapter.coef)
    state = adapter.materialize()
    assert torch.equal(state["0.weight"], model[0].weight)
    assert error(with_state(model, state)(x), adapter(x)) <= 1e-6
    with pytest.raises(ValueError, match=r"target_modules='5' means, Sequential has none"):
        AtlasModel(model, some, target_modules="5")


def _without(vector: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in vector.items() if key != name}


def test_bad_input() -> None:
    model = encoder()
    good, weight = vectors(model), "0.weight"
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([], {}, ValueError, "task_vectors: expected at least one, got none"),
        (good[0], {}, TypeError, "got one vector"),
        ([3], {}, TypeError, "task-0: expected a TaskVector or a mapping of tensors, got int"),
        ([good[0], _without(good[1], weight)], {}, ValueError, r"task-1: lacks '0\.weight', a parameter of Sequential"),
        ([good[0] | {weight: torch.zeros(3)}], {}, ValueError, r"task-0: '0\.weight': expected shape \(13, 7\) as the model's parameter"),
        ([good[0] | {weight: good[0][weight] / 0}], {}, ValueError, r"task-0: expected finite values, '0\.weight' has NaN or infinity"),
        ([good[0] | {weight: torch.zeros(13, 7, dtype=torch.int64)}], {}, TypeError, r"expected a floating-point block, got torch\.int64"),
        ([good[0] | {weight: 1.0}], {}, TypeError, r"'0\.weight': expected a tensor, got float"),
        (good, {"partitions": 0}, ValueError, "partitions: expected 1 to 256, got 0"),
        (good, {"partitions": 257}, ValueError, "partitions: expected 1 to 256, got 257"),
        (good, {"partitions": 92}, ValueError, "expected at most 91, the entries of the largest block, got 92"),
        (good, {"partitions": 2.0}, TypeError, "partitions: expected an integer, got float"),
        (good, {"partitions": 2, "granularity": "vector"}, ValueError, "expected 1 with granularity 'vector', got 2"),
        (good, {"partition_seed": -1}, ValueError, "partition_seed"),
        (good, {"granularity": "layer"}, ValueError, "expected 'block' or 'vector', got 'layer'"),
    ]
    for task_vectors, settings, kind, message in cases:
        with pytest.raises(kind, match=message):
            AtlasModel(model, task_vectors, **settings)
    assert all(one.requires_grad for one in model.parameters())
    linear = TaskVector.from_deltas(good[0], regime="linear")
    with pytest.raises(ValueError, match=r"expected the regime 'nonlinear' with linearized=False, got 'linear'; as_regime"):
        AtlasModel(model, [linear])
    with pytest.raises(ValueError, match="expected the regime 'linear' with linearized=True"):
        AtlasModel(model, [TaskVector.from_deltas(good[0])], linearized=True)
    integers = nn.Module()
    integers.register_parameter("steps", nn.Parameter(torch.arange(3), requires_grad=False))
    with pytest.raises(TypeError, match=r"parameter 'steps': expected a floating-point block, got torch\.int64"):
        AtlasModel(integers, [{"steps": torch.ones(3)}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AtlasModel(model, good)
