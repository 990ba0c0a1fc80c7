"""Merging fine-tuned models with the breadcrumbs of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from taskloom.methods.merging.breadcrumbs.bands import (
    BandRule,
    Granularity,
    OnOverflow,
    check_density,
    check_gamma,
    check_real,
    is_finite,
)
from taskloom.methods.merging.breadcrumbs.models import Model, Tuned, common_names, second_names, some, tensors_of, tuned_models
from taskloom.ops import sparse_merge
from taskloom.ops._checks import FLOATING

PerModel = float | Sequence[float] | Callable[[str, int], float]
Check = Callable[[str, str, object], float]

_OP = "merge_breadcrumbs"
# As in a checkpoint merge, and in mergekit: a mean is left undivided where the weights sum to less.
_NO_WEIGHT = 1e-8


@dataclass(frozen=True)
class _Settings:
    """What one tensor is merged with: per model its weight and its kept ranks."""

    weights: list[float]
    bands: list[tuple[int, int]]


def _per_model(argument: str, given: PerModel, names: Sequence[str], models: int, check: Check) -> dict[str, list[float]]:
    """The numbers of every tensor, one per model."""
    if callable(given):
        return {name: [check(_OP, f"{argument}({name!r}, {number})", given(name, number)) for number in range(models)] for name in names}
    value: Any = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != models:
            raise ValueError(f"{_OP}: {argument}: expected one number or one per model ({models}), got {len(value)}")
        numbers = [check(_OP, f"{argument}[{number}]", one) for number, one in enumerate(value)]
    else:
        numbers = [check(_OP, argument, value)] * models
    return dict.fromkeys(names, numbers)


def _check_range(base: Mapping[str, Tensor], weights: Mapping[str, list[float]], lambda_: float) -> None:
    """Refuse numbers, and sums of weights, that float32 cannot hold where it is what a tensor is merged in."""
    most = torch.finfo(torch.float32).max
    for name, own in weights.items():
        if base[name].dtype == torch.float64:
            continue
        if abs(lambda_) > most:
            raise ValueError(f"{_OP}: lambda_: expected at most {most:g}, which float32 can hold, got {lambda_:g}")
        for number, total in enumerate(accumulate(map(abs, own))):
            if total > most:
                raise ValueError(f"{_OP}: weight: of tensor {name!r} up to model {number} sum to {total:g}, float32 holds at most {most:g}")


def _settings(
    rule: BandRule, base: Mapping[str, Tensor], names: Sequence[str], models: int, weight: PerModel, density: PerModel, gamma: PerModel
) -> dict[str, _Settings]:
    """The settings of every tensor; warns where a band keeps nothing, or less than its density says."""
    weights = _per_model("weight", weight, names, models, check_real)
    densities = _per_model("density", density, names, models, check_density)
    gammas = _per_model("gamma", gamma, names, models, check_gamma)
    found = {}
    emptied, clipped = [], []
    for name in names:
        tensor = base[name]
        bands = [rule.ranks(tensor, share, top) for share, top in zip(densities[name], gammas[name], strict=True)]
        found[name] = _Settings(weights[name], bands)
        if tensor.numel() == 0:
            continue
        if any(begin >= end for begin, end in bands):
            emptied.append(name)
        elif any(rule.is_clipped(tensor, share, band) for share, band in zip(densities[name], bands, strict=True)):
            clipped.append(name)
    if emptied:
        warnings.warn(
            f"{_OP}: nothing of a model's delta is kept in {len(emptied)} tensors, whose segments are too short for density and gamma: "
            f"{some(emptied)}",
            stacklevel=3,
        )
    if clipped:
        warnings.warn(
            f"{_OP}: fewer entries than density says are kept in {len(clipped)} tensors, because gamma removes too many; "
            f"on_overflow='density' removes fewer: {some(clipped)}",
            stacklevel=3,
        )
    return found


def _wide(name: str, base: Tensor, models: Sequence[Tuned]) -> torch.dtype:
    """What a tensor is merged in."""
    return torch.float64 if torch.float64 in (base.dtype, *(model.dtype(name) for model in models)) else torch.float32


def _refuse_nonfinite(name: str, base: Tensor, models: Sequence[Tuned]) -> None:
    for model in models:
        if not is_finite(model.delta(name, base, _wide(name, base, models))):
            raise ValueError(f"{_OP}: {model.argument}: tensor {name!r}: its difference from base holds NaN or infinity")


def merge_breadcrumbs(
    base: Model,
    finetuned: Sequence[Model],
    *,
    weight: PerModel = 0.3,
    density: PerModel = 0.15,
    gamma: PerModel = 0.01,
    granularity: Granularity = "tensor",
    outliers_first: bool = True,
    on_overflow: OnOverflow = "drop",
    sign_consensus: bool = False,
    normalize: bool = False,
    lambda_: float = 1.0,
    strict: bool = True,
) -> dict[str, Tensor]:
    """Merge fine-tuned models: ``base + lambda_ * sum_t weight_t * mask_t * (finetuned_t - base)``, ``mask_t`` as of :func:`breadcrumbs_`.

    Every tensor is merged by one operation that stores no delta, mask or order; the result is that of ``taskloom merge`` with the method
    ``breadcrumbs`` (``breadcrumbs_ties`` with ``sign_consensus``) and the same settings, to the bit.

    Parameters
    ----------
    base
        State dict or module.
    finetuned
        The fine-tuned models, one or more: state dicts or modules, whose dtypes may differ from the base's, or task vectors
        (:class:`taskloom.TaskVector`), of which one tensor at a time is read. Beside a task vector the other models' deltas are formed,
        of one tensor at a time too.
    weight, density, gamma
        Factor of a delta, kept share in (0, 1] and removed share of the largest in [0, 1): one number, one per model, or a function of
        a tensor's name and a model's place that gives the number. Defaults 0.3, 0.15, 0.01. Weights are not divided by the number of
        models.
    granularity, outliers_first, on_overflow
        As in :func:`breadcrumbs_`.
    sign_consensus
        Of each entry only those masked, weighted deltas are added whose sign is that of their sum (TIES; a sum of zero is positive).
    normalize
        Divide by the sum of the weights, with ``sign_consensus`` of those that take part in the entry. Default False.
    lambda_
        Factor of the merged delta. Default 1.0.
    strict
        False merges the tensors that all models have, with a warning where these are not all.

    Returns
    -------
    dict[str, Tensor]
        The base's names in its order, with its dtypes and devices, in fresh memory. What is no floating-point tensor, and with
        ``strict=False`` what a model lacks, is a copy of the base's. Names that are one tensor in all models (tied weights) are one in
        the result, merged by its first name.

    Raises
    ------
    KeyError
        If names differ and ``strict`` is true, or none is common.
    TypeError
        If a model or a number is something else, or a tensor's dtype cannot be merged (float8, or not floating-point in a fine-tuned
        model where it is in the base).
    ValueError
        If there is no model, a number is out of range, lists have another length, shapes or devices differ, a delta holds NaN or
        infinity, task vectors are of both regimes, or a merged value does not fit its dtype. Inputs are never modified.

    Warns
    -----
    UserWarning
        If a model's segments in some tensors are too short to keep anything, or keep fewer entries than density says.

    Notes
    -----
    Model Breadcrumbs (arXiv 2312.06795); sign consensus and normalization as in mergekit. Arithmetic is float32 (float64 where a tensor
    is), models in order, and rounded once to the base's dtype.
    """
    rule = BandRule(_OP, granularity, outliers_first, on_overflow)
    scale = check_real(_OP, "lambda_", lambda_)
    origin = tensors_of(_OP, "base", base)
    models = tuned_models(_OP, finetuned)
    names = common_names(_OP, origin, models, strict)
    for name in names:
        if origin[name].dtype not in FLOATING:
            raise TypeError(f"{_OP}: base: tensor {name!r}: expected float32, bfloat16, float16 or float64, got {origin[name].dtype}")
        for model in models:
            model.check_fit(_OP, name, origin[name])
    tied = second_names(origin, models, names)
    settings = _settings(rule, origin, [name for name in names if name not in tied], len(models), weight, density, gamma)
    _check_range(origin, {name: own.weights for name, own in settings.items()}, scale)
    merged: dict[str, Tensor] = {}
    for name, tensor in origin.items():
        if name in settings:
            merged[name] = _merge(rule, name, tensor, models, settings[name], sign_consensus, normalize, scale)
        else:
            merged[name] = merged[tied[name]] if name in tied else tensor.clone()
    return merged


def _merge(
    rule: BandRule,
    name: str,
    base: Tensor,
    models: Sequence[Tuned],
    own: _Settings,
    sign_consensus: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    """One merged tensor."""
    stages: dict[str, Any] = {"scale": scale, "elect": "sign_sum" if sign_consensus else "none"}
    if any(band != (0, rule.length(base)) for band in own.bands):
        stages |= {"select": "magnitude", "scope": rule.granularity, "rank": own.bands}
    if normalize and sign_consensus:
        stages["combine"] = "disjoint_mean"
    elif normalize and abs(sum(own.weights)) >= _NO_WEIGHT:
        stages["combine"] = "weighted_mean"
    with torch.no_grad():
        result, is_sound = _combined(name, base, models, own.weights, stages)
    if not is_sound:
        _refuse_nonfinite(name, base, models)
    if not is_finite(result):
        raise ValueError(f"{_OP}: tensor {name!r}: a merged value is too large for {result.dtype}")
    return result


def _combined(name: str, base: Tensor, models: Sequence[Tuned], weights: list[float], stages: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """The merge, and whether every delta is finite, kept or not: the statistics say so, which cost no pass of their own."""
    if not any(model.is_vector for model in models):
        result, found = sparse_merge(base, [model.tensors[name] for model in models], weights, statistics=True, **stages)
        return result, not found.nonfinite
    wide = _wide(name, base, models)
    deltas = [model.delta(name, base, wide) for model in models]
    change, found = sparse_merge(None, deltas, weights, statistics=True, out_dtype=wide, **stages)
    return change.add_(base).to(base.dtype), not found.nonfinite
