"""merge_breadcrumbs of task vectors: in memory, from checkpoints, beside state dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from breadcrumbs_models import FLOAT_NAMES, STEPS, assert_same_bits, models
from safetensors.torch import save_file

from taskloom import TaskVector
from taskloom.merge import merge_state_dicts
from taskloom.methods.merging.breadcrumbs import merge_breadcrumbs

pytestmark = pytest.mark.filterwarnings("ignore:merge_breadcrumbs. nothing")

SETTINGS: dict[str, Any] = {"weight": [0.5, -0.25, 0.3], "density": [0.3, 0.15, 0.6], "gamma": 0.05}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("more", [{}, {"granularity": "row", "sign_consensus": True, "normalize": True, "lambda_": 0.7}])
def test_vectors_give_the_bits_of_their_models(dtype: torch.dtype, more: dict[str, Any]) -> None:
    base, tuned = models(3, dtype, tied=True)
    vectors = [TaskVector(base, one) for one in tuned]
    expected = merge_breadcrumbs(base, tuned, **SETTINGS, **more)
    assert_same_bits(merge_breadcrumbs(base, vectors, **SETTINGS, **more), expected)
    assert_same_bits(merge_breadcrumbs(base, [tuned[0], vectors[1], tuned[2]], **SETTINGS, **more), expected)
    if not more:
        assert_same_bits(merge_state_dicts(base, vectors, "breadcrumbs", **SETTINGS), expected)


def test_vectors_of_checkpoints(tmp_path: Path) -> None:
    base, tuned = models(2)
    for name, state in (("base", base), ("m0", tuned[0]), ("m1", tuned[1])):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    vectors = [TaskVector.from_checkpoints(tmp_path / "base", tmp_path / f"m{number}") for number in range(2)]
    expected = merge_breadcrumbs(base, tuned, weight=[0.5, 1.0])
    assert_same_bits(merge_breadcrumbs(base, vectors, weight=[0.5, 1.0]), expected)
    assert_same_bits(merge_breadcrumbs(base, [0.5 * vectors[0], vectors[1]], weight=1.0), expected)


def test_vectors_stored_in_float16_are_ranked_as_stored() -> None:
    base, tuned = models(1)
    stored = TaskVector.from_models(base, tuned[0])
    rounded = {name: stored[name].float() for name in FLOAT_NAMES}
    zero = {name: torch.zeros_like(base[name]) for name in FLOAT_NAMES}
    alone = merge_breadcrumbs(zero, [rounded], weight=0.5)
    merged = merge_breadcrumbs(base, [stored], weight=0.5)
    for name in FLOAT_NAMES:
        assert merged[name].equal(base[name] + alone[name])
    assert merged[STEPS].equal(base[STEPS])


def test_what_does_not_fit() -> None:
    base, tuned = models(2)
    vector = TaskVector(base, tuned[0])
    few = TaskVector.from_deltas({name: vector[name] for name in FLOAT_NAMES[1:]})
    with pytest.raises(KeyError, match=r"finetuned\[1\] lacks 'model.layers.0.mlp.weight'; strict=False"):
        merge_breadcrumbs(base, [tuned[0], few])
    with pytest.warns(UserWarning, match=r"the 5 floating-point tensors that all have"):
        merged = merge_breadcrumbs(base, [few], strict=False)
    assert merged[FLOAT_NAMES[0]].equal(base[FLOAT_NAMES[0]])
    assert not merged[FLOAT_NAMES[1]].equal(base[FLOAT_NAMES[1]])
    more = TaskVector.from_deltas({**vector, "model.more": torch.ones(2)})
    with pytest.raises(KeyError, match=r"finetuned\[0\] has 'model.more', which base lacks"):
        merge_breadcrumbs(base, [more])
    other = TaskVector.from_deltas({**vector, "model.norm.bias": torch.ones(2)})
    with pytest.raises(ValueError, match=r"finetuned\[0\]: tensor 'model.norm.bias': expected shape \(64,\) as in base, got \(2,\)"):
        merge_breadcrumbs(base, [other])
    with pytest.raises(ValueError, match="expected task vectors of one regime"):
        merge_breadcrumbs(base, [vector, vector.as_regime("linear")])
    with pytest.raises(TypeError, match=r"base: expected a state dict or a torch.nn.Module, got TaskVector"):
        merge_breadcrumbs(vector, [tuned[0]])


def test_tied_weights_stay_tied() -> None:
    base, tuned = models(2)
    for state in (base, *tuned):
        state["model.head.weight"] = state[FLOAT_NAMES[0]]
    merged = merge_breadcrumbs(base, [TaskVector(base, one) for one in tuned])
    assert merged["model.head.weight"] is merged[FLOAT_NAMES[0]]
    assert_same_bits(merged, merge_breadcrumbs(base, tuned))
    untied = {**tuned[1], "model.head.weight": tuned[1]["model.head.weight"] + 1}
    apart = merge_breadcrumbs(base, [TaskVector(base, tuned[0]), TaskVector(base, untied)])
    assert not apart["model.head.weight"].equal(apart[FLOAT_NAMES[0]])
