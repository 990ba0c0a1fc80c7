"""Adapters of a model as PEFT's files: ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskloom.nn.inject import inject, matches
from taskloom.nn.lowrank_config import LowRankConfig
from taskloom.nn.lowrank_linear import LowRankLinear
from taskloom.nn.lowrank_parts import Settings

PREFIX = "base_model.model."
_TENSORS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def _layers(model: nn.Module, adapter_name: str) -> dict[str, LowRankLinear]:
    found = {path: one for path, one in model.named_modules() if isinstance(one, LowRankLinear) and adapter_name in one.settings}
    if not found:
        known = sorted({name for one in model.modules() if isinstance(one, LowRankLinear) for name in one.settings})
        raise ValueError(f"adapter_name: no layer has an adapter {adapter_name!r}, there are {', '.join(map(repr, known)) or 'none'}")
    return found


def _saved_modules(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name in names:
        named = {path: module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")}
        if not named:
            raise ValueError(f"modules_to_save: {name!r} names no module of {type(model).__name__}")
        found |= named
    return found


def adapter_state_dict(model: nn.Module, adapter_name: str = "default", modules_to_save: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of one adapter of a model, and nothing of the base, under the names that PEFT's files have.

    Parameters
    ----------
    model
        With layers that :func:`taskloom.nn.inject` made.
    adapter_name
        Default ``"default"``.
    modules_to_save
        Names of modules whose own tensors belong to the adapter, as for :func:`taskloom.nn.inject`. Default: none.

    Returns
    -------
    dict
        ``base_model.model.PATH.lora_A.weight`` and so on; tensors share memory with the model's.

    Raises
    ------
    ValueError
        If no layer has an adapter of that name, or a name of ``modules_to_save`` means nothing.
    """
    state = {
        f"{PREFIX}{path}.{part}": tensor
        for path, layer in _layers(model, adapter_name).items()
        for part, tensor in layer.adapter_state_dict(adapter_name).items()
    }
    for path, module in _saved_modules(model, modules_to_save).items():
        state |= {f"{PREFIX}{path}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
    return state


def _exact_targets(model: nn.Module, paths: list[str]) -> str | list[str]:
    """The layers' own paths, as a pattern where a path is the end of another layer's too."""
    linear = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, LowRankLinear)) and path]
    inside = tuple(f"{path}." for path in paths)
    beside = [path for path in linear if path not in paths and not path.startswith(inside)]
    return "|".join(map(re.escape, paths)) if any(matches(paths, path) for path in beside) else paths


