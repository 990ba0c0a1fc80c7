"""Kernel updates in a whole model: put in, saved, loaded, and folded into the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from taskloom.methods.sparsity.snella.config import KernelLoraConfig
from taskloom.nn import KernelLinear
from taskloom.nn.fused_linear import SplitLinear, split_fused
from taskloom.nn.inject import inject


def kernel_layers(model: nn.Module) -> dict[str, KernelLinear]:
    """The layers with kernel updates, by path.

    Raises
    ------
    ValueError
        If there are none.
    """
    found = {path: module for path, module in model.named_modules() if isinstance(module, KernelLinear)}
    if not found:
        raise ValueError(f"model: expected layers that inject_kernel_lora made, {type(model).__name__} has none")
    return found


def inject_kernel_lora(model: nn.Module, config: KernelLoraConfig) -> list[str]:
    """Give a model's linear layers kernel updates, in place, and freeze all else.

    Parameters
    ----------
    model
        Any module; the defaults of the configuration are made for timm's vision transformers.
    config
        A :class:`KernelLoraConfig`.

    Returns
    -------
    list of str
        The paths of the layers, in the model's order; those of a fused layer end in ``qkv.q`` and so on.

    Raises
    ------
    ValueError
        If ``target_modules``, a name of ``modules_to_save`` or one of ``trainable_parameters`` means nothing in the model; close names of
        layers are told.
    TypeError
        If a target is no ``nn.Linear``. Nothing is changed in either case, except that ``qkv`` layers may have been taken apart.
    """
    if config.split_qkv:
        split_fused(model)
    trained: list[nn.Parameter] = []
    for name in config.trainable_parameters:
        named = [one for path, one in model.named_parameters() if path == name or path.endswith(f".{name}")]
        if not named:
            raise ValueError(f"trainable_parameters: {name!r} names no parameter of {type(model).__name__}")
        trained += named
    paths = inject(model, config)
    for parameter in trained:
        parameter.requires_grad_(True)
    return paths


def kernel_lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What was trained and nothing of the frozen base: the adapters with their sparsities, and other parameters that require grad.

    Returns
    -------
    dict
        ``PATH.A``, ``PATH.B``, ``PATH.sparsity`` and so on; tensors share memory with the model's. safetensors can write it.

    Raises
    ------
    ValueError
        If the model has no kernel update.
    """
    layers = kernel_layers(model)
    state = {f"{path}.{name}": tensor for path, layer in layers.items() for name, tensor in layer.adapter_state_dict().items()}
    others = {path: one.detach() for path, one in model.named_parameters() if one.requires_grad and path.rpartition(".")[0] not in layers}
    return state | others


@torch.no_grad()
def load_kernel_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what :func:`kernel_lora_state_dict` gave into a model that was injected with the same configuration.

    Raises
    ------
    ValueError
        If names or shapes are not those of this model. Nothing is changed then.
    RuntimeError
        If a layer is merged. Nothing is changed then.
    """
    own = kernel_lora_state_dict(model)
    for key in (*(key for key in own if key not in state), *(key for key in state if key not in own)):
        raise ValueError(f"state: {key!r} is {'missing' if key in own else 'not part of this model'}")
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            raise ValueError(f"state: {key!r}: expected shape {tuple(tensor.shape)}, got {tuple(state[key].shape)}")
    layers = kernel_layers(model)
    for path, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"model: {path}: the update is merged; call unmerge() before loading another")
        if not 0 <= float(state[f"{path}.sparsity"]) <= 1:
            raise ValueError(f"state: '{path}.sparsity': expected a share from 0 to 1, got {float(state[f'{path}.sparsity'])}")
    for path, layer in layers.items():
        layer.load_adapter_state_dict({name: state[f"{path}.{name}"] for name in layer.adapter_state_dict()})
        for name in layer.adapter_state_dict():
            own.pop(f"{path}.{name}")
    for key, tensor in own.items():
        tensor.copy_(state[key])


def fold_kernel_lora(model: nn.Module) -> nn.Module:
    """Fold every update into its weight for inference, in place: plain layers again, and one ``qkv`` where it was taken apart.

    Returns
    -------
    nn.Module
        The model, or the layer that takes its place where the model itself is one with an update.

    Raises
    ------
    ValueError
        If the model has no kernel update.
    """
    for layer in kernel_layers(model).values():
        if not layer.merged:
            layer.merge()
        if layer is model:
            return layer.base_layer
    # A layer may be in several places.
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, KernelLinear):
            _replace(model, path, layer.base_layer)
    for path, split in [(path, module) for path, module in model.named_modules() if isinstance(module, SplitLinear)]:
        if path and all(type(part) is nn.Linear for part in split.children()):
            _replace(model, path, split.fuse())
    return model


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
