"""Small sparse models of transformers with random weights, one for each router that the library knows."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

_COMMON = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "intermediate_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK = {
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_hidden_layers": 3,
}
# The module of transformers, the beginning of its classes' names, and what differs from the common settings.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "olmoe": ("olmoe", "Olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe-norm": ("olmoe", "Olmoe", {"num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen2": (
        "qwen2_moe",
        "Qwen2Moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3": (
        "qwen3_moe",
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "norm_topk_prob": True, "head_dim": 12},
    ),
    "mixtral": ("mixtral", "Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "gpt-oss": ("gpt_oss", "GptOss", {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 12, "rope_parameters": None}),
    "deepseek-v2": ("deepseek_v2", "DeepseekV2", {**_DEEPSEEK, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0}),
    "deepseek-v2-greedy": ("deepseek_v2", "DeepseekV2", {**_DEEPSEEK, "topk_method": "greedy"}),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3", dict(_DEEPSEEK)),
    "deepseek-v3-plain": ("deepseek_v3", "DeepseekV3", {**_DEEPSEEK, "norm_topk_prob": False, "n_group": 1, "topk_group": 1}),
}


def tiny_config(kind: str, **options: Any) -> Any:
    """The configuration of one of :data:`KINDS`."""
    module, name, own = KINDS[kind]
    configuration = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    fields = {**_COMMON, **own, **options}
    return getattr(configuration, f"{name}Config")(**{key: value for key, value in fields.items() if value is not None})


def tiny_model(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    """A causal language model with weights larger than at the start of training, so that routing is not even."""
    module, name, _ = KINDS[kind]
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    torch.manual_seed(seed)
    model: nn.Module = getattr(modeling, f"{name}ForCausalLM")(tiny_config(kind, **options))
    with torch.no_grad():
        for path, one in (*model.named_parameters(), *model.named_buffers()):
            if path.endswith(("gate.weight", "router.weight", "router.bias", "e_score_correction_bias")):
                one.normal_(std=0.4)
    return model.eval()


def tiny_tokens(batch: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    """Token ids ``[batch, length]``, none of them padding."""
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))
