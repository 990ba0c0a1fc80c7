"""A linear layer with adapters: what it computes, merging, mixed batches, its parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import randomise
from torch import Tensor, nn

from taskloom.nn import BASE, LowRankLinear


def _layer(dtype: torch.dtype = torch.float32, dora: bool = False, dropout: float = 0.0) -> LowRankLinear:
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(13, 7, dtype=dtype))
    layer.add_adapter("one", 3, 6, use_dora=dora, dropout=dropout)
    layer.add_adapter("two", 2, use_rslora=True, dropout=dropout)
    randomise(layer)
    return layer.eval()


def _dense(layer: LowRankLinear, name: str, dora: bool = False) -> Tensor:
    A, B = layer.factors(name)
    weight = layer.base_layer.weight + layer.settings[name].scaling * (B @ A)
    magnitude = layer.magnitude(name)
    return weight if magnitude is None else magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)


X = torch.randn(5, 13, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing(dora: bool) -> None:
    linear = nn.Linear(13, 7)
    expected = linear(X)
    layer = LowRankLinear(linear)
    layer.add_adapter("one", 3, use_dora=dora)
    torch.testing.assert_close(layer(X), expected, rtol=1e-6, atol=1e-6)
    assert [name for name, one in layer.named_parameters() if one.requires_grad] == [
        "lora_A.one.weight",
        "lora_B.one.weight",
        *(["lora_magnitude_vector.one.weight"] if dora else []),
    ]


@pytest.mark.parametrize("dora", [False, True])
def test_the_forward_pass_is_that_of_the_dense_weight(dora: bool) -> None:
    layer = _layer(dora=dora)
    expected = nn.functional.linear(X, _dense(layer, "one"), layer.bias)
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-6)
    layer.set_adapter("two")
    torch.testing.assert_close(layer(X), nn.functional.linear(X, _dense(layer, "two"), layer.bias), rtol=1e-5, atol=1e-6)
    layer.set_adapter(["one", "two"])
    base = layer.base_layer(X)
    parts = sum(nn.functional.linear(X, _dense(layer, name), layer.bias) - base for name in ("one", "two"))
    torch.testing.assert_close(layer(X), base + parts, rtol=1e-5, atol=1e-5)


def test_scalings() -> None:
    layer = _layer()
    assert [one.scaling for one in layer.settings.values()] == [2.0, 2 / math.sqrt(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(dtype: torch.dtype, dora: bool, safe: bool) -> None:
    layer, x = _layer(dtype, dora), X.to(dtype)
    before, weight = layer(x), layer.weight.detach().clone()
    dense = _dense(layer, "one")
    layer.merge(safe)
    assert layer.merged_adapters == ["one"]
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(layer.weight.detach(), dense.detach().to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(layer(x), before, **tolerance)
    assert not any("kept" in name for name in layer.state_dict())
    layer.unmerge()
    assert layer.weight.equal(weight)
    assert layer(x).equal(before)


def test_merge_of_two_is_one_pass() -> None:
    layer = _layer()
    layer.set_adapter(["one", "two"])
    y, weight = layer(X), layer.weight.detach().clone()
    layer.merge(keep_base=False)
    torch.testing.assert_close(layer(X), y, rtol=1e-5, atol=1e-6)
    layer.unmerge()
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-6, atol=1e-6)


def test_an_unsafe_merge_and_a_safe_one() -> None:
    layer = _layer()
    with torch.no_grad():
        layer.factors("one")[0][0, 0] = torch.inf
    weight = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="merge: one give a weight that is not finite; nothing was merged"):
        layer.merge(safe=True)
    assert layer.weight.equal(weight)
    assert layer.merged_adapters == []
    layer.merge()
    assert not layer.weight.isfinite().all()
    layer.unmerge()
    assert layer.weight.equal(weight)


@pytest.mark.parametrize("dora", [False, True])
def test_delta_weight(dora: bool) -> None:
    layer = _layer(dora=dora)
    torch.testing.assert_close(layer.delta_weight(), _dense(layer, "one") - layer.weight, rtol=1e-5, atol=1e-6)
    A, B = layer.factors("two")
    torch.testing.assert_close(layer.delta_weight("two"), math.sqrt(2) * B @ A, rtol=1e-5, atol=1e-6)


def test_a_batch_of_several_adapters() -> None:
    layer = _layer()
    names = ["two", BASE, "one", "two", "one"]
    y = layer(X, names)
    for row, name in enumerate(names):
        layer.set_adapter([] if name == BASE else name)
        torch.testing.assert_close(y[row], layer(X[row]), rtol=1e-5, atol=1e-6)
    numbers = torch.tensor([1, -1, 0, 1, 0])
    assert layer(X, numbers).equal(y)
    sequences = torch.stack([X, 2 * X])
    torch.testing.assert_close(layer(sequences, ["one", BASE])[0], layer(X, ["one"] * 5))
    torch.testing.assert_close(layer(sequences, torch.stack([numbers, numbers]))[0], y)


def test_gradients_reach_the_adapters_and_not_the_base() -> None:
    layer = _layer(dora=True)
    layer(X).square().sum().backward()
    assert layer.weight.grad is None
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == (".one." in name)
    magnitude, (A, B) = layer.magnitude("one"), layer.factors("one")
    assert magnitude is not None
    dense = layer.weight + layer.settings["one"].scaling * (B @ A)
    weight = magnitude[:, None] * dense / dense.norm(dim=1, keepdim=True).detach()
    expected = torch.autograd.grad(nn.functional.linear(X, weight, layer.bias).square().sum(), (A, B, magnitude))
    for parameter, gradient in zip((A, B, magnitude), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    layer = _layer(dropout=0.5)
    still = layer(X)
    assert layer(X).equal(still)
    layer.train()
    assert not layer(X).equal(layer(X))
    assert not layer(X, ["one"] * 5).equal(layer(X, ["one"] * 5))
    assert layer(X, [BASE] * 5).equal(layer.base_layer(X))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_under_autocast_it_is_a_linear_layer(dora: bool, dropout: float) -> None:
    layer = _layer(dora=dora, dropout=dropout).train()
    for x in (X, X.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(1)
            y = layer(x)
            assert y.dtype == layer.base_layer(x).dtype == torch.bfloat16
        y.float().sum().backward()
        torch.manual_seed(1)
        torch.testing.assert_close(y.float(), layer(x.float()), rtol=3e-2, atol=3e-2)


def test_adapters_of_half_precision_layers_are_float32() -> None:
    layer = _layer(torch.bfloat16)
    assert {one.dtype for name, one in layer.named_parameters() if "lora" in name} == {torch.float32}
    assert layer(X.bfloat16()).dtype == torch.bfloat16


def test_set_adapter_says_what_is_trained() -> None:
    layer = _layer()
    layer.set_adapter("two")
    assert {name.split(".")[1] for name, one in layer.named_parameters() if one.requires_grad} == {"two"}
    layer.set_adapter(["one", "two"])
    assert sum(one.requires_grad for one in layer.parameters()) == 4
    layer.delete_adapter("two")
    assert layer.adapters == layer.active_adapters == ["one"]
    assert not any("two" in name for name in layer.state_dict())


def test_a_module_is_copied_moved_and_restored_as_others_are() -> None:
    layer, other = _layer(), _layer()
    randomise(other, 5)
    assert not other(X).equal(layer(X))
    other.load_state_dict(layer.state_dict())
    assert other(X).equal(layer(X))
    layer.merge()
    wide = layer.double()
    wide.unmerge()
    assert wide.weight.dtype == torch.float64
    assert wide.weight.float().equal(other.weight)


def test_compiled() -> None:
    layer = _layer()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(X), layer(X))


def _errors() -> list[Any]:
    return [
        (lambda layer: LowRankLinear(nn.Conv1d(2, 3, 1)), TypeError, "base_layer: expected nn.Linear, got Conv1d"),
        (lambda layer: layer.add_adapter("one", 2), ValueError, "name: 'one' is taken"),
        (lambda layer: layer.add_adapter("a.b", 2), ValueError, "name: 'a.b' cannot be an adapter's name"),
        (lambda layer: layer.add_adapter("items", 2), ValueError, "name: 'items' cannot be an adapter's name"),
        (lambda layer: layer.add_adapter("three", 2.5), TypeError, "r: expected an integer, got float"),
        (lambda layer: layer.add_adapter("three", 2, math.inf), ValueError, "alpha: expected a finite number, got inf"),
        (lambda layer: layer.set_adapter(["one", "one"]), ValueError, "adapters: expected each once, got 'one', 'one'"),
        (lambda layer: layer.merge(adapters=["two", "two"]), ValueError, "adapters: expected each once"),
        (lambda layer: layer.merge(adapters="three"), ValueError, "adapter 'three' is unknown"),
        (lambda layer: layer.add_adapter("three", 0), ValueError, "r: expected a rank of at least 1, got 0"),
        (lambda layer: layer.add_adapter("three", 2, dropout=1.0), ValueError, "dropout: expected a probability below 1"),
        (lambda layer: layer.set_adapter("three"), ValueError, "adapter 'three' is unknown, the layer has 'one', 'two'"),
        (lambda layer: layer(X, ["one"]), ValueError, "tasks: expected 5 names, one for each sample, got 1"),
        (lambda layer: layer(X, ["three"] * 5), ValueError, "adapter 'three' is unknown"),
        (lambda layer: layer(X, torch.tensor([0, 1, 2, 0, 0])), ValueError, "task: expected values below 2"),
        (lambda layer: (layer.merge(), layer.merge()), RuntimeError, "merge: one are merged already"),
        (lambda layer: (layer.merge(), layer(X, ["one"] * 5)), RuntimeError, "tasks: one are merged"),
        (lambda layer: (layer.merge(), layer.add_adapter("three", 2)), RuntimeError, "add_adapter: one are merged"),
        (lambda layer: (layer.merge(), layer.delete_adapter("one")), RuntimeError, "delete_adapter: 'one' is merged"),
        (lambda layer: (layer.set_adapter([]), layer.delta_weight()), ValueError, "name: expected one, as 0 adapters are active"),
    ]


@pytest.mark.parametrize(("call", "error", "message"), _errors())
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(_layer())


def test_errors_of_dora() -> None:
    layer = _layer(dora=True)
    with pytest.raises(ValueError, match=r"tasks: a batch cannot mix DoRA's adapters \(one\) with others"):
        layer(X, ["two"] * 5)
    layer.merge(keep_base=False)
    with pytest.raises(RuntimeError, match="unmerge: DoRA's adapters cannot be subtracted"):
        layer.unmerge()
