"""Puts adapted layers in the place of a model's linear layers, chosen by name as PEFT chooses them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Self

from torch import nn

from taskloom.nn.fused_linear import split_fused


@dataclass(frozen=True, kw_only=True)
class LayerConfig(ABC):
    """Which layers of a model are adapted, with PEFT's names; a subclass says into what.

    Attributes
    ----------
    target_modules
        Names: a layer is meant by its whole path or by the end of it (``"q_proj"``, ``"attn.proj"``). A string is a regular expression
        that has to match the whole path; ``"all-linear"`` means every ``nn.Linear``.
    exclude_modules
        In the same way: layers that are left alone. Default: none.
    modules_to_save
        Names of modules that are trained and saved as they are, such as a classifier. Default: none.
    split_qkv
        Whether timm's fused ``qkv`` layers are taken apart first, so that ``q``, ``k`` and ``v`` are layers. Default False.
    """

    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    split_qkv: bool = False

    def for_module(self, path: str) -> Self:
        """The configuration of the layer at a path; here the same for all."""
        return self

    @abstractmethod
    def build(self, linear: nn.Linear) -> nn.Module:
        """The adapted layer that takes the place of ``linear``."""

    def extend(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is adapted already and has taken this configuration too."""
        return False

    def is_adapted(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is what this configuration builds, so that nothing inside it is a target."""
        return False


def matches(target: str | Sequence[str], path: str) -> bool:
    """Whether PEFT's ``target_modules`` mean the module at a path."""
    if isinstance(target, str):
        return re.fullmatch(target, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in target)


def _inside(path: str, outer: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:end]) in outer for end in range(1, len(parts)))


def _saved(config: LayerConfig, path: str) -> bool:
    """Whether a module is one of modules_to_save or lies inside one."""
    return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in config.modules_to_save)


def _targets(model: nn.Module, config: LayerConfig) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    adapted = {path for path, module in modules.items() if config.is_adapted(module)}
    every = config.target_modules == "all-linear"
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if not path or _inside(path, adapted) or _saved(config, path) or matches(config.exclude_modules, path):
            continue
        if isinstance(module, nn.Linear) if every else matches(config.target_modules, path):
            found[path] = module
    return found


def _missing(model: nn.Module, config: LayerConfig) -> ValueError:
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path]
    ends = sorted({path.rpartition(".")[2] for path in layers})
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules)
    near = list(dict.fromkeys(one for name in wanted for one in get_close_matches(name.rpartition(".")[2], ends, n=3, cutoff=0.5)))
    hint = (
        f"; did you mean {', '.join(map(repr, near))}?" if near else f"; the linear layers end in {', '.join(map(repr, ends)) or 'nothing'}"
    )
    return ValueError(f"target_modules: {config.target_modules!r} names no layer of {type(model).__name__}{hint}")


def inject(model: nn.Module, config: LayerConfig, *, freeze: bool = True) -> list[str]:
    """Put adapted layers in the place of a model's linear layers, in place.

    Parameters
    ----------
    model
        Any module.
    config
        Which layers, and into what: :class:`LowRankConfig` or another :class:`LayerConfig`.
    freeze
        Whether parameters that were in the model before stop requiring grad, but for those of ``modules_to_save``, which start to.
        Default True, as with PEFT's ``get_peft_model``.

    Returns
    -------
    list of str
        The paths of the layers that were replaced, or that took one more adapter, in the model's order.

    Raises
    ------
    ValueError
        If ``target_modules`` or a name of ``modules_to_save`` means nothing in the model; close names are told.
    TypeError
        If a target is no ``nn.Linear``. Nothing is changed in either case, except that ``qkv`` layers may have been taken apart.
    """
    if config.split_qkv:
        split_fused(model)
    targets = _targets(model, config)
    if not targets:
        raise _missing(model, config)
    for path, module in targets.items():
        if not isinstance(module, nn.Linear) and not config.is_adapted(module):
            raise TypeError(f"target_modules: {path}: expected nn.Linear, got {type(module).__name__}")
    paths = [path for path, _ in model.named_modules()]
    for name in config.modules_to_save:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise ValueError(f"modules_to_save: {name!r} names no module of {type(model).__name__}")
    adapted = {path for path, module in model.named_modules() if config.is_adapted(module)}
    if freeze:
        for path, parameter in model.named_parameters():
            if not _inside(path, adapted):
                parameter.requires_grad_(_saved(config, path.rpartition(".")[0]))
    for path, module in targets.items():
        own = config.for_module(path)
        if own.extend(module):
            continue
        assert isinstance(module, nn.Linear)
        built = own.build(module)
        built.train(module.training)
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, built)
    return list(targets)
