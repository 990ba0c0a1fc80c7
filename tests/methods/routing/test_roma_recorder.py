"""RoMA's routers and recorder: which modules are meant, which tokens are kept, and that nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_models import KINDS, tiny_model, tiny_tokens
from taskloom.methods.routing.roma import RoMAConfig, RoutingOverride, RoutingRecorder, find_routers, token_positions, train_only_routers
from taskloom.nn import TopKRouter, patch_routers

TOKENS = tiny_tokens(3, 7)
# Right padding, left padding, none.
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
LAST, FIRST = [3, 6, 6], [0, 2, 0]


class LinearGateBlock(nn.Module):
    """As transformers 4 has OLMoE's: a linear gate, and the routing in the block's forward."""

    def __init__(self, width: int = 5, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weight, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        y = torch.stack([expert(x) for expert in self.experts], 1)
        return x + (y.gather(1, ids.unsqueeze(2).expand(-1, -1, x.shape[1])) * weight.unsqueeze(2)).sum(1)


class _Gate(nn.Module):
    """As DeepSeekMoE's own: (ids, weights, loss), so that no logits come out."""

    scoring_func = "softmax"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, ids = (hidden.reshape(-1, 5) @ self.weight.T).softmax(1).topk(2, dim=1)
        return ids, weight, None


class OlmoeTopKRouter(nn.Module):
    """As in transformers 5.0: what is first are probabilities."""

    top_k, norm_topk_prob = 2, False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = (hidden @ self.weight.T).softmax(1)
        return scores, *scores.topk(2, dim=1)


def _with_gate(gate: nn.Module) -> nn.Module:
    model = nn.Module()
    model.gate, model.experts = gate, nn.ModuleList()
    model.forward = lambda x: gate(x)
    return model


def _rows(positions: list[int], length: int = 7) -> Tensor:
    return torch.tensor([place * length + position for place, position in enumerate(positions)])


def _probabilities(kind: str, logits: Tensor) -> Tensor:
    if not kind.startswith("deepseek-v3"):
        return logits.float().softmax(1)
    scores = logits.float().sigmoid()
    return scores / scores.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "olmoe-norm"])
def test_recorded_are_the_probabilities_of_the_last_tokens(kind: str) -> None:
    model = tiny_model(kind)
    with RoutingRecorder(model, -2) as recorder:
        out = model(input_ids=TOKENS, attention_mask=MASK, output_router_logits=True)
    expected = [_probabilities(kind, logits)[_rows(LAST)] for logits in out.router_logits]
    assert recorder.experts == [one.shape[1] for one in expected]
    assert recorder.r.dtype == torch.float32
    torch.testing.assert_close(recorder.r, torch.cat(expected, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "positions", "places"),
    [
        ({"token": "first"}, FIRST, (0, 1)),
        ({"layers": [0]}, LAST, (0,)),
        ({"layers": [1, 0]}, LAST, (1, 0)),
        ({"layers": -1}, LAST, (1,)),
        ({"layers": "all"}, LAST, (0, 1)),
    ],
)
def test_tokens_and_layers(options: dict[str, Any], positions: list[int], places: tuple[int, ...]) -> None:
    model = tiny_model("olmoe")
    with RoutingRecorder(model, **{"layers": -2, **options}) as recorder:
        out = model(input_ids=TOKENS, attention_mask=MASK, output_router_logits=True)
    expected = [out.router_logits[place].softmax(1)[_rows(positions)] for place in places]
    torch.testing.assert_close(recorder.r, torch.cat(expected, 1), rtol=1e-6, atol=1e-6)


def test_a_mask_may_be_given_by_place() -> None:
    model = tiny_model("olmoe")
    with RoutingRecorder(model, -2) as recorder:
        model(input_ids=TOKENS, attention_mask=MASK)
        expected = recorder.r
        model(TOKENS, MASK)
    assert torch.equal(recorder.r, expected)


def test_positions_may_be_given() -> None:
    model = tiny_model("olmoe")
    with RoutingRecorder(model, -2) as recorder:
        recorder.positions = torch.tensor([2, 0, 5])
        out = model(input_ids=TOKENS, attention_mask=MASK, output_router_logits=True)
        expected = torch.cat([logits.softmax(1)[_rows([2, 0, 5])] for logits in out.router_logits], 1)
        torch.testing.assert_close(recorder.r, expected, rtol=1e-6, atol=1e-6)
        recorder.positions = torch.tensor([2, 0, 7])
        with pytest.raises(ValueError, match=r"positions: expected 0 to 6, got \[2, 0, 7\]"):
            model(input_ids=TOKENS)
        recorder.positions = torch.tensor([2, 0])
        with pytest.raises(ValueError, match=r"positions: expected shape \(3,\), one for each sequence, got \(2,\)"):
            model(input_ids=TOKENS)


