"""The differences of two checkpoints, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from taskloom.merge.arrays import (
    Array,
    Mappings,
    blocks,
    has_values,
    over_threads,
    piece_bounds,
    squared_norm,
    unit_bits,
    values,
)
from taskloom.merge.checkpoint import Checkpoint, open_checkpoint
from taskloom.merge.errors import MergeError
from taskloom.merge.header import TensorEntry
from taskloom.merge.locate import locate
from taskloom.merge.patterns import matching_names

Status = Literal["same", "changed", "dtype", "shape", "only_a", "only_b"]


@dataclass(frozen=True)
class TensorDiff:
    """One tensor of either checkpoint.

    Attributes
    ----------
    name, dtype_a, dtype_b, shape_a, shape_b
        The tensor; None where it is missing.
    status
        ``same``; ``changed``: entries differ; ``dtype``: other dtypes, whatever the values (which are
        not compared where one dtype has no arithmetic); ``shape``: other shapes, not compared;
        ``only_a``, ``only_b``.
    entries, changed
        Entries compared, and those that differ by more than the tolerance. Where an entry has less than 8 bits these are bytes.
    max_abs
        Largest ``|a - b|`` of finite differences; None where values were not compared.
    norm_difference, norm_b, relative_norm
        ``||a - b||``, ``||b||`` and their ratio over entries whose difference is finite. The ratio is None where b is zero and a is not;
        ``norm_b`` is not computed (None) where every bit is the same.
    nonfinite
        Changed entries whose difference is NaN or infinite.
    """

    name: str
    status: Status
    dtype_a: str | None
    dtype_b: str | None
    shape_a: list[int] | None
    shape_b: list[int] | None
    entries: int = 0
    changed: int = 0
    max_abs: float | None = None
    norm_difference: float | None = None
    norm_b: float | None = None
    relative_norm: float | None = None
    nonfinite: int = 0


@dataclass(frozen=True)
class DiffTotals:
    """Sums over all tensors: how many there are of each status, entries compared and changed.

    ``relative_norm`` is ``||a - b|| / ||b||`` over the tensors with a difference.
    """

    tensors: int
    same: int
    changed: int
    dtype: int
    shape: int
    only_a: int
    only_b: int
    entries: int
    changed_entries: int
    changed_share: float
    max_abs: float
    norm_difference: float
    relative_norm: float | None


@dataclass(frozen=True)
class DiffReport:
    """Two checkpoints compared; ``same`` where every tensor is."""

    a: str
    b: str
    same: bool
    tolerance: float
    totals: DiffTotals
    tensors: list[TensorDiff]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain types."""
        return asdict(self)


@dataclass
class _Sums:
    """What one piece adds. ``squared_b`` is None where the piece is equal and nobody has asked for it yet."""

    changed: int = 0
    nonfinite: int = 0
    max_abs: float = 0.0
    squared_difference: float = 0.0
    squared_b: float | None = None


@dataclass(frozen=True)
class _Pair:
    """A tensor that both checkpoints have in one shape: its entries as bits."""

    name: str
    dtype_a: str
    dtype_b: str
    a: Array
    b: Array

    @property
    def is_measured(self) -> bool:
        return has_values(self.dtype_a) and has_values(self.dtype_b)


@dataclass(frozen=True)
class _Piece:
    pair: _Pair
    begin: int
    end: int


def _kind(pair: _Pair) -> Any:
    """The type in which values are subtracted: float32 for float32 and below, complex, else float64."""
    codes = {pair.dtype_a, pair.dtype_b}
    if "C64" in codes:
        return np.complex128
    return np.float32 if codes <= {"F32", "BF16", "F16"} else np.float64


def _squared_b(pair: _Pair, begin: int, end: int) -> float:
    total, kind = 0.0, _kind(pair)
    for block in blocks(begin, end):
        b = values(pair.b[block], pair.dtype_b).astype(kind)
        total += squared_norm(np.where(np.isfinite(b), b, 0))
    return total


