"""Rows of the ops on several checkpoints: sums, merges, thresholds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from contest import Contest, Make, Row
from inputs_on import checkpoints, normal, total_bytes
from torch import Tensor

import taskloom
from taskloom.ops.masked import block_scale_merge_backward

TASKS = 8
WEIGHT, DENSITY = 0.5, 0.2
LARGE = 28


def _summed(base: Tensor, *tuned: Tensor) -> Tensor:
    total = torch.zeros_like(base, dtype=torch.float32)
    for task in tuned:
        total += task.float() - base.float()
    return total


def vector_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    base, tuned = checkpoints(device, dtype, entries, TASKS)
    return Contest(
        ours=lambda: taskloom.multi_task_vector(base, tuned),
        bytes=total_bytes(base, *tuned) + 4 * entries,
        peers={"sum in a loop": lambda: _summed(base, *tuned)},
        compiled=(_summed, (base, *tuned)),
    )


def _task_arithmetic(base: Tensor, *tuned: Tensor) -> Tensor:
    return (base.float() + WEIGHT * _summed(base, *tuned)).to(base.dtype)


def _elected(base: Tensor, deltas: Tensor) -> Tensor:
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = deltas * sign > 0
    return (base.float() + torch.where(agree, deltas, 0).sum(0) / (WEIGHT * agree.sum(0)).clamp(min=WEIGHT)).to(base.dtype)


def _ties(base: Tensor, *tuned: Tensor) -> Tensor:
    deltas = torch.stack([task.float() - base.float() for task in tuned])
    places = deltas.abs().topk(int(DENSITY * base.numel()), sorted=False).indices
    kept = torch.zeros_like(deltas, dtype=torch.bool).scatter_(1, places, True)
    return _elected(base, torch.where(kept, WEIGHT * deltas, 0))


def _dare(base: Tensor, *tuned: Tensor) -> Tensor:
    deltas = torch.stack([task.float() - base.float() for task in tuned])
    kept = torch.rand_like(deltas) < DENSITY
    return (base.float() + (WEIGHT * kept * deltas / DENSITY).sum(0)).to(base.dtype)


def merge_contest(tasks: int, passes: int, peer: str, eager: Callable[..., Tensor], compiled: bool, **stages: Any) -> Make:
    def make(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
        base, tuned = checkpoints(device, dtype, entries, tasks)
        return Contest(
            ours=lambda: taskloom.sparse_merge(base, tuned, WEIGHT, **stages),
            bytes=passes * total_bytes(base, *tuned) + base.nbytes,
            peers={peer: lambda: eager(base, *tuned)},
            compiled=(eager, (base, *tuned)) if compiled else None,
        )

    return make


def merge_out_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    base, tuned = checkpoints(device, dtype, entries, 3)
    out = torch.empty_like(base)
    return Contest(
        ours=lambda: taskloom.sparse_merge(base, tuned, WEIGHT, out=out),
        bytes=total_bytes(base, *tuned, out),
        peers={"sum in a loop": lambda: out.copy_(_task_arithmetic(base, *tuned))},
    )


def threshold_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    base, (tuned,) = checkpoints(device, dtype, entries, 1)
    rank = int(DENSITY * entries)

    def magnitudes() -> Tensor:
        return (tuned.float() - base.float()).abs()

    return Contest(
        ours=lambda: taskloom.magnitude_threshold(tuned, base, rank=rank),
        bytes=total_bytes(tuned, base),
        peers={
            "kthvalue": lambda: magnitudes().kthvalue(entries - rank + 1).values,
            "topk": lambda: magnitudes().topk(rank, sorted=False).values.min(),
            "quantile": lambda: magnitudes().quantile(1 - DENSITY),
        },
        exact=True,
    )


def row_threshold_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    length = min(4096, entries)
    base, (tuned,) = checkpoints(device, dtype, entries, 1)
    base, tuned = base.view(-1, length), tuned.view(-1, length)
    rank = int(DENSITY * length)

    def magnitudes() -> Tensor:
        return (tuned.float() - base.float()).abs()

    return Contest(
        ours=lambda: taskloom.magnitude_threshold(tuned, base, rank=rank, scope="row"),
        bytes=total_bytes(tuned, base) + 12 * base.shape[0],
        peers={
            "kthvalue": lambda: magnitudes().kthvalue(length - rank + 1, dim=-1).values,
            "topk": lambda: magnitudes().topk(rank, dim=-1, sorted=False).values.amin(-1),
        },
        exact=True,
    )


def magnitude_mask_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    base, (tuned,) = checkpoints(device, dtype, entries, 1)
    rank = int(DENSITY * entries)

    def by_topk() -> Tensor:
        kept = (tuned.float() - base.float()).abs().topk(rank, sorted=False).indices
        return torch.zeros(entries, dtype=torch.bool, device=device).index_fill_(0, kept, True)

    # A rank is known only after everything was read once.
    moved = 2 * total_bytes(tuned, base) + entries
    return Contest(ours=lambda: taskloom.magnitude_mask(tuned, base, rank=rank), bytes=moved, peers={"topk": by_topk})


def histogram_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    base, (tuned,) = checkpoints(device, dtype, entries, 1)
    digits = 1 << 16

    def by_bincount() -> Tensor:
        bits = (tuned.float() - base.float()).abs().view(torch.int32)
        return torch.bincount(bits >> 16, minlength=digits)

    moved = total_bytes(tuned, base) + 8 * digits
    return Contest(ours=lambda: taskloom.magnitude_histogram(tuned, base, shift=16), bytes=moved, peers={"bincount": by_bincount})


def block_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    blocks = 8
    size = entries // blocks
    base = [normal(device, dtype, size, place) for place in range(blocks)]
    deltas = [[normal(device, dtype, size, 100 * task + place, 0.1) for place in range(blocks)] for task in range(1, TASKS + 1)]
    coef = normal(device, torch.float32, TASKS * blocks, 9).view(TASKS, blocks)

    def in_a_loop() -> list[Tensor]:
        return [
            (one.float() + sum(coef[task, place] * deltas[task][place].float() for task in range(TASKS))).to(dtype)
            for place, one in enumerate(base)
        ]

    moved = 2 * total_bytes(*base) + sum(total_bytes(*task) for task in deltas)
    return Contest(ours=lambda: taskloom.block_scale_merge(base, deltas, coef), bytes=moved, peers={"sum in a loop": in_a_loop})


def block_backward_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    gradient = normal(device, dtype, entries, 0)
    deltas = [normal(device, dtype, entries, task) for task in range(1, TASKS + 1)]

    def by_dot() -> Tensor:
        return torch.stack([torch.dot(gradient.float(), one.float()) for one in deltas])

    moved = total_bytes(gradient, *deltas)
    return Contest(
        ours=lambda: block_scale_merge_backward([gradient], [[one] for one in deltas]), bytes=moved, peers={"dot products": by_dot}
    )


_TIES: dict[str, Any] = {"select": "magnitude", "density": DENSITY, "elect": "sign_sum", "combine": "disjoint_mean"}
_DARE: dict[str, Any] = {"select": "dropout", "density": DENSITY, "rescale": "density", "seed": 1}
_BOTH = (torch.bfloat16, torch.float32)

ROWS = (
    Row("multi_task_vector", f"{TASKS} tasks", vector_contest, bits=LARGE, aim={"share": 0.85}),
    Row(
        "sparse_merge", "task arithmetic", merge_contest(TASKS, 1, "sum in a loop", _task_arithmetic, True), bits=LARGE, aim={"share": 0.85}
    ),
    Row("magnitude_threshold", "", threshold_contest, _BOTH, bits=LARGE, aim={"share": 0.6, "over": ("kthvalue", 10)}),
    Row("sparse_merge", "TIES", merge_contest(3, 2, "topk", _ties, False, **_TIES), bits=27),
    Row("sparse_merge", "DARE", merge_contest(3, 1, "rand", _dare, True, **_DARE), bits=27),
    Row("sparse_merge_out", "task arithmetic", merge_out_contest, bits=27),
    Row("magnitude_threshold", "by row", row_threshold_contest),
    Row("magnitude_mask", "", magnitude_mask_contest),
    Row("magnitude_histogram", "", histogram_contest),
    Row("block_scale_merge", "8 blocks", block_contest),
    Row("block_scale_merge_backward", "", block_backward_contest),
)
