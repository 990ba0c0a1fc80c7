"""The two-sided magnitude mask of one delta."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from taskloom.methods.merging.breadcrumbs.bands import BandRule, Granularity, OnOverflow, check_density, check_gamma, is_finite
from taskloom.ops import magnitude_mask, sparse_merge
from taskloom.ops._checks import check_floating, check_untracked, check_writable


def _band(rule: BandRule, delta: Tensor, density: float, gamma: float) -> tuple[int, int]:
    """The kept ranks of a delta that was looked at; warns where they are fewer than asked for."""
    op = rule.op
    check_floating(op, "delta", delta)
    share = check_density(op, "density", density)
    band = rule.ranks(delta, share, check_gamma(op, "gamma", gamma))
    if not is_finite(delta):
        raise ValueError(f"{op}: delta: expected finite values, got NaN or infinity")
    if delta.numel() > 0:
        length = rule.length(delta)
        if band[0] >= band[1]:
            warnings.warn(f"{op}: nothing is kept of segments of {length} entries at density {density}, gamma {gamma}", stacklevel=3)
        elif rule.is_clipped(delta, share, band):
            warnings.warn(
                f"{op}: {band[1] - band[0]} of {length} entries of a segment are kept, fewer than density {density} says: gamma {gamma} "
                "removes too many; on_overflow='density' removes fewer",
                stacklevel=3,
            )
    return band


def breadcrumbs_(
    delta: Tensor,
    density: float = 0.15,
    gamma: float = 0.01,
    *,
    granularity: Granularity = "tensor",
    outliers_first: bool = True,
    on_overflow: OnOverflow = "drop",
) -> Tensor:
    """Set the largest and the small entries of a delta to zero, in place; the band between them stays as it is.

    Of a segment of d entries, ranked by magnitude, the first ``int(gamma * d)`` go and the next ``int(density * d)`` stay (Python float
    products, truncated). Of equal magnitudes the one with the lower index ranks higher. Nothing is rescaled.

    Parameters
    ----------
    delta
        float32, bfloat16, float16 or float64 of any shape, such as tuned minus base. Take that difference in float32: in bfloat16 it
        changes ranks.
    density
        Kept share of each segment, in (0, 1]. Default 0.15.
    gamma
        Share of the largest entries that is removed, in [0, 1). Default 0.01.
    granularity
        Segment: ``"tensor"`` (the paper and mergekit), or ``"row"``, each slice of the last dimension (the official code; there a tensor
        without dimensions stays whole).
    outliers_first
        False takes the top ``int(density * d)`` first and then removes the top ``int(gamma * d)`` of them.
    on_overflow
        Where both shares do not fit: ``"drop"`` keeps fewer entries, with a warning (official code); ``"density"`` removes fewer outliers
        (mergekit).

    Returns
    -------
    Tensor
        ``delta``.

    Raises
    ------
    TypeError
        If ``delta`` is no floating-point tensor, or a share no number.
    ValueError
        If a share is out of range, ``delta`` holds NaN or infinity, or it repeats elements (expanded); it is unchanged then.
    RuntimeError
        If ``delta`` requires grad in grad mode.

    Warns
    -----
    UserWarning
        If a segment keeps nothing, or fewer entries than density says.

    Notes
    -----
    Model Breadcrumbs (arXiv 2312.06795, section 3); the ranks are exact, on every device and for any number of threads.
    """
    op = "breadcrumbs_"
    rule = BandRule(op, granularity, outliers_first, on_overflow)
    check_floating(op, "delta", delta)
    check_writable(op, "delta", delta)
    check_untracked(op, None, delta=delta)
    band = _band(rule, delta, density, gamma)
    if band == (0, rule.length(delta)):
        return delta
    with torch.no_grad():
        return sparse_merge(None, [delta], select="magnitude", scope=granularity, rank=[band], out=delta)


def breadcrumbs_mask(
    delta: Tensor,
    density: float = 0.15,
    gamma: float = 0.01,
    *,
    granularity: Granularity = "tensor",
    outliers_first: bool = True,
    on_overflow: OnOverflow = "drop",
) -> Tensor:
    """Bool tensor of the entries that :func:`breadcrumbs_` keeps; parameters, errors and warnings are the same."""
    rule = BandRule("breadcrumbs_mask", granularity, outliers_first, on_overflow)
    band = _band(rule, delta, density, gamma)
    return magnitude_mask(delta.detach(), rank=band, scope=granularity)
