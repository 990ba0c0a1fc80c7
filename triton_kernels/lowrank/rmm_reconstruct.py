"""rmm_reconstruct."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import entries_per_program, flat, launch, programs, raw
from taskloom.triton_kernels.masked.entries import load_entries, program_offsets, store_entries


@triton.jit
def rmm_reconstruct_kernel(mean, basis, coefficients, out, numel, width, rank, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Mean + coefficients basis of the entries [P, r], directions in order."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    origin = load_entries(mean, offsets, inside, WIDE)
    position = offsets // width
    entry = offsets - position * width
    added = tl.zeros_like(origin)
    k = 0
    while k < rank:
        row = position * rank + k
        added += load_entries(coefficients, row, inside, WIDE) * load_entries(basis, row * width + entry, inside, WIDE)
        k += 1
    store_entries(out, offsets, origin + added, inside)


def rmm_reconstruct(mean: Tensor, basis: Tensor, coefficients: Tensor) -> Tensor:
    """Launch :func:`taskloom.rmm_reconstruct`."""
    out = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
    block = entries_per_program(out.numel())
    wide = accumulation_dtype(mean, basis, coefficients) == torch.float64
    arguments = (flat(mean), flat(basis), flat(coefficients), raw(out), out.numel(), mean.shape[1], basis.shape[1])
    launch(rmm_reconstruct_kernel, (programs(out.numel(), block),), *arguments, WIDE=wide, BLOCK=block)
    return out
