"""Exact magnitude thresholds of deltas or of plain values, and the histograms that they can be found from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from taskloom._selection import band_ranks
from taskloom.ops._backends import kernel
from taskloom.ops._checks import FLOATING, check_floating, check_shape
from taskloom.ops._register import register
from taskloom.ops.masked._bands import check_choice, check_number, check_ranks, segment_length
from taskloom.reference import masked as reference

_DIGITS = 1 << 16


class MagnitudeThreshold(NamedTuple):
    """The magnitude of a rank, and how many entries equal to it are among the entries of that rank and above.

    Attributes
    ----------
    threshold
        float32, or float64 where a tensor is float64. Entries whose magnitude exceeds it are kept.
    equal_kept
        int64, same shape: of the entries whose magnitude equals the threshold, those of the lowest ``equal_kept`` indices are kept too.
    """

    threshold: Tensor
    equal_kept: Tensor


def _as_list(op: str, name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    tensors = [value] if isinstance(value, Tensor) else value
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{op}: {name}: expected a tensor or a sequence of tensors, got {type(value).__name__}")
    if not tensors:
        raise ValueError(f"{op}: {name}: expected at least one tensor, got none")
    for tensor in tensors:
        if not (isinstance(tensor, Tensor) and tensor.dtype in FLOATING):
            check_floating(op, name, tensor)
    return list(tensors)


def _delta_lists(op: str, tuned: Tensor | Sequence[Tensor], base: Tensor | Sequence[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    tasks = _as_list(op, "tuned", tuned)
    if base is None:
        return tasks, []
    origins = _as_list(op, "base", base)
    if len(origins) != len(tasks):
        raise ValueError(f"{op}: base: expected {len(tasks)} tensors as in tuned, got {len(origins)}")
    for origin, task in zip(origins, tasks, strict=True):
        if origin.shape != task.shape:
            check_shape(op, "base", origin, task.shape, "tuned")
    return tasks, origins


def _is_wide(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.dtype == torch.float64 for tensor in tensors)


def magnitude_threshold(
    tuned: Tensor | Sequence[Tensor],
    base: Tensor | Sequence[Tensor] | None = None,
    *,
    rank: int | Sequence[int] | None = None,
    density: float | None = None,
    scope: Literal["tensor", "row"] = "tensor",
) -> MagnitudeThreshold:
    """Find the exact k-th largest ``|tuned - base|``, without sorting or storing the difference.

    Exactly k entries are kept by ``|tuned - base| > threshold`` together with the first ``equal_kept`` entries that equal the
    threshold: ties go to the lowest flat index, always (:func:`magnitude_mask` makes the mask).

    Parameters
    ----------
    tuned
        Tensor of any shape, or a sequence of tensors that are seen as one vector, in order (a whole model's task vector). float32,
        bfloat16, float16 or float64; dtypes may be mixed.
    base
        What is subtracted, of the same shapes; None takes the values of ``tuned`` themselves.
    rank
        k, or several (all are found together). 0 keeps nothing: its threshold is NaN, which no magnitude exceeds or equals, and
        ``equal_kept`` 0. The number of entries n keeps all: its threshold is the smallest magnitude.
    density
        Share of the n entries that is kept, in place of a rank: ``k = int(density * n)``.
    scope
        ``"tensor"`` ranks all entries together, ``"row"`` each slice of the last dimension by itself (one tensor only).

    Returns
    -------
    MagnitudeThreshold
        Both of shape ``[]`` (``[ranks]`` for a sequence of ranks); with ``scope="row"`` ``[rows]`` or ``[rows, ranks]``, rows in
        order of the flattened leading dimensions. Differences are taken and compared in float32 (float64 where any tensor is
        float64), as the bits of their absolute values: NaN ranks above infinity.

    Raises
    ------
    TypeError
        If a tensor is not floating point or a rank no int.
    ValueError
        If not exactly one of rank and density is given, one of them is out of range, or shapes differ.

    Notes
    -----
    This library. A sample brackets the threshold and one pass counts around it; where that fails, and over several tensors, radix
    histograms of 16 bits find it. Has no gradient.
    """
    op = "magnitude_threshold"
    tasks, origins = _delta_lists(op, tuned, base)
    check_choice(op, "scope", scope, ("tensor", "row"))
    by_row = scope == "row"
    if by_row and not isinstance(tuned, Tensor):
        raise ValueError(f'{op}: scope: "row" is for one tensor, got a sequence of {len(tasks)}')
    length = segment_length(tasks[0], scope) if by_row else sum(task.numel() for task in tasks)
    if (rank is None) == (density is None):
        raise ValueError(f"{op}: rank, density: expected exactly one of them, got {'neither' if rank is None else 'both'}")
    if density is not None:
        check_number(op, "density", density, 0, 1)
        ranks = [band_ranks(length, density)[1]]
    else:
        ranks = list(rank) if isinstance(rank, Sequence) else [rank] if rank is not None else []
        check_ranks(op, ranks, length, "a row" if by_row else "the whole")
    run = kernel(op, *tasks, *origins)
    found = (run or reference.magnitude_threshold)(tasks, origins, ranks, by_row)
    if isinstance(rank, Sequence):
        return MagnitudeThreshold(*found)
    return MagnitudeThreshold(found[0].squeeze(-1), found[1].squeeze(-1))


def magnitude_histogram(tuned: Tensor, base: Tensor | None = None, *, shift: int, prefix: int = 0, wide: bool | None = None) -> Tensor:
    """Count one 16-bit digit of the bits of ``|tuned - base|``.

    Histograms of the parts of a vector (shards, ranks) add up to that of the whole, so :func:`threshold_from_histograms` finds an exact
    threshold of data that no one place holds.

    Parameters
    ----------
    tuned, base
        As in :func:`magnitude_threshold`, one tensor each.
    shift
        Lowest bit of the digit: 16 or 0 in the 32 bits of a float32 magnitude, 48, 32, 16 or 0 in the 64 of a float64 one.
    prefix
        The higher digits, as ``bits >> (shift + 16)``: only entries that have them are counted. Not looked at for the highest digit.
    wide
        Whether magnitudes are taken in float64. Default: where a tensor is float64. All parts of a vector need the same.

    Returns
    -------
    Tensor
        int64 of shape ``[65536]``.

    Raises
    ------
    TypeError
        If a tensor is not floating point.
    ValueError
        If shapes differ, the shift is none of the above, the prefix is negative, or ``wide=False`` is asked of float64 tensors.
    """
    op = "magnitude_histogram"
    check_floating(op, "tuned", tuned)
    tensors = [tuned]
    if base is not None:
        check_floating(op, "base", base)
        check_shape(op, "base", base, tuned.shape, "tuned")
        tensors.append(base)
    needs_wide = _is_wide(tensors)
    if wide is None:
        wide = needs_wide
    if needs_wide and not wide:
        raise ValueError(f"{op}: wide: expected True for float64 tensors, got False")
    shifts = (0, 16, 32, 48) if wide else (0, 16)
    if shift not in shifts:
        raise ValueError(f"{op}: shift: expected one of {', '.join(map(str, shifts))}, got {shift}")
    if not 0 <= prefix < 1 << 47:
        raise ValueError(f"{op}: prefix: expected the higher digits of a magnitude, got {prefix}")
    run = kernel(op, *tensors)
    if run is None:
        return reference.magnitude_histogram(tuned, base, shift, prefix, wide)
    counts: Tensor = run(tuned, base, shift, prefix, wide)
    return counts


def _threshold_of_bits(bits: int, wide: bool) -> Tensor:
    integer, floating = (torch.int64, torch.float64) if wide else (torch.int32, torch.float32)
    return torch.tensor(bits, dtype=integer).view(floating)


def threshold_from_histograms(histogram: Callable[[int, int], Tensor], rank: int, wide: bool = False) -> MagnitudeThreshold:
    """Find an exact threshold from histograms that may be sums over shards or ranks.

    Parameters
    ----------
    histogram
        Called as ``histogram(shift, prefix)`` for two digits (four with ``wide``), the highest first: the sum over all parts of
        :func:`magnitude_histogram` with these arguments, for instance after an all-reduce.
    rank
        k: ``0 <= k <= n``, where n is the sum of the first histogram.
    wide
        Whether the histograms are of float64 magnitudes.

    Returns
    -------
    MagnitudeThreshold
        As :func:`magnitude_threshold` of the whole, on the CPU. ``equal_kept`` counts over all parts in order; each part finds its own
        share of it with :func:`split_threshold` or from its own count.

    Raises
    ------
    ValueError
        If the rank is out of range or a histogram has another shape.
    """
    op = "threshold_from_histograms"
    prefix = above = 0
    top = 48 if wide else 16
    for shift in range(top, -1, -16):
        counts = histogram(shift, prefix).cpu()
        if counts.shape != (_DIGITS,):
            raise ValueError(f"{op}: histogram: expected shape ({_DIGITS},), got {tuple(counts.shape)}")
        if shift == top:
            check_ranks(op, [rank], int(counts.sum()), "the whole")
            if rank == 0:
                return MagnitudeThreshold(_threshold_of_bits((1 << (63 if wide else 31)) - 1, wide), torch.tensor(0))
        from_top = counts.flip(0).cumsum(0) + above
        place = int((from_top < rank).sum())
        digit = _DIGITS - 1 - place
        above = int(from_top[place]) - int(counts[digit])
        prefix = (prefix << 16) | digit
    return MagnitudeThreshold(_threshold_of_bits(prefix, wide), torch.tensor(rank - above))


def _count_equal(threshold: Tensor, tuned: Tensor, base: Tensor | None) -> int:
    wide = threshold.dtype == torch.float64
    bits = int(threshold.cpu().view(torch.int64 if wide else torch.int32))
    return int(magnitude_histogram(tuned, base, shift=0, prefix=bits >> 16, wide=wide)[bits & 0xFFFF])


def split_threshold(found: MagnitudeThreshold, tuned: Sequence[Tensor], base: Sequence[Tensor] | None = None) -> list[MagnitudeThreshold]:
    """Share the kept ties of a threshold of several tensors out among them, the first tensors first.

    Parameters
    ----------
    found
        Of :func:`magnitude_threshold` for the same tensors, shape ``[]`` or ``[ranks]``.
    tuned, base
        The tensors.

    Returns
    -------
    list of MagnitudeThreshold
        One per tensor, of the shape of ``found``: the same threshold, and how many of the tensor's own entries that equal it are kept.
        Each keeps in its tensor what ``found`` keeps of it in the whole (:func:`magnitude_mask`, :func:`sparse_merge`).

    Raises
    ------
    TypeError, ValueError
        As :func:`magnitude_threshold`.
    """
    tasks, origins = _delta_lists("split_threshold", tuned, base)
    left = found.equal_kept.reshape(-1).tolist()
    shares = []
    for number, task in enumerate(tasks):
        own = []
        for index, threshold in enumerate(found.threshold.reshape(-1)):
            equal = _count_equal(threshold, task, origins[number] if origins else None) if left[index] > 0 else 0
            own.append(min(equal, left[index]))
            left[index] -= own[-1]
        kept = torch.tensor(own, dtype=torch.int64, device=found.equal_kept.device).reshape(found.equal_kept.shape)
        shares.append(MagnitudeThreshold(found.threshold, kept))
    return shares


def _fake_magnitude_threshold(tuned: Sequence[Tensor], base: Sequence[Tensor], rank: Sequence[int], by_row: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if _is_wide([*tuned, *base]) else torch.float32
    shape = (prod(tuned[0].shape[:-1]), len(rank)) if by_row else (len(rank),)
    return tuned[0].new_empty(shape, dtype=dtype), tuned[0].new_empty(shape, dtype=torch.int64)


def _fake_magnitude_histogram(tuned: Tensor, base: Tensor | None, shift: int, prefix: int, wide: bool) -> Tensor:
    return tuned.new_empty((_DIGITS,), dtype=torch.int64)


register("magnitude_threshold", fake=_fake_magnitude_threshold)
register("magnitude_histogram", fake=_fake_magnitude_histogram, discrete=True)
