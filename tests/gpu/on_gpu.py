"""Moves arguments to a GPU as they are, and compares what comes back with the CPU's results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import taskloom


def to_device(values: Any, device: str = "cuda") -> Any:
    """The same structure on a device, strides and storage offsets kept."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.detach().untyped_storage().to(device=device)
        moved = torch.empty(0, dtype=value.dtype, device=device).set_(storage, value.storage_offset(), value.shape, value.stride())
        return moved.requires_grad_(value.requires_grad)

    return pytree.tree_map(move, values)


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def require(op: str, backend: str) -> None:
    """Skip where a backend has no kernel of an op on this GPU, with its reason."""
    obstacle = dict(taskloom.explain(op, device="cuda").obstacles)[backend]
    if obstacle is not None:
        pytest.skip(f"{op}: {obstacle}")


def require_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes:g} GiB of GPU memory, {free / 2**30:.1f} are free")
