"""A sum of deltas with one coefficient per task and block, or group of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from taskloom.ops._backends import active_transform, choose, kernel, kernels
from taskloom.ops._checks import FLOATING, check_dtype, check_floating, check_shape
from taskloom.ops._register import register
from taskloom.reference import masked as reference

_GROUPS = 256


def _listed(op: str, name: str, values: Tensor | Sequence[Tensor], blocks: int, single: bool) -> list[Tensor]:
    """The blocks of one argument, as many as base has."""
    if isinstance(values, Tensor):
        if not single:
            raise ValueError(f"{op}: {name}: expected a sequence of {blocks} blocks as base, got a tensor")
        return [values]
    listed = list(values)
    if len(listed) != blocks:
        raise ValueError(f"{op}: {name}: expected {blocks} blocks as base, got {len(listed)}")
    return listed


def _check_blocks(op: str, name: str, blocks: list[Tensor], base: list[Tensor]) -> None:
    for place, (block, like) in enumerate(zip(blocks, base, strict=True)):
        # A model has thousands of blocks: their names are made only for an error.
        if isinstance(block, Tensor) and block.dtype in FLOATING and block.shape == like.shape:
            continue
        check_floating(op, f"{name}[{place}]", block)
        check_shape(op, f"{name}[{place}]", block, like.shape, f"base[{place}]")


def _listed_tasks(op: str, deltas: Sequence[Tensor | Sequence[Tensor]], base: list[Tensor], single: bool) -> list[list[Tensor]]:
    """The checked blocks of each task."""
    tasks = []
    for t, task in enumerate(deltas):
        name = f"deltas[{t}]"
        blocks = _listed(op, name, task, len(base), single)
        _check_blocks(op, name, blocks, base)
        tasks.append(blocks)
    if not tasks:
        raise ValueError(f"{op}: deltas: expected at least one task, got none")
    return tasks


def _check_partition(op: str, partition: list[Tensor], like: list[Tensor]) -> None:
    for place, (part, block) in enumerate(zip(partition, like, strict=True)):
        check_dtype(op, f"partition[{place}]", part, torch.uint8)
        check_shape(op, f"partition[{place}]", part, block.shape, f"block {place}")


def _check_groups(op: str, partition: list[Tensor], groups: int) -> None:
    for place, part in enumerate(partition):
        largest = int(part.max()) if part.numel() else 0
        if largest >= groups:
            raise ValueError(f"{op}: partition[{place}]: expected values below {groups}, the number of groups, got {largest}") from None


def _expanded_coef(op: str, coef: Tensor, tasks: int, blocks: int, partitioned: bool) -> Tensor:
    """The coefficients as [T, m, K]."""
    if not isinstance(coef, Tensor):
        raise TypeError(f"{op}: coef: expected a tensor, got {type(coef).__name__}")
    if coef.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: coef: expected float32 or float64, got {coef.dtype}")
    full = coef[:, None, None] if coef.dim() == 1 and blocks == 1 else coef[:, :, None] if coef.dim() == 2 else coef
    groups = full.shape[2] if full.dim() == 3 else 0
    fits = full.dim() == 3 and full.shape[:2] == (tasks, blocks) and 1 <= groups <= (_GROUPS if partitioned else 1)
    if not fits:
        wanted = f"[{tasks}, {blocks}] or [{tasks}, {blocks}, K], 1 <= K <= {_GROUPS if partitioned else '1 without a partition'}"
        raise ValueError(f"{op}: coef: expected shape {wanted}, got {tuple(coef.shape)}")
    return full


def _run(op: str, partition: list[Tensor], groups: int, native: Callable[[], Any]) -> Any:
    try:
        return native()
    except RuntimeError:
        # The kernel looks at the partition's values anyway; looking here first would read it twice.
        _check_groups(op, partition, groups)
        raise


class _OfCoefficients(torch.autograd.Function):
    """A merge of blocks and deltas that are constants. What is registered for the op takes microseconds for each of them."""

    @staticmethod
    def forward(
        ctx: Any, coef: Tensor, run: Callable[..., list[Tensor]], ops: Any, blocks: list[Tensor], deltas: list[Tensor], parts: list[Tensor]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*deltas, *parts)
        ctx.ops, ctx.deltas, ctx.groups, ctx.dtype = ops, len(deltas), coef.shape[2], coef.dtype
        return tuple(run(blocks, deltas, coef, parts))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        products = ctx.ops.block_scale_merge_backward.default(
            list(gradients), list(saved[: ctx.deltas]), list(saved[ctx.deltas :]), ctx.groups
        )
        return products.to(ctx.dtype), None, None, None, None, None


def _only_coefficients(coef: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether a gradient is wanted for the coefficients and for nothing else, and by plain autograd."""
    wanted = coef.requires_grad and torch.is_grad_enabled() and not is_compiling() and active_transform() is None
    return wanted and not any(tensor.requires_grad for tensor in others)


