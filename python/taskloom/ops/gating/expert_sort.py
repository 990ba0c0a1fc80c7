"""The order of a batch's choices by expert: what moves rows to experts and back."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._register import register
from taskloom.ops.gating._indices import MOST_ENTRIES, check_count, check_indices, check_values, run_checked
from taskloom.reference import gating as reference
from taskloom.reference.gating.expert_sort import padded_size

Sorted = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class ExpertOrder(NamedTuple):
    """What :func:`taskloom.expert_sort` finds, all int32; the last three are None without ``block``.

    Attributes
    ----------
    order
        ``[T * k]``: the entries of ids in the order of their experts, each as its place in the flattened ids; those of one expert in the
        order of their places. ``order // k`` are the rows of the tokens.
    inverse
        ids' shape: where in ``order`` each entry is.
    offsets
        ``[E + 1]``: expert e has the places ``offsets[e]`` to ``offsets[e + 1] - 1`` of ``order``. ``offsets[1:]`` is what torch's grouped
        product takes.
    padded_order
        ``[P]``: the same with each expert's run filled up to whole blocks. T * k stands for no entry, there and after the last run.
    padded_offsets
        ``[E + 1]``: the experts' runs in ``padded_order``.
    block_expert
        ``[P / block]``: the expert of each block, -1 after the last run.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    padded_order: Tensor | None
    padded_offsets: Tensor | None
    block_expert: Tensor | None


def expert_sort(ids: Tensor, num_experts: int, *, block: int | None = None) -> ExpertOrder:
    """Sort the entries of ``ids`` by expert, stably.

    Parameters
    ----------
    ids
        ``[..., k]``: the experts of each token, 0 to ``num_experts - 1``; int32 or int64, fewer than 2^31 entries.
    num_experts
        The number of experts E, at least 1.
    block
        Rows of a tile of a product: with it the experts' runs are given in whole blocks too. Default None: they are not.

    Returns
    -------
    ExpertOrder
        ``order``, ``inverse``, ``offsets``, and with ``block`` ``padded_order``, ``padded_offsets`` and ``block_expert``. Their sizes
        follow from those of the arguments, so that the host does not wait for a GPU: P is the most that any ids can need, T * k +
        min(E, T * k) (block - 1) rounded down to whole blocks.

    Raises
    ------
    TypeError
        If ids is not of integers of 32 or 64 bits, or a number is no integer.
    ValueError
        If a number is below 1, there are too many entries, or an id is out of range (on a GPU that is a device-side assertion, in compiled
        code a RuntimeError).

    Notes
    -----
    Source: this library; padded blocks as in vLLM's moe_align_block_size. A counting sort: T * k + E steps, no comparisons. The result is
    the only one that there is.
    """
    op = "expert_sort"
    check_indices(op, "ids", ids)
    if ids.dim() == 0:
        raise ValueError(f"{op}: ids: expected at least one dimension, got none")
    check_count(op, "num_experts", num_experts)
    if num_experts >= MOST_ENTRIES:
        raise ValueError(f"{op}: num_experts: expected fewer than 2^31 - 1, got {num_experts}")
    if block is not None:
        check_count(op, "block", block)
    entries = ids.numel()
    if entries > MOST_ENTRIES or (block is not None and padded_size(entries, num_experts, block) > MOST_ENTRIES):
        raise ValueError(f"{op}: ids: expected fewer than 2^31 entries, with what fills blocks up, got {entries}")
    check = partial(check_values, op, "ids", ids, 0, num_experts, "the number of an expert")
    run = kernel(op, ids)
    if run is None:
        check()
        found: Sorted = reference.expert_sort(ids, num_experts, block or 0)
    else:
        found = run_checked(run, check, ids, num_experts, block or 0)
    return ExpertOrder(*found[:3], *((None,) * 3 if block is None else found[3:]))


def _fake(ids: Tensor, num_experts: int, block: int) -> Sorted:
    entries = ids.numel()
    size = padded_size(entries, num_experts, block) if block else 0
    shapes: tuple[tuple[int, ...], ...] = (
        (entries,),
        tuple(ids.shape),
        (num_experts + 1,),
        (size,),
        (num_experts + 1 if block else 0,),
        (size // block if block else 0,),
    )
    made = (torch.empty(shape, dtype=torch.int32, device=ids.device) for shape in shapes)
    order, inverse, offsets, padded_order, padded_offsets, block_expert = made
    return order, inverse, offsets, padded_order, padded_offsets, block_expert


register("expert_sort", fake=_fake, discrete=True)