def _differs(pair: _Pair, block: slice, a: Array, b: Array) -> Array:
    """Entries that are not the same: by bits in one dtype; in two dtypes by value, NaN being the same as NaN."""
    if pair.dtype_a == pair.dtype_b:
        return np.asarray(pair.a[block] != pair.b[block])
    return np.asarray((a != b) & ~(np.isnan(a) & np.isnan(b)))


def _measure(pair: _Pair, begin: int, end: int, tolerance: float) -> _Sums:
    kind, squared_b = _kind(pair), 0.0
    sums = _Sums()
    for block in blocks(begin, end):
        a, b = values(pair.a[block], pair.dtype_a).astype(kind), values(pair.b[block], pair.dtype_b).astype(kind)
        differs = _differs(pair, block, a, b)
        size = np.abs(a - b)
        finite = np.isfinite(size)
        if not finite.all():
            # Equal infinities and NaNs subtract to NaN.
            size[~differs] = 0
            finite |= ~differs
            sums.nonfinite += int(np.count_nonzero(~finite))
            b[~(finite & np.isfinite(b))] = 0
        # A difference that is NaN is above every tolerance.
        sums.changed += int(np.count_nonzero(differs if tolerance == 0 else ~(size <= tolerance)))
        size[~finite] = 0
        squared_b += squared_norm(b)
        sums.squared_difference += squared_norm(size)
        sums.max_abs = max(sums.max_abs, float(size.max()))
    sums.squared_b = squared_b
    return sums


def _compare(piece: _Piece, tolerance: float) -> _Sums:
    pair, begin, end = piece.pair, piece.begin, piece.end
    # An error state belongs to its thread.
    with np.errstate(all="ignore"):
        if pair.dtype_a == pair.dtype_b:
            unequal = 0
            for block in blocks(begin, end):
                unequal += int(np.count_nonzero(pair.a[block] != pair.b[block]))
                if unequal and pair.is_measured:
                    break
            if not unequal or not pair.is_measured:
                return _Sums(changed=unequal)
        return _measure(pair, begin, end, tolerance)


def _summed(pair: _Pair, sums: list[_Sums]) -> dict[str, Any]:
    changed = sum(own.changed for own in sums)
    figures: dict[str, Any] = {"entries": len(pair.b), "changed": changed}
    if not pair.is_measured:
        return figures
    if all(own.squared_b is None for own in sums):
        return figures | {"max_abs": 0.0, "norm_difference": 0.0, "relative_norm": 0.0}
    difference = math.sqrt(sum(own.squared_difference for own in sums))
    bounds = list(piece_bounds(len(pair.b), unit_bits(pair.dtype_b)))
    whole = [
        own.squared_b if own.squared_b is not None else _squared_b(pair, begin, end) for own, (begin, end) in zip(sums, bounds, strict=True)
    ]
    norm = math.sqrt(math.fsum(whole))
    return figures | {
        "max_abs": max((own.max_abs for own in sums), default=0.0),
        "norm_difference": difference,
        "norm_b": norm,
        "relative_norm": 0.0 if difference == 0 else difference / norm if norm > 0 else None,
        "nonfinite": sum(own.nonfinite for own in sums),
    }


def _status(pair: _Pair, changed: int) -> Status:
    if pair.dtype_a != pair.dtype_b:
        return "dtype"
    return "changed" if changed else "same"


def _pairs(a: Checkpoint, b: Checkpoint, names: list[str], files: Mappings) -> Iterator[_Pair]:
    for name in names:
        one, other = a.tensors.get(name), b.tensors.get(name)
        if one is None or other is None or one.shape != other.shape:
            continue
        if one.dtype == other.dtype or (has_values(one.dtype) and has_values(other.dtype)):
            yield _Pair(name, one.dtype, other.dtype, files.bits(one), files.bits(other))


def _unmatched(name: str, one: TensorEntry | None, other: TensorEntry | None) -> TensorDiff:
    status: Status = "only_b" if one is None else "only_a" if other is None else "shape" if one.shape != other.shape else "dtype"
    return TensorDiff(
        name=name,
        status=status,
        dtype_a=None if one is None else one.dtype,
        dtype_b=None if other is None else other.dtype,
        shape_a=None if one is None else list(one.shape),
        shape_b=None if other is None else list(other.shape),
    )


