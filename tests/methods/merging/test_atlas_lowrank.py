"""aTLAS over LoRA adapters; the number in brackets is the card's invariant."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from atlas_samples import check_compiled, encoder, error, rows, spread, vectors, with_state
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taskloom.merge.task_vector import TaskVector
from taskloom.methods.merging.atlas import AtlasModel, LowRankAtlasModel, LowRankTaskVector
from taskloom.nn import LowRankConfig, inject, save_adapter


def _vector(model: nn.Module, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> LowRankTaskVector:
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    matrices = {name: one for name, one in model.named_parameters() if one.dim() == 2}
    return LowRankTaskVector({name: (factor(rank, one.shape[1]), factor(one.shape[0], rank), 0.5 * seed) for name, one in matrices.items()})


def _pool(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[LowRankTaskVector]:
    return [_vector(model, rank, seed, dtype) for seed, rank in enumerate((2, 4, 3), 1)]


@pytest.mark.parametrize("granularity", ["block", "vector"])
def test_the_rank_space_equals_dense_composition(granularity: Any) -> None:
    """[8]."""
    model, x = encoder(), rows()
    pool = _pool(model)
    dense = AtlasModel(copy.deepcopy(model), [one.dense() for one in pool], matrices_only=True, granularity=granularity)
    adapter = LowRankAtlasModel(model, pool, granularity=granularity)
    assert adapter.block_names == dense.block_names
    assert adapter.coef.shape == dense.coef.shape
    for one in (adapter, dense):
        spread(one.coef)
        one(x).square().sum().backward()
    assert adapter.coef.grad is not None
    assert dense.coef.grad is not None
    assert error(adapter(x), dense(x)) <= 1e-5
    assert error(adapter.coef.grad, dense.coef.grad) <= 1e-5
    expected = dense.materialize()
    for name, weight in adapter.materialize().items():
        assert error(weight, expected[name]) <= 1e-6


def test_zero_coefficients_give_the_base() -> None:
    """[1]."""
    model, x = encoder(), rows()
    expected = model(x)
    adapter = LowRankAtlasModel(model, {"a": _vector(model, 2, 1), "b": _vector(model, 2, 2)})
    assert torch.equal(adapter(x), expected)
    assert adapter.vector_ids == ("a", "b")
    assert [name for name, one in adapter.named_parameters() if one.requires_grad] == ["coef"]


def test_gradcheck() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    adapter, x = LowRankAtlasModel(model, _pool(model, torch.float64)[:2]), rows(2, 3, torch.float64)
    coef = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda coef: torch.func.functional_call(adapter, {"coef": coef}, (x,)), (coef,))


def test_merging_gives_the_base_its_layers_back() -> None:
    """[8]."""
    model, x = encoder(), rows()
    kinds = [type(one) for one in model.modules()]
    adapter = LowRankAtlasModel(model, _pool(model))
    spread(adapter.coef)
    expected = adapter(x).detach()
    assert error(with_state(encoder(), adapter.materialize())(x), expected) <= 1e-6
    assert adapter.merge_() is model
    assert [type(one) for one in model.modules()] == kinds
    assert error(model(x), expected) <= 1e-6
    assert torch.equal(adapter(x), model(x))
    with pytest.raises(RuntimeError, match="merged"):
        adapter.unload()


def test_unloading_gives_the_base_back() -> None:
    model, x = encoder(), rows()
    expected = model(x)
    adapter = LowRankAtlasModel(model, _pool(model))
    spread(adapter.coef)
    with pytest.raises(ValueError, match="'0' belongs to another LowRankAtlasModel"):
        LowRankAtlasModel(model, _pool(model))
    assert torch.equal(adapter.unload()(x), expected)
    LowRankAtlasModel(model, _pool(model))


def test_copies_train_apart() -> None:
    model, x = encoder(), rows()
    adapter = LowRankAtlasModel(model, _pool(model))
    spread(adapter.coef)
    expected = adapter(x)
    other = copy.deepcopy(adapter)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.coef.zero_()
    assert not torch.equal(other(x), expected)
    assert torch.equal(adapter(x), expected)


@pytest.mark.slow
def test_compiled() -> None:
    model, x = encoder(), rows()
    adapter = LowRankAtlasModel(model, _pool(model))
    spread(adapter.coef)
    check_compiled(adapter, x, 1e-5)


def test_checkpointed_and_under_autocast() -> None:
    model, x = encoder(), rows()
    adapter = LowRankAtlasModel(model, _pool(model))
    spread(adapter.coef)
    adapter(x).square().sum().backward()
    expected, adapter.coef.grad = adapter.coef.grad, None
    assert expected is not None
    checkpoint(adapter, x, use_reentrant=False).square().sum().backward()
    assert adapter.coef.grad is not None
    assert error(adapter.coef.grad, expected) <= 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert adapter(x).dtype == torch.bfloat16
    plain = adapter(x)
    half = adapter.to(torch.bfloat16)
    assert half.coef.dtype == torch.float32
    assert error(half(x.bfloat16()), plain) <= 0.03


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"query": nn.Linear(7, 5), "value": nn.Linear(5, 7)})
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.block["value"](self.block["query"](x)))
        return result


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_adapters_are_read_from_pefts_files(rank_stabilised: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = _Model(), rows()
    results = []
    for task in range(2):
        adapted = copy.deepcopy(base)
        inject(adapted, LowRankConfig(target_modules=["query", "value"], r=3, lora_alpha=12.0, use_rslora=rank_stabilised))
        for name, one in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(one, std=0.3)
        save_adapter(adapted, tmp_path / f"{task}")
        results.append(adapted(x))
    pool = [LowRankTaskVector.from_peft(tmp_path / f"{task}") for task in range(2)]
    adapter = LowRankAtlasModel(base, pool)
    assert adapter.block_names == ("block.query.weight", "block.value.weight")
    for task, expected in enumerate(results):
        with torch.no_grad():
            adapter.coef.zero_()
            adapter.coef[task] = 1
        assert error(adapter(x), expected) <= 1e-6
    one = LowRankAtlasModel(_Model(), pool, target_modules=["value"])
    assert one.block_names == ("block.value.weight",)


def test_dora_is_refused(tmp_path: Path) -> None:
    model = _Model()
    inject(model, LowRankConfig(target_modules=["query"], r=2, use_dora=True))
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="DoRA is no low-rank change"):
        LowRankTaskVector.from_peft(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a PEFT adapter"):
        LowRankTaskVector.from_peft(tmp_path / "none")


def test_a_tied_weight_is_not_merged() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    adapter = LowRankAtlasModel(model, [LowRankTaskVector({"head.weight": (torch.ones(1, 3), torch.ones(5, 1), 1.0)})])
    with pytest.raises(RuntimeError, match=r"'embedding\.weight', 'head\.weight' are one weight"):
        adapter.merge_()


def test_a_weight_of_two_blocks_is_not_merged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7))
    model[2].weight = model[0].weight
    factors = {name: (torch.randn(2, 7), torch.randn(7, 2), 1.0) for name in ("0.weight", "2.weight")}
    adapter = LowRankAtlasModel(model, [LowRankTaskVector(factors)])
    spread(adapter.coef)
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"'0\.weight', '2\.weight' are one weight"):
        adapter.merge_()
    with torch.no_grad():
        adapter.coef[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"LowRankAtlasModel\.merge_: expected finite coefficients"):
        adapter.merge_()
    assert torch.equal(model[0].weight, before)


def test_a_layer_that_the_model_has_twice_changes_in_both_places() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 7)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    adapter = LowRankAtlasModel(model, [LowRankTaskVector({"0.weight": (torch.randn(2, 7), torch.randn(7, 2), 1.0)})])
    spread(adapter.coef)
    expected = adapter(rows())
    changed = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7))
    changed.load_state_dict(adapter.materialize())
    assert error(changed(rows()), expected) <= 1e-6
    assert error(adapter.merge_()(rows()), expected) <= 1e-6


def test_factors_are_copied() -> None:
    A, B = torch.ones(2, 7), torch.ones(13, 2)
    vector = LowRankTaskVector({"0.weight": (A, B, 1.0)})
    A.zero_()
    assert vector["0.weight"][0].all()


def test_bad_input() -> None:
    model, A, B = encoder(), torch.ones(2, 7), torch.ones(13, 2)
    fit = LowRankTaskVector({"0.weight": (A, B, 1.0)})
    cases: list[tuple[Any, type[Exception], str]] = [
        ({}, ValueError, "expected at least one weight's factors, got none"),
        ({"w": (A, torch.ones(13, 3), 1.0)}, ValueError, r"'w': expected A \[r, in\] and B \[out, r\], got \(2, 7\) and \(13, 3\)"),
        ({"w": (A / 0, B, 1.0)}, ValueError, "'w': A: expected finite values"),
        ({"w": (A.int(), B, 1.0)}, TypeError, r"'w': A: expected a floating-point tensor, got torch\.int32"),
        ({"w": (A, B, "1")}, TypeError, "'w': scale: expected a number, got str"),
    ]
    for factors, kind, message in cases:
        with pytest.raises(kind, match=message):
            LowRankTaskVector(factors)
    pools: list[tuple[Any, type[Exception], str]] = [
        ([], ValueError, "expected at least one, got none"),
        (fit, TypeError, "got one vector"),
        ([vectors(model)[0]], TypeError, "expected a LowRankTaskVector, got dict; AtlasModel takes dense ones"),
        ([fit, LowRankTaskVector({"3.weight": (A, B, 1.0)})], ValueError, r"task-1: expected the weights of task-0; they differ by '0\.w"),
        ([LowRankTaskVector({"9.weight": (A, B, 1.0)})], ValueError, r"'9\.weight' is no weight of Sequential"),
        ([LowRankTaskVector({"3.weight": (A, B, 1.0)})], ValueError, r"expected a change of shape \(5, 13\), got \(13, 7\)"),
        ([LowRankTaskVector({"1.weight": (A, B, 1.0)})], TypeError, r"model: 1: expected nn\.Linear, got LayerNorm"),
    ]
    for pool, kind, message in pools:
        with pytest.raises(kind, match=message):
            LowRankAtlasModel(model, pool)
    mixed: Any = [fit]
    with pytest.raises(TypeError, match="LowRankAtlasModel takes LoRA factors"):
        AtlasModel(model, mixed)
    assert isinstance(fit.dense(), TaskVector)
    assert torch.equal(fit.dense()["0.weight"], B @ A)
    assert all(type(one).forward is not nn.Linear.forward or not hasattr(one, "atlas") for one in model.modules())


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model, x = encoder(), rows()
    adapter = LowRankAtlasModel(model, _pool(model))
    spread(adapter.coef)
    result = adapter(x)
    result.square().sum().backward()
    expected, adapter.coef.grad = adapter.coef.grad, None
    there = adapter.to("cuda")(x.cuda())
    there.square().sum().backward()
    assert expected is not None
    assert adapter.coef.grad is not None
    assert error(there.cpu(), result) <= 1e-5
    assert error(adapter.coef.grad.cpu(), expected) <= 1e-4
    assert error(adapter.merge_()(x.cuda()).cpu(), result) <= 1e-5
