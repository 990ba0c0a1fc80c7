"""LoRA and DoRA with PEFT's names of what can be set."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import nn

from taskloom.nn.base_layers import check_base_layer
from taskloom.nn.inject import LayerConfig
from taskloom.nn.lowrank_linear import LowRankLinear


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(LayerConfig):
    """A low-rank adapter for each target: :func:`taskloom.nn.inject` makes :class:`LowRankLinear` of the layers.

    Attributes
    ----------
    r
        Rank. Default 8.
    lora_alpha
        The product is scaled by ``lora_alpha / r``, or by ``lora_alpha / sqrt(r)`` with ``use_rslora``. Default 8.
    lora_dropout
        Probability that an entry of the adapter's input is dropped in training. Default 0.
    use_rslora, use_dora
        Rank-stabilised scaling (arXiv 2312.03732); rows scaled to learned norms (arXiv 2402.09353). Default False.
    rank_pattern, alpha_pattern
        Other ranks and alphas for some layers: a regular expression for the end of the path, and a number. Default: none.
    adapter_name
        Default ``"default"``.

    Raises
    ------
    TypeError
        If a rank is no integer.
    ValueError
        If a rank is below 1, an alpha is not finite, or the dropout is outside [0, 1).
    """

    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    adapter_name: str = "default"

    def __post_init__(self) -> None:
        for name, rank in (("r", self.r), *((f"rank_pattern[{key!r}]", value) for key, value in self.rank_pattern.items())):
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise TypeError(f"{name}: expected a rank, an integer, got {type(rank).__name__}")
            if rank < 1:
                raise ValueError(f"{name}: expected a rank of at least 1, got {rank}")
        by_pattern = ((f"alpha_pattern[{key!r}]", value) for key, value in self.alpha_pattern.items())
        for name, alpha in (("lora_alpha", self.lora_alpha), *by_pattern):
            if not math.isfinite(alpha):
                raise ValueError(f"{name}: expected a finite number, got {alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: expected a probability below 1, got {self.lora_dropout}")

    def for_module(self, path: str) -> Self:
        """The configuration with the rank and the alpha that the patterns give the layer at a path."""
        rank, alpha = pattern_value(self.rank_pattern, path, self.r), pattern_value(self.alpha_pattern, path, self.lora_alpha)
        return replace(self, r=int(rank), lora_alpha=alpha, rank_pattern={}, alpha_pattern={})

    def check(self, layer: nn.Module) -> None:
        """Raise where the layer cannot take the adapter: TypeError or ValueError, RuntimeError where another one is merged."""
        if isinstance(layer, LowRankLinear):
            layer.check_new(self.adapter_name)
        else:
            super().check(layer)
            check_base_layer("base_layer", layer)

    def build(self, linear: nn.Linear) -> LowRankLinear:
        """The layer with one adapter."""
        layer = LowRankLinear(linear)
        self.extend(layer)
        return layer

    def extend(self, layer: nn.Module) -> bool:
        """Give an adapted layer one more adapter."""
        if not isinstance(layer, LowRankLinear):
            return False
        layer.add_adapter(
            self.adapter_name, self.r, self.lora_alpha, dropout=self.lora_dropout, use_rslora=self.use_rslora, use_dora=self.use_dora
        )
        return True

    def is_adapted(self, layer: nn.Module) -> bool:
        """Whether the layer is a :class:`LowRankLinear`."""
        return isinstance(layer, LowRankLinear)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], adapter_name: str = "default") -> LowRankConfig:
        """The configuration that ``adapter_config.json`` holds.

        Raises
        ------
        TypeError
            If it is another kind of adapter than LoRA.
        ValueError
            If it asks for what a :class:`LowRankLinear` does not have: trained biases, a bias of the adapter, ``fan_in_fan_out``,
            parameters that are no module, tokens to train, or some layers by number; or as :func:`check_plain_lora` does.
        """
        if config.get("peft_type", "LORA") != "LORA":
            raise TypeError(f"peft_type: expected LORA, got {config['peft_type']}")
        if config.get("bias", "none") != "none":
            raise ValueError(f"bias: expected 'none', got {config['bias']!r}")
        check_plain_lora(config)
        for name in ("lora_bias", "fan_in_fan_out", "target_parameters", "layers_to_transform", "trainable_token_indices"):
            if _is_set(config, name):
                raise ValueError(f"{name}: {config[name]!r} is not supported")
        target = config.get("target_modules")
        if not target:
            raise ValueError("target_modules: expected names or a pattern, got none")
        listed = ("exclude_modules", "modules_to_save")
        return cls(
            target_modules=target,
            **{name: config[name] for name in listed if config.get(name)},
            **{name: config[name] for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora") if name in config},
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            adapter_name=adapter_name,
        )


# What PEFT computes otherwise than by adding the factors' product to a linear layer.
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
# Initialisations that change the base's weight too; its adapters are to the changed one.
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


def _is_set(config: Mapping[str, Any], name: str) -> bool:
    # A layer by its number may be 0.
    value = config.get(name)
    return value is not None and value is not False and value not in ([], {})


def check_plain_lora(config: Mapping[str, Any]) -> None:
    """Raise ValueError where factors that PEFT wrote are not all there is to add to the base's weight.

    That is so for variants of LoRA with a computation of their own, and after initialisations such as PiSSA's, which take the first product
    of the factors off the base: PEFT does so again when it loads the file, unless it was converted on saving.
    """
    for name in _VARIANTS:
        if _is_set(config, name):
            raise ValueError(f"{name}: {config[name]!r} is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ValueError(f"init_lora_weights: {start!r} changes the base; save the adapter converted to a plain one, as PEFT describes")


def pattern_value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern that matches the end of a path, as PEFT finds it."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), default)