def block_scale_merge(
    base: Tensor | Sequence[Tensor],
    deltas: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    coef: Tensor,
    partition: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Add deltas to base weights, with one coefficient per task and block, or per task and group of a block.

    Block b of the result is ``base[b] + sum_t coef[t, b] * deltas[t][b]``; with a partition, entry j takes ``coef[t, b, p[j]]``.

    Parameters
    ----------
    base
        A tensor, or a sequence of m tensors (blocks) of any shapes; float32, bfloat16, float16 or float64.
    deltas
        T task vectors, T >= 1, each like base: a tensor, or m tensors of the blocks' shapes; any of these dtypes.
    coef
        float32 or float64 of shape ``[T, m]``, with a partition ``[T, m, K]``, 1 <= K <= 256; for a single tensor also ``[T]``.
    partition
        uint8 like base: each entry's group, below K. Default None: a block is one group.

    Returns
    -------
    Tensor or list of Tensor
        As base, contiguous, in base's dtypes. The sum starts at 0, takes the tasks in order, each product rounded before its add, and is
        added to base last; a block is computed in float32, or in float64 where ``coef`` or one of its tensors is float64, and rounded
        once. A coefficient of 0 still multiplies its delta, so a delta that is not finite shows.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If there is no task or no block, shapes do not fit, or the partition has a value that is no group (in compiled code: RuntimeError;
        in the native CUDA kernels: an assertion on the device, for which nobody waits).

    Notes
    -----
    Source: aTLAS, Zhang et al., NeurIPS 2024, arXiv 2407.02880, section 3; the groups are its aTLAS x K.

    Differentiable any number of times with respect to ``base`` (the output's gradient), ``deltas`` (coefficient times the output's
    gradient) and ``coef``: :func:`block_scale_merge_backward`, which is bitwise the same for any number of threads.
    """
    op = "block_scale_merge"
    single = isinstance(base, Tensor)
    blocks = [base] if isinstance(base, Tensor) else list(base)
    if not blocks:
        raise ValueError(f"{op}: base: expected at least one block, got none")
    for place, block in enumerate(blocks):
        if not (isinstance(block, Tensor) and block.dtype in FLOATING):
            check_floating(op, f"base[{place}]", block)
    tasks = _listed_tasks(op, deltas, blocks, single)
    parts: list[Tensor] = [] if partition is None else _listed(op, "partition", partition, len(blocks), single)
    if parts:
        _check_partition(op, parts, blocks)
    full = _expanded_coef(op, coef, len(tasks), len(blocks), bool(parts))
    flat = list(chain.from_iterable(tasks))
    constants = _only_coefficients(full, chain(blocks, flat))
    coefficients = full.detach() if constants else full
    run = kernel(op, *blocks, *flat, coefficients, *parts)
    if run is None:
        if active_transform() is None:
            _check_groups(op, parts, full.shape[2])
        merged = reference.block_scale_merge(blocks, tasks, full, parts)
    elif constants:
        ops, function = kernels(choose(op, full)), cast(Any, _OfCoefficients)
        merged = list(_run(op, parts, full.shape[2], lambda: function.apply(full, run, ops, blocks, flat, parts)))
    else:
        merged = _run(op, parts, full.shape[2], lambda: run(blocks, flat, full, parts))
    return merged[0] if single else merged


def block_scale_merge_backward(
    gradients: Sequence[Tensor], deltas: Sequence[Sequence[Tensor]], partition: Sequence[Tensor] = (), groups: int = 1
) -> Tensor:
    """The gradients of :func:`block_scale_merge`'s coefficients.

    Parameters
    ----------
    gradients
        Those of the m blocks of the result; float32, bfloat16, float16 or float64.
    deltas
        T task vectors of m blocks each, of the gradients' shapes.
    partition
        None (an empty sequence), or m uint8 tensors of the gradients' shapes. Default: none.
    groups
        K, 1 to 256. Default 1.

    Returns
    -------
    Tensor
        float64 of shape ``[T, m, K]``: the inner products of ``gradients[b]`` and ``deltas[t][b]`` over each group, summed in float64 in a
        fixed order, so that they are bitwise the same for any number of threads.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If there is no task or no block, shapes do not fit, or the partition has a value that is no group (in compiled code: RuntimeError;
        in the native CUDA kernels: an assertion on the device, for which nobody waits).

    Notes
    -----
    Source: this library. Differentiable any number of times with respect to ``gradients`` and ``deltas``.
    """
    op = "block_scale_merge_backward"
    blocks, parts = list(gradients), list(partition)
    if not blocks:
        raise ValueError(f"{op}: gradients: expected at least one block, got none")
    for place, block in enumerate(blocks):
        check_floating(op, f"gradients[{place}]", block)
    tasks = _listed_tasks(op, deltas, blocks, single=False)
    if parts:
        _check_partition(op, _listed(op, "partition", parts, len(blocks), single=False), blocks)
    if not 1 <= groups <= (_GROUPS if parts else 1):
        raise ValueError(f"{op}: groups: expected 1 to {_GROUPS}, and 1 without a partition, got {groups}")
    flat = list(chain.from_iterable(tasks))
    run = kernel(op, *blocks, *flat, *parts)
    if run is None:
        if active_transform() is None:
            _check_groups(op, parts, groups)
        return reference.block_scale_merge_backward(blocks, tasks, parts, groups)
    products: Tensor = _run(op, parts, groups, lambda: run(blocks, flat, parts, groups))
    return products


def _fake_block_scale_merge(base: Sequence[Tensor], deltas: Sequence[Tensor], coef: Tensor, partition: Sequence[Tensor]) -> list[Tensor]:
    return [block.new_empty(block.shape) for block in base]


def _fake_block_scale_merge_backward(
    gradients: Sequence[Tensor], deltas: Sequence[Tensor], partition: Sequence[Tensor], groups: int
) -> Tensor:
    return gradients[0].new_empty((len(deltas) // len(gradients), len(gradients), groups), dtype=torch.float64)


def _scaled(ctx: Any, like: Sequence[Tensor], terms: Sequence[Tensor], coef: Tensor, partition: Sequence[Tensor]) -> list[Tensor]:
    """The weighted sum of terms alone, in the dtypes of ``like``."""
    zeros = [torch.zeros_like(one, memory_format=torch.contiguous_format) for one in like]
    scaled: list[Tensor] = ctx.ops.block_scale_merge.default(zeros, list(terms), coef, list(partition))
    return scaled


def _for_deltas(
    ctx: Any, gradients: Sequence[Tensor], deltas: Sequence[Tensor], coef: Tensor, partition: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Coefficient times gradient, for each delta of the tasks that need it."""
    blocks = len(gradients)
    result: list[Tensor | None] = []
    for task in range(len(deltas) // blocks):
        places = slice(task * blocks, (task + 1) * blocks)
        if any(needed[places]):
            scaled = _scaled(ctx, deltas[places], gradients, coef[task : task + 1], partition)
            result += [one if wanted else None for one, wanted in zip(scaled, needed[places], strict=True)]
        else:
            result += [None] * blocks
    return result


def _setup_block_scale_merge(ctx: Any, inputs: tuple[list[Tensor], list[Tensor], Tensor, list[Tensor]], output: list[Tensor]) -> None:
    base, deltas, coef, partition = inputs
    ctx.save_for_backward(coef, *deltas, *partition)
    ctx.blocks, ctx.deltas = len(base), len(deltas)


def _block_scale_merge_backward(
    ctx: Any, gradients: list[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None, list[None]]:
    coef, *saved = ctx.saved_tensors
    deltas, partition = saved[: ctx.deltas], saved[ctx.deltas :]
    for_base, for_deltas, for_coef, _ = ctx.needs_input_grad
    coefficients = None
    if for_coef:
        products = ctx.ops.block_scale_merge_backward.default(list(gradients), deltas, partition, coef.shape[2])
        coefficients = products.to(coef.dtype)
    base = [gradient if needed else None for gradient, needed in zip(gradients, for_base, strict=True)]
    return base, _for_deltas(ctx, gradients, deltas, coef, partition, for_deltas), coefficients, [None] * len(partition)


def _setup_products(ctx: Any, inputs: tuple[list[Tensor], list[Tensor], list[Tensor], int], output: Tensor) -> None:
    gradients, deltas, partition, _ = inputs
    ctx.save_for_backward(*gradients, *deltas, *partition)
    ctx.blocks, ctx.deltas = len(gradients), len(deltas)


def _products_backward(ctx: Any, products: Tensor) -> tuple[list[Tensor | None], list[Tensor | None], list[None], None]:
    saved = ctx.saved_tensors
    gradients, deltas = saved[: ctx.blocks], saved[ctx.blocks : ctx.blocks + ctx.deltas]
    partition = saved[ctx.blocks + ctx.deltas :]
    for_gradients, for_deltas, _, _ = ctx.needs_input_grad
    blocks: list[Tensor | None] = [None] * ctx.blocks
    if any(for_gradients):
        scaled = _scaled(ctx, gradients, deltas, products, partition)
        blocks = [one if needed else None for one, needed in zip(scaled, for_gradients, strict=True)]
    return blocks, _for_deltas(ctx, gradients, deltas, products, partition, for_deltas), [None] * len(partition), None


register("block_scale_merge", fake=_fake_block_scale_merge, backward=_block_scale_merge_backward, setup_context=_setup_block_scale_merge)
register("block_scale_merge_backward", fake=_fake_block_scale_merge_backward, backward=_products_backward, setup_context=_setup_products)
