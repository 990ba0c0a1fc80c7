"""multi_gate_combine beyond its contract: the card's invariants, masks that are not read, derivatives, errors, memory, compilation."""

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

F64 = torch.float64
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
OWN = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
ALL = torch.ones(3, 5, dtype=torch.bool)
activations = pytest.mark.parametrize("activation", ["softmax", "sigmoid"])


def inputs(dtype: torch.dtype = F64, batch: int = 6, width: int = 9) -> list[Tensor]:
    shapes = ((batch, 3, 5), (batch, 5, width), (batch, 3, 5))
    return [weights(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def gate_weights(logits: Tensor, mask: Tensor, activation: str) -> Tensor:
    if activation == "sigmoid":
        return torch.sigmoid(logits).masked_fill(~mask, 0)
    return torch.softmax(logits.masked_fill(~mask, -torch.inf), -1)


def naive(logits: Tensor, z: Tensor, mask: Tensor | None, activation: str, own: Tensor | None = None) -> Tensor:
    """Masked weights, broadcast over the experts' outputs; the self gate by a loop over gates."""
    probs = gate_weights(logits, ALL if mask is None else mask, activation)
    out = (probs[..., None] * z[:, None]).sum(2)
    if own is not None:
        kinds = ["sigmoid" if row.sum() == 1 else "softmax" for row in OWN]
        out = out + torch.stack(
            [(gate_weights(own[:, g], OWN[g], kinds[g])[..., None] * z).sum(1) for g in range(len(OWN))],
            1,
        )
    return out


@activations
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("with_self", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-12), (torch.bfloat16, 2e-2)])
def test_is_the_naive_form(activation: str, mask: Tensor | None, with_self: bool, dtype: torch.dtype, tolerance: float) -> None:
    logits, z, own = inputs(dtype)
    settings: dict[str, Any] = {"self_logits": own, "self_mask": OWN} if with_self else {}
    out, probs = taskloom.multi_gate_combine(logits, z, mask, activation=activation, **settings)
    expected = naive(logits.double(), z.double(), mask, activation, own.double() if with_self else None)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    given = [logits, z, own] if with_self else [logits, z]
    slope = weights(*out.shape, seed=9, dtype=dtype)
    ours, theirs = torch.autograd.grad(out, given, slope), torch.autograd.grad(expected, given, slope.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=10 * tolerance, atol=10 * tolerance)
    torch.testing.assert_close(
        probs.double(), gate_weights(logits.double(), ALL if mask is None else mask, activation), rtol=1e-5, atol=1e-6
    )


def test_weights_sum_to_one_and_masked_ones_are_zero() -> None:
    logits, z, _ = inputs(torch.float32, 40)
    out, probs = taskloom.multi_gate_combine(10 * logits, z, MASK)
    torch.testing.assert_close(probs.sum(-1), torch.ones(40, 3), rtol=0, atol=1e-6)
    assert not probs[:, ~MASK].any()
    dlogits, dz = torch.autograd.grad(out.square().sum() + probs.square().sum(), [logits, z])
    assert not dlogits[:, ~MASK].any()
    assert not dz[:, 4].any()


def test_a_constant_added_to_a_gate_changes_nothing() -> None:
    logits, z, _ = inputs(torch.float32)
    shift = 7 * weights(6, 3, 1, seed=5)
    out, moved = (taskloom.multi_gate_combine(one, z, MASK)[0] for one in (logits, logits + shift))
    torch.testing.assert_close(moved, out, rtol=0, atol=1e-5)


def test_experts_may_be_permuted_with_their_columns() -> None:
    logits, z, own = inputs(torch.float32)
    order = torch.tensor([3, 0, 4, 2, 1])
    out, _ = taskloom.multi_gate_combine(logits, z, MASK, self_logits=own, self_mask=OWN)
    permuted, _ = taskloom.multi_gate_combine(
        logits[..., order], z[:, order], MASK[:, order], self_logits=own[..., order], self_mask=OWN[:, order]
    )
    torch.testing.assert_close(permuted, out, rtol=0, atol=1e-6)


