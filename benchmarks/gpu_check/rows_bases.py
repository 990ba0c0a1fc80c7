"""Rows of the ops of reversible merging: the adapters of eight tasks, of rank 16, in three directions a position."""

from __future__ import annotations

import torch
from contest import Contest, Row
from inputs_on import normal, total_bytes
from torch import Tensor

import taskloom

TASKS, RANK, DIRECTIONS = 8, 16, 3
BATCH = 256

Parts = tuple[Tensor, Tensor, Tensor]


def _parts(device: torch.device, dtype: torch.dtype, positions: int, seed: int) -> Parts:
    """Mean, basis and coefficients of all tasks."""
    shapes = ((positions, RANK), (positions, DIRECTIONS, RANK), (TASKS, positions, DIRECTIONS))
    mean, basis, coefficients = (
        normal(device, dtype, torch.Size(shape).numel(), seed + place, 0.2).view(shape) for place, shape in enumerate(shapes)
    )
    return mean, basis, coefficients


def _restored(parts: Parts) -> Tensor:
    """The vectors [n, P, r] of all tasks."""
    mean, basis, coefficients = parts
    return mean + (coefficients.transpose(0, 1) @ basis).transpose(0, 1)


def fit_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    positions = entries // (TASKS * RANK)
    vectors = normal(device, dtype, positions * TASKS * RANK, 0).view(TASKS, positions, RANK)

    def centred() -> tuple[Tensor, Tensor]:
        wide = vectors.double().transpose(0, 1)
        mean = wide.mean(1, keepdim=True)
        return mean, wide - mean

    def by_svd() -> tuple[Tensor, ...]:
        mean, wide = centred()
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
        return mean, right[:, :DIRECTIONS], left[:, :, :DIRECTIONS] * values[:, None, :DIRECTIONS]

    def by_eigh() -> tuple[Tensor, ...]:
        mean, wide = centred()
        basis, _ = torch.linalg.qr((torch.linalg.eigh(wide @ wide.mT).eigenvectors[:, :, -DIRECTIONS:].mT @ wide).mT)
        return mean, basis, wide @ basis

    numbers = positions * (RANK + DIRECTIONS * (RANK + TASKS))
    return Contest(
        ours=lambda: taskloom.rmm_fit(vectors, DIRECTIONS),
        bytes=vectors.nbytes + numbers * vectors.itemsize,
        peers={"batched svd": by_svd, "batched eigh": by_eigh},
    )


def reconstruct_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    mean, basis, coefficients = _parts(device, dtype, entries // RANK, 0)
    one = coefficients[1]

    def by_sum(mean: Tensor, basis: Tensor, one: Tensor) -> Tensor:
        return mean + (one[:, :, None] * basis).sum(1)

    return Contest(
        ours=lambda: taskloom.rmm_reconstruct(mean, basis, one),
        bytes=2 * mean.nbytes + total_bytes(basis, one),
        peers={"baddbmm": lambda: torch.baddbmm(mean[:, None], one[:, None], basis)[:, 0]},
        compiled=(by_sum, (mean, basis, one)),
    )


def linear_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    """A batch in which each row has another task than the one before; ``entries`` is that of a layer's weight."""
    inputs = outputs = int(entries**0.5)
    a, b = _parts(device, dtype, outputs, 0), _parts(device, dtype, inputs, 3)
    x, task = normal(device, dtype, BATCH * inputs, 6).view(BATCH, inputs), torch.arange(BATCH, device=device) % TASKS
    # What a server that has the memory keeps: every task's own adapter.
    left, right = _restored(a), _restored(b)
    down, up = right.mT.contiguous(), left.contiguous()

    def by_row() -> Tensor:
        return torch.bmm(torch.bmm(x[:, None], right[task]), left[task].mT)[:, 0]

    def by_directions() -> Tensor:
        inner = x @ b[0]
        for k in range(DIRECTIONS):
            inner = inner + (x * b[2][task, :, k]) @ b[1][:, k]
        y = inner @ a[0].T
        for k in range(DIRECTIONS):
            y = y + (inner @ a[1][:, k].T) * a[2][task, :, k]
        return y

    return Contest(
        ours=lambda: taskloom.rmm_linear(x, task, *a, *b),
        bytes=total_bytes(x, task, *a, *b) + BATCH * outputs * x.itemsize,
        peers={
            "p + 1 products": by_directions,
            "adapters kept, by row": by_row,
            "adapters kept, lowrank_apply": lambda: taskloom.lowrank_apply(x, down, up, 1.0, task),
        },
    )


ROWS = (
    Row("rmm_fit", f"{TASKS} tasks, rank {RANK}", fit_contest, (torch.float32,), bits=22),
    Row("rmm_reconstruct", f"{DIRECTIONS} directions", reconstruct_contest, bits=25),
    Row("rmm_linear", f"{TASKS} tasks, {BATCH} rows", linear_contest, bits=24),
)
