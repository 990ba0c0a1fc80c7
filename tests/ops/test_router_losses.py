"""load_balance_loss, router_z_loss and gate_probabilities: their values, transformers' loss, gradients, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import normal
from torch import Tensor

import taskloom

F64 = torch.float64


def statistics(tokens: int, experts: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, sums of probabilities and log-sum-exps, by torch."""
    logits = normal(tokens, experts, seed=seed)
    ids = logits.topk(k).indices
    counts = torch.bincount(ids.reshape(-1), minlength=experts)
    return counts.int(), logits.softmax(-1).sum(0), logits.logsumexp(-1)


def test_balanced_routing() -> None:
    counts, sums = torch.full((8,), 30, dtype=torch.int32), torch.full((8,), 15.0)
    torch.testing.assert_close(taskloom.load_balance_loss(counts, sums, 120, 2), torch.tensor(1.0))
    torch.testing.assert_close(taskloom.load_balance_loss(counts, sums, 120, 2, convention="transformers"), torch.tensor(2.0))


def test_one_expert_for_all() -> None:
    counts, sums = torch.tensor([50, 0, 0, 0]), torch.tensor([50.0, 0, 0, 0])
    torch.testing.assert_close(taskloom.load_balance_loss(counts, sums, 50, 1), torch.tensor(4.0))


def test_layers_by_convention() -> None:
    tokens, layers = [31, 77], [statistics(31, 6, 2), statistics(77, 6, 2, seed=1)]
    counts, sums, _ = (list(part) for part in zip(*layers, strict=True))
    each = [taskloom.load_balance_loss(*layer[:2], count, 2) for layer, count in zip(layers, tokens, strict=True)]
    torch.testing.assert_close(taskloom.load_balance_loss(counts, sums, tokens, 2), (each[0] + each[1]) / 2)
    together = taskloom.load_balance_loss(counts[0] + counts[1], sums[0] + sums[1], 108, 2, convention="transformers")
    torch.testing.assert_close(taskloom.load_balance_loss(counts, sums, tokens, 2, convention="transformers"), together)
    with_tensors = taskloom.load_balance_loss(counts, sums, [torch.tensor(31), torch.tensor(77)], 2, convention="transformers")
    torch.testing.assert_close(with_tensors, together)


@pytest.mark.parametrize("layers", [1, 3])
def test_is_the_loss_of_transformers(layers: int) -> None:
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = [normal(40, 8, seed=seed).requires_grad_() for seed in range(layers)]
    expected = load_balancing_loss_func(tuple(logits), 8, 2)
    gates = [taskloom.topk_gate(one, 2, statistics=True) for one in logits]
    counts, sums = [gate.counts for gate in gates], [gate.prob_sum for gate in gates]
    loss = taskloom.load_balance_loss(counts, sums, 40, 2, convention="transformers")
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradient_goes_to_the_probabilities() -> None:
    counts, sums, _ = statistics(30, 5, 2)
    sums = sums.double().requires_grad_()
    (found,) = torch.autograd.grad(taskloom.load_balance_loss(counts, sums, 30, 2), sums)
    torch.testing.assert_close(found, 5 * counts.double() / 60 / 30)
    assert torch.autograd.gradcheck(lambda sums: taskloom.load_balance_loss(counts, sums, 30, 2), sums)


def test_no_tokens() -> None:
    none = torch.zeros(5)
    assert taskloom.load_balance_loss(none.int(), none, 0, 2) == 0
    assert taskloom.load_balance_loss(none.int(), none, torch.tensor(0), 2, convention="transformers") == 0
    assert taskloom.router_z_loss(torch.empty(0)) == 0


def test_z_loss() -> None:
    logits = normal(3, 7, 5).double().requires_grad_()
    lse = logits.logsumexp(-1)
    torch.testing.assert_close(taskloom.router_z_loss(lse), lse.square().mean())
    torch.testing.assert_close(taskloom.router_z_loss([lse[0], lse[1:]]), lse.square().mean())
    (found,) = torch.autograd.grad(taskloom.router_z_loss(lse), logits)
    torch.testing.assert_close(found, 2 * lse[..., None] * logits.softmax(-1) / 21)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_probabilities_of_chosen_rows(score: Any, dtype: torch.dtype) -> None:
    logits = normal(23, 6, dtype=dtype)
    rows = torch.tensor([4, 22, 0, 4], dtype=torch.int32)
    found = taskloom.gate_probabilities(logits, rows, score=score, temperature=0.7)
    scaled = logits.double()[rows.long()] / 0.7
    scores = scaled.exp() if score == "softmax" else scaled.sigmoid()
    assert found.dtype == (F64 if dtype == F64 else torch.float32)
    torch.testing.assert_close(found.double(), scores / scores.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)
    everything = taskloom.gate_probabilities(logits, score=score, temperature=0.7)
    torch.testing.assert_close(everything[rows.long()], found)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_probabilities_add_up_to_the_gates_statistics(score: Any) -> None:
    logits = normal(50, 7)
    gate = taskloom.topk_gate(logits, 2, score=score, statistics=True)
    torch.testing.assert_close(taskloom.gate_probabilities(logits, score=score).sum(0), gate.prob_sum)


