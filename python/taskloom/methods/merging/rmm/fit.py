"""Fits the shared bases of several tasks' adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from taskloom.methods.merging.rmm.space import Adapter, Factors, Layer, Positions, RMMSpace, check_factors, product_error
from taskloom.ops import rmm_fit

_DEFAULT_STORAGE = 0.5


def _padded(factors: Factors, rank: int) -> Factors:
    a, b = factors
    missing = rank - a.shape[1]
    return torch.nn.functional.pad(a, (0, missing)), torch.nn.functional.pad(b, (0, 0, 0, missing))


def _stacked(adapters: Mapping[str, Adapter], layer: str, pad_rank: bool) -> list[Factors]:
    """Every task's factors of a layer, of one rank."""
    found = {task: adapter[layer] for task, adapter in adapters.items()}
    for task, (a, b) in found.items():
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
            raise ValueError(
                f"adapters: task {task!r}: layer {layer!r}: expected A [m, r] and B [r, d], got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        check_factors(f"adapters: task {task!r}: layer {layer!r}", (a, b))
    sizes = {(a.shape[0], b.shape[1]) for a, b in found.values()}
    if len(sizes) > 1:
        raise ValueError(f"adapters: layer {layer!r}: expected one size (m, d) for all tasks, got {sorted(sizes)}")
    ranks = {task: a.shape[1] for task, (a, _) in found.items()}
    if len(set(ranks.values())) > 1 and not pad_rank:
        listed = ", ".join(f"{task} {rank}" for task, rank in ranks.items())
        raise ValueError(f"adapters: layer {layer!r}: expected one rank for all tasks, got {listed}; pad_rank=True fills up with zeros")
    rank = max(ranks.values())
    # What is stored must not round one task to the type of another.
    dtype = reduce(torch.promote_types, (factor.dtype for factors in found.values() for factor in factors))
    return [_padded((a.to(dtype), b.to(dtype)), rank) for a, b in found.values()]


def _ratio(p: int, rank: int, tasks: int) -> float:
    return (p * (rank + tasks) + rank) / (rank * tasks)


def _choose_p(p: int | None, storage: float | None, layers: Mapping[str, list[Factors]], center: bool) -> int:
    tasks = len(next(iter(layers.values())))
    # With layers of several ranks the share of all numbers is what counts.
    weights = {layer: (factors[0][0].shape[0] + factors[0][1].shape[1], factors[0][0].shape[1]) for layer, factors in layers.items()}
    own = sum(positions * rank * tasks for positions, rank in weights.values())

    def share(p: int) -> float:
        return sum(positions * rank * tasks * _ratio(p, rank, tasks) for positions, rank in weights.values()) / own

    largest = min(min(rank for _, rank in weights.values()), tasks - 1 if center else tasks)
    if storage is not None and not isinstance(storage, (int, float)):
        raise TypeError(f"storage: expected a number, got {type(storage).__name__}")
    if p is not None:
        if isinstance(p, bool) or not isinstance(p, int):
            raise TypeError(f"p: expected an integer, got {type(p).__name__}")
        if storage is not None:
            raise ValueError("storage: expected nothing where p is given")
        if not 1 <= p <= largest:
            raise ValueError(f"p: expected 1 to {largest}, the least of the rank and the tasks{' less one' if center else ''}, got {p}")
        return p
    if storage is not None and not share(1) <= storage:
        raise ValueError(f"storage: expected at least {share(1):.4f}, which p = 1 takes, got {storage}")
    fitting = [candidate for candidate in range(1, largest + 1) if share(candidate) <= (storage or _DEFAULT_STORAGE)]
    return max(fitting, default=1)


def _fit_positions(vectors: list[Tensor], p: int, center: bool, dtype: torch.dtype) -> Positions:
    mean, basis, coefficients = rmm_fit(torch.stack(vectors).to(dtype), p, center)
    return Positions(*(part.to(vectors[0].dtype) for part in (mean, basis, coefficients)))


def fit_rmm(
    adapters: Mapping[str, Adapter],
    p: int | None = None,
    storage: float | None = None,
    center: bool = True,
    *,
    pad_rank: bool = False,
    dtype: torch.dtype = torch.float32,
) -> RMMSpace:
    """Fit shared bases to the low-rank adapters of several tasks.

    Parameters
    ----------
    adapters
        ``adapters[task][layer] = (A, B)`` with A [m, r] and B [r, d], the change of the weight being ``A B`` (PEFT's ``lora_B`` with the
        scaling folded in, and ``lora_A``); the same layers, sizes and ranks for every task.
    p
        Directions that a position keeps, from 1 to ``min(r, n - 1)`` for n tasks.
    storage
        Instead of p: the largest share of the adapters' own numbers that may be stored. Default: the largest p that stores at most half,
        and at least 1 (chosen by this library).
    center
        Take each position's mean off first, which costs r numbers a position (inferred from the paper's formula of storage). Default True.
    pad_rank
        Fill up smaller ranks with zeros. Default False: they are an error.
    dtype
        float32 (default) or float64: what the fit computes in. What is stored has the adapters' dtype, the widest where they differ.

    Returns
    -------
    RMMSpace
        Exact for ``p = min(r, n - 1)``; else the squared error over all positions is the sum of the discarded squared singular values.

    Raises
    ------
    TypeError
        If a factor is not floating point, p is no integer, or storage no number.
    ValueError
        If there are fewer than 2 adapters, layers, shapes or ranks differ, a factor is not finite, or p or storage cannot be had.

    Notes
    -----
    Source: arXiv 2510.14163. A warning says where the result takes as much room as the adapters themselves. Each adapter's factors are
    defined up to a change of gauge (A Q, Q^-1 B), and the fit depends on it; one change common to all adapters by an orthogonal Q alters
    nothing.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected float32 or float64, got {dtype}")
    if len(adapters) < 2:
        raise ValueError(f"adapters: expected at least 2 tasks, got {len(adapters)}")
    names = list(next(iter(adapters.values())))
    for task, adapter in adapters.items():
        if set(adapter) != set(names) or not names:
            raise ValueError(f"adapters: task {task!r}: expected the layers {', '.join(names) or '(none)'}, got {', '.join(adapter)}")
    stacked = {layer: _stacked(adapters, layer, pad_rank) for layer in names}
    chosen = _choose_p(p, storage, stacked, center)
    layers, errors = {}, {}
    for name, factors in stacked.items():
        rows = _fit_positions([a for a, _ in factors], chosen, center, dtype)
        columns = _fit_positions([b.T for _, b in factors], chosen, center, dtype)
        layers[name] = Layer(rows, columns)
        errors[name] = [product_error(own, layers[name].factors(task)) for task, own in enumerate(factors)]
    space = RMMSpace(list(adapters), layers, errors)
    if space.storage_ratio >= 1:
        warnings.warn(f"fit_rmm: p = {chosen} stores {space.storage_ratio:.2f} times what the adapters themselves take", stacklevel=2)
    return space
