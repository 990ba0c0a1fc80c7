"""Training of a multi-task model on generated rows, and what it does on others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import torch
from torch import nn

from taskloom.methods.claim import Progress
from taskloom.methods.routing.home.ranking import RATES, Rows, auc
from taskloom.methods.routing.home.tasks import multi_task_loss

RARE = tuple(task for task, rate in RATES.items() if rate < 0.1)


def train(model: nn.Module, rows: Rows, config: Mapping[str, Any], generator: torch.Generator, progress: Progress) -> None:
    """Adam on the sum of the tasks' cross-entropies, over shuffled batches; what remains of an epoch is left out."""
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning rate"])
    batch, epochs = config["batch"], config["epochs"]
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(rows.x), generator=generator).to(rows.x.device)
        for places in order.split(batch):
            if len(places) < batch:
                continue
            labels = {task: label[places] for task, label in rows.labels.items()}
            optimizer.zero_grad()
            multi_task_loss(model(rows.x[places]), labels).backward()
            optimizer.step()
        progress((epoch + 1) / epochs)
    model.eval()


@torch.no_grad()
def measure(model: nn.Module, rows: Rows, report: Callable[[torch.Tensor], Mapping[str, Any]]) -> dict[str, float]:
    """Mean areas under the curve over all tasks and over the rare ones, and what the experts' outputs look like."""
    said = model(rows.x)
    areas = {task: auc(said[task], label) for task, label in rows.labels.items()}
    levels = report(rows.x).values()
    return {
        "AUC": fmean(areas.values()),
        "AUC of rare tasks": fmean(areas[task] for task in RARE),
        "most zeros": max(float(level.zero_fraction.max()) for level in levels),
        "std ratio": max(float(level.std.max() / level.std.min()) for level in levels),
    }
