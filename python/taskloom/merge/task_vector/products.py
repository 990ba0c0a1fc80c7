"""Inner products of task vectors, one piece at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from taskloom.merge.task_vector.combination import PIECE, Terms, combined_piece, each_piece
from taskloom.merge.task_vector.sources import Slot, Source
from taskloom.ops.masked.block_scale_merge import block_scale_merge_backward


def _product(left: Tensor | None, right: Tensor | None) -> float:
    """In float64, summed in a fixed order that does not depend on the number of threads; None is zero."""
    if left is None or right is None:
        return 0.0
    if left.device != right.device:
        # One is from a file.
        left, right = (left, right.to(left.device)) if left.is_cuda else (left.to(right.device), right)
    return float(block_scale_merge_backward([left], [[right]]))


def products(
    left: Terms, left_slots: Mapping[str, Slot], right: Terms, right_slots: Mapping[str, Slot], pairs: Sequence[tuple[int, int]]
) -> list[float]:
    """Inner products of two combinations (0 is the left, 1 the right one) over the values that their tensors have, in one pass.

    On the CPU the pieces are the same whether the values are in memory or in a file, and so is the result, bit for bit.
    """
    # A source that both combine is read once.
    both = {**left, **right}
    sums: list[list[float]] = [[] for _ in pairs]

    def of(terms: Terms, name: str, slot: Slot, parts: Mapping[Source, Tensor]) -> Tensor | None:
        return combined_piece(terms, name, slot, [parts[source] for source in terms]) if terms else None

    with torch.no_grad():
        for name, slot in left_slots.items() if both else ():

            def multiply(_begin: int, _count: int, parts: list[Tensor], name: str = name, slot: Slot = slot) -> None:
                found = dict(zip(both, parts, strict=True))
                first = of(left, name, slot, found)
                sides = first, first if right is left else of(right, name, right_slots[name], found)
                for total, (one, two) in zip(sums, pairs, strict=True):
                    total.append(_product(sides[one], sides[two]))

            on_gpu = any(device is not None and device.type == "cuda" for device in (slot.device, right_slots[name].device))
            each_piece(both, name, slot.numel, multiply, None if on_gpu else PIECE)
    return [math.fsum(total) for total in sums]