@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "deepseek-v2", "deepseek-v3"])
def test_topk_weights_are_those_of_the_model(kind: str) -> None:
    model = tiny_model(kind)
    router = find_routers(model)[-1]
    seen: list[Any] = []
    router.register_forward_hook(lambda module, args, output: seen.append(output))
    with RoutingRecorder(model, -1, weights="topk") as recorder:
        model(input_ids=TOKENS, attention_mask=MASK)
    _, weight, ids = seen[0]
    expected = torch.zeros(len(weight), recorder.experts[0]).scatter(1, ids, weight)[_rows(LAST)]
    torch.testing.assert_close(recorder.r, expected, rtol=1e-6, atol=1e-6)


def test_patched_models_record_the_same() -> None:
    model = tiny_model("qwen3")
    with RoutingRecorder(model, -2) as recorder:
        model(input_ids=TOKENS, attention_mask=MASK)
        expected = recorder.r
        with patch_routers(model):
            model(input_ids=TOKENS, attention_mask=MASK)
    torch.testing.assert_close(recorder.r, expected, rtol=1e-5, atol=1e-6)


def test_only_asked_rows_are_kept() -> None:
    """B rows of E numbers, whatever the length of the sequences."""
    model = tiny_model("olmoe")
    with torch.no_grad(), RoutingRecorder(model, -2) as recorder:
        model(input_ids=TOKENS)
    kept = list(recorder._found.values())
    assert [one.shape for one in kept] == [(3, 8), (3, 8)]
    assert sum(one.untyped_storage().nbytes() for one in kept) == 2 * 3 * 8 * 4


def test_no_hook_stays() -> None:
    model = tiny_model("olmoe")
    model(input_ids=TOKENS, output_router_logits=True)
    before = {path: (dict(module._forward_hooks), dict(module._forward_pre_hooks)) for path, module in model.named_modules()}
    recorder = RoutingRecorder(model, -2)
    with pytest.raises(ZeroDivisionError), recorder:
        raise ZeroDivisionError
    with recorder:
        model(input_ids=TOKENS)
        with pytest.raises(RuntimeError, match="it records already"):
            recorder.__enter__()
    after = {path: (dict(module._forward_hooks), dict(module._forward_pre_hooks)) for path, module in model.named_modules()}
    assert after == before


def test_gradients_reach_the_recorded_routers() -> None:
    model = tiny_model("olmoe")
    parameters = train_only_routers(model, -1)
    with RoutingRecorder(model, -1) as recorder:
        model(input_ids=TOKENS, attention_mask=MASK)
        recorder.r.square().sum().backward()
    assert {name for name, one in model.named_parameters() if one.grad is not None} == {"model.layers.1.mlp.gate.weight"}
    assert parameters[0].grad is not None
    assert parameters[0].grad.abs().sum() > 0


def test_a_lost_graph_is_an_error() -> None:
    model = tiny_model("olmoe")
    train_only_routers(model, -1)
    with torch.no_grad(), RoutingRecorder(model, -1) as recorder:
        model(input_ids=TOKENS)
    assert not recorder.r.requires_grad
    block = model.model.layers[1].mlp
    own = block.forward
    block.forward = lambda hidden: checkpoint(own, hidden.requires_grad_(), use_reentrant=True)
    with RoutingRecorder(model, -1), pytest.raises(RuntimeError, match="a trained router ran without grad inside a call with it"):
        model(input_ids=TOKENS)


def test_activation_checkpointing() -> None:
    model = tiny_model("olmoe")
    train_only_routers(model, -1)
    found = []
    for wrapped in (False, True):
        model.zero_grad()
        block = model.model.layers[1].mlp
        if wrapped:
            own = block.forward
            block.forward = lambda hidden, own=own: checkpoint(own, hidden, use_reentrant=False)
        with RoutingRecorder(model, -1) as recorder:
            out = model(input_ids=TOKENS)
            (out.logits.square().mean() + recorder.r.square().sum()).backward()
        found.append(block.gate.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0])


def test_a_cache_of_earlier_tokens() -> None:
    """One token is routed, and the mask is as long as all."""
    model = tiny_model("olmoe")
    prompt, mask = TOKENS[:, :6], torch.ones(3, 7, dtype=torch.int64)
    first = model(input_ids=prompt, use_cache=True)
    name = "cache" if "cache" in first else "past_key_values"
    with RoutingRecorder(model, -2) as recorder:
        model(input_ids=TOKENS)
        expected = recorder.r
        model(input_ids=TOKENS[:, 6:], attention_mask=mask, **{name: first[name]})
    torch.testing.assert_close(recorder.r, expected, rtol=1e-5, atol=1e-6)


def test_gates_that_return_other_things() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    for model in (LinearGateBlock(), *map(_with_gate, (_Gate(), OlmoeTopKRouter(), TopKRouter(5, 4, 4)))):
        with RoutingRecorder(model, "all") as recorder:
            model(x)
        expected = (x @ model.gate.weight.T).softmax(1)
        torch.testing.assert_close(recorder.r, expected, rtol=1e-5, atol=1e-6)


