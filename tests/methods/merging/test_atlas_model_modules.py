"""AtlasModel as a module: shared compositions, buffers, ties, copies, compilation, precisions, states."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from atlas_samples import check_compiled, encoder, error, rows, spread, tuned, vectors
from torch import Tensor, nn
from torch.nn import functional

from taskloom.methods.merging.atlas import AtlasModel


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


def test_a_module_that_the_model_has_twice_stays_the_bases() -> None:
    torch.manual_seed(0)
    layer, norm = nn.Linear(7, 7), nn.BatchNorm1d(7)
    model = nn.Sequential(layer, norm, nn.Tanh(), layer, norm)
    own, before = [*model.parameters(), *model.buffers()], copy.deepcopy(model.state_dict())
    adapter = AtlasModel(model, vectors(model))
    spread(adapter.coef)
    adapter(rows()).sum().backward()
    assert all(one is other for one, other in zip(own, [*model.parameters(), *model.buffers()], strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    changed = copy.deepcopy(model).eval()
    changed.load_state_dict(adapter.materialize())
    assert torch.equal(adapter.eval()(rows()), changed(rows()))


def test_what_changes_inside_compose_is_seen() -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model))
    spread(adapter.coef)
    with adapter.compose(), torch.no_grad():
        before = adapter(x)
        model[0].bias.add_(1)
        after = adapter(x)
        assert torch.equal(after, torch.func.functional_call(model, adapter.materialize(), x))
        assert not torch.equal(after, before)
        assert torch.equal(torch.compile(adapter, fullgraph=True, backend="eager")(x), after)
        assert adapter.double()(x.double()).dtype == torch.float64
        other = copy.deepcopy(adapter)
    assert torch.equal(other(x.double()), adapter(x.double()))
    with other.compose(accumulate=True):
        other(x.double()).sum().backward()
    assert other.coef.grad is not None


def test_gradients_stay_in_the_coefficients_dtype() -> None:
    model = encoder()
    adapter = AtlasModel(model, vectors(model))
    adapter(1e4 * rows()).square().sum().backward()
    before = adapter.coef.grad
    assert before is not None
    before = before.clone()
    adapter.half()
    assert adapter.coef.grad is not None
    assert torch.equal(adapter.coef.grad, before)
    assert before.dtype == adapter.coef.dtype == torch.float32


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
    check_compiled(adapter, x, 1e-6)


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


def test_other_modules_missing_tensors_are_missing() -> None:
    around = nn.ModuleDict({"teacher": nn.ModuleDict({"model": encoder()}), "student": AtlasModel(encoder(), vectors(encoder()))})
    state = around.state_dict()
    del state["teacher.model.0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"teacher\.model\.0\.weight\"\."):
        around.load_state_dict(state)


def test_coefficients_are_not_loaded_into_a_merged_adapter() -> None:
    model = encoder()
    adapter = AtlasModel(model, vectors(model))
    spread(adapter.coef)
    state, zeros = copy.deepcopy(adapter.state_dict()), copy.deepcopy(adapter.state_dict())
    zeros["coef"].zero_()
    adapter.merge_()
    adapter.load_state_dict(state)
    with pytest.raises(RuntimeError, match="other coefficients are merged into the base already"):
        adapter.load_state_dict(zeros)
    assert adapter.coef.any()


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


class _Scaled(nn.Module):
    """A model with a parameter of no dimension, as CLIP has one, and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale, self.nothing = nn.Linear(7, 3), nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.empty(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.scale.exp() * self.layer(x)
        return result


@pytest.mark.parametrize("groups", [1, 4])
def test_blocks_without_dimensions_or_entries(groups: int, poisoned_memory: None) -> None:
    torch.manual_seed(0)
    model, x = _Scaled(), rows()
    task_vectors = [{name: torch.ones_like(one) for name, one in model.named_parameters()}]
    adapter = AtlasModel(model, task_vectors, partitions=groups)
    with torch.no_grad():
        adapter.coef.fill_(0.5)
    expected = (model.scale + 0.5).exp() * functional.linear(x, model.layer.weight + 0.5, model.layer.bias + 0.5)
    assert error(adapter(x), expected) <= 1e-6
    adapter(x).sum().backward()
    assert adapter.coef.grad is not None
    gradient = adapter.coef.grad.view(1, 4, groups).sum(2)
    place = adapter.block_names.index
    assert gradient[0, place("scale")].item() == pytest.approx(expected.sum().item(), rel=1e-5)
    assert gradient[0, place("nothing")] == 0


def test_function_transforms() -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model), partitions=2)
    spread(adapter.coef)

    def loss(coef: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(adapter, {"coef": coef}, (x,)).square().sum()
        return result

    adapter(x).square().sum().backward()
    assert adapter.coef.grad is not None
    coef = adapter.coef.detach()
    assert error(torch.func.grad(loss)(coef), adapter.coef.grad) <= 1e-5
    assert error(torch.func.vmap(loss)(torch.stack([coef, 2 * coef])), torch.stack([loss(coef), loss(2 * coef)])) <= 1e-5


def test_pickles() -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model), partitions=2)
    spread(adapter.coef)
    again = pickle.loads(pickle.dumps(adapter))
    assert torch.equal(again(x), adapter(x))
    again(x).sum().backward()
    assert adapter.coef.grad is None


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"partitions": 10}, {"granularity": "vector"}, {"linearized": True}])
def test_on_a_gpu(settings: dict[str, Any]) -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model, dtype=torch.float16), **settings)
    spread(adapter.coef)
    result = adapter(x)
    result.square().sum().backward()
    expected, adapter.coef.grad = adapter.coef.grad, None
    moved = adapter.to("cuda")
    assert all(one.device.type == "cuda" for task in moved._pool.deltas for one in task)
    there = moved(x.cuda())
    there.square().sum().backward()
    assert expected is not None
    assert moved.coef.grad is not None
    assert error(there.cpu(), result) <= 1e-5
    assert error(moved.coef.grad.cpu(), expected) <= 1e-4
    # Made there, from vectors in the host's memory, it is the same.
    again = AtlasModel(copy.deepcopy(model), vectors(encoder(), dtype=torch.float16), **settings)
    again.load_state_dict(moved.state_dict())
    assert error(again(x.cuda()), there) <= 1e-6
