"""The projected digits: what the tasks are made of, that a seed fixes every bit, and the figures that later claims rest on."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
from safetensors.torch import load_file

from taskloom.merge import merge_checkpoints
from taskloom.methods.merging import projected_digits
from taskloom.methods.merging.projected_digits import ProjectedDigits, build, load, load_splits, make_tasks

pytest.importorskip("sklearn")


def _tiny(seed: int = 0) -> ProjectedDigits:
    return build(seed, tasks=2, width=16, finetune_steps=5)


def _equal(first: projected_digits.State, second: projected_digits.State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_split_sizes_and_normalisation() -> None:
    splits = load_splits(3)
    assert {name: tuple(split.inputs.shape) for name, split in splits.items()} == {"train": (1000, 64), "val": (297, 64), "test": (500, 64)}
    everything = torch.cat([split.inputs for split in splits.values()])
    assert everything.dtype == torch.float32
    torch.testing.assert_close(everything.mean(0), torch.zeros(64), atol=1e-5, rtol=0)
    assert everything.std().item() == pytest.approx(1, abs=1e-5)
    assert len(everything.unique(dim=0)) > 1790


def test_a_split_depends_on_the_seed() -> None:
    assert torch.equal(load_splits(1)["val"].inputs, load_splits(1)["val"].inputs)
    assert not torch.equal(load_splits(1)["val"].inputs, load_splits(2)["val"].inputs)


def test_rotations_are_orthogonal_and_differ() -> None:
    tasks = make_tasks(load_splits(), tasks=3)
    for task in tasks:
        torch.testing.assert_close(task.rotation @ task.rotation.T, torch.eye(64), atol=1e-5, rtol=0)
    assert (tasks[0].rotation - tasks[1].rotation).abs().max() > 0.1


def test_labels_are_permuted() -> None:
    splits = load_splits()
    for task in make_tasks(splits, tasks=3):
        assert task.label_order.sort().values.tolist() == list(range(10))
        assert task.label_order.tolist() != list(range(10))
        for name, split in splits.items():
            assert torch.equal(task.splits[name].labels, task.label_order[split.labels])


def test_inputs_are_rotated_noisy_and_cut() -> None:
    splits = load_splits()
    task = make_tasks(splits, tasks=1)[0]
    noise = task.splits["train"].inputs - (splits["train"].inputs @ task.rotation)[:, :48]
    assert task.splits["train"].inputs.shape == (1000, 48)
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)


def test_more_tasks_leave_the_first_ones_alone() -> None:
    splits = load_splits()
    few, many = make_tasks(splits, tasks=1), make_tasks(splits, tasks=2)
    assert torch.equal(few[0].splits["test"].inputs, many[0].splits["test"].inputs)


def test_two_builds_are_equal_to_the_bit_whatever_the_global_generator() -> None:
    first = _tiny()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = _tiny()
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip([first.base, *first.tuned, *first.heads], [second.base, *second.tuned, *second.heads], strict=True):
        assert _equal(one, two)
    assert not _equal(first.base, _tiny(1).base)


def test_a_head_as_a_module_is_the_frozen_one() -> None:
    digits = _tiny()
    encoder, test = projected_digits.load_encoder(digits.tuned[1]), digits.tasks[1].splits["test"]
    head = digits.head(1)
    assert not any(parameter.requires_grad for parameter in head.parameters())
    with torch.no_grad():
        right = head(encoder(test.inputs)).argmax(1) == test.labels
    assert float(right.double().mean()) == digits.accuracy(digits.tuned[1], 1)


def test_accuracies_and_names_of_the_tasks() -> None:
    digits = _tiny()
    first, second = digits.accuracies(digits.base, "val")
    assert digits.mean_accuracy(digits.base, "val") == mean([first, second])
    assert digits.mean_accuracy(digits.base, "val", [1]) == second
    assert digits.tuned_by_task == {"task-0": digits.tuned[0], "task-1": digits.tuned[1]}


def test_the_number_of_threads_does_not_matter_and_is_left_alone() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _tiny()
        torch.set_num_threads(2)
        two = _tiny()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert _equal(one.tuned[1], two.tuned[1])


def test_fine_tuning_moves_every_tensor_and_not_the_base() -> None:
    digits = _tiny()
    for tuned in digits.tuned:
        assert all(not torch.equal(value, digits.base[name]) for name, value in tuned.items())
    assert not _equal(digits.tuned[0], digits.tuned[1])


def test_save_and_load_give_the_same_set_up(tmp_path: Path) -> None:
    digits = _tiny()
    digits.save(tmp_path)
    loaded = load(tmp_path)
    assert _equal(loaded.base, digits.base)
    assert all(_equal(one, two) for one, two in zip(loaded.tuned, digits.tuned, strict=True))
    assert loaded.single_task == digits.single_task
    assert loaded.accuracies(loaded.base, "val") == digits.accuracies(digits.base, "val")
    assert set(load_file(tmp_path / "task-1" / "model.safetensors")) == set(digits.base)
    assert not any("head" in name or "task" in name for name in digits.base)


@pytest.mark.parametrize("name", ["tasks", "width", "pretrain_steps", "finetune_steps"])
def test_a_count_below_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected 1 or more, got 0"):
        build(**{name: 0})


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"taskloom\[demo\]"):
        load_splits()


@pytest.fixture(scope="module", params=[0, 1, 2])
def full(request: pytest.FixtureRequest) -> ProjectedDigits:
    return build(request.param)


@pytest.mark.slow
def test_fine_tuning_succeeds_where_the_base_does_not(full: ProjectedDigits) -> None:
    assert 0.40 <= mean(full.accuracies(full.base)) <= 0.56
    assert 0.95 <= mean(full.single_task) <= 0.98


@pytest.mark.slow
def test_removing_outliers_helps_breadcrumbs_at_the_same_density(full: ProjectedDigits, tmp_path: Path) -> None:
    """Model Breadcrumbs (arXiv 2312.06795): with 8 tasks at weight 1 and density 0.15, gamma 0.01 beats gamma 0."""
    full.save(tmp_path / "models")
    models = [{"model": str(tmp_path / "models" / f"task-{task}")} for task in range(8)]
    accuracy = {}
    for gamma in (0.0, 0.01):
        recipe = {
            "merge_method": "breadcrumbs",
            "base_model": str(tmp_path / "models" / "base"),
            "models": models,
            "parameters": {"weight": 1.0, "density": 0.15, "gamma": gamma},
        }
        merge_checkpoints(recipe, tmp_path / f"merged-{gamma}")
        accuracy[gamma] = mean(full.accuracies(load_file(tmp_path / f"merged-{gamma}" / "model.safetensors")))
    assert accuracy[0.01] >= accuracy[0.0] + 0.03