def _described(model: nn.Module, layers: Mapping[str, LowRankLinear], name: str, modules_to_save: tuple[str, ...]) -> dict[str, Any]:
    """What adapter_config.json says of an adapter, from its layers."""
    settings = {path: layer.settings[name] for path, layer in layers.items()}
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*((one.r, one.alpha) for one in settings.values()), strict=True))
    rates = {one.p if isinstance(one, nn.Dropout) else 0.0 for one in (layer.lora_dropout[name] for layer in layers.values())}
    kinds = {(one.use_rslora, one.use_dora) for one in settings.values()}
    if len(rates) > 1 or len(kinds) > 1:
        raise ValueError(f"adapter_name: the layers of {name!r} differ in dropout, use_rslora or use_dora, which a PEFT file cannot say")
    ((use_rslora, use_dora),) = kinds
    # A pattern is looked for at the end of a path, the first one counts: longer ones go first.
    ordered = sorted(settings, key=len, reverse=True)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": rates.pop(),
        "use_rslora": use_rslora,
        "use_dora": use_dora,
        "target_modules": _exact_targets(model, list(layers)),
        "modules_to_save": list(modules_to_save) or None,
        "rank_pattern": {re.escape(path): settings[path].r for path in ordered if settings[path].r != rank},
        "alpha_pattern": {re.escape(path): settings[path].alpha for path in ordered if settings[path].alpha != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def save_adapter(
    model: nn.Module, folder: str | PathLike[str], adapter_name: str = "default", modules_to_save: tuple[str, ...] = ()
) -> None:
    """Write one adapter of a model as PEFT writes it; each file takes its name only when it is whole.

    Parameters
    ----------
    model, adapter_name, modules_to_save
        As in :func:`adapter_state_dict`.
    folder
        Made where it is missing.

    Raises
    ------
    ValueError
        If no layer has an adapter of that name, its layers differ in what a PEFT file says once for all, or a name of
        ``modules_to_save`` means nothing.
    """
    config = _described(model, _layers(model, adapter_name), adapter_name, modules_to_save)
    write_adapter(adapter_state_dict(model, adapter_name, modules_to_save), config, folder)


def write_adapter(state: Mapping[str, Tensor], config: Mapping[str, Any], folder: str | PathLike[str]) -> None:
    """Write tensors and a configuration as PEFT's two files; each takes its name only when it is whole."""
    from safetensors.torch import save_file

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors, described = target / f".{_TENSORS}.part", target / f".{_CONFIG}.part"
    try:
        save_file(_apart(state), tensors, metadata={"format": "pt"})
        described.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(tensors, target / _TENSORS)
        os.replace(described, target / _CONFIG)
    finally:
        for part in (tensors, described):
            part.unlink(missing_ok=True)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, and copied where another one has the same memory: a file holds each by itself."""
    found: dict[str, Tensor] = {}
    memory = set()
    for key, tensor in state.items():
        own = tensor.contiguous().cpu()
        place = own.untyped_storage().data_ptr()
        found[key] = own.clone() if place in memory else own
        memory.add(place)
    return found


def part_of(key: str) -> tuple[str, str] | None:
    """The layer and the part (``lora_A.weight``, ``lora_B.weight``, ``lora_magnitude_vector``) that a name in a PEFT file means.

    None where it means neither. Older files have the adapter's name ``default``, or ``weight``, in places where newer ones have not.
    """
    path = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".default")
    for part in PARTS:
        layer, found, rest = path.rpartition(f".{part.removesuffix('.weight')}")
        if found and not rest:
            return layer, part
    return None


@dataclass(frozen=True)
class _Read:
    """An adapter's file: its configuration, the factors of each layer, and the tensors of other modules by their path in the model."""

    config: LowRankConfig
    layers: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]


def _read(folder: Path, adapter_name: str) -> _Read:
    # The modules work where torch alone is installed; only files need more.
    from safetensors.torch import load_file

    for name in (_TENSORS, _CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: expected a PEFT adapter, {name} is missing")
    try:
        config = LowRankConfig.from_peft(json.loads((folder / _CONFIG).read_text(encoding="utf-8")), adapter_name)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{folder / _CONFIG}: {error}") from None
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / _TENSORS).items():
        found = part_of(key)
        if found is None:
            others[key.removeprefix(PREFIX)] = tensor
        else:
            layers.setdefault(found[0], {})[found[1]] = tensor
    return _Read(config, layers, others)


