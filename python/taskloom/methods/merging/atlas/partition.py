"""Random groups of a block's entries: Philox words, so that every device and every reload draws the same."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from taskloom._selection import name_key

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
LARGEST = 256
# Counters at a time: their few int64 vectors stay in a core's cache; a GPU wants more of them at once.
_PIECE = {"cpu": 1 << 14}
_PIECE_ON_DEVICE = 1 << 22


def _spread(factor: int, words: Tensor, high: Tensor) -> None:
    """Turn words into the low and high 32 bits of their products with a factor, in place."""
    # The product of two 32-bit numbers fits 64 bits without a sign; as int64 it may wrap, which its bits do not show.
    words.mul_(factor)
    torch.bitwise_right_shift(words, 32, out=high)
    high.bitwise_and_(_WORD)
    words.bitwise_and_(_WORD)


def _words(seed: int, key: int, counters: Tensor) -> list[Tensor]:
    """The four 32-bit words of each counter ``(block, key)`` under a seed, as :func:`taskloom.reference.masked.philox.philox_blocks`."""
    c0, c1 = counters & _WORD, counters >> 32
    c2, c3 = torch.full_like(counters, key & _WORD), torch.full_like(counters, key >> 32)
    high0, high1 = torch.empty_like(counters), torch.empty_like(counters)
    key0, key1 = seed & _WORD, seed >> 32
    for _ in range(_ROUNDS):
        _spread(_MULTIPLIERS[0], c0, high0)
        _spread(_MULTIPLIERS[1], c2, high1)
        high1.bitwise_xor_(c1).bitwise_xor_(key0)
        high0.bitwise_xor_(c3).bitwise_xor_(key1)
        # What held the counters that went into the next ones is room for the next high halves.
        c0, c1, c2, c3, high0, high1 = high1, c2, high0, c0, c1, c3
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def draw_groups(name: str, shape: Sequence[int], groups: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Put each entry of a block into one of K groups, all of them equally likely.

    Parameters
    ----------
    name
        The block's name; blocks of one shape draw independently.
    shape
        The block's shape.
    groups
        K, 1 to 256.
    seed
        Not negative, below 2**64. Default 0.
    device
        Where the groups are drawn and stay. Default ``"cpu"``; the result is the same on every device.

    Returns
    -------
    Tensor
        uint8 of that shape: ``(word_j * K) >> 32``, with the j-th entry's word of Philox 4x32-10 under ``seed`` and the name's FNV-1a hash.

    Notes
    -----
    Source: aTLAS x K, arXiv 2407.02880, which draws unseeded and one partition for all blocks of a shape; the generator is this library's.
    """
    where = torch.device(device)
    numel = 1
    for size in shape:
        numel *= size
    drawn = torch.empty(-(-numel // 4), 4, dtype=torch.uint8, device=where)
    key, piece = name_key(name), _PIECE.get(where.type, _PIECE_ON_DEVICE)
    for first in range(0, len(drawn), piece):
        counters = torch.arange(first, min(first + piece, len(drawn)), dtype=torch.int64, device=where)
        rows = drawn[first : first + len(counters)]
        for place, word in enumerate(_words(seed, key, counters)):
            rows[:, place] = word.mul_(groups).bitwise_right_shift_(32)
    return drawn.view(-1)[:numel].view(tuple(shape))


class Partition:
    """The groups of a model's blocks; never written to, so copies of a model share them.

    Attributes
    ----------
    groups, seed
        K, and the seed.
    parts
        uint8 for each block; None for K = 1.

    Raises
    ------
    TypeError
        If ``groups`` or ``seed`` is no integer.
    ValueError
        If ``groups`` is not in 1..256 or larger than every block, or the seed is not in 0..2**64 - 1.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[torch.Size], groups: int, seed: int, device: torch.device) -> None:
        for argument, value in (("partitions", groups), ("partition_seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{argument}: expected an integer, got {type(value).__name__}")
        largest = max(shape.numel() for shape in shapes)
        if not 1 <= groups <= LARGEST:
            raise ValueError(f"partitions: expected 1 to {LARGEST}, got {groups}")
        if groups > max(largest, 1):
            raise ValueError(f"partitions: expected at most {largest}, the entries of the largest block, got {groups}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"partition_seed: expected 0 to 2**64 - 1, got {seed}")
        self.groups, self.seed = groups, seed
        drawn = zip(names, shapes, strict=True)
        self.parts = None if groups == 1 else tuple(draw_groups(name, shape, groups, seed, device) for name, shape in drawn)

    def __deepcopy__(self, memo: dict[int, Any]) -> Partition:
        return self

    def to(self, device: torch.device) -> Partition:
        """The same on another device."""
        if self.parts is None or all(one.device == device for one in self.parts):
            return self
        moved = copy(self)
        moved.parts = tuple(one.to(device) for one in self.parts)
        return moved
