"""What SNELL and SNELLA adapt and how, with PEFT's names and the papers' defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from taskloom.nn import KernelConfig, KernelLinear
from taskloom.nn.base_layers import check_base_layer
from taskloom.nn.inject import LayerConfig, matches

# timm's names after qkv is taken apart. "proj" alone would also mean the convolution of the patch embedding.
TARGETS = ("q", "k", "v", "attn.proj", "fc1", "fc2")


@dataclass(frozen=True, kw_only=True)
class KernelLoraConfig(LayerConfig):
    """Which layers get a kernel update, and what it is like; the defaults are SNELLA's.

    Attributes
    ----------
    target_modules, exclude_modules, modules_to_save
        As of :class:`taskloom.nn.inject.LayerConfig`. Default targets: q, k, v, attn.proj, fc1, fc2.
    split_qkv
        Whether fused ``qkv`` layers are taken apart first. Default True.
    r, kernel, chunks, scale, sparsity, gate, learn_coef
        As of :class:`taskloom.nn.KernelConfig`. Defaults 32, ``"mixk"``, 2, 0.1, 0, ``"magnitude"``, False.
    dropout, drop_path
        Of a branch's input, and of the branch per sample, in training. Default 0.1 and 0.1.
    no_dropout_modules
        Targets without dropout, by name. Default attn.proj, as in the official code.
    trainable_parameters
        Names of parameters outside of layers that are trained too, such as ``"cls_token"``, by path or its end. Default: none.

    Raises
    ------
    TypeError, ValueError
        As of :class:`taskloom.nn.KernelConfig`.
    """

    target_modules: str | Sequence[str] = TARGETS
    split_qkv: bool = True
    r: int = 32
    kernel: str = "mixk"
    chunks: int = 2
    scale: float = 0.1
    sparsity: float = 0.0
    gate: str | None = "magnitude"
    learn_coef: bool = False
    dropout: float = 0.1
    drop_path: float = 0.1
    no_dropout_modules: str | Sequence[str] = ("attn.proj",)
    trainable_parameters: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.layer_config()

    def layer_config(self) -> KernelConfig:
        """What one layer is built from."""
        names = ("r", "kernel", "chunks", "scale", "sparsity", "gate", "learn_coef", "dropout", "drop_path")
        return KernelConfig(**{name: getattr(self, name) for name in names})

    def for_module(self, path: str) -> Self:
        """The configuration of the layer at a path: without dropout where ``no_dropout_modules`` name it."""
        return replace(self, dropout=0.0) if matches(self.no_dropout_modules, path) else self

    def check(self, layer: nn.Module) -> None:
        """Raise TypeError or ValueError where :class:`taskloom.nn.KernelLinear` cannot take the place of ``layer``."""
        super().check(layer)
        check_base_layer("linear", layer)

    def build(self, linear: nn.Linear) -> KernelLinear:
        """The layer with its kernel update."""
        return KernelLinear(linear, self.layer_config())

    def is_adapted(self, layer: nn.Module) -> bool:
        """Whether the layer is a :class:`taskloom.nn.KernelLinear`."""
        return isinstance(layer, KernelLinear)


def snell_config(r: int = 8, sparsity: float = 0.9, **options: Any) -> KernelLoraConfig:
    """SNELL: the piecewise linear kernel, one sparsity for all layers.

    Parameters
    ----------
    r
        8, 16 or 32 in the paper. Default 8.
    sparsity
        Share of each update that is zero, tuned per task in the paper. Default 0.9. At 0 there is no gate, as in the official code.
    **options
        Other fields of :class:`KernelLoraConfig`.
    """
    fixed: dict[str, Any] = {"kernel": "pwl", "gate": "magnitude" if sparsity else None}
    return KernelLoraConfig(r=r, sparsity=sparsity, **{**fixed, **options})


def snella_config(r: int = 32, sparsity: float = 0.01, **options: Any) -> KernelLoraConfig:
    """SNELLA: the mixed kernel, whose sparsity a :class:`SparsityAllocator` then raises per layer.

    Parameters
    ----------
    r
        Default 32, as in the official scripts.
    sparsity
        At the start; the allocator's ``init``. Default 0.01, that of the scripts for VTAB-1k; those for FGVC have 0.
    **options
        Other fields of :class:`KernelLoraConfig`.
    """
    fixed: dict[str, Any] = {"kernel": "mixk", "gate": "magnitude"}
    return KernelLoraConfig(r=r, sparsity=sparsity, **{**fixed, **options})
