"""The rewriting functions of taskloom.optim beside what one would write in plain torch for the same."""

from __future__ import annotations

import torch
from torch import Tensor

from harness import Contest
from inputs import bool_mask, weights
from taskloom.optim import chunk_update_, forget_rows_, prune_and_rewind_

SHAPE = (8192, 768)
CHUNK = 4096
FORGOTTEN, PRUNED = 0.1, 0.2


def forget_contest(shape: tuple[int, int] = SHAPE) -> Contest:
    """Rows reset with their moments. Torch draws other numbers, so the values are not compared."""
    weight, moment = weights(shape, 0), weights(shape, 1)
    rows = bool_mask((shape[0],), 2, FORGOTTEN)

    def plain() -> Tensor:
        weight[rows] = 0.02 * torch.randn(int(rows.sum()), shape[1])
        moment[rows] = 0
        return weight

    return Contest(
        ours=lambda: forget_rows_(weight, rows, std=0.02, seed=1, states=[moment]),
        bytes=2 * int(rows.sum()) * shape[1] * 4,
        peers={"randn and index": plain},
        shared=None,
        changes=weight,
        state=(moment,),
        sizes={"rows": float(rows.sum())},
    )


def chunk_contest(shape: tuple[int, int] = SHAPE, chunk: int = CHUNK) -> Contest:
    """A candidate that is written, and taken back: the vector is then what it was."""
    base = weights(shape, 0).flatten()
    ids = torch.randperm(base.numel() // chunk, generator=torch.Generator().manual_seed(1))[: max(1, base.numel() // chunk // 10)]
    # Zeros: the state is compared, and what memory happens to hold may be NaN, which equals nothing.
    chunks, undo = weights((ids.numel(), chunk), 2), torch.zeros(ids.numel(), chunk)

    def ours() -> Tensor:
        chunk_update_(base, ids, chunks, undo=undo)
        return chunk_update_(base, ids, undo)

    def by_index() -> Tensor:
        rows = base.view(-1, chunk)
        old = rows[ids]
        rows[ids] = chunks
        rows[ids] = old
        return base

    def by_copy() -> Tensor:
        old = base.clone()
        base.view(-1, chunk)[ids] = chunks
        return base.copy_(old)

    peers = {"index": by_index, "copy of the whole": by_copy}
    return Contest(ours, 6 * chunks.nbytes, peers, exact=True, changes=base, state=(undo,), sizes={"chunks": ids.numel(), "chunk": chunk})


def prune_contest(shape: tuple[int, int] = SHAPE) -> Contest:
    """A fifth of the alive entries pruned over four parameters."""
    shapes = [(shape[0] // 4, shape[1])] * 4
    params, initial = ([weights(one, seed + place) for place, one in enumerate(shapes)] for seed in (0, 9))
    masks = [bool_mask(one, 20 + place, 0.6) for place, one in enumerate(shapes)]

    def plain() -> list[Tensor]:
        alive = torch.cat([param[mask].abs() for param, mask in zip(params, masks, strict=True)])
        cut = alive.kthvalue(int(PRUNED * alive.numel()) + 1).values
        new = [mask & (param.abs() >= cut) for param, mask in zip(params, masks, strict=True)]
        for param, mask, value in zip(params, new, initial, strict=True):
            param.copy_(torch.where(mask, value, 0.0))
        return new

    return Contest(
        ours=lambda: prune_and_rewind_(params, masks, initial, PRUNED),
        # Parameters and masks are read to rank, and again with the initial values to write parameters and masks.
        bytes=sum(3 * param.nbytes + 3 * mask.nbytes for param, mask in zip(params, masks, strict=True)),
        peers={"kthvalue": plain},
        exact=True,
        state=tuple(params),
        sizes={"alive": float(sum(int(mask.sum()) for mask in masks))},
    )


CONTESTS = {"forget_rows_": forget_contest, "chunk_update_": chunk_contest, "prune_and_rewind_": prune_contest}
