"""An experiment that shows a paper's claim: what is measured on each seed, and the inequality between its arms that should hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Values = Mapping[str, float]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Trial:
    """One seed of an experiment.

    Attributes
    ----------
    seed
        What every random number of the trial follows from.
    config
        The claim's settings, those of a quick run where one was asked for.
    device
        Where to compute.
    progress
        To be called with the share that is done, from 0 to 1.
    """

    seed: int
    config: Mapping[str, Any]
    device: torch.device
    progress: Progress

    def part(self, place: int, parts: int) -> Progress:
        """What the ``place``-th of so many equal parts of the trial calls with its own share."""
        return lambda share: self.progress((place + share) / parts)

    def generator(self, salt: int = 0) -> torch.Generator:
        """A generator on the CPU: the same numbers for the same seed and salt, whatever the device."""
        return torch.Generator().manual_seed(1_000_003 * self.seed + salt)


@dataclass(frozen=True)
class Inequality:
    """What should hold between the arms.

    Attributes
    ----------
    text
        As a reader should see it, such as ``"pwl <= 0.85 * best rank 8"``.
    holds
        Whether it holds for the values of one seed, or for their means.
    over
        Whether it should hold on every seed or for the means over the seeds.
    """

    text: str
    holds: Callable[[Values], bool]
    over: Literal["every seed", "the mean"] = "every seed"


@dataclass(frozen=True)
class Claim:
    """One experiment of a method.

    Attributes
    ----------
    name, statement
        A short name, and the claim in a sentence.
    metric
        What the values are, with unit and direction, such as ``"test accuracy, higher is better"``.
    config
        Settings of the full run; they are written to the result.
    quick
        Settings that replace those in a quick run, so that it ends within seconds.
    measure
        Runs one seed and returns a value per arm, the baselines among them.
    baselines
        Arms that the paper compares with.
    inequalities
        The claim's gate.
    note
        What a reader should know of the size of the experiment and of what it does not show.
    """

    name: str
    statement: str
    metric: str
    measure: Callable[[Trial], Values]
    inequalities: tuple[Inequality, ...]
    baselines: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
