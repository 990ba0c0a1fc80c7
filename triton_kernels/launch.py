"""How kernels are launched: device, sizes of programs, compiler options, tables of pointers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

# Read by Triton when a kernel is decorated, so it cannot change afterwards.
INTERPRETED: bool = triton.knobs.runtime.interpret

_ALIGNMENT = 16


def programs(numel: int, block: int) -> int:
    """Programs of ``block`` entries that cover ``numel``."""
    return triton.cdiv(numel, block)


def entries_per_program(numel: int, on_gpu: int = 1024) -> int:
    """Entries that one program takes, a power of two.

    The interpreter takes milliseconds for a program of any size: there, a few large programs share the work.
    """
    if not INTERPRETED:
        return on_gpu
    return min(max(512, triton.next_power_of_2(triton.cdiv(numel, 8))), 1 << 17)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor; products are rounded before they are added."""
    if 0 in grid:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    # A contraction would round a product and a sum once where the definition rounds twice.
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    if device.type == "cpu":
        if not INTERPRETED:
            raise RuntimeError("Triton kernels run on the CPU only in Triton's interpreter: set TRITON_INTERPRET=1 before it is imported")
        kernel[grid](*arguments, **constants, **options)
    else:
        with torch.get_device_module(device).device(device):
            kernel[grid](*arguments, **constants, **options)


def raw(tensor: Tensor) -> Tensor:
    """The tensor as kernels take it: bfloat16 as the bits of int16, bool as bytes.

    Kernels convert bfloat16 by its bits, because the interpreter and some compilers truncate where it should be rounded.
    """
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16)
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def flat(tensor: Tensor) -> Tensor:
    """The tensor's entries next to each other, as kernels take them; a copy where they are not."""
    return raw(tensor.contiguous())


def of_one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, contiguous, in one dtype: their own, or the widest arithmetic of them, which holds every value exactly."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return [flat(tensor) for tensor in tensors]
    common = torch.float64 if torch.float64 in dtypes else torch.float32
    return [flat(tensor.to(common)) for tensor in tensors]


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor starts at a multiple of 16 bytes, so that loads through a table may be wide."""
    return all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors)


def table(rows: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A table of 64-bit words (addresses, keys) on a device; the host does not wait for a GPU to have it."""
    words = torch.tensor(rows, dtype=torch.int64)
    return words.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words.to(device)


def written_in_place(target: Tensor, *others: Tensor) -> bool:
    """Whether kernels may write to ``target`` entry by entry: its entries lie in order, and no other tensor shifts against them."""
    if not target.is_contiguous():
        return False
    begin, end = target.data_ptr(), target.data_ptr() + target.numel() * target.element_size()
    for other in others:
        same = other.data_ptr() == begin and other.dtype == target.dtype and other.is_contiguous()
        if same or other.numel() == 0:
            continue
        last = sum((size - 1) * stride for size, stride in zip(other.shape, other.stride(), strict=True))
        if other.data_ptr() < end and begin < other.data_ptr() + (last + 1) * other.element_size():
            return False
    return True
