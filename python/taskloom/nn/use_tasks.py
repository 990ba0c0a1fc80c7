"""Which adapter each sample of a batch takes, said for a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from taskloom.nn.lowrank_linear import LowRankLinear
from taskloom.nn.lowrank_parts import Tasks


@contextmanager
def use_tasks(model: nn.Module, tasks: Tasks) -> Iterator[None]:
    """Say which adapter each sample of a batch takes, for every :class:`LowRankLinear` of a model inside the block.

    Parameters
    ----------
    model
        Any module. Inputs of its adapted layers must have the samples along their first dimension.
    tasks
        As in :meth:`LowRankLinear.forward`.

    Notes
    -----
    The tasks are attributes of the layers inside the block: threads that share a model have them in common, and need copies of it.
    """
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    before = [layer.tasks for layer in layers]
    for layer in layers:
        layer.tasks = tasks
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.tasks = old
