"""Rows of the lowrank family: adapters merged into a weight, and batches whose rows take different adapters."""

from __future__ import annotations

import importlib
import math

import torch
from contest import Contest, Row
from inputs_on import normal, total_bytes
from torch import Tensor

import taskloom

RANK, TASKS, BATCH = 16, 16, 256
SCALE = 1e-3


def _weight(device: torch.device, dtype: torch.dtype, entries: int) -> Tensor:
    rows = 1 << (int(math.log2(entries)) // 2)
    return normal(device, dtype, entries, 0).reshape(rows, -1)


def _factors(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    rows, columns = shape
    A = normal(device, dtype, count * RANK * columns, 1).reshape(count, RANK, columns)
    return A, normal(device, dtype, count * RANK * rows, 2).reshape(count, rows, RANK)


def merge_inplace_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    start = _weight(device, dtype, entries)
    A, B = _factors(device, dtype, tuple(start.shape), 4)
    target, right, left = start.clone(), list(A), list(B)

    def by_delta() -> None:
        for a, b in zip(right, left, strict=True):
            target.add_((b @ a) * SCALE)

    def by_addmm() -> None:
        target.addmm_(torch.cat(left, 1), torch.cat(right), alpha=SCALE)

    return Contest(
        ours=lambda: taskloom.lowrank_merge_(target, right, left, scale=SCALE),
        bytes=2 * target.nbytes + total_bytes(A, B),
        peers={"a delta, then +=, as PEFT": by_delta, "addmm_ of all factors": by_addmm},
        reset=lambda: target.copy_(start),
        result=lambda: target,
    )


def merge_tasks_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    base = _weight(device, dtype, entries)
    A, B = _factors(device, dtype, tuple(base.shape), 4)
    return Contest(
        ours=lambda: taskloom.lowrank_merge_tasks(base, A, B, scale=SCALE),
        bytes=5 * base.nbytes + total_bytes(A, B),
        peers={"baddbmm": lambda: torch.baddbmm(base.expand(4, *base.shape), B, A, alpha=SCALE)},
    )


def norm_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    base = _weight(device, dtype, entries)
    A, B = _factors(device, dtype, tuple(base.shape), 1)
    return Contest(
        ours=lambda: taskloom.lowrank_norm(base, A[0], B[0], scale=SCALE),
        bytes=base.nbytes + total_bytes(A, B),
        peers={"norm of the sum": lambda: torch.linalg.norm(base.float() + SCALE * (B[0].float() @ A[0].float()), dim=1)},
    )


def apply_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    rows, columns = _weight(device, dtype, entries).shape
    A, B = _factors(device, dtype, (rows, columns), TASKS)
    x = normal(device, dtype, BATCH * columns, 3).reshape(BATCH, columns)
    task = (torch.arange(BATCH, device=device) * 7) % TASKS

    def by_gathering() -> Tensor:
        return torch.bmm(B[task], torch.bmm(A[task], x[:, :, None]))[:, :, 0]

    def by_two_launches() -> Tensor:
        # Imported where it runs: a machine without Triton still measures the rest.
        y: Tensor = importlib.import_module("shrink_expand").shrink_expand(x, A, B, task)
        return y

    return Contest(
        ours=lambda: taskloom.lowrank_apply(x, A, B, 1.0, task),
        bytes=total_bytes(x, A, B, task) + BATCH * rows * x.itemsize,
        peers={"gathered factors": by_gathering, "shrink, expand": by_two_launches},
    )


ROWS = (
    Row("lowrank_merge_", "4 adapters", merge_inplace_contest, (torch.bfloat16, torch.float32), bits=24),
    Row("lowrank_merge_tasks", "4 tasks", merge_tasks_contest, bits=24),
    Row("lowrank_norm", "", norm_contest, bits=24),
    Row("lowrank_apply", f"{TASKS} tasks, {BATCH} rows", apply_contest, bits=24),
)