def test_self_gate_of_one_expert_is_a_sigmoid() -> None:
    logits, z, own = inputs()
    with_self, without = (
        taskloom.multi_gate_combine(logits, z, MASK, **settings)[0] for settings in ({"self_logits": own, "self_mask": OWN}, {})
    )
    torch.testing.assert_close((with_self - without)[:, 1], torch.sigmoid(own[:, 1, 3:4]) * z[:, 3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["native", "reference"])
@activations
def test_what_is_masked_is_not_read(backend: str, activation: str) -> None:
    logits, z, own = (one.detach() for one in inputs(torch.float32))
    settings: dict[str, Any] = {"activation": activation, "self_mask": OWN}
    clean = taskloom.multi_gate_combine(logits, z, MASK, self_logits=own, **settings)
    poisoned = [logits.masked_fill(~MASK, torch.nan), z.clone(), own.masked_fill(~OWN, torch.nan)]
    # Nobody reads the last expert, and of the three gates only the second one reads expert 3.
    poisoned[1][:, 4] = torch.nan
    leaves = [one.requires_grad_() for one in poisoned]
    with taskloom.backend(backend):
        out, probs = taskloom.multi_gate_combine(leaves[0], leaves[1], MASK, self_logits=leaves[2], **settings)
        gradients = torch.autograd.grad(out.square().sum() + probs.square().sum(), leaves)
    torch.testing.assert_close((out, probs), clean, rtol=1e-6, atol=1e-6)
    assert all(bool(one.isfinite().all()) for one in gradients)
    leaves[1].data[:, 3] = torch.nan
    with taskloom.backend(backend):
        out, _ = taskloom.multi_gate_combine(leaves[0], leaves[1], MASK, self_logits=leaves[2], **settings)
    assert out[:, 1].isnan().all()
    torch.testing.assert_close(out[:, ::2], clean[0][:, ::2], rtol=1e-6, atol=1e-6)


@activations
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_stay_in_their_gate(activation: str, value: float) -> None:
    logits, z, _ = (one.detach() for one in inputs(torch.float32, 20))
    clean, _ = taskloom.multi_gate_combine(logits, z, activation=activation)
    wrong = logits.clone()
    wrong[17, 1, 2] = value
    out, probs = taskloom.multi_gate_combine(wrong, z, activation=activation)
    others = torch.ones(20, 3, dtype=torch.bool)
    others[17, 1] = False
    assert_same_bits(out[others], clean[others])
    # The sigmoid of infinity is 1; everything else is NaN.
    finite = activation == "sigmoid" and value == torch.inf
    assert out[17, 1].isnan().all() != finite
    if activation == "softmax":
        assert probs[17, 1].isnan().all()


@pytest.mark.usefixtures("poisoned_memory")
def test_a_row_does_not_depend_on_its_batch() -> None:
    logits, z, own = inputs(torch.float32, 70, 300)
    slope = weights(70, 3, 300, seed=8)

    def run(rows: slice) -> list[Tensor]:
        given = [one.detach()[rows].requires_grad_() for one in (logits, z, own)]
        out, probs = taskloom.multi_gate_combine(given[0], given[1], MASK, self_logits=given[2], self_mask=OWN)
        return [out, probs, *torch.autograd.grad(out, given, slope[rows])]

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(5, 23), slice(69, 70)):
        for one, other in zip(run(rows), whole, strict=True):
            assert_same_bits(one.detach(), other.detach()[rows])


def test_memory_is_that_of_the_results() -> None:
    logits, z, own = inputs(torch.float32, 400, 256)
    settings: dict[str, Any] = {"self_logits": own, "self_mask": OWN}
    out = taskloom.multi_gate_combine(logits, z, MASK, **settings)[0]
    assert allocated(lambda: taskloom.multi_gate_combine(logits, z, MASK, **settings)) <= out.nbytes + logits.nbytes
    slope = torch.ones_like(out)
    gradients = z.nbytes + 2 * logits.nbytes
    assert allocated(lambda: torch.autograd.grad(out, [logits, z, own], slope, retain_graph=True)) <= gradients


