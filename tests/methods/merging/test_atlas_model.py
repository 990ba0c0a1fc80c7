"""AtlasModel: the invariants of aTLAS's card (numbers in brackets), and what a module has to stand."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from atlas_samples import encoder, error, rows, spread, tuned, vectors, with_state
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import taskloom
from taskloom.merge.task_vector import TaskVector
from taskloom.methods.merging.atlas import AtlasModel

Make = Callable[..., AtlasModel]


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


def test_one_composition_serves_several_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model))
    spread(adapter.coef)
    adapter.coef.grad = None
    (adapter(x).sum() + adapter(2 * x).square().sum()).backward()
    expected, adapter.coef.grad = adapter.coef.grad, None
    calls = []
    compose = adapter._compose
    monkeypatch.setattr(adapter, "_compose", lambda: calls.append(1) or compose())
    with adapter.compose(), adapter.compose():
        (adapter(x).sum() + adapter(2 * x).square().sum()).backward()
        assert len(calls) == 1
        with torch.no_grad():
            adapter(x)
            adapter.coef.add_(1)
            changed = adapter(x)
    assert len(calls) == 2
    assert expected is not None
    assert adapter.coef.grad is not None
    assert error(adapter.coef.grad, expected) <= 1e-6
    assert torch.equal(changed, adapter(x))
    with adapter.compose():
        with torch.no_grad():
            adapter(x)
        assert adapter(x).requires_grad


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


class _Checkpointed(nn.Module):
    """A model parts of which run again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.reentrant = reentrant

    def _part(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.reentrant is None:
            return part(x)
        result: Tensor = checkpoint(part, x, use_reentrant=self.reentrant)
        return result

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self._part(lambda x: self.second(torch.tanh(self.first(x))).tanh(), x)
        return {"logits": [self._part(lambda x: self.third(x).tanh() * self.first(x), x)]}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_checkpointed_parts_meet_the_composed_weights_again(backend: str) -> None:
    torch.manual_seed(0)
    model, x = _Checkpointed(None), rows()
    gradients = []
    for reentrant in (None, False):
        model.reentrant = reentrant
        adapter = AtlasModel(model, vectors(model))
        spread(adapter.coef)
        own = list(model.parameters())
        with taskloom.backend(backend):
            first, second = adapter(x)["logits"][0], adapter(x + 1)["logits"][0]
            with torch.no_grad():
                adapter.coef.add_(0.5)
            (first.square().sum() + second.sum() + adapter(x)["logits"][0].sum()).backward()
        gradients.append(adapter.coef.grad)
        assert all(one is other for one, other in zip(own, model.parameters(), strict=True))
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert error(gradients[1], gradients[0]) <= 1e-6


def test_the_adapter_can_be_checkpointed_itself() -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model))
    spread(adapter.coef)
    adapter(x).square().sum().backward()
    expected, adapter.coef.grad = adapter.coef.grad, None
    checkpoint(adapter, x, use_reentrant=False).square().sum().backward()
    assert expected is not None
    assert adapter.coef.grad is not None
    assert error(adapter.coef.grad, expected) <= 1e-6


def test_a_backward_pass_that_raised_leaves_no_other_weights_behind() -> None:
    torch.manual_seed(0)
    model, x = _Checkpointed(False), rows()
    adapter = AtlasModel(model, vectors(model))
    own = list(model.parameters())
    y = adapter(x)["logits"][0]

    def stop(gradient: Tensor) -> None:
        raise KeyError("stop")

    y.register_hook(stop)
    spread(adapter.coef)
    with pytest.raises(KeyError, match="stop"):
        y.sum().backward()
    adapter(x)
    assert all(one is other for one, other in zip(own, model.parameters(), strict=True))


def test_buffers_stay_the_bases() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4))
    states = [tuned(nn.Sequential(nn.Linear(7, 4), nn.LayerNorm(4)), 1)]
    task_vector = states[0] | {"1.running_mean": torch.ones(4), "1.running_var": torch.ones(4)}
    with pytest.warns(UserWarning, match=r"'1\.running_mean', '1\.running_var' are no parameter of Sequential: ignored"):
        adapter = AtlasModel(model, [task_vector])
    before = copy.deepcopy(dict(model.named_buffers()))
    adapter.train()(rows())
    adapter.eval()
    assert not model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert torch.equal(adapter(rows()), model(rows()))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 5), nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.embedding(x))
        return result


def test_tied_parameters_are_one_block() -> None:
    torch.manual_seed(0)
    model, x, delta = _Tied(), torch.arange(4), torch.randn(11, 5)
    adapter = AtlasModel(model, [{"embedding.weight": delta, "head.weight": delta.clone()}, {"head.weight": -2 * delta}])
    assert adapter.block_names == ("embedding.weight",)
    with torch.no_grad():
        adapter.coef.copy_(torch.tensor([[1.0], [0.25]]))
    weight = model.head.weight.detach() + 0.5 * delta
    assert error(adapter(x), functional.linear(functional.embedding(x, weight), weight)) <= 1e-6
    state = adapter.materialize()
    assert state["head.weight"] is state["embedding.weight"]
    assert adapter.merge_() is model
    assert model.head.weight is model.embedding.weight
    with pytest.raises(ValueError, match=r"'embedding\.weight': differs from 'head\.weight', which is the same parameter"):
        AtlasModel(_Tied(), [{"embedding.weight": delta, "head.weight": 2 * delta}])


