"""Consensus masks and merges: the counts, what every k means, and the bits of the recipes consensus_ta and consensus_ties."""

from __future__ import annotations

from functools import reduce
from operator import and_, or_
from typing import Any

import numpy as np
import pytest
import torch
from tall_states import grid_models, make_models, same

from taskloom import TaskVector
from taskloom.merge import merge_state_dicts
from taskloom.methods.merging.tall_masks import (
    PackedMask,
    consensus_mask,
    mask_profile,
    merge_consensus,
    multi_task_vector,
    tall_masks,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _masks(tasks: int = 5) -> dict[str, PackedMask]:
    base, tuned = make_models(tasks, share=0.6)
    return tall_masks(base, tuned, multi_task_vector(base, tuned))


def test_invariant_5_every_k() -> None:
    masks = _masks(5)
    counts = {name: sum(mask.unpack()[name].int() for mask in masks.values()) for name in masks["task-0"]}
    for k in range(7):
        found = consensus_mask(masks, k)
        assert found == consensus_mask(list(masks.values()), k)
        assert all(torch.equal(bits, torch.as_tensor(counts[name] >= k)) for name, bits in found.unpack().items())
    assert consensus_mask(masks, 0).density() == 1
    assert consensus_mask(masks, 1) == reduce(or_, masks.values())
    assert consensus_mask(masks, 5) == reduce(and_, masks.values())
    assert consensus_mask(masks, 6).count() == 0
    assert consensus_mask(masks) == consensus_mask(masks, 2)


def test_invariant_5_profile() -> None:
    masks = _masks(5)
    profile = mask_profile(masks)
    assert profile.dtype == torch.int64
    flat = np.concatenate([sum(mask.unpack()[name].int() for mask in masks.values()).reshape(-1) for name in masks["task-0"]])
    assert profile.tolist() == np.bincount(flat, minlength=6).tolist()
    assert int(profile.sum()) == masks["task-0"].numel
    assert [int(profile[k:].sum()) for k in range(6)] == [consensus_mask(masks, k).count() for k in range(6)]


@pytest.mark.parametrize("method", ["sum", "ties"])
def test_invariant_5_no_consensus_is_the_base_and_none_needed_is_everything(method: Any) -> None:
    base, tuned = make_models(4)
    assert same(merge_consensus(base, tuned, k=5, method=method, lambda_=0.7), base)
    tau = multi_task_vector(base, tuned, method)
    for name, values in merge_consensus(base, tuned, k=0, method=method, lambda_=0.5).items():
        torch.testing.assert_close(values, base[name] + 0.5 * tau[name] if name in tau else base[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("k", [0, 2, 5])
@pytest.mark.parametrize(("method", "recipe"), [("sum", "consensus_ta"), ("ties", "consensus_ties")])
@pytest.mark.parametrize("kind", ["float", "bf16", "ties", "weights"])
def test_bits_are_those_of_the_recipe(k: int, method: Any, recipe: str, kind: str) -> None:
    base, tuned = grid_models(4, -1.0) if kind == "ties" else make_models(4, torch.bfloat16 if kind == "bf16" else torch.float32)
    weights = [0.5, 1.5, -1.0, 2.0] if kind == "weights" else [1.0] * 4
    thresholds = [0.2, 0.4, 0.6, 1.0]
    density = {"density": 0.3} if method == "ties" else {}
    expected = merge_state_dicts(base, tuned, recipe, weight=weights, tall_mask_lambda=thresholds, consensus_k=k, lambda_=0.7, **density)
    weight, lambdas = dict(zip(tuned, weights, strict=True)), dict(zip(tuned, thresholds, strict=True))
    merged = merge_consensus(base, tuned, k=k, method=method, weight=weight, lambda_=0.7, trim=0.3, tall_mask_lambda=lambdas)
    vectors = {task: TaskVector(base, state) for task, state in tuned.items()}
    again = merge_consensus(base, vectors, k=k, method=method, weight=weight, lambda_=0.7, trim=0.3, tall_mask_lambda=lambdas)
    assert list(merged) == list(base)
    for name, values in expected.items():
        assert merged[name].dtype == base[name].dtype
        assert torch.equal(merged[name], values), name
        assert torch.equal(again[name], values), name


def test_given_masks_are_used() -> None:
    base, tuned = make_models(3)
    masks = tall_masks(base, tuned, multi_task_vector(base, tuned), {"task-0": 0.2, "task-1": 0.6, "task-2": 0.3})
    expected = merge_consensus(base, tuned, tall_mask_lambda={"task-0": 0.2, "task-1": 0.6, "task-2": 0.3})
    assert same(merge_consensus(base, tuned, masks), expected)
    assert same(merge_consensus(base, tuned, list(masks.values()), tall_mask_lambda=9.0), expected)
    assert not same(merge_consensus(base, tuned), expected)


@pytest.mark.parametrize("k", [-1, 1.0, True, "2", None])
def test_bad_k(k: Any) -> None:
    base, tuned = make_models(2)
    masks = tall_masks(base, tuned, multi_task_vector(base, tuned))
    for call in (lambda: consensus_mask(masks, k), lambda: merge_consensus(base, tuned, k=k)):
        with pytest.raises(ValueError, match="k: expected an integer >= 0"):
            call()


def test_k_may_be_any_integer_above_the_tasks() -> None:
    base, tuned = make_models(2)
    masks = tall_masks(base, tuned, multi_task_vector(base, tuned))
    assert consensus_mask(masks, 2**70).count() == 0


def test_bad_masks() -> None:
    base, tuned = make_models(2)
    for call in (lambda: consensus_mask({}), lambda: mask_profile([]), lambda: merge_consensus(base, tuned, {})):
        with pytest.raises(ValueError, match="masks: expected at least one, got none"):
            call()
    masks = tall_masks(base, tuned, multi_task_vector(base, tuned))
    part = PackedMask({"norm": masks["task-0"].bits["norm"]}, {"norm": (9,)})
    with pytest.raises(KeyError, match="masks: expected those of the same tensors"):
        consensus_mask([masks["task-0"], part])
    with pytest.raises(KeyError, match="masks: expected those of the base's tensors"):
        merge_consensus(base, tuned, [part])
    other = PackedMask(masks["task-0"].bits, {**masks["task-0"].shapes, "norm": (3, 3)})
    with pytest.raises(ValueError, match=r"masks: 'norm': expected shape \(9,\), got \(3, 3\)"):
        merge_consensus(base, tuned, [other])
    with pytest.raises(KeyError, match="masks: expected those of the tasks 'task-0', 'task-1', got 'task-0', 'task-9'"):
        merge_consensus(base, tuned, {"task-0": masks["task-0"], "task-9": masks["task-1"]})
    with pytest.raises(ValueError, match="masks: expected one for each of 2 tasks, got 1"):
        merge_consensus(base, tuned, [masks["task-0"]])
    plain: Any = [torch.zeros(3)]
    with pytest.raises(TypeError, match="masks: expected PackedMask, got Tensor"):
        consensus_mask(plain)
    with pytest.raises(ValueError, match="lambda_: expected finite numbers, got nan"):
        merge_consensus(base, tuned, lambda_=float("nan"))
    with pytest.raises(ValueError, match="tall_mask_lambda: expected a finite number > 0, got 0"):
        merge_consensus(base, tuned, tall_mask_lambda=0)
    with pytest.raises(ValueError, match="finetuned: expected at least one task, got none"):
        merge_consensus(base, {})
