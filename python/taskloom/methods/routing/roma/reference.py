"""The samples that a model answers correctly, with their embeddings and routing weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from taskloom.methods.routing.roma.config import RoMAConfig
from taskloom.methods.routing.roma.recorder import RoutingRecorder

# What a model is called with: keyword arguments, positional ones, or one tensor.
Batch = Mapping[str, Any] | tuple[Any, ...] | Tensor
IsCorrect = Callable[[Any, Any], Tensor]
Positions = Callable[[Any], Tensor]


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


@dataclass(frozen=True)
class ReferenceSet:
    """What other samples are compared with.

    Attributes
    ----------
    emb
        Floating ``[S, F]``: embeddings.
    r
        Floating ``[S, R]``: routing weights; constants, without a graph.
    keys
        int64 ``[S]``: which samples they are, places in the loader's order, rising.
    experts
        Experts of each router, whose sum is R.
    """

    emb: Tensor
    r: Tensor
    keys: Tensor
    experts: tuple[int, ...]

    def __post_init__(self) -> None:
        count = len(self.keys)
        if self.keys.shape != (count,) or self.keys.dtype != torch.int64:
            raise ValueError(f"ReferenceSet: keys: expected int64 of shape (S,), got {self.keys.dtype} {tuple(self.keys.shape)}")
        for name, table in (("emb", self.emb), ("r", self.r)):
            if table.dim() != 2 or len(table) != count or not table.is_floating_point():
                raise ValueError(
                    f"ReferenceSet: {name}: expected floating numbers of shape ({count}, ...), got {table.dtype} {tuple(table.shape)}"
                )
            if not bool(table.isfinite().all()):
                raise ValueError(f"ReferenceSet: {name}: expected finite numbers")
        if sum(self.experts) != self.r.shape[1]:
            raise ValueError(f"ReferenceSet: experts: expected a sum of {self.r.shape[1]}, the columns of r, got {self.experts}")
        if count == 0:
            raise ValueError("ReferenceSet: keys: expected at least one sample, got none")

    def to(self, device: torch.device | str) -> ReferenceSet:
        """The same on another device."""
        return replace(self, emb=self.emb.to(device), r=self.r.to(device), keys=self.keys.to(device))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without grad and in evaluation mode; each module's own mode is given back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _checked_correct(correct: Tensor, batch: int) -> Tensor:
    if not isinstance(correct, Tensor) or correct.dtype != torch.bool or correct.shape != (batch,):
        got = f"{correct.dtype} {tuple(correct.shape)}" if isinstance(correct, Tensor) else type(correct).__name__
        raise ValueError(f"build_reference: is_correct: expected a bool tensor of shape ({batch},), got {got}")
    return correct


def _recorded(
    model: nn.Module, recorder: RoutingRecorder, loader: Iterable[Batch], positions: Positions | None
) -> Iterator[tuple[Batch, Any, Tensor]]:
    """Each batch with the model's output and routing weights."""
    with recorder:
        for batch in loader:
            recorder.positions = None if positions is None else positions(batch)
            output = call(model, batch)
            yield batch, output, recorder.r


def build_reference(
    model: nn.Module,
    loader: Iterable[Batch],
    embeddings: Tensor,
    is_correct: IsCorrect,
    config: RoMAConfig | None = None,
    *,
    positions: Positions | None = None,
) -> ReferenceSet:
    """Find the samples that a model answers correctly, and keep their routing weights.

    Parameters
    ----------
    model
        The base model; it is run in evaluation mode, and has its modes back afterwards.
    loader
        Batches in a fixed order: mappings of keyword arguments, tuples of positional ones, or tensors.
    embeddings
        Floating ``[N, F]``: the samples' embeddings in the loader's order, such as those of a sentence encoder for the instructions.
    is_correct
        ``(batch, output) -> bool [B]``.
    config
        Default ``RoMAConfig()``.
    positions
        ``batch -> int64 [B]``: the token of each sequence whose routing counts, such as the last of its prompt. Default None: as
        ``config.token`` says.

    Returns
    -------
    ReferenceSet
        On the devices of ``embeddings`` and of the routers' outputs; :meth:`ReferenceSet.to` moves it.

    Raises
    ------
    ValueError
        If no sample is answered correctly, ``embeddings`` has another number of rows than the loader has samples, ``is_correct`` gives
        something else, or the model has no routers.
    """
    recorder = (config or RoMAConfig()).recorder(model)
    if embeddings.dim() != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"build_reference: embeddings: expected floating numbers of shape (N, F), got {embeddings.dtype} {tuple(embeddings.shape)}"
        )
    seen, keys, rows = 0, [], []
    with _evaluating(model):
        for batch, output, r in _recorded(model, recorder, loader, positions):
            kept = _checked_correct(is_correct(batch, output), len(r)).to(r.device).nonzero().squeeze(1)
            rows.append(r[kept])
            keys.append(seen + kept.to(embeddings.device))
            seen += len(r)
    if seen != len(embeddings):
        raise ValueError(f"build_reference: embeddings: expected {seen} rows, one for each sample of the loader, got {len(embeddings)}")
    if not sum(map(len, keys)):
        raise ValueError(f"build_reference: the model answers none of {seen} samples correctly, so that there is nothing to align to")
    places = torch.cat(keys)
    return ReferenceSet(embeddings.detach()[places], torch.cat(rows), places, tuple(recorder.experts))


def refresh_reference(
    model: nn.Module,
    loader: Iterable[Batch],
    reference: ReferenceSet,
    config: RoMAConfig | None = None,
    *,
    positions: Positions | None = None,
) -> ReferenceSet:
    """The same samples with the routing weights that the model gives them now.

    Parameters
    ----------
    model, loader, config, positions
        As in :func:`build_reference`, the loader in the same order.
    reference
        Whose samples.

    Raises
    ------
    ValueError
        If the loader has fewer samples, or other routers are recorded.
    """
    recorder = (config or RoMAConfig()).recorder(model)
    if tuple(recorder.experts) != reference.experts:
        raise ValueError(f"refresh_reference: config: expected routers of {reference.experts} experts, got {tuple(recorder.experts)}")
    fresh, seen = reference.r.clone(), 0
    keys = reference.keys.to(fresh.device)
    filled = 0
    with _evaluating(model):
        for _, _, r in _recorded(model, recorder, loader, positions):
            here = ((keys >= seen) & (keys < seen + len(r))).nonzero().squeeze(1)
            fresh[here] = r[keys[here] - seen].to(fresh)
            filled, seen = filled + len(here), seen + len(r)
    if filled != len(keys):
        raise ValueError(f"refresh_reference: loader: expected more than {int(keys.max())} samples, got {seen}")
    return replace(reference, r=fresh)
