"""The losses of aTLAS, the selection of coefficients, and the few-shot helpers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from taskloom.methods.merging.atlas.few_shot import choose_shots, pool_without, repeat_shots
from taskloom.methods.merging.atlas.losses import multi_task_loss, negation_loss, ufm_loss
from taskloom.methods.merging.atlas.selection import BestCoefficients, Negation, normalised_accuracy


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _labels(count: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Per sample, from the formula; the target a distribution [N, classes]."""
    return -(target * (logits - logits.logsumexp(1, keepdim=True))).sum(1)


def test_multi_task_loss_is_the_sum_over_tasks_of_their_means() -> None:
    encoder, heads = nn.Linear(5, 7), {"a": nn.Linear(7, 3), "b": nn.Linear(7, 4)}
    batches = {"b": (_random(6, 5), _labels(6, 4)), "a": (_random(3, 5, seed=1), _labels(3, 3))}
    calls: list[int] = []

    def counted(inputs: Tensor) -> Tensor:
        calls.append(len(inputs))
        features: Tensor = encoder(inputs)
        return features

    loss = multi_task_loss(heads)(counted, batches)
    expected = torch.zeros(())
    for task, (inputs, labels) in batches.items():
        logits = heads[task](encoder(inputs))
        expected = expected + _cross_entropy(logits, functional.one_hot(labels, logits.shape[1]).float()).mean()
    torch.testing.assert_close(loss, expected)
    assert calls == [9]
    loss.backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert all(parameter.grad is None for head in heads.values() for parameter in head.parameters())


def test_heads_may_be_functions() -> None:
    batches = {"a": (_random(4, 3), _labels(4, 3))}
    torch.testing.assert_close(
        multi_task_loss({"a": lambda x: 2 * x})(nn.Identity(), batches), functional.cross_entropy(2 * batches["a"][0], batches["a"][1])
    )


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({}, r"batches: expected the tasks a, b, got none"),
        ({"a": (torch.zeros(2, 3), torch.zeros(2).long())}, r"expected the tasks a, b, got a"),
        (
            {task: (torch.zeros(2, 3), torch.zeros(3).long()) for task in "ab"},
            r"task 'a': expected a label for each .* \[2, 3\] and labels \[3\]",
        ),
        ({task: (torch.zeros(0, 3), torch.zeros(0).long()) for task in "ab"}, r"task 'a': expected a label for each of 1 or more"),
    ],
)
def test_batches_that_do_not_fit_the_heads(batches: dict[str, tuple[Tensor, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multi_task_loss({"a": nn.Identity(), "b": nn.Identity()})(nn.Identity(), batches)


def test_heads_may_be_a_module_dict() -> None:
    heads = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 4)})
    batches = {"a": (_random(5, 3), _labels(5, 2)), "b": (_random(2, 3), _labels(2, 4))}
    expected = sum(functional.cross_entropy(heads[task](inputs), labels) for task, (inputs, labels) in batches.items())
    torch.testing.assert_close(multi_task_loss(heads)(nn.Identity(), batches), expected)


def test_heads_that_are_none() -> None:
    unnamed: Any = [nn.Identity()]
    with pytest.raises(TypeError, match="heads: expected a mapping from a task to its head, got list"):
        multi_task_loss(unnamed)
    broken: Any = {"a": nn.LSTM(3, 2)}
    with pytest.raises(TypeError, match="heads: expected a head that returns a tensor, got tuple"):
        multi_task_loss(broken)(nn.Identity(), {"a": (_random(5, 3), _labels(5, 2))})
    with pytest.raises(ValueError, match="heads: expected at least one, got none"):
        multi_task_loss({})


def test_negation_loss_rises_for_the_target_and_falls_for_the_control() -> None:
    target, control = _random(6, 3).requires_grad_(), _random(4, 5, seed=1).requires_grad_()
    labels = _labels(6, 3), _labels(4, 5)
    loss = negation_loss((target, labels[0]), (control, labels[1]))
    torch.testing.assert_close(loss, functional.cross_entropy(control, labels[1]) - functional.cross_entropy(target, labels[0]))
    loss.backward()
    assert target.grad is not None
    assert control.grad is not None
    assert (target.grad.gather(1, labels[0][:, None]) > 0).all()
    assert (control.grad.gather(1, labels[1][:, None]) < 0).all()


def test_negation_needs_a_control() -> None:
    batch = _random(6, 3), _labels(6, 3)
    with pytest.raises(ValueError, match=r"negation_loss: control: expected \(logits, labels\) of a control task, got None"):
        negation_loss(batch, None)
    with pytest.raises(ValueError, match=r"negation_loss: control: .* \[6, 3\] and \[4\]"):
        negation_loss(batch, (batch[0], _labels(4, 3)))
    with pytest.raises(ValueError, match=r"Negation: base_control: .* got None"):
        Negation(torch.zeros(1, 3), 0.9, None)


