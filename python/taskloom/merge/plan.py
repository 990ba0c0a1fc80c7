"""What a merge will do, tensor by tensor: the contract between the recipe, the planner and the executor.

A :class:`MergePlan` is complete: every byte that will be read or written has a file and an offset before any work begins, so the
output's headers can be written first and its tensors in place, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Select = Literal["all", "magnitude", "dropout", "rank_dropout"]
Scope = Literal["tensor", "row", "model"]
Elect = Literal["none", "sign_sum", "sign_count"]
ZeroSign = Literal["positive", "majority"]
Vote = Literal["none", "selected", "tall"]
Combine = Literal["sum", "weighted_mean", "disjoint_mean"]
Rescale = Literal["none", "density", "l1"]
Interpolation = Literal["none", "slerp"]


@dataclass(frozen=True)
class Stages:
    """The stages of one tensor's merge, with every parameter resolved to numbers for that tensor.

    ``weight``, ``rank_begin``, ``rank_end``, ``density``, ``epsilon`` and ``tall_mask_lambda`` have one entry per tuned model.

    select
        which entries of each task's delta survive: ``all``; ``magnitude`` keeps the descending magnitude ranks
        ``rank_begin <= rank < rank_end`` of a segment (the whole tensor, one row, or the whole model's task vector, by ``scope``);
        ``dropout`` keeps each entry with probability ``density``; ``rank_dropout`` keeps an entry with a probability between
        ``density - epsilon`` and ``density + epsilon`` that grows with its rank in its row (DELLA).
    rescale
        what survivors are multiplied by: nothing, 1/probability, or the ratio of L1 norms before and after (mergekit).
    elect
        ``sign_sum`` / ``sign_count`` drop the survivors whose sign differs from that of the weighted sum / of the majority count.
        A sum of exactly zero counts as ``zero_sign`` says: positive (mergekit) or the majority sign of the whole model (official TIES).
    vote, consensus_k
        with ``vote`` not ``none``, entries voted for by fewer than ``consensus_k`` tasks keep the base's value. A task votes where
        its entry was selected, or, with ``tall``, where its TALL mask (threshold ``tall_mask_lambda``) is set.
    combine, scale
        survivors are summed, or divided by the sum of all weights (``weighted_mean``), or by the sum of the weights of the tasks
        that survive in that entry (``disjoint_mean``); the result times ``scale`` is added to the base.
    interpolation, t
        ``slerp`` replaces all of the above: spherical interpolation from the base to the one tuned model at ``t``.
    """

    weight: tuple[float, ...]
    select: Select = "all"
    scope: Scope = "tensor"
    rank_begin: tuple[int, ...] = ()
    rank_end: tuple[int, ...] = ()
    density: tuple[float, ...] = ()
    epsilon: tuple[float, ...] = ()
    rescale: Rescale = "none"
    elect: Elect = "none"
    zero_sign: ZeroSign = "positive"
    vote: Vote = "none"
    consensus_k: int = 0
    tall_mask_lambda: tuple[float, ...] = ()
    combine: Combine = "sum"
    scale: float = 1.0
    interpolation: Interpolation = "none"
    t: float = 0.0


@dataclass(frozen=True)
class TensorSource:
    """One tensor in one input file. ``dtype`` is a safetensors code (``BF16``), ``offset`` counts bytes from the file's start."""

    file: int
    offset: int
    dtype: str


@dataclass(frozen=True)
class TensorTarget:
    """Where one tensor goes: index into :attr:`MergePlan.outputs`, absolute byte offset, safetensors dtype code."""

    file: int
    offset: int
    dtype: str


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the output: merged from a base (None: from zero) and tuned tensors, or, with ``stages=None``, copied from ``base``.

    A copy whose dtypes differ is converted (floating-point types only). ``key`` is the stable 64-bit hash of the tensor's name that
    seeds its random masks.
    """

    name: str
    shape: tuple[int, ...]
    target: TensorTarget
    base: TensorSource | None
    tuned: tuple[TensorSource, ...] = ()
    stages: Stages | None = None
    key: int = 0
    layer: int | None = None


@dataclass(frozen=True)
class OutputFile:
    """One shard: its final name, the bytes of its header (length prefix included) and its whole size."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class MergePlan:
    """A whole merge. ``models`` are the labels of the tuned models, in the order of every per-task tuple."""

    inputs: tuple[Path, ...]
    outputs: tuple[OutputFile, ...]
    jobs: tuple[TensorJob, ...]
    models: tuple[str, ...]
    seed: int = 0
    allow_nonfinite: bool = False
    weight_map: dict[str, str] = field(default_factory=dict)
    total_size: int = 0
