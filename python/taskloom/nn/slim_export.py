"""A model at one configuration of widths, as plain torch modules."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from taskloom.nn.slim_layers import SlimConv2d, SlimLinear
from taskloom.nn.slim_norm2d import SlimNorm2d
from taskloom.nn.slim_widths import SlimLayer, Widths, use_width

_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class _Run:
    """What a layer ran at: active inputs and outputs, and the dimensions of its input."""

    inputs: int
    outputs: int
    dims: int


def _record(model: nn.Module, widths: Widths, inputs: tuple[Any, ...]) -> dict[int, _Run]:
    """One forward pass in evaluation; what every slim layer ran at, by its identity."""
    runs: dict[int, _Run] = {}
    names = {id(module): name for name, module in model.named_modules()}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        name = names[id(layer)]
        if len(args) > 1 or kwargs.get("out_width") is not None:
            raise ValueError(f"export: {name!r} is called with an out_width, which a plain layer does not take: give widths by use_width")
        x = args[0] if args else kwargs["x"]
        dim = -1 if isinstance(layer, SlimLinear) else 1
        run = _Run(x.shape[dim], y.shape[dim], x.dim())
        if runs.setdefault(id(layer), run) != run:
            raise ValueError(f"export: {name!r} runs at several widths, {runs[id(layer)]} and {run}: no plain layer does that")

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules() if isinstance(module, SlimLayer)]
    try:
        with use_width(model, widths), torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return runs


def _own(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(memory_format=torch.contiguous_format), requires_grad=like.requires_grad)


def _with_prefix(plain: Any, weight: Tensor, bias: Tensor | None, *, inputs: int | None = None) -> nn.Module:
    """A plain layer, on no device until now, with its part of a slim layer's parameters."""
    outputs = plain.weight.shape[0]
    plain.weight = _own(weight[:outputs] if inputs is None else weight[:outputs, :inputs], weight)
    if bias is not None:
        plain.bias = _own(bias[:outputs], bias)
    found: nn.Module = plain
    return found


def _plain_conv(layer: Any, run: _Run) -> nn.Module:
    """Of a SlimConv2d, whose settings torch types as tuples of any length."""
    groups = 1 if layer.groups == 1 else run.inputs // layer.weight.shape[1]
    plain = nn.Conv2d(
        run.inputs,
        run.outputs,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        groups,
        layer.bias is not None,
        layer.padding_mode,
        device="meta",
    )
    return _with_prefix(plain, layer.weight, layer.bias, inputs=run.inputs if layer.groups == 1 else None)


def _plain_batch_norm(layer: SlimNorm2d, run: _Run) -> nn.Module:
    own = layer._own(run.inputs)
    mean, var = layer.statistics(run.inputs)
    plain = _BATCH_NORMS[run.dims](run.inputs, layer.eps, layer.momentum, own.weight is not None, device="meta")
    plain.running_mean, plain.running_var = mean[: run.inputs].clone(), var[: run.inputs].clone()
    plain.num_batches_tracked = torch.ones((), dtype=torch.long, device=mean.device)
    return plain if own.weight is None else _with_prefix(plain, own.weight, own.bias)


def _plain_norm(layer: SlimNorm2d, run: _Run) -> nn.Module:
    if layer.kind == "batch":
        plain = _plain_batch_norm(layer, run)
    else:
        plain = nn.GroupNorm(layer.active_groups(run.inputs), run.inputs, layer.eps, layer.weight is not None, device="meta")
        if layer.weight is not None:
            _with_prefix(plain, layer.weight, layer.bias)
    return nn.Sequential(plain, nn.ReLU()) if layer.relu else plain


def _plain(layer: nn.Module, run: _Run) -> nn.Module:
    if isinstance(layer, SlimLinear):
        plain = nn.Linear(run.inputs, run.outputs, layer.bias is not None, device="meta")
        return _with_prefix(plain, layer.weight, layer.bias, inputs=run.inputs)
    if isinstance(layer, SlimConv2d):
        return _plain_conv(layer, run)
    assert isinstance(layer, SlimNorm2d)
    return _plain_norm(layer, run)


def export(model: nn.Module, widths: Widths, *inputs: Any) -> nn.Module:
    """A deep copy of a model at one configuration of widths, with plain, dense torch layers in the place of the slim ones.

    Parameters
    ----------
    model
        A model whose slim layers take their widths from :func:`use_width`. It is not changed.
    widths
        As :func:`use_width` takes them.
    *inputs
        An example of what ``model`` is called with: the channels that reach a layer are those of this call.

    Returns
    -------
    nn.Module
        In evaluation, with parameters of its own, of the active size. No layer of this library is left in it, and it gives what the model
        gives at these widths.

    Raises
    ------
    ValueError
        If a slim layer is not reached, is given its width in the call, or runs at several widths.
    RuntimeError
        If a batch normalisation has no statistics for this configuration.

    Notes
    -----
    Source: this library; what is deployed of a network of controllable size, arXiv 2308.11744.
    """
    result = copy.deepcopy(model).eval()
    runs = _record(result, widths, inputs)
    plains: dict[int, nn.Module] = {}
    with use_width(result, widths):
        for name, module in result.named_modules():
            if not isinstance(module, SlimLayer):
                continue
            if id(module) not in runs:
                raise ValueError(f"export: {name!r} is not reached from the example input, so that its width is not known")
            if parametrize.is_parametrized(module):
                raise ValueError(f"export: {name!r} is parametrized, and only plain parameters have prefixes")
            plains[id(module)] = _plain(module, runs[id(module)]).eval()
    if id(result) in plains:
        return plains[id(result)]
    for _, parent in list(result.named_modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in plains:
                parent._modules[name] = plains[id(child)]
    return result