def read_factors(folder: str | PathLike[str]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The factors of a PEFT adapter of linear layers, without a model.

    Parameters
    ----------
    folder
        With ``adapter_model.safetensors`` and ``adapter_config.json``.

    Returns
    -------
    dict
        ``(A, B, scale)`` by the layer's path: A ``[r, in]`` and B ``[out, r]`` in the file's dtype; the change of the layer's weight is
        ``scale * B A``.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    TypeError
        If it is another kind of adapter than LoRA.
    ValueError
        If it is DoRA's, which is no such change, has tensors that are no factors, or a layer's do not fit each other.
    """
    source = Path(folder)
    read = _read(source, "default")
    if read.config.use_dora:
        raise ValueError(f"{source}: an adapter of DoRA is no low-rank change of a weight")
    if read.others:
        raise ValueError(f"{source}: expected LoRA factors of linear layers alone, got {next(iter(read.others))!r}")
    if not read.layers:
        raise ValueError(f"{source}: the file has no LoRA factors")
    found = {}
    for path, parts in read.layers.items():
        if len(parts) != 2:
            raise ValueError(f"{source}: layer {path!r}: expected lora_A.weight and lora_B.weight, got {', '.join(parts)}")
        right, left = parts["lora_A.weight"], parts["lora_B.weight"]
        own = read.config.for_module(path)
        if right.dim() != 2 or left.dim() != 2 or not right.shape[0] == left.shape[1] == own.r:
            raise ValueError(f"{source}: layer {path!r}: expected rank {own.r}, got {tuple(right.shape)} and {tuple(left.shape)}")
        found[path] = right, left, Settings(own.r, own.lora_alpha, own.use_rslora, False).scaling
    return found


def _check_layers(model: nn.Module, read: _Read, source: Path) -> None:
    """Raise where the file does not fit the model."""
    modules = dict(model.named_modules())
    wanted = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if read.config.use_dora else set())
    if not read.layers:
        raise ValueError(f"{source}: the file has no LoRA factors")
    for path, parts in read.layers.items():
        module = modules.get(path)
        if not isinstance(module, (nn.Linear, LowRankLinear)):
            found = "missing" if module is None else type(module).__name__
            raise ValueError(f"{source}: layer {path!r}: expected nn.Linear in the model, it is {found}")
        if set(parts) != wanted:
            raise ValueError(f"{source}: layer {path!r}: expected {', '.join(sorted(wanted))}, got {', '.join(sorted(parts))}")
        rank = read.config.for_module(path).r
        inputs, outputs = module.in_features, module.out_features
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A.weight": (rank, inputs),
            "lora_B.weight": (outputs, rank),
            "lora_magnitude_vector": (outputs,),
        }
        for part, tensor in parts.items():
            if tensor.shape != shapes[part]:
                raise ValueError(f"{source}: layer {path!r}: {part}: expected shape {shapes[part]}, got {tuple(tensor.shape)}")
        if isinstance(module, LowRankLinear) and read.config.adapter_name in module.settings:
            raise ValueError(f"{source}: layer {path!r} has an adapter {read.config.adapter_name!r} already")
    state = model.state_dict()
    for path, tensor in read.others.items():
        if path not in state or not any(path.startswith(f"{name}.") or f".{name}." in path for name in read.config.modules_to_save):
            raise ValueError(f"{source}: {path!r} is neither a LoRA factor nor part of modules_to_save")
        if state[path].shape != tensor.shape:
            raise ValueError(f"{source}: {path!r}: expected shape {tuple(state[path].shape)}, got {tuple(tensor.shape)}")


def load_adapter(model: nn.Module, folder: str | PathLike[str], adapter_name: str = "default", *, trainable: bool = False) -> list[str]:
    """Read an adapter that PEFT or :func:`save_adapter` wrote into a model, whose layers are replaced where they are not yet.

    Parameters
    ----------
    model
        The base model, or one with other adapters.
    folder
        With ``adapter_model.safetensors`` and ``adapter_config.json``.
    adapter_name
        The name that it gets. Default ``"default"``.
    trainable
        Whether its factors require grad. Default False.

    Returns
    -------
    list of str
        The paths of its layers.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    TypeError
        If it is another kind of adapter than LoRA.
    ValueError
        If it asks for what :class:`LowRankLinear` does not have, or does not fit the model. Nothing is changed then.
    """
    source = Path(folder)
    read = _read(source, adapter_name)
    _check_layers(model, read, source)
    # The file's layers themselves, as each of its paths may be the end of another one's.
    exact = "|".join(map(re.escape, read.layers))
    inject(model, replace(read.config, target_modules=exact, exclude_modules=(), modules_to_save=()), freeze=False)
    with torch.no_grad():
        for path, parts in read.layers.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, LowRankLinear)
            for part, tensor in layer.adapter_state_dict(adapter_name).items():
                tensor.copy_(parts[part])
            for parameter in layer.adapter_parameters(adapter_name):
                parameter.requires_grad_(trainable)
        state = model.state_dict()
        for path, tensor in read.others.items():
            state[path].copy_(tensor)
    return list(read.layers)
