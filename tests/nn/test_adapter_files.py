"""Adapters written and read as PEFT's files; PEFT itself gives the same outputs for the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Transformer, randomise
from safetensors.torch import load_file, save_file

from taskloom.methods.merging.rmm import from_peft
from taskloom.nn import LowRankConfig, LowRankLinear, adapter_state_dict, inject, load_adapter, save_adapter
from taskloom.nn.adapter_files import read_factors

X = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(3))
TARGETS = ["qkv", "proj", "fc1"]


def _adapted(**settings: Any) -> Transformer:
    model = Transformer()
    inject(model, LowRankConfig(**({"target_modules": TARGETS, "r": 3, "lora_alpha": 6} | settings)))
    randomise(model)
    return model.eval()


CONFIGS: list[Any] = [
    pytest.param({}, id="lora"),
    pytest.param({"use_dora": True}, id="dora"),
    pytest.param({"use_rslora": True, "lora_dropout": 0.1}, id="rslora"),
    pytest.param({"rank_pattern": {"fc1": 2, "blocks.1.attn.proj": 5}, "alpha_pattern": {"qkv": 1.5}}, id="patterns"),
]


@pytest.mark.parametrize("settings", CONFIGS)
def test_round_trip(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = _adapted(**settings)
    save_adapter(model, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    other = Transformer().eval()
    layers = load_adapter(other, tmp_path / "new" / "folder", "mine")
    assert sorted(layers) == sorted(name for name, one in model.named_modules() if isinstance(one, LowRankLinear))
    assert other(X).equal(model(X))
    assert not any(one.requires_grad for name, one in other.named_parameters() if "lora_" in name)
    for name in layers:
        ours, theirs = other.get_submodule(name), model.get_submodule(name)
        assert ours.settings["mine"] == theirs.settings["default"]


def test_the_file_holds_the_adapter_only(tmp_path: Path) -> None:
    model = _adapted(use_dora=True)
    save_adapter(model, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert set(state) == {
        f"base_model.model.blocks.{block}.{layer}.{part}"
        for block in (0, 1)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1")
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    }
    assert all(state[key].equal(tensor) for key, tensor in adapter_state_dict(model).items())


def test_modules_to_save(tmp_path: Path) -> None:
    model = _adapted(modules_to_save=["head"])
    with torch.no_grad():
        model.head.weight.add_(1)
    save_adapter(model, tmp_path, modules_to_save=("head",))
    other = Transformer().eval()
    load_adapter(other, tmp_path)
    assert other(X).equal(model(X))
    assert other.head.weight.equal(model.head.weight)


def test_modules_that_share_a_weight_or_are_none(tmp_path: Path) -> None:
    model = _adapted()
    model.tied = torch.nn.Linear(12, 5)
    model.tied.weight = model.head.weight
    save_adapter(model, tmp_path, modules_to_save=("head", "tied"))
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert state["base_model.model.tied.weight"].equal(state["base_model.model.head.weight"])
    with pytest.raises(ValueError, match="modules_to_save: 'haed' names no module of Transformer"):
        save_adapter(model, tmp_path / "new", modules_to_save=("haed",))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4' changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora' changes the base"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens: \[1, 2\] is not supported"),
        ({"use_qalora": True}, "use_qalora: True is not supported"),
        ({"kasa_config": {"x": 1}}, "kasa_config: .* is not supported"),
    ],
)
def test_factors_that_are_not_all_there_is(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    save_adapter(_adapted(), tmp_path)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(described | settings))
    with pytest.raises(ValueError, match=message):
        load_adapter(Transformer(), tmp_path)
    with pytest.raises(ValueError, match=message):
        from_peft([tmp_path])


def test_a_layer_by_its_number() -> None:
    with pytest.raises(ValueError, match="layers_to_transform: 0 is not supported"):
        LowRankConfig.from_peft({"target_modules": ["q"], "layers_to_transform": 0})


def test_paths_that_end_alike(tmp_path: Path) -> None:
    model = torch.nn.Sequential()
    model.add_module("fc", torch.nn.Linear(4, 4))
    model.add_module("inner", torch.nn.Sequential())
    model.inner.add_module("fc", torch.nn.Linear(4, 4))
    inject(model, LowRankConfig(target_modules="fc", r=2))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "fc"
    other = torch.nn.Sequential()
    other.add_module("fc", torch.nn.Linear(4, 4))
    other.add_module("inner", torch.nn.Sequential())
    other.inner.add_module("fc", torch.nn.Linear(4, 4))
    assert load_adapter(other, tmp_path) == ["fc"]


def _changed(tmp_path: Path, change: Any) -> Path:
    save_adapter(_adapted(), tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    change(state, config)
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


FIRST = "base_model.model.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda state, config: config.update(peft_type="IA3"), TypeError, "peft_type: expected LORA, got IA3"),
        (lambda state, config: config.update(bias="all"), ValueError, "bias: expected 'none', got 'all'"),
        (lambda state, config: config.update(fan_in_fan_out=True), ValueError, "fan_in_fan_out: True is not supported"),
        (lambda state, config: config.update(target_modules=None), ValueError, "target_modules: expected names or a pattern, got none"),
        (lambda state, config: config.update(r=4), ValueError, r"blocks.*expected shape \(4, 12\), got \(3, 12\)"),
        (
            lambda state, config: config.update(use_dora=True),
            ValueError,
            "expected lora_A.weight, lora_B.weight, lora_magnitude_vector, got",
        ),
        (
            lambda state, config: state.pop(f"{FIRST}.lora_B.weight"),
            ValueError,
            "layer 'blocks.0.attn.qkv': expected .*, got lora_A.weight",
        ),
        (
            lambda state, config: state.update({"base_model.model.elsewhere.lora_A.weight": torch.zeros(3, 12)}),
            ValueError,
            "layer 'elsewhere': expected nn.Linear in the model, it is missing",
        ),
        (
            lambda state, config: state.update({"base_model.model.head.weight": torch.zeros(5, 12)}),
            ValueError,
            "'head.weight' is neither a LoRA factor nor part of modules_to_save",
        ),
        (lambda state, config: state.clear(), ValueError, "the file has no LoRA factors"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, change: Any, error: type[Exception], message: str) -> None:
    folder = _changed(tmp_path, change)
    model = Transformer()
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert not any(isinstance(one, LowRankLinear) for one in model.modules())


def test_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a PEFT adapter, adapter_model.safetensors is missing"):
        load_adapter(Transformer(), tmp_path)
    model = _adapted()
    with pytest.raises(ValueError, match="adapter_name: no layer has an adapter 'other', there are 'default'"):
        save_adapter(model, tmp_path, "other")
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        load_adapter(model, tmp_path)
    assert set(load_adapter(model, tmp_path, "other", trainable=True)) == {
        f"blocks.{b}.{one}" for b in (0, 1) for one in ("attn.qkv", "attn.proj", "mlp.fc1")
    }
    assert all(one.requires_grad for name, one in model.named_parameters() if ".other." in name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", CONFIGS)
def test_peft_gives_the_same_outputs_for_our_file_and_we_for_its(tmp_path: Path, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = _adapted(**settings)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Transformer(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(X), model(X), rtol=1e-5, atol=1e-6)
    ours = {name: one for name, one in model.named_parameters() if "lora_" in name}
    for name, one in theirs.base_model.model.named_parameters():
        if "lora_" in name:
            assert one.equal(ours[name])

    made = peft.get_peft_model(Transformer(), peft.LoraConfig(**({"target_modules": TARGETS, "r": 3, "lora_alpha": 6} | settings)))
    randomise(made, 7)
    made.eval().save_pretrained(tmp_path / "theirs")
    read = Transformer().eval()
    load_adapter(read, tmp_path / "theirs")
    torch.testing.assert_close(read(X), made(X), rtol=1e-5, atol=1e-6)
    merged = made.merge_and_unload()
    for one in read.modules():
        if isinstance(one, LowRankLinear):
            one.merge()
    for name, parameter in merged.named_parameters():
        path, _, own = name.rpartition(".")
        layer = read.get_submodule(path)
        torch.testing.assert_close(getattr(layer, own), parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [one for one in CONFIGS if one.id != "dora"])
def test_factors_are_read_without_a_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = _adapted(**settings)
    save_adapter(model, tmp_path)
    layers = {path: one for path, one in model.named_modules() if isinstance(one, LowRankLinear)}
    found = read_factors(tmp_path)
    assert set(found) == set(layers)
    for path, (right, left, scale) in found.items():
        delta = layers[path].delta_weight()
        assert torch.allclose(scale * left @ right, delta, rtol=1e-5, atol=1e-6)


def test_files_that_are_more_than_factors_or_less(tmp_path: Path) -> None:
    save_adapter(_adapted(use_dora=True), tmp_path / "dora")
    with pytest.raises(ValueError, match="an adapter of DoRA is no low-rank change"):
        read_factors(tmp_path / "dora")
    save_adapter(_adapted(modules_to_save=["head"]), tmp_path / "head", modules_to_save=("head",))
    with pytest.raises(ValueError, match=r"expected LoRA factors of linear layers alone, got 'head\."):
        read_factors(tmp_path / "head")
    save_adapter(_adapted(), tmp_path / "half")
    file = tmp_path / "half" / "adapter_model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("lora_B.weight"))
    save_file({**state, name: state[name][:, :2].contiguous()}, file)
    with pytest.raises(ValueError, match=r"expected rank 3, got \(3, \d+\) and \(\d+, 2\)"):
        read_factors(tmp_path / "half")
    save_file({one: value for one, value in state.items() if one != name}, file)
    with pytest.raises(ValueError, match=r"expected lora_A\.weight and lora_B\.weight, got lora_A\.weight"):
        read_factors(tmp_path / "half")
    save_file({}, file)
    with pytest.raises(ValueError, match="has no LoRA factors"):
        read_factors(tmp_path / "half")
