"""task_mask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import entries_per_program, flat, launch, programs
from taskloom.triton_kernels.masked.entries import load_entries, program_offsets, store_bits


@triton.jit
def task_mask_kernel(base, tuned, total, scalars, packed, numel, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """|delta| > lambda * |total - delta|, delta = tuned - base; scalars[0] is lambda."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    delta = load_entries(tuned, offsets, inside, WIDE) - load_entries(base, offsets, inside, WIDE)
    rest = load_entries(total, offsets, inside, WIDE) - delta
    flags = inside & (tl.abs(delta) > tl.load(scalars) * tl.abs(rest))
    store_bits(packed, tl.program_id(0).to(tl.int64) * BLOCK, numel, flags, BLOCK)


def task_mask(base: Tensor, tuned: Tensor, multi_task_vector: Tensor, tall_mask_lambda: float) -> Tensor:
    """Launch :func:`taskloom.task_mask`."""
    dtype = accumulation_dtype(base, tuned, multi_task_vector)
    numel = base.numel()
    packed = torch.empty((numel + 7) // 8, dtype=torch.uint8, device=base.device)
    block = entries_per_program(numel)
    arguments = (flat(base), flat(tuned), flat(multi_task_vector), torch.full((1,), tall_mask_lambda, dtype=dtype, device=base.device))
    wide = dtype == torch.float64
    launch(task_mask_kernel, (programs(numel, block),), *arguments, packed, numel, WIDE=wide, BLOCK=block)
    return packed
