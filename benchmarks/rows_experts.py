"""Rows of what moves tokens to experts and back: eight of 64 experts for each of as many tokens as rows are asked for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.gating import expert_combine_backward

EXPERTS, CHOSEN = 64, 8


def _chosen(tokens: int) -> Tensor:
    """Distinct experts of each token, some more often than others."""
    logits = weights((tokens, EXPERTS), 0) + weights((EXPERTS,), 1)
    return logits.topk(CHOSEN).indices


def sort_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    ids = _chosen(shape[0])
    narrow = ids.int()

    def sorted_ids() -> tuple[Tensor, Tensor, Tensor]:
        flat = narrow.reshape(-1)
        order = torch.sort(flat, stable=True).indices
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        ends = torch.bincount(flat, minlength=EXPERTS).cumsum(0)
        return order.int(), inverse.reshape(ids.shape).int(), F.pad(ends, (1, 0)).int()

    def one_hot() -> tuple[Tensor, Tensor, Tensor]:
        """Transformers' mask of experts, with the slots last, so that tokens come in order."""
        mask = F.one_hot(ids, EXPERTS).permute(2, 0, 1)
        found = [torch.where(mask[expert]) for expert in range(EXPERTS)]
        order = torch.cat([token * CHOSEN + slot for token, slot in found])
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        ends = torch.tensor([len(token) for token, _ in found]).cumsum(0)
        return order.int(), inverse.reshape(ids.shape).int(), F.pad(ends, (1, 0)).int()

    return Contest(
        ours=lambda: taskloom.expert_sort(narrow, EXPERTS)[:3],
        bytes=4 * narrow.nbytes,
        peers={"stable sort, bincount, cumsum": sorted_ids, "one-hot mask, where per expert": one_hot},
        sizes={"tokens": shape[0], "experts": EXPERTS, "k": CHOSEN},
    )


class _Moved:
    """Experts' outputs in expert order, with all that a way back to the tokens needs, made beforehand."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        tokens, self.width = shape
        self.ids = _chosen(tokens)
        order = taskloom.expert_sort(self.ids, EXPERTS)
        self.inverse, self.ends = order.inverse, order.offsets.tolist()
        self.rows, self.token, self.slot = order.inverse.long(), (order.order // CHOSEN).long(), (order.order % CHOSEN).long()
        self.y = weights((tokens * CHOSEN, self.width), 2, dtype)
        self.weight = weights((tokens, CHOSEN), 3).softmax(-1)

    def index_add(self, y: Tensor, weight: Tensor) -> Tensor:
        """Transformers' way: an expert's rows are weighed and added to their tokens."""
        out = y.new_zeros(len(weight), self.width)
        for begin, end in zip(self.ends, self.ends[1:], strict=False):
            token = self.token[begin:end]
            out.index_add_(0, token, (y[begin:end] * weight[token, self.slot[begin:end], None]).to(y.dtype))
        return out

    def product(self, y: Tensor, weight: Tensor) -> Tensor:
        """ScatterMoE's way: the rows of each token are put next to each other and multiplied with its weights."""
        return torch.bmm(weight[:, None].to(y.dtype), y[self.rows]).squeeze(1)

    @property
    def sizes(self) -> dict[str, float]:
        """For the JSON."""
        return {"tokens": len(self.weight), "width": self.width, "experts": EXPERTS, "k": CHOSEN}


def combine_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    moved = _Moved(shape, dtype)
    y, weight = moved.y, moved.weight
    return Contest(
        ours=lambda: taskloom.expert_combine(y, weight, moved.inverse),
        bytes=y.nbytes + y.nbytes // CHOSEN + total_bytes(weight, moved.inverse),
        peers={"index_add per expert": lambda: moved.index_add(y, weight), "gather, bmm": lambda: moved.product(y, weight)},
        sizes=moved.sizes,
    )


def combine_backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    moved = _Moved(shape, dtype)
    y, weight = moved.y.clone().requires_grad_(), moved.weight.clone().requires_grad_()
    gradient = weights((len(weight), moved.width), 4, dtype)
    added, multiplied = moved.index_add(y, weight), moved.product(y, weight)
    return Contest(
        ours=lambda: expert_combine_backward(gradient, moved.y, moved.weight, moved.inverse),
        bytes=2 * y.nbytes + gradient.nbytes + 2 * weight.nbytes + moved.inverse.nbytes,
        peers={
            "backward of index_add per expert": lambda: torch.autograd.grad(added, (y, weight), gradient, retain_graph=True),
            "backward of gather, bmm": lambda: torch.autograd.grad(multiplied, (y, weight), gradient, retain_graph=True),
        },
        sizes=moved.sizes,
    )


ROWS = (
    Row("expert_sort", sort_contest, f"{CHOSEN} of {EXPERTS}", dtypes=(torch.float32,), shape=(4096, 2048), memory=True),
    Row("expert_combine", combine_contest, f"{CHOSEN} of {EXPERTS}", shape=(1024, 2048), memory=True),
    Row("expert_combine_backward", combine_backward_contest, f"{CHOSEN} of {EXPERTS}", shape=(1024, 2048), memory=True),
)
