"""Where adapters come from: PEFT's LoRA files, or fine-tuned weights cut to a rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from taskloom.methods.merging.rmm.space import Factors
from taskloom.nn.adapter_files import part_of
from taskloom.nn.lowrank_config import check_plain_lora, pattern_value

State = Mapping[str, Tensor]

_REFUSED = {"lora_magnitude_vector": "DoRA", "lora_embedding_A": "LoRA of an embedding", "bias": "a LoRA with biases"}


def _folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    config = file.parent / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path}: expected a PEFT adapter (adapter_model.safetensors), found none")
    return load_file(file), json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None


def _check_config(source: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise TypeError(f"{source}: expected a LoRA adapter, got {kind}")
    if config.get("use_dora"):
        raise ValueError(f"{source}: DoRA adapters are not low-rank changes of a weight")
    try:
        check_plain_lora(config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise ValueError(f"{source}: adapters that carry biases are refused, this one has bias={config.get('bias')!r}")


def _scaling(config: Mapping[str, Any], layer: str, rank: int) -> float:
    alpha = pattern_value(config.get("alpha_pattern") or {}, layer, float(config.get("lora_alpha", rank)))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def adapter_of_state(state: State, config: Mapping[str, Any], source: str = "adapter") -> dict[str, Factors]:
    """A, B of each layer from a PEFT LoRA state dict, the scaling of its config folded into A.

    Raises
    ------
    TypeError
        If it is an adapter of another type, which the message names.
    ValueError
        If it is DoRA's, carries biases, or a layer lacks one of its factors.
    """
    _check_config(source, config)
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        for part, kind in _REFUSED.items():
            if part in name.split("."):
                raise ValueError(f"{source}: {name!r} belongs to {kind}, which is refused")
        place = part_of(name)
        if place is None:
            raise TypeError(f"{source}: expected only LoRA factors (lora_A.weight, lora_B.weight), got {name!r}")
        factors.setdefault(place[0], {})[place[1]] = tensor
    adapter = {}
    for layer, found in factors.items():
        if len(found) != 2:
            raise ValueError(f"{source}: layer {layer!r} has {next(iter(found))} alone")
        down, up = found["lora_A.weight"], found["lora_B.weight"]
        adapter[layer] = (up * _scaling(config, layer, down.shape[0]), down)
    return adapter


def from_peft(
    adapters: Mapping[str, State | str | PathLike[str]] | Sequence[State | str | PathLike[str]],
    *,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
) -> dict[str, dict[str, Factors]]:
    """Adapters for :func:`fit_rmm` from PEFT's LoRA files or state dicts.

    Parameters
    ----------
    adapters
        A folder, a safetensors file, or a state dict each; by task, or in a sequence: tasks are then called by the file's folder, or
        ``task-0``, ``task-1``, ...
    lora_alpha, use_rslora
        For state dicts, and files without ``adapter_config.json`` beside them: the scaling is ``lora_alpha / r`` (``/ sqrt(r)`` with
        rslora). Default: ``lora_alpha`` equal to the rank.

    Raises
    ------
    TypeError, ValueError, FileNotFoundError
        As :func:`adapter_of_state` does, or where there is no adapter.
    """
    named: Mapping[str, State | str | PathLike[str]]
    if isinstance(adapters, Mapping):
        named = adapters
    else:
        named = {f"task-{place}" if isinstance(one, Mapping) else Path(one).stem: one for place, one in enumerate(adapters)}
        if len(named) != len(adapters):
            raise ValueError("adapters: two of the paths have one name; give a mapping from task to path")
    given = {"use_rslora": use_rslora, **({} if lora_alpha is None else {"lora_alpha": lora_alpha})}
    read = {}
    for task, one in named.items():
        state, config = (one, None) if isinstance(one, Mapping) else _folder(Path(one))
        read[task] = adapter_of_state(state, given if config is None else config, task)
    return read


def truncated_svd(delta: Tensor, rank: int) -> Factors:
    """A = U sqrt(S), B = sqrt(S) V^T of the largest ``rank`` singular values; each column's largest entry in U is positive.

    The even split of S is inferred: the paper does not say how it is shared.
    """
    left, values, right = torch.linalg.svd(delta.to(torch.promote_types(delta.dtype, torch.float32)), full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    root = values.sqrt()
    return left * sign * root, (right * sign.T) * root[:, None]


def from_checkpoints(
    base: State | str | PathLike[str], tuned: Mapping[str, State | str | PathLike[str]], rank: int, *, names: Sequence[str] | None = None
) -> dict[str, dict[str, Factors]]:
    """Adapters from full fine-tunings: a truncated SVD of each two-dimensional weight's change.

    Parameters
    ----------
    base, tuned
        State dicts, or safetensors files; ``tuned`` by task.
    rank
        Of the adapters, 1 or more, at most the smaller side of each weight.
    names
        Weights to take, such as ``["layers.0.linear.weight"]``. Default: every floating-point tensor with two dimensions that changed in
        some task. The layer is called by the weight's name without ``.weight``.

    Raises
    ------
    TypeError
        If the rank is no integer.
    ValueError
        If a weight is missing, of another shape, or smaller than the rank, or its change is not finite.
    """
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: expected an integer, got {type(rank).__name__}")
    if rank < 1:
        raise ValueError(f"rank: expected 1 or more, got {rank}")
    origin = base if isinstance(base, Mapping) else load_file(base)
    states = {task: one if isinstance(one, Mapping) else load_file(one) for task, one in tuned.items()}
    if names is None:
        matrices = [name for name, value in origin.items() if value.dim() == 2 and value.is_floating_point()]
        names = [
            name for name in matrices if any(name in state and not torch.equal(state[name], origin[name]) for state in states.values())
        ]
    adapters: dict[str, dict[str, Factors]] = {task: {} for task in states}
    for name in names:
        for task, state in states.items():
            if name not in origin or name not in state or state[name].shape != origin[name].shape:
                raise ValueError(f"tuned: task {task!r}: expected {name!r} of the base's shape")
            if rank > min(origin[name].shape):
                raise ValueError(f"rank: expected at most {min(origin[name].shape)}, the smaller side of {name!r}, got {rank}")
            dtype = torch.promote_types(origin[name].dtype, torch.float32)
            delta = state[name].to(dtype) - origin[name].to(dtype)
            if not torch.isfinite(delta).all():
                raise ValueError(f"tuned: task {task!r}: {name!r} differs from the base by values that are not finite")
            a, b = truncated_svd(delta, rank)
            adapters[task][name.removesuffix(".weight")] = (a.to(origin[name].dtype), b.to(origin[name].dtype))
    return adapters
