"""Which layers inject replaces, by name as PEFT has it, and what is trained afterwards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import Transformer, randomise
from torch import Tensor, nn

from taskloom.nn import (
    BASE,
    KernelConfig,
    KernelLinear,
    LayerConfig,
    LowRankConfig,
    LowRankLinear,
    SplitLinear,
    inject,
    split_fused,
    use_tasks,
)

X = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["proj"], ["blocks.0.attn.proj", "blocks.1.attn.proj"]),
        (["attn.proj", "fc2"], ["blocks.0.attn.proj", "blocks.0.mlp.fc2", "blocks.1.attn.proj", "blocks.1.mlp.fc2"]),
        (["blocks.1.mlp.fc1"], ["blocks.1.mlp.fc1"]),
        (r"blocks\.0\..*(qkv|fc1)", ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"]),
        (("head",), ["head"]),
    ],
)
def test_targets(targets: Any, expected: list[str]) -> None:
    model = Transformer()
    y = model(X)
    assert inject(model, LowRankConfig(target_modules=targets, r=2)) == expected
    assert [name for name, one in model.named_modules() if isinstance(one, LowRankLinear)] == expected
    assert model(X).equal(y)
    assert {name.rpartition(".lora_")[0] for name, one in model.named_parameters() if one.requires_grad} == set(expected)


def test_all_linear_layers_but_some() -> None:
    model = Transformer()
    found = inject(model, LowRankConfig(target_modules="all-linear", exclude_modules=["qkv"], modules_to_save=["head"]))
    assert len(found) == 6
    assert not any(name.endswith(("qkv", "head")) for name in found)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"head.weight", "head.bias"}


def test_patterns() -> None:
    model = Transformer()
    config = LowRankConfig(
        target_modules=["qkv", "fc1"], r=4, lora_alpha=8, rank_pattern={"fc1": 2, r"blocks\.1\.attn\.qkv": 6}, alpha_pattern={"qkv": 1.0}
    )
    inject(model, config)
    settings = {name: one.settings["default"] for name, one in model.named_modules() if isinstance(one, LowRankLinear)}
    assert {name: (one.r, one.alpha) for name, one in settings.items()} == {
        "blocks.0.attn.qkv": (4, 1.0),
        "blocks.0.mlp.fc1": (2, 8),
        "blocks.1.attn.qkv": (6, 1.0),
        "blocks.1.mlp.fc1": (2, 8),
    }


def test_a_second_adapter_joins_the_first() -> None:
    model = Transformer()
    first = inject(model, LowRankConfig(target_modules=["fc1"], r=2))
    second = inject(model, LowRankConfig(target_modules=["fc1", "proj"], r=3, adapter_name="other"))
    assert set(second) > set(first)
    assert model.get_submodule(first[0]).adapters == ["default", "other"]
    assert model.get_submodule("blocks.0.attn.proj").adapters == ["other"]
    assert not any("base_layer" in name and one.requires_grad for name, one in model.named_parameters())


def test_batches_of_several_adapters_through_a_model() -> None:
    model = Transformer()
    for name in ("a", "b"):
        inject(model, LowRankConfig(target_modules=["qkv", "proj", "fc1", "fc2"], r=2, adapter_name=name))
    randomise(model)
    model.eval()
    layers = [one for one in model.modules() if isinstance(one, LowRankLinear)]
    expected = []
    for sample, name in zip(X, ("b", BASE, "a"), strict=True):
        for layer in layers:
            layer.set_adapter([] if name == BASE else name)
        expected.append(model(sample[None])[0])
    with use_tasks(model, ["b", BASE, "a"]):
        y = model(X)
    torch.testing.assert_close(y, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert all(layer.tasks is None for layer in layers)


def test_qkv_taken_apart() -> None:
    model = Transformer()
    y = model(X)
    fused = model.blocks[0].attn.qkv
    found = inject(model, LowRankConfig(target_modules=["q", "v", "proj"], r=2, split_qkv=True))
    assert found[:3] == ["blocks.0.attn.qkv.q", "blocks.0.attn.qkv.v", "blocks.0.attn.proj"]
    torch.testing.assert_close(model(X), y, rtol=1e-5, atol=1e-6)
    split = model.blocks[0].attn.qkv
    assert isinstance(split, SplitLinear)
    with pytest.raises(TypeError, match=r"q: expected nn.Linear, got LowRankLinear; merge its adapters"):
        split.fuse()
    for name in ("q", "v"):
        setattr(split, name, getattr(split, name).base_layer)
    assert split.fuse().weight.equal(fused.weight)
    assert split.fuse().bias.equal(fused.bias)
    assert split_fused(model) == []


def test_parts_of_a_fused_layer() -> None:
    split = SplitLinear(nn.Linear(5, 6, bias=False), ("a", "b"))
    assert split.a.weight.shape == (3, 5)
    assert split.fuse().bias is None
    with pytest.raises(ValueError, match="names: 6 outputs do not divide among 4 parts"):
        SplitLinear(nn.Linear(5, 6), ("a", "b", "c", "d"))
    with pytest.raises(TypeError, match=r"norm: expected nn.Linear, got LayerNorm"):
        split_fused(Transformer().blocks[0], "norm")


@dataclass(frozen=True, kw_only=True)
class _Scaled(LayerConfig):
    """A configuration of another kind of layer."""

    factor: float = 2.0

    def build(self, linear: nn.Linear) -> nn.Module:
        return _ScaledLinear(linear, self.factor)


class _ScaledLinear(nn.Module):
    def __init__(self, linear: nn.Linear, factor: float) -> None:
        super().__init__()
        self.linear, self.factor = linear, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.linear(x)


def test_other_layers_are_built_by_their_configuration() -> None:
    model = Transformer()
    y = model(X)
    assert inject(model, _Scaled(target_modules=["head"]), freeze=False) == ["head"]
    torch.testing.assert_close(model(X), 2 * y)
    assert all(one.requires_grad for one in model.parameters())


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            {"target_modules": ["query", "fc_1"]},
            ValueError,
            r"\['query', 'fc_1'\] names no layer of Transformer; did you mean 'fc1', 'fc2'\?",
        ),
        (
            {"target_modules": ["zzz"]},
            ValueError,
            "names no layer of Transformer; the linear layers end in 'fc1', 'fc2', 'head', 'proj', 'qkv'",
        ),
        ({"target_modules": "blocks"}, TypeError, "target_modules: blocks: expected nn.Linear, got ModuleList"),
        ({"target_modules": ["attn"]}, TypeError, r"target_modules: blocks.0.attn: expected nn.Linear, got Attention"),
        ({"target_modules": ["qkv"], "modules_to_save": ["classifier"]}, ValueError, "modules_to_save: 'classifier' names no module"),
        ({"target_modules": ["qkv"], "r": 0}, ValueError, "r: expected a rank of at least 1, got 0"),
        ({"target_modules": ["qkv"], "rank_pattern": {"x": -1}}, ValueError, r"rank_pattern\['x'\]: expected a rank of at least 1, got -1"),
        ({"target_modules": ["qkv"], "r": 2.0}, TypeError, "r: expected a rank, an integer, got float"),
        ({"target_modules": ["qkv"], "lora_alpha": float("nan")}, ValueError, "lora_alpha: expected a finite number, got nan"),
        ({"target_modules": ["qkv"], "lora_dropout": 1.5}, ValueError, "lora_dropout: expected a probability below 1, got 1.5"),
    ],
)
def test_errors(config: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Transformer()
    with pytest.raises(error, match=message):
        inject(model, LowRankConfig(**config))
    assert all(one.requires_grad for one in model.parameters())
    assert not any(isinstance(one, LowRankLinear) for one in model.modules())


@pytest.mark.parametrize("name", ["shared", "first"])
def test_a_layer_in_several_places_is_replaced_in_all(name: str) -> None:
    model = nn.Sequential()
    model.first = model.shared = nn.Linear(4, 4)
    assert inject(model, LowRankConfig(target_modules=[name])) == ["first"]
    assert model.first is model.shared
    assert isinstance(model.first, LowRankLinear)


@pytest.mark.parametrize("config", [LowRankConfig(target_modules=["fc2", "qkv"]), KernelConfig(target_modules=["fc2", "qkv"])])
def test_what_is_adapted_already_changes_nothing(config: LayerConfig) -> None:
    model = Transformer()
    inject(model, dataclasses.replace(config, target_modules=["blocks.1.mlp.fc2"]), freeze=False)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    with pytest.raises(
        ValueError, match=r"target_modules: blocks.1.mlp.fc2: (name: 'default' is taken|expected a layer that is not adapted)"
    ):
        inject(model, config)
    assert type(model.blocks[0].attn.qkv) is nn.Linear
    assert {name for name, one in model.named_parameters() if one.requires_grad} == trained


def test_a_merged_adapter_changes_nothing() -> None:
    model = Transformer()
    inject(model, LowRankConfig(target_modules=["fc2"]))
    model.blocks[1].mlp.fc2.merge()
    with pytest.raises(RuntimeError, match=r"target_modules: blocks.1.mlp.fc2: add_adapter: default are merged"):
        inject(model, LowRankConfig(target_modules=["fc2", "fc1"], adapter_name="other"))
    assert model.blocks[0].mlp.fc2.adapters == ["default"]
    assert type(model.blocks[0].mlp.fc1) is nn.Linear


def test_every_layer_takes_a_second_adapter_and_none_inside_another() -> None:
    model = Transformer()
    inject(model, KernelConfig(target_modules=["fc1"], r=2))
    found = inject(model, LowRankConfig(target_modules="all-linear"))
    assert len(found) == 7
    assert type(model.blocks[0].mlp.fc1.base_layer) is nn.Linear
    assert inject(model, LowRankConfig(target_modules="all-linear", adapter_name="other")) == found


def test_a_weight_of_two_modules_is_warned_of() -> None:
    model = nn.Sequential()
    model.embedding, model.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    model.head.weight = model.embedding.weight
    with pytest.warns(UserWarning, match=r"inject: head.weight is embedding.weight too; merging adapters into it changes both"):
        inject(model, LowRankConfig(target_modules=["head"]))


def test_parts_of_a_fused_layer_keep_its_mode() -> None:
    model = Transformer().eval()
    inject(model, KernelConfig(target_modules=["q", "k", "v"], r=2, dropout=0.5, split_qkv=True))
    assert not any(one.training for one in model.modules())
    assert model(X).equal(model(X))


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _quantised() -> nn.Linear:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (_Doubled(4, 4), "expected nn.Linear, got _Doubled, whose forward pass is another"),
        (_quantised(), "expected a weight of float32, bfloat16, float16 or float64, got torch.int8"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "expected a weight that is a parameter, got one that ParametrizedLinear"),
        (nn.LazyLinear(4), "expected a weight with a shape, got the one of a LazyLinear"),
    ],
)
def test_layers_whose_adapters_would_do_something_else(layer: nn.Module, message: str) -> None:
    for config in (LowRankConfig(target_modules=["1"]), KernelConfig(target_modules=["1"])):
        model = nn.Sequential(nn.ReLU(), layer)
        with pytest.raises(TypeError, match=f"target_modules: 1: .*{message}"):
            inject(model, config)
        assert model[1] is layer
    for made in (LowRankLinear, KernelLinear):
        with pytest.raises(TypeError, match=message):
            made(layer)


def test_attention_that_never_calls_its_layer() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(TypeError, match=r"0.out_proj: nn.MultiheadAttention reads its weight and never calls it"):
        inject(model, LowRankConfig(target_modules="all-linear"))
