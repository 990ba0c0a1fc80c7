"""Routing for models of others, in place: DiT of facebookresearch, and ADM-like U-Nets."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from taskloom.methods.channels.dtr.dit import RoutedDiTBlock
from taskloom.methods.channels.dtr.routing import dtr_window
from taskloom.methods.channels.dtr.scope import check_can_tell, tell_timesteps
from taskloom.methods.channels.dtr.unet import (
    ATTENTION_PARTS,
    RESIDUAL_PARTS,
    group_norm,
    residual_norm,
    routed_attention_members,
    routed_residual_members,
)
from taskloom.nn import TaskWindow
from taskloom.nn.change_class import change_class

Model = TypeVar("Model", bound=nn.Module)


def convert_dit(model: Model, beta: float = 0.8, alpha: float = 4.0, num_tasks: int = 1000) -> Model:
    """Route the blocks of a DiT, in place.

    Parameters
    ----------
    model
        A DiT of facebookresearch/DiT or alike: ``forward(x, t, y)``, and ``blocks`` made of norm1, attn, norm2, mlp, adaLN_modulation and
        called as ``block(x, c)``. Its parameters stay the same objects, and its state dict keeps its keys.
    beta, alpha, num_tasks
        As in :func:`dtr_starts`. ``num_tasks`` are the timesteps that the model is trained with, whatever a sampler uses of them.

    Returns
    -------
    nn.Module
        ``model``. Its blocks learn the timesteps from the call ``model(x, t, y)``, each thread from its own; a copy of the model is a
        routed model by itself.

    Raises
    ------
    TypeError
        If the model is made of something else. Nothing is changed.
    ValueError
        If a setting is out of range, or the model is routed already. Nothing is changed.
    """
    check_can_tell("convert_dit", model, "t")
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise TypeError(f"convert_dit: model: expected a ModuleList 'blocks', {type(model).__name__} has none with a block in it")
    windows: dict[int, TaskWindow] = {}
    routed: list[RoutedDiTBlock] = []
    for place, block in enumerate(blocks):
        try:
            channels = RoutedDiTBlock.channels_of(block)
            if channels not in windows:
                windows[channels] = dtr_window(num_tasks, channels, beta, alpha)
            routed.append(RoutedDiTBlock.from_block(block, windows[channels]))
        except TypeError as error:
            raise TypeError(f"convert_dit: model: blocks.{place}: {error}") from None
    for place, one in enumerate(routed):
        blocks[place] = one
    tell_timesteps(model, list(routed), "t")
    return model


def convert_adm(model: Model, beta: float = 0.8, alpha: float = 4.0, num_tasks: int = 1000, *, route_attention: bool = False) -> Model:
    """Route the residual blocks of a U-Net like that of openai/guided-diffusion, in place.

    Each ResBlock becomes what :class:`RoutedResBlock` is, with a window over the channels of its own input.

    Parameters
    ----------
    model
        ``forward(x, timesteps, ...)``, with blocks made of in_layers, emb_layers, out_layers and skip_connection. Its parameters stay the
        same objects, and its state dict keeps its keys. Timesteps must be the original integers, not rescaled ones.
    beta, alpha, num_tasks
        As in :func:`convert_dit`.
    route_attention
        Whether attention blocks are routed too. Default False.

    Returns
    -------
    nn.Module
        ``model``; see :func:`convert_dit`.

    Raises
    ------
    TypeError, ValueError
        As :func:`convert_dit`.

    Notes
    -----
    Inferred: the paper's code for U-Nets is not public.
    """
    check_can_tell("convert_adm", model, "timesteps")
    residual = {path: one for path, one in model.named_modules() if all(hasattr(one, part) for part in RESIDUAL_PARTS)}
    if not residual:
        raise TypeError(f"convert_adm: model: expected blocks with {', '.join(RESIDUAL_PARTS)}, {type(model).__name__} has none")
    attention = {path: one for path, one in model.named_modules() if all(hasattr(one, part) for part in ATTENTION_PARTS)}
    norms = {path: residual_norm(f"convert_adm: model: {path}", one) for path, one in residual.items()}
    if route_attention:
        norms |= {path: group_norm(f"convert_adm: model: {path}", one.norm) for path, one in attention.items()}
    windows = {norm.num_channels: dtr_window(num_tasks, norm.num_channels, beta, alpha) for norm in norms.values()}
    for path, norm in norms.items():
        block = model.get_submodule(path)
        block.window = windows[norm.num_channels]
        change_class(block, routed_residual_members if path in residual else routed_attention_members)
    tell_timesteps(model, [model.get_submodule(path) for path in norms], "timesteps")
    return model
