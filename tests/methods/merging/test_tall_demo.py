"""TALL-mask compression: the mask's rule, its packing, and that disjoint task vectors come back whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import taskloom
from taskloom.methods.merging.demo.tall import (
    THRESHOLDS,
    build_masks,
    compress,
    load_restored,
    multi_task_vector,
    restore,
    select_threshold,
)
from taskloom.methods.merging.projected_digits import State


def _states(shape: tuple[int, ...] = (7, 3), tasks: int = 3) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(0)
    base = {"weight": torch.randn(shape, generator=generator)}
    return base, [{"weight": base["weight"] + 0.1 * torch.randn(shape, generator=generator)} for _ in range(tasks)]


def test_mask_is_the_papers_strict_inequality_packed_from_the_lowest_bit() -> None:
    base, tuned = _states()
    vector = multi_task_vector(base, tuned)
    mask = taskloom.task_mask(base["weight"], tuned[1]["weight"], vector["weight"], 0.4)
    delta = (tuned[1]["weight"] - base["weight"]).numpy()
    expected = np.abs(delta) > np.float32(0.4) * np.abs(vector["weight"].numpy() - delta)
    assert mask.dtype == torch.uint8
    assert mask.shape == (3,)
    bits = np.unpackbits(mask.numpy(), bitorder="little")
    assert np.array_equal(bits[:21], expected.ravel())
    assert not bits[21:].any()


def test_an_entry_that_no_task_moves_gets_a_zero() -> None:
    zero = torch.zeros(9)
    assert not taskloom.task_mask(zero, zero, zero, 0.2).any()


def test_masks_shrink_as_the_threshold_grows() -> None:
    base, tuned = _states((50, 40))
    vector = multi_task_vector(base, tuned)
    masks = [taskloom.task_mask(base["weight"], tuned[0]["weight"], vector["weight"], threshold) for threshold in THRESHOLDS]
    for larger, smaller in zip(masks[1:], masks[:-1], strict=True):
        assert torch.equal(larger & smaller, larger)


def test_disjoint_task_vectors_are_restored_exactly(tmp_path: Path) -> None:
    base = {"a": torch.zeros(5, 4), "b": torch.ones(3)}
    names = ["task-0", "task-1"]
    tuned = [{name: value.clone() for name, value in base.items()} for _ in names]
    tuned[0]["a"][:2] += 0.25
    tuned[1]["a"][3:] -= 0.5
    tuned[1]["b"][1] = 3
    for name, state in zip(["base", *names], [base, *tuned], strict=True):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    found = compress(tmp_path, names, tmp_path / "tall", lambda task, state: 1.0)
    for name, state in zip(names, tuned, strict=True):
        restored = load_restored(tmp_path / "base" / "model.safetensors", tmp_path / "tall", name)
        assert all(torch.equal(restored[key], value) for key, value in state.items())
    assert found.kept == [8 / 23, 9 / 23]
    assert found.thresholds == [THRESHOLDS[0]] * 2
    sizes = [path.stat().st_size for path in (tmp_path / "base" / "model.safetensors", *(tmp_path / "tall").iterdir())]
    assert found.stored_bytes == sum(sizes)


def test_threshold_is_the_best_and_the_smallest_of_ties() -> None:
    base, tuned = _states((50, 40))
    vector = multi_task_vector(base, tuned)
    wanted = restore(base, vector, build_masks(base, tuned[0], vector, 0.5))

    def closeness(state: State) -> float:
        return -float((state["weight"] - wanted["weight"]).abs().sum())

    assert select_threshold(base, tuned[0], vector, closeness) == 0.5
    assert select_threshold(base, tuned[0], vector, lambda _: 0.0) == pytest.approx(0.2)