def test_routers_are_found_in_order() -> None:
    blocks = nn.Sequential(LinearGateBlock(), nn.Linear(5, 5), _with_gate(TopKRouter(5, 4, 2)))
    assert find_routers(blocks) == [blocks[0].gate, blocks[2].gate]
    assert len(find_routers(tiny_model("qwen2"))) == 2
    assert [type(one).__name__ for one in find_routers(tiny_model("gpt-oss"))] == ["GptOssTopKRouter"] * 2


def test_models_without_routers() -> None:
    message = (
        r"find_routers: model: Sequential has no router; searched for modules named gate or router beside 'experts', and for TopKRouter, "
    )
    with pytest.raises(ValueError, match=message + r".*OlmoeTopKRouter.*Qwen3MoeTopKRouter"):
        find_routers(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=message):
        RoutingRecorder(nn.Sequential(nn.Linear(2, 2)), -1)


@pytest.mark.parametrize("layers", [-3, [2]])
def test_more_layers_than_there_are(layers: Any) -> None:
    message = "expected at most 2 last routers, which is all of them, got -3" if layers == -3 else "expected places from 0 to 1, got 2"
    with pytest.raises(ValueError, match=f"layers: {message}"):
        RoutingRecorder(tiny_model("olmoe"), layers)


def test_unknown_gates_have_no_topk_weights() -> None:
    with pytest.raises(ValueError, match=r"weights: 'topk' needs to know the gate; expected TopKRouter, .*, got Linear"):
        RoutingRecorder(LinearGateBlock(), "all", weights="topk")


def test_scores_are_not_guessed() -> None:
    gate = _Gate()
    gate.scoring_func = "sigmoid"
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    model = _with_gate(gate)
    with RoutingRecorder(model, "all") as recorder:
        model(x)
    scores = (x @ gate.weight.T).sigmoid()
    torch.testing.assert_close(recorder.r, scores / scores.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
    for said, message in ((None, "got _Gate$"), ("sqrtsoftplus", "got _Gate with scoring_func 'sqrtsoftplus'")):
        gate.scoring_func = said
        gate.register_buffer("e_score_correction_bias", torch.zeros(4))
        for build in (lambda: RoutingRecorder(model, "all"), lambda: RoutingOverride(model, torch.ones(6, 4), "all")):
            with pytest.raises(ValueError, match=f"expected routers that score by a softmax or a sigmoid: TopKRouter.*; {message}"):
                build()


BAD_LAYERS = [0, 1, True, -1.0, "last", None, [], (), [0, 0], [-1], (-1,), [0.5], [True]]


@pytest.mark.parametrize("layers", BAD_LAYERS)
def test_bad_layers(layers: Any) -> None:
    model = tiny_model("olmoe")
    for name, build in {
        "RoMAConfig": lambda: RoMAConfig(layers=layers),
        "RoutingRecorder": lambda: RoutingRecorder(model, layers),
        "RoutingOverride": lambda: RoutingOverride(model, torch.ones(3, 8), layers),
        "train_only_routers": lambda: train_only_routers(model, layers),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: layers: expected "):
            build()
    assert all(one.requires_grad for one in model.parameters())


def test_token_positions() -> None:
    assert token_positions(MASK).tolist() == LAST
    assert token_positions(MASK.bool(), "first").tolist() == FIRST
    with pytest.raises(ValueError, match="expected a token in each sequence, got one that is all padding"):
        token_positions(torch.tensor([[1, 0], [0, 0]]))
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(B, S\), got \(2,\)"):
        token_positions(torch.tensor([1, 0]))


def test_calls_that_cannot_be_counted() -> None:
    model = tiny_model("olmoe")
    with RoutingRecorder(model, -1) as recorder:
        with pytest.raises(RuntimeError, match="expected 1 routers in the model's last call, got 0"):
            _ = recorder.r
        with pytest.raises(RuntimeError, match="a router was called outside its model's forward"):
            find_routers(model)[-1](torch.zeros(2, 24))
    block = nn.Sequential(LinearGateBlock())
    with RoutingRecorder(block, -1), pytest.raises(ValueError, match=r"attention_mask: expected a tensor of shape \(B, S\), got \(2,\)"):
        block(torch.zeros(4, 5), attention_mask=torch.ones(2))


def test_only_routers_train() -> None:
    model = tiny_model("gpt-oss")
    parameters = train_only_routers(model, -1)
    names = {name for name, one in model.named_parameters() if one.requires_grad}
    assert names == {"model.layers.1.mlp.router.weight", "model.layers.1.mlp.router.bias"}
    assert [one.shape for one in parameters] == [(6, 24), (6,)]
    assert RoMAConfig(layers=-1).recorder(model).experts == [6]


def test_a_shared_router_weight_is_refused() -> None:
    model = nn.Sequential(LinearGateBlock(), nn.Linear(5, 4, bias=False))
    model[1].weight = model[0].gate.weight
    with pytest.raises(ValueError, match="a router's parameter is that of another module too"):
        train_only_routers(model, -1)