@activations
def test_gradients(activation: str) -> None:
    def combined(logits: Tensor, z: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        return taskloom.multi_gate_combine(logits, z, MASK, activation=activation, self_logits=own, self_mask=OWN)

    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(combined, inputs(batch=2, width=3), atol=1e-6)
    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(combined, inputs(batch=2, width=3), fast_mode=True)


def test_transforms() -> None:
    logits, z, own = inputs()

    def loss(logits: Tensor) -> Tensor:
        return taskloom.multi_gate_combine(logits, z, MASK, self_logits=own, self_mask=OWN)[0].square().sum()

    (expected,) = torch.autograd.grad(loss(logits), logits)
    torch.testing.assert_close(torch.func.grad(loss)(logits.detach()), expected)
    _, tangent = torch.func.jvp(loss, (logits.detach(),), (torch.ones_like(logits),))
    torch.testing.assert_close(tangent, expected.sum())


def test_compiled(fresh_compiler: None) -> None:
    def loss(logits: Tensor, z: Tensor, own: Tensor) -> Tensor:
        out, probs = taskloom.multi_gate_combine(logits, z, MASK, self_logits=own, self_mask=OWN)
        return out.square().sum() + probs.square().sum()

    run = compiled(loss)
    for batch in (6, 4):
        leaves = inputs(torch.float32, batch)
        ours, theirs = (torch.autograd.grad(one(*leaves), leaves) for one in (run, loss))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_statistics() -> None:
    logits, z, _ = inputs()
    _, probs = taskloom.multi_gate_combine(logits, z, MASK)
    mean, entropy = taskloom.gate_statistics(probs)
    torch.testing.assert_close(mean, probs.mean(0))
    expected = torch.stack([torch.distributions.Categorical(probs[:, g, MASK[g]]).entropy().mean() for g in range(3)])
    torch.testing.assert_close(entropy, expected)
    (slope,) = torch.autograd.grad(entropy.sum() + mean.square().sum(), logits)
    assert slope.isfinite().all()
    with pytest.raises(ValueError, match=r"gate_statistics: probs: expected shape \[B, G, E\] with at least one row, got \(0, 3, 5\)"):
        taskloom.gate_statistics(probs[:0])


LOGITS, Z = torch.zeros(2, 3, 5), torch.zeros(2, 5, 4)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logits": LOGITS.long()}, TypeError, "logits: expected float32"),
        ({"z": Z.int()}, TypeError, "z: expected float32"),
        ({"z": Z[:, 1:]}, ValueError, r"logits, z: expected shapes \[B, G, E\] and .*, got \(2, 3, 5\) and \(2, 4, 4\)"),
        ({"z": Z[:1]}, ValueError, r"logits, z: expected shapes .*, got \(2, 3, 5\) and \(1, 5, 4\)"),
        ({"logits": LOGITS[:, :0]}, ValueError, r"logits: expected at least one gate and one expert, got shape \(2, 0, 5\)"),
        ({"activation": "relu"}, ValueError, "activation: expected 'softmax' or 'sigmoid', got 'relu'"),
        ({"mask": MASK.int()}, TypeError, "mask: expected torch.bool, got torch.int32"),
        ({"mask": MASK.T}, ValueError, r"mask: expected shape \(3, 5\) as the gates and experts of logits, got \(5, 3\)"),
        ({"mask": MASK & ~MASK[2:]}, ValueError, "mask: expected an expert for every gate, got none for gate 2"),
        ({"self_mask": OWN}, ValueError, "self_logits, self_mask: expected both or none, got only self_mask"),
        ({"self_logits": LOGITS}, ValueError, "self_logits, self_mask: expected both or none, got only self_logits"),
        ({"self_logits": LOGITS[:, :1], "self_mask": OWN}, ValueError, r"self_logits: expected shape \(2, 3, 5\) as logits"),
        ({"self_logits": LOGITS, "self_mask": OWN & OWN[1]}, ValueError, "self_mask: expected an expert .*, got none for gate 0"),
    ],
)
def test_errors(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with taskloom.backend(backend), pytest.raises(error, match=f"multi_gate_combine: {message}"):
        taskloom.multi_gate_combine(**{"logits": LOGITS, "z": Z} | changed)


def test_reference_compiled_with_a_mask(fresh_compiler: None) -> None:
    logits, z, _ = inputs()
    with taskloom.backend("reference"):
        expected = taskloom.multi_gate_combine(logits, z, MASK)
        for ours, theirs in zip(compiled(taskloom.multi_gate_combine)(logits, z, MASK), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_infinite_logits(backend: str) -> None:
    logits, z, own = (one.detach() for one in inputs())
    with taskloom.backend(backend):
        logits[0, 1, 2], logits[1, 0, 3], logits[2, 2] = -torch.inf, torch.inf, -torch.inf
        out, probs = taskloom.multi_gate_combine(logits, z)
        spoilt = probs.isnan().all(-1)
        assert spoilt.nonzero().tolist() == [[1, 0], [2, 2]]
        assert torch.equal(out.isnan().all(-1), spoilt)
        assert torch.equal(out.isnan().any(-1), spoilt)
        assert probs[0, 1, 2] == 0
        out, probs = taskloom.multi_gate_combine(logits, z, activation="sigmoid")
        assert out.isfinite().all()
        assert (probs[0, 1, 2], probs[1, 0, 3]) == (0, 1)
        own[0, 1, 3] = torch.inf  # the only expert of gate 1
        own.requires_grad_()
        out, _ = taskloom.multi_gate_combine(z.new_zeros(logits.shape), z, self_logits=own, self_mask=OWN)
        (slopes,) = torch.autograd.grad(out.sum(), own)
        assert slopes[0, 1, 3] == 0
        assert slopes.isfinite().all()
