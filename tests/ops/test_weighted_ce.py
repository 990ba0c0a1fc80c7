"""weighted_ce beyond its contract: invariants, derivatives, memory, errors, transforms, compilation."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases_weighted_ce import head, row_weights, words
from compiled import compiled
from contract import assert_close, assert_same_bits
from samples import weights as normal

import taskloom
from taskloom.ops.masked import weighted_ce_backward

N, D, V = 61, 24, 137


def _leaves(dtype: torch.dtype = torch.float32, rows: int = N, vocabulary: int = V) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(rows, D, dtype=dtype).requires_grad_(), head(vocabulary, D, dtype=dtype).requires_grad_()


def _naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The loss by way of all logits, in float64."""
    rows = weights > 0
    ce = F.cross_entropy(hidden[rows].double() @ weight.double().t(), targets[rows], reduction="none")
    return (weights[rows].double() * ce).sum() / weights[rows].double().sum()


def _assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert torch.linalg.vector_norm(got.double() - expected.double()) <= tolerance * torch.linalg.vector_norm(expected.double())


def test_a_worked_example() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [5.0, 1.0, 1.0]], dtype=torch.float64).log()
    loss, log_probs = taskloom.weighted_ce(logits, None, torch.tensor([2, 0, 1]), torch.tensor([1.0, 0.0, 3.0]), return_log_probs=True)
    expected = torch.tensor([3 / 6, 1.0, 1 / 7], dtype=torch.float64).log()
    assert torch.allclose(log_probs, expected)
    assert float(loss) == pytest.approx(float(-(expected[0] + 3 * expected[2]) / 4))


def test_equal_weights_give_the_mean_of_torch() -> None:
    targets = words(N, V)
    targets[::3] = -100
    ours, theirs = _leaves(), _leaves()
    loss = taskloom.weighted_ce(*ours, targets)
    expected = F.cross_entropy(theirs[0] @ theirs[1].t(), targets)
    loss.backward()
    expected.backward()
    _assert_near(loss, expected, 1e-6)
    for one, other in zip(ours, theirs, strict=True):
        _assert_near(one.grad, other.grad, 1e-5)


@pytest.mark.parametrize(("dtype", "loss_tolerance", "tolerance"), [(torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-6, 4e-3)])
def test_the_head_and_its_logits_agree(dtype: torch.dtype, loss_tolerance: float, tolerance: float) -> None:
    weights = row_weights(N)
    targets = words(N, V, weights)
    ours, theirs = _leaves(dtype), _leaves(dtype)
    loss, expected = taskloom.weighted_ce(*ours, targets, weights), _naive(*theirs, targets, weights)
    logits = ours[0].detach().float() @ ours[1].detach().float().t()
    assert_close(taskloom.weighted_ce(logits, None, targets, weights), loss.detach())
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    _assert_near(loss, expected, loss_tolerance)
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad.dtype == dtype
        _assert_near(one.grad, other.grad, tolerance)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e6])
