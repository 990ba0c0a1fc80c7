"""Tunes the routers of a model, with the manifold loss or without."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from taskloom.methods.routing.roma.config import RoMAConfig
from taskloom.methods.routing.roma.neighbors import Neighbors
from taskloom.methods.routing.roma.reference import Batch, Positions, ReferenceSet, call, refresh_reference
from taskloom.ops import manifold_loss

TaskLoss = Callable[[Any, Any], Tensor]
Step = tuple[Tensor, Batch]


def tune_routers(
    model: nn.Module,
    steps: Iterable[Step],
    task_loss: TaskLoss,
    optimizer: torch.optim.Optimizer,
    config: RoMAConfig | None = None,
    *,
    reference: ReferenceSet | None = None,
    neighbors: Neighbors | None = None,
    positions: Positions | None = None,
    refresh: Iterable[Batch] | None = None,
) -> list[float]:
    """Minimise ``task_loss + lam * manifold_loss`` of a model whose routers alone are trained.

    Parameters
    ----------
    model
        After :func:`train_only_routers`. Its modes stay as they are: in training mode, layers such as batch norm change their buffers.
    steps
        For each step the numbers of its samples, int64 ``[B]``, which are rows of ``neighbors``, and their batch.
    task_loss
        ``(batch, output) -> scalar``, such as ``lambda batch, output: output.loss``.
    optimizer
        Over what :func:`train_only_routers` returned.
    config
        Default ``RoMAConfig()``. With ``lam=0`` this is router tuning: routing weights are not recorded, and ``reference`` and
        ``neighbors`` are not needed.
    reference, neighbors
        From :func:`build_reference`, and from :func:`neighbor_weights` for all samples. A sample without neighbours has the task loss
        alone; every sample counts in the mean.
    positions
        As in :func:`build_reference`.
    refresh
        The reference's loader, needed with ``config.refresh_every`` where ``lam`` is above 0: an iterable that can be read again each time.

    Returns
    -------
    list of float
        The loss of each step.

    Raises
    ------
    ValueError
        If ``reference``, ``neighbors`` or ``refresh`` is missing, neighbours are none of the reference's, or samples none of theirs.
        If no parameter requires grad, or others than the chosen routers' do.
    """
    config = config or RoMAConfig()
    recorder = config.recorder(model)
    _check_trained(model, recorder.routers)
    aligned = config.lam > 0
    if aligned and (reference is None or neighbors is None):
        raise ValueError("tune_routers: reference, neighbors: expected both, since lam is above 0")
    if aligned and config.refresh_every and refresh is None:
        raise ValueError("tune_routers: refresh: expected the reference's loader, since refresh_every is set")
    if reference is not None:
        _check_neighbors(reference, neighbors, tuple(recorder.experts))
    losses: list[Tensor] = []
    for step, (samples, batch) in enumerate(steps):
        if aligned and reference is not None and refresh is not None and config.refresh_every and step and step % config.refresh_every == 0:
            reference = refresh_reference(model, refresh, reference, config, positions=positions)
        recorder.positions = None if positions is None else positions(batch)
        # The backward pass is inside too: under activation checkpointing it runs layers again.
        with recorder if aligned else nullcontext():
            output = call(model, batch)
            loss = task_loss(batch, output)
            if aligned and reference is not None and neighbors is not None:
                loss = loss + config.lam * _alignment(recorder.r, reference, neighbors, samples)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [float(one) for one in losses]


def _alignment(r: Tensor, reference: ReferenceSet, neighbors: Neighbors, samples: Tensor) -> Tensor:
    count = len(neighbors.ids)
    if samples.shape != (len(r),) or samples.dtype != torch.int64:
        raise ValueError(
            f"tune_routers: steps: expected the numbers of {len(r)} samples, int64, got shape {tuple(samples.shape)} and {samples.dtype}"
        )
    if len(samples) and not 0 <= int(samples.min()) <= int(samples.max()) < count:
        outside = samples[(samples < 0) | (samples >= count)]
        raise ValueError(f"tune_routers: steps: expected numbers of samples from 0 to {count - 1}, got {int(outside[0])}")
    ids, weight = (one[samples.to(one.device)].to(r.device) for one in neighbors)
    return manifold_loss(r, reference.r.to(r.device), ids, weight).mean()


def _check_trained(model: nn.Module, routers: list[nn.Module]) -> None:
    chosen = {id(parameter) for router in routers for parameter in router.parameters()}
    others = [name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in chosen]
    if others:
        raise ValueError(f"tune_routers: model: expected that only chosen routers require grad, also does {others[0]}; train_only_routers")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("tune_routers: model: no parameter requires grad; call train_only_routers first")


def _check_neighbors(reference: ReferenceSet, neighbors: Neighbors | None, experts: tuple[int, ...]) -> None:
    if reference.experts != experts:
        raise ValueError(f"tune_routers: reference: expected routers of {experts} experts, got {reference.experts}")
    if neighbors is not None and neighbors.ids.numel() and not 0 <= int(neighbors.ids.min()) <= int(neighbors.ids.max()) < len(reference.r):
        raise ValueError(f"tune_routers: neighbors: expected rows of a reference of {len(reference.r)}")
