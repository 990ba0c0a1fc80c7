"""Runs the demo: builds and saves the models, merges them with the command, evaluates and compresses."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from taskloom.archive import open_archive
from taskloom.merge import merge_checkpoints
from taskloom.methods.merging.demo.errors import DemoError
from taskloom.methods.merging.demo.folder import DemoFolder
from taskloom.methods.merging.demo.recipes import ALPHAS, METHODS, DemoMethod
from taskloom.methods.merging.demo.results import DemoResults, Row, make_row
from taskloom.methods.merging.demo.tall import TallCompression, compress
from taskloom.methods.merging.projected_digits import ProjectedDigits, build, task_name
from taskloom.methods.threads import one_thread

_WEIGHTS = "model.safetensors"


@dataclass
class _Clock:
    """Wall seconds of each named part, told to ``say`` as each ends."""

    say: Callable[[str], None]
    parts: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def part(self, name: str, description: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.parts[name] = time.perf_counter() - begin
        self.say(f"{self.parts[name]:6.1f} s  {description}")


def _task_names(digits: ProjectedDigits) -> list[str]:
    return [task_name(task) for task in range(len(digits.tasks))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pick_alpha(digits: ProjectedDigits, folder: DemoFolder, method: DemoMethod, alphas: Sequence[float]) -> float:
    """The alpha with the best mean validation accuracy, the smallest of those that tie."""
    best, best_accuracy = alphas[0], -1.0
    for alpha in alphas:
        out = folder.tuning / f"{method.name}-{alpha}"
        models = [str(folder.models / name) for name in _task_names(digits)]
        merge_checkpoints(method.recipe(str(folder.models / "base"), models, alpha, digits.seed), out, write_card=False)
        accuracy = _mean(digits.accuracies(load_file(out / _WEIGHTS), "val"))
        if accuracy > best_accuracy:
            best, best_accuracy = alpha, accuracy
    return best


def _write_recipe(digits: ProjectedDigits, folder: DemoFolder, method: DemoMethod, alpha: float | None) -> Path:
    """A recipe file that names the models by paths from its own folder."""
    models = [f"../models/{name}" for name in _task_names(digits)]
    path = folder.recipes / f"{method.name}.yml"
    path.write_text(yaml.safe_dump(method.recipe("../models/base", models, alpha, digits.seed), sort_keys=False), encoding="utf-8")
    return path


def _run_command(recipe: Path, out: Path) -> float:
    """``taskloom merge RECIPE OUT`` in a process of its own; returns its wall seconds."""
    begin = time.perf_counter()
    arguments = ["merge", recipe.name, str(out), "--quiet"]
    # From the recipe's folder, so that its relative paths cannot mean something else.
    done = subprocess.run([sys.executable, "-m", "taskloom", *arguments], cwd=recipe.parent, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoError(f"taskloom {' '.join(arguments)}: exit status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return time.perf_counter() - begin


def _merge_row(digits: ProjectedDigits, folder: DemoFolder, method: DemoMethod, alpha: float | None) -> Row:
    out = folder.merged / method.name
    seconds = _run_command(_write_recipe(digits, folder, method, alpha), out)
    report = json.loads((out / "merge_report.json").read_text(encoding="utf-8"))
    return make_row(
        method.name,
        digits.accuracies(load_file(out / _WEIGHTS)),
        digits.single_task,
        alpha=alpha,
        settings=dict(method.settings),
        seconds=seconds,
        merge_seconds=report["seconds"],
        bytes_written=(out / _WEIGHTS).stat().st_size,
        kept_density=report["total"]["kept_density"],
    )


def _reference_rows(digits: ProjectedDigits, folder: DemoFolder, compression: TallCompression) -> list[Row]:
    single, base = digits.single_task, folder.models / "base" / _WEIGHTS
    return [
        make_row("pre-trained", digits.accuracies(digits.base), single, bytes_written=base.stat().st_size),
        make_row("single-task", single, single, bytes_written=compression.separate_bytes),
    ]


def _restored_row(digits: ProjectedDigits, folder: DemoFolder, compression: TallCompression) -> Row:
    archive = open_archive(folder.tall)
    accuracy = [digits.accuracy(archive.state_dict(name), task) for task, name in enumerate(archive.tasks)]
    return make_row("tall_restored", accuracy, digits.single_task, bytes_written=compression.stored_bytes)


def _cosines(folder: DemoFolder) -> list[list[float | None]]:
    report = json.loads((folder.merged / "task_arithmetic" / "merge_report.json").read_text(encoding="utf-8"))
    cosines: list[list[float | None]] = report["total"]["cosines"]
    return cosines


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("taskloom", "torch", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def run_demo(
    folder: DemoFolder,
    *,
    seed: int = 0,
    tasks: int = 8,
    width: int = 256,
    alphas: Sequence[float] = ALPHAS,
    say: Callable[[str], None] = lambda _: None,
) -> DemoResults:
    """Build, save, merge, evaluate and compress; writes everything but the report into the folder.

    Parameters
    ----------
    folder
        From :func:`taskloom.methods.merging.demo.folder.prepare_folder`.
    seed
        Of the set-up and of the random masks of dare_ties.
    tasks
        Number of fine-tuned encoders.
    width
        Of the encoder.
    alphas
        Factors of the merged delta that are tried on the validation splits.
    say
        Called with a line when a part is done.

    Raises
    ------
    DemoError
        If the command fails.
    ImportError
        If scikit-learn is missing.
    """
    with one_thread():
        return _run(folder, seed, tasks, width, alphas, _Clock(say))


def _run(folder: DemoFolder, seed: int, tasks: int, width: int, alphas: Sequence[float], clock: _Clock) -> DemoResults:
    with clock.part("build", f"one encoder pre-trained, {tasks} fine-tuned and saved"):
        digits = build(seed, tasks, width)
        digits.save(folder.models)
    picked: dict[str, float | None] = {}
    scaled = [method for method in METHODS if method.scaled]
    with clock.part("tune", f"alpha of {len(scaled)} methods picked from {len(alphas)} by validation accuracy"):
        for method in scaled:
            picked[method.name] = _pick_alpha(digits, folder, method, alphas)
        shutil.rmtree(folder.tuning)
    folder.recipes.mkdir()
    with clock.part("merge", f"{len(METHODS)} recipes merged by `taskloom merge` and evaluated"):
        merges = [_merge_row(digits, folder, method, picked.get(method.name)) for method in METHODS]
    with clock.part("compress", "TALL-mask archive written, every task restored from it and evaluated"):
        names = _task_names(digits)
        compression = compress(folder.models, names, folder.tall, lambda task, state: digits.accuracy(state, names.index(task), "val"))
        restored = _restored_row(digits, folder, compression)
    return DemoResults(
        seed=seed,
        tasks=tasks,
        width=width,
        parameters=sum(value.numel() for value in digits.base.values()),
        alphas=list(alphas),
        rows=[*_reference_rows(digits, folder, compression), *merges, restored],
        cosines=_cosines(folder),
        compression=compression,
        seconds=clock.parts | {"total": time.perf_counter() - clock.start},
        versions=_versions(),
    )


def write_results(results: DemoResults, path: Path) -> None:
    """Write the results as JSON."""
    content: dict[str, Any] = results.to_dict()
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
