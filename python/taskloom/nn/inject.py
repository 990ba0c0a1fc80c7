"""Puts adapted layers in the place of a model's linear layers, chosen by name as PEFT chooses them."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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

    def check(self, layer: nn.Module) -> None:
        """Raise where ``layer`` cannot be adapted by this configuration; nothing is changed.

        Raises
        ------
        TypeError
            If it is no ``nn.Linear``.
        ValueError
            If it is adapted already.
        """
        if self.is_adapted(layer):
            raise ValueError(f"expected a layer that is not adapted yet, got {type(layer).__name__}")
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"expected nn.Linear, got {type(layer).__name__}")

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


def _paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All paths of each module: a module may be in several places."""
    found: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(path)
    return found


def _targets(model: nn.Module, config: LayerConfig) -> dict[nn.Module, list[str]]:
    """The modules that are meant by one of their paths, with all of these."""
    places = _paths(model)
    # A layer that another configuration adapted would not call what took the place of its base.
    around = (module for module in places if config.is_adapted(module) or isinstance(getattr(module, "base_layer", None), nn.Linear))
    adapted = {path for module in around for path in places[module]}
    every = config.target_modules == "all-linear"
    found: dict[nn.Module, list[str]] = {}
    for module, paths in places.items():
        if any(not path or _inside(path, adapted) or _saved(config, path) or matches(config.exclude_modules, path) for path in paths):
            continue
        if (
            isinstance(module, nn.Linear) or config.is_adapted(module)
            if every
            else any(matches(config.target_modules, path) for path in paths)
        ):
            found[module] = paths
    return found


def _check_targets(model: nn.Module, config: LayerConfig, targets: Mapping[nn.Module, list[str]]) -> None:
    """Raise where a target cannot be adapted, and warn where its weight belongs to something else too."""
    readers = {id(one.out_proj) for one in model.modules() if isinstance(one, nn.MultiheadAttention)}
    owners: dict[nn.Parameter, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(path)
    for module, (path, *others) in targets.items():
        if id(module) in readers:
            raise TypeError(
                f"target_modules: {path}: nn.MultiheadAttention reads its weight and never calls it; name it in exclude_modules"
            )
        try:
            config.for_module(path).check(module)
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"target_modules: {path}: {error}") from None
        weight = module._parameters.get("weight")
        own = {f"{one}.weight" for one in (path, *others)}
        tied = [] if weight is None else [one for one in owners[weight] if one not in own]
        if tied:
            warnings.warn(f"inject: {path}.weight is {', '.join(tied)} too; merging adapters into it changes both", stacklevel=3)


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
        The paths of the layers that were replaced, or that took one more adapter, in the model's order. A layer that is in several places
        is replaced in all of them if one is meant; its first path is told.

    Raises
    ------
    ValueError
        If ``target_modules`` or a name of ``modules_to_save`` means nothing in the model; close names are told. If a target is adapted
        already and cannot take this configuration too.
    TypeError
        If a target is no ``nn.Linear``, or one that the adapted layer could not compute in its stead: quantised, parametrised, with a
        forward pass of its own, or read by ``nn.MultiheadAttention``.
    RuntimeError
        If an adapter of a target is merged. Nothing is changed in any case, except that ``qkv`` layers may have been taken apart.

    Warns
    -----
    UserWarning
        If a target's weight is another module's too, such as that of an embedding.
    """
    if config.split_qkv:
        split_fused(model)
    targets = _targets(model, config)
    if not targets:
        raise _missing(model, config)
    _check_targets(model, config, targets)
    paths = [path for path, _ in model.named_modules()]
    for name in config.modules_to_save:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise ValueError(f"modules_to_save: {name!r} names no module of {type(model).__name__}")
    adapted = {path for path, module in model.named_modules() if config.is_adapted(module)}
    if freeze:
        for path, parameter in model.named_parameters():
            if not _inside(path, adapted):
                parameter.requires_grad_(_saved(config, path.rpartition(".")[0]))
    for module, (path, *others) in targets.items():
        own = config.for_module(path)
        if own.extend(module):
            continue
        assert isinstance(module, nn.Linear)
        built = own.build(module)
        built.train(module.training)
        for place in (path, *others):
            parent, _, last = place.rpartition(".")
            setattr(model.get_submodule(parent), last, built)
    return [path for path, *_ in targets.values()]
