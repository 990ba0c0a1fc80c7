"""pack_mask, unpack_mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.triton_kernels.launch import entries_per_program, flat, launch, programs
from taskloom.triton_kernels.masked.entries import load_bits, program_offsets, store_bits


@triton.jit
def pack_mask_kernel(mask, packed, numel, BLOCK: tl.constexpr):
    """A bit for each byte that is not zero."""
    offsets = program_offsets(BLOCK)
    flags = tl.load(mask + offsets, mask=offsets < numel, other=0) != 0
    store_bits(packed, tl.program_id(0).to(tl.int64) * BLOCK, numel, flags, BLOCK)


@triton.jit
def unpack_mask_kernel(packed, mask, numel, BLOCK: tl.constexpr):
    """A byte, 0 or 1, for each bit."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    tl.store(mask + offsets, load_bits(packed, offsets, inside).to(tl.uint8), mask=inside)


def pack_mask(mask: Tensor) -> Tensor:
    """Launch :func:`taskloom.pack_mask`."""
    numel = mask.numel()
    packed = torch.empty((numel + 7) // 8, dtype=torch.uint8, device=mask.device)
    block = entries_per_program(numel, 2048)
    launch(pack_mask_kernel, (programs(numel, block),), flat(mask), packed, numel, BLOCK=block)
    return packed


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Launch :func:`taskloom.unpack_mask`."""
    mask = torch.empty(tuple(shape), dtype=torch.bool, device=packed.device)
    numel = mask.numel()
    block = entries_per_program(numel, 2048)
    launch(unpack_mask_kernel, (programs(numel, block),), flat(packed), mask.view(torch.uint8), numel, BLOCK=block)
    return mask
