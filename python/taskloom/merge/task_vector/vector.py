"""The class of task vectors."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from taskloom.merge.task_vector.apply import change_module, changed_state_dict
from taskloom.merge.task_vector.checks import (
    Regime,
    check_dtype,
    check_finite,
    check_number,
    check_overflow,
    check_regime,
    is_delta,
    is_number,
    named_tensors,
)
from taskloom.merge.task_vector.combination import Terms, add_terms, check_alike, compute, is_plain, joined
from taskloom.merge.task_vector.difference import difference
from taskloom.merge.task_vector.products import dot
from taskloom.merge.task_vector.sources import MemorySource, Slot, Source

StateDict = Mapping[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)


class TaskVector(Mapping[str, Tensor]):
    """A task vector ``finetuned - base`` over the floating-point tensors of a model, by name.

    A read-only mapping from names to tensors. Sums and multiples are lazy: a vector is a linear combination of sources (models in
    memory, checkpoints, files), of which a tensor is computed when it is asked for, all terms in one pass.

    Parameters
    ----------
    base, finetuned
        State dicts or modules (of which parameters and persistent buffers count), in CPU memory or on CUDA devices. Integer and bool
        tensors have no difference and are left out. What is done to the models later does not change the vector.
    dtype
        float32, bfloat16, float16 or float64 of the stored deltas. Default None: float32, or float64 where either tensor is.
        The difference is taken in these; a small update of bfloat16 weights is lost where it is taken in bfloat16.
    regime
        ``"nonlinear"`` (default), or ``"linear"`` for a vector of a linearised model. The two are never mixed.
    strict
        Default True: both models have the same names. False takes the names that both have, with a warning.

    Raises
    ------
    KeyError
        If the models' names differ.
    TypeError
        If an argument is no model, a tensor is of a dtype that is neither one of the four nor an integer type, or floating point in one
        model only.
    ValueError
        If shapes or devices differ, a value is not finite, a difference overflows ``dtype``, a tensor is sparse, quantized or on the
        meta device, or there is no floating-point tensor.

    Notes
    -----
    Source: task arithmetic, Ilharco et al., ICLR 2023, arXiv 2212.04089; regimes: Ortiz-Jimenez et al., NeurIPS 2023, arXiv 2305.12827.

    A tensor that a vector gives out may be the vector's own memory and is not to be written to. A tensor with two names (tied weights)
    counts under both in ``numel``, ``dot`` and ``norm``.
    """

    # numpy's numbers leave the multiplication to us.
    __array_ufunc__ = None

    _terms: Terms
    _slots: Mapping[str, Slot]
    _regime: Regime

    def __init__(
        self,
        base: StateDict | nn.Module,
        finetuned: StateDict | nn.Module,
        *,
        dtype: torch.dtype | None = None,
        regime: str = "nonlinear",
        strict: bool = True,
    ) -> None:
        if dtype is not None:
            check_dtype(dtype)
        checked = check_regime(regime)
        with torch.no_grad():
            deltas = difference(base, finetuned, dtype, strict)
        self._become(MemorySource(deltas), checked)

    def _become(self, source: Source, regime: Regime) -> None:
        if not source.slots:
            raise ValueError("TaskVector: expected at least one floating-point tensor, got none")
        self._terms, self._slots, self._regime = {source: 1.0}, source.slots, regime

    @classmethod
    def _from_source(cls, source: Source, regime: Regime) -> TaskVector:
        vector = cls.__new__(cls)
        vector._become(source, regime)
        return vector

    def _with(self, terms: Terms, slots: Mapping[str, Slot] | None = None, regime: Regime | None = None) -> TaskVector:
        vector = type(self).__new__(type(self))
        vector._terms, vector._slots, vector._regime = terms, slots or self._slots, regime or self._regime
        return vector

    @classmethod
    def from_models(
        cls,
        base: StateDict | nn.Module,
        finetuned: StateDict | nn.Module,
        dtype: torch.dtype | None = torch.float16,
        *,
        regime: str = "nonlinear",
        strict: bool = True,
    ) -> TaskVector:
        """The same as the class, with deltas stored in float16 by default; a delta above its largest number (65504) is an error."""
        return cls(base, finetuned, dtype=dtype, regime=regime, strict=strict)

    @classmethod
    def from_deltas(cls, deltas: StateDict, *, regime: str = "nonlinear") -> TaskVector:
        """A vector of given differences, copied.

        Parameters
        ----------
        deltas
            float32, bfloat16, float16 or float64 tensors by name.
        regime
            As of the class.

        Raises
        ------
        TypeError
            If it is no mapping from names to tensors of these dtypes.
        ValueError
            If a value is not finite, a tensor has no values to look at, or there is none.
        """
        checked = check_regime(regime)
        copies: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, delta in named_tensors(deltas, "TaskVector: deltas").items():
                where = f"TaskVector: deltas: {name!r}"
                if not is_delta(delta, where):
                    raise TypeError(f"{where}: expected float32, bfloat16, float16 or float64, got {delta.dtype}")
                check_finite(delta, where)
                copies[name] = torch.empty(delta.shape, dtype=delta.dtype, device=delta.device).copy_(delta)
        return cls._from_source(MemorySource(copies), checked)

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

    # By what it is, not by its values: a comparison would read all of them, and vectors are keys of a mapping to weights.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        terms = f", {len(self._terms)} terms" if len(self._terms) != 1 else ""
        return f"TaskVector({len(self)} tensors, {self.numel} entries, {self.dtype}, {self._regime}{terms})"

    def as_regime(self, regime: str) -> TaskVector:
        """The same deltas, said to be of another regime: post-hoc linearisation, or a linear vector on the ordinary model."""
        return self._with(self._terms, regime=check_regime(regime))

    def _plus(self, other: TaskVector, factor: float, doing: str) -> TaskVector:
        if other._regime != self._regime:
            raise ValueError(
                f"TaskVector: {doing}: the first vector is {self._regime}, the second {other._regime}; convert one with as_regime()"
            )
        check_alike(self._slots, other._slots, doing)
        slots = {name: joined(slot, other._slots[name]) for name, slot in self._slots.items()}
        return self._with(add_terms(self._terms, other._terms, factor), slots)

    def _scaled(self, factor: float) -> TaskVector:
        terms = {source: check_number(coefficient * factor, "coefficient") for source, coefficient in self._terms.items()}
        return self._with({source: coefficient for source, coefficient in terms.items() if coefficient != 0})

    def __add__(self, other: object) -> TaskVector:
        return self._plus(other, 1.0, "sum") if isinstance(other, TaskVector) else NotImplemented

    def __radd__(self, other: object) -> TaskVector:
        # What sum() begins with.
        return self if is_number(other) and other == 0 else NotImplemented

    def __sub__(self, other: object) -> TaskVector:
        return self._plus(other, -1.0, "difference") if isinstance(other, TaskVector) else NotImplemented

    def __neg__(self) -> TaskVector:
        return self._scaled(-1.0)

    def __pos__(self) -> TaskVector:
        return self

    def __mul__(self, factor: object) -> TaskVector:
        return self._scaled(check_number(factor, "factor")) if is_number(factor) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> TaskVector:
        return self._scaled(1.0 / check_number(divisor, "divisor")) if is_number(divisor) else NotImplemented

    def dot(self, other: TaskVector) -> float:
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
        if not isinstance(other, TaskVector):
            raise TypeError(f"TaskVector: dot: expected a TaskVector, got {type(other).__name__}")
        if other._regime != self._regime:
            raise ValueError(f"TaskVector: dot: the first vector is {self._regime}, the second {other._regime}")
        return dot(self._terms, self._slots, other._terms, other._slots)

    def norm(self) -> float:
        """The Euclidean norm, as :meth:`dot`."""
        return math.sqrt(dot(self._terms, self._slots, self._terms, self._slots))

    def cosine(self, other: TaskVector) -> float:
        """The cosine of the angle to another vector, as :meth:`dot`; ValueError where either is zero."""
        product, norms = self.dot(other), (self.norm(), other.norm())
        if 0 in norms:
            raise ValueError(f"TaskVector: cosine: the {'first' if norms[0] == 0 else 'second'} vector is zero, which has no direction")
        return max(-1.0, min(1.0, product / norms[0] / norms[1]))

    @overload
    def apply_to(self, target: Module, alpha: float = 1.0) -> Module: ...

    @overload
    def apply_to(self, target: StateDict, alpha: float = 1.0) -> dict[str, Tensor]: ...

    def apply_to(self, target: nn.Module | StateDict, alpha: float = 1.0) -> nn.Module | dict[str, Tensor]:
        """``target + alpha * vector``, leaving the target as it is.

        Parameters
        ----------
        target
            A state dict or a module, on the CPU or on CUDA devices, to which deltas are moved.
        alpha
            Default 1.

        Returns
        -------
        dict or Module
            A new state dict in fresh memory, in the target's order and dtypes, with copies of what has no delta; or a changed deep copy of
            the module. An entry is computed in float32 (float64 where anything is) and rounded once. Names of one tensor (tied weights)
            stay names of one tensor, unless the vector has different deltas of them.

        Raises
        ------
        KeyError
            If the target lacks a name that the vector has.
        TypeError, ValueError
            If a tensor has another shape or no floating-point dtype, or a result is not finite; for a module also if names that are one
            tensor have different deltas.
        """
        factor = check_number(alpha, "alpha")
        if isinstance(target, nn.Module):
            changed = copy.deepcopy(target)
            change_module(changed, self._terms, self._slots, factor)
            return changed
        tensors = named_tensors(target, "TaskVector: apply_to: target")
        return changed_state_dict(tensors, self._terms, self._slots, factor)

    def apply_to_(self, module: Module, alpha: float = 1.0) -> Module:
        """As :meth:`apply_to`, in place on a module, which is also returned; on an error the module is unchanged.

        The new values are all computed before the first is written, in memory of one more model.
        """
        factor = check_number(alpha, "alpha")
        if not isinstance(module, nn.Module):
            raise TypeError(f"TaskVector: apply_to_: expected an nn.Module, got {type(module).__name__}")
        change_module(module, self._terms, self._slots, factor)
        return module

    def materialize(self) -> TaskVector:
        """The same vector with every tensor computed and in memory; itself where that is so already."""
        if not any(source.streams for source in self._terms) and all(
            is_plain(self._terms, name, slot) for name, slot in self._slots.items()
        ):
            return self
        return self._from_source(MemorySource({name: self[name] for name in self._slots}), self._regime)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> TaskVector:
        """The vector in memory, in another dtype, on another device, or both.

        Raises
        ------
        TypeError
            If ``dtype`` is not float32, bfloat16, float16 or float64.
        ValueError
            If a value overflows it, or the device is neither the CPU nor a CUDA device.
        """
        if dtype is not None:
            check_dtype(dtype)
        place = None if device is None else torch.device(device)
        if place is not None and place.type not in ("cpu", "cuda"):
            raise ValueError(f"TaskVector: device: expected cpu or a cuda device, got {place}")
        moved: dict[str, Tensor] = {}
        for name in self._slots:
            moved[name] = self[name].to(device=place, dtype=dtype)
            if dtype is not None:
                check_overflow(moved[name], f"TaskVector: {name!r}", "the delta")
        return self._from_source(MemorySource(moved), self._regime)