@pytest.mark.parametrize("threshold", [0.0, 0.99])
def test_invariant_9_all_trusted_is_cross_entropy_to_the_pseudo_labels(threshold: float) -> None:
    weak, strong, pseudo = _random(7, 4), _random(7, 4, seed=1).requires_grad_(), _labels(7, 4)
    loss = ufm_loss(weak, strong, pseudo, torch.ones(7, dtype=torch.bool), threshold)
    expected = _cross_entropy(strong, functional.one_hot(pseudo, 4).float()).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, strong)[0], torch.autograd.grad(expected, strong)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_invariant_9_none_confident_and_none_trusted_is_zero_with_a_zero_gradient(dtype: torch.dtype) -> None:
    weak, strong = _random(7, 4).to(dtype), _random(7, 4, seed=1).to(dtype).requires_grad_()
    loss = ufm_loss(weak, strong, torch.full((7,), -1), torch.zeros(7, dtype=torch.bool))
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, strong)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_ufm_loss_is_the_weighted_mean_of_the_formula() -> None:
    weak, strong, pseudo = 6 * _random(40, 3), _random(40, 3, seed=1), _labels(40, 3)
    trusted = _random(40, seed=2) > 1
    q = torch.stack([functional.one_hot(pseudo[i], 3).float() if trusted[i] else weak[i].softmax(0) for i in range(40)])
    w = (q.max(1).values > 0.9).float()
    assert 0 < w[~trusted].sum() < (~trusted).sum()
    torch.testing.assert_close(ufm_loss(weak, strong, pseudo, trusted, 0.9), (w * _cross_entropy(strong, q)).sum() / w.sum())


def test_ufm_loss_shows_a_weak_view_that_is_no_number() -> None:
    weak, strong = _random(7, 3), _random(7, 3, seed=1)
    weak[3] = torch.nan
    assert ufm_loss(weak, strong, _labels(7, 3), torch.arange(7) < 2).isnan()


def test_ufm_loss_sends_no_gradient_through_the_weak_view() -> None:
    weak, strong = (8 * _random(9, 3)).requires_grad_(), _random(9, 3, seed=1).requires_grad_()
    loss = ufm_loss(weak, strong, _labels(9, 3), torch.arange(9) < 2, 0.5)
    assert torch.autograd.grad(loss, [weak, strong], allow_unused=True)[0] is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weak": torch.zeros(3, 2)}, ValueError, r"weak, strong: expected logits of one shape .* got \[3, 2\] and \[4, 2\]"),
        ({"weak": torch.zeros(4, 2).long()}, TypeError, r"weak: expected floating-point logits, got torch.int64"),
        ({"pseudo": torch.zeros(4)}, TypeError, r"pseudo: expected torch.int64, got torch.float32"),
        ({"trusted": torch.ones(4).long()}, TypeError, r"trusted: expected torch.bool, got torch.int64"),
        ({"trusted": torch.ones(5).bool()}, ValueError, r"trusted: expected shape \[4\], got \[5\]"),
        ({"pseudo": torch.full((4,), 2)}, ValueError, r"pseudo: expected labels of trusted samples from 0 to 1"),
        ({"threshold": 1.0}, ValueError, r"threshold: expected a number in \[0, 1\), got 1.0"),
        ({"threshold": math.nan}, ValueError, r"threshold: expected a number in \[0, 1\), got nan"),
    ],
)
def test_ufm_loss_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"weak": torch.zeros(4, 2), "strong": torch.zeros(4, 2), "pseudo": torch.zeros(4).long(), "trusted": torch.ones(4).bool()}
    with pytest.raises(error, match=rf"ufm_loss: {message}"):
        ufm_loss(**{**arguments, **change})


def test_best_coefficients_are_kept_and_come_back() -> None:
    coef = nn.Parameter(torch.zeros(2, 3))
    best = BestCoefficients(coef, 0.5)
    for value, score, better in ((1.0, 0.4, False), (2.0, 0.5, False), (3.0, 0.6, True), (4.0, 0.6, False), (5.0, 0.55, False)):
        with torch.no_grad():
            coef.fill_(value)
        assert best.update(score) is better
    best.restore()
    assert best.score == 0.6
    assert torch.equal(coef, torch.full((2, 3), 3.0))
    assert coef.requires_grad


def test_a_score_that_is_written_to_later_does_not_change_what_was_kept() -> None:
    running = torch.tensor(0.7)
    best = BestCoefficients(torch.ones(1), 0.5)
    assert best.update(running)
    running.fill_(0.1)
    assert not best.update(0.6)


def test_coefficients_that_never_beat_the_base_come_back_as_zeros() -> None:
    coef = nn.Parameter(torch.ones(2, 3))
    best = BestCoefficients(coef, 0.5)
    assert not best.update(0.5)
    best.restore()
    assert not best.improved
    assert torch.equal(coef, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="score: expected a finite number, got nan"):
        best.update(math.nan)


