"""multi_task_vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import aligned, entries_per_program, flat, launch, of_one_dtype, programs, table
from taskloom.triton_kernels.masked.entries import listed_pointer, load_entries, program_offsets


@triton.jit
def multi_task_vector_kernel(
    base, first, addresses, weights, total, numel, tasks, WIDE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of weight * (tuned - base), tasks in order; ``first`` is the first tuned tensor and gives the type of all."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    origin = load_entries(base, offsets, inside, WIDE)
    summed = tl.zeros_like(origin)
    task = 0
    while task < tasks:
        tuned = listed_pointer(addresses, task, first, ALIGNED)
        summed += tl.load(weights + task) * (load_entries(tuned, offsets, inside, WIDE) - origin)
        task += 1
    tl.store(total + offsets, summed, mask=inside)


def multi_task_vector(base: Tensor, tuned: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """Launch :func:`taskloom.multi_task_vector`."""
    dtype = accumulation_dtype(base, *tuned)
    total = torch.empty(base.shape, dtype=dtype, device=base.device)
    numel = total.numel()
    tasks = of_one_dtype(tuned)
    addresses = table([task.data_ptr() for task in tasks], base.device)
    weights = torch.tensor(weight, dtype=dtype, device=base.device)
    block = entries_per_program(numel)
    constants = {"WIDE": dtype == torch.float64, "ALIGNED": aligned(tasks), "BLOCK": block}
    arguments = (flat(base), tasks[0], addresses, weights, total, numel, len(tasks))
    launch(multi_task_vector_kernel, (programs(numel, block),), *arguments, **constants)
    return total
