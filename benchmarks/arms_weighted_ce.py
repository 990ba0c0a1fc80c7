"""Ways to the mean cross-entropy of the supervised rows of a batch, from hidden states and a head: ours, torch's, Liger's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

import taskloom

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Hidden states, head, targets (IGNORED at rows that are not supervised) and weights (1 or 0)."""

    hidden: Tensor
    head: Tensor
    targets: Tensor
    weights: Tensor

    @property
    def supervised(self) -> int:
        return int(self.weights.sum())


Arm: TypeAlias = Callable[[Batch], Tensor]


def batch(rows: int, width: int, vocabulary: int, share: float, dtype: torch.dtype, device: str = "cpu") -> Batch:
    """A batch from a seed; its hidden states and head want gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype).requires_grad_()
    head = (width**-0.5 * torch.randn(vocabulary, width, generator=generator)).to(device, dtype).requires_grad_()
    order = torch.randperm(rows, generator=generator)
    weights = torch.zeros(rows)
    weights[order[: max(1, round(share * rows))]] = 1
    targets = torch.where(weights > 0, torch.randint(0, vocabulary, (rows,), generator=generator), IGNORED)
    return Batch(hidden, head, targets.to(device), weights.to(device))


def ours(given: Batch) -> Tensor:
    return taskloom.weighted_ce(given.hidden, given.head, given.targets, given.weights)


def _mean(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ head.t()).float(), targets, ignore_index=IGNORED)


def full(given: Batch) -> Tensor:
    """All logits, those of unsupervised rows too."""
    return _mean(given.hidden, given.head, given.targets)


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # Made when it is first called: it imports the compiler, which takes seconds.
    return torch.compile(_mean)


def compiled(given: Batch) -> Tensor:
    """The same through torch.compile."""
    return _compiled()(given.hidden, given.head, given.targets)


def compacted(given: Batch) -> Tensor:
    """The logits of supervised rows: what is strongest without a kernel."""
    rows = given.weights.nonzero()[:, 0]
    return _mean(given.hidden[rows], given.head, given.targets[rows])


def chunked(given: Batch) -> Tensor:
    """The chunked op of torch itself, on supervised rows."""
    rows = given.weights.nonzero()[:, 0]
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(given.hidden[rows], given.head, given.targets[rows], options=options)


def liger(given: Batch) -> Tensor:
    """Liger's fused op, on supervised rows."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    rows = given.weights.nonzero()[:, 0]
    loss: Tensor = LigerFusedLinearCrossEntropyLoss()(given.head, given.hidden[rows], given.targets[rows])
    return loss


OURS = "ours"
ARMS: dict[str, Arm] = {
    OURS: ours,
    "all logits": full,
    "all logits, compiled": compiled,
    "supervised logits": compacted,
    "linear_cross_entropy": chunked,
    "liger": liger,
}

# These compute gradients in forward, so a forward of theirs alone is no measure.
GRADIENTS_IN_FORWARD = ("linear_cross_entropy", "liger")


def obstacle(name: str, device: str) -> str | None:
    """Why an arm cannot run here; None where it can."""
    if name == "linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked linear_cross_entropy"
    if name == "liger" and device == "cpu":
        return "Liger's kernels need a GPU"
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None
