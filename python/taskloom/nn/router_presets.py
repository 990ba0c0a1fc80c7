"""How known sparse mixture-of-experts models weigh their experts: what their configurations say, as options of ``topk_gate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from taskloom.ops import TopKGate, topk_gate

# The denominator's share in DeepSeek's own code and in transformers.
DEEPSEEK_EPS = 1e-20


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """What :func:`taskloom.topk_gate` is called with, beside logits and a selection bias; fields and defaults are its own."""

    k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2"] | None = None
    group_mask: float = -math.inf
    renormalize: bool = False
    scale: float = 1.0
    eps: float = 0.0
    temperature: float = 1.0

    def gate(
        self, logits: Tensor, bias: Tensor | None = None, *, ids_dtype: torch.dtype = torch.int32, statistics: bool = False
    ) -> TopKGate:
        """The gate of logits ``[..., E]``; see :func:`taskloom.topk_gate`."""
        return topk_gate(
            logits,
            self.k,
            bias,
            score=self.score,
            n_group=self.n_group,
            topk_group=self.topk_group,
            group_score=self.group_score,
            group_mask=self.group_mask,
            renormalize=self.renormalize,
            scale=self.scale,
            eps=self.eps,
            temperature=self.temperature,
            ids_dtype=ids_dtype,
            statistics=statistics,
        )


@dataclass(frozen=True, kw_only=True)
class RouterPreset:
    """A model's router: its sizes, its gate, and how its logits are made."""

    dim: int
    num_experts: int
    options: GateOptions
    bias: bool = False
    selection_bias: bool = False
    float32_logits: bool = False


def deepseek_v2_options(k: int, topk_method: str, n_group: int, topk_group: int, scale: float) -> GateOptions:
    """DeepSeek-V2's gate.

    Raises
    ------
    ValueError
        If ``topk_method`` is another than ``"greedy"`` and ``"group_limited_greedy"``.
    """
    if topk_method == "greedy":
        return GateOptions(k=k, scale=scale)
    if topk_method == "group_limited_greedy":
        return GateOptions(k=k, n_group=n_group, topk_group=topk_group, group_score="max", scale=scale)
    raise ValueError(f"topk_method: expected 'greedy' or 'group_limited_greedy', got {topk_method!r}")


def deepseek_v3_options(k: int, n_group: int, topk_group: int, renormalize: bool, scale: float) -> GateOptions:
    """DeepSeek-V3's gate, groups that are left out being masked with minus infinity."""
    return GateOptions(
        k=k,
        score="sigmoid",
        n_group=n_group,
        topk_group=topk_group,
        group_score="top2",
        renormalize=renormalize,
        scale=scale,
        eps=DEEPSEEK_EPS,
    )


class _Fields:
    """The fields of a configuration, an object or a mapping; those that are None count as missing."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        found = self._config.get(name) if isinstance(self._config, Mapping) else getattr(self._config, name, None)
        if found is None:
            raise AttributeError(name=name, obj=self)
        return found


def _check_if_given(config: _Fields, name: str, expected: str) -> None:
    """Raise ValueError where a field that old configurations lack asks for another gate."""
    found = getattr(config, name, expected)
    if found != expected:
        raise ValueError(f"{name}: expected {expected!r}, got {found!r}")


def _softmax(config: _Fields) -> RouterPreset:
    """OLMoE, Qwen2-MoE and Qwen3-MoE."""
    options = GateOptions(k=config.num_experts_per_tok, renormalize=bool(config.norm_topk_prob))
    return RouterPreset(dim=config.hidden_size, num_experts=config.num_experts, options=options)


def _mixtral(config: _Fields) -> RouterPreset:
    options = GateOptions(k=config.num_experts_per_tok, renormalize=True)
    return RouterPreset(dim=config.hidden_size, num_experts=config.num_local_experts, options=options)


def _gpt_oss(config: _Fields) -> RouterPreset:
    options = GateOptions(k=config.num_experts_per_tok, renormalize=True)
    return RouterPreset(dim=config.hidden_size, num_experts=config.num_local_experts, options=options, bias=True)


def _deepseek(config: _Fields) -> RouterPreset:
    _check_if_given(config, "scoring_func", "softmax")
    k = config.num_experts_per_tok
    # The checkpoints' code normalises only where there is more than one expert.
    options = GateOptions(k=k, renormalize=bool(config.norm_topk_prob) and k > 1, eps=DEEPSEEK_EPS)
    return RouterPreset(dim=config.hidden_size, num_experts=config.n_routed_experts, options=options)


def _deepseek_v2(config: _Fields) -> RouterPreset:
    _check_if_given(config, "scoring_func", "softmax")
    method = config.topk_method
    # Greedy checkpoints have no groups.
    n_group, topk_group = (config.n_group, config.topk_group) if method == "group_limited_greedy" else (1, 1)
    options = deepseek_v2_options(config.num_experts_per_tok, method, n_group, topk_group, config.routed_scaling_factor)
    return RouterPreset(dim=config.hidden_size, num_experts=config.n_routed_experts, options=options, float32_logits=True)


def _deepseek_v3(config: _Fields) -> RouterPreset:
    _check_if_given(config, "scoring_func", "sigmoid")
    _check_if_given(config, "topk_method", "noaux_tc")
    options = deepseek_v3_options(
        config.num_experts_per_tok, config.n_group, config.topk_group, bool(config.norm_topk_prob), config.routed_scaling_factor
    )
    return RouterPreset(
        dim=config.hidden_size, num_experts=config.n_routed_experts, options=options, selection_bias=True, float32_logits=True
    )


PRESETS: Mapping[str, Callable[[_Fields], RouterPreset]] = {
    "deepseek": _deepseek,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "mixtral": _mixtral,
    "olmoe": _softmax,
    "qwen2_moe": _softmax,
    "qwen3_moe": _softmax,
}


def router_preset(config: _Fields) -> RouterPreset:
    """The router of a model's configuration: an object with its fields, such as transformers makes, or a mapping (a ``config.json``).

    Raises
    ------
    ValueError
        If ``model_type`` is not one of the presets', a field is missing or None, or the configuration asks for another gate than
        the preset's.
    """
    fields = _Fields(config)
    model_type = getattr(fields, "model_type", None)
    if not isinstance(model_type, str) or model_type not in PRESETS:
        raise ValueError(f"from_config: model_type: expected one of {', '.join(PRESETS)}, got {model_type!r}")
    try:
        return PRESETS[model_type](fields)
    except AttributeError as error:
        raise ValueError(f"from_config: {model_type}: the configuration lacks {error.name!r}") from None
    except ValueError as error:
        raise ValueError(f"from_config: {model_type}: {error}") from None
