"""Opens the device that a merge was asked to run on, or says why it cannot."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from taskloom.merge.errors import MergeError, shown

if TYPE_CHECKING:
    from taskloom.merge.device.accelerator import Accelerator

_NAME = re.compile(r"cuda(:(0|[1-9][0-9]{0,3}))?")
# What a merge calls: without kernels for one of them it would run in plain torch, slowly and beyond the memory that was planned.
_OPS = ("sparse_merge_statistics_out", "magnitude_histogram")


def named_device(name: str | None) -> str | None:
    """``cuda`` or ``cuda:N``; None for the CPU.

    Raises
    ------
    MergeError
        If there is no device of that name.
    """
    if name is None or name == "cpu":
        return None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise MergeError(f"device: expected cpu, cuda or cuda:N, got {shown(name)}")
    return name


def check_device_options(device: str | None, max_vram: object, max_ram: object) -> None:
    """Refuse ceilings that have no meaning with a device, or without one."""
    if device is None and max_vram is not None:
        raise MergeError("max_vram: has no meaning without a device (device='cuda', --device cuda)")
    if device is not None and max_ram is not None:
        raise MergeError(
            f"max_ram: cannot be kept to on device {device}: what torch and the GPU's driver take of the host's memory is not known before"
        )


def _build_obstacle() -> str | None:
    """Why this torch cannot use any CUDA device; None where it can."""
    import torch

    if torch.version.cuda is None:
        other = f"built for ROCm {torch.version.hip}, not for CUDA" if torch.version.hip else "a CPU-only build"
        return f"torch {torch.__version__} is {other}"
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
        reason = "no device is visible"
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU: {reason}"


def device_obstacle(name: str) -> str | None:
    """Why a merge cannot run on ``cuda`` or ``cuda:N``; None where it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    obstacle = _build_obstacle()
    if obstacle is not None:
        return obstacle
    count = torch.cuda.device_count()
    # torch keeps 8 bits of an index, and takes 256 for 0.
    if int(name.partition(":")[2] or 0) >= count:
        return f"torch sees {count} GPU{'s' if count > 1 else ''}, cuda:0 to cuda:{count - 1}"
    import taskloom

    for op in _OPS:
        found = taskloom.explain(op, device=name)
        if found.chosen not in ("native", "triton"):
            reasons = "; ".join(f"{backend}: {reason}" for backend, reason in found.obstacles.items() if reason is not None)
            return f"there is no kernel of {op} for it ({reasons or f'backend {found.requested!r} was asked for'})"
    return None


def open_device(name: str) -> Accelerator:
    """The device, ready for work.

    Raises
    ------
    MergeError
        If it cannot be used; the message says why.
    """
    # A GPU that is busy, full or broken shows only when it is first used.
    try:
        obstacle = device_obstacle(name)
        if obstacle is None:
            import torch

            from taskloom.merge.device.accelerator import CudaAccelerator

            device = torch.device(name)
            return CudaAccelerator(torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)
    except RuntimeError as error:
        obstacle = str(error).splitlines()[0]
    raise MergeError(f"device {name}: {obstacle}")
