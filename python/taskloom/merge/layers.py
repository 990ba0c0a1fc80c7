"""What charts of a merge show: short names for the models, and the figures of each layer."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import PurePath

from taskloom.merge.report import Figures, MergeReport, TensorReport

_LONGEST_LABEL = 32


@dataclass(frozen=True)
class LayerFigures:
    """The figures of one layer's merged tensors taken as one vector; lists have one entry per model.

    ``norms`` and ``cosines`` are None where those of a tensor are not finite; a cosine also where a delta is zero.
    """

    layer: int
    tensors: int
    kept_density: list[float]
    conflict_rate: float
    norms: list[float | None]
    cosines: list[list[float | None]]


def _distinct_parts(models: Sequence[str]) -> list[str]:
    """Paths without the leading and trailing folders that all of them share."""
    paths = [list(PurePath(model).parts) or [model] for model in models]
    for end in (-1, 0):
        while all(len(parts) > 1 for parts in paths) and len({parts[end] for parts in paths}) == 1:
            for parts in paths:
                del parts[end]
    return ["/".join(parts) for parts in paths]


def model_labels(models: Sequence[str]) -> list[str]:
    """Short names for the models: what tells their paths apart, none above 32 characters, no two the same."""
    names = [PurePath(model).name or model for model in models]
    if len(set(names)) < len(names):
        names = _distinct_parts(models)
    names = [name if len(name) <= _LONGEST_LABEL else "…" + name[1 - _LONGEST_LABEL :] for name in names]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name} ({number})" if name in repeated else name for number, name in enumerate(names, 1)]


def _norm(norms: Sequence[float | None]) -> float | None:
    known = [norm for norm in norms if norm is not None]
    total = math.hypot(*known) if known else 0.0
    return total if math.isfinite(total) and len(known) == len(norms) else None


def _cosine(tensors: Sequence[Figures], norms: Sequence[float | None], first: int, second: int) -> float | None:
    whole, other = norms[first], norms[second]
    if not whole or not other:
        return None
    total = 0.0
    for figures in tensors:
        cosine = figures.cosines[first][second]
        # A tensor in which one of the two deltas is zero adds nothing to their inner product.
        if cosine is not None:
            total += cosine * ((figures.norms[first] or 0.0) / whole) * ((figures.norms[second] or 0.0) / other)
    return max(-1.0, min(1.0, total))


def mean_cosine(cosines: Sequence[Sequence[float | None]]) -> float | None:
    """The mean over the pairs of different models whose cosine is known; None where there is none."""
    known = [value for row in range(len(cosines)) for value in cosines[row][row + 1 :] if value is not None]
    return sum(known) / len(known) if known else None


def _layer(number: int, tensors: Sequence[tuple[TensorReport, Figures]], models: int) -> LayerFigures:
    entries = sum(prod(tensor.shape) for tensor, _ in tensors)

    def share(values: Iterable[float]) -> float:
        parts = (prod(tensor.shape) * value for (tensor, _), value in zip(tensors, values, strict=True))
        return sum(parts) / entries if entries else 0.0

    figures = [found for _, found in tensors]
    norms = [_norm([found.norms[model] for found in figures]) for model in range(models)]
    return LayerFigures(
        layer=number,
        tensors=len(tensors),
        kept_density=[share(found.kept_density[model] for found in figures) for model in range(models)],
        conflict_rate=share(found.conflict_rate for found in figures),
        norms=norms,
        cosines=[[_cosine(figures, norms, first, second) for second in range(models)] for first in range(models)],
    )


def by_layer(report: MergeReport) -> list[LayerFigures]:
    """The figures of every layer that has merged tensors, in order; empty where no merged tensor belongs to a layer."""
    layers: dict[int, list[tuple[TensorReport, Figures]]] = defaultdict(list)
    for tensor in report.tensors:
        if tensor.figures is not None and tensor.layer is not None:
            layers[tensor.layer].append((tensor, tensor.figures))
    return [_layer(number, tensors, len(report.models)) for number, tensors in sorted(layers.items())]
