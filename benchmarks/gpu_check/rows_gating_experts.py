"""Rows of what moves tokens to experts and back, and of RoMA's manifold loss, at the sizes of OLMoE and Qwen3."""

from __future__ import annotations

import torch
from contest import Contest, Row
from inputs_on import normal, total_bytes
from torch import Tensor

import taskloom
from taskloom.ops.gating import expert_combine_backward

EXPERTS, CHOSEN, WIDTH, NEIGHBOURS = 128, 8, 2048, 3
BLOCK = 64


def _chosen(device: torch.device, tokens: int) -> Tensor:
    return normal(device, torch.float32, tokens * EXPERTS, 0).reshape(tokens, EXPERTS).topk(CHOSEN).indices.int()


def sort_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    ids = _chosen(device, max(entries // EXPERTS, 1))

    def eager(ids: Tensor) -> tuple[Tensor, Tensor]:
        flat = ids.reshape(-1)
        return torch.sort(flat, stable=True).indices, torch.bincount(flat, minlength=EXPERTS).cumsum(0)

    return Contest(
        ours=lambda: taskloom.expert_sort(ids, EXPERTS)[:3],
        bytes=4 * ids.nbytes,
        peers={"stable sort, bincount, cumsum": lambda: eager(ids)},
        exact=True,
    )


def padded_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    ids = _chosen(device, max(entries // EXPERTS, 1))
    places = len(taskloom.expert_sort(ids, EXPERTS, block=BLOCK).padded_order)

    def eager(ids: Tensor) -> tuple[Tensor, Tensor]:
        flat = ids.reshape(-1)
        experts, order = torch.sort(flat, stable=True)
        counts = torch.bincount(flat, minlength=EXPERTS)
        blocks = (counts + BLOCK - 1) // BLOCK
        # How much further an expert's entries lie for the padding of those before it.
        further = blocks.cumsum(0) * BLOCK - blocks * BLOCK - (counts.cumsum(0) - counts)
        padded = torch.full((places,), len(flat), device=flat.device)
        padded[torch.arange(len(flat), device=flat.device) + further[experts]] = order
        return padded, torch.searchsorted(blocks.cumsum(0), torch.arange(places // BLOCK, device=flat.device), right=True)

    return Contest(
        ours=lambda: taskloom.expert_sort(ids, EXPERTS, block=BLOCK),
        bytes=5 * ids.nbytes,
        peers={"stable sort, bincount, places": lambda: eager(ids)},
        exact=True,
    )


def _moved(device: torch.device, dtype: torch.dtype, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Experts' outputs in expert order, weights and places."""
    width = min(WIDTH, entries // CHOSEN)
    tokens = entries // (CHOSEN * width)
    inverse = taskloom.expert_sort(_chosen(device, tokens), EXPERTS).inverse
    weight = normal(device, torch.float32, tokens * CHOSEN, 2).reshape(tokens, CHOSEN).softmax(-1)
    return normal(device, dtype, tokens * CHOSEN * width, 1).reshape(-1, width), weight, inverse


def combine_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    y, weight, inverse = given = _moved(device, dtype, entries)

    def eager(y: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        return torch.bmm(weight[:, None].to(y.dtype), y[inverse.long()]).squeeze(1)

    return Contest(
        ours=lambda: taskloom.expert_combine(*given),
        bytes=y.nbytes + y.nbytes // CHOSEN + total_bytes(weight, inverse),
        peers={"gather, bmm": lambda: eager(*given)},
        compiled=(eager, given),
    )


def combine_backward_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    y, weight, inverse = given = _moved(device, dtype, entries)
    gradient = normal(device, dtype, len(weight) * y.shape[1], 3).reshape(len(weight), -1)

    def eager(gradient: Tensor, y: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        rows = inverse.long()
        dy = torch.empty_like(y)
        dy[rows] = weight.to(y.dtype)[..., None] * gradient[:, None]
        return dy, (y[rows] * gradient[:, None]).sum(-1, dtype=torch.float32)

    return Contest(
        ours=lambda: expert_combine_backward(gradient, *given),
        bytes=2 * y.nbytes + gradient.nbytes + total_bytes(weight, weight, inverse),
        peers={"gather, multiply, sum, scatter": lambda: eager(gradient, *given)},
        compiled=(eager, (gradient, *given)),
    )


def manifold_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    width = min(5 * EXPERTS, entries // 8)
    rows, known = max(entries // (8 * width), 1), max(entries // width, 1)
    r, table = (
        normal(device, torch.float32, count * width, seed).reshape(count, width).softmax(-1) for seed, count in ((0, rows), (1, known))
    )
    weight = normal(device, torch.float32, rows * NEIGHBOURS, 2).reshape(rows, NEIGHBOURS).softmax(-1)
    ids = torch.arange(rows * NEIGHBOURS, device=device).mul_(7919).remainder_(known).reshape(rows, NEIGHBOURS)
    given = (r, table.to(dtype), ids, weight)

    def eager(r: Tensor, table: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        return (weight * (r[:, None] - table[ids].float()).square().sum(-1)).sum(-1)

    return Contest(
        ours=lambda: taskloom.manifold_loss(*given),
        bytes=r.nbytes + NEIGHBOURS * r.numel() * given[1].element_size() + total_bytes(ids, weight),
        peers={"gather, subtract, square, sum": lambda: eager(*given)},
        compiled=(eager, given),
    )


ROWS = (
    Row("expert_sort", f"{CHOSEN} of {EXPERTS}", sort_contest, dtypes=(torch.float32,), bits=20),
    Row("expert_sort", f"{CHOSEN} of {EXPERTS}, blocks of 64", padded_contest, dtypes=(torch.float32,), bits=20),
    Row("expert_combine", f"{CHOSEN} slots", combine_contest, bits=26),
    Row("expert_combine_backward", f"{CHOSEN} slots", combine_backward_contest, bits=26),
    Row("manifold_loss", f"{NEIGHBOURS} neighbours", manifold_contest, bits=25),
)
