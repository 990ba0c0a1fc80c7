"""What one call of each op costs on tensors of a few entries, and what it is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import call_rows_gating_experts
import call_rows_gating_features
import call_rows_gating_multi
import call_rows_gating_topk
import call_rows_lowrank
import call_rows_prefix
import call_rows_window_norms
import call_rows_windows
import taskloom
from taskloom.ops.lowrank import kernel_linear_backward, kernel_merge_backward
from taskloom.ops.masked import block_scale_merge_backward
from taskloom.ops.masked.weighted_ce import weighted_ce_backward

ENTRIES = 8
PLAIN_LIMIT, BARE_LIMIT = 2.0, 1.2

Call = Callable[[], Any]


@dataclass(frozen=True)
class CallRow:
    """One op's call beside its peer's.

    Attributes
    ----------
    op, use
        The op, and how it is called.
    ours
        Calls the public wrapper.
    peer, peer_name
        A plain op of torch, or a minimal op with the same arguments registered with torch.library and register_autograd.
    limit
        How many times the peer's time a call may take.
    native
        Calls the native op without its wrapper; None where the call is Python around several ops.
    """

    op: str
    use: str
    ours: Call
    peer: Call
    peer_name: str
    limit: float
    native: Call | None


_bare = torch.library.Library("taskloom_bare", "DEF")


def _bare_op(name: str, kernel: Callable[..., Any]) -> Any:
    """An op with the arguments of one of ours, whose kernel and autograd formula do nothing: what registering alone costs."""
    _bare.define(str(getattr(torch.ops.taskloom, name).default._schema).removeprefix("taskloom::"))
    _bare.impl(name, kernel, "CPU")
    torch.library.register_autograd(
        f"taskloom_bare::{name}", lambda ctx, *gradients: None, setup_context=lambda ctx, inputs, output, **named: None
    )
    return getattr(torch.ops.taskloom_bare, name).default


def _bare_ops() -> dict[str, Any]:
    def one(first: Tensor, *others: Any, **named: Any) -> Tensor:
        return torch.empty_like(first)

    def of_list(first: Sequence[Tensor], *others: Any) -> list[Tensor]:
        return [torch.empty_like(tensor) for tensor in first]

    def one_of_list(first: Sequence[Tensor], *others: Any) -> Tensor:
        return torch.empty_like(first[0])

    def two(first: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(first), torch.empty_like(first)

    def three(first: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(first), torch.empty_like(first), torch.empty_like(first)

    def four(first: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.empty_like(first), torch.empty_like(first), torch.empty_like(first), torch.empty_like(first)

    def pair(first: Sequence[Tensor], *others: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(first[0]), torch.empty_like(first[0])

    def several(count: int) -> Callable[..., tuple[Tensor, ...]]:
        return lambda first, *others: tuple(torch.empty_like(first) for _ in range(count))

    kernels: dict[str, Callable[..., Any]] = {
        "kernel_merge": several(3),
        "kernel_linear": several(3),
        "kernel_quantile": one,
        "kernel_merge_backward": four,
        "kernel_linear_backward": several(6),
        "masked_update": one,
        "masked_compress": one,
        "masked_restore": one,
        "multi_task_vector": one,
        "block_scale_merge": of_list,
        "block_scale_merge_backward": one_of_list,
        "magnitude_threshold": pair,
        "sparse_merge": one,
        "weighted_ce": four,
        "weighted_ce_backward": two,
        "rmm_fit": three,
        "rmm_reconstruct": one,
        "rmm_linear": one,
    }
    return {name: _bare_op(name, kernel) for name, kernel in kernels.items()}


def _plain_rows() -> list[CallRow]:
    ops = torch.ops.taskloom
    values, other = torch.randn(ENTRIES), torch.randn(ENTRIES)
    target, base, out = torch.randn(ENTRIES), torch.randn(ENTRIES), torch.empty(ENTRIES)
    mask = torch.rand(ENTRIES) < 0.5
    packed, second = taskloom.pack_mask(mask), taskloom.pack_mask(~mask)
    count = int(mask.sum())
    moments = [torch.zeros(count), torch.zeros(count)]
    dense = [torch.zeros(ENTRIES), torch.zeros(ENTRIES), torch.tensor(1.0)]
    adamw: dict[str, Any] = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "weight_decay": 0.0,
        "eps": 1e-8,
        "amsgrad": False,
        "maximize": False,
    }
    sgd: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.9, "lr": 1e-3, "dampening": 0.0, "nesterov": False, "maximize": False}
    sgd["is_first_step"] = False

    def row(op: str, ours: Call, peer: Call, peer_name: str, native: Call | None, use: str = "") -> CallRow:
        return CallRow(op, use, ours, peer, peer_name, PLAIN_LIMIT, native)

    return [
        row("pack_mask", lambda: taskloom.pack_mask(mask), lambda: torch.neg(values), "neg", lambda: ops.pack_mask.default(mask)),
        row(
            "unpack_mask",
            lambda: taskloom.unpack_mask(packed, (ENTRIES,)),
            lambda: values.new_empty((ENTRIES,)),
            "new_empty",
            lambda: ops.unpack_mask.default(packed, (ENTRIES,)),
        ),
        row(
            "masked_update_",
            lambda: taskloom.masked_update_(target, packed, other, 0.5),
            lambda: target.addcmul_(values, other, value=0.5),
            "addcmul_",
            lambda: ops.masked_update_.default(target, packed, other, 0.5),
        ),
        row(
            "masked_switch_",
            lambda: taskloom.masked_switch_(target, base, other, packed, second),
            lambda: torch.where(mask, base, other, out=out),
            "where, out=",
            lambda: ops.masked_switch_.default(target, base, other, packed, second),
        ),
        row(
            "mask_count",
            lambda: taskloom.mask_count([packed, second], ENTRIES, 1),
            lambda: torch._foreach_neg([values, other]),
            "_foreach_neg of 2",
            lambda: ops.mask_count.default([packed, second], ENTRIES, 1),
        ),
        row(
            "task_mask",
            lambda: taskloom.task_mask(base, values, other),
            lambda: torch.addcmul(base, values, other),
            "addcmul",
            lambda: ops.task_mask.default(base, values, other, 0.4),
        ),
        row(
            "magnitude_mask",
            lambda: taskloom.magnitude_mask(values, base, rank=3),
            lambda: torch.topk(values, 3),
            "topk",
            lambda: ops.magnitude_mask.default(values, base, 0, 3, False, None, None, False),
        ),
        row(
            "magnitude_histogram",
            lambda: taskloom.magnitude_histogram(values, base, shift=16),
            lambda: torch.zeros(1 << 16, dtype=torch.int64),
            "zeros(65536)",
            lambda: ops.magnitude_histogram.default(values, base, 16, 0, False),
        ),
        row(
            "masked_adamw_",
            lambda: taskloom.masked_adamw_(target, other, *moments, packed, 1, weight_decay=0.0),
            lambda: torch._fused_adamw_([base], [other], [dense[0]], [dense[1]], [], [dense[2]], **adamw),
            "_fused_adamw_",
            lambda: ops.masked_adamw_.default(
                [target], [other], [moments[0]], [moments[1]], [packed], [1.0], 1e-3, 0.9, 0.999, 1e-8, 0.0, False
            ),
        ),
        row(
            "masked_sgd_",
            lambda: taskloom.masked_sgd_(target, other, moments[0], packed, 2, momentum=0.9),
            lambda: torch._fused_sgd_([base], [other], [dense[0]], **sgd),
            "_fused_sgd_",
            lambda: ops.masked_sgd_.default([target], [other], [moments[0]], [packed], [2.0], 1e-3, 0.9, 0.0, 0.0, False, False),
        ),
        row(
            "sparse_merge_out",
            lambda: taskloom.sparse_merge(base, [values, other], 0.5, out=out),
            lambda: torch._foreach_add_([target, out], [values, other], alpha=0.5),
            "_foreach_add_ of 2",
            None,
        ),
        row(
            "sparse_merge_statistics_out",
            lambda: taskloom.sparse_merge(base, [values, other], 0.5, out=out, statistics=True),
            lambda: torch._foreach_add_([target, out], [values, other], alpha=0.5),
            "_foreach_add_ of 2",
            None,
        ),
    ]


def _differentiable_rows(tracked: bool) -> list[CallRow]:
    ops, bare = torch.ops.taskloom, _BARE
    values, other, base = (torch.randn(ENTRIES, requires_grad=tracked) for _ in range(3))
    mask = torch.rand(ENTRIES) < 0.5
    packed = taskloom.pack_mask(mask)
    compressed = torch.randn(int(mask.sum()), requires_grad=tracked)
    coef = torch.randn(2, 1, 1, requires_grad=tracked)

    use = "gradient recorded" if tracked else ""

    def row(op: str, ours: Call, *arguments: Any, **named: Any) -> CallRow:
        native, minimal = getattr(ops, op).default, bare[op]
        return CallRow(
            op, use, ours, partial(minimal, *arguments, **named), "bare registered op", BARE_LIMIT, partial(native, *arguments, **named)
        )

    pair, half = [values, other], [0.5, 0.5]
    hidden, head = (torch.randn(2, 4, requires_grad=tracked) for _ in range(2))
    targets, weights, log_sum_exp = torch.tensor([0, 1]), torch.ones(2), torch.ones(2)
    slope: tuple[Any, ...] = (hidden.detach(), head.detach(), targets, weights, log_sum_exp)
    settings: tuple[Any, ...] = ("all", False, [], [], None, None, [], [], [], 0, 0, "none", "none", 1, "none", 0, [], "sum", 1.0)
    kernel_rows = _kernel_rows(row, tracked)
    return [
        *kernel_rows,
        row("masked_update", lambda: taskloom.masked_update(base, packed, values, 0.5), base, packed, values, 0.5),
        row("masked_compress", lambda: taskloom.masked_compress(values, packed), values, packed),
        row("masked_restore", lambda: taskloom.masked_restore(compressed, packed, base), compressed, packed, base),
        row("multi_task_vector", lambda: taskloom.multi_task_vector(base, pair, 0.5), base, pair, half),
        row("block_scale_merge", lambda: taskloom.block_scale_merge([base], [[values], [other]], coef), [base], pair, coef, []),
        row("block_scale_merge_backward", lambda: block_scale_merge_backward([base], [[values], [other]]), [base], pair, [], 1),
        row("magnitude_threshold", lambda: taskloom.magnitude_threshold(values, base, rank=3), [values], [base], [3], False),
        row("sparse_merge", lambda: taskloom.sparse_merge(base, pair, 0.5), base, pair, half, *settings, dtype=torch.float32),
        # The wrapper gives the loss alone, the op also what its backward needs.
        replace(
            row("weighted_ce", lambda: taskloom.weighted_ce(hidden, head, targets, weights), hidden, head, targets, weights), native=None
        ),
        row("weighted_ce_backward", lambda: weighted_ce_backward(*slope), *slope, True, True),
        *_rmm_rows(row, tracked),
    ]


def _rmm_rows(row: Callable[..., CallRow], tracked: bool) -> list[CallRow]:
    vectors = torch.randn(3, 2, 2, requires_grad=tracked)
    mean, basis, coefficients = torch.randn(2, 2), torch.randn(2, 1, 2), torch.randn(3, 2, 1)
    x, task, parts = torch.randn(2, 2, requires_grad=tracked), torch.tensor([0, 2]), (mean, basis, coefficients)
    own = (mean.clone().requires_grad_(tracked), basis, coefficients[0])
    return [
        row("rmm_fit", lambda: taskloom.rmm_fit(vectors, 1), vectors, 1, True),
        row("rmm_reconstruct", lambda: taskloom.rmm_reconstruct(*own), *own),
        row("rmm_linear", lambda: taskloom.rmm_linear(x, task, *parts, *parts), x, task, *parts, *parts),
    ]


def _kernel_rows(row: Callable[..., CallRow], tracked: bool) -> list[CallRow]:
    """The kernel merges; their wrappers give one result of several."""
    factors = (torch.randn(1, 3, 2, requires_grad=tracked), torch.randn(1, 4, 2, requires_grad=tracked), torch.ones(1))
    fixed = tuple(one.detach() for one in factors)
    x, weight, none = torch.randn(2, 3), torch.randn(4, 3), (None, None, None)
    found = (torch.zeros(()), torch.empty(0))
    named = {"kernel": "pwl", "sparsity": 0.5}
    merge = (*factors, *none, None, "pwl", 0.5, "magnitude")
    linear = (x, *factors, *none, None, None, "pwl", 0.5, "magnitude")
    slope = (weight, *fixed, *none, *found, "pwl", "magnitude")
    slopes = (x @ weight.T, x, *fixed, *none, None, *found, "pwl", "magnitude", True, True, True)
    rows = [
        row("kernel_merge", lambda: taskloom.kernel_merge(*factors, **named), *merge),
        row("kernel_linear", lambda: taskloom.kernel_linear(x, *factors, **named), *linear),
        row("kernel_quantile", lambda: taskloom.kernel_quantile(*fixed, **named), *fixed, *none, "pwl", 0.5, "magnitude"),
        row("kernel_merge_backward", lambda: kernel_merge_backward(weight, *fixed, *found, kernel="pwl"), *slope),
        row("kernel_linear_backward", lambda: kernel_linear_backward(x @ weight.T, x, *fixed, *found, kernel="pwl"), *slopes),
    ]
    return [replace(one, native=None) for one in rows]


_BARE = _bare_ops()


def rows() -> list[CallRow]:
    """Every op: the plain ones, then the differentiable ones without and with a gradient that is recorded."""
    families = [
        CallRow(op, "", ours, peer, name, family.LIMIT, native)
        for family in (
            call_rows_lowrank,
            call_rows_windows,
            call_rows_window_norms,
            call_rows_prefix,
            call_rows_gating_topk,
            call_rows_gating_experts,
            call_rows_gating_multi,
            call_rows_gating_features,
        )
        for op, ours, peer, name, native in family.calls()
    ]
    return [*_plain_rows(), *_differentiable_rows(False), *_differentiable_rows(True), *families]
