"""sparse_merge: finds bands, ranks, L1 factors and the majority's sign, each in passes of its own, and then merges in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.masked.magnitude import as_rows, delta, descending_ranks, magnitude_bits
from taskloom.triton_kernels.launch import aligned, entries_per_program, flat, launch, of_one_dtype, programs, raw, table, written_in_place
from taskloom.triton_kernels.masked.magnitude_mask import band_cuts
from taskloom.triton_kernels.masked.sparse_merge_kernels import (
    sparse_merge_kernel,
    sparse_merge_norms_kernel,
    sparse_merge_signs_kernel,
    sparse_merge_statistics_kernel,
)

_SELECTS = ("all", "magnitude", "mask", "dropout", "rank_dropout")
_ELECTS = ("none", "sign_sum", "sign_count")
_VOTES = ("none", "selected", "tall")
_COMBINES = ("sum", "weighted_mean", "disjoint_mean")

# A sort takes many times the memory of what it sorts.
RANKED_ENTRIES = 1 << 22

_TASK_KEY_STEP = 0x9E3779B97F4A7C15
_LEAST_NORM = 1e-7
_NO_WEIGHT = 1e-8


def _signed(word: int) -> int:
    word %= 1 << 64
    return word - (1 << 64) if word >= 1 << 63 else word


def _row_length(tuned: Tensor) -> int:
    return tuned.shape[-1] if tuned.dim() else 1


def _cuts(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    dtype: torch.dtype,
    by_row: bool,
    rank_begin: Sequence[int],
    rank_end: Sequence[int],
    threshold: Tensor | None,
    equal_kept: Tensor | None,
) -> Tensor:
    """Every task's cuts: ``[tasks, 2, 2]``, by row ``[tasks, rows, 2, 2]``."""
    cuts = []
    for task, tensor in enumerate(tuned):
        ranks = (rank_begin[task], rank_end[task]) if rank_begin else (0, 0)
        given = (None, None) if threshold is None or equal_kept is None else (threshold[task], equal_kept[task])
        cuts.append(band_cuts(tensor, base, ranks, by_row, *given, dtype))
    return torch.stack(cuts)


