"""Where the values of a task vector come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Slot:
    """One tensor of a vector before its values are known; ``device`` is None where they come from a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device | None

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Values(Protocol):
    """The values of one source's tensor, as long as the source's ``opened`` lasts."""

    def piece(self, begin: int, count: int) -> Tensor:
        """Entries ``begin`` .. ``begin + count`` of the flat tensor, in the slot's dtype; valid until the next call."""


class Source(ABC):
    """Deltas by name, of which one tensor, or a piece of one, is looked at at a time.

    Attributes
    ----------
    slots
        What there is, in order.
    streams
        Whether the values come from a file, and so in pieces, rather than lie in memory.
    """

    slots: Mapping[str, Slot]
    streams: bool

    @abstractmethod
    def opened(self, name: str) -> AbstractContextManager[Values]:
        """The values of one tensor."""

    def place(self, name: str) -> Hashable:
        """Equal for names of one tensor."""
        return name


class _Whole:
    def __init__(self, flat: Tensor) -> None:
        self._flat = flat

    def piece(self, begin: int, count: int) -> Tensor:
        return self._flat[begin : begin + count]


class MemorySource(Source):
    """Deltas in memory: contiguous, finite, and not written to any more.

    Attributes
    ----------
    flat
        Every tensor as a vector; names of one tensor (tied weights) have the same.
    """

    streams = False

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        once = {id(tensor): tensor.reshape(-1) for tensor in tensors.values()}
        self.flat = {name: once[id(tensor)] for name, tensor in tensors.items()}
        self.slots = {name: Slot(tuple(tensor.shape), tensor.dtype, tensor.device) for name, tensor in tensors.items()}

    def opened(self, name: str) -> AbstractContextManager[Values]:
        return nullcontext(_Whole(self.flat[name]))

    def place(self, name: str) -> Hashable:
        return id(self.flat[name])


def cut(numel: int, length: int) -> Iterator[tuple[int, int]]:
    """Begin and length of the pieces of a flat tensor; one that is empty has none."""
    for begin in range(0, numel, length):
        yield begin, min(length, numel - begin)
