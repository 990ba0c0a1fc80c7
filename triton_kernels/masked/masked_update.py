"""masked_update, masked_update_."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import entries_per_program, flat, launch, programs, raw, written_in_place
from taskloom.triton_kernels.masked.entries import load_bits, load_entries, narrowed, program_offsets


@triton.jit
def masked_update_kernel(
    target, mask, delta, scalars, out, numel, PACKED: tl.constexpr, SAME: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Target + scale * delta where the mask is set, target's own bits elsewhere (nothing is stored there if ``out`` is target, SAME)."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    chosen = load_bits(mask, offsets, inside) if PACKED else tl.load(mask + offsets, mask=inside, other=0) != 0
    if SAME:
        before = load_entries(target, offsets, chosen, WIDE)
    else:
        kept = tl.load(target + offsets, mask=inside, other=0)
        before = load_entries(target, offsets, inside, WIDE)
    after = narrowed(before + tl.load(scalars) * load_entries(delta, offsets, chosen, WIDE), out)
    if SAME:
        # Threads of a program may hold different entries of different tensors: all have read before one writes.
        tl.debug_barrier()
        tl.store(out + offsets, after, mask=chosen)
    else:
        tl.store(out + offsets, tl.where(chosen, after, kept), mask=inside)


def _update(target: Tensor, mask: Tensor, delta: Tensor, scale: float, out: Tensor, *, same: bool) -> None:
    dtype = accumulation_dtype(target, delta)
    numel = target.numel()
    block = entries_per_program(numel)
    scalars = torch.full((1,), scale, dtype=dtype, device=target.device)
    packed = mask.dtype == torch.uint8
    constants = {"PACKED": packed, "SAME": same, "WIDE": dtype == torch.float64, "BLOCK": block}
    arguments = (flat(target), flat(mask), flat(delta), scalars, raw(out), numel)
    launch(masked_update_kernel, (programs(numel, block),), *arguments, **constants)


def masked_update(target: Tensor, mask: Tensor, delta: Tensor, scale: float) -> Tensor:
    """Launch :func:`taskloom.masked_update`."""
    out = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    _update(target, mask, delta, scale, out, same=False)
    return out


def masked_update_(target: Tensor, mask: Tensor, delta: Tensor, scale: float) -> None:
    """Launch :func:`taskloom.masked_update_`."""
    if written_in_place(target, mask, delta):
        _update(target, mask, delta, scale, target, same=True)
    else:
        target.copy_(masked_update(target, mask, delta, scale))
