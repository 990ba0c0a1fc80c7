"""Adapters in timm's vision transformers, and in a small model of the same names: put in, trained, saved, and folded back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optional import obstacle, optional
from taskloom.methods.sparsity.snella import (
    KernelLoraLinear,
    fold_kernel_lora,
    inject_kernel_lora,
    kernel_lora_state_dict,
    load_kernel_lora_state_dict,
    snella_config,
)
from taskloom.nn import LowRankConfig, LowRankLinear, inject, load_adapter, save_adapter
from taskloom.nn.fused_linear import split_fused
from vision_models import Transformer

LAYERS = [f"blocks.{place}.{name}" for place in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
PARTS = [path for layer in LAYERS for path in ([f"{layer}.{name}" for name in "qkv"] if layer.endswith("qkv") else [layer])]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 3, 2, 4])

Make = Callable[[], nn.Module]


def _timm() -> nn.Module:
    timm = optional("timm")
    assert timm is not None
    torch.manual_seed(0)
    model: nn.Module = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5
    )
    return model


@pytest.fixture(
    params=[
        pytest.param(Transformer, id="timm-shaped"),
        pytest.param(_timm, id="timm", marks=pytest.mark.skipif(obstacle("timm") is not None, reason=str(obstacle("timm")))),
    ]
)
def make(request: pytest.FixtureRequest) -> Make:
    """Makes a model, each time with the same weights."""
    made: Make = request.param
    return made


def _injected(make: Make, **options: Any) -> nn.Module:
    model = make()
    fixed = {"r": 4, "sparsity": 0.5, "dropout": 0.0, "drop_path": 0.0, "modules_to_save": ("head",)}
    assert inject_kernel_lora(model, snella_config(**fixed | options)) == PARTS
    return model


def _trained(model: nn.Module, steps: int = 1, rate: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _differences(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {path for path, one in model.state_dict().items() if not torch.equal(one, before[path])}


def test_taking_qkv_apart_changes_no_output(make: Make) -> None:
    model, plain = make(), make()
    assert split_fused(model) == [path for path in LAYERS if path.endswith("qkv")]
    for path in (path for path in PARTS if path not in LAYERS):
        assert model.get_submodule(path).weight.shape[0] * 3 == plain.get_submodule(path.rpartition(".")[0]).weight.shape[0]
    torch.testing.assert_close(model(IMAGES), plain(IMAGES))


def test_a_step_changes_what_is_trained_and_nothing_else(make: Make) -> None:
    model = _injected(make)
    before = {path: one.clone() for path, one in model.state_dict().items()}
    _trained(model)
    trained = {f"{path}.{name}" for path in PARTS for name in ("A", "B", "alpha", "gamma", "beta")} | {"head.weight", "head.bias"}
    assert _differences(model, before) == trained
    assert all(torch.isfinite(one).all() for one in model.state_dict().values())


def test_training_lowers_the_loss_and_folds_into_plain_layers(make: Make) -> None:
    model, plain = _injected(make, gate="hard", sparsity=0.25), make()
    losses = _trained(model, steps=12)
    assert losses[-1] < 0.8 * losses[0]
    y = model.eval()(IMAGES)
    before = plain.state_dict()
    assert fold_kernel_lora(model) is model
    state = model.state_dict()
    assert [(path, one.shape) for path, one in state.items()] == [(path, one.shape) for path, one in before.items()]
    assert _differences(model, before) == {f"{path}.weight" for path in LAYERS} | {"head.weight", "head.bias"}
    assert not any(isinstance(one, KernelLoraLinear) for one in model.modules())
    plain.load_state_dict(state)
    torch.testing.assert_close(plain.eval()(IMAGES), y, rtol=1e-4, atol=1e-4)


def test_what_was_trained_goes_through_a_file(make: Make, tmp_path: Path) -> None:
    trained, other = _injected(make), _injected(make)
    _trained(trained, steps=2)
    save_file(kernel_lora_state_dict(trained), tmp_path / "adapters.safetensors")
    assert not torch.equal(other(IMAGES), trained(IMAGES))
    load_kernel_lora_state_dict(other, load_file(tmp_path / "adapters.safetensors"))
    assert torch.equal(other(IMAGES), trained(IMAGES))


def test_low_rank_adapters(make: Make, tmp_path: Path) -> None:
    config = LowRankConfig(r=3, target_modules=("q", "v", "fc1"), split_qkv=True, modules_to_save=("head",))
    model, other = make(), make()
    assert inject(model, config) == [path for path in PARTS if path.rpartition(".")[2] in ("q", "v", "fc1")]
    _trained(model, steps=2)
    y = model.eval()(IMAGES)
    save_adapter(model, tmp_path, modules_to_save=("head",))
    split_fused(other)
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other.eval()(IMAGES), y)
    for layer in (one for one in model.modules() if isinstance(one, LowRankLinear)):
        layer.merge()
    torch.testing.assert_close(model(IMAGES), y, rtol=1e-4, atol=1e-4)
