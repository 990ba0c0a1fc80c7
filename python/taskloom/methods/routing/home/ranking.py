"""Generated ranking data: binary tasks in two categories that share a part of what they depend on, some of them rare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TASKS = {"watch": ("long view", "effective view", "finish"), "inter": ("like", "follow", "comment")}
RATES = {"long view": 0.5, "effective view": 0.35, "finish": 0.2, "like": 0.06, "follow": 0.03, "comment": 0.015}
FEATURES = 48
# Shares of what all tasks depend on, what a category does, and what a task alone does.
PARTS = (0.8, 1.0, 0.5)
# Features are noisy mixtures of a few factors, on which everything depends.
FACTORS = 6
NOISE = 0.3
WAVES = 2
FREQUENCY = 2.0
TEACHER_SEED = 2024
_STANDARD_ROWS = 20000


@dataclass(frozen=True)
class Rows:
    """Features ``[N, 48]`` and a label ``[N]``, 0 or 1, for each task."""

    x: Tensor
    labels: dict[str, Tensor]

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        return Rows(self.x.to(device), {task: label.to(device) for task, label in self.labels.items()})


class _Latent:
    """A fixed function of the factors: a sum of sines along random directions, with mean 0 and variance 1."""

    def __init__(self, generator: torch.Generator, sample: Tensor) -> None:
        self.directions = FREQUENCY * torch.randn(FACTORS, WAVES, generator=generator) / FACTORS**0.5
        self.phases = 2 * torch.rand(WAVES, generator=generator) - 1
        raw = self._raw(sample)
        self.mean, self.std = raw.mean(), raw.std()

    def _raw(self, factors: Tensor) -> Tensor:
        return torch.sin(factors @ self.directions + self.phases).sum(1)

    def __call__(self, factors: Tensor) -> Tensor:
        return (self._raw(factors) - self.mean) / self.std


class Teachers:
    """What the labels follow from; the same for every seed."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(TEACHER_SEED)
        self.mixing = torch.randn(FACTORS, FEATURES, generator=generator) / FACTORS**0.5
        self.scales = torch.randn(FEATURES, generator=generator).exp()
        sample = torch.randn(_STANDARD_ROWS, FACTORS, generator=generator)
        self.shared = _Latent(generator, sample)
        self.category = {name: _Latent(generator, sample) for name in TASKS}
        self.task = {name: _Latent(generator, sample) for name in RATES}
        self.offsets = {name: _offset(self._logit(sample, category, name), RATES[name]) for category in TASKS for name in TASKS[category]}

    def _logit(self, factors: Tensor, category: str, task: str) -> Tensor:
        shared, common, own = PARTS
        return shared * self.shared(factors) + common * self.category[category](factors) + own * self.task[task](factors)

    def draw(self, rows: int, generator: torch.Generator) -> Rows:
        """New rows; features are log-normally scaled."""
        factors = torch.randn(rows, FACTORS, generator=generator)
        features = factors @ self.mixing + NOISE * torch.randn(rows, FEATURES, generator=generator)
        labels = {}
        for category, tasks in TASKS.items():
            for task in tasks:
                probability = torch.sigmoid(self._logit(factors, category, task) + self.offsets[task])
                labels[task] = (torch.rand(rows, generator=generator) < probability).float()
        return Rows(features * self.scales, labels)


def _offset(logits: Tensor, rate: float) -> Tensor:
    """What to add to the logits so that the mean probability is the rate, by bisection."""
    low, high = torch.tensor(-20.0), torch.tensor(20.0)
    for _ in range(50):
        middle = (low + high) / 2
        above = torch.sigmoid(logits + middle).mean() > rate
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def auc(score: Tensor, label: Tensor) -> float:
    """The area under the ROC curve: the share of pairs of a positive and a negative row that the score has in order; ties count half.

    Parameters
    ----------
    score, label
        ``[N]``; labels are 0 or 1, and both occur.
    """
    _, place, count = score.double().unique(return_inverse=True, return_counts=True)
    ranks = (count.cumsum(0) - (count - 1) / 2)[place]
    positive = label > 0.5
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(label) - n)))
