"""topk_gate beyond its contract: the routers that it stands for, its invariants, derivatives, bad rows, errors, compilation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases_topk_gate import low_rows
from compiled import compiled
from contract import assert_same_bits
from samples import weights
from torch import Tensor

import taskloom

F32, F64 = torch.float32, torch.float64
ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Chain = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _renormalised(weight: Tensor, eps: float = 0.0) -> Tensor:
    return weight / (weight.sum(-1, keepdim=True) + eps)


def _olmoe(z: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return z.softmax(-1).topk(8, dim=-1)


def _qwen3(z: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weight, ids = z.softmax(-1).topk(8, dim=-1)
    return _renormalised(weight), ids


def _deepseek_moe(z: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return z.softmax(-1).topk(6, dim=-1)


def _deepseek_v2(z: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = z.softmax(-1)
    best = scores.view(len(z), 8, -1).amax(-1).topk(3, dim=-1).indices
    kept = torch.zeros(len(z), 8, dtype=torch.bool).scatter(1, best, True).repeat_interleave(20, 1)
    weight, ids = scores.masked_fill(~kept, 0.0).topk(6, dim=-1)
    return weight * 16, ids


def _deepseek_v3(z: Tensor, bias: Tensor, mask: float = -math.inf) -> tuple[Tensor, Tensor]:
    scores = z.sigmoid()
    choice = scores + bias
    best = choice.view(len(z), 8, -1).topk(2, dim=-1).values.sum(-1).topk(4, dim=-1).indices
    kept = torch.zeros(len(z), 8, dtype=torch.bool).scatter(1, best, True).repeat_interleave(32, 1)
    # topk takes any of equal ones, as there are where the mask is the best.
    ids = choice.masked_fill(~kept, mask).sort(dim=-1, descending=True, stable=True).indices[:, :8]
    return _renormalised(scores.gather(1, ids), 1e-20) * 2.5, ids


def _transformers_v3(z: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _deepseek_v3(z, bias - 1.2, 0.0)


def _gpt_oss(z: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    logits, ids = z.topk(4, dim=-1)
    return logits.softmax(-1), ids


def _mixtral(z: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weight, ids = z.softmax(-1).topk(2, dim=-1)
    return _renormalised(weight), ids


V3: dict[str, Any] = {"score": "sigmoid", "n_group": 8, "topk_group": 4, "renormalize": True, "eps": 1e-20, "scale": 2.5}
# Experts, k, options of the op, the shift of its bias (None: no bias), and the same in plain torch.
PRESETS: dict[str, tuple[int, int, dict[str, Any], float | None, Chain]] = {
    "OLMoE": (64, 8, {}, None, _olmoe),
    "Qwen3": (128, 8, {"renormalize": True}, None, _qwen3),
    "DeepSeekMoE": (64, 6, {}, None, _deepseek_moe),
    "DeepSeek-V2": (160, 6, {"n_group": 8, "topk_group": 3, "group_score": "max", "scale": 16.0}, None, _deepseek_v2),
    "DeepSeek-V3": (256, 8, V3, 0.0, _deepseek_v3),
    "DeepSeek-V3 of transformers": (256, 8, V3 | {"group_mask": 0.0}, -1.2, _transformers_v3),
    "Mixtral": (8, 2, {"renormalize": True}, None, _mixtral),
    "GPT-OSS": (128, 4, {"renormalize": True}, None, _gpt_oss),
}


def _distinct(rows: int, experts: int, dtype: torch.dtype) -> Tensor:
    """Logits without ties in a row, in any dtype: 16-bit logits have so few values that random ones would tie."""
    order = torch.rand(rows, experts, generator=torch.Generator().manual_seed(3)).argsort(1)
    return ((order - experts / 2) / 32).to(dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_is_the_plain_router(preset: str, dtype: torch.dtype) -> None:
    experts, k, options, shift, chain = PRESETS[preset]
    logits = _distinct(37, experts, dtype).requires_grad_()
    bias = weights(experts, seed=1, scale=0.05)
    gate = taskloom.topk_gate(logits, k, None if shift is None else bias + shift, **options)
    plain = logits.detach().clone().requires_grad_()
    weight, ids = chain(plain.float(), bias)
    assert gate.ids.dtype == torch.int32
    assert torch.equal(gate.ids.long(), ids)
    torch.testing.assert_close(gate.weight, weight, rtol=1e-6, atol=1e-6)
    slopes = weights(*weight.shape, seed=2)
    (ours,), (theirs,) = torch.autograd.grad(gate.weight, logits, slopes), torch.autograd.grad(weight, plain, slopes)
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == F32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize("experts", [1, 2, 31, 32, 33, 160, 257, 288, 384, 1000, 1024])
def test_any_number_of_experts(experts: int) -> None:
    for k in {1, min(8, experts), min(32, experts)}:
        logits = weights(9, experts, scale=2)
        gate = taskloom.topk_gate(logits, k, statistics=True)
        expected = logits.softmax(-1)
        assert torch.equal(gate.ids.long(), logits.topk(k).indices)
        torch.testing.assert_close(gate.weight, expected.topk(k).values, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gate.prob_sum, expected.sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gate.lse, logits.logsumexp(1), rtol=1e-6, atol=1e-6)
        assert gate.counts is not None
        assert torch.equal(gate.counts.long(), gate.ids.long().flatten().bincount(minlength=experts))


@pytest.mark.parametrize("dtype", [*ALL_DTYPES, F64])
@pytest.mark.parametrize("k", [1, 7, 16, 17, 32])
def test_ties_go_to_the_lower_expert(dtype: torch.dtype, k: int) -> None:
    logits = (weights(40, 100) * 2).round().to(dtype)
    logits[0] = 3
    logits[1, ::2], logits[1, 1::2] = 0.0, -0.0
    ids = taskloom.topk_gate(logits, k).ids.long()
    assert torch.equal(ids, logits.sort(dim=1, descending=True, stable=True).indices[:, :k])
    equal = taskloom.topk_gate(torch.zeros(3, 100), k, torch.zeros(100), score="sigmoid", n_group=10, topk_group=4).ids
    assert torch.equal(equal.long(), torch.arange(k).expand(3, k))


def test_near_logits_keep_their_order() -> None:
    # Both have the sigmoid 1 in float32.
    assert taskloom.topk_gate(torch.tensor([[20.0, 21.0]]), 1, score="sigmoid").ids.item() == 1
    assert taskloom.topk_gate(torch.tensor([[20.0, 21.0]]), 1, torch.zeros(2), score="sigmoid").ids.item() == 0


def test_unselected_logits_have_no_influence() -> None:
    logits = weights(11, 50).requires_grad_()
    gate = taskloom.topk_gate(logits, 6, renormalize=True)
    lower = torch.where(torch.zeros_like(logits, dtype=torch.bool).scatter(1, gate.ids.long(), True), logits, logits - 2).detach()
    again = taskloom.topk_gate(lower, 6, renormalize=True)
    assert_same_bits(gate.weight.detach(), again.weight)
    torch.testing.assert_close(gate.weight.sum(1), torch.ones(11))
    for options in ({"renormalize": True}, {"score": "sigmoid"}, {"score": "sigmoid", "renormalize": True, "eps": 1e-20}):
        gate = taskloom.topk_gate(logits, 6, **options)
        (slopes,) = torch.autograd.grad(gate.weight.square().sum(), logits)
        assert not slopes.scatter(1, gate.ids.long(), 0.0).any()
    (slopes,) = torch.autograd.grad(taskloom.topk_gate(logits, 6).weight.square().sum(), logits)
    torch.testing.assert_close(slopes.sum(1), torch.zeros(11), rtol=0, atol=1e-6)


def test_bias_chooses_only() -> None:
    logits, bias = weights(20, 64, dtype=F64), weights(64, seed=1, scale=1e-3, dtype=F64).requires_grad_()
    leaf = logits.clone().requires_grad_()
    gate = taskloom.topk_gate(leaf, 6, bias, renormalize=True)
    assert_same_bits(gate.weight.detach(), taskloom.topk_gate(logits, 6, bias.detach() + 0.5, renormalize=True).weight)
    gate.weight.square().sum().backward()
    assert bias.grad is None
    assert leaf.grad is not None
    forced = torch.zeros(64).index_fill(0, torch.tensor([7, 9]), torch.inf)
    assert taskloom.topk_gate(logits.float(), 2, forced).ids.tolist() == [[7, 9]] * 20
    never = torch.zeros(64).index_fill(0, torch.arange(60), -torch.inf)
    assert taskloom.topk_gate(logits.float(), 4, never).ids.min() == 60


def test_statistics_add_up() -> None:
    gate = taskloom.topk_gate(weights(4099, 24), 3, statistics=True, score="sigmoid")
    assert gate.counts is not None
    assert gate.prob_sum is not None
    assert gate.counts.sum() == 4099 * 3
    torch.testing.assert_close(gate.prob_sum.sum(), torch.tensor(4099.0), rtol=1e-6, atol=0)
    plain = taskloom.topk_gate(weights(4099, 24), 3, score="sigmoid")
    assert plain.counts is plain.prob_sum is plain.lse is None
    assert_same_bits(plain.weight, gate.weight)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_shares_of_sigmoids_that_cannot_be_told_from_0(backend: str, dtype: torch.dtype) -> None:
    logits = low_rows(5, 40, dtype=dtype).requires_grad_()
    with taskloom.backend(backend):
        prob_sum = taskloom.topk_gate(logits, 3, score="sigmoid", statistics=True).prob_sum
        assert prob_sum is not None
        slopes = weights(40, seed=1, dtype=dtype)
        (ours,) = torch.autograd.grad(prob_sum, logits, slopes)
    expected = taskloom.gate_probabilities(logits, score="sigmoid").sum(0)
    (theirs,) = torch.autograd.grad(expected, logits, slopes)
    torch.testing.assert_close(prob_sum, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"score": "sigmoid"}, {"renormalize": True}])
def test_groups_that_are_all_kept_change_nothing(options: dict[str, Any]) -> None:
    logits, bias = weights(9, 48), weights(48, seed=1, scale=0.1)
    for given in (None, bias):
        plain = taskloom.topk_gate(logits, 5, given, **options)
        grouped = taskloom.topk_gate(logits, 5, given, n_group=8, topk_group=8, **options)
        assert torch.equal(plain.ids, grouped.ids)
        assert_same_bits(plain.weight, grouped.weight)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups", [1, 5])
def test_groups_keep_their_best(groups: int, biased: bool) -> None:
    logits = weights(30, 60, scale=2)
    bias = weights(60, seed=1) if biased else None
    gate = taskloom.topk_gate(logits, 4, bias, n_group=20, topk_group=groups + 1)
    choice = logits.softmax(1) + (0 if bias is None else bias)
    judged = choice.view(30, 20, 3).topk(2 if biased else 1, dim=-1).values.sum(-1)
    kept = judged.topk(groups + 1).indices
    assert bool((gate.ids.long()[..., None] // 3 == kept[:, None]).any(-1).all())


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits, bias = weights(300, 160), weights(160, seed=1, scale=0.1)
    for options in ({}, {"bias": bias, "renormalize": True, "n_group": 8, "topk_group": 3}):
        whole = taskloom.topk_gate(logits, 6, **options)
        for row in (0, 123, 299):
            alone = taskloom.topk_gate(logits[row], 6, **options)
            assert torch.equal(alone.ids, whole.ids[row])
            assert_same_bits(alone.weight, whole.weight[row])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("experts", [5, 64, 130])
@pytest.mark.parametrize("grouped", [False, True])
def test_rows_with_nan(score: Any, experts: int, grouped: bool) -> None:
    options: dict[str, Any] = {"score": score, "n_group": 5, "topk_group": 4} if grouped and experts % 5 == 0 else {"score": score}
    logits = weights(6, experts)
    clean = taskloom.topk_gate(logits, 3, **options)
    spoilt = logits.clone()
    spoilt[2, experts - 1] = torch.nan
    spoilt[4] = -torch.nan
    gate = taskloom.topk_gate(spoilt, 3, **options)
    assert gate.ids[2].tolist() == gate.ids[4].tolist() == [0, 1, 2]
    assert gate.weight[[2, 4]].isnan().all()
    others = [0, 1, 3, 5]
    assert torch.equal(gate.ids[others], clean.ids[others])
    assert_same_bits(gate.weight[others], clean.weight[others])
    leaf = spoilt.requires_grad_()
    (slopes,) = torch.autograd.grad(taskloom.topk_gate(leaf, 3, **options).weight.nansum(), leaf)
    assert slopes[others].isfinite().all()


def test_infinite_logits() -> None:
    logits = weights(4, 20)
    logits[0, 3] = torch.inf
    logits[1, ::3] = -torch.inf
    logits[2] = -torch.inf
    gate = taskloom.topk_gate(logits, 16, statistics=True)
    assert gate.ids[0, 0] == 3
    assert gate.ids[2].tolist() == list(range(16))
    assert gate.weight[[0, 2]].isnan().all()
    assert gate.weight[1].isfinite().all()
    assert gate.ids[1, 13:].tolist() == [0, 3, 6]
    torch.testing.assert_close(gate.lse, logits.logsumexp(1))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("eps", [0.0, 0.25])
def test_gradients(score: Any, renormalize: bool, eps: float) -> None:
    options: dict[str, Any] = {"score": score, "renormalize": renormalize, "eps": eps, "scale": 1.5, "temperature": 0.8, "statistics": True}
    logits = _distinct(3, 20, F64).requires_grad_()

    def found(logits: Tensor) -> tuple[Tensor, ...]:
        gate = taskloom.topk_gate(logits, 4, **options)
        assert gate.prob_sum is not None
        assert gate.lse is not None
        return gate.weight, gate.prob_sum, gate.lse

    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(found, logits)
    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(found, logits, fast_mode=True)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_scale_that_is_0_in_float32_leaves_no_gradient(backend: str) -> None:
    logits = weights(5, 33).requires_grad_()
    with taskloom.backend(backend):
        weight = taskloom.topk_gate(logits, 4, renormalize=True, scale=1e-50).weight
        (slopes,) = torch.autograd.grad(weight.sum(), logits)
    assert not weight.any()
    assert not slopes.any()


def test_only_inputs_and_results_are_kept_for_backward() -> None:
    logits = weights(64, 128).requires_grad_()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(tuple(one.shape)) or one, lambda one: one):
        taskloom.topk_gate(logits, 8, renormalize=True, statistics=True)
    assert sorted(kept) == [(64, 8), (64, 8), (64, 128)]


def test_transforms() -> None:
    logits = _distinct(3, 20, F64)

    def loss(logits: Tensor) -> Tensor:
        return taskloom.topk_gate(logits, 4, renormalize=True).weight.square().sum()

    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(logits), expected)
    _, tangent = torch.func.jvp(loss, (logits,), (torch.ones_like(logits),))
    torch.testing.assert_close(tangent, expected.sum())


def test_compiled(fresh_compiler: None) -> None:
    def loss(logits: Tensor, bias: Tensor) -> Tensor:
        gate = taskloom.topk_gate(logits, 4, bias, score="sigmoid", renormalize=True, statistics=True)
        assert gate.lse is not None
        return gate.weight.square().sum() + gate.lse.square().mean()

    run = compiled(loss)
    for rows in (5, 3):
        logits, bias = weights(rows, 33).requires_grad_(), weights(33, seed=1)
        (ours,), (theirs,) = (torch.autograd.grad(one(logits, bias), logits) for one in (run, loss))
        torch.testing.assert_close(ours, theirs)


X = torch.zeros(3, 24)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logits": X.long()}, TypeError, "logits: expected float32"),
        ({"logits": X[:, :0]}, ValueError, r"logits: expected shape \[..., E\] with at least one expert, got \(3, 0\)"),
        ({"k": 0}, ValueError, "k: expected 1 to 24 of 24 experts, got 0"),
        ({"k": 25}, ValueError, "k: expected 1 to 24 of 24 experts, got 25"),
        ({"logits": torch.zeros(2, 64), "k": 33}, ValueError, "k: expected 1 to 32 of 64 experts, got 33"),
        ({"k": 2.0}, TypeError, "k: expected an integer, got float"),
        ({"k": "2"}, TypeError, "k: expected an integer, got str"),
        ({"k": True}, TypeError, "k: expected an integer, got bool"),
        ({"n_group": 4.0}, TypeError, "n_group: expected an integer, got float"),
        ({"scale": "a"}, TypeError, "scale: expected a number, got 'a'"),
        ({"score": "tanh"}, ValueError, "score: expected 'softmax' or 'sigmoid', got 'tanh'"),
        ({"bias": X[:, 0]}, ValueError, r"bias: expected shape \(24,\) as the experts of logits, got \(3,\)"),
        ({"bias": X[0].int()}, TypeError, "bias: expected float32"),
        ({"n_group": 5}, ValueError, "n_group: expected a divisor of 24, the number of experts, got 5"),
        ({"n_group": 4, "topk_group": 5}, ValueError, "topk_group: expected 1 to 4, the number of groups, got 5"),
        ({"k": 8, "n_group": 4}, ValueError, "topk_group: expected at least 2 groups of 6 experts, so that 8 can be chosen, got 1"),
        ({"n_group": 24, "topk_group": 9, "group_score": "top2"}, ValueError, "group_score: 'top2' needs groups of at least two experts"),
        ({"group_score": "mean"}, ValueError, "group_score: expected None, 'max' or 'top2', got 'mean'"),
        ({"group_mask": math.nan}, ValueError, "group_mask: expected a number, got nan"),
        ({"eps": -1.0}, ValueError, r"eps: expected at least 0, got -1\.0"),
        ({"temperature": 0.0}, ValueError, r"temperature: expected 1e-30 to 1e\+30, got 0\.0"),
        ({"ids_dtype": torch.int16}, TypeError, r"ids_dtype: expected torch\.int32 or torch\.int64, got torch\.int16"),
    ],
)
def test_errors(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with taskloom.backend(backend), pytest.raises(error, match=f"topk_gate: {message}"):
        taskloom.topk_gate(**{"logits": X, "k": 4} | changed)


def test_backward_refuses_experts_that_are_not_there() -> None:
    from taskloom.ops.gating import topk_gate_backward

    gate = taskloom.topk_gate(weights(3, 24), 4)
    for wrong in (24, -1):
        ids = gate.ids.clone()
        ids[1, 2] = wrong
        with taskloom.backend("native"), pytest.raises(RuntimeError, match=f"ids: expected 0 to 23, got {wrong}"):
            topk_gate_backward(weights(3, 24), ids, gate.weight, gate.weight)


@pytest.mark.parametrize("name", ["scale", "eps", "temperature", "group_mask"])
def test_numbers_have_no_gradient(name: str) -> None:
    number = torch.nn.Parameter(torch.tensor(0.5))
    options: dict[str, Any] = {"n_group": 4, "topk_group": 2, name: number}
    with pytest.raises(TypeError, match=f"topk_gate: {name}: expected a number, got a tensor that requires grad"):
        taskloom.topk_gate(X, 4, **options)
    with torch.no_grad():
        assert_same_bits(taskloom.topk_gate(X, 4, **options).weight, taskloom.topk_gate(X, 4, **options | {name: 0.5}).weight)


def test_backward_refuses_lists() -> None:
    from taskloom.ops.gating import topk_gate_backward

    gate = taskloom.topk_gate(X, 4)
    for name in ("logits", "ids", "weight", "dweight"):
        given: dict[str, Any] = {"logits": X, "ids": gate.ids, "weight": gate.weight, "dweight": gate.weight} | {name: [1.0]}
        with pytest.raises(TypeError, match=f"topk_gate_backward: {name}: expected .*, got list"):
            topk_gate_backward(**given)