def _ascending_ranks(base: Tensor | None, tuned: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The ascending magnitude ranks of every task's entries in their rows, by torch's stable sort of some rows at a time."""
    length = _row_length(tuned[0])
    ranks = torch.empty(len(tuned), tuned[0].numel(), dtype=torch.int32, device=tuned[0].device)
    if ranks.numel() == 0:
        return ranks
    origin, step = None if base is None else as_rows(base), max(1, RANKED_ENTRIES // length)
    for task, tensor in enumerate(tuned):
        rows, own = as_rows(tensor), ranks[task].view(-1, length)
        for begin in range(0, len(rows), step):
            some = slice(begin, begin + step)
            bits = magnitude_bits(delta(rows[some], None if origin is None else origin[some], dtype))
            own[some] = length - 1 - descending_ranks(bits)
    return ranks


def _probabilities(density: Sequence[float], epsilon: Sequence[float], row_length: int, device: torch.device) -> Tensor:
    """DELLA's lowest keep probability and its spread; none where there is nothing to rank."""
    flat_row = row_length <= 1
    rows = [
        (share, 0.0) if flat_row or spread == 0 else (share - spread, 2 * spread) for share, spread in zip(density, epsilon, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _divisor(weight: Sequence[float], dtype: torch.dtype) -> float:
    """The sum of all weights, in the arithmetic of the merge, or 1 where that is nearly nothing."""
    total = torch.zeros((), dtype=dtype)
    for one in weight:
        total = total + torch.tensor(one, dtype=dtype)
    return 1.0 if abs(float(total)) < _NO_WEIGHT else float(total)


@dataclass
class _Inputs:
    """What all passes share: the tensors and tables in the order in which kernels take them, sizes and constants."""

    origin: Tensor
    first: Tensor
    words: Tensor
    numbers: Tensor
    selection: tuple[Tensor, Tensor, Tensor]
    numel: int
    row_length: int
    tasks: int
    block: int
    constants: dict[str, Any]
    by_rank: bool

    @property
    def blocks(self) -> int:
        return programs(self.numel, self.block)

    def set_l1_factors(self) -> None:
        """Set the numbers' factors to the ratios of L1 norms before and after selection."""
        sums = torch.empty(self.tasks, self.blocks, 2, dtype=torch.float64, device=self.words.device)
        arguments = (self.origin, self.first, self.words, *self.selection, sums, self.numel, self.row_length)
        launch(sparse_merge_norms_kernel, (self.blocks, self.tasks), *arguments, **self.constants)
        before, after = sums.sum(1).unbind(1)
        measurable = (before >= _LEAST_NORM) & (after >= _LEAST_NORM)
        self.numbers[:, 1] = torch.where(measurable, before / after, 1).to(self.numbers.dtype)

    def sign_sum(self, elect: int) -> Tensor:
        """Elected positive entries less elected negative ones, int64."""
        sums = torch.empty(self.blocks, dtype=torch.int64, device=self.words.device)
        arguments = (self.origin, self.first, self.words, self.numbers, *self.selection, sums, self.numel, self.row_length, self.tasks)
        constants = {**self.constants, "BY_RANK": self.by_rank, "ELECT": elect}
        launch(sparse_merge_signs_kernel, (self.blocks,), *arguments, **constants)
        return sums.sum()

    def statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Kept entries, entries in conflict, inner products, and whether a delta is not finite."""
        device, pairs = self.words.device, self.tasks * (self.tasks + 1) // 2
        counts = torch.empty(self.tasks + 2, self.blocks, dtype=torch.int32, device=device)
        sums = torch.empty(pairs, self.blocks, dtype=torch.float64, device=device)
        arguments = (self.origin, self.first, self.words, self.numbers, *self.selection, counts, sums)
        sizes = (self.numel, self.row_length, self.tasks)
        launch(sparse_merge_statistics_kernel, (self.blocks,), *arguments, *sizes, **self.constants, BY_RANK=self.by_rank)
        counted = counts.sum(1)
        row, column = torch.triu_indices(self.tasks, self.tasks, device=device)
        dots = torch.empty(self.tasks, self.tasks, dtype=torch.float64, device=device)
        dots[row, column] = dots[column, row] = sums.sum(1)
        # Views of one tensor, which an op may not return.
        return counted[:-2].clone(), counted[-2].clone(), dots, counted[-1] > 0


def _bind(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    weight: Sequence[float],
    select: str,
    by_row: bool,
    rank_begin: Sequence[int],
    rank_end: Sequence[int],
    threshold: Tensor | None,
    equal_kept: Tensor | None,
    masks: Sequence[Tensor],
    density: Sequence[float],
    epsilon: Sequence[float],
    seed: int,
    key: int,
    rescale: str,
    tall_mask_lambda: Sequence[float],
    keep: list[Tensor],
) -> _Inputs:
    """Check nothing, find what the passes need; ``keep`` holds what the tables point to."""
    dtype, device = accumulation_dtype(base, *tuned), tuned[0].device
    row_length = _row_length(tuned[0])
    tensors, packed = of_one_dtype(tuned), [flat(mask) for mask in masks]
    keep += [*tensors, *packed]
    nothing = torch.zeros(1, dtype=torch.int64, device=device)
    cuts = _cuts(base, tuned, dtype, by_row, rank_begin, rank_end, threshold, equal_kept) if select == "magnitude" else nothing
    ranked = select == "rank_dropout"
    ranks = _ascending_ranks(base, tuned, dtype) if ranked else nothing
    probabilities = _probabilities(density, epsilon, row_length, device) if ranked else nothing
    shares = list(density) if select == "dropout" else [1.0] * len(tuned)
    words = [
        (
            tensors[task].data_ptr(),
            packed[task].data_ptr() if packed else 0,
            _signed(key + task * _TASK_KEY_STEP),
            seed,
            round(share * 2.0**32),
        )
        for task, share in enumerate(shares)
    ]
    by_density = rescale == "density" and select == "dropout"
    factors = [1 / share if by_density and share > 0 else 1.0 for share in shares]
    numbers = list(zip(weight, factors, tall_mask_lambda or [0.0] * len(tuned), strict=True))
    constants = {
        "SELECT": _SELECTS.index(select),
        "BY_ROW": by_row,
        "HAS_BASE": base is not None,
        "WIDE": dtype == torch.float64,
        "ALIGNED": aligned(tensors),
    }
    numel = tuned[0].numel()
    block = entries_per_program(numel)
    inputs = _Inputs(
        origin=tensors[0] if base is None else flat(base),
        first=tensors[0],
        words=table(words, device),
        numbers=torch.tensor(numbers, dtype=dtype, device=device),
        selection=(cuts, ranks, probabilities),
        numel=numel,
        row_length=row_length,
        tasks=len(tuned),
        block=block,
        constants={**constants, "BLOCK": block},
        by_rank=ranked and rescale == "density",
    )
    if rescale == "l1" and select != "all":
        inputs.set_l1_factors()
    return inputs


def _merge_into(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    weight: Sequence[float],
    select: str,
    by_row: bool,
    rank_begin: Sequence[int],
    rank_end: Sequence[int],
    threshold: Tensor | None,
    equal_kept: Tensor | None,
    masks: Sequence[Tensor],
    density: Sequence[float],
    epsilon: Sequence[float],
    seed: int,
    key: int,
    rescale: str,
    elect: str,
    zero_sign: int,
    vote: str,
    consensus_k: int,
    tall_mask_lambda: Sequence[float],
    combine: str,
    scale: float,
    out: Tensor,
    statistics: bool = False,
) -> tuple[Tensor, ...]:
    """Launch a merge into ``out``, which may be the base or a tuned tensor; what it counted, where that is asked for."""
    read = [tensor for tensor in (base, *tuned, *masks) if tensor is not None]
    direct = written_in_place(out, *read)
    target = out if direct else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    kept_alive: list[Tensor] = []
    inputs = _bind(
        base,
        tuned,
        weight,
        select,
        by_row,
        rank_begin,
        rank_end,
        threshold,
        equal_kept,
        masks,
        density,
        epsilon,
        seed,
        key,
        rescale,
        tall_mask_lambda,
        kept_alive,
    )
    dtype, device = inputs.numbers.dtype, out.device
    election = _ELECTS.index(elect)
    sign_sum = torch.zeros((), dtype=torch.int64, device=device)
    if election and (statistics or zero_sign == 0):
        sign_sum = inputs.sign_sum(election)
    sign = torch.full((1,), zero_sign, dtype=dtype, device=device)
    if election and zero_sign == 0:
        sign = torch.where(sign_sum < 0, -1, 1).to(dtype).reshape(1)
    # Before the merge, which may write over a tensor that is read here.
    counted = (*inputs.statistics(), sign_sum) if statistics else ()
    scalars = torch.tensor([scale, _divisor(weight, dtype)], dtype=dtype, device=device)
    arguments = (inputs.origin, inputs.first, inputs.words, inputs.numbers, *inputs.selection, scalars, sign, raw(target))
    sizes = (inputs.numel, inputs.row_length, inputs.tasks, consensus_k)
    stages = {"BY_RANK": inputs.by_rank, "ELECT": election, "VOTE": _VOTES.index(vote), "COMBINE": _COMBINES.index(combine)}
    launch(sparse_merge_kernel, (inputs.blocks,), *arguments, *sizes, **stages, SAME=direct, **inputs.constants)
    if not direct:
        out.copy_(target)
    return counted


def sparse_merge_out(*arguments: Any, **named: Any) -> None:
    """Launch :func:`taskloom.sparse_merge` into its argument ``out``."""
    _merge_into(*arguments, **named)


def sparse_merge_statistics_out(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    """Launch :func:`taskloom.sparse_merge` into its argument ``out``, with statistics."""
    return _merge_into(*arguments, **named, statistics=True)


def sparse_merge(base: Tensor | None, tuned: Sequence[Tensor], *settings: Any, dtype: torch.dtype, **named: Any) -> Tensor:
    """Launch :func:`taskloom.sparse_merge`."""
    out = torch.empty(tuned[0].shape, dtype=dtype, device=tuned[0].device)
    sparse_merge_out(base, tuned, *settings, **named, out=out)
    return out
