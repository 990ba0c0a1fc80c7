"""Moves arguments to a GPU as they are, and compares what comes back with the CPU's results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import taskloom

_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


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
    obstacle = taskloom.explain(op, device="cuda").obstacles[backend]  # type: ignore[index]
    if obstacle is not None:
        pytest.skip(f"{op}: {obstacle}")


def require_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes:g} GiB of GPU memory, {free / 2**30:.1f} are free")


def ulps_apart(got: Tensor, expected: Tensor) -> int:
    """The largest distance of two tensors, counted in values of their dtype that lie between; both zeros are one value."""
    integer = _INTEGERS[got.dtype]
    lowest = torch.iinfo(integer).min

    def ordered(values: Tensor) -> Tensor:
        bits = values.contiguous().view(integer).long()
        return torch.where(bits < 0, lowest - bits, bits)

    return int((ordered(got) - ordered(expected)).abs().max()) if got.numel() else 0


def assert_within_an_ulp(got: Tensor, expected: Tensor) -> None:
    """Discrete values to the bit; others within one unit in the last place of their dtype, NaN and infinities in the same places."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if not got.is_floating_point():
        assert torch.equal(got, expected)
        return
    finite = expected.isfinite()
    assert torch.equal(got[~finite].nan_to_num(1.5, 2.5, -2.5), expected[~finite].nan_to_num(1.5, 2.5, -2.5))
    assert bool(got[finite].isfinite().all())
    assert ulps_apart(got[finite], expected[finite]) <= 1
