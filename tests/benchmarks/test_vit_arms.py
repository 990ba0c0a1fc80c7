"""The benchmark of a vision transformer's training step: its arms train the same layers, and the same updates give the same gradients."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bench_vit_snella
import kernel_forms
from optional import obstacle
from taskloom.nn.fused_linear import split_fused
from vision_models import Transformer
from vit_arms import ARMS, SAME, Setting, Training, adapted, arm_obstacle

SETTING = Setting(rank=4, sparsity=0.5)
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
THERE = [arm for arm in ARMS if arm_obstacle(arm) is None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only cost time at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> nn.Module:
    made = Transformer(width=16)
    split_fused(made)
    return made


def _training(arm: str, model: nn.Module) -> Training:
    return Training(adapted(arm, model, SETTING), IMAGES, torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize("arm", SAME)
def test_the_official_forms_give_our_loss_and_gradients(arm: str, model: nn.Module) -> None:
    errors = bench_vit_snella.gate(_training("ours", model), _training(arm, model))
    assert errors["loss"] < 1e-6
    assert errors["gradient"] < 1e-4


def test_an_update_changes_the_loss(model: nn.Module) -> None:
    with pytest.raises(AssertionError, match=r"relative error"):
        bench_vit_snella.gate(_training("ours", model), Training(adapted("official", model, Setting(4, 0.0)), IMAGES, torch.arange(4)))


def test_a_wrong_form_is_not_measured(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_forms.gated
    monkeypatch.setattr(kernel_forms, "gated", lambda *given: 1.1 * right(*given))
    with pytest.raises(AssertionError, match=r"blocks.*relative error .* of the gradient"):
        bench_vit_snella.gate(_training("ours", model), _training("official", model))


@pytest.mark.parametrize("arm", THERE)
def test_a_step_trains_adapters_and_head(arm: str, model: nn.Module) -> None:
    run = _training(arm, model)
    before: dict[str, Tensor] = {path: one.clone() for path, one in run.model.named_parameters()}
    for _ in range(2):
        run.step()
    changed = {path for path, one in run.model.named_parameters() if not torch.equal(one, before[path])}
    assert changed == set(run.trained)
    # Two factors of twelve layers, for SNELLA three numbers each; the head.
    assert len(changed) == (2 if "lora" in arm else 5) * 12 + 2


def test_arms_have_the_frozen_weights_in_common(model: nn.Module) -> None:
    frozen = model.blocks[0].attn.qkv.q.weight
    for arm in THERE:
        assert any(one is frozen for one in adapted(arm, model, SETTING).parameters())


def test_the_whole_run(model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def peak(arm: str, options: Namespace) -> dict[str, int]:
        return {"model_bytes": 1000, "rise_bytes": 110 if arm == "ours" else 100}

    monkeypatch.setattr(bench_vit_snella, "measured_peak", peak)
    monkeypatch.setattr(bench_vit_snella, "transformer", lambda options, depth: model)
    monkeypatch.setattr(bench_vit_snella, "obstacle", lambda name: None)
    kept = tmp_path / "found.json"
    given = ["--batch=2", "--pixels=8", "--rank=4", "--sparsity=0.5", "--rounds=1", "--arms", "lora", "official", "--json", str(kept)]
    monkeypatch.setattr("sys.argv", ["bench_vit_snella.py", *given])
    assert bench_vit_snella.main() == 0
    found = json.loads(kept.read_text())
    assert (set(found["arms"]), set(found["errors"])) == ({"ours", "lora", "official"}, {"official"})
    assert found["arms"]["ours"]["over_ours"]["median"] == 1
    assert "1.100" in capsys.readouterr().out


@pytest.mark.skipif(obstacle("timm") is not None, reason=str(obstacle("timm")))
def test_the_peak_of_a_step_of_timms_model() -> None:
    options = bench_vit_snella.parser().parse_args(["--model=vit_tiny_patch16_224", "--pixels=32", "--batch=8", "--rank=4"])
    found = bench_vit_snella.peak("ours", Namespace(**vars(options) | {"depth": 2}))
    assert 2e6 < found["model_bytes"] < 6e6
    assert 0 < found["rise_bytes"] < 100e6
