"""A trained network at one configuration: its statistics of batch normalisation, and the same as a plain torch module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn

from taskloom.methods.channels.controllable_mtl.config import WidthConfig
from taskloom.methods.channels.controllable_mtl.model import ENCODER, SlimMultiTask, decoder_path
from taskloom.nn import calibrate as take_statistics
from taskloom.nn import export as export_layers


def calibrate(model: SlimMultiTask, config: WidthConfig, loader: Iterable[Any], num_batches: int = 5) -> None:
    """Take the statistics of batch normalisation for a configuration, as :func:`taskloom.nn.calibrate` does.

    Parameters
    ----------
    model, config
        The model, and what it will run at.
    loader
        Batches: inputs, or lists or tuples that begin with them.
    num_batches
        How many are used at most. Default 5.

    Raises
    ------
    ValueError
        If the model has no such normalisation, or no batch came.
    """

    def forward(batch: Any) -> None:
        model(batch[0] if isinstance(batch, list | tuple) else batch, config)

    take_statistics(model, model.widths(config), loader, num_batches, forward=forward)


def export(model: SlimMultiTask, config: WidthConfig, x: Tensor) -> nn.Module:
    """The model at one configuration: plain, dense torch modules with weights of their own, of the active sizes.

    Parameters
    ----------
    model, config
        The model, which is not changed, and the widths.
    x
        An example input.

    Returns
    -------
    nn.Module
        In evaluation; takes x alone and returns a dict from tasks to outputs. Neither its layers nor itself are of this library, so that
        what was pickled is loaded without it, as long as encoder and decoders are not.

    Raises
    ------
    ValueError, RuntimeError
        As of :func:`taskloom.nn.export`.
    """
    plain = export_layers(model, model.widths(config), x, config)
    graph = fx.Graph()
    z = graph.call_module(ENCODER, (graph.placeholder("x"),))
    graph.output({task: graph.call_module(decoder_path(task), (z,)) for task in model.tasks})
    root = nn.Module()
    root.add_module(ENCODER, plain.get_submodule(ENCODER))
    root.add_module("decoders", plain.get_submodule("decoders"))
    return fx.GraphModule(root, graph).eval()
