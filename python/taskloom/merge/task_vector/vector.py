"""The class of task vectors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Unpack, overload

import torch
from torch import Tensor, nn

from taskloom.merge.task_vector.algebra import Combination
from taskloom.merge.task_vector.apply import change_module, changed_state_dict
from taskloom.merge.task_vector.checks import (
    check_dtype,
    check_finite,
    check_number,
    check_overflow,
    check_regime,
    is_delta,
    named_tensors,
)
from taskloom.merge.task_vector.combination import is_plain
from taskloom.merge.task_vector.difference import difference, identity
from taskloom.merge.task_vector.files import load, save
from taskloom.merge.task_vector.reading import open_difference
from taskloom.merge.task_vector.sources import MemorySource

if TYPE_CHECKING:
    from taskloom.merge.report import MergeReport
    from taskloom.merge.task_vector.checkpoints import MergeOptions

StateDict = Mapping[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)


def _refuse_vector(model: object, argument: str) -> None:
    """A vector is a mapping from names to tensors as well, but its tensors are no weights."""
    if isinstance(model, Combination):
        raise TypeError(f"TaskVector: {argument}: expected a model's weights, got a task vector; add vectors with +")


def _refuse_linear(regime: str, doing: str) -> None:
    """The likeliest mistake with a vector of a linearised model, whose results look plausible."""
    if regime == "linear":
        raise ValueError(
            f"TaskVector: {doing}: expected a nonlinear task vector for an ordinary model, got a linear one, which belongs to a linearised "
            "model; vector.as_regime('nonlinear') takes it as such"
        )


class TaskVector(Combination):
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
        for argument, model in (("base", base), ("finetuned", finetuned)):
            _refuse_vector(model, argument)
        with torch.no_grad():
            deltas = difference(base, finetuned, dtype, strict)
        self._become(MemorySource(deltas), checked)

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
    def from_checkpoints(
        cls, base: str | PathLike[str], tuned: str | PathLike[str], *, dtype: torch.dtype | None = None, regime: str = "nonlinear"
    ) -> TaskVector:
        """The difference of two safetensors checkpoints, of which only the headers are read now.

        A tensor is read, in pieces, when it is asked for, and forgotten again: :meth:`dot`, :meth:`norm`, :meth:`save` and
        ``for name, delta in vector.items()`` take memory of some pieces, or of one tensor, whatever the size of the models.

        Parameters
        ----------
        base, tuned
            As a recipe names models: a folder, a ``.safetensors`` file, or a hub id.
        dtype, regime
            As of the class; deltas are rounded to ``dtype`` as they are read.

        Raises
        ------
        CheckpointError
            If a checkpoint cannot be found, is damaged, or does not fit the other. When a tensor is read: if a file is no longer the one
            that was opened, or a value is not finite.
        """
        if dtype is not None:
            check_dtype(dtype)
        checked = check_regime(regime)
        return cls._from_source(open_difference(fspath(base), fspath(tuned), dtype), checked)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> TaskVector:
        """A vector that :meth:`save` wrote. Its tensors are read when they are asked for, as those of :meth:`from_checkpoints`.

        Raises
        ------
        CheckpointError
            If the file cannot be read, is damaged, or is no saved task vector. When a tensor is read: if it is no longer the file that
            was opened, or a value is not finite.
        """
        return cls._from_source(*load(Path(path)))

    @classmethod
    def from_deltas(cls, deltas: StateDict, *, regime: str = "nonlinear") -> TaskVector:
        """A vector of given differences, copied.

        Parameters
        ----------
        deltas
            float32, bfloat16, float16 or float64 tensors by name. Names of one tensor have one delta.
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
        known: dict[object, Tensor] = {}
        with torch.no_grad():
            for name, delta in named_tensors(deltas, "TaskVector: deltas").items():
                where = f"TaskVector: deltas: {name!r}"
                if not is_delta(delta, where):
                    raise TypeError(f"{where}: expected float32, bfloat16, float16 or float64, got {delta.dtype}")
                check_finite(delta, where)
                place: object = identity(delta) if delta.numel() else name
                if place not in known:
                    known[place] = torch.empty(delta.shape, dtype=delta.dtype, device=delta.device).copy_(delta)
                copies[name] = known[place]
        return cls._from_source(MemorySource(copies), checked)

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
            tensor have different deltas, or the vector is linear: such a one is added to a linearised model
            (``LinearizedModel.apply_task_vector_``), or taken as an ordinary one by ``as_regime("nonlinear")``.
        """
        factor = check_number(alpha, "alpha")
        if isinstance(target, nn.Module):
            _refuse_linear(self._regime, "apply_to")
            changed = copy.deepcopy(target)
            change_module(changed, self._terms, self._slots, factor)
            return changed
        _refuse_vector(target, "apply_to: target")
        tensors = named_tensors(target, "TaskVector: apply_to: target")
        return changed_state_dict(tensors, self._terms, self._slots, factor)

    def apply_to_(self, module: Module, alpha: float = 1.0) -> Module:
        """As :meth:`apply_to`, in place on a module, which is also returned; on an error the module is unchanged.

        The new values are all computed before the first is written, in memory of one more model.
        """
        factor = check_number(alpha, "alpha")
        if not isinstance(module, nn.Module):
            raise TypeError(f"TaskVector: apply_to_: expected an nn.Module, got {type(module).__name__}")
        _refuse_linear(self._regime, "apply_to_")
        change_module(module, self._terms, self._slots, factor)
        return module

    def apply_to_checkpoint(
        self,
        base: str | PathLike[str],
        out: str | PathLike[str],
        alpha: float = 1.0,
        *,
        out_dtype: str | None = None,
        shard_size: str | int = "5GB",
        **options: Unpack[MergeOptions],
    ) -> MergeReport:
        """Write the checkpoint ``base + alpha * vector`` in one streaming pass of the merge's executor.

        Parameters
        ----------
        base
            A checkpoint, as for :meth:`from_checkpoints`: the vector's own base where the vector is a combination of checkpoints'
            differences (a merge by ``task_arithmetic``), any base that has the vector's tensors where it is a multiple of one saved file
            (a merge by ``linear``). :meth:`save` makes such a file of any vector.
        out
            Folder to write: weights, the base's other files, a recipe that gives the same again, and a report.
        alpha
            Default 1; a negative one forgets the task.
        out_dtype
            As a recipe's: ``"bfloat16"`` and so on. Default None: each tensor's dtype in the base.
        shard_size, **options
            As :func:`taskloom.merge.merge_checkpoints`.

        Raises
        ------
        ValueError
            If the vector is neither of the two.
        MergeError
            As :func:`taskloom.merge.merge_checkpoints`; CheckpointError also where a file changed since the vector was opened.
        """
        # In memory a vector needs nothing of what reads recipes.
        from taskloom.merge.task_vector.checkpoints import apply_to_checkpoint

        return apply_to_checkpoint(self, base, out, alpha, out_dtype=out_dtype, shard_size=shard_size, **options)

    def materialize(self) -> TaskVector:
        """The same vector with every tensor computed and in memory; itself where that is so already."""
        if self.in_memory and all(is_plain(self._terms, name, slot) for name, slot in self._slots.items()):
            return self
        return self._from_source(MemorySource(self.tensors()), self._regime)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the vector to a safetensors file, a piece at a time; its dtypes and its regime are kept.

        Parameters
        ----------
        path
            Ends in ``.safetensors``. A file that is there is replaced once the new one is complete.

        Raises
        ------
        ValueError
            If the path ends otherwise.
        OutputError
            If it cannot be written.
        """
        save(Path(path), self._terms, self._slots, self._regime)

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
        known: dict[int, Tensor] = {}
        tensors = self.tensors()
        for name, tensor in tensors.items():
            if id(tensor) not in known:
                known[id(tensor)] = tensor.to(device=place, dtype=dtype)
                check_overflow(known[id(tensor)], f"TaskVector: {name!r}", "the delta")
            moved[name] = known[id(tensor)]
        return self._from_source(MemorySource(moved), self._regime)
