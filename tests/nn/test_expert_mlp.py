"""ExpertMLP beside a loop over experts, beside transformers' blocks, and its errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloom import backend
from taskloom.nn import ExpertMLP, TopKRouter
from taskloom.nn.expert_mlp import GatedMLP
from taskloom.nn.expert_products import expert_products

F64 = torch.float64
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def eager(layer: ExpertMLP, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Each token and slot by itself."""
    out = []
    for token, weights, chosen in zip(x, weight, ids, strict=True):
        sum_of_slots = torch.zeros_like(token)
        for share, expert in zip(weights, chosen.tolist(), strict=True):
            gate, up = (layer.gate_up_proj[expert] @ token).chunk(2)
            sum_of_slots = sum_of_slots + share.to(x.dtype) * (layer.down_proj[expert] @ (F.silu(gate) * up))
        out.append(sum_of_slots)
    return torch.stack(out)


def routed(tokens: int, experts: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight, ids = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(4)).softmax(-1).topk(k)
    return weight.to(dtype), ids


# Sizes that torch's grouped product takes, and some that it does not.
@pytest.mark.parametrize(("dim", "hidden"), [(16, 24), (13, 7)])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_is_the_loop_over_tokens(dim: int, hidden: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    torch.manual_seed(0)
    layer = ExpertMLP(dim, hidden, 6, 2, dtype=dtype)
    weight, ids = routed(9, 6, 2)
    ids[:, 0], ids[:, 1] = ids[:, 0] % 3, 3 + ids[:, 1] % 2  # the last expert has no token
    x, weight = torch.randn(9, dim).to(dtype).requires_grad_(), weight.requires_grad_()
    leaves = [x, weight, layer.gate_up_proj, layer.down_proj]
    out, expected = layer(x, weight, ids), eager(layer, x, weight, ids)
    assert out.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    slopes = torch.randn_like(out)
    for got, wanted in zip(torch.autograd.grad(out, leaves, slopes), torch.autograd.grad(expected, leaves, slopes), strict=True):
        torch.testing.assert_close(got, wanted, rtol=4 * tolerance, atol=4 * tolerance)


def test_routes_itself() -> None:
    torch.manual_seed(0)
    layer = ExpertMLP(16, 8, 5, 2, shared=12)
    x = torch.randn(2, 7, 16)
    weight, ids = layer.router(x.reshape(-1, 16))[:2]
    torch.testing.assert_close(weight.sum(-1), torch.ones(14))
    expected = eager(layer, x.reshape(-1, 16), weight, ids) + layer.shared(x.reshape(-1, 16))
    torch.testing.assert_close(layer(x), expected.reshape(x.shape))
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in layer.parameters())


def test_a_token_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    layer = ExpertMLP(13, 8, 5, 2, dtype=F64)
    x = torch.randn(40, 13, dtype=F64)
    torch.testing.assert_close(layer(x)[7:9], layer(x[7:9]), rtol=1e-12, atol=1e-14)


def test_no_tokens() -> None:
    layer = ExpertMLP(16, 8, 5, 2)
    x = torch.empty(0, 16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 16)


def test_autocast() -> None:
    torch.manual_seed(0)
    layer = ExpertMLP(16, 8, 5, 2)
    x, (weight, ids) = torch.randn(6, 16), routed(6, 5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, weight, ids)
    torch.testing.assert_close(out, layer(x, weight, ids), rtol=3e-2, atol=3e-2)
    assert not torch.equal(out, layer(x, weight, ids))


# torch.compile makes an instance of each autograd function that it traces, of which torch warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled() -> None:
    torch.manual_seed(0)
    layer = ExpertMLP(16, 8, 5, 2, dtype=torch.bfloat16)
    x = torch.randn(6, 16).bfloat16()
    torch.compiler.reset()
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for got, expected in zip(*(torch.autograd.grad(one(x).sum(), list(layer.parameters())) for one in (run, layer)), strict=True):
        torch.testing.assert_close(got, expected)
    torch.compiler.reset()


def test_state_dict_goes_both_ways() -> None:
    torch.manual_seed(0)
    one, other = ExpertMLP(8, 4, 3, 2, shared=4), ExpertMLP(8, 4, 3, 2, shared=4)
    other.load_state_dict(one.state_dict())
    x = torch.randn(5, 8)
    assert torch.equal(one(x), other(x))


