"""The experiments of aTLAS: what they may look at, and what the shipped result says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from taskloom.methods.catalogue import find_method
from taskloom.methods.claim import Trial
from taskloom.methods.merging import projected_digits
from taskloom.methods.merging.atlas import claim_adaptation, claim_negation, claim_shots
from taskloom.methods.merging.atlas.claim_adaptation import ADAPTATION
from taskloom.methods.merging.atlas.claim_lowrank import MATRICES, low_rank_vectors
from taskloom.methods.merging.atlas.claim_negation import NEGATION
from taskloom.methods.merging.atlas.claim_shots import PARTITIONS
from taskloom.methods.merging.atlas.claim_training import compose, task_vectors, train
from taskloom.methods.merging.projected_digits import ProjectedDigits, Split, SplitName, task_name
from taskloom.methods.result import REPRODUCED, read_result
from taskloom.methods.threads import one_thread

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def digits() -> ProjectedDigits:
    return projected_digits.build(0, tasks=3, width=32, pretrain_steps=20, finetune_steps=10)


def _trial(config: dict[str, Any], **changes: Any) -> Trial:
    return Trial(0, {**config, **changes}, torch.device("cpu"), lambda share: None)


def _with_other_labels(digits: ProjectedDigits, split: SplitName) -> ProjectedDigits:
    """The same set-up with labels of one split that say nothing."""
    tasks = []
    for task in digits.tasks:
        own = task.splits[split]
        tasks.append(replace(task, splits={**task.splits, split: Split(own.inputs, own.labels.roll(1))}))
    return replace(digits, tasks=tuple(tasks))


def _recorded(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[Tensor]:
    """The coefficients that every training of a module's experiment ends with."""
    found: list[Tensor] = []

    def recording(atlas: Any, loss: Callable[[int], Tensor], **settings: Any) -> None:
        train(atlas, loss, **settings)
        found.append(atlas.coef.detach().clone())

    monkeypatch.setattr(module, "train", recording)
    return found


def test_adaptation_reads_no_label_and_not_the_targets_own_vector(digits: ProjectedDigits, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _recorded(monkeypatch, claim_adaptation)
    trial, arms = _trial(dict(ADAPTATION.config), epochs=1), {"adapted": (2, 0.5)}
    first = claim_adaptation._task_values(digits, 1, trial, arms)
    second = claim_adaptation._task_values(_with_other_labels(digits, "test"), 1, trial, arms)
    claim_adaptation._task_values(replace(digits, tuned=(digits.tuned[0], digits.tuned[2], digits.tuned[2])), 1, trial, arms)
    assert found[0].shape == (2, 8, 2)
    assert found[0].any()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert first["adapted"] != second["adapted"]


def test_few_shots_read_no_test_label_and_not_the_targets_own_vector(digits: ProjectedDigits, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _recorded(monkeypatch, claim_shots)
    trial = _trial(dict(PARTITIONS.config), steps=2, partitions=[1, 3])
    for changed in (digits, _with_other_labels(digits, "test"), replace(digits, tuned=(*digits.tuned[:2], digits.tuned[0]))):
        claim_shots._task_values(changed, 2, trial)
    assert [tuple(coef.shape) for coef in found[:3]] == [(2,), (2, 8), (2, 8, 3)]
    for first, second, third in zip(*(found[begin : begin + 3] for begin in (0, 3, 6)), strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_negation_is_chosen_on_validation_data_within_the_bound(digits: ProjectedDigits) -> None:
    trial = _trial(dict(NEGATION.config), steps=20)
    vector = task_vectors(digits)[task_name(0)]
    base = claim_negation._pair(digits, digits.base, 0, "val")
    for state in (
        claim_negation._searched(digits, vector, 0, 30.0, 10),
        claim_negation._learned(digits, vector, 0, trial),
    ):
        target, control = claim_negation._pair(digits, state, 0, "val")
        assert target < base[0]
        assert control >= 0.95 * base[1]
    test_labels_changed = _with_other_labels(digits, "test")
    first, second = (claim_negation._learned(one, vector, 0, trial) for one in (digits, test_labels_changed))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_training_ends_where_the_check_says(digits: ProjectedDigits) -> None:
    atlas = compose(digits, task_vectors(digits))
    steps, checks = [], []

    def loss(step: int) -> Tensor:
        steps.append(step)
        return (atlas.coef - 1).square().sum()

    def check() -> bool:
        checks.append(len(steps))
        return len(checks) < 2

    train(atlas, loss, steps=20, lr=0.1, every=3, check=check)
    assert checks == [3, 6]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (atlas.coef > 0).all()


def test_low_rank_vectors_are_the_nearest_of_their_rank(digits: ProjectedDigits) -> None:
    vectors = task_vectors(digits)
    for name, low in low_rank_vectors(digits, 5).items():
        assert set(low) == set(MATRICES)
        for weight in low:
            left, values, right = torch.linalg.svd(vectors[name][weight], full_matrices=False)
            torch.testing.assert_close(low.delta(weight), (left[:, :5] * values[:5]) @ right[:5], rtol=1e-4, atol=1e-6)


def test_the_shipped_result_holds_and_keeps_its_limits() -> None:
    result = read_result(find_method("atlas").shipped_result())
    assert result.verdict == REPRODUCED
    assert result.seeds == [0, 1, 2]
    claims = {claim.name: claim for claim in result.claims}
    assert [claim.name for claim in find_method("atlas").claims()] == list(claims)
    # What the page says against the method at this size.
    shots, low = claims["Partitions"].means, claims["LoRA vectors"].means
    assert shots["all weights"] > shots["aTLAS, K=100"]
    assert abs(low["aTLAS, rank 4"] - low["searched scalar, rank 4"]) < 0.02
    adaptation = claims["Test-time adaptation"]
    assert max(adaptation.values["others above 0.99 (share)"]) == 0
    assert adaptation.means["better base: adapted, K=1"] - adaptation.means["better base: base"] < 0.01
