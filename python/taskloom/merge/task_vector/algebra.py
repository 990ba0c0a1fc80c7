"""Linear combinations of deltas as a mapping with an algebra."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from taskloom.merge.task_vector.checks import Regime, check_number, check_regime, is_number
from taskloom.merge.task_vector.combination import Terms, add_terms, check_alike, compute, joined
from taskloom.merge.task_vector.products import products
from taskloom.merge.task_vector.sources import Slot, Source


class Combination(Mapping[str, Tensor]):
    """A linear combination of sources over the same names: a read-only mapping whose tensors are computed when they are asked for."""

    # numpy's numbers leave the multiplication to us.
    __array_ufunc__ = None

    _terms: Terms
    _slots: Mapping[str, Slot]
    _regime: Regime

    def _become(self, source: Source, regime: Regime) -> None:
        if not source.slots:
            raise ValueError("TaskVector: expected at least one floating-point tensor, got none")
        self._terms, self._slots, self._regime = {source: 1.0}, source.slots, regime

    @classmethod
    def _from_source(cls, source: Source, regime: Regime) -> Self:
        vector = cls.__new__(cls)
        vector._become(source, regime)
        return vector

    def _with(self, terms: Terms, slots: Mapping[str, Slot] | None = None, regime: Regime | None = None) -> Self:
        vector = type(self).__new__(type(self))
        vector._terms, vector._slots, vector._regime = terms, slots or self._slots, regime or self._regime
        return vector

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its tensors, in the base's order."""
        return tuple(self._slots)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, without computing any."""
        return {name: slot.shape for name, slot in self._slots.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every tensor, without computing any."""
        return {name: slot.dtype for name, slot in self._slots.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its tensors; where they differ, the one that holds them all."""
        found, *others = {slot.dtype for slot in self._slots.values()}
        for other in others:
            found = torch.promote_types(found, other)
        return found

    @property
    def regime(self) -> Regime:
        """``"linear"`` or ``"nonlinear"``."""
        return self._regime

    @property
    def numel(self) -> int:
        """Entries of all tensors."""
        return sum(slot.numel for slot in self._slots.values())

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._slots:
            raise KeyError(f"TaskVector: has no tensor {name!r}")
        return compute(self._terms, name, self._slots[name])

    @property
    def in_memory(self) -> bool:
        """Whether no value comes from a file."""
        return not any(source.streams for source in self._terms)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, computed; names of one tensor in all of the vector's models (tied weights) have one tensor."""
        known: dict[object, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name in self._slots:
            places: object = tuple(source.place(name) for source in self._terms) or name
            if places not in known:
                known[places] = self[name]
            found[name] = known[places]
        return found

    # By what it is, not by its values: a comparison would read all of them, and vectors are keys of a mapping to weights.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        terms = f", {len(self._terms)} terms" if len(self._terms) != 1 else ""
        return f"{type(self).__name__}({len(self)} tensors, {self.numel} entries, {self.dtype}, {self._regime}{terms})"

    def as_regime(self, regime: str) -> Self:
        """The same deltas, said to be of another regime: post-hoc linearisation, or a linear vector on the ordinary model."""
        return self._with(self._terms, regime=check_regime(regime))

    def _check_alike(self, other: Combination, doing: str) -> None:
        if other._regime != self._regime:
            raise ValueError(
                f"TaskVector: {doing}: the first vector is {self._regime}, the second {other._regime}; convert one with as_regime()"
            )
        check_alike(self._slots, other._slots, doing)

    def _plus(self, other: Combination, factor: float, doing: str) -> Self:
        self._check_alike(other, doing)
        slots = {name: joined(slot, other._slots[name]) for name, slot in self._slots.items()}
        return self._with(add_terms(self._terms, other._terms, factor), slots)

    def _scaled(self, factor: float) -> Self:
        terms = {source: check_number(coefficient * factor, "coefficient") for source, coefficient in self._terms.items()}
        return self._with({source: coefficient for source, coefficient in terms.items() if coefficient != 0})

    def __add__(self, other: object) -> Self:
        return self._plus(other, 1.0, "sum") if isinstance(other, Combination) else NotImplemented

    def __radd__(self, other: object) -> Self:
        # What sum() begins with.
        return self if is_number(other) and other == 0 else NotImplemented

    def __sub__(self, other: object) -> Self:
        return self._plus(other, -1.0, "difference") if isinstance(other, Combination) else NotImplemented

    def __neg__(self) -> Self:
        return self._scaled(-1.0)

    def __pos__(self) -> Self:
        return self

    def __mul__(self, factor: object) -> Self:
        return self._scaled(check_number(factor, "factor")) if is_number(factor) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Self:
        return self._scaled(1.0 / check_number(divisor, "divisor")) if is_number(divisor) else NotImplemented

    def dot(self, other: Combination) -> float:
        """The inner product with another vector over the same tensors.

        Returns
        -------
        float
            Of the values that the tensors have, accumulated in float64, in memory of a piece; it does not depend on the number of
            threads, nor on whether the values are in memory or in a file.

        Raises
        ------
        KeyError, ValueError
            If names, or shapes, devices or regimes differ.
        """
        return self._products(other, [(0, 1)], "dot")[0]

    def _products(self, other: Combination, pairs: Sequence[tuple[int, int]], doing: str) -> list[float]:
        if not isinstance(other, Combination):
            raise TypeError(f"TaskVector: {doing}: expected a TaskVector, got {type(other).__name__}")
        self._check_alike(other, doing)
        return products(self._terms, self._slots, other._terms, other._slots, pairs)

    def norm(self) -> float:
        """The Euclidean norm, as :meth:`dot`."""
        return math.sqrt(self._products(self, [(0, 0)], "norm")[0])

    def cosine(self, other: Combination) -> float:
        """The cosine of the angle to another vector, as :meth:`dot`; ValueError where either is zero or its square overflows float64."""
        product, *squares = self._products(other, [(0, 1), (0, 0), (1, 1)], "cosine")
        if 0 in squares:
            raise ValueError(f"TaskVector: cosine: the {'first' if squares[0] == 0 else 'second'} vector is zero, which has no direction")
        if not all(map(math.isfinite, squares)):
            raise ValueError("TaskVector: cosine: the square of a norm overflows float64; divide the vectors by a large number first")
        return max(-1.0, min(1.0, product / math.sqrt(squares[0]) / math.sqrt(squares[1])))