def test_probabilities_of_very_small_sigmoids() -> None:
    found = taskloom.gate_probabilities(torch.tensor([[-200.0, -200.0, -300.0]]), score="sigmoid")
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5, 0.0]]))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradients_of_probabilities(score: Any) -> None:
    logits = normal(6, 5).double().requires_grad_()
    rows = torch.tensor([5, 0])

    def probabilities(logits: Tensor) -> Tensor:
        return taskloom.gate_probabilities(logits, rows, score=score)

    assert torch.autograd.gradcheck(probabilities, logits)
    assert torch.autograd.gradgradcheck(probabilities, logits)
    (found,) = torch.autograd.grad(probabilities(logits)[:, 0].sum(), logits)
    assert not found[1:5].any()


COUNTS, SUMS = torch.zeros(4).int(), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((COUNTS, SUMS.int(), 3, 2), TypeError, r"prob_sum\[0\]: expected float32"),
        ((COUNTS, SUMS[:3], 3, 2), ValueError, r"expected shape \[E\] everywhere, got \(4,\) and \(3,\)"),
        (([COUNTS], [SUMS, SUMS], 3, 2), ValueError, "as many layers in both, at least one, got 1 and 2"),
        (([], [], 3, 2), ValueError, "at least one, got 0 and 0"),
        (([COUNTS, COUNTS], [SUMS, SUMS], [3], 2), ValueError, "tokens: expected one number or 2, as layers, got 1"),
        ((COUNTS, SUMS, -1, 2), ValueError, "tokens: expected at least 0, got -1"),
        ((COUNTS, SUMS, 3.5, 2), TypeError, "tokens: expected an integer, got float"),
        ((COUNTS, SUMS, torch.zeros(2), 2), ValueError, r"tokens: expected a tensor of one number, got shape \(2,\)"),
        ((COUNTS, SUMS, 3, 0), ValueError, "k: expected at least 1, got 0"),
    ],
)
def test_errors_of_the_balance_loss(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"load_balance_loss: .*{message}"):
        taskloom.load_balance_loss(*arguments)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="convention: expected 'switch' or 'transformers', got 'mixtral'"):
        taskloom.load_balance_loss(COUNTS, SUMS, 3, 2, convention="mixtral")
    with pytest.raises(ValueError, match="router_z_loss: lse: expected at least one layer"):
        taskloom.router_z_loss([])
    with pytest.raises(TypeError, match=r"router_z_loss: lse\[0\]: expected float32"):
        taskloom.router_z_loss(COUNTS)
    logits = torch.zeros(4, 3)
    for arguments, error, message in (
        ({"logits": logits.long()}, TypeError, "logits: expected float32"),
        ({"logits": logits[0]}, ValueError, r"logits: expected shape \[T, E\]"),
        ({"rows": torch.zeros(2)}, TypeError, "rows: expected a tensor of int32 or int64"),
        ({"rows": torch.zeros(2, 1).long()}, ValueError, r"rows: expected shape \[B\]"),
        ({"score": "tanh"}, ValueError, "score: expected 'softmax' or 'sigmoid', got 'tanh'"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0.0"),
    ):
        with pytest.raises(error, match=f"gate_probabilities: {message}"):
            taskloom.gate_probabilities(**{"logits": logits} | arguments)
    with pytest.raises(IndexError):
        taskloom.gate_probabilities(logits, torch.tensor([4]))


def test_what_is_no_statistic() -> None:
    counts, sums = torch.ones(4).int(), torch.ones(4)
    forgotten = "got None; topk_gate gives it with statistics=True"
    for given, name in ((None, "lse"), ([sums, None], r"lse\[1\]")):
        with pytest.raises(TypeError, match=f"router_z_loss: {name}: expected a tensor.*, {forgotten}"):
            taskloom.router_z_loss(given)
    wrong: list[tuple[Any, Any, int, type[Exception], str]] = [
        (None, sums, 4, TypeError, f"counts: expected a tensor or a list of them, {forgotten}"),
        ([counts], ["a"], 4, TypeError, r"prob_sum\[0\]: expected a tensor, got str"),
        (counts.bool(), sums, 4, TypeError, r"counts\[0\]: expected numbers, got torch.bool"),
        ([counts, counts[1:]], [sums, sums[1:]], 4, ValueError, r"prob_sum\[1\]: expected 4 experts, as in the first layer, got 3"),
        (counts, sums, -1, ValueError, "tokens: expected at least 0, got -1"),
    ]
    for count, one, tokens, error, message in wrong:
        with pytest.raises(error, match=f"load_balance_loss: {message}"):
            taskloom.load_balance_loss(count, one, tokens, 2)
