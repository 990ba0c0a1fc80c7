"""One bit for every entry of a model's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

import taskloom
from taskloom.archive.format import mask_bytes
from taskloom.merge.align import some


class PackedMask:
    """A mask over the tensors of a model, one bit an entry.

    Parameters
    ----------
    bits
        By tensor, uint8 of shape ``[ceil(n / 8)]`` for its n entries: entry i, in row-major order, is bit ``i % 8`` of byte ``i // 8``, the
        least significant first (:func:`taskloom.pack_mask`); the bits after the last entry are zero.
    shapes
        The tensors' shapes.

    Raises
    ------
    KeyError
        If bits and shapes have different names.
    TypeError, ValueError
        If bits are no uint8 tensors, are not as many as the shape needs, or are set after the last entry.
    """

    def __init__(self, bits: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
        if bits.keys() != shapes.keys():
            raise KeyError(f"PackedMask: expected bits and shapes of the same tensors, got {some(list(bits))} and {some(list(shapes))}")
        self._bits = dict(bits)
        self._shapes = {name: torch.Size(shapes[name]) for name in bits}
        for name, shape in self._shapes.items():
            _check_bits(name, self._bits[name], shape.numel())

    @classmethod
    def pack(cls, masks: Mapping[str, Tensor]) -> PackedMask:
        """Pack bool tensors.

        Raises
        ------
        TypeError
            If a tensor is not bool.
        """
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"PackedMask: {name!r}: expected a bool tensor, got {kind}")
        return cls({name: taskloom.pack_mask(mask) for name, mask in masks.items()}, {name: mask.shape for name, mask in masks.items()})

    @property
    def bits(self) -> Mapping[str, Tensor]:
        """The packed bits by tensor, as the ops take them."""
        return MappingProxyType(self._bits)

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The tensors' shapes."""
        return MappingProxyType(self._shapes)

    @property
    def numel(self) -> int:
        """Number of entries."""
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the bits."""
        return sum(bits.numel() for bits in self._bits.values())

    def __len__(self) -> int:
        return len(self._bits)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __repr__(self) -> str:
        return f"PackedMask({len(self)} tensors, {self.numel} entries, density {self.density():.4g})"

    def unpack(self) -> dict[str, Tensor]:
        """The mask as bool tensors."""
        return {name: taskloom.unpack_mask(bits, self._shapes[name]) for name, bits in self._bits.items()}

    def count(self) -> int:
        """How many entries are set."""
        ones = (taskloom.mask_count([bits], self._shapes[name].numel(), 1)[1][1] for name, bits in self._bits.items())
        return sum(int(one) for one in ones)

    def density(self) -> float:
        """The share of entries that are set; 0 where there is none."""
        return self.count() / self.numel if self.numel else 0.0

    def to(self, device: torch.device | str) -> PackedMask:
        """The mask on a device."""
        return PackedMask({name: bits.to(device) for name, bits in self._bits.items()}, self._shapes)

    def _combine(self, other: PackedMask, combine: Callable[[Tensor, Tensor], Tensor]) -> PackedMask:
        check_same_tensors([self, other])
        return PackedMask({name: combine(bits, other.bits[name]) for name, bits in self._bits.items()}, self._shapes)

    def __and__(self, other: object) -> PackedMask:
        if not isinstance(other, PackedMask):
            return NotImplemented
        return self._combine(other, torch.bitwise_and)

    def __or__(self, other: object) -> PackedMask:
        if not isinstance(other, PackedMask):
            return NotImplemented
        return self._combine(other, torch.bitwise_or)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedMask):
            return NotImplemented
        return self._shapes == other._shapes and all(torch.equal(bits, other._bits[name]) for name, bits in self._bits.items())


def _check_bits(name: str, bits: Tensor, numel: int) -> None:
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
        kind = bits.dtype if isinstance(bits, Tensor) else type(bits).__name__
        raise TypeError(f"PackedMask: {name!r}: expected packed bits as uint8, got {kind}")
    if bits.shape != (mask_bytes(numel),):
        raise ValueError(f"PackedMask: {name!r}: expected {mask_bytes(numel)} bytes for {numel} entries, got shape {tuple(bits.shape)}")
    if numel % 8 and int(bits[-1]) >> numel % 8:
        raise ValueError(f"PackedMask: {name!r}: expected zeros after the last of {numel} entries, got bits that are set")


def check_same_tensors(masks: Sequence[PackedMask]) -> None:
    """Refuse masks of different models.

    Raises
    ------
    KeyError
        If names differ.
    ValueError
        If shapes differ.
    """
    first = masks[0].shapes
    for mask in masks[1:]:
        if mask.shapes.keys() != first.keys():
            raise KeyError(f"masks: expected those of the same tensors, got {some(list(first))} and {some(list(mask.shapes))}")
        for name, shape in first.items():
            if mask.shapes[name] != shape:
                raise ValueError(f"masks: {name!r}: expected one shape, got {tuple(shape)} and {tuple(mask.shapes[name])}")
