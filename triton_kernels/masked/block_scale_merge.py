"""block_scale_merge and the gradients of its coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import aligned, entries_per_program, flat, launch, of_one_dtype, programs, table
from taskloom.triton_kernels.masked.entries import listed_pointer, load_entries, program_offsets, store_entries


@triton.jit
def load_groups(partition, offsets, inside, groups, largest, GROUPED: tl.constexpr):
    """The group of each entry, kept below ``groups``; the largest that was there goes to ``largest``."""
    if GROUPED:
        group = tl.load(partition + offsets, mask=inside, other=0).to(tl.int32)
        tl.atomic_max(largest, tl.max(group, axis=0))
        group = tl.minimum(group, groups - 1)
    else:
        group = tl.zeros_like(offsets).to(tl.int32)
    return group


@triton.jit
def block_scale_merge_kernel(
    base,
    first,
    addresses,
    coef,
    partition,
    largest,
    out,
    numel,
    tasks,
    groups,
    GROUPED: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Base + sum of coef * delta, one coefficient per task and group; tables and coefficients start at this block's."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    group = load_groups(partition, offsets, inside, groups, largest, GROUPED)
    origin = load_entries(base, offsets, inside, WIDE)
    total = tl.zeros_like(origin)
    task = 0
    while task < tasks:
        delta = load_entries(listed_pointer(addresses, task, first, ALIGNED), offsets, inside, WIDE)
        factor = tl.load(coef + task * groups + group, mask=inside, other=0) if GROUPED else tl.load(coef + task * groups)
        total += factor * delta
        task += 1
    store_entries(out, offsets, origin + total, inside)


@triton.jit
def block_scale_products_kernel(gradient, delta, partition, largest, sums, numel, groups, GROUPED: tl.constexpr, BLOCK: tl.constexpr):
    """Each program's inner products of gradient and delta over every group, in float64: sums[program, group]."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    group = load_groups(partition, offsets, inside, groups, largest, GROUPED)
    product = load_entries(gradient, offsets, inside, True) * load_entries(delta, offsets, inside, True)
    own = sums + tl.program_id(0).to(tl.int64) * groups
    place = 0
    while place < groups:
        tl.store(own + place, tl.sum(tl.where(inside & (group == place), product, 0.0), axis=0))
        place += 1


def _check_groups(largest: Tensor, partition: Sequence[Tensor], groups: int) -> None:
    # One wait for the device after all blocks; kernels have stayed inside the coefficients meanwhile.
    if partition and int(largest) >= groups:
        raise RuntimeError(f"partition: expected values below {groups}, the number of groups, got {int(largest)}")


def _partitions(partition: Sequence[Tensor], blocks: int, device: torch.device) -> list[Tensor]:
    none = torch.zeros(1, dtype=torch.uint8, device=device)
    return [flat(part) for part in partition] or [none] * blocks


def block_scale_merge(base: Sequence[Tensor], deltas: Sequence[Tensor], coef: Tensor, partition: Sequence[Tensor]) -> list[Tensor]:
    """Launch :func:`taskloom.block_scale_merge`; ``deltas`` holds the blocks of one task after those of the other."""
    blocks, device = len(base), base[0].device
    tasks, groups = len(deltas) // blocks, coef.shape[2]
    largest = torch.zeros(1, dtype=torch.int32, device=device)
    parts = _partitions(partition, blocks, device)
    listed = [of_one_dtype(deltas[b::blocks]) for b in range(blocks)]
    addresses = table([[delta.data_ptr() for delta in task] for task in listed], device)
    merged = []
    for b, block in enumerate(base):
        dtype = accumulation_dtype(block, coef, *deltas[b::blocks])
        coefficients = coef[:, b].to(dtype).contiguous()
        out = torch.empty(block.shape, dtype=block.dtype, device=device)
        numel, size = block.numel(), entries_per_program(block.numel())
        constants = {"GROUPED": bool(partition), "WIDE": dtype == torch.float64, "ALIGNED": aligned(listed[b]), "BLOCK": size}
        arguments = (flat(block), listed[b][0], addresses[b], coefficients, parts[b], largest, flat(out), numel, tasks, groups)
        launch(block_scale_merge_kernel, (programs(numel, size),), *arguments, **constants)
        merged.append(out)
    _check_groups(largest, partition, groups)
    return merged


def block_scale_merge_backward(gradients: Sequence[Tensor], deltas: Sequence[Tensor], partition: Sequence[Tensor], groups: int) -> Tensor:
    """Launch :func:`taskloom.ops.masked.block_scale_merge_backward`; what programs sum is summed in their order."""
    blocks, device = len(gradients), gradients[0].device
    products = torch.zeros(len(deltas) // blocks, blocks, groups, dtype=torch.float64, device=device)
    largest = torch.zeros(1, dtype=torch.int32, device=device)
    parts = _partitions(partition, blocks, device)
    for b, gradient in enumerate(gradients):
        numel, size = gradient.numel(), entries_per_program(gradient.numel(), 2048)
        count = programs(numel, size)
        for task, delta in enumerate(deltas[b::blocks]):
            sums = torch.empty(count, groups, dtype=torch.float64, device=device)
            arguments = (flat(gradient), flat(delta), parts[b], largest, sums, numel, groups)
            launch(block_scale_products_kernel, (count,), *arguments, GROUPED=bool(partition), BLOCK=size)
            products[task, b] = sums.sum(0)
    _check_groups(largest, partition, groups)
    return products
