"""C3PO: other routing weights for one token, and the model's own top-k of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_roma_recorder import LAST, MASK, LinearGateBlock
from torch import Tensor, nn
from torch.nn.functional import one_hot

from moe_models import tiny_model, tiny_tokens
from taskloom.methods.routing.roma import RoutingOverride, RoutingRecorder, c3po_reweight, find_routers
from taskloom.nn import TopKRouter, patch_routers

TOKENS = tiny_tokens(3, 7)
SOFTMAX = ["olmoe", "qwen3", "mixtral", "gpt-oss", "deepseek-v2"]


def _weights(rows: int, *experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(rows, size, generator=generator).softmax(1) for size in experts], 1)


def _routed(model: nn.Module, **inputs: Any) -> tuple[Tensor, list[Any]]:
    """The model's logits, and what its routers returned."""
    seen: list[Any] = []
    handles = [router.register_forward_hook(lambda module, args, output: seen.append(output)) for router in find_routers(model)]
    logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def test_the_mean_is_weighted_by_similarity() -> None:
    r = _weights(12, 3, 5).view(4, 3, 8)
    sim = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    expected = (sim.unsqueeze(2) * r).sum(1) / sim.sum(1, keepdim=True)
    found = c3po_reweight(r, sim, (3, 5))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.split((3, 5), 1)[0].sum(1), torch.ones(4))
    torch.testing.assert_close(c3po_reweight(3 * r, sim, (3, 5)), found)
    torch.testing.assert_close(c3po_reweight(r[0], sim[0], (3, 5)), found[0])
    torch.testing.assert_close(c3po_reweight(r[..., :3], sim).sum(-1), torch.ones(4))
    torch.testing.assert_close(c3po_reweight(r, sim.double(), (3, 5)), found.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("r", "sim", "experts", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 2), None, r"sim: expected shape \(2, 3\) as r_ref, got \(2, 2\)"),
        (torch.ones(4), torch.ones(()), None, "sim: expected shape"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.int64), None, "sim: expected floating numbers, got torch.int64"),
        (torch.ones(2, 3, 4), torch.ones(2, 3), (3, 2), r"experts: expected a sum of 4, the routing weights of a sample, got \[3, 2\]"),
        (
            torch.ones(2, 3, 4),
            torch.tensor([[1.0, 1.0, 1.0], [0.5, -0.1, 0.0]]),
            None,
            "sim: expected similarities of at least 0, with a sum",
        ),
        (torch.ones(2, 3, 4), torch.zeros(2, 3), None, "sim: expected similarities of at least 0, with a sum above 0 for each sample"),
        (torch.zeros(2, 3, 4), torch.ones(2, 3), None, "r_ref: expected weights with a sum above 0 for each router"),
    ],
)
def test_bad_reweighting(r: Tensor, sim: Tensor, experts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"c3po_reweight: {message}"):
        c3po_reweight(r, sim, experts)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("kind", SOFTMAX)
def test_the_models_own_gate_takes_the_weights(kind: str, patched: bool) -> None:
    model = tiny_model(kind)
    before, plain = _routed(model, input_ids=TOKENS, attention_mask=MASK)
    router = find_routers(model)[-1]
    r = _weights(3, len(router.weight))
    if patched:
        patch_routers(model)
    with RoutingOverride(model, r, -1):
        after, routed = _routed(model, input_ids=TOKENS, attention_mask=MASK)
    rows = torch.tensor([7 * place + position for place, position in enumerate(LAST)])
    others = torch.ones(21, dtype=torch.bool).index_fill(0, rows, False)
    # What the router makes of logits that it would have had.
    with torch.no_grad():
        router.weight.copy_(torch.eye(len(r[0]), 24))
        if getattr(router, "bias", None) is not None:
            router.bias.zero_()
    hidden = torch.zeros(3, 24)
    hidden[:, : r.shape[1]] = r.log()
    logits, weight, ids = router(hidden)
    found = routed[-1]
    torch.testing.assert_close(found[0][rows], logits, rtol=1e-5, atol=1e-6)
    experts = r.shape[1]
    dense = [(one_hot(place, experts) * share.unsqueeze(2)).sum(1) for place, share in ((found[2][rows], found[1][rows]), (ids, weight))]
    torch.testing.assert_close(*dense, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found, plain[-1], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours[others].sort(1).values, theirs[others].sort(1).values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routed[0][0], plain[0][0], rtol=1e-5, atol=1e-6)
    changed = (after - before).abs().amax(2) > 1e-7
    assert changed[torch.arange(3), LAST].all()
    # The router is the last layer's, so that no later token sees the change.
    assert changed.sum() == 3


