"""Models of transformers whose gates topk_gate computes: the same outputs and gradients, and nothing left of it afterwards."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe_models import KINDS, tiny_model, tiny_tokens
from taskloom.nn import TopKRouter, patch_routers, unpatch_routers
from taskloom.nn.router_patch import routers_of

TOKENS = tiny_tokens()
# One of each class; the others differ in the router alone.
MODELS = ["olmoe", "qwen2", "qwen3", "mixtral", "gpt-oss", "deepseek-v2", "deepseek-v3"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def _rows(router: Any, count: int, seed: int = 3) -> Tensor:
    rows = torch.randn(count, router.weight.shape[1], generator=torch.Generator().manual_seed(seed))
    return rows.to(router.weight.dtype)


def _by_id(weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """By number: the order of the experts is open in transformers' DeepSeek routers."""
    ids, places = ids.sort(1)
    return ids, weight.gather(1, places)


def _untied(router: Any, rows: Tensor, logits: Tensor) -> Tensor:
    """Rows whose scores are all different, so that there is one answer: in bfloat16 logits are often equal."""
    ranked = logits.float().sort(1).values
    return rows[(ranked.diff(dim=1) > 0).all(1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_router_outputs_are_those_of_the_model(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind).to(dtype)
    router = next(iter(routers_of(model).values()))
    hidden = _untied(router, _rows(router, 300), router(_rows(router, 300))[0])
    assert len(hidden) >= 20
    logits, weight, ids = router(hidden)
    with patch_routers(model):
        found = router(hidden)
    assert type(found) is tuple
    assert [one.dtype for one in found] == [logits.dtype, weight.dtype, ids.dtype]
    assert [one.shape for one in found] == [logits.shape, weight.shape, ids.shape]
    assert torch.equal(found[0], logits)
    (ours, our_weight), (theirs, their_weight) = _by_id(found[1], found[2]), _by_id(weight, ids)
    assert torch.equal(ours, theirs)
    rough = 1e-6 if weight.dtype != torch.bfloat16 else 2**-8
    torch.testing.assert_close(our_weight, their_weight, rtol=rough, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_model_outputs_and_gradients_are_the_same(kind: str) -> None:
    model = tiny_model(kind)
    patched = copy.deepcopy(model)
    patch_routers(patched)
    found = []
    for one in (patched, model):
        out = one(input_ids=TOKENS, labels=TOKENS, output_router_logits=True)
        out.loss.backward()
        found.append((out, {name: parameter.grad for name, parameter in one.named_parameters()}))
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=1e-6)
    assert len(ours.router_logits) == len(theirs.router_logits) == 2
    for one, other in zip(ours.router_logits, theirs.router_logits, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert our_gradients.keys() == their_gradients.keys()
    for name, expected in their_gradients.items():
        gradient = our_gradients[name]
        assert (gradient is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["olmoe", "deepseek-v3"])
def test_bfloat16_models(kind: str) -> None:
    model = tiny_model(kind).bfloat16()
    expected = model(input_ids=TOKENS).logits
    with patch_routers(model):
        torch.testing.assert_close(model(input_ids=TOKENS).logits, expected, rtol=2e-2, atol=2e-2)


def test_autocast_reaches_the_router() -> None:
    model = tiny_model("olmoe")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=TOKENS).logits
        with patch_routers(model):
            torch.testing.assert_close(model(input_ids=TOKENS).logits, expected, rtol=2e-2, atol=2e-2)


def test_nothing_is_left_behind() -> None:
    model = tiny_model("qwen3")
    before = {path: (type(module), dict(vars(module))) for path, module in model.named_modules()}
    state = {name: one.clone() for name, one in model.state_dict().items()}
    patch = patch_routers(model)
    assert patch.paths == ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
    assert all(isinstance(module, before[path][0]) for path, module in model.named_modules())
    assert type(model.get_submodule(patch.paths[0])).__name__ == "Qwen3MoeTopKRouter"
    assert model.state_dict().keys() == state.keys()
    patch.remove()
    patch.remove()
    assert {path: (type(module), dict(vars(module))) for path, module in model.named_modules()} == before
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())


def test_the_patch_is_undone_when_the_block_fails() -> None:
    model = tiny_model("olmoe")
    before = type(model.model.layers[0].mlp.gate)
    with pytest.raises(ZeroDivisionError), patch_routers(model):
        raise ZeroDivisionError
    assert type(model.model.layers[0].mlp.gate) is before


def _change_again(model: Any) -> nn.Module:
    """The first router of a model, after torch has given it a class of its own."""
    router: nn.Module = model.model.layers[0].mlp.gate
    return parametrize.register_parametrization(router, "weight", nn.Identity())


def test_a_router_whose_class_was_changed_since_holds_up_no_other() -> None:
    model = tiny_model("olmoe")
    base = type(model.model.layers[0].mlp.gate)
    patch = patch_routers(model)
    first = _change_again(model)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate \(ParametrizedOlmoeTopKRouter\) was changed again since"):
        patch.remove()
    assert type(model.model.layers[1].mlp.gate) is base
    patch.remove()
    with pytest.raises(ValueError, match="was changed again since"):
        unpatch_routers(model)
    parametrize.remove_parametrizations(first, "weight")
    assert unpatch_routers(model) == ["model.layers.0.mlp.gate"]
    assert type(first) is base


def test_a_router_that_stays_patched_does_not_hide_an_exception() -> None:
    model = tiny_model("olmoe")
    patch = patch_routers(model)
    _change_again(model)
    with pytest.raises(ZeroDivisionError) as caught, patch:
        raise ZeroDivisionError
    assert "was changed again since" in caught.value.__notes__[0]
    other = tiny_model("olmoe")
    with pytest.raises(ValueError, match="was changed again since"), patch_routers(other):
        _change_again(other)


def test_a_patch_that_was_undone_inside_its_block() -> None:
    model = tiny_model("olmoe")
    with patch_routers(model):
        assert len(unpatch_routers(model)) == 2


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_are_patched_by_themselves(how: Any) -> None:
    model = tiny_model("mixtral")
    expected = model(input_ids=TOKENS).logits
    patch = patch_routers(model)
    other = how(model)
    patch.remove()
    assert unpatch_routers(model) == []
    gate = other.model.layers[0].mlp.gate
    assert gate(_rows(gate, 4))[2].dtype == torch.int64
    torch.testing.assert_close(other(input_ids=TOKENS).logits, expected, rtol=1e-5, atol=1e-6)
    assert unpatch_routers(other) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert type(gate) is type(model.model.layers[0].mlp.gate)


def test_a_known_name_without_an_attribute_is_refused() -> None:
    """As DeepSeek-V3's in transformers 5.10, which leaves the choice to the block around it."""
    model = tiny_model("deepseek-v3")
    gate = model.model.layers[1].mlp.gate
    gate.__class__ = type(type(gate).__name__, (type(gate),), {"forward": lambda self, hidden: hidden})
    del gate.num_group
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate: .* DeepseekV3TopkRouter lacks the attribute 'num_group'"):
        patch_routers(model)


def test_options_are_read_at_each_call() -> None:
    model = tiny_model("olmoe")
    patch_routers(model)
    gate = model.model.layers[0].mlp.gate
    gate.top_k, gate.norm_topk_prob = 2, True
    weight = gate(_rows(gate, 5))[1]
    assert weight.shape == (5, 2)
    torch.testing.assert_close(weight.sum(1), torch.ones(5))


def test_hooks_of_others_still_run() -> None:
    model = tiny_model("olmoe")
    seen = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    with patch_routers(model):
        model(input_ids=TOKENS)
    assert seen == [(21, 8)]


def test_generation_takes_the_same_tokens() -> None:
    model = tiny_model("qwen2")
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    expected = model.generate(TOKENS, **options)
    with patch_routers(model):
        assert torch.equal(model.generate(TOKENS, **options), expected)


class _Block(nn.Module):
    """A sparse block with a gate as transformers 4 has it, or another."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = gate, nn.ModuleList()


class FancyTopKRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "model: expected routers of DeepseekV2TopkRouter, .*, Qwen3MoeTopKRouter; Linear has no router"),
        (_Block(nn.Linear(3, 4)), "gate: expected a router of DeepseekV2TopkRouter, .*, Qwen3MoeTopKRouter, got Linear"),
        (_Block(FancyTopKRouter()), "gate: expected a router of .*, got FancyTopKRouter"),
        (_Block(TopKRouter(3, 4, 2)), "gate: expected a router of .*, got TopKRouter"),
    ],
)
def test_unknown_routers_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"patch_routers: {message}"):
        patch_routers(model)


def test_one_unknown_router_leaves_all_as_they_are() -> None:
    model = tiny_model("olmoe")
    model.model.layers[1].mlp.gate = FancyTopKRouter()
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate: expected a router of .*, got FancyTopKRouter"):
        patch_routers(model)
    assert unpatch_routers(model) == []


def test_a_second_patch_is_refused() -> None:
    model = tiny_model("olmoe")
    with patch_routers(model), pytest.raises(ValueError, match=r"mlp\.gate: the router is patched already"):
        patch_routers(model)


def test_the_default_device_does_not_matter() -> None:
    model = tiny_model("olmoe")
    with torch.device("meta"):
        assert len(patch_routers(model).paths) == 2


def test_a_router_on_meta_is_refused() -> None:
    model = tiny_model("olmoe")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate: expected a router with values, .* on the meta device"):
        patch_routers(model)
    assert unpatch_routers(model) == []


def test_a_forward_that_somebody_replaced_is_refused() -> None:
    model = tiny_model("olmoe")
    gate = model.model.layers[1].mlp.gate
    gate.forward = gate.forward
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate: its forward was replaced"):
        patch_routers(model)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda logits, weight, ids: logits, "returns something else than expected"),
        (lambda logits, weight, ids: (logits, weight.double(), ids), "returns something else than expected"),
        (lambda logits, weight, ids: (weight, logits, ids), "returns something else than expected"),
        (lambda logits, weight, ids: (logits, weight), "returns something else than expected"),
        # As transformers 5.0 has it.
        (lambda logits, weight, ids: (logits.softmax(1), weight, ids), "returns other logits than expected"),
        (lambda logits, weight, ids: (logits, weight * 2, ids), "weighs experts in another way than expected"),
    ],
)
def test_a_known_name_that_computes_something_else_is_refused(answer: Any, message: str) -> None:
    """As another version of transformers might."""
    model = tiny_model("olmoe")
    gate = model.model.layers[0].mlp.gate
    base = type(gate)
    gate.__class__ = type(base.__name__, (base,), {"forward": lambda self, hidden: answer(*base.forward(self, hidden))})
    with pytest.raises(ValueError, match=f"this version of transformers' OlmoeTopKRouter {message}"):
        patch_routers(model)
    assert unpatch_routers(model) == []


@pytest.mark.parametrize("kind", ["olmoe", "deepseek-v3"])
def test_a_patched_router_compiles_in_one_graph(kind: str) -> None:
    model = tiny_model(kind)
    router = next(iter(routers_of(model).values()))
    rows = _rows(router, 6)
    with patch_routers(model):
        found = torch.compile(router, backend="eager", fullgraph=True)(rows)
        assert all(torch.equal(one, other) for one, other in zip(found, router(rows), strict=True))
