"""What a run of a method's experiments found, as ``result.json`` holds it. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from statistics import fmean
from typing import Any

from taskloom.methods.catalogue import RESULT_NAME, Method, MethodError

VERSION = 1
REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced at this size"
QUICK = "quick run: too small to tell"


@dataclass(frozen=True)
class InequalityResult:
    """Whether an inequality held: on each seed, or for the means, where ``holds`` has one entry."""

    text: str
    over: str
    holds: list[bool]

    @property
    def held(self) -> bool:
        """Whether it held throughout."""
        return all(self.holds)


@dataclass(frozen=True)
class ClaimResult:
    """One experiment: its settings, ``values[arm]`` with a number per seed, and its inequalities."""

    name: str
    statement: str
    metric: str
    note: str
    config: dict[str, Any]
    baselines: list[str]
    values: dict[str, list[float]]
    inequalities: list[InequalityResult]
    seconds: list[float]

    @property
    def held(self) -> bool:
        """Whether every inequality held."""
        return all(inequality.held for inequality in self.inequalities)

    @property
    def means(self) -> dict[str, float]:
        """Each arm's mean over the seeds."""
        return {arm: fmean(values) for arm, values in self.values.items()}


@dataclass(frozen=True)
class MethodResult:
    """A run of all experiments of a method."""

    method: str
    title: str
    paper: str
    quick: bool
    device: str
    seeds: list[int]
    claims: list[ClaimResult]
    versions: dict[str, str]
    machine: str
    seconds: float
    version: int = VERSION

    @property
    def held(self) -> bool:
        """Whether every inequality of every claim held."""
        return all(claim.held for claim in self.claims)

    @property
    def verdict(self) -> str:
        """What the run says of the claims, by name where it is not the same of all; a quick run says nothing."""
        if self.quick:
            return QUICK
        held = [claim.name for claim in self.claims if claim.held]
        if self.held or not held:
            return REPRODUCED if self.held else NOT_REPRODUCED
        missed = [claim.name for claim in self.claims if not claim.held]
        return f"{', '.join(held)} {REPRODUCED}; {', '.join(missed)} {NOT_REPRODUCED}"

    def to_dict(self) -> dict[str, Any]:
        """The content of ``result.json``."""
        content = asdict(self)
        for claim, written in zip(self.claims, content["claims"], strict=True):
            written["held"] = claim.held
            for inequality, fields in zip(claim.inequalities, written["inequalities"], strict=True):
                fields["held"] = inequality.held
        return {"version": content.pop("version"), "verdict": self.verdict, "held": self.held, **content}


def _claim(content: Mapping[str, Any]) -> ClaimResult:
    fields = {name: content[name] for name in ("name", "statement", "metric", "note", "config", "baselines", "values", "seconds")}
    inequalities = [InequalityResult(one["text"], one["over"], one["holds"]) for one in content["inequalities"]]
    return ClaimResult(**fields, inequalities=inequalities)


def read_result(path: Path | Traversable) -> MethodResult:
    """Read a ``result.json``.

    Raises
    ------
    MethodError
        If it is not one, is one of another version, or cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise MethodError(f"{path}: version {content['version']} of a method's result, expected {VERSION}")
        names: Sequence[str] = ("method", "title", "paper", "quick", "device", "seeds", "versions", "machine", "seconds")
        return MethodResult(**{name: content[name] for name in names}, claims=[_claim(claim) for claim in content["claims"]])
    except OSError as error:
        raise MethodError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise MethodError(f"{path}: not the result of a method's run ({type(error).__name__}: {error})") from error


def last_result(method: Method, runs: Path) -> tuple[MethodResult, str] | None:
    """The result under ``runs/NAME`` and ``"here"``, else the one that came with the library and ``"shipped"``, else None."""
    own = runs / method.name / RESULT_NAME
    if own.is_file():
        return read_result(own), "here"
    shipped = method.shipped_result()
    return (read_result(shipped), "shipped") if shipped.is_file() else None
