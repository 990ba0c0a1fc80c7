"""Inner products of task vectors, one piece at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from taskloom.merge.task_vector.combination import PIECE, Terms, check_alike, combined_piece, each_piece
from taskloom.merge.task_vector.sources import Slot, Source
from taskloom.ops.masked.block_scale_merge import block_scale_merge_backward


def _product(left: Tensor, right: Tensor) -> float:
    """In float64, summed in a fixed order that does not depend on the number of threads."""
    return float(block_scale_merge_backward([left], [[right]]))


def dot(left: Terms, left_slots: Mapping[str, Slot], right: Terms, right_slots: Mapping[str, Slot]) -> float:
    """The inner product of two combinations, over the values that their tensors have.

    On the CPU the pieces are the same whether the values are in memory or in a file, and so is the result, bit for bit.
    """
    if left is not right:
        check_alike(left_slots, right_slots, "dot")
    if not left or not right:
        return 0.0
    products: list[float] = []
    # A source that both combine is read once.
    both = {**left, **right}

    def of(terms: Terms, name: str, slot: Slot, parts: Mapping[Source, Tensor]) -> Tensor:
        return combined_piece(terms, name, slot, [parts[source] for source in terms])

    with torch.no_grad():
        for name, slot in left_slots.items():

            def multiply(_begin: int, _count: int, parts: list[Tensor], name: str = name, slot: Slot = slot) -> None:
                found = dict(zip(both, parts, strict=True))
                first = of(left, name, slot, found)
                products.append(_product(first, first if left is right else of(right, name, right_slots[name], found)))

            on_gpu = slot.device is not None and slot.device.type == "cuda"
            each_piece(both, name, slot.numel, multiply, None if on_gpu else PIECE)
    return math.fsum(products)
