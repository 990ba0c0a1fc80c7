"""Task vectors that are LoRA adapters: factors of each adapted weight's change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike

import torch
from torch import Tensor

from taskloom.merge.task_vector import TaskVector
from taskloom.nn.adapter_files import read_factors
from taskloom.ops import lowrank_merge
from taskloom.ops._checks import FLOATING

Factors = tuple[Tensor, Tensor, float]


class LowRankTaskVector(Mapping[str, Factors]):
    """A task vector ``scale * B A`` of some weights, kept as its factors.

    A read-only mapping from parameter names (``"layers.0.q_proj.weight"``) to ``(A, B, scale)``.

    Parameters
    ----------
    factors
        By parameter name: A ``[r, in]``, B ``[out, r]``, floating point, and a number. Copied.

    Raises
    ------
    TypeError
        If a factor is no floating-point tensor, or a scale no number.
    ValueError
        If there is none, shapes do not fit, or a value is not finite.

    Notes
    -----
    Source: aTLAS, arXiv 2407.02880, on LoRAs as task vectors (ranks 4, 16, 64 there).
    """

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        if not factors:
            raise ValueError("LowRankTaskVector: expected at least one weight's factors, got none")
        self._factors: dict[str, Factors] = {}
        for name, (right, left, scale) in factors.items():
            where = f"LowRankTaskVector: {name!r}"
            for part, one in (("A", right), ("B", left)):
                if not isinstance(one, Tensor) or one.dtype not in FLOATING:
                    got = one.dtype if isinstance(one, Tensor) else type(one).__name__
                    raise TypeError(f"{where}: {part}: expected a floating-point tensor, got {got}")
                if not torch.isfinite(one).all():
                    raise ValueError(f"{where}: {part}: expected finite values, it has NaN or infinity")
            if right.dim() != 2 or left.dim() != 2 or right.shape[0] != left.shape[1]:
                raise ValueError(f"{where}: expected A [r, in] and B [out, r], got {tuple(right.shape)} and {tuple(left.shape)}")
            if isinstance(scale, bool) or not isinstance(scale, (int, float)):
                raise TypeError(f"{where}: scale: expected a number, got {type(scale).__name__}")
            self._factors[name] = right.detach().clone(), left.detach().clone(), float(scale)

    @classmethod
    def from_peft(cls, folder: str | PathLike[str]) -> LowRankTaskVector:
        """The adapter of a folder with ``adapter_model.safetensors`` and ``adapter_config.json``; errors as of ``load_adapter``.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        TypeError
            If it is another kind of adapter than LoRA.
        ValueError
            If it is DoRA's, trains biases or other modules, or is broken.
        """
        return cls({f"{path}.weight": factors for path, factors in read_factors(folder).items()})

    def __getitem__(self, name: str) -> Factors:
        return self._factors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def __repr__(self) -> str:
        ranks = sorted({right.shape[0] for right, _, _ in self._factors.values()})
        return f"LowRankTaskVector({len(self)} weights, rank {', '.join(map(str, ranks))})"

    def delta(self, name: str) -> Tensor:
        """One weight's change as a matrix, in float32, or float64 where a factor is."""
        right, left, scale = self._factors[name]
        dtype = torch.promote_types(torch.promote_types(right.dtype, left.dtype), torch.float32)
        zeros = torch.zeros(left.shape[0], right.shape[1], dtype=dtype, device=right.device)
        return lowrank_merge(zeros, right, left, scale=scale)

    def dense(self) -> TaskVector:
        """The same as a :class:`taskloom.TaskVector` of matrices."""
        return TaskVector.from_deltas({name: self.delta(name) for name in self._factors})
