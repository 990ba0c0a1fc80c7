"""TopKRouter and its presets, against the routers of transformers and the formulas of models that transformers does not have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_models import KINDS, tiny_config, tiny_model
from taskloom.nn import TopKRouter
from taskloom.nn.router_patch import routers_of

GROUPS = {"n_group": 4, "topk_group": 2}
DEEPSEEK = {
    "model_type": "deepseek",
    "hidden_size": 10,
    "n_routed_experts": 9,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}
DEEPSEEK_V2 = {**DEEPSEEK, "model_type": "deepseek_v2", "topk_method": "greedy", "routed_scaling_factor": 1.0}
DEEPSEEK_V3 = {**DEEPSEEK_V2, **GROUPS, "model_type": "deepseek_v3", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _rows(count: int, dim: int, seed: int = 5) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def _by_id(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """By number: the order of the experts is open in transformers' DeepSeek routers."""
    ids, places = ids.long().sort(1)
    return ids, weight.gather(1, places)


@pytest.mark.parametrize("kind", KINDS)
def test_presets_equal_the_routers_of_transformers(kind: str) -> None:
    theirs = next(iter(routers_of(tiny_model(kind)).values()))
    ours = TopKRouter.from_config(tiny_config(kind))
    ours.load_state_dict(theirs.state_dict())
    hidden = _rows(64, 24).requires_grad_()
    logits, weight, ids = theirs(hidden)
    gate = ours(hidden)
    assert torch.equal(ours.logits(hidden), logits)
    found, expected = _by_id(gate.ids, gate.weight), _by_id(ids, weight)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6)
    slopes = _rows(64, ids.shape[1], 6)
    ours_gradient = torch.autograd.grad((found[1] * slopes).sum(), [hidden, *ours.parameters()])
    their_gradient = torch.autograd.grad((expected[1] * slopes).sum(), [hidden, *theirs.parameters()])
    for one, other in zip(ours_gradient, their_gradient, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("form", ["object", "mapping"])
def test_deepseek_moe(renormalize: bool, form: str) -> None:
    fields = {**DEEPSEEK, "norm_topk_prob": renormalize}
    router = TopKRouter.from_config(fields if form == "mapping" else SimpleNamespace(**fields))
    x = _rows(20, 10)
    scores = torch.softmax(x @ router.weight.T, 1)
    weight, ids = scores.topk(3, dim=1)
    if renormalize:
        weight = weight / (weight.sum(1, keepdim=True) + 1e-20)
    gate = router(x)
    assert torch.equal(gate.ids.long(), ids)
    torch.testing.assert_close(gate.weight, weight, rtol=1e-6, atol=1e-6)


def test_one_expert_is_not_normalised_by_deepseek_moe() -> None:
    router = TopKRouter.from_config({**DEEPSEEK, "norm_topk_prob": True, "num_experts_per_tok": 1})
    assert (router(_rows(5, 10)).weight < 1).all()


def test_shapes_and_statistics() -> None:
    router = TopKRouter(6, 5, 2)
    gate = router(_rows(12, 6).view(3, 4, 6), statistics=True)
    assert gate.weight.shape == gate.ids.shape == (3, 4, 2)
    assert gate.counts is not None
    assert gate.counts.sum() == 24
    assert gate.lse is not None
    assert gate.lse.shape == (3, 4)
    assert router(torch.empty(0, 6)).ids.shape == (0, 2)


def test_bfloat16_products_stay_in_float32_where_asked() -> None:
    router = TopKRouter(8, 6, 2, float32_logits=True, dtype=torch.bfloat16)
    x = _rows(9, 8).bfloat16()
    assert router.logits(x).dtype == torch.float32
    assert torch.equal(router.logits(x), x.float() @ router.weight.float().T)
    assert TopKRouter(8, 6, 2, dtype=torch.bfloat16).logits(x).dtype == torch.bfloat16


def test_autocast_leaves_float32_logits_alone() -> None:
    router, other = (TopKRouter(16, 6, 2, bias=True, float32_logits=float32) for float32 in (True, False))
    x = _rows(20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router.logits(x)
        assert other.logits(x).dtype == torch.bfloat16
        assert router.logits(x.bfloat16()).dtype == torch.float32
    assert torch.equal(logits, router.logits(x))


def test_reset_parameters(poisoned_memory: None) -> None:
    torch.manual_seed(0)
    expected = TopKRouter(16, 6, 2, bias=True, selection_bias=True).state_dict()
    router = TopKRouter(16, 6, 2, bias=True, selection_bias=True).to("meta").to_empty(device="cpu")
    torch.manual_seed(0)
    router.reset_parameters()
    assert all(torch.equal(value, expected[name]) for name, value in router.state_dict().items())


def test_the_selection_bias_chooses_and_does_not_weigh() -> None:
    router = TopKRouter(4, 6, 2, score="sigmoid", selection_bias=True)
    assert dict(router.named_parameters()).keys() == {"weight"}
    router.e_score_correction_bias[5] = 9.0
    gate = router(_rows(7, 4))
    assert (gate.ids[:, 0] == 5).all()
    torch.testing.assert_close(gate.weight[:, 0], router.logits(_rows(7, 4))[:, 5].sigmoid())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4, 1), {}, "TopKRouter: dim: expected at least 1, got 0"),
        ((3, 0, 1), {}, "TopKRouter: num_experts: expected at least 1, got 0"),
        ((3, 4, 5), {}, "k: expected 1 to 4 of 4 experts, got 5"),
        ((3, 4, 0), {}, "k: expected 1 to 4 of 4 experts, got 0"),
        ((3, 6, 1), {"n_group": 4, "topk_group": 2}, "n_group: expected a divisor of 6"),
        ((3, 8, 5), {**GROUPS}, "topk_group: expected at least 3 groups of 2 experts"),
        ((3, 8, 2), {"score": "tanh"}, "score: expected 'softmax' or 'sigmoid', got 'tanh'"),
    ],
)
def test_bad_options_are_told_when_it_is_made(arguments: tuple[int, int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKRouter(*arguments, **options)


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match=r"TopKRouter: x: expected shape \(..., 6\), got \(4, 5\)"):
        TopKRouter(6, 5, 2)(torch.zeros(4, 5))
    with pytest.raises(TypeError, match=r"TopKRouter: x: expected float32, .*, got torch\.int64"):
        TopKRouter(6, 5, 2, float32_logits=True)(torch.zeros(4, 6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected one of deepseek, deepseek_v2, .* qwen3_moe, got 'llama'"),
        ({}, "model_type: expected one of .*, got None"),
        ({"model_type": "olmoe", "hidden_size": 8}, "from_config: olmoe: the configuration lacks 'num_experts_per_tok'"),
        ({**DEEPSEEK, "scoring_func": "sigmoid"}, "from_config: deepseek: scoring_func: expected 'softmax', got 'sigmoid'"),
        (
            {**DEEPSEEK, **GROUPS, "model_type": "deepseek_v2", "topk_method": "noaux_tc", "routed_scaling_factor": 1.0},
            "from_config: deepseek_v2: topk_method: expected 'greedy' or 'group_limited_greedy', got 'noaux_tc'",
        ),
        ({**DEEPSEEK_V2, "scoring_func": "sigmoid"}, "from_config: deepseek_v2: scoring_func: expected 'softmax', got 'sigmoid'"),
        ({**DEEPSEEK_V3, "scoring_func": "softmax"}, "from_config: deepseek_v3: scoring_func: expected 'sigmoid', got 'softmax'"),
        ({**DEEPSEEK_V3, "topk_method": "greedy"}, "from_config: deepseek_v3: topk_method: expected 'noaux_tc', got 'greedy'"),
        ({**DEEPSEEK_V3, "n_group": None}, "from_config: deepseek_v3: the configuration lacks 'n_group'"),
        ({**DEEPSEEK, "n_routed_experts": None}, "from_config: deepseek: the configuration lacks 'n_routed_experts'"),
    ],
)
def test_configurations_that_are_not_known(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKRouter.from_config(config)


def test_fields_that_are_none_count_as_missing() -> None:
    expected = TopKRouter.from_config(DEEPSEEK_V2).options
    without: dict[str, Any] = {"n_group": None, "topk_group": None, "scoring_func": None}
    for config in ({**DEEPSEEK_V2, **without}, SimpleNamespace(**{**DEEPSEEK_V2, **without})):
        assert TopKRouter.from_config(config).options == expected
    assert (
        TopKRouter.from_config({**DEEPSEEK_V3, "n_routed_experts": 12, "scoring_func": None, "topk_method": None}).options.score
        == "sigmoid"
    )


def test_state_dicts_have_the_names_of_the_models_own_routers() -> None:
    for kind in ("olmoe", "gpt-oss", "deepseek-v3"):
        theirs = next(iter(routers_of(tiny_model(kind)).values()))
        assert list(TopKRouter.from_config(tiny_config(kind)).state_dict()) == list(theirs.state_dict())
