"""Widths for what a user wants: a preference over the tasks and a budget of computation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taskloom.methods.channels.controllable_mtl.config import WidthConfig
from taskloom.methods.channels.controllable_mtl.deploy import calibrate
from taskloom.methods.channels.controllable_mtl.evolve import Evolution, evolve
from taskloom.methods.channels.controllable_mtl.flops import FlopTable
from taskloom.methods.channels.controllable_mtl.model import SlimMultiTask
from taskloom.methods.channels.controllable_mtl.preference import (
    InfeasibleBudget,
    Preference,
    check_budget,
    check_grid,
    check_preference,
    decoder_levels,
)
from taskloom.nn import SlimNorm2d

GRID = (0.25, 0.5, 0.75, 1.0)

Metric = Callable[[Tensor, Tensor], Any]
Batches = Iterable[tuple[Tensor, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class SearchInfo:
    """What a search found.

    Attributes
    ----------
    flops, budget
        The operations of the configuration, and what they were to stay within.
    score
        The preferences' mean of each task's metric against the whole network's: 1 where it does as well.
    metrics
        By task, on the validation data.
    level
        By how many steps of the grid all decoders are below what the preference asks for.
    candidates
        Configurations within the budget that were compared.
    """

    flops: int
    budget: int
    score: float
    metrics: Mapping[str, float]
    level: int
    candidates: int


@dataclass(frozen=True)
class _Found:
    config: WidthConfig
    info: SearchInfo


def _first_inputs(loader: Batches, tasks: tuple[str, ...]) -> Tensor:
    """The inputs of the first batch, whose form is checked."""
    if iter(loader) is loader:
        raise TypeError(f"search_widths: loader: expected what can be read many times, such as a list or a DataLoader, got {loader!r}")
    first: Any = next(iter(loader), None)
    if first is None:
        raise ValueError("search_widths: loader: expected at least one batch, got none")
    if not (isinstance(first, list | tuple) and len(first) == 2 and isinstance(first[0], Tensor) and isinstance(first[1], Mapping)):
        raise TypeError(
            f"search_widths: loader: expected batches of a tensor and a mapping from tasks to targets, got {type(first).__name__}"
        )
    for task in tasks:
        if task not in first[1]:
            raise KeyError(f"search_widths: loader: expected targets of every task, {task!r} is missing")
    x: Tensor = first[0]
    return x


class WidthSearch:
    """Searches one trained model for many preferences and budgets; what was counted and measured is kept.

    Parameters
    ----------
    model
        It is copied: later changes of it are not seen, and nothing of it changes.
    loader
        Validation data: batches of x and targets by task, readable again and again.
    metric
        A function of output and target that gives a positive number, or one by task. Its values are averaged over the batches, weighted by
        their samples; give one batch where that is not the metric of all.
    grid
        Ratios that widths are chosen from. Default 0.25, 0.5, 0.75, 1.0.
    lower_is_better
        Tasks whose metric is an error. Default: none.
    calibration
        Batches for the statistics of batch normalisation, the inputs alone or first. Default None: the validation data.
    num_batches
        How many of them are used at most. Default 5.

    Raises
    ------
    KeyError
        If ``metric`` or ``lower_is_better`` have an unknown task, or ``metric`` or the targets lack one.
    TypeError
        If ``loader`` can be read once only, or has batches of another form.
    ValueError
        If the grid is empty or has a ratio that is not in (0, 1], there are no data, or the whole network's metric is not positive.

    Notes
    -----
    Source: arXiv 2308.11744. Its abstract says that a preferred task's decoder gets more of the computation and that the encoder is then
    searched. **Inferred**: the rule for the decoders' widths, the score, and both kinds of search over the encoder.
    """

    def __init__(
        self,
        model: SlimMultiTask,
        loader: Batches,
        metric: Metric | Mapping[str, Metric],
        *,
        grid: Sequence[float] = GRID,
        lower_is_better: Collection[str] = (),
        calibration: Iterable[Any] | None = None,
        num_batches: int = 5,
    ) -> None:
        metrics = metric if isinstance(metric, Mapping) else dict.fromkeys(model.tasks, metric)
        model.check_tasks("search_widths: metric", metrics, every=True)
        model.check_tasks("search_widths: lower_is_better", lower_is_better)
        first = _first_inputs(loader, model.tasks)
        self.grid = check_grid(grid)
        self._model = copy.deepcopy(model).eval()
        self._loader, self._metric, self._lower = loader, metrics, frozenset(lower_is_better)
        self._calibration: Iterable[Any] = loader if calibration is None else calibration
        self._num_batches = num_batches
        norms = [module for module in self._model.modules() if isinstance(module, SlimNorm2d)]
        self._universal = [norm for norm in norms if norm.kind == "batch" and norm.narrow is None]
        self._flops = FlopTable(self._model, (1, *first.shape[1:]))
        self._measured: dict[WidthConfig, dict[str, float]] = {}
        self._found: dict[tuple[Any, ...], _Found] = {}
        self.full = WidthConfig(1.0, dict.fromkeys(model.tasks, 1.0))
        self.full_flops = self._flops.total(self.full)
        self._full_metrics = self.measure(self.full)
        for task, value in self._full_metrics.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"search_widths: metric: expected a positive value of the whole network for task {task!r}, got {value}")

    @torch.no_grad()
    def measure(self, config: WidthConfig) -> dict[str, float]:
        """The metric of each task on the validation data; a configuration is calibrated first where its normalisation needs that."""
        if config not in self._measured:
            if self._universal and config != self.full:
                calibrate(self._model, config, self._calibration, self._num_batches)
            sums, samples = dict.fromkeys(self._model.tasks, 0.0), 0
            for x, targets in self._loader:
                samples += len(x)
                for task, output in self._model(x, config).items():
                    sums[task] += len(x) * float(self._metric[task](output, targets[task]))
            for norm in self._universal:
                norm.calibrated.clear()
            self._measured[config] = {task: total / samples for task, total in sums.items()}
        return self._measured[config]

    def flops(self, config: WidthConfig) -> int:
        """The operations of one sample."""
        return self._flops.total(config)

    def score(self, preference: Mapping[str, float], config: WidthConfig) -> float:
        """``sum_k p_k M_k / M_k(whole network)``, with the inverse ratio for errors; tasks without preference do not count."""
        terms = []
        for task, value in self.measure(config).items():
            if preference[task] == 0:
                continue
            if not math.isfinite(value) or (task in self._lower and value < 0):
                raise ValueError(f"search_widths: metric: expected a finite value (an error at least 0) for task {task!r}, got {value}")
            if task in self._lower:
                ratio = self._full_metrics[task] / value if value > 0 else math.inf
            else:
                ratio = value / self._full_metrics[task]
            terms.append(preference[task] * ratio)
        # Exactly rounded: the order of the tasks does not matter.
        return math.fsum(terms)

    def find(self, preference: Preference, budget: float, *, evolution: Evolution | None = None) -> tuple[WidthConfig, SearchInfo]:
        """The best configuration within a budget.

        Parameters
        ----------
        preference
            By task, or in the tasks' order: at least 0 each, 1 in sum.
        budget
            An int: the operations of one sample, counted as :func:`count_flops` does. A float in (0, 1]: a share of the whole network's.
        evolution
            How to search for a width per part of the encoder. Default None: one width for the whole encoder, all of the grid.

        Returns
        -------
        tuple
            The configuration, and a :class:`SearchInfo`. A model with batch normalisation is yet to be calibrated for it.

        Raises
        ------
        InfeasibleBudget
            If the smallest configuration costs more; its ``minimum`` says how much.
        KeyError, ValueError, TypeError
            If the preference or the budget is not as described.

        Notes
        -----
        Decoders get the widths of the first of :func:`decoder_levels` that fits with some encoder (1.0 where they have no slim layers).
        What smaller budgets would get competes too, so that a larger budget never has a lower score; ties go to the higher level, then to
        fewer operations. With evolution the score is at least that without.
        """
        wanted = check_preference(self._model, preference)
        limit = check_budget(budget, self.full_flops)
        key = (tuple(wanted.items()), limit, evolution)
        if key not in self._found:
            self._found[key] = self._search(wanted, limit, evolution)
        found = self._found[key]
        return found.config, found.info

    def _search(self, preference: dict[str, float], limit: int, evolution: Evolution | None) -> _Found:
        # A network without slim layers has one width only.
        encoder_grid = self.grid if self._model.parts else (1.0,)
        fixed = {task: 1.0 for task in self._model.tasks if not self._model.decoder_parts(task)}
        levels = [{**level, **fixed} for level in decoder_levels(preference, self.grid)]
        least = [self._flops.total(WidthConfig(encoder_grid[0], level)) for level in levels]
        if least[-1] > limit:
            raise InfeasibleBudget(
                f"search_widths: budget: expected at least {least[-1]} operations, those of the smallest configuration, got {limit}",
                least[-1],
            )
        sizes = (len(levels), *[len(encoder_grid)] * max(len(self._model.parts), 1))
        genes = [(level, *[place] * (len(sizes) - 1)) for level in range(len(levels)) for place in range(len(encoder_grid))]

        def config(gene: tuple[int, ...]) -> WidthConfig:
            ratios = tuple(encoder_grid[place] for place in gene[1:])
            return WidthConfig(ratios[0] if len(set(ratios)) == 1 else ratios, levels[gene[0]])

        def fits(gene: tuple[int, ...]) -> bool:
            # A lower level serves the budgets that no higher one fits into; what it has for them stays a candidate of larger ones.
            total = self._flops.total(config(gene))
            return total <= limit and (gene[0] == 0 or total < least[gene[0] - 1])

        def rank(gene: tuple[int, ...]) -> tuple[float, ...]:
            return (-self.score(preference, config(gene)), gene[0], self._flops.total(config(gene)), *gene[1:])

        feasible = [gene for gene in genes if fits(gene)]
        if evolution is not None:
            feasible = evolve(feasible, fits, rank, sizes, evolution)
        best = min(feasible, key=rank)
        chosen = config(best)
        return _Found(
            chosen,
            SearchInfo(self._flops.total(chosen), limit, self.score(preference, chosen), self.measure(chosen), best[0], len(feasible)),
        )


def search_widths(
    model: SlimMultiTask,
    preference: Preference,
    budget: float,
    loader: Batches,
    metric: Metric | Mapping[str, Metric],
    grid: Sequence[float] = GRID,
    *,
    evolution: Evolution | None = None,
    **options: Any,
) -> tuple[WidthConfig, SearchInfo]:
    """Search a model for one preference and budget; :class:`WidthSearch` describes arguments, errors and result, and serves many."""
    return WidthSearch(model, loader, metric, grid=grid, **options).find(preference, budget, evolution=evolution)
