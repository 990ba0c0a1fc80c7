"""Rows of the ops on masks and on what masks select."""

from __future__ import annotations

import torch
from contest import Contest, Row
from inputs_on import bool_mask, checkpoints, normal, packed_mask, total_bytes
from torch import Tensor

import taskloom

MASKS = 20
LAMBDA = 0.4


def pack_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    mask = bool_mask(device, entries, 0, 0.4)
    bits = torch.arange(8, dtype=torch.uint8, device=device)

    def shifted(mask: Tensor, bits: Tensor) -> Tensor:
        return (mask.view(-1, 8).to(torch.uint8) << bits).sum(1, dtype=torch.uint8)

    moved = entries + entries // 8
    return Contest(lambda: taskloom.pack_mask(mask), moved, {"shift and sum": lambda: shifted(mask, bits)}, (shifted, (mask, bits)))


def unpack_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    packed = packed_mask(device, entries, 0, 0.4)
    bits = torch.arange(8, dtype=torch.uint8, device=device)

    def shifted(packed: Tensor, bits: Tensor) -> Tensor:
        return (((packed[:, None] >> bits) & 1) != 0).view(-1)

    moved = entries + packed.nbytes
    return Contest(
        lambda: taskloom.unpack_mask(packed, (entries,)), moved, {"shift": lambda: shifted(packed, bits)}, (shifted, (packed, bits))
    )


def count_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    packed = [packed_mask(device, entries, seed, 0.4) for seed in range(MASKS)]
    masks = [taskloom.reference.masked.unpack_mask(one, (entries,)) for one in packed]

    def summed() -> tuple[Tensor, Tensor]:
        counts = torch.zeros(entries, dtype=torch.uint8, device=device)
        for mask in masks:
            counts += mask
        return counts >= 2, torch.bincount(counts, minlength=MASKS + 1)

    moved = (MASKS + 1) * packed[0].nbytes
    return Contest(lambda: taskloom.mask_count(packed, entries, 2), moved, {"sum of bool masks": summed})


def task_mask_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    base, tasks = checkpoints(device, dtype, entries, 3)
    total = taskloom.reference.masked.multi_task_vector(base, tasks, [1.0] * 3)

    def eager(base: Tensor, tuned: Tensor, total: Tensor) -> Tensor:
        delta = tuned.float() - base.float()
        return delta.abs() > LAMBDA * (total - delta).abs()

    given = (base, tasks[0], total)
    moved = total_bytes(*given) + entries // 8
    return Contest(lambda: taskloom.task_mask(*given, LAMBDA), moved, {"a bool mask": lambda: eager(*given)}, (eager, given))


def update_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    target, delta, packed = normal(device, dtype, entries, 0), normal(device, dtype, entries, 1), packed_mask(device, entries, 2, 0.5)
    mask = taskloom.reference.masked.unpack_mask(packed, (entries,))

    def where(target: Tensor, mask: Tensor, delta: Tensor) -> Tensor:
        return torch.where(mask, target + delta, target)

    moved = 3 * target.nbytes + packed.nbytes
    given = (target, mask, delta)
    return Contest(lambda: taskloom.masked_update(target, packed, delta), moved, {"where": lambda: where(*given)}, (where, given))


def update_inplace_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    target, delta, packed = normal(device, dtype, entries, 0), normal(device, dtype, entries, 1), packed_mask(device, entries, 2, 0.5)
    mask, start = taskloom.reference.masked.unpack_mask(packed, (entries,)), target.clone()

    def where(target: Tensor, mask: Tensor, delta: Tensor) -> Tensor:
        return target.copy_(torch.where(mask, target + 1e-3 * delta, target))

    return Contest(
        ours=lambda: taskloom.masked_update_(target, packed, delta, 1e-3),
        bytes=3 * target.nbytes + packed.nbytes,
        peers={"where": lambda: where(target, mask, delta)},
        compiled=(where, (target, mask, delta)),
        reset=lambda: target.copy_(start),
    )


def switch_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    base, delta = normal(device, dtype, entries, 0), normal(device, dtype, entries, 1)
    old, changed = packed_mask(device, entries, 2, 0.3), packed_mask(device, entries, 3, 0.02)
    new = old ^ changed
    mask = taskloom.reference.masked.unpack_mask(new, (entries,))
    start = taskloom.reference.masked.masked_update(base, old, delta, 1.0)
    target = start.clone()
    touched = int(taskloom.reference.masked.unpack_mask(changed, (entries,)).sum())
    return Contest(
        ours=lambda: taskloom.masked_switch_(target, base, delta, old, new),
        bytes=3 * touched * target.itemsize + total_bytes(old, new),
        peers={"where": lambda: torch.where(mask, base + delta, base, out=target)},
        reset=lambda: target.copy_(start),
    )


def compress_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    values, packed = normal(device, dtype, entries, 0), packed_mask(device, entries, 1, 0.1)
    mask = taskloom.reference.masked.unpack_mask(packed, (entries,))
    moved = values.nbytes + int(mask.sum()) * values.itemsize + packed.nbytes
    return Contest(lambda: taskloom.masked_compress(values, packed), moved, {"index a bool mask": lambda: values[mask]}, exact=True)


def restore_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    base, packed = normal(device, dtype, entries, 0), packed_mask(device, entries, 1, 0.1)
    mask = taskloom.reference.masked.unpack_mask(packed, (entries,))
    stored = normal(device, dtype, int(mask.sum()), 2)
    moved = 2 * base.nbytes + total_bytes(stored, packed)
    peers = {"masked_scatter": lambda: base.masked_scatter(mask, stored)}
    return Contest(lambda: taskloom.masked_restore(stored, packed, base), moved, peers, exact=True)


_BOOL = (torch.bool,)
_PACKED = {"share": 0.8}

ROWS = (
    Row("masked_update_", "1 in 2 set", update_inplace_contest, (torch.bfloat16, torch.float32), bits=28, aim={"share": 0.85}),
    Row("pack_mask", "", pack_contest, _BOOL, bits=28, aim=_PACKED),
    Row("unpack_mask", "", unpack_contest, _BOOL, bits=28, aim=_PACKED),
    Row("mask_count", f"{MASKS} masks", count_contest, _BOOL, bits=27, aim=_PACKED),
    Row("task_mask", "", task_mask_contest, bits=27, aim=_PACKED),
    Row("masked_update", "1 in 2 set", update_contest, bits=27),
    Row("masked_switch_", "2 in 100 changed", switch_contest, bits=27),
    Row("masked_compress", "1 in 10 set", compress_contest, bits=27),
    Row("masked_restore", "1 in 10 set", restore_contest, bits=27),
)