def _totals(tensors: list[TensorDiff]) -> DiffTotals:
    statuses = [tensor.status for tensor in tensors]
    entries, changed = sum(tensor.entries for tensor in tensors), sum(tensor.changed for tensor in tensors)
    difference = math.sqrt(math.fsum((tensor.norm_difference or 0.0) ** 2 for tensor in tensors))
    norm = math.sqrt(math.fsum((tensor.norm_b or 0.0) ** 2 for tensor in tensors if tensor.norm_difference))
    return DiffTotals(
        tensors=len(tensors),
        same=statuses.count("same"),
        changed=statuses.count("changed"),
        dtype=statuses.count("dtype"),
        shape=statuses.count("shape"),
        only_a=statuses.count("only_a"),
        only_b=statuses.count("only_b"),
        entries=entries,
        changed_entries=changed,
        changed_share=changed / entries if entries else 0.0,
        max_abs=max((tensor.max_abs or 0.0 for tensor in tensors), default=0.0),
        norm_difference=difference,
        relative_norm=0.0 if difference == 0 else difference / norm if norm > 0 else None,
    )


def diff_checkpoints(
    a: str | Path,
    b: str | Path,
    *,
    tolerance: float = 0.0,
    tensor: str | None = None,
    threads: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> DiffReport:
    """Compare the tensors of two checkpoints; weights are read block by block from mapped files.

    Entries of one dtype are the same where their bits are: 0.0 and -0.0 differ, and so do two NaNs of other bits. Where dtypes differ,
    values are compared in float32 (float64 where one is neither float32, bfloat16 nor float16), and NaN is the same as NaN. Floating
    point of 8 bits and less is compared by bits alone.

    Parameters
    ----------
    a, b
        Folders, ``.safetensors`` files or hub ids, as in a recipe.
    tolerance
        Largest ``|a - b|`` of entries that count as the same, >= 0.
    tensor
        Glob; only tensors whose whole name matches it.
    threads
        0 means all cores.
    progress
        Called with ``comparing``, the bytes of a and b compared so far, and all of them.

    Returns
    -------
    DiffReport
        Tensors of a in its order, then those that only b has.

    Raises
    ------
    CheckpointError
        If a checkpoint cannot be found or read.
    MergeError
        If nothing matches ``tensor``, or the tolerance is negative or no number.
    """
    if not (tolerance >= 0 and math.isfinite(tolerance)):
        raise MergeError(f"tolerance: expected a number >= 0, got {tolerance}")
    first, second = open_checkpoint(locate(str(a))), open_checkpoint(locate(str(b)))
    names = matching_names([*first.tensors, *(name for name in second.tensors if name not in first.tensors)], tensor)
    files = Mappings()
    pairs = {pair.name: pair for pair in _pairs(first, second, names, files)}
    pieces = [_Piece(pair, begin, end) for pair in pairs.values() for begin, end in piece_bounds(len(pair.b), unit_bits(pair.dtype_b))]
    sums: dict[str, list[_Sums]] = {name: [] for name in pairs}
    done, total = 0, sum(pair.a.nbytes + pair.b.nbytes for pair in pairs.values())
    for piece, own in zip(pieces, over_threads(lambda piece: _compare(piece, tolerance), pieces, threads), strict=True):
        sums[piece.pair.name].append(own)
        done += (piece.end - piece.begin) * (piece.pair.a.itemsize + piece.pair.b.itemsize)
        if progress is not None:
            progress("comparing", done, total)
    tensors = []
    for name in names:
        found = _unmatched(name, first.tensors.get(name), second.tensors.get(name))
        if name in pairs:
            figures = _summed(pairs[name], sums[name])
            found = replace(found, status=_status(pairs[name], figures["changed"]), **figures)
        tensors.append(found)
    return DiffReport(
        a=str(a),
        b=str(b),
        same=all(tensor.status == "same" for tensor in tensors),
        tolerance=tolerance,
        totals=_totals(tensors),
        tensors=tensors,
    )
