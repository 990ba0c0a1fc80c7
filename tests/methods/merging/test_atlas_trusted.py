"""Which predictions test-time adaptation trusts, and the batches it is trained on."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from taskloom.methods.merging.atlas.trusted import TrustedBatches, select_trusted


def _probs(count: int, classes: int, seed: int = 0) -> Tensor:
    return (2 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))).softmax(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "most"), [(157, 100), (157, 2), (40, 100)])
def test_the_most_confident_predictions_of_each_class_are_trusted(dtype: torch.dtype, count: int, most: int) -> None:
    probs = _probs(count, 4).to(dtype)
    pseudo, trusted = select_trusted(probs, max_per_class=most)
    k = min(count // 40, most)
    assert torch.equal(pseudo, probs.argmax(1))
    for label in range(4):
        own = sorted((i for i in range(count) if pseudo[i] == label), key=lambda i: (-probs[i, label].item(), i))
        assert set(own[:k]) == {i for i in own if trusted[i]}
    assert not trusted.all()


def test_a_sample_is_trusted_for_no_other_class_than_the_predicted() -> None:
    # Class 1 is never predicted; the samples likeliest of it are the least certain, and are not trusted for it.
    probs = torch.cat([torch.tensor([0.51, 0.49]).expand(10, 2), torch.tensor([0.9, 0.1]).expand(15, 2)])
    pseudo, trusted = select_trusted(probs)
    assert not pseudo.any()
    assert trusted.nonzero()[:, 0].tolist() == [10]


def test_equally_confident_predictions_are_trusted_in_their_order() -> None:
    pseudo, trusted = select_trusted(torch.tensor([0.8, 0.2]).expand(60, 2))
    assert trusted.nonzero()[:, 0].tolist() == [0, 1, 2]
    assert not pseudo.any()


def test_few_samples_are_said_to_leave_none_trusted() -> None:
    with pytest.warns(UserWarning, match="select_trusted: 39 samples for 4 classes: fewer than 10 a class, so none is trusted"):
        assert not select_trusted(_probs(39, 4)).trusted.any()


@pytest.mark.parametrize(
    ("probs", "most", "error", "message"),
    [
        (torch.zeros(20, 2).long(), 1, TypeError, "probs: expected floating-point probabilities, got torch.int64"),
        (torch.zeros(20), 1, ValueError, r"probs: expected shape \[N, classes\] .* got \[20\]"),
        (torch.zeros(0, 2), 1, ValueError, r"probs: expected shape \[N, classes\] .* got \[0, 2\]"),
        (torch.randn(20, 2), 1, ValueError, "probs: expected rows of probabilities that sum to 1"),
        (torch.tensor([1.5, -0.5]).expand(20, 2), 1, ValueError, "probs: expected rows of probabilities"),
        (torch.full((20, 2), torch.nan), 1, ValueError, "probs: expected rows of probabilities"),
        (torch.full((20, 2), 0.5), 0, ValueError, "max_per_class: expected 1 or more, got 0"),
    ],
)
def test_select_trusted_refuses(probs: Tensor, most: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"select_trusted: {message}"):
        select_trusted(probs, most)


def test_batches_are_three_quarters_others_and_a_quarter_trusted() -> None:
    trusted = torch.zeros(103, dtype=torch.bool)
    trusted[::17] = True
    others = set((~trusted).nonzero()[:, 0].tolist())
    sampler = TrustedBatches(trusted, 16, seed=5)
    first, second = list(sampler), list(sampler)
    assert len(first) == len(sampler) == len(others) // 12
    assert first != second
    for epoch in (first, second):
        from_others = [index for batch in epoch for index in batch[:12]]
        from_trusted = [index for batch in epoch for index in batch[12:]]
        assert set(from_others) <= others
        assert len(set(from_others)) == len(from_others) == 12 * len(sampler)
        rounds = [tuple(from_trusted[begin : begin + 7]) for begin in range(0, len(from_trusted) - 6, 7)]
        assert all(sorted(one) == list(range(0, 103, 17)) for one in rounds)
        assert len(set(rounds)) == len(rounds)
    again = TrustedBatches(trusted, 16, seed=5)
    assert [list(again), list(again)] == [first, second]
    assert list(TrustedBatches(trusted, 16, seed=6)) != first


@pytest.mark.parametrize(("share", "batch", "expected"), [(0.25, 2, 1), (0.5, 8, 4), (0.25, 7, 1), (0.25, 128, 32)])
def test_shares_are_rounded_down_to_at_least_one(share: float, batch: int, expected: int) -> None:
    trusted = torch.arange(400) < 3
    (found,) = itertools.islice(TrustedBatches(trusted, batch, trusted_share=share), 1)
    assert len(found) == batch
    assert sum(index < 3 for index in found) == expected


def test_batches_go_into_a_loader() -> None:
    trusted = torch.arange(50) >= 44
    loader = DataLoader(TensorDataset(torch.arange(50)), batch_sampler=TrustedBatches(trusted, 8))
    assert [int((batch >= 44).sum()) for (batch,) in loader] == [2] * 7


@pytest.mark.parametrize(
    ("trusted", "batch", "share", "error", "message"),
    [
        (torch.ones(9), 8, 0.25, TypeError, "trusted: expected torch.bool, got torch.float32"),
        (torch.ones(9, 2).bool(), 8, 0.25, ValueError, r"trusted: expected shape \[N\], got \[9, 2\]"),
        (torch.zeros(9).bool(), 8, 0.25, ValueError, "trusted: expected at least one trusted sample, got none"),
        (torch.arange(9) > 3, 8, 0.25, ValueError, "trusted: expected at least 6 samples that are not trusted, .* of 8, got 4"),
        (torch.arange(9) > 3, 1, 0.25, ValueError, "batch_size: expected at least 2, got 1"),
        (torch.arange(9) > 3, 4, 1.0, ValueError, "trusted_share: expected a number between 0 and 1, got 1.0"),
    ],
)
def test_trusted_batches_refuse(trusted: Tensor, batch: int, share: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"TrustedBatches: {message}"):
        TrustedBatches(trusted, batch, trusted_share=share)
