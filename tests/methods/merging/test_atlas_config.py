"""aTLAS with the look of a PEFT method: configurations, and adapters in files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from atlas_samples import encoder, rows, spread, tuned, vectors
from safetensors.torch import load_file
from torch import nn

from taskloom.merge.task_vector import TaskVector
from taskloom.methods.merging.atlas import AtlasConfig, AtlasModel, LowRankAtlasModel, LowRankTaskVector, load_atlas, save_atlas
from taskloom.nn import LowRankConfig, inject, save_adapter


@pytest.mark.parametrize(
    "settings",
    [{}, {"granularity": "vector"}, {"partitions": 4, "partition_seed": 2**64 - 1}, {"matrices_only": True}, {"target_modules": ["3"]}],
)
def test_an_adapter_comes_back_from_its_files(settings: dict[str, Any], tmp_path: Path) -> None:
    """Invariant 7, after a reload."""
    model, x = encoder(), rows()
    pool = dict(zip(("cars", "dtd", "sun"), vectors(model), strict=True))
    adapter = AtlasConfig(task_vectors=pool, **settings).apply(copy.deepcopy(model))
    spread(adapter.coef)
    save_atlas(adapter, tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"coef"}
    described = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert described["peft_type"] == "ATLAS"
    assert described["task_vectors"] == ["cars", "dtd", "sun"]
    more = {"other": pool["cars"], **dict(reversed(pool.items()))}
    for given in (more, list(pool.values())):
        again = load_atlas(tmp_path, copy.deepcopy(model), given)
        assert isinstance(again, AtlasModel)
        assert again.vector_ids == ("cars", "dtd", "sun")
        assert torch.equal(again.coef, adapter.coef)
        assert torch.equal(again(x), adapter(x))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 5), nn.Linear(7, 5)
        self.second.weight = self.first.weight


def test_a_block_of_two_modules_of_which_one_is_meant(tmp_path: Path) -> None:
    pool = vectors(_Tied())
    save_atlas(AtlasModel(_Tied(), pool, target_modules=["second"]), tmp_path)
    assert load_atlas(tmp_path, _Tied(), pool).block_names == ("first.weight", "second.bias")


def test_ids_differ_as_text() -> None:
    one, two = vectors(encoder(), 2)
    pool: Any = {1: one, "1": two}
    with pytest.raises(ValueError, match="expected ids that differ as text, got '1', '1'"):
        AtlasModel(encoder(), pool)


def test_float16_vectors_are_known_again(tmp_path: Path) -> None:
    model = encoder()
    save_atlas(AtlasModel(model, vectors(model)), tmp_path)
    load_atlas(tmp_path, model, vectors(model, dtype=torch.float16))


def test_other_vectors_are_refused(tmp_path: Path) -> None:
    model = encoder()
    pool = dict(zip("abc", vectors(model), strict=True))
    save_atlas(AtlasModel(model, pool), tmp_path)
    with pytest.raises(ValueError, match="'a': expected the one of norm"):
        load_atlas(tmp_path, model, pool | {"a": {name: 1.1 * one for name, one in pool["a"].items()}})
    with pytest.raises(ValueError, match="expected 'a', 'b', 'c', 'c' is missing"):
        load_atlas(tmp_path, model, {"a": pool["a"], "b": pool["b"]})
    with pytest.raises(ValueError, match="expected 3 as the adapter has, got 2"):
        load_atlas(tmp_path, model, vectors(model, 2))
    smaller = nn.Sequential(model[0], model[1])
    with pytest.raises(ValueError, match=r"Sequential lacks '3\.weight', '3\.bias', to which coefficients belong"):
        load_atlas(tmp_path, smaller, pool)
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        load_atlas(tmp_path / "none", model, pool)


def test_a_lora_is_no_atlas_adapter(tmp_path: Path) -> None:
    model = encoder()
    inject(model, LowRankConfig(target_modules="all-linear", r=2))
    save_adapter(model, tmp_path)
    with pytest.raises(TypeError, match="expected an adapter of the type ATLAS, got LORA"):
        load_atlas(tmp_path, encoder(), vectors(encoder()))


def test_vectors_are_read_from_their_files(tmp_path: Path) -> None:
    model, x = encoder(), rows()
    paths = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, path in enumerate(paths, 1):
        TaskVector(model, tuned(model, seed)).save(path)
    adapter = AtlasConfig(task_vectors=paths, partitions=2).apply(copy.deepcopy(model))
    assert adapter.vector_ids == tuple(map(str, paths))
    spread(adapter.coef)
    save_atlas(adapter, tmp_path / "adapter")
    assert torch.equal(load_atlas(tmp_path / "adapter", copy.deepcopy(model))(x), adapter(x))
    with pytest.raises(ValueError, match="is there twice"):
        AtlasConfig(task_vectors=[paths[0], paths[0]]).apply(model)
    one: Any = paths[0]
    with pytest.raises(TypeError, match="got one path"):
        AtlasConfig(task_vectors=one).apply(model)


def test_lora_vectors_make_a_low_rank_adapter(tmp_path: Path) -> None:
    base, x = encoder(), rows()
    for task in range(2):
        adapted = copy.deepcopy(base)
        inject(adapted, LowRankConfig(target_modules="all-linear", r=2 + task))
        for name, one in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(one, std=0.3)
        save_adapter(adapted, tmp_path / f"{task}")
    folders = [tmp_path / "0", tmp_path / "1"]
    adapter = AtlasConfig(task_vectors=folders).apply(copy.deepcopy(base))
    assert isinstance(adapter, LowRankAtlasModel)
    spread(adapter.coef)
    save_atlas(adapter, tmp_path / "adapter")
    again = load_atlas(tmp_path / "adapter", copy.deepcopy(base))
    assert isinstance(again, LowRankAtlasModel)
    assert torch.equal(again(x), adapter(x))
    with pytest.raises(ValueError, match="LoRA vectors take partitions=1"):
        AtlasConfig(task_vectors=folders, partitions=2).apply(base)
    with pytest.raises(ValueError, match="expected LoRA vectors or dense ones, got both"):
        AtlasConfig(task_vectors={"a": folders[0], "b": vectors(base)[0]}).apply(base)
    adapter.merge_()
    with pytest.raises(RuntimeError, match="merged"):
        save_atlas(adapter, tmp_path / "late")


def test_low_rank_vectors_in_memory() -> None:
    model = encoder()
    vector = LowRankTaskVector({"0.weight": (torch.ones(2, 7), torch.ones(13, 2), 1.0)})
    adapter = AtlasConfig(task_vectors={"a": vector}, target_modules=["0"], granularity="vector").apply(model)
    assert isinstance(adapter, LowRankAtlasModel)
    assert adapter.coef.shape == (1,)
