"""AtlasModel as a module: shared compositions, checkpoints, buffers, ties, copies, compilation, precisions, states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from atlas_samples import encoder, error, rows, spread, tuned, vectors
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import taskloom
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
    model, x = _Checkpointed(False), rows().requires_grad_()
    adapter = AtlasModel(model, vectors(model))
    own = list(model.parameters())

    def stop(gradient: Tensor) -> None:
        raise KeyError("stop")

    x.register_hook(stop)
    spread(adapter.coef)
    expected = adapter(x)["logits"][0]
    with pytest.raises(KeyError, match="stop"):
        adapter(x)["logits"][0].sum().backward()
    assert torch.equal(adapter(x)["logits"][0], expected)
    assert all(one is other for one, other in zip(own, model.parameters(), strict=True))


def test_weights_can_be_installed_for_a_while() -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model))
    spread(adapter.coef)
    expected, base = adapter(x), model(x)
    with adapter.installed() as installed:
        assert installed is model
        assert torch.equal(model(x), expected)
        assert not model(x).requires_grad
        adapter(x).square().sum().backward()
        assert torch.equal(model(x), expected)
        with torch.no_grad():
            adapter.coef.zero_()
        assert torch.equal(adapter(x), base)
        with adapter.installed():
            assert torch.equal(model(x), base)
    assert torch.equal(model(x), base)
    assert all(isinstance(one, nn.Parameter) for one in model.parameters())


@pytest.mark.parametrize("reentrant", [None, False])
def test_backward_passes_of_their_own_accumulate(reentrant: bool | None) -> None:
    torch.manual_seed(0)
    model, x = _Checkpointed(reentrant), rows()
    adapter = AtlasModel(model, vectors(model))
    spread(adapter.coef)
    losses = [lambda: adapter(x)["logits"][0].square().sum(), lambda: adapter(x + 1)["logits"][0].sum()]
    (losses[0]() + losses[1]()).backward()
    expected, adapter.coef.grad = adapter.coef.grad, None
    with adapter.compose(accumulate=True):
        for loss in losses:
            loss().backward()
        assert adapter.coef.grad is None
    assert expected is not None
    assert adapter.coef.grad is not None
    assert error(adapter.coef.grad, expected) <= 1e-6
    with adapter.compose(accumulate=True):
        losses[0]().backward()
        with torch.no_grad():
            adapter.coef.add_(0)
        losses[1]().backward()
    assert error(adapter.coef.grad, 2 * expected) <= 1e-6
    with adapter.compose(accumulate=True), torch.no_grad():
        adapter(x)


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
