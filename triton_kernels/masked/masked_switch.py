"""masked_switch_."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import entries_per_program, flat, launch, programs, raw
from taskloom.triton_kernels.masked.entries import load_bits, load_entries, narrowed, program_offsets


@triton.jit
def masked_switch_kernel(target, base, delta, old_packed, new_packed, numel, COPIES: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Where the masks differ: base + delta if the new one is set, else base (its bits, if COPIES: base has target's dtype)."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    wanted = load_bits(new_packed, offsets, inside)
    changed = load_bits(old_packed, offsets, inside) != wanted
    origin = load_entries(base, offsets, changed, WIDE)
    moved = narrowed(origin + load_entries(delta, offsets, changed & wanted, WIDE), target)
    restored = tl.load(base + offsets, mask=changed, other=0) if COPIES else narrowed(origin, target)
    tl.store(target + offsets, tl.where(wanted, moved, restored), mask=changed)


def masked_switch_(target: Tensor, base: Tensor, delta: Tensor, old_packed: Tensor, new_packed: Tensor) -> None:
    """Launch :func:`taskloom.masked_switch_`."""
    dtype = accumulation_dtype(target, base, delta)
    numel = target.numel()
    changed = target.contiguous()
    block = entries_per_program(numel)
    constants = {"COPIES": base.dtype == target.dtype, "WIDE": dtype == torch.float64, "BLOCK": block}
    arguments = (raw(changed), flat(base), flat(delta), flat(old_packed), flat(new_packed), numel)
    launch(masked_switch_kernel, (programs(numel, block),), *arguments, **constants)
    if changed is not target:
        target.copy_(changed)
