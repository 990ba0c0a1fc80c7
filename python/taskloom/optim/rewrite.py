"""Parts of weights that are written anew: forgotten rows, candidate chunks, and what pruning leaves of a ticket."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from taskloom.ops import magnitude_mask, magnitude_threshold, split_threshold
from taskloom.ops._checks import FLOATING, check_floating, check_shape, check_untracked, check_writable
from taskloom.reference.masked.philox import philox_blocks

_SECOND_STREAM = 0x9E3779B97F4A7C15


def _words(seed: int, key: int, first: Tensor, width: int) -> Tensor:
    """The words of ``width`` entries from each of ``first`` on, as float64 of shape ``[len(first), width]``."""
    # A block serves four entries; where a row does not begin with one, its words reach into one block more.
    steps = torch.arange(-(-width // 4) + 1, device=first.device)
    blocks = (first // 4)[:, None] + steps
    words = philox_blocks(seed, key, blocks.reshape(-1)).view(len(first), 4 * len(steps))
    return words.gather(1, (first % 4)[:, None] + torch.arange(width, device=first.device)).double()


def _checked_rows(op: str, rows: Tensor, count: int) -> Tensor:
    """Row numbers, from a bool tensor of one entry for each row or from row numbers."""
    if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype not in (torch.bool, torch.int32, torch.int64):
        raise TypeError(f"{op}: rows: expected a bool, int32 or int64 tensor of one dimension")
    if rows.dtype == torch.bool:
        check_shape(op, "rows", rows, (count,), "the rows of weight")
        return rows.nonzero().squeeze(1)
    if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < count):
        raise ValueError(f"{op}: rows: expected rows from 0 to below {count}, got {int(rows.min())} to {int(rows.max())}")
    return rows.long()


def forget_rows_(weight: Tensor, rows: Tensor, *, std: float, seed: int, key: int = 0, states: Sequence[Tensor] = ()) -> Tensor:
    """Reset rows of a matrix to fresh normal values, and their optimiser state to zero, in place.

    Parameters
    ----------
    weight
        Tensor of two or more dimensions; float32, bfloat16, float16 or float64. Other rows keep their bits.
    rows
        bool with one entry for each row (the first dimension), or int32 or int64 row numbers.
    std
        Standard deviation of the fresh values, whose mean is 0.
    seed, key
        Entry i of the flat tensor takes word ``i % 4`` of Philox block ``i // 4`` under ``seed`` with counter ``key``, and of the stream
        ``key + 0x9E3779B97F4A7C15``, by Box and Muller's transform in float64: a row's values do not depend on which other rows are reset.
        0 <= seed, key < 2**64; default key 0.
    states
        Tensors of weight's shape (moments) whose same rows become zero.

    Returns
    -------
    Tensor
        ``weight``.

    Raises
    ------
    TypeError, ValueError
        If a dtype, a shape, a row or a number is out of place.
    RuntimeError
        If ``weight`` requires grad while gradients are recorded.

    Notes
    -----
    Active forgetting of embeddings: Chen et al., arXiv 2307.01163; the random stream is this library's.
    """
    op = "forget_rows_"
    check_floating(op, "weight", weight)
    if weight.dim() < 2:
        raise ValueError(f"{op}: weight: expected two or more dimensions, got shape {tuple(weight.shape)}")
    check_writable(op, "weight", weight)
    check_untracked(op, None, weight=weight)
    for place, state in enumerate(states):
        check_floating(op, f"states[{place}]", state)
        check_shape(op, f"states[{place}]", state, weight.shape, "weight")
        check_writable(op, f"states[{place}]", state)
        check_untracked(op, None, **{f"states[{place}]": state})
    for name, number in (("seed", seed), ("key", key)):
        if not 0 <= number < 1 << 64:
            raise ValueError(f"{op}: {name}: expected 0 <= {name} < 2**64, got {number}")
    if not std >= 0:
        raise ValueError(f"{op}: std: expected a number that is not negative, got {std}")
    chosen = _checked_rows(op, rows.to(weight.device) if isinstance(rows, Tensor) else rows, weight.shape[0])
    width = weight[0].numel() if weight.shape[0] else 0
    first = chosen * width
    radius = (-2 * ((_words(seed, key, first, width) + 0.5) / 2**32).log()).sqrt()
    angle = _words(seed, (key + _SECOND_STREAM) % (1 << 64), first, width) * (2 * math.pi / 2**32)
    fresh = (std * radius * angle.cos()).to(weight.dtype).view(chosen.numel(), *weight.shape[1:])
    weight[chosen] = fresh
    for state in states:
        state[chosen] = 0
    return weight


def _updated(old: Tensor, chunks: Tensor, mode: str, alpha: float) -> Tensor:
    """What chunks become, in the dtype of the old values."""
    if mode == "set" and alpha == 1:
        return chunks.to(old.dtype)
    dtype = torch.float64 if torch.float64 in (old.dtype, chunks.dtype) else torch.float32
    scaled = chunks.to(dtype) * alpha
    return (old.to(dtype) + scaled if mode == "add" else scaled).to(old.dtype)


def chunk_update_(
    base: Tensor,
    chunk_ids: Tensor,
    chunks: Tensor,
    mode: Literal["set", "add"] = "set",
    alpha: float = 1.0,
    undo: Tensor | None = None,
) -> Tensor:
    """Write chunks into a flat parameter, in place, and keep what they overwrite.

    Parameters
    ----------
    base
        Contiguous vector; float32, bfloat16, float16 or float64. Chunk c is its entries ``c * L .. (c + 1) * L``; the last may be shorter.
    chunk_ids
        int32 or int64 of shape ``[n]``, without repeats.
    chunks
        New values of shape ``[n, L]``, of any of these dtypes; what lies beyond the end of ``base`` is not looked at.
    mode
        ``"set"`` (default): the chunk becomes ``alpha * chunks``; ``"add"``: ``base + alpha * chunks``. Computed in float32 (float64 where
        a tensor is float64) and rounded once.
    alpha
        Default 1.0.
    undo
        Of shape ``[n, L]`` and base's dtype: takes the old values (zero beyond the end). ``chunk_update_(base, chunk_ids, undo)`` then
        restores every bit.

    Returns
    -------
    Tensor
        ``base``. Extra memory is that of a few tensors like ``chunks``.

    Raises
    ------
    TypeError, ValueError
        If a dtype, a shape or a chunk id is out of place, or ids repeat. Nothing has changed then.
    RuntimeError
        If a tensor requires grad while gradients are recorded.

    Notes
    -----
    For search over generated weights: D2NWG, Soro et al., arXiv 2402.18153.
    """
    op = "chunk_update_"
    check_floating(op, "base", base)
    check_floating(op, "chunks", chunks)
    check_untracked(op, None, base=base, chunks=chunks)
    if base.dim() != 1 or not base.is_contiguous():
        raise ValueError(f"{op}: base: expected a contiguous vector, got shape {tuple(base.shape)}, strides {base.stride()}")
    if chunks.dim() != 2 or chunks.shape[1] < 1:
        raise ValueError(f"{op}: chunks: expected shape [n, L] with L >= 1, got {tuple(chunks.shape)}")
    if chunk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: chunk_ids: expected int32 or int64, got {chunk_ids.dtype}")
    check_shape(op, "chunk_ids", chunk_ids, (chunks.shape[0],), "the rows of chunks")
    if mode not in ("set", "add"):
        raise ValueError(f'{op}: mode: expected "set" or "add", got {mode!r}')
    length, ids = chunks.shape[1], chunk_ids.long()
    count = -(-base.numel() // length)
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < count):
        raise ValueError(f"{op}: chunk_ids: expected ids from 0 to below {count}, got {int(ids.min())} to {int(ids.max())}")
    if ids.unique().numel() != ids.numel():
        raise ValueError(f"{op}: chunk_ids: expected no id twice")
    if undo is not None:
        check_shape(op, "undo", undo, chunks.shape, "chunks")
        if undo.dtype != base.dtype:
            raise TypeError(f"{op}: undo: expected {base.dtype} as base, got {undo.dtype}")
    whole = base.numel() // length
    in_rows = ids < whole
    # Read first, and copied: undo may be chunks itself, and chunks a part of base.
    updates = []
    for target, chosen in (
        (base[: whole * length].view(whole, length), in_rows.nonzero().flatten()),
        (base[whole * length :].view(1, -1), (~in_rows).nonzero().flatten()),
    ):
        if chosen.numel():
            rows = ids[chosen] if target.shape[1] == length else torch.zeros_like(chosen)
            old = target.index_select(0, rows)
            new = _updated(old, chunks.index_select(0, chosen)[:, : target.shape[1]], mode, alpha)
            updates.append((target, rows, chosen, old, new))
    if undo is not None:
        undo.zero_()
    for target, rows, chosen, old, new in updates:
        target.index_copy_(0, rows, new)
        if undo is not None:
            undo[:, : target.shape[1]].index_copy_(0, chosen, old)
    return base


def prune_and_rewind_(params: Sequence[Tensor], masks: Sequence[Tensor], initial: Sequence[Tensor], fraction: float) -> list[Tensor]:
    """Prune the smallest of the entries that are alive over all parameters, and rewind the rest to earlier values, in place.

    Parameters
    ----------
    params
        Trained parameters; float32, bfloat16, float16 or float64.
    masks
        bool, of the parameters' shapes: which entries are alive.
    initial
        Values to rewind to, of the parameters' shapes.
    fraction
        Share of the n alive entries that is pruned: ``n - int(fraction * n)`` of the largest magnitudes stay; of equal ones the earlier.

    Returns
    -------
    list of Tensor
        The new masks, bool. Parameters are ``initial``, rounded to their dtypes, where these are set, and 0 elsewhere.

    Raises
    ------
    TypeError, ValueError
        If a dtype, a shape, the length of a list or the fraction is out of place. Nothing has changed then.
    RuntimeError
        If a parameter requires grad while gradients are recorded.

    Notes
    -----
    Iterative magnitude pruning with rewinding: Frankle et al., arXiv 1903.01611; exact counts are this library's.
    """
    op = "prune_and_rewind_"
    if not (len(params) == len(masks) == len(initial)):
        raise ValueError(f"{op}: expected as many masks and initial values as {len(params)} params, got {len(masks)} and {len(initial)}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"{op}: fraction: expected 0 to 1, got {fraction}")
    for place, (param, mask, value) in enumerate(zip(params, masks, initial, strict=True)):
        check_floating(op, f"params[{place}]", param)
        check_writable(op, f"params[{place}]", param)
        check_untracked(op, None, **{f"params[{place}]": param})
        check_shape(op, f"initial[{place}]", value, param.shape, f"params[{place}]")
        check_shape(op, f"masks[{place}]", mask, param.shape, f"params[{place}]")
        if mask.dtype != torch.bool or value.dtype not in FLOATING:
            raise TypeError(f"{op}: expected bool masks and floating initial values, got {mask.dtype} and {value.dtype} at {place}")
    alive = [param.detach()[mask] for param, mask in zip(params, masks, strict=True)]
    count = sum(one.numel() for one in alive)
    kept = [torch.zeros(one.shape, dtype=torch.bool, device=one.device) for one in alive]
    if count:
        shares = split_threshold(magnitude_threshold(alive, rank=count - int(fraction * count)), alive)
        kept = [magnitude_mask(one, threshold=share) for one, share in zip(alive, shares, strict=True)]
    new = [mask.masked_scatter(mask, one) for mask, one in zip(masks, kept, strict=True)]
    for param, mask, value in zip(params, new, initial, strict=True):
        param.copy_(torch.where(mask, value, torch.zeros((), dtype=value.dtype, device=value.device)))
    return new
