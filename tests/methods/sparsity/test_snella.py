"""SNELL and SNELLA: which layers are adapted, what is saved, and how non-zero entries are divided among layers."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from taskloom.methods.sparsity.snella import (
    KernelLoraConfig,
    KernelLoraLinear,
    SparsityAllocator,
    allocate,
    budget,
    fold_kernel_lora,
    inject_kernel_lora,
    kernel_lora_state_dict,
    load_kernel_lora_state_dict,
    snell_config,
    snella_config,
)
from vision_models import Transformer

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
NAMES = [
    f"blocks.{place}.{name}" for place in range(2) for name in ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2")
]


def _config(**options: Any) -> KernelLoraConfig:
    return KernelLoraConfig(**({"r": 4, "dropout": 0.0, "drop_path": 0.0} | options))


def _stack(*widths: int, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)))
    inject_kernel_lora(model, _config(target_modules="all-linear", **options))
    return model


def _layers(model: nn.Module) -> dict[str, KernelLoraLinear]:
    return {path: one for path, one in model.named_modules() if isinstance(one, KernelLoraLinear)}


def _backward(model: nn.Module) -> None:
    first = next(iter(_layers(model).values()))
    x = torch.randn(7, first.in_features, generator=torch.Generator().manual_seed(2))
    model(x).square().mean().backward()


def test_defaults_are_for_a_vision_transformer() -> None:
    model = Transformer()
    assert inject_kernel_lora(model, _config(modules_to_save=("head",), trainable_parameters=("cls_token",))) == NAMES
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    others = {name for name in trained if name.rpartition(".")[0] not in NAMES}
    assert others == {"cls_token", "head.weight", "head.bias"}
    assert {name.rpartition(".")[2] for name in trained - others} == {"A", "B", "alpha", "gamma", "beta"}


def test_a_fused_layer_is_computed_in_parts() -> None:
    model, plain = Transformer(), Transformer()
    inject_kernel_lora(model, _config(sparsity=1.0))
    torch.testing.assert_close(model(IMAGES), plain(IMAGES))


def test_a_fused_layer_may_stay_whole() -> None:
    model = Transformer()
    assert inject_kernel_lora(model, _config(target_modules=r"blocks\.1\..*qkv", split_qkv=False)) == ["blocks.1.attn.qkv"]


def test_dropout_is_left_out_where_the_official_code_has_none() -> None:
    model = Transformer()
    inject_kernel_lora(model, snella_config(r=4))
    assert {path: layer.config.dropout for path, layer in _layers(model).items()} == {
        name: 0.0 if name.endswith("attn.proj") else 0.1 for name in NAMES
    }
    assert {layer.config.drop_path for layer in _layers(model).values()} == {0.1}


def test_presets_are_those_of_the_papers() -> None:
    snell, snella = snell_config(16), snella_config()
    assert (snell.kernel, snell.r, snell.sparsity, snell.gate, snell.chunks, snell.scale) == ("pwl", 16, 0.9, "magnitude", 2, 0.1)
    assert snell_config(sparsity=0.0).gate is None
    assert (snella.kernel, snella.r, snella.sparsity, snella.gate) == ("mixk", 32, 0.01, "magnitude")
    assert snell_config(gate="soft", kernel="rbf").gate == "soft"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target_modules": ("fc3",)},
            ValueError,
            r"\('fc3',\) names no layer of Transformer; did you mean 'fc[12]', 'fc[12]'",
        ),
        ({"target_modules": ("proj",)}, TypeError, "target_modules: patch_embed.proj: expected nn.Linear, got Conv2d"),
        ({"modules_to_save": ("haed",)}, ValueError, "modules_to_save: 'haed' names no module"),
        ({"trainable_parameters": ("dist_token",)}, ValueError, "trainable_parameters: 'dist_token' names no parameter of Transformer"),
        ({"r": 5}, ValueError, "r: expected a multiple of chunks, 2, got 5"),
        ({"r": 0}, ValueError, "r: expected at least 1, got 0"),
        ({"sparsity": float("nan")}, ValueError, "sparsity: expected a share from 0 to 1, got nan"),
        ({"kernel": "poly"}, ValueError, "kernel: expected one of linear, pwl"),
        ({"gate": "top"}, ValueError, "gate: expected one of magnitude"),
    ],
)
def test_bad_configurations(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        inject_kernel_lora(Transformer(), _config(**options))


@pytest.mark.parametrize("config", [_config(sparsity=0.5), snell_config(4, 0.5, dropout=0.1), _config(gate="hard", sparsity=0.9)])
def test_training_lowers_the_loss_and_leaves_the_base(config: KernelLoraConfig) -> None:
    model = Transformer()
    before = {name: one.clone() for name, one in model.named_parameters()}
    inject_kernel_lora(model, config)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=3e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters() if name in before)


def test_what_was_trained_goes_through_a_file(tmp_path: Path) -> None:
    config = _config(gate="hard", modules_to_save=("head",), trainable_parameters=("cls_token",))
    trained, other = Transformer(), Transformer()
    for model in (trained, other):
        inject_kernel_lora(model, config)
    for layer in _layers(trained).values():
        layer.sparsity = 0.25
    with torch.no_grad():
        trained.cls_token.add_(1)
        trained.head.bias.add_(1)
    state = kernel_lora_state_dict(trained)
    assert not any("base_layer" in name for name in state)
    save_file(state, tmp_path / "adapters.safetensors")
    load_kernel_lora_state_dict(other, load_file(tmp_path / "adapters.safetensors"))
    assert torch.equal(other(IMAGES), trained(IMAGES))
    assert {layer.sparsity for layer in _layers(other).values()} == {0.25}


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = _stack(6, 5, 4)
    before = {name: one.clone() for name, one in kernel_lora_state_dict(model).items()}
    state = {name: one + 0.01 for name, one in before.items()}
    for changed, message in [
        ({name: one for name, one in state.items() if name != "1.B"}, "'1.B' is missing"),
        ({**state, "2.A": state["0.A"]}, "'2.A' is not part of this model"),
        ({**state, "1.B": state["0.B"]}, r"'1.B': expected shape \(2, 4, 2\), got \(2, 5, 2\)"),
        ({**state, "1.sparsity": torch.tensor(1.5)}, r"'1.sparsity': expected a share from 0 to 1, got 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_kernel_lora_state_dict(model, changed)
    _layers(model)["1"].merge()
    with pytest.raises(RuntimeError, match="1: the update is merged"):
        load_kernel_lora_state_dict(model, state)
    assert all(torch.equal(one, before[name]) for name, one in kernel_lora_state_dict(model).items())


def test_folded_models_are_plain_again() -> None:
    model, plain = Transformer(), Transformer()
    inject_kernel_lora(model, _config(gate="hard", scale=1.0))
    y = model.eval()(IMAGES)
    assert fold_kernel_lora(model) is model
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(IMAGES), y, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, plain(IMAGES), atol=1e-3)
    with pytest.raises(ValueError, match="expected layers that inject_kernel_lora made, Transformer has none"):
        fold_kernel_lora(model)


def test_the_budget_follows_a_cubic() -> None:
    # 600 + 400 (1 - (t - 2) / 5)^3, rounded down
    expected = [1000, 1000, 1000, 804, 686, 625, 603, 600, 600, 600, 600]
    assert [budget(t, 1000, 600, 10, warmup=2, final=3) for t in range(11)] == expected
    # Beyond what a float32 counts, and where floating point loses one.
    assert budget(1, 3 * 2**40 + 1, 1, 3) == 1 + 2**40 * 8 // 9
    assert budget(10, 5, 5, 10) == 5


def test_counts_follow_scores_and_full_layers_pass_on() -> None:
    assert allocate(100, [1.0, 3.0], [1000, 1000]) == [25, 75]
    assert allocate(100, [1.0, 3.0], [1000, 40]) == [60, 40]
    assert allocate(90, [1.0, 1.0, 1.0], [10, 1000, 500]) == [10, 40, 40]
    assert allocate(90, [0.0, 0.0, 0.0], [10, 1000, 500]) == [10, 40, 40]
    # The only layer that is not full has a score of 0.
    assert allocate(50, [1.0, 0.0], [20, 100]) == [20, 30]
    assert allocate(500, [1.0, 2.0], [20, 100]) == [20, 100]
    assert allocate(10, [1.0, 2.0], [0, 4]) == [0, 4]
    assert allocate(0, [1.0], [4]) == [0]
    assert allocate(3 * 2**60, [1.0, 2.0], [2**62, 2**62]) == [2**60, 2**61]


@given(
    st.lists(st.tuples(st.floats(0, 1e30), st.integers(0, 10**7)), min_size=1, max_size=8),
    st.integers(0, 10**8),
)
def test_no_count_is_above_the_budget_or_the_layer(layers: list[tuple[float, int]], count: int) -> None:
    scores, sizes = [score for score, _ in layers], [size for _, size in layers]
    given_counts = allocate(count, scores, sizes)
    assert sum(given_counts) <= count
    assert all(0 <= one <= size for one, size in zip(given_counts, sizes, strict=True))
    # Less than one entry per layer is left over.
    assert sum(given_counts) > min(count, sum(sizes)) - len(sizes)


def test_importance_is_that_of_the_paper() -> None:
    model = _stack(6, 5, 4)
    allocator = SparsityAllocator(model, 0.5, 0.0, 10, betas=(0.9, 0.6))
    means: dict[str, tuple[Tensor, Tensor]] = {}
    for _ in range(3):
        model.zero_grad()
        _backward(model)
        with torch.no_grad():
            for path, layer in _layers(model).items():
                layer.A.mul_(1.1)
                for name in ("A", "B"):
                    factor = getattr(layer, name)
                    importance, spread = means.get(f"{path}.{name}", (torch.zeros(()), torch.zeros(())))
                    found = (factor * factor.grad).abs().double()
                    importance = 0.9 * importance + 0.1 * found
                    means[f"{path}.{name}"] = importance, 0.6 * spread + 0.4 * (found - importance).abs()
        allocator.update_importance()
    products = {name: float((importance * spread).mean()) for name, (importance, spread) in means.items()}
    raw = {path: products[f"{path}.A"] + products[f"{path}.B"] for path in ("0", "1")}
    expected = {path: score / sum(raw.values()) for path, score in raw.items()}
    assert allocator.scores() == pytest.approx(expected, rel=1e-4)
    assert allocator.step(10) == pytest.approx(
        {path: 1 - int(25 * score) / size for (path, score), size in zip(expected.items(), (30, 20), strict=True)}, abs=0.06
    )


def test_phases() -> None:
    model = _stack(6, 5, 4)
    allocator = SparsityAllocator(model, target=0.8, init=0.1, total_steps=10, warmup=2, final=3, interval=3)
    assert (allocator.first, allocator.last) == (45, 10)
    assert {layer.sparsity for layer in _layers(model).values()} == {0.1}
    # The first phase never allocates, so it needs no importance.
    assert allocator.step(0) == allocator.step(2) == {"0": 0.1, "1": 0.1}
    with pytest.raises(RuntimeError, match="no importance yet"):
        allocator.step(3)
    _backward(model)
    allocator.update_importance()
    third = allocator.step(3)
    counts = [round((1 - share) * size) for share, size in zip(third.values(), (30, 20), strict=True)]
    assert allocator.budget(3) == 10 + 35 * 64 // 125
    assert allocator.budget(3) - 1 <= sum(counts) <= allocator.budget(3)
    assert allocator.step(4) == allocator.step(5) == third
    assert allocator.step(6) != third
    last = allocator.step(8)
    assert 9 <= sum(round((1 - share) * size) for share, size in zip(last.values(), (30, 20), strict=True)) <= 10
    assert {path: layer.sparsity for path, layer in _layers(model).items()} == last
    for path, layer in _layers(model).items():
        kept = int((layer.delta_weight() != 0).sum())
        assert kept == round((1 - last[path]) * layer.in_features * layer.out_features)


def test_zero_scores_give_equal_counts() -> None:
    model = _stack(6, 5, 4)
    allocator = SparsityAllocator(model, 0.6, 0.0, 4)
    for layer in _layers(model).values():
        layer.A.grad, layer.B.grad = torch.zeros_like(layer.A), torch.full_like(layer.B, torch.nan)
    allocator.update_importance()
    assert allocator.scores() == {"0": 0.0, "1": 0.0}
    assert allocator.step(4) == pytest.approx({"0": 1 - 10 / 30, "1": 1 - 10 / 20})


def test_an_allocator_goes_on_where_it_was() -> None:
    model = _stack(6, 5, 4)
    allocator = SparsityAllocator(model, 0.8, 0.1, 5)
    _backward(model)
    allocator.update_importance()
    allocator.step(2)
    other_model = copy.deepcopy(model)
    other = SparsityAllocator(other_model, 0.8, 0.1, 5)
    other.load_state_dict(copy.deepcopy(allocator.state_dict()))
    assert {path: one.sparsity for path, one in _layers(other_model).items()} == allocator.sparsities()
    for one, its_model in ((allocator, model), (other, other_model)):
        its_model.zero_grad()
        _backward(its_model)
        one.update_importance()
    assert other.scores() == allocator.scores()
    assert other.step(4) == allocator.step(4)


def test_states_of_other_models_change_nothing() -> None:
    allocator = SparsityAllocator(_stack(6, 5, 4), 0.8, 0.1, 5)
    for widths, message in [((6, 5), "sparsities: '1' is missing"), ((6, 5, 3), r"1.B.importance: expected shape \(2, 4, 2\), got")]:
        with pytest.raises(ValueError, match=message):
            allocator.load_state_dict(SparsityAllocator(_stack(*widths), 0.8, 0.3, 5).state_dict())
    with pytest.raises(ValueError, match="state: 'updates' is missing"):
        allocator.load_state_dict({})
    assert allocator.sparsities() == {"0": 0.1, "1": 0.1}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": 0.1, "init": 0.5}, ValueError, r"target: expected at least init, 0.5, got 0.1"),
        ({"target": 1.1}, ValueError, "target: expected a share from 0 to 1, got 1.1"),
        ({"init": float("nan")}, ValueError, "init: expected a share from 0 to 1, got nan"),
        ({"init": "0"}, TypeError, "init: expected a number, got str"),
        ({"total_steps": 5, "warmup": 2, "final": 3}, ValueError, r"total_steps: expected more than warmup \+ final, 5, got 5"),
        ({"total_steps": 5.0}, TypeError, "total_steps: expected an integer, got float"),
        ({"warmup": -1}, ValueError, "warmup: expected at least 0, got -1"),
        ({"interval": 0}, ValueError, "interval: expected at least 1, got 0"),
        ({"betas": (0.85, 1.0)}, ValueError, r"betas: expected two numbers between 0 and 1, got \(0.85, 1.0\)"),
        ({"betas": (0.0, 0.5)}, ValueError, "betas: expected two numbers between 0 and 1"),
        ({"model": nn.Linear(2, 2)}, ValueError, "expected layers that inject_kernel_lora made, Linear has none"),
        ({"model": _stack(3, 2, gate=None)}, ValueError, "model: 0: expected a gate, got None"),
    ],
)
def test_bad_allocators(options: dict[str, Any], error: type[Exception], message: str) -> None:
    fixed: dict[str, Any] = {"target": 0.9, "init": 0.0, "total_steps": 10}
    with pytest.raises(error, match=message):
        SparsityAllocator(**{"model": _stack(3, 2), **fixed, **options})


def test_gradients_have_to_be_there() -> None:
    model = _stack(6, 5, 4)
    allocator = SparsityAllocator(model, 0.8, 0.1, 5)
    with pytest.raises(RuntimeError, match=r"0.A has no gradient; call update_importance\(\) between backward\(\)"):
        allocator.update_importance()
    with pytest.raises(RuntimeError, match="no importance yet"):
        allocator.scores()
    with pytest.raises(ValueError, match="t: expected at least 0, got -1"):
        allocator.step(-1)
    with pytest.raises(TypeError, match="t: expected an integer, got float"):
        allocator.step(1.0)
