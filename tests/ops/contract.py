"""What the contract tests need to know of an op: sample inputs, and how near its backends must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# Sums of many products, which a GPU, or a program of one, adds up in another order than the CPU, or by fused multiply-adds.
REORDERED_SUMS = frozenset(
    {
        "batch_norm_silu",
        "batch_norm_silu_backward",
        "block_scale_merge_backward",
        "channel_scale",
        "channel_scale_backward",
        "expert_combine_backward",
        "kernel_linear",
        "kernel_linear_backward",
        "kernel_merge",
        "kernel_merge_backward",
        "kernel_merge_out",
        "lora_feature_gate",
        "lora_feature_gate_backward",
        "lowrank_apply",
        "lowrank_apply_backward",
        "lowrank_merge",
        "lowrank_merge_",
        "lowrank_merge_backward",
        "lowrank_merge_tasks",
        "lowrank_norm",
        "multi_gate_combine",
        "multi_gate_combine_backward",
        "manifold_loss",
        "prefix_conv2d",
        "prefix_conv2d_backward",
        "prefix_linear",
        "prefix_linear_backward",
        "prefix_norm",
        "prefix_norm_backward",
        "ragged_prefix_conv2d",
        "ragged_prefix_conv2d_backward",
        "rmm_fit",
        "rmm_linear",
        "stream_softmax_mix",
        "stream_softmax_mix_backward",
        "topk_gate",
        "topk_gate_backward",
        "weighted_ce",
        "weighted_ce_backward",
        "window_conv2d",
        "window_conv2d_backward",
        "window_group_norm_silu",
        "window_group_norm_silu_backward",
        "window_layer_norm",
        "window_layer_norm_backward",
        "window_linear",
        "window_linear_backward",
    }
)
# The same of single results of an op's wrapper, by place.
REORDERED_RESULTS = frozenset({("sparse_merge_statistics_out", 3)})
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    """One call of a public wrapper. Arguments are made by the case's function each time, so that a test may change them."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contract:
    """One op: its public wrapper, its cases, and which arguments (by position) an in-place op changes.

    ``single`` is the relative error allowed of float32 where sums that cancel leave less than the usual; ``torch_products`` says that
    torch's matrix product is a part of the op, whose last bits depend on the number of threads.
    """

    op: str
    wrapper: Callable[..., Any]
    cases: Callable[[], Iterator[Case]]
    mutates: tuple[int, ...] = ()
    single: float = 1e-6
    torch_products: bool = False

    def run(self, case: Case) -> list[Tensor]:
        """Call the wrapper on copies; every tensor it returned, and every argument that it changed."""
        args, kwargs = copied((case.args, dict(case.kwargs)))
        result = self.wrapper(*args, **kwargs)
        return [leaf for leaf in pytree.tree_leaves((result, [args[place] for place in self.mutates])) if isinstance(leaf, Tensor)]


def copied(values: Any) -> Any:
    """The same structure with copies of its tensors, strides and storage offsets kept."""

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage().clone()
        fresh = torch.empty(0, dtype=value.dtype).set_(storage, value.storage_offset(), value.shape, value.stride())
        return fresh.requires_grad_(value.requires_grad)

    return pytree.tree_map(copy, values)


class Recorder(TorchDispatchMode):
    """Notes every call of an op of our namespaces with copies of its arguments."""

    def __init__(self, namespaces: tuple[str, ...] = ("taskloom",)) -> None:
        super().__init__()
        self.namespaces = namespaces
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace in self.namespaces:
            self.calls.append((func, copied(args), copied(kwargs or {})))
        return func(*args, **(kwargs or {}))


def assert_close(got: Tensor, expected: Tensor, single: float = 1e-6) -> None:
    """Equal shapes and dtypes; discrete values, NaN and infinities in the same places; else a small relative Frobenius error."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if not got.is_floating_point():
        assert torch.equal(got, expected)
        return
    finite = expected.isfinite()
    assert torch.equal(got[~finite].nan_to_num(1.5), expected[~finite].nan_to_num(1.5))
    got64, expected64 = got[finite].double(), expected[finite].double()
    error, size = torch.linalg.vector_norm(got64 - expected64), torch.linalg.vector_norm(expected64)
    allowed = single if got.dtype == torch.float32 else TOLERANCES[got.dtype]
    assert error <= allowed * size, f"relative error {error / size}"


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert got.contiguous().view(-1).view(torch.uint8).equal(expected.contiguous().view(-1).view(torch.uint8))


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