def test_reset_parameters_of_a_gated_mlp(poisoned_memory: None) -> None:
    torch.manual_seed(0)
    expected = GatedMLP(8, 4).state_dict()
    layer = GatedMLP(8, 4).to("meta").to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(torch.equal(value, expected[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(("dim", "hidden", "dtype"), [(16, 8, torch.float32), (13, 7, torch.float32), (13, 7, F64)])
def test_torch_func_differentiates_it(dim: int, hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = ExpertMLP(dim, hidden, 5, 2, dtype=dtype)
    x, parameters = torch.randn(6, dim, dtype=dtype), dict(layer.named_parameters())
    found = torch.func.grad(lambda own: torch.func.functional_call(layer, own, (x,)).square().sum())(parameters)
    expected = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    for name, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(x)
    _, slope = torch.func.jvp(lambda tokens: layer(tokens).square().sum(), (x,), (direction,))
    inner = torch.autograd.grad(layer(leaf := x.clone().requires_grad_()).square().sum(), leaf)[0]
    torch.testing.assert_close(slope, (inner * direction).sum(), rtol=1e-4, atol=1e-5)


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    layer = ExpertMLP(7, 5, 4, 2, dtype=F64)
    x, (weight, ids) = torch.randn(6, 7, dtype=F64, requires_grad=True), routed(6, 4, 2, F64)
    ids[:, 0], ids[:, 1] = 0, 1 + ids[:, 1] % 2  # the last expert has no token
    leaves = (x, weight.requires_grad_(), layer.gate_up_proj, layer.down_proj)
    (slopes,) = torch.autograd.grad(layer(x, weight, ids).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expert_combine_backward has no gradient"):
        torch.autograd.grad(slopes.square().sum(), leaves)

    def applied(x: Tensor, weight: Tensor, *matrices: Tensor) -> Tensor:
        names = dict(zip(("gate_up_proj", "down_proj"), matrices, strict=True))
        made: Tensor = torch.func.functional_call(layer, names, (x, weight, ids))
        return made

    with backend("reference"):
        assert torch.autograd.gradgradcheck(applied, leaves)


@pytest.mark.parametrize("on", ["auto", "reference"])
def test_products_are_differentiable_twice(on: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 3, dtype=F64, requires_grad=True), torch.randn(3, 4, 3, dtype=F64, requires_grad=True)
    offsets = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    with backend(on):
        assert torch.autograd.gradgradcheck(lambda *leaves: expert_products(*leaves, offsets), (x, weight))


def _mixtral() -> nn.Module:
    from transformers.models.mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    return MixtralSparseMoeBlock(MixtralConfig(hidden_size=32, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2))


def _olmoe() -> nn.Module:
    from transformers.models.olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    return OlmoeSparseMoeBlock(OlmoeConfig(hidden_size=32, intermediate_size=24, num_experts=8, num_experts_per_tok=3))


def _qwen3() -> nn.Module:
    from transformers.models.qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=20, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)
    return Qwen3MoeSparseMoeBlock(config)


def _qwen2() -> nn.Module:
    from transformers.models.qwen2_moe import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=32, moe_intermediate_size=20, shared_expert_intermediate_size=28, num_experts=8, num_experts_per_tok=2
    )
    return Qwen2MoeSparseMoeBlock(config)


def _deepseek_v3() -> nn.Module:
    from transformers.models.deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=32, moe_intermediate_size=20, n_routed_experts=16, num_experts_per_tok=3, n_group=4, topk_group=2, n_shared_experts=2
    )
    return DeepseekV3MoE(config)


def _deepseek_v2() -> nn.Module:
    from transformers.models.deepseek_v2 import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = DeepseekV2Config(
        hidden_size=32,
        moe_intermediate_size=20,
        n_routed_experts=16,
        num_experts_per_tok=3,
        n_shared_experts=2,
        topk_method="greedy",
        routed_scaling_factor=2.0,
    )
    return DeepseekV2Moe(config)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    """A block with random weights: those that transformers leaves empty too."""
    torch.manual_seed(0)
    block = make().float()
    for tensor in block.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(std=0.3)
    return block


@pytest.mark.parametrize("name", list(BLOCKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_block_of_transformers(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    block = drawn(BLOCKS[name]).to(dtype)
    layer = ExpertMLP.from_transformers(block)
    x = torch.randn(2, 11, 32).to(dtype)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(layer(x.clone()), block(x.clone()), rtol=tolerance, atol=tolerance * 4)


def test_trains_as_the_block_of_transformers_does() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    block = drawn(_qwen3)
    layer = ExpertMLP.from_transformers(copy.deepcopy(block))
    x = torch.randn(2, 11, 32)
    slopes = torch.randn_like(x)
    for one in (block, layer):
        one(x).backward(slopes)
    experts, router = block.experts, block.gate
    for got, expected in (
        (layer.gate_up_proj, experts.gate_up_proj),
        (layer.down_proj, experts.down_proj),
        (layer.router.weight, router.weight),
    ):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_shares_the_blocks_parameters() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    block: Any = drawn(_mixtral)
    layer = ExpertMLP.from_transformers(block)
    assert layer.gate_up_proj is block.experts.gate_up_proj
    assert layer.router is block.gate
    assert (layer.dim, layer.hidden, layer.num_experts, layer.k) == (32, 24, 6, 2)
    assert not any(parameter.is_meta for parameter in layer.parameters())


def test_blocks_that_compute_something_else() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from transformers.models.gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    block: Any = drawn(_mixtral)
    block.jitter_noise = 0.1
    with pytest.raises(ValueError, match="jitter_noise"):
        ExpertMLP.from_transformers(block)
    config = GptOssConfig(hidden_size=32, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(ValueError, match=r"ExpertMLP: block: expected one of DeepseekV2Moe, .*, got GptOssMLP"):
        ExpertMLP.from_transformers(GptOssMLP(config))
    del block.gate
    with pytest.raises(ValueError, match="expected a router `gate`"):
        ExpertMLP.from_transformers(block)


def test_a_block_with_the_same_parts_and_another_forward_is_refused() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from transformers.models.hunyuan_v1_moe import HunYuanMoEV1Config
    from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1Moe

    config = HunYuanMoEV1Config(hidden_size=32, intermediate_size=24, num_experts=4, moe_topk=2, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"expected one of DeepseekV2Moe, .*, got HunYuanMoEV1Moe"):
        ExpertMLP.from_transformers(HunYuanMoEV1Moe(config))


def test_a_block_whose_router_is_this_librarys() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    block: Any = drawn(_qwen3)
    router = TopKRouter(32, 8, 2, renormalize=True)
    router.load_state_dict(block.gate.state_dict())
    x = torch.randn(2, 11, 32)
    expected = block(x)
    block.gate = router
    layer = ExpertMLP.from_transformers(block)
    assert layer.k == 2
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=4e-5)


def test_errors() -> None:
    for sizes, message in (
        ((0, 4, 3, 2), "dim: expected at least 1"),
        ((8, 4, 3, 4), "k: expected at most 3"),
        ((8, 4, 3, 0), "k: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ExpertMLP(*sizes)
    with pytest.raises(ValueError, match="activation: expected"):
        ExpertMLP(8, 4, 3, 2, activation="tanhh")
    with pytest.raises(ValueError, match="shared_gate"):
        ExpertMLP(8, 4, 3, 2, shared_gate=nn.Linear(8, 1))
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"shared: expected a hidden size of at least 1, got {size}"):
            ExpertMLP(8, 4, 3, 2, shared=size)
    with pytest.raises(TypeError, match="shared: expected a hidden size, a module or None, got True"):
        ExpertMLP(8, 4, 3, 2, shared=True)
    layer = ExpertMLP(8, 4, 3, 2)
    x, (weight, ids) = torch.randn(5, 8), routed(5, 3, 2)
    with pytest.raises(ValueError, match=r"weight, ids: expected the same shape \[..., k\] of both, got \(2, 5\) and \(5, 2\)"):
        layer(x, weight.T, ids)
    with pytest.raises(ValueError, match=r"x: expected shape \[..., 8\]"):
        layer(x[:, :7])
    with pytest.raises(ValueError, match="got only ids"):
        layer(x, None, ids)
    with pytest.raises(ValueError, match="a row for each of 5 tokens"):
        layer(x, weight[:4], ids[:4])
    with pytest.raises(ValueError, match="expert_sort: ids: expected 0 to 2"):
        layer(x, weight, ids + 1)