def test_own_weights_change_nothing() -> None:
    model = tiny_model("olmoe")
    with RoutingRecorder(model, -2) as recorder:
        expected = model(input_ids=TOKENS, attention_mask=MASK).logits
    with RoutingOverride(model, recorder.r, -2):
        found = model(input_ids=TOKENS, attention_mask=MASK).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_linear_gates_and_routers_of_the_library() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    block = LinearGateBlock()
    r = _weights(6, 4)
    weight, ids = r.topk(2, dim=1)
    y = torch.stack([expert(x) for expert in block.experts], 1)
    expected = x + (y.gather(1, ids.unsqueeze(2).expand(-1, -1, 5)) * weight.unsqueeze(2)).sum(1)
    with RoutingOverride(block, r, "all"):
        torch.testing.assert_close(block(x), expected)
    router = TopKRouter(5, 4, 2, renormalize=True)
    model = nn.Sequential(router)
    with RoutingOverride(model, r, "all"):
        gate = router.gate(torch.log(r), statistics=True)
        model.forward = lambda rows: router(rows, statistics=True)
        found = model(x)
    for one, other in zip(found, gate, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("every_call", [False, True])
def test_generated_tokens(every_call: bool) -> None:
    model = tiny_model("olmoe")
    seen: list[Tensor] = []
    r = _weights(3, 8)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    with RoutingOverride(model, r, -1, every_call=every_call):
        handle = find_routers(model)[-1].register_forward_hook(lambda module, args, output: seen.append(output[0]))
        model.generate(TOKENS, **options)
        handle.remove()
    assert [len(one) for one in seen] == [21, 3, 3]
    overridden = [torch.allclose(one.view(3, -1, 8)[:, -1], r.log(), atol=1e-5) for one in seen]
    assert overridden == [True, every_call, every_call]


def test_zero_weights_are_chosen_last_and_are_no_nan() -> None:
    model = tiny_model("mixtral")
    r = torch.zeros(3, 6)
    r[:, 4] = 1.0
    with RoutingOverride(model, r, -1):
        logits, routed = _routed(model, input_ids=TOKENS)
    assert torch.isfinite(logits).all()
    _, weight, ids = routed[-1]
    assert (ids.view(3, 7, 2)[:, -1, 0] == 4).all()
    torch.testing.assert_close(weight.view(3, 7, 2)[:, -1], torch.tensor([[1.0, 0.0]]).expand(3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_the_gates_temperature_and_dtype_leave_the_weights(temperature: float, dtype: torch.dtype) -> None:
    router = TopKRouter(5, 4, 4, temperature=temperature, dtype=dtype)
    model, r = nn.Sequential(router), _weights(6, 4)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    with RoutingOverride(model, r, "all"):
        gate = model(x)
    torch.testing.assert_close(torch.zeros(6, 4).scatter(1, gate.ids.long(), gate.weight), r, rtol=1e-5, atol=1e-6)


def test_no_hook_stays() -> None:
    model = tiny_model("olmoe")
    override = RoutingOverride(model, _weights(3, 8), -1)
    with override, pytest.raises(RuntimeError, match="it overrides already"):
        override.__enter__()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_overrides() -> None:
    model = tiny_model("olmoe")
    for r, message in [
        (_weights(3, 7), r"r: expected floating numbers of shape \(B, 8\), got torch.float32 \(3, 7\)"),
        (torch.ones(3, 8, dtype=torch.int64), "r: expected floating numbers"),
        (-_weights(3, 8), "r: expected weights of at least 0"),
        (torch.full((3, 8), torch.nan), "r: expected weights of at least 0"),
        (torch.full((3, 8), torch.inf), "r: expected weights of at least 0, finite ones"),
        (_weights(3, 8) * torch.tensor([[1.0], [0.0], [1.0]]), "r: expected weights with a sum above 0 for each row and router"),
    ]:
        with pytest.raises(ValueError, match=f"RoutingOverride: {message}"):
            RoutingOverride(model, r, -1)
    with RoutingOverride(model, _weights(2, 8), -1), pytest.raises(ValueError, match="r: expected 3 rows, one for each sequence, got 2"):
        model(input_ids=TOKENS)
    override = RoutingOverride(model, _weights(2, 8), -1)
    plain = model(input_ids=TOKENS[:2]).logits
    with override:
        expected = model(input_ids=TOKENS[:2]).logits
    with override:
        with pytest.raises(ValueError, match="r: expected 3 rows"):
            model(input_ids=TOKENS)
        assert torch.equal(model(input_ids=TOKENS[:2]).logits, expected)
        assert torch.equal(model(input_ids=TOKENS[:2]).logits, plain)
    with pytest.raises(ValueError, match="model: DeepseekV3TopkRouter scores by a sigmoid"):
        RoutingOverride(tiny_model("deepseek-v3"), _weights(3, 12), -1)
