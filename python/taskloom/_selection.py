"""Rules of selection that the ops and the checkpoint merge share; needs no torch."""

from __future__ import annotations

from typing import Literal


def band_ranks(
    numel: int,
    density: float,
    gamma: float = 0.0,
    *,
    at_least_one: bool = False,
    on_overflow: Literal["drop", "density"] = "drop",
    outliers_first: bool = True,
) -> tuple[int, int]:
    """Half-open range of descending magnitude ranks that a density and a removed top share keep of ``numel`` entries.

    ``n_top = int(gamma * numel)`` ranks are removed and the next ``n_keep = int(density * numel)`` kept (Python float product,
    truncated). Where both do not fit, ``drop`` keeps fewer (official Breadcrumbs), ``density`` removes fewer (mergekit).
    ``at_least_one`` keeps one entry of a non-empty tensor for any positive density (mergekit's TIES). Without ``outliers_first`` the
    top ``n_keep`` are taken first and the top ``n_top`` of these removed, so there is nothing that does not fit.
    """
    if numel == 0:
        return 0, 0
    keep = min(numel, int(density * numel))
    if at_least_one and density > 0:
        keep = max(1, keep)
    top = min(numel, int(gamma * numel))
    if not outliers_first:
        return top, max(top, keep)
    if top + keep > numel:
        if on_overflow == "density":
            top = numel - keep
        else:
            keep = numel - top
    return top, top + keep


def name_key(name: str) -> int:
    """FNV-1a hash (64 bits) of a tensor's name in UTF-8: the same on every machine, so random masks are too."""
    value = 0xCBF29CE484222325
    for byte in name.encode("utf-8"):
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value
