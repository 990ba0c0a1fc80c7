"""Gates over one pool of experts as modules: plain torch by hand, masks, the self gate, inputs of each gate, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from taskloom.nn import MultiGateMoE, SelfGate

MASK = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
OWN = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)


def given(batch: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, 5, dtype=dtype), torch.randn(batch, 4, 7, dtype=dtype)


def by_hand(module: MultiGateMoE, x: list[Tensor], z: Tensor) -> Tensor:
    """Each gate for itself, as a loop over gates does it: only the experts that it may read, taken out of the pool."""
    mask = torch.ones(2, 4, dtype=torch.bool) if module.mask is None else module.mask
    rows, outs = iter(module.weight), []
    for g in range(2):
        readable = mask[g].nonzero().flatten()
        logits = torch.stack([x[g] @ next(rows) for _ in readable], 1)
        weights = torch.softmax(logits, 1) if module.act == "softmax" else torch.sigmoid(logits)
        outs.append((weights[:, None] @ z[:, readable])[:, 0])
    for g in range(2 if module.self_mask is not None else 0):
        readable = OWN[g].nonzero().flatten()
        logits = torch.stack([x[g] @ next(rows) for _ in readable], 1)
        weights = torch.sigmoid(logits) if len(readable) == 1 else torch.softmax(logits, 1)
        outs[g] = outs[g] + (weights[:, None] @ z[:, readable])[:, 0]
    assert next(rows, None) is None
    return torch.stack(outs, 1)


@pytest.mark.parametrize("act", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masks", [{}, {"mask": MASK}, {"self_mask": OWN}, {"mask": MASK, "self_mask": OWN}])
@pytest.mark.parametrize("own_inputs", [False, True])
def test_is_a_loop_over_gates(act: str, masks: dict[str, Tensor], own_inputs: bool) -> None:
    x, z = given()
    module = MultiGateMoE(5, 4, 2, act=act, dtype=torch.float64, **masks)
    inputs = torch.stack([x, -2 * x], 1) if own_inputs else x
    each = [x, -2 * x] if own_inputs else [x, x]
    out, probs = module(inputs, z)
    torch.testing.assert_close(out, by_hand(module, each, z), rtol=1e-12, atol=1e-12)
    if masks.get("mask") is not None:
        assert not probs[:, ~MASK].any()
    ours, theirs = (torch.autograd.grad(one.square().sum(), module.weight)[0] for one in (out, by_hand(module, each, z)))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_it_has_a_row_for_each_pair_that_a_mask_holds() -> None:
    module = MultiGateMoE(5, 4, 2, MASK, self_mask=OWN)
    assert module.weight.shape == (int(MASK.sum() + OWN.sum()), 5)
    assert set(module.state_dict()) == {"weight"}
    assert "n_gates=2" in repr(module)


@pytest.mark.parametrize("way", ["to_empty", "context", "assign", "to_empty from the CPU"])
def test_masks_outlive_the_meta_device(way: str) -> None:
    module = MultiGateMoE(5, 4, 2, MASK, self_mask=OWN)
    saved = copy.deepcopy(module.state_dict())
    with torch.device("meta"):
        fresh = MultiGateMoE(5, 4, 2, MASK, self_mask=OWN)
    assert fresh.mask is not None
    assert fresh.mask.is_meta
    if way != "context":
        fresh = copy.deepcopy(module) if "from" in way else copy.deepcopy(module).to("meta")
    if way != "assign":
        fresh.to_empty(device="cpu")
    fresh.load_state_dict(saved, assign=way == "assign")
    x, z = given(dtype=torch.float32)
    for one, other in zip(fresh(x, z), module(x, z), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="mask: expected a mask with values, got one on the meta device"):
        MultiGateMoE(5, 4, 2, MASK.to("meta"))


def test_a_module_of_inference_mode_is_converted() -> None:
    with torch.inference_mode():
        module = MultiGateMoE(5, 4, 2, MASK, self_mask=OWN)
        x, z = given()
        out, _ = module.double()(x, z)
    torch.testing.assert_close(module.double()(x, z)[0], out)
    assert torch.equal(module.share_memory().self_mask, OWN)


def test_self_gate_of_one_expert_is_a_sigmoid() -> None:
    x, z = given()
    gate = SelfGate(5, 1, dtype=torch.float64)
    torch.testing.assert_close(gate(x, z[:, :1]), torch.sigmoid(gate.gate(x)) * z[:, 0], rtol=1e-12, atol=1e-12)


def test_self_gate_of_several_is_a_softmax() -> None:
    x, z = given()
    gate = SelfGate(5, 4, dtype=torch.float64)
    expected = (torch.softmax(gate.gate(x), 1)[..., None] * z).sum(1)
    torch.testing.assert_close(gate(x, z), expected, rtol=1e-12, atol=1e-12)


def test_autocast_gives_the_experts_dtype() -> None:
    x, z = given(dtype=torch.float32)
    module = MultiGateMoE(5, 4, 2, MASK, self_mask=OWN)
    with torch.autocast("cpu", torch.bfloat16):
        out, probs = module(x, z.bfloat16())
    assert (out.dtype, probs.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), module(x, z)[0], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_dim": 0}, ValueError, "in_dim: expected at least 1, got 0"),
        ({"in_dim": 5.0}, TypeError, "in_dim: expected an integer, got 5.0"),
        ({"n_gates": 0}, ValueError, "n_gates: expected at least 1, got 0"),
        ({"act": "relu"}, ValueError, "act: expected 'softmax' or 'sigmoid', got 'relu'"),
        ({"mask": MASK.int()}, TypeError, "mask: expected a bool tensor, got torch.int32"),
        ({"mask": MASK.T}, ValueError, r"mask: expected shape \(2, 4\), gates and experts, got \(4, 2\)"),
        ({"self_mask": MASK & ~MASK[:1]}, ValueError, "self_mask: expected an expert for every gate, got none for gate 0"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"MultiGateMoE: {message}"):
        MultiGateMoE(**{"in_dim": 5, "n_experts": 4, "n_gates": 2} | arguments)


def test_errors_of_inputs() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 5\] or \[B, 2, 5\], got \(3, 4\)"):
        MultiGateMoE(5, 4, 2)(torch.zeros(3, 4), torch.zeros(3, 4, 1))
    with pytest.raises(TypeError, match=r"MultiGateMoE: x: expected a floating point tensor, got torch\.int64"):
        MultiGateMoE(5, 4, 2)(torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 4, 1))
    with pytest.raises(TypeError, match=r"SelfGate: x: expected a floating point tensor, got torch\.int64"):
        SelfGate(5, 4)(torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 4, 1))
    with pytest.raises(ValueError, match=r"SelfGate: x: expected shape \[B, 5\], got \(3, 4\)"):
        SelfGate(5, 4)(torch.zeros(3, 4), torch.zeros(3, 4, 1))
    with pytest.raises(ValueError, match="SelfGate: n_experts: expected at least 1, got 0"):
        SelfGate(5, 0)