def test_scaled_weights_change_nothing(factor: float) -> None:
    weights = row_weights(N)
    targets = words(N, V, weights)
    plain, scaled = _leaves(), _leaves()
    losses = [taskloom.weighted_ce(*plain, targets, weights), taskloom.weighted_ce(*scaled, targets, factor * weights)]
    for loss in losses:
        loss.backward()
    _assert_near(losses[1], losses[0], 1e-6)
    for one, other in zip(scaled, plain, strict=True):
        _assert_near(one.grad, other.grad, 1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rows_of_weight_zero_are_never_looked_at(backend: str) -> None:
    weights = row_weights(N)
    unsupervised = weights == 0
    targets = words(N, V, weights)
    targets[unsupervised] = torch.iinfo(torch.int64).min
    hidden, weight = _leaves()
    with torch.no_grad():
        hidden[unsupervised] = torch.nan
    with taskloom.backend(backend):
        loss, log_probs = taskloom.weighted_ce(hidden, weight, targets, weights, return_log_probs=True)
        (loss + log_probs.sum()).backward()
    assert loss.isfinite()
    assert hidden.grad[unsupervised].count_nonzero() == 0
    assert log_probs[unsupervised].count_nonzero() == 0
    assert weight.grad.isfinite().all()
    assert hidden.grad[~unsupervised].count_nonzero(1).all()


def test_ignored_targets_are_not_supervised() -> None:
    hidden, weight = _leaves()
    targets, weights = words(N, V), row_weights(N)
    ignored = torch.where(torch.arange(N) % 2 == 0, 7, targets)
    expected = taskloom.weighted_ce(hidden, weight, targets, torch.where(ignored == 7, 0, weights))
    assert_same_bits(taskloom.weighted_ce(hidden, weight, ignored, weights, ignore_index=7).detach(), expected.detach())


def test_bool_weights_and_batches() -> None:
    hidden, weight = normal(3, 5, D), head(V, D)
    targets, mask = words(15, V).reshape(3, 5), (torch.arange(15) % 4 > 0).reshape(3, 5)
    loss, log_probs = taskloom.weighted_ce(hidden, weight, targets, mask, return_log_probs=True)
    expected, flat = taskloom.weighted_ce(hidden.flatten(0, 1), weight, targets.flatten(), mask.flatten().float(), return_log_probs=True)
    assert_same_bits(loss, expected)
    assert_same_bits(log_probs, flat.reshape(3, 5))
    single, row = taskloom.weighted_ce(hidden[0, 1], weight, targets[0, 1], return_log_probs=True)
    assert_same_bits(row, log_probs[0, 1])
    assert_same_bits(single, -row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_are_those_of_torch_at_any_size(dtype: torch.dtype) -> None:
    logits = normal(8, 1500, dtype=dtype) * torch.tensor([0, 1, 10, 60, 1e3, 1e6, 1e20, 1e30], dtype=dtype)[:, None]
    targets = logits.argmax(1)
    targets[::2] = words(4, 1500)
    _, log_probs = taskloom.weighted_ce(logits, None, targets, return_log_probs=True)
    expected = logits.double().log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(log_probs, expected.to(dtype), rtol=1e-6, atol=1e-6 if dtype == torch.float32 else 1e-12)


def test_nan_and_infinite_logits_show() -> None:
    logits = normal(4, 600)
    logits[1, 599], logits[2, 3], logits[3] = torch.nan, torch.inf, -torch.inf
    _, log_probs = taskloom.weighted_ce(logits, None, torch.zeros(4, dtype=torch.int64), return_log_probs=True)
    assert log_probs.isfinite().tolist() == [True, False, False, False]


@pytest.mark.parametrize("headless", [False, True])
def test_gradients(headless: bool) -> None:
    weights = row_weights(6, dtype=torch.float64)
    targets = words(6, 5, weights)
    leaves = [normal(6, 5 if headless else 4, dtype=torch.float64).requires_grad_()]
    if not headless:
        leaves.append(head(5, 4, dtype=torch.float64).requires_grad_())

    def outputs(hidden: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return taskloom.weighted_ce(hidden, weight, targets, weights, return_log_probs=True)

    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(outputs, leaves)


def test_gradients_only_where_needed() -> None:
    weights = row_weights(N)
    targets = words(N, V, weights)
    both = _leaves()
    taskloom.weighted_ce(*both, targets, weights).backward()
    hidden, weight = _leaves()
    taskloom.weighted_ce(hidden, weight.detach(), targets, weights).backward()
    assert_same_bits(hidden.grad, both[0].grad)
    taskloom.weighted_ce(hidden.detach(), weight, targets, weights).backward()
    assert_same_bits(weight.grad, both[1].grad)


def test_a_clipped_ratio_has_the_gradient_of_torch() -> None:
    weights = row_weights(N)
    targets, mask = words(N, V, weights), weights > 0
    old, advantage = normal(N, seed=5, scale=0.1) - 5, normal(N, seed=6)

    def objective(log_probs: torch.Tensor) -> torch.Tensor:
        ratio = (log_probs - old).exp()
        return torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)[mask].mean()

    ours, theirs = _leaves(), _leaves()
    objective(taskloom.weighted_ce(*ours, targets, mask, return_log_probs=True)[1]).backward()
    all_log_probs = (theirs[0] @ theirs[1].t()).log_softmax(1)
    objective(all_log_probs.gather(1, torch.where(mask, targets, 0)[:, None])[:, 0]).backward()
    for one, other in zip(ours, theirs, strict=True):
        _assert_near(one.grad, other.grad, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_and_words_are_taken_in_pieces(dtype: torch.dtype) -> None:
    rows, vocabulary = 9000, 600
    weights = row_weights(rows, share=0.95)
    targets = words(rows, vocabulary, weights)
    results = []
    for backend in ("native", "reference"):
        hidden, weight = _leaves(dtype, rows, vocabulary)
        with taskloom.backend(backend):
            loss = taskloom.weighted_ce(hidden, weight, targets, weights)
            loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        _assert_near(ours, theirs, 2e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.usefixtures("restored_threads")
def test_no_bit_depends_on_threads() -> None:
    rows, vocabulary = 700, 3001
    weights = row_weights(rows, share=0.8)
    targets = words(rows, vocabulary, weights)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        hidden, weight = _leaves(rows=rows, vocabulary=vocabulary)
        loss, log_probs = taskloom.weighted_ce(hidden, weight, targets, weights, return_log_probs=True)
        loss.backward()
        results.append((loss.detach(), log_probs.detach(), hidden.grad, weight.grad))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert_same_bits(first, second)


def test_nothing_is_kept_without_gradients() -> None:
    hidden, weight = _leaves()
    targets = words(N, V)
    packed: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (packed.append(tensor.shape), tensor)[1], lambda tensor: tensor):
        with torch.no_grad():
            loss, log_probs = taskloom.weighted_ce(hidden, weight, targets, return_log_probs=True)
        assert not packed
        assert not loss.requires_grad
        assert not log_probs.requires_grad
        taskloom.weighted_ce(hidden, weight, targets)
    assert sorted(packed) == sorted([hidden.shape, weight.shape, *[torch.Size([N])] * 4])


def test_several_losses_share_a_graph() -> None:
    hidden, weight = _leaves()
    targets = words(N, V)
    first, second = (taskloom.weighted_ce(hidden, weight, targets, weights) for weights in (None, row_weights(N)))
    together = torch.autograd.grad(2 * first - 3 * second, (hidden, weight), retain_graph=True)
    alone = [torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for loss in (first, second)]
    for whole, one, other in zip(together, *alone, strict=True):
        _assert_near(whole, 2 * one - 3 * other, 1e-5)


def test_a_second_derivative_is_refused() -> None:
    hidden, weight = _leaves()
    loss = taskloom.weighted_ce(hidden, weight, words(N, V))
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="weighted_ce_backward has no gradient"):
        gradient.square().sum().backward()


_PEAK = """
import torch, taskloom
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
def call(rows, vocabulary):
    hidden, weight = (torch.randn(count, 32, dtype=torch.{dtype}).requires_grad_() for count in (rows, vocabulary))
    targets = torch.randint(0, vocabulary, (rows,))
    before = peak()
    loss, log_probs = taskloom.weighted_ce(hidden, weight, targets, return_log_probs=True)
    (loss + log_probs.sum()).backward()
    return peak() - before
call(600, 1100)
print(call(2048, 50000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_never_held(dtype: str) -> None:
    logits = 2048 * 50000 * 4
    done = subprocess.run([sys.executable, "-c", _PEAK.format(dtype=dtype)], capture_output=True, text=True, check=True)
    # The gradients take 6.7 MB, a piece of logits 16 MiB.
    assert int(done.stdout) < logits / 8


_GOOD: dict[str, Any] = {"hidden": normal(4, 3), "weight": head(5, 3), "targets": torch.arange(4), "weights": torch.ones(4)}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": normal(4, 3).int()}, TypeError, "hidden: expected float32"),
        ({"weight": head(5, 3).int()}, TypeError, "weight: expected float32"),
        ({"targets": torch.arange(4).int()}, TypeError, "targets: expected torch.int64, got torch.int32"),
        ({"weights": torch.ones(4).half()}, TypeError, "weights: expected float32, float64 or bool, got torch.float16"),
        ({"weights": [1, 1, 1, 1]}, TypeError, "weights: expected a tensor, got list"),
        ({"hidden": torch.tensor(1.0)}, ValueError, "hidden: expected at least one dimension"),
        ({"weight": head(5, 4)}, ValueError, r"weight: expected shape \[V, 3\], as many columns as hidden has, got \(5, 4\)"),
        ({"weight": head(5, 3)[0]}, ValueError, r"weight: expected shape \[V, 3\].*got \(3,\)"),
        ({"weight": torch.empty(0, 3)}, ValueError, "weight: expected at least one word, got none"),
        ({"weight": None, "hidden": torch.empty(4, 0)}, ValueError, "hidden: expected at least one word"),
        ({"targets": torch.arange(5)}, ValueError, r"targets: expected shape \(4,\) as hidden without its last dimension, got \(5,\)"),
        ({"weights": torch.ones(3)}, ValueError, r"weights: expected shape \(4,\) as targets, got \(3,\)"),
        ({"weights": torch.tensor([1, 0, -1.0, 1])}, ValueError, "weights: expected finite values of at least 0, got -1.0 at row 2"),
        ({"weights": torch.tensor([1, torch.nan, 0, 1])}, ValueError, "weights: expected finite values of at least 0, got nan at row 1"),
        ({"weights": torch.tensor([1, 0, 0, torch.inf])}, ValueError, "weights: expected finite values of at least 0, got inf at row 3"),
        ({"weights": torch.zeros(4)}, ValueError, "weights: there is no supervised token"),
        ({"targets": torch.full((4,), -100)}, ValueError, "weights: there is no supervised token, .* or every target is ignored"),
        ({"hidden": torch.empty(0, 3), "targets": torch.arange(0), "weights": None}, ValueError, "weights: there is no supervised token"),
        ({"targets": torch.tensor([0, 4, 5, 9])}, ValueError, "targets: expected 0 to 4, got 5 at row 2"),
        ({"targets": torch.tensor([0, -1, 5, 9])}, ValueError, "targets: expected 0 to 4, got -1 at row 1"),
        ({"weights": torch.ones(4, requires_grad=True)}, RuntimeError, "weights requires grad, and the op has no gradient for it"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    with taskloom.backend(backend), pytest.raises(error, match=f"weighted_ce: {message}"):
        taskloom.weighted_ce(**_GOOD | changes)


def test_devices_are_checked() -> None:
    with pytest.raises(ValueError, match="weighted_ce: all tensors must be on one device, got cpu and meta"):
        taskloom.weighted_ce(**_GOOD | {"weight": head(5, 3).to("meta")})


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": normal(1, 4, 3)}, ValueError, r"targets: expected shape \(1, 4\)"),
        ({"coefficient": torch.ones(4).double()}, TypeError, "coefficient: expected torch.float32, got torch.float64"),
        ({"log_sum_exp": torch.ones(5)}, ValueError, r"log_sum_exp: expected shape \(4,\) as targets, got \(5,\)"),
        ({"targets": torch.tensor([0, 4, 5, 9])}, ValueError, "targets: expected 0 to 4, got 5 at row 2"),
    ],
)
def test_errors_of_the_backward(changes: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    good = {"hidden": normal(4, 3), "weight": head(5, 3), "targets": torch.arange(4)}
    good |= {"coefficient": torch.ones(4), "log_sum_exp": torch.ones(4)}
    with taskloom.backend(backend), pytest.raises(error, match=f"weighted_ce_backward: {message}"):
        weighted_ce_backward(**good | changes)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_transforms() -> None:
    weights = row_weights(N)
    targets = words(N, V, weights)
    hidden, weight = (leaf.detach() for leaf in _leaves())

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return taskloom.weighted_ce(hidden, weight, targets, weights)

    leaf = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    _assert_near(torch.func.grad(loss)(hidden), expected, 1e-5)
    tangent = normal(N, D, seed=3)
    _, derivative = torch.func.jvp(loss, (hidden,), (tangent,))
    assert torch.allclose(derivative, (expected * tangent).sum(), rtol=1e-4)
    many = torch.stack([hidden, tangent])
    assert torch.allclose(torch.func.vmap(loss)(many), torch.stack([loss(one) for one in many]), rtol=1e-5)


def test_compiled() -> None:
    def losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        loss, log_probs = taskloom.weighted_ce(hidden, weight, targets, weights, return_log_probs=True)
        return loss + log_probs.square().mean() + taskloom.weighted_ce(hidden @ weight.t(), None, targets, weights, ignore_index=2)

    run = compiled(losses)
    for rows in (20, 44):
        weights = row_weights(rows)
        targets = words(rows, V, weights)
        gradients = []
        for function in (run, losses):
            leaves = _leaves(rows=rows)
            gradients.append(torch.autograd.grad(function(*leaves, targets, weights), leaves))
        for one, other in zip(*gradients, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="there is no supervised token"):
        run(*_leaves(rows=20), words(20, V), torch.zeros(20))
