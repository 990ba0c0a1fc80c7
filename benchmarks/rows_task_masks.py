"""Rows of the ops on packed masks and on the weights of several tasks."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import bool_mask, checkpoints, packed_mask, total_bytes, weights

TASKS = 8
MASKS = 20
LAMBDA = 0.4
SCALE = 1e-3
BITS = torch.arange(8, dtype=torch.uint8)


def pack_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    mask = bool_mask(shape, 0, 0.4)
    return Contest(
        ours=lambda: taskloom.pack_mask(mask),
        bytes=mask.numel() + mask.numel() // 8,
        peers={
            "shift and sum": lambda: (mask.view(-1, 8).to(torch.uint8) << BITS).sum(1, dtype=torch.uint8),
            "numpy.packbits": lambda: torch.from_numpy(np.packbits(mask.numpy(), bitorder="little")),
        },
    )


def unpack_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    packed = packed_mask(shape, 0, 0.4)
    numel = shape[0] * shape[1]
    return Contest(
        ours=lambda: taskloom.unpack_mask(packed, shape),
        bytes=numel + packed.nbytes,
        peers={
            "shift and compare": lambda: (((packed[:, None] >> BITS) & 1) != 0).view(shape),
            "numpy.unpackbits": lambda: torch.from_numpy(np.unpackbits(packed.numpy(), bitorder="little")).view(torch.bool).view(shape),
        },
    )


def task_mask_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    base, tasks = checkpoints(shape, dtype, 3)
    total = taskloom.multi_task_vector(base, tasks)

    def eager() -> Tensor:
        delta = tasks[0].float() - base.float()
        return delta.abs() > LAMBDA * (total - delta).abs()

    return Contest(
        ours=lambda: taskloom.task_mask(base, tasks[0], total, LAMBDA),
        bytes=total_bytes(base, tasks[0], total) + base.numel() // 8,
        peers={"a bool mask": eager},
        shared=lambda packed: taskloom.unpack_mask(packed, shape),
    )


def multi_task_vector_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    base, tasks = checkpoints(shape, dtype, TASKS)

    def in_a_loop() -> Tensor:
        total = torch.zeros(shape)
        for task in tasks:
            total += task.float() - base.float()
        return total

    return Contest(
        ours=lambda: taskloom.multi_task_vector(base, tasks),
        bytes=total_bytes(base, *tasks) + 4 * base.numel(),
        peers={
            "a sum in a loop": in_a_loop,
            "stack and sum": lambda: torch.stack([task.float() - base.float() for task in tasks]).sum(0),
        },
        sizes={"tasks": TASKS},
    )


def mask_count_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    numel = shape[0] * shape[1]
    masks = [bool_mask(shape, seed, 0.4) for seed in range(MASKS)]
    packed = torch.stack([taskloom.pack_mask(mask) for mask in masks])

    def counted(masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        counts = torch.zeros(shape, dtype=torch.uint8)
        for mask in masks:
            counts += mask
        return counts >= 2, torch.bincount(counts.flatten(), minlength=MASKS + 1)

    return Contest(
        ours=lambda: taskloom.mask_count(packed, numel, 2),
        bytes=(MASKS + 1) * numel // 8,
        peers={
            "sum of bool masks": lambda: counted(masks),
            "unpack and sum": lambda: counted([taskloom.unpack_mask(one, shape) for one in packed]),
        },
        shared=lambda found: (taskloom.unpack_mask(found[0], shape), found[1]),
        sizes={"masks": MASKS},
    )


def compress_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    density = 0.1
    values, packed = weights(shape, 0, dtype), packed_mask(shape, 1, density)
    mask = taskloom.unpack_mask(packed, shape)
    return Contest(
        ours=lambda: taskloom.masked_compress(values, packed),
        bytes=values.nbytes + int(mask.sum()) * values.itemsize + packed.nbytes,
        peers={
            "index a bool mask": lambda: values[mask],
            "unpack and masked_select": lambda: values.masked_select(taskloom.unpack_mask(packed, shape)),
        },
        exact=True,
        sizes={"density": density},
    )


def restore_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    density = 0.1
    base, packed = weights(shape, 0, dtype), packed_mask(shape, 1, density)
    mask = taskloom.unpack_mask(packed, shape)
    compressed = taskloom.masked_compress(weights(shape, 2, dtype), packed)

    def by_indexing() -> Tensor:
        restored = base.clone()
        restored[mask] = compressed
        return restored

    return Contest(
        ours=lambda: taskloom.masked_restore(compressed, packed, base),
        bytes=2 * base.nbytes + total_bytes(compressed, packed),
        peers={"masked_scatter": lambda: base.masked_scatter(mask, compressed), "assign to a bool mask": by_indexing},
        exact=True,
        sizes={"density": density},
    )


def update_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    density = 0.4
    base, delta, packed = weights(shape, 0, dtype), weights(shape, 1, dtype), packed_mask(shape, 2, density)
    mask = taskloom.unpack_mask(packed, shape)
    return Contest(
        ours=lambda: taskloom.masked_update(base, packed, delta),
        bytes=3 * base.nbytes + packed.nbytes,
        peers={
            "where on a bool mask": lambda: torch.where(mask, base + delta, base),
            "unpack and where": lambda: torch.where(taskloom.unpack_mask(packed, shape), base + delta, base),
        },
        sizes={"density": density},
    )


def update_inplace_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    density = 0.01
    target, delta, packed = weights(shape, 0, dtype), weights(shape, 1, dtype), packed_mask(shape, 2, density)
    mask = taskloom.unpack_mask(packed, shape)

    def by_indexing() -> Tensor:
        target[mask] += SCALE * delta[mask]
        return target

    return Contest(
        ours=lambda: taskloom.masked_update_(target, packed, delta, SCALE),
        bytes=3 * int(mask.sum()) * target.itemsize + packed.nbytes,
        peers={
            "where on a bool mask": lambda: target.copy_(torch.where(mask, target + SCALE * delta, target)),
            "index a bool mask": by_indexing,
        },
        changes=target,
        sizes={"density": density},
    )


def switch_contest(shape: Shape, dtype: torch.dtype, changed: float = 0.02) -> Contest:
    density = 0.3
    base, delta = weights(shape, 0, dtype), weights(shape, 1, dtype)
    old = packed_mask(shape, 2, density)
    difference = packed_mask(shape, 3, changed)
    new = old ^ difference
    target = taskloom.masked_update(base, old, delta)
    mask = taskloom.unpack_mask(new, shape)
    entries = int(taskloom.unpack_mask(difference, shape).sum())
    gained = int(taskloom.unpack_mask(difference & new, shape).sum())
    return Contest(
        ours=lambda: taskloom.masked_switch_(target, base, delta, old, new),
        bytes=(2 * entries + gained) * target.itemsize + total_bytes(old, new),
        peers={
            "where on a bool mask": lambda: torch.where(mask, base + delta, base, out=target),
            "unpack and where": lambda: torch.where(taskloom.unpack_mask(new, shape), base + delta, base, out=target),
        },
        changes=target,
        sizes={"density": density, "changed": changed},
    )


ROWS = (
    Row("pack_mask", pack_contest, dtypes=(torch.bool,)),
    Row("unpack_mask", unpack_contest, dtypes=(torch.bool,)),
    Row("task_mask", task_mask_contest),
    Row("multi_task_vector", multi_task_vector_contest),
    Row("mask_count", mask_count_contest, dtypes=(torch.bool,)),
    Row("masked_compress", compress_contest, "1 in 10 set"),
    Row("masked_restore", restore_contest, "1 in 10 set"),
    Row("masked_update", update_contest, "4 in 10 set"),
    Row("masked_update_", update_inplace_contest, "1 in 100 set"),
    Row("masked_switch_", switch_contest, "2 in 100 changed"),
    Row("masked_switch_", partial(switch_contest, changed=0.5), "1 in 2 changed"),
)
