"""How much a network computes at a configuration, without computing it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from taskloom.methods.channels.controllable_mtl.config import NetworkWidth, WidthConfig
from taskloom.methods.channels.controllable_mtl.model import Features, SlimMultiTask
from taskloom.nn import SlimNorm2d, use_width


def _linear_flops(x: Sequence[int], weight: Sequence[int], *others: Any, out_shape: Sequence[int], **options: Any) -> int:
    return 2 * x[0] * x[1] * out_shape[1]


def _conv_flops(x: Sequence[int], weight: Sequence[int], *others: Any, out_shape: Sequence[int], **options: Any) -> int:
    groups = others[-1]
    inputs = x[1] if groups == 1 else weight[1]
    return 2 * inputs * weight[2] * weight[3] * torch.Size(out_shape).numel()


def _slim_ops() -> dict[Any, Callable[..., int]]:
    return {torch.ops.taskloom.prefix_linear: _linear_flops, torch.ops.taskloom.prefix_conv2d: _conv_flops}


def _without_storage(model: SlimMultiTask) -> SlimMultiTask:
    """A copy on the meta device, without normalisations: they count nothing, and may have no statistics to run with."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    found = copy.deepcopy(model, memo)
    for parent in list(found.modules()):
        for name, child in parent.named_children():
            if isinstance(child, SlimNorm2d):
                setattr(parent, name, nn.Identity())
    return found.eval()


class FlopTable:
    """What each network of a model costs at each of its widths, counted once.

    Parameters
    ----------
    model
        Its layers and shapes count as they are now.
    input_shape
        Of x, with the batch.

    Notes
    -----
    The model runs on tensors without data. What is counted: matrix products and convolutions, 2 per multiplication with its addition, as
    torch's FlopCounterMode counts them; biases, normalisations and activations are not.
    """

    def __init__(self, model: SlimMultiTask, input_shape: Sequence[int]) -> None:
        self._model = _without_storage(model)
        floats = [one.dtype for one in model.parameters() if one.is_floating_point()]
        self._x = torch.empty(tuple(input_shape), dtype=floats[0] if floats else torch.float32, device="meta")
        self._encoders: dict[str, tuple[int, Features]] = {}
        self._decoders: dict[tuple[str, str, tuple[torch.Size, ...]], int] = {}

    def _count(self, config: WidthConfig, network: nn.Module, x: Features) -> tuple[int, Any]:
        with (
            torch.no_grad(),
            use_width(self._model, self._model.widths(config)),
            FlopCounterMode(display=False, custom_mapping=_slim_ops()) as counter,
        ):
            found = network(x)
        return counter.get_total_flops(), found

    def encoder(self, width: NetworkWidth) -> tuple[int, Features]:
        """The cost of the encoder at a width, and features of the shapes that it gives."""
        key = repr(width)
        if key not in self._encoders:
            config = WidthConfig(width, dict.fromkeys(self._model.tasks, 1.0))
            self._encoders[key] = self._count(config, self._model.encoder, self._x)
        return self._encoders[key]

    def decoder(self, task: str, width: NetworkWidth, features: Features) -> int:
        """The cost of a decoder at a width behind features of these shapes."""
        shapes = tuple(one.shape for one in ([features] if isinstance(features, Tensor) else features))
        key = (task, repr(width), shapes)
        if key not in self._decoders:
            config = WidthConfig(1.0, {**dict.fromkeys(self._model.tasks, 1.0), task: width})
            self._decoders[key] = self._count(config, self._model.decoders[task], features)[0]
        return self._decoders[key]

    def total(self, config: WidthConfig) -> int:
        """The cost of the network at a configuration."""
        self._model.check_tasks("config.decoders", config.decoders, every=True)
        flops, features = self.encoder(config.encoder)
        return flops + sum(self.decoder(task, width, features) for task, width in config.decoders.items())


def count_flops(model: SlimMultiTask, config: WidthConfig, input_shape: Sequence[int]) -> int:
    """The floating point operations of a forward pass at a configuration.

    Parameters
    ----------
    model, config
        The model and its widths.
    input_shape
        Of x, with the batch: ``(1, 3, 224, 224)`` for the cost of one image.

    Returns
    -------
    int
        2 per multiplication with its addition, of matrix products and convolutions; biases, normalisations and activations do not count.
        It is what torch's FlopCounterMode counts of the exported model.

    Raises
    ------
    KeyError, ValueError
        If the configuration does not fit the model.

    Notes
    -----
    The model runs on tensors without data: layers that look at values cannot be counted. Papers that count a multiplication with its
    addition as one report half of this. Source: this library.
    """
    return FlopTable(model, input_shape).total(config)
