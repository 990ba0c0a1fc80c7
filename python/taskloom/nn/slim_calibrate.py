"""Statistics of batch normalisation for one configuration of widths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from taskloom.nn.slim_norm2d import SlimNorm2d
from taskloom.nn.slim_widths import Widths, use_width
from taskloom.ops.routed._conv_checks import check_integer


def _batch_norms(model: nn.Module) -> list[SlimNorm2d]:
    """The layers to calibrate; raise where there is none, or where others would keep the statistics of another width."""
    found = [module for module in model.modules() if isinstance(module, SlimNorm2d) and module.kind == "batch"]
    if not found:
        raise ValueError("calibrate: model: expected SlimNorm2d layers of kind 'batch', got none: nothing depends on the width")
    inside = {id(norm) for module in found if module.narrow is not None for norm in module.narrow.values()}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in inside:
            kind = type(module).__name__
            raise ValueError(f"calibrate: model: expected SlimNorm2d in the place of {kind} {name!r}, whose statistics fit one width only")
    return found


def _inputs(batch: Any) -> Tensor:
    first = batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(first, Tensor):
        raise TypeError(f"calibrate: loader: expected tensors, or lists that begin with one, got {type(first).__name__}; or give forward")
    return first


@torch.no_grad()
def calibrate(
    model: nn.Module,
    widths: Widths,
    loader: Iterable[Any],
    num_batches: int = 5,
    *,
    forward: Callable[[Any], Any] | None = None,
) -> None:
    """Take the statistics of a model's batch normalisations at one configuration of widths.

    Parameters
    ----------
    model
        The whole model, with :class:`SlimNorm2d` layers of kind ``"batch"``.
    widths
        As :func:`use_width` takes them.
    loader
        Batches: tensors, or lists that begin with the input.
    num_batches
        How many of them are used at most. Default 5.
    forward
        Runs the model on a batch. Default None: ``model(batch)``, or ``model(batch[0])``.

    Raises
    ------
    ValueError
        If the model has no such layers, or ones of torch's beside them, or no batch came or is wanted.

    Notes
    -----
    Statistics are those of the batches while the layers before are normalised by them too, averaged with equal weights; all other layers
    are in evaluation. Weights do not change. They are kept for these widths beside those of others, and end up in the state dict. Where
    something raises, the old ones stay.

    Source: Yu and Huang, ICCV 2019, arXiv 1903.05134, section 3.3; momentum None and 5 batches as in their code.
    """
    check_integer("calibrate", "num_batches", num_batches)
    if num_batches < 1:
        raise ValueError(f"calibrate: num_batches: expected at least 1, got {num_batches}")
    norms = _batch_norms(model)
    run = forward or (lambda batch: model(_inputs(batch)))
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    done = False
    with use_width(model, widths):
        for norm in norms:
            norm.start_calibration()
        try:
            used = 0
            for batch in islice(loader, num_batches):
                run(batch)
                used += 1
            if used == 0:
                raise ValueError("calibrate: loader: expected at least one batch, got none")
            done = True
        finally:
            for norm in norms:
                norm.end_calibration(keep=done)
            for module, mode in training:
                module.training = mode
