"""Stacked experts and their norm beside torch's layers, one for each expert."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloom.nn import StackedBatchNormSiLU, StackedExperts

EXPERTS, WIDTH = 3, 7


def _norms(momentum: float | None = 0.1) -> list[nn.BatchNorm1d]:
    found = []
    for expert in range(EXPERTS):
        norm = nn.BatchNorm1d(WIDTH, momentum=momentum, dtype=torch.float64)
        generator = torch.Generator().manual_seed(expert)
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert value is not None
            value.data.uniform_(0.5, 1.5, generator=generator)
        found.append(norm)
    return found


def _outputs(seed: int = 0) -> Tensor:
    return 3 * torch.randn(20, EXPERTS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_norm_is_one_batch_norm_for_each_expert(momentum: float | None) -> None:
    norms = _norms(momentum)
    stacked = StackedBatchNormSiLU.from_norms(norms)
    for step in range(3):
        z = _outputs(step)
        expected = torch.stack([F.silu(norm(z[:, expert])) for expert, norm in enumerate(norms)], 1)
        torch.testing.assert_close(stacked(z), expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(stacked.norms(), norms, strict=True):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    stacked.eval()
    z = _outputs(9)
    expected = torch.stack([F.silu(norm.eval()(z[:, expert])) for expert, norm in enumerate(norms)], 1)
    torch.testing.assert_close(stacked(z), expected, rtol=1e-12, atol=1e-12)


def test_norms_that_differ() -> None:
    with pytest.raises(ValueError, match=r"norms\[1\]: expected width 7, eps 1e-05 and momentum 0.1 as norms\[0\], got 8"):
        StackedBatchNormSiLU.from_norms([nn.BatchNorm1d(7), nn.BatchNorm1d(8)])
    with pytest.raises(ValueError, match=r"norms\[0\]: expected affine=True"):
        StackedBatchNormSiLU.from_norms([nn.BatchNorm1d(7, affine=False)])
    with pytest.raises(ValueError, match="at least one, got none"):
        StackedBatchNormSiLU.from_norms([])


def test_norms_that_no_stack_can_stand_for() -> None:
    counted = [nn.BatchNorm1d(7, momentum=None) for _ in range(2)]
    counted[1](torch.randn(4, 7))
    with pytest.raises(ValueError, match=r"norms\[1\]: expected num_batches_tracked 0 as norms\[0\], where momentum is None, got 1"):
        StackedBatchNormSiLU.from_norms(counted)
    frozen = [nn.BatchNorm1d(7), nn.BatchNorm1d(7).requires_grad_(False)]
    with pytest.raises(ValueError, match=r"norms\[1\]: expected requires_grad of weight and bias \(True, True\) as norms\[0\]"):
        StackedBatchNormSiLU.from_norms(frozen)


def test_frozen_norms_stay_frozen() -> None:
    norms = _norms()
    for norm in norms:
        norm.weight.requires_grad_(False)
    stacked = StackedBatchNormSiLU.from_norms(norms)
    assert (stacked.weight.requires_grad, stacked.bias.requires_grad) == (False, True)
    assert all((norm.weight.requires_grad, norm.bias.requires_grad) == (False, True) for norm in stacked.norms())


@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_reset_parameters(norm: str | None, poisoned_memory: None) -> None:
    torch.manual_seed(0)
    expected = StackedExperts(3, 5, 7, (4,), norm=norm).state_dict()
    experts = StackedExperts(3, 5, 7, (4,), norm=norm).to("meta").to_empty(device="cpu")
    torch.manual_seed(0)
    experts.reset_parameters()
    found = experts.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_batch_of_one() -> None:
    norm = StackedBatchNormSiLU(2, 4)
    with pytest.raises(ValueError, match="batch_norm_silu: z: expected at least two rows"):
        norm(torch.zeros(1, 2, 4))
    assert int(norm.num_batches_tracked) == 0
    assert norm.eval()(torch.zeros(1, 2, 4)).shape == (1, 2, 4)
    with pytest.raises(ValueError, match=r"StackedBatchNormSiLU: z: expected shape \[B, 2, 4\], got \(3, 2, 5\)"):
        norm(torch.zeros(3, 2, 5))


def _expert(experts: StackedExperts, place: int, activation: Any) -> nn.Sequential:
    """One of the experts in torch's own layers, without the norm."""
    layers: list[nn.Module] = []
    for number, layer in enumerate(experts.layers):
        _, width, columns = layer.weight.shape
        linear = nn.Linear(columns, width, dtype=torch.float64)
        linear.load_state_dict({"weight": layer.weight.data[place], "bias": layer.bias.data[place]})
        layers += [activation(), linear] if number else [linear]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("hidden", [(), (9,), (9, 4)])
@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_experts_are_torchs_layers(hidden: tuple[int, ...], norm: str | None) -> None:
    activation = nn.ReLU if norm is None else nn.SiLU
    experts = StackedExperts(EXPERTS, 5, WIDTH, hidden, norm=norm, activation="relu" if norm is None else "silu", dtype=torch.float64)
    kinds = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, None: lambda width, dtype: nn.Identity()}
    plain = [
        nn.Sequential(_expert(experts, place, activation), kinds[norm](WIDTH, dtype=torch.float64), activation())
        for place in range(EXPERTS)
    ]
    x = torch.randn(20, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([one(x) for one in plain], 1)
    torch.testing.assert_close(experts(x), expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(one.square().sum(), x)[0] for one in (experts(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    each = torch.randn(20, EXPERTS, 5, dtype=torch.float64)
    expected = torch.stack([one(each[:, place]) for place, one in enumerate(plain)], 1)
    torch.testing.assert_close(experts(each), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_experts": 0}, r"expected at least one expert and widths of at least 1, got 0 and \[5, 7\]"),
        ({"hidden": (0,)}, r"got 3 and \[5, 0, 7\]"),
        ({"norm": "group"}, "norm: expected 'batch', 'layer' or None, got 'group'"),
        ({"activation": "gelu"}, "activation: expected 'silu', 'relu' or None, got 'gelu'"),
    ],
)
def test_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"StackedExperts: .*{message}"):
        StackedExperts(**({"num_experts": 3, "in_features": 5, "out_features": 7} | changed))


@pytest.mark.parametrize("shape", [(4, 2, 5), (4, 6), (4, 3, 6), (5,), (4, 3, 5, 5)])
def test_inputs_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"StackedExperts: x: expected shape [B, 5] or [B, 3, 5], got {shape}")):
        StackedExperts(3, 5, 7)(torch.zeros(shape))


def test_integers() -> None:
    with pytest.raises(TypeError, match=r"StackedExperts: x: expected float32, .*, got torch\.int64"):
        StackedExperts(3, 5, 7)(torch.zeros(4, 5, dtype=torch.int64))
