"""stream_softmax_mix beyond its contract: the estimator's invariants, memory, derivatives, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocations import allocated
from compiled import compiled
from contract import assert_same_bits
from samples import weights
from torch import Tensor

import taskloom
from taskloom.ops.gating import _stream_products

F64 = torch.float64


def pairs(batch: int, count: int, dims: int, experts: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    pool, x = weights(experts, dims, seed=1, dtype=dtype), weights(batch, count, dims, seed=2, dtype=dtype)
    y = torch.einsum("bkd,bd->bk", x, pool[torch.arange(batch) % experts]) + 0.5 * weights(batch, count, seed=3, dtype=dtype)
    return x, y, pool


def naive(x: Tensor, y: Tensor, experts: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    predictions = torch.einsum("bkd,md->bkm", x, experts)
    squares = (y[..., None] - predictions).square()
    scores = torch.stack([-squares[:, :k].sum(1) / (2 * sigma**2) for k in range(x.shape[1])], 1)
    return (torch.softmax(scores, -1) * predictions).sum(-1), torch.logsumexp(scores, -1)


@pytest.mark.parametrize(("batch", "count", "dims", "experts"), [(5, 16, 8, 1000), (9, 7, 4, 17), (1, 16, 8, 20_000), (2, 66, 70, 50)])
def test_is_the_naive_form(batch: int, count: int, dims: int, experts: int) -> None:
    given = pairs(batch, count, dims, experts)
    expected = naive(*given, 0.5)
    torch.testing.assert_close(tuple(taskloom.stream_softmax_mix(*given, 0.5)), expected, rtol=1e-10, atol=1e-10)
    single = taskloom.stream_softmax_mix(*(one.float() for one in given), 0.5)
    if dims <= 8:
        assert (single.pred - expected[0]).abs().max() <= 2e-5 * expected[0].abs().max() + 2e-5
    assert ((single.lse - expected[1]).abs() <= 1e-4 * expected[1].abs().clamp_min(1)).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 2e-5)])
def test_hand_case(dtype: torch.dtype, tolerance: float) -> None:
    experts = torch.tensor([[1, 0], [0, 1], [-1, 2]], dtype=dtype)
    x, y = torch.tensor([[[1, 2], [0.5, -1], [2, 1]]], dtype=dtype), torch.tensor([[1.2, 0.3, 0]], dtype=dtype)
    pred, lse = taskloom.stream_softmax_mix(x, y, experts, 0.5)
    torch.testing.assert_close(pred, torch.tensor([[2, 0.149404024228, 1.989013056821]], dtype=dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close(lse[0, 0], torch.tensor(3.0, dtype=dtype).log())
    nearest = taskloom.stream_softmax_mix(x, y, experts, 1e-6).pred
    torch.testing.assert_close(nearest, torch.tensor([[2, 0.5, 2]], dtype=dtype), rtol=0, atol=tolerance)
    mean = taskloom.stream_softmax_mix(x, y, experts, 1e6).pred
    torch.testing.assert_close(mean, x @ experts.mean(0), rtol=0, atol=tolerance)


def test_first_prediction_is_the_experts_mean() -> None:
    x, y, experts = pairs(3, 4, 5, 10_000)
    torch.testing.assert_close(taskloom.stream_softmax_mix(x, y, experts, 0.5).pred[:, 0], x[:, 0] @ experts.mean(0))


def test_is_causal() -> None:
    x, y, experts = pairs(3, 9, 4, 600, torch.float32)
    pred, lse = taskloom.stream_softmax_mix(x, y, experts, 0.5)
    for k in range(9):
        later_x, later_y = x.clone(), y.clone()
        later_x[:, k + 1 :], later_y[:, k:] = torch.nan, torch.nan
        changed = taskloom.stream_softmax_mix(later_x, later_y, experts, 0.5)
        assert_same_bits(changed.pred[:, : k + 1], pred[:, : k + 1])
        assert_same_bits(changed.lse[:, : k + 1], lse[:, : k + 1])
        assert changed.pred[:, k + 1 :].isnan().all()


def test_one_expert_predicts_for_all() -> None:
    x, y, experts = pairs(3, 6, 4, 1)
    torch.testing.assert_close(taskloom.stream_softmax_mix(x, y, experts, 0.5).pred, x @ experts[0])


def test_duplicates_and_order_of_experts_change_nothing() -> None:
    x, y, experts = pairs(3, 8, 4, 1001)
    pred, lse = taskloom.stream_softmax_mix(x, y, experts, 0.5)
    twice = taskloom.stream_softmax_mix(x, y, torch.cat([experts, experts]), 0.5)
    torch.testing.assert_close(twice.pred, pred, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(twice.lse, lse + torch.tensor(2.0).log(), rtol=1e-6, atol=1e-6)
    turned = taskloom.stream_softmax_mix(x, y, experts.flip(0), 0.5)
    torch.testing.assert_close(turned.pred, pred, rtol=1e-6, atol=1e-6)


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    x, y, experts = pairs(19, 5, 4, 700, torch.float32)
    whole = taskloom.stream_softmax_mix(x, y, experts, 0.5).pred
    for rows in (slice(0, 1), slice(3, 14), slice(18, 19)):
        assert_same_bits(taskloom.stream_softmax_mix(x[rows], y[rows], experts, 0.5).pred, whole[rows])


def test_not_finite_inputs_stay_in_their_sequence() -> None:
    x, y, experts = pairs(4, 5, 3, 40, torch.float32)
    clean = taskloom.stream_softmax_mix(x, y, experts, 0.5).pred
    y[2, 1] = torch.nan
    pred, lse = taskloom.stream_softmax_mix(x, y, experts, 0.5)
    assert_same_bits(pred[[0, 1, 3]], clean[[0, 1, 3]])
    assert pred[2, 2:].isnan().all()
    assert lse[2, 2:].isnan().all()
    assert_same_bits(pred[2, :2], clean[2, :2])


def test_gradients() -> None:
    def mixed(x: Tensor, y: Tensor, experts: Tensor) -> Any:
        return tuple(taskloom.stream_softmax_mix(x, y, experts, 0.7))

    given = [one.requires_grad_() for one in pairs(2, 4, 3, 6)]
    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(mixed, given, atol=1e-6)
    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(mixed, given, fast_mode=True)


@pytest.mark.parametrize("experts", [33, 3000])
def test_gradients_of_many_tiles(experts: int) -> None:
    given = [one.requires_grad_() for one in pairs(3, 6, 5, experts)]
    slopes = [weights(3, 6, seed=seed, dtype=F64) for seed in (6, 7)]
    found = taskloom.stream_softmax_mix(*given, 0.5)
    theirs = torch.autograd.grad(naive(*given, 0.5), given, slopes)
    torch.testing.assert_close(torch.autograd.grad(tuple(found), given, slopes), theirs, rtol=1e-9, atol=1e-10)


def test_gradients_by_torchs_products_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stream_products, "CHUNK_ENTRIES", 100)
    given = [one.requires_grad_() for one in pairs(3, 5, 4, 33)]
    slopes = [weights(3, 5, seed=seed, dtype=F64) for seed in (6, 7)]
    expected = naive(*given, 0.5)
    theirs = torch.autograd.grad(expected, given, slopes, retain_graph=True)
    fixed = [one.detach() for one in (*given, *slopes, *expected)]
    ours = _stream_products.stream_softmax_mix_backward(*fixed, 0.5, True, True, True)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_memory_does_not_grow_with_the_experts() -> None:
    taken = [
        allocated(lambda given=given: taskloom.stream_softmax_mix(*given, 0.5)) for given in (pairs(600, 4, 2, m) for m in (100, 40_000))
    ]
    assert taken[1] <= taken[0]
    x, y, experts = pairs(64, 4, 2, 10_000, torch.float32)
    few = allocated(lambda: taskloom.stream_softmax_mix(x, y, experts, 0.5))
    assert few < y.numel() * len(experts) * 4 / 100


def test_transforms() -> None:
    x, y, experts = pairs(2, 4, 3, 6)

    def loss(x: Tensor) -> Tensor:
        return taskloom.stream_softmax_mix(x, y, experts, 0.5).pred.square().sum()

    _, tangent = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.func.grad(loss)(x).sum())


def test_compiled(fresh_compiler: None) -> None:
    def loss(x: Tensor, y: Tensor, experts: Tensor) -> Tensor:
        return taskloom.stream_softmax_mix(x, y, experts, 0.5).pred.square().sum()

    run = compiled(loss)
    for batch in (3, 2):
        given = [one.requires_grad_() for one in pairs(batch, 4, 3, 20)]
        ours, theirs = (torch.autograd.grad(one(*given), given) for one in (run, loss))
        torch.testing.assert_close(ours, theirs)


X, Y, EXPERTS = torch.zeros(2, 4, 3), torch.zeros(2, 4), torch.zeros(5, 3)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": X.long()}, TypeError, "x: expected float32"),
        ({"experts": EXPERTS.int()}, TypeError, "experts: expected float32"),
        ({"x": X[..., :0]}, ValueError, r"x: expected shape \[B, K, D\] with D of at least 1, got \(2, 4, 0\)"),
        ({"y": Y[:, 1:]}, ValueError, r"y: expected shape \(2, 4\) as x's sequences and pairs, got \(2, 3\)"),
        ({"experts": EXPERTS[:, 1:]}, ValueError, r"experts: expected shape \[M, 3\] with at least one expert, got \(5, 2\)"),
        ({"experts": EXPERTS[:0]}, ValueError, r"experts: expected shape \[M, 3\] with at least one expert, got \(0, 3\)"),
        ({"sigma": 0.0}, ValueError, r"sigma: expected 1e-15 to 1e\+15, got 0\.0"),
        ({"sigma": -1.0}, ValueError, r"sigma: expected 1e-15 to 1e\+15, got -1\.0"),
        ({"sigma": float("nan")}, ValueError, r"sigma: expected 1e-15 to 1e\+15, got nan"),
        ({"sigma": 1e-25}, ValueError, r"sigma: expected 1e-15 to 1e\+15, got 1e-25"),
        ({"sigma": "a"}, TypeError, "sigma: expected a number, got 'a'"),
    ],
)
def test_errors(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with taskloom.backend(backend), pytest.raises(error, match=f"stream_softmax_mix: {message}"):
        taskloom.stream_softmax_mix(**{"x": X, "y": Y, "experts": EXPERTS, "sigma": 0.5} | changed)
