"""Rows of reversible merging's ops: eight tasks' adapters of rank 16 in three directions a position, the paper's headline setting."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights

TASKS, RANK, DIRECTIONS = 8, 16, 3
MOST_POSITIONS, MOST_ROWS = 8192, 64
SIZES = {"tasks": TASKS, "rank": RANK, "directions": DIRECTIONS}


def _vectors(positions: int, seed: int, dtype: torch.dtype) -> Tensor:
    return weights((TASKS, min(positions, MOST_POSITIONS), RANK), seed, dtype)


def _by_svd(vectors: Tensor) -> Tensor:
    """The batched singular value decomposition of a copy [P, n, r], and what the directions restore."""
    wide = vectors.double().transpose(0, 1)
    mean = wide.mean(1, keepdim=True)
    left, values, right = torch.linalg.svd(wide - mean, full_matrices=False)
    restored: Tensor = mean + (left[:, :, :DIRECTIONS] * values[:, None, :DIRECTIONS]) @ right[:, :DIRECTIONS]
    return restored.float()


def _fit(shape: Shape, dtype: torch.dtype) -> Contest:
    vectors = _vectors(sum(shape), 0, dtype)
    moved = total_bytes(vectors) + total_bytes(*taskloom.rmm_fit(vectors, DIRECTIONS))

    def restored(fitted: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        mean, basis, coefficients = (part.double() for part in fitted)
        return (mean[:, None] + coefficients.transpose(0, 1) @ basis).float()

    ours = partial(taskloom.rmm_fit, vectors, DIRECTIONS)
    return Contest(ours, moved, {"batched svd": partial(_by_svd, vectors)}, shared=restored, sizes=SIZES | {"positions": vectors.shape[1]})


def _reconstruct(shape: Shape, dtype: torch.dtype) -> Contest:
    mean, basis, coefficients = taskloom.rmm_fit(_vectors(sum(shape), 0, dtype), DIRECTIONS)
    one = coefficients[1].contiguous()
    moved = 2 * total_bytes(mean) + total_bytes(basis, one)

    def eager() -> Tensor:
        return torch.baddbmm(mean[:, None], one[:, None], basis)[:, 0]

    return Contest(partial(taskloom.rmm_reconstruct, mean, basis, one), moved, {"baddbmm": eager}, shared=lambda found: found, sizes=SIZES)


def _linear(shape: Shape, dtype: torch.dtype) -> Contest:
    """A batch in which every row has another task than the one before."""
    outputs, inputs = (min(size, MOST_POSITIONS // 2) for size in shape)
    a, b = (taskloom.rmm_fit(_vectors(size, seed, dtype), DIRECTIONS) for seed, size in enumerate((outputs, inputs)))
    x, task = weights((MOST_ROWS, inputs), 5, dtype), torch.arange(MOST_ROWS) % TASKS

    def each_row() -> Tensor:
        """Every row's adapter gathered from all the tasks' adapters, which are restored before."""
        left, right = (torch.stack([taskloom.rmm_reconstruct(*side[:2], one) for one in side[2]]) for side in (a, b))
        inner = torch.bmm(x[:, None], right[task])
        return torch.bmm(inner, left[task].mT)[:, 0]

    moved = total_bytes(x, *a, *b)
    ours = partial(taskloom.rmm_linear, x, task, *a, *b)
    sizes = SIZES | {"rows": MOST_ROWS, "outputs": outputs, "inputs": inputs}
    return Contest(ours, moved, {"adapters gathered by row": each_row}, shared=lambda found: found, sizes=sizes)


_SINGLE = (torch.float32,)
ROWS = (
    Row("rmm_fit", _fit, dtypes=_SINGLE),
    Row("rmm_reconstruct", _reconstruct, dtypes=_SINGLE),
    Row("rmm_linear", _linear, dtypes=_SINGLE),
)