def test_copies_share_the_vectors_and_train_apart() -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model), partitions=3)
    spread(adapter.coef)
    other = copy.deepcopy(adapter)
    assert torch.equal(other(x), adapter(x))
    assert other._pool is adapter._pool
    assert other.model is not model
    with torch.no_grad():
        other.coef.zero_()
        other.model[0].weight.zero_()
    assert torch.equal(other(x), other.model(x))
    assert not torch.equal(other(x), adapter(x))


@pytest.mark.parametrize("settings", [{"partitions": 3}, pytest.param({"granularity": "vector"}, marks=pytest.mark.slow)])
def test_compiled(settings: dict[str, Any]) -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model), **settings)
    spread(adapter.coef)
    expected = adapter(x)
    expected.square().sum().backward()
    gradient, adapter.coef.grad = adapter.coef.grad, None
    torch.compiler.reset()
    got = torch.compile(adapter, fullgraph=True, backend="aot_eager")(x)
    got.square().sum().backward()
    assert gradient is not None
    assert adapter.coef.grad is not None
    assert error(got, expected) <= 1e-6
    assert error(adapter.coef.grad, gradient) <= 1e-6


def test_autocast_and_half_precision_models() -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model, dtype=torch.float16))
    spread(adapter.coef)
    expected = adapter(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = adapter(x)
    assert got.dtype == torch.bfloat16
    got.float().sum().backward()
    assert error(got, expected) <= 0.02
    half = adapter.to(torch.bfloat16)
    assert half.coef.dtype == torch.float32
    assert half._pool.deltas[0][0].dtype == torch.float16
    result = half(x.bfloat16())
    assert result.dtype == torch.bfloat16
    assert error(result, expected) <= 0.03


def test_the_state_is_the_coefficients_and_what_they_belong_to() -> None:
    model = encoder()
    adapter = AtlasModel(model, dict(zip("abc", vectors(model), strict=True)), partitions=3, partition_seed=5)
    spread(adapter.coef)
    state = adapter.state_dict()
    assert list(state) == ["coef", "_extra_state"]
    fresh = AtlasModel(encoder(), dict(zip("abc", vectors(model), strict=True)), partitions=3, partition_seed=5)
    assert not fresh.load_state_dict(state).missing_keys
    assert torch.equal(fresh.coef, adapter.coef)
    around = nn.ModuleDict({"inner": adapter, "head": nn.Linear(5, 2)})
    state = around.state_dict()
    assert list(state) == ["inner.coef", "inner._extra_state", "head.weight", "head.bias"]
    around.load_state_dict(state)
    others = [
        (dict(zip("abd", vectors(model), strict=True)), 5, r"task_vectors: the coefficients belong to others: without 'd'; with 'c'"),
        (dict(zip("bac", vectors(model), strict=True)), 5, "the same in another order"),
        (dict(zip("abc", vectors(model), strict=True)), 6, "partition_seed: expected 6, got 5"),
    ]
    for task_vectors, seed, message in others:
        other = AtlasModel(encoder(), task_vectors, partitions=3, partition_seed=seed)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(adapter.state_dict())
        assert not other.coef.any()


def test_blocks_can_be_chosen() -> None:
    model, x = encoder(), rows()
    some = [{name: value for name, value in vector.items() if name.startswith("3.")} for vector in vectors(model)]
    adapter = AtlasModel(model, some, target_modules=["3"])
    assert adapter.block_names == ("3.weight", "3.bias")
    assert AtlasModel(model, vectors(model), matrices_only=True).block_names == ("0.weight", "3.weight")
    spread(adapter.coef)
    state = adapter.materialize()
    assert torch.equal(state["0.weight"], model[0].weight)
    assert error(with_state(model, state)(x), adapter(x)) <= 1e-6
    with pytest.raises(ValueError, match=r"target_modules='5' means, Sequential has none"):
        AtlasModel(model, some, target_modules="5")


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(7, 3), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.used(x)
        return result


def test_a_block_without_a_part_in_the_loss_has_gradient_zero(poisoned_memory: None) -> None:
    model = _Unused()
    adapter = AtlasModel(model, vectors(model), partitions=2)
    adapter(rows()).sum().backward()
    assert adapter.coef.grad is not None
    assert adapter.coef.grad[:, :2].all()
    assert not adapter.coef.grad[:, 2:].any()


def test_an_unfrozen_base_takes_part() -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model))
    model[3].bias.requires_grad_(True)
    adapter(x).sum().backward()
    assert model[3].bias.grad is not None
    assert error(model[3].bias.grad, torch.full((5,), 6.0)) <= 1e-6


def test_distributed(tmp_path: Any) -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model))
    adapter(x).sum().backward()
    expected, adapter.coef.grad = adapter.coef.grad, None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(adapter)
        parallel(x).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert expected is not None
    assert adapter.coef.grad is not None
    assert torch.equal(adapter.coef.grad, expected)


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
