"""Runs a method's experiments over seeds, judges their inequalities, and writes ``result.json`` and a plot."""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryFile

import torch

from taskloom.methods.catalogue import RESULT_NAME, Method, MethodError
from taskloom.methods.claim import Claim, Inequality, Trial
from taskloom.methods.result import ClaimResult, InequalityResult, MethodResult

PLOT_NAME = "result.png"

Show = Callable[[str, float], None]


def _check_packages(method: Method, plot: bool) -> None:
    needed = (*method.needs, *((("matplotlib", "matplotlib"),) if plot else ()))
    missing = [package for module, package in needed if importlib.util.find_spec(module) is None]
    if missing:
        raise MethodError(f"{method.name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MethodError(f"device: expected a torch device such as 'cpu' or 'cuda', got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise MethodError(f"device: expected 'cpu' or 'cuda', got {name!r}, which experiments were not written for")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise MethodError(f"device: {name!r} was asked for, and torch {torch.__version__} sees no CUDA device")
        if (device.index or 0) >= torch.cuda.device_count():
            raise MethodError(f"device: {name!r} was asked for, and there are {torch.cuda.device_count()} CUDA devices")
    return device


def _judge(inequality: Inequality, values: dict[str, list[float]], seeds: int) -> InequalityResult:
    if inequality.over == "the mean":
        holds = [bool(inequality.holds({arm: fmean(numbers) for arm, numbers in values.items()}))]
    else:
        holds = [bool(inequality.holds({arm: numbers[place] for arm, numbers in values.items()})) for place in range(seeds)]
    return InequalityResult(inequality.text, inequality.over, holds)


def _run_claim(method: Method, claim: Claim, seeds: Sequence[int], quick: bool, device: torch.device, show: Show) -> ClaimResult:
    config = {**claim.config, **(claim.quick if quick else {})}
    values: dict[str, list[float]] = {}
    seconds = []
    for place, seed in enumerate(seeds):

        def progress(share: float, done: int = place) -> None:
            show(f"{method.name} {claim.name}, seed {seeds[done]}", (done + share) / len(seeds))

        progress(0.0)
        begin = time.perf_counter()
        # What draws from torch's own generator must repeat too, and must not change the caller's.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            measured = claim.measure(Trial(seed, config, device, progress))
        seconds.append(time.perf_counter() - begin)
        for arm, value in measured.items():
            if not math.isfinite(value):
                raise MethodError(f"{method.name} {claim.name}, seed {seed}: {arm} is {value}")
            values.setdefault(arm, []).append(float(value))
    if any(len(numbers) != len(seeds) for numbers in values.values()):
        raise MethodError(f"{method.name} {claim.name}: not every arm has a value on every seed")
    judged = [_judge(inequality, values, len(seeds)) for inequality in claim.inequalities]
    baselines = list(claim.baselines)
    return ClaimResult(claim.name, claim.statement, claim.metric, claim.note, config, baselines, values, judged, seconds)


def run_method(
    method: Method,
    *,
    seeds: int = 3,
    quick: bool = False,
    device: str = "cpu",
    out: Path | None = None,
    plot: bool = True,
    show: Show = lambda stage, share: None,
) -> MethodResult:
    """Run all experiments of a method.

    Parameters
    ----------
    method
        As :func:`taskloom.methods.catalogue.find_method` gives it.
    seeds
        Runs of each experiment, with seeds 0, 1, ... Default 3.
    quick
        Small settings that end within seconds; the result says nothing of the claim. Default False.
    device
        A torch device. Default ``"cpu"``.
    out
        Folder for ``result.json`` and, where ``plot`` is true (the default), ``result.png``; made where it is missing, and what an earlier
        run left in it is replaced when this one has ended. Default None: nothing is written.
    show
        Called with what is being done and the share of it that is.

    Raises
    ------
    MethodError
        If a package is missing, the device cannot be had, ``seeds`` is below 1, or an arm's value is not finite.
    OSError
        If files cannot be written to ``out``; that is tried before anything runs.
    """
    if seeds < 1:
        raise MethodError(f"seeds: expected at least 1, got {seeds}")
    plot = plot and out is not None
    _check_packages(method, plot)
    where = _device(device)
    if out is not None:
        _check_folder(out)
    begin = time.perf_counter()
    places = list(range(seeds))
    claims = [_run_claim(method, claim, places, quick, where, show) for claim in method.claims()]
    result = MethodResult(
        method=method.name,
        title=method.title,
        paper=method.paper,
        quick=quick,
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        seeds=places,
        claims=claims,
        versions={"taskloom": version("taskloom"), "torch": torch.__version__, "python": platform.python_version()},
        machine=_processor(),
        seconds=time.perf_counter() - begin,
    )
    if out is not None:
        _write(result, out, plot)
    return result


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _check_folder(out: Path) -> None:
    """Raise OSError unless files can be written to a folder; no trace is left of the attempt."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    finally:
        for folder in missing:
            if folder.is_dir():
                folder.rmdir()


def _write(result: MethodResult, out: Path, plot: bool) -> None:
    """Both files are complete before either takes the place of an earlier one."""
    fresh = {RESULT_NAME: (json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n").encode()}
    if plot:
        from taskloom.methods.plot import plot_result

        fresh[PLOT_NAME] = plot_result(result)
    out.mkdir(parents=True, exist_ok=True)
    partial = {name: out / f"{name}.partial" for name in fresh}
    try:
        for name, content in fresh.items():
            partial[name].write_bytes(content)
        for name in fresh:
            partial[name].replace(out / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