def test_negation_keeps_the_lowest_target_within_the_bound_and_stops_below_it() -> None:
    coef = nn.Parameter(torch.zeros(1, 3))
    negation = Negation(coef, 0.9, 0.8)
    assert negation.control_bound == pytest.approx(0.76)
    steps = ((1.0, 0.95, 0.80, True), (2.0, 0.5, negation.control_bound, True), (3.0, 0.6, 0.8, True), (4.0, 0.1, 0.75, False))
    for value, target, control, goes_on in steps:
        with torch.no_grad():
            coef.fill_(value)
        assert negation.update(target, control) is goes_on
    negation.restore()
    assert negation.target == 0.5
    assert torch.equal(coef, torch.full((1, 3), 2.0))


def test_negation_that_only_harms_is_none() -> None:
    coef = nn.Parameter(torch.ones(1, 3))
    negation = Negation(coef, 0.9, 0.8, threshold=1.0)
    assert not negation.update(0.2, 0.79)
    negation.restore()
    assert torch.equal(coef, torch.zeros(1, 3))
    assert negation.target == 0.9
    with pytest.raises(ValueError, match=r"threshold: expected a number in \(0, 1\], got 0"):
        Negation(coef, 0.9, 0.8, threshold=0.0)
    with pytest.raises(ValueError, match=r"control: expected an accuracy in \[0, 1\], got 79"):
        negation.update(0.2, 79)


def test_normalised_accuracy() -> None:
    assert normalised_accuracy([0.5, 0.8], [1.0, 0.8]) == pytest.approx(0.75)
    assert normalised_accuracy({"a": 0.5, "b": 0.8}, {"b": 0.8, "a": 1.0}) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="expected the tasks a, got b"):
        normalised_accuracy({"a": 0.5}, {"b": 0.5})
    with pytest.raises(ValueError, match="expected 1 accuracies, got 2"):
        normalised_accuracy([0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="expected finite accuracies above 0, got 0"):
        normalised_accuracy([0.5], [0.0])
    with pytest.raises(ValueError, match="finetuned: expected finite accuracies above 0, got inf"):
        normalised_accuracy([0.5], [float("inf")])
    with pytest.raises(ValueError, match="accuracies: expected a finite number, got nan"):
        normalised_accuracy([float("nan")], [0.5])
    with pytest.raises(ValueError, match="expected one or more tasks, got none"):
        normalised_accuracy([], [])
    with pytest.raises(TypeError, match="expected a mapping or a sequence as accuracies is"):
        normalised_accuracy([0.5], {"a": 0.5})


def test_shots_are_k_of_every_class_and_repeat() -> None:
    labels = _labels(200, 5)
    shots = choose_shots(labels, 4, seed=3)
    assert torch.equal(labels[shots].bincount(), torch.full((5,), 4))
    assert len(shots.unique()) == 20
    assert torch.equal(shots, choose_shots(labels, 4, seed=3))
    assert not torch.equal(shots, choose_shots(labels, 4, seed=4))
    assert set(choose_shots(labels, 2, seed=3).tolist()) < set(shots.tolist())


@pytest.mark.parametrize(
    ("labels", "k", "error", "message"),
    [
        (torch.tensor([0, 0, 1]), 2, ValueError, "k: expected at most 1, the examples of class 1, got 2"),
        (torch.tensor([0, 0, 1]), 0, ValueError, "k: expected 1 or more, got 0"),
        (torch.tensor([0.0, 1.0]), 1, TypeError, "labels: expected integers, got torch.float32"),
        (torch.zeros(2, 2).long(), 1, ValueError, r"labels: expected shape \[N\] with N >= 1, got \[2, 2\]"),
    ],
)
def test_choose_shots_refuses(labels: Tensor, k: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"choose_shots: {message}"):
        choose_shots(labels, k)


@pytest.mark.parametrize(("shots", "batch", "batches", "times"), [(40, 128, 10, 32), (7, 7, 10, 10), (1000, 10, 10, 1), (3, 2, 1, 1)])
def test_repeated_shots_fill_an_epoch(shots: int, batch: int, batches: int, times: int) -> None:
    repeated = repeat_shots(torch.arange(shots), batch, batches=batches)
    assert torch.equal(repeated.bincount(), torch.full((shots,), times))
    assert len(repeated) // batch >= batches
    with pytest.raises(ValueError, match="batch_size: expected 1 or more, got 0"):
        repeat_shots(torch.arange(shots), 0)
    with pytest.raises(ValueError, match=r"indices: expected shape \[N\] with N >= 1, got \[0\]"):
        repeat_shots(torch.arange(0), 1)


def test_the_target_is_left_out_of_its_pool() -> None:
    vectors = {"cars": 1, "dtd": 2, "svhn": 3}
    assert pool_without(vectors, "dtd") == {"cars": 1, "svhn": 3}
    with pytest.raises(KeyError, match="expected one of cars, dtd, svhn, got 'CARS'"):
        pool_without(vectors, "CARS")
    with pytest.raises(ValueError, match="expected a task besides 'cars', got none"):
        pool_without({"cars": 1}, "cars")
