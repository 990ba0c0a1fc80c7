"""Task vectors of a real transformer, from fine-tuning to merged, negated, compressed and restored checkpoints.

    python examples/minilm_tasks.py --out minilm_out

Two fine-tunings of all-MiniLM-L6-v2 (22.7 million parameters), one that tells what a support request wants and one that tells the tense
of a sentence, are written as Hugging Face folders; everything after that can be done with checkpoints of one's own. Needs
``pip install 'taskloom[transformer]'``, and downloads nothing. docs/examples.md has the table, and how to put in other tasks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

import taskloom
from minilm_model import MissingPackageError, SentenceEncoder, State, Task, finetune, make_task, packaged_model
from minilm_results import Results, Row, findings, mean_ratio, print_table
from minilm_texts import NEUTRAL, TASKS, SplitName
from taskloom.merge import merge_state_dicts

# Densities of the methods' papers. alpha, the recipe's lambda, is picked on validation texts.
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {"density": 0.2},
    "breadcrumbs": {"density": 0.15, "gamma": 0.01},
    "consensus_ta": {"tall_mask_lambda": 0.4, "consensus_k": 2},
}
# The papers let a negation cost the control task 5 % of the base's accuracy.
CONTROL_BOUND = 0.95


@dataclass(frozen=True)
class Settings:
    """The size of a run."""

    steps: int
    sizes: dict[SplitName, int]
    merge_alphas: Sequence[float]
    negation_alphas: Sequence[float]


FULL = Settings(60, {"train": 240, "val": 96, "test": 192}, (0.4, 0.6, 0.8, 1.0, 1.5, 2.0), tuple(step / 10 for step in range(11)))
QUICK = Settings(24, {"train": 192, "val": 48, "test": 96}, (0.6, 1.0), (0.0, 0.3, 0.6))


@dataclass
class Run:
    """Where a run writes, its models and tasks, and what it has found so far."""

    out: Path
    seed: int
    settings: Settings
    base: SentenceEncoder
    tasks: list[Task]
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def model(self, name: str) -> Path:
        """Folder of the base or of a task's fine-tuned checkpoint."""
        return self.out / "models" / name

    @contextmanager
    def part(self, name: str, title: str) -> Iterator[None]:
        """Announces a part of the run and takes its wall time."""
        print(f"\n{title}", flush=True)
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin

    def evaluate(
        self, name: str, kind: str, folder: Path, *, alpha: float | None = None, seconds: float | None = None, size: int | None = None
    ) -> None:
        """Load a checkpoint with transformers and add its row; ``size`` goes before that of its file."""
        encoder = SentenceEncoder(folder)
        accuracy = {task.name: task.accuracy(encoder) for task in self.tasks}
        similarity = float((encoder.embed(NEUTRAL) * self.base.embed(NEUTRAL)).sum(1).mean())
        size = (folder / "model.safetensors").stat().st_size if size is None else size
        self.rows.append(Row(name, kind, accuracy, similarity, alpha, size, seconds))
        print(f"  {name}: {', '.join(f'{task} {value:.3f}' for task, value in accuracy.items())}", flush=True)

    def validate(self, weights: State) -> dict[str, float]:
        """Validation accuracy on each task of a model with these weights."""
        encoder = SentenceEncoder(self.model("base"))
        encoder.model.load_state_dict(weights)
        return {task.name: task.accuracy(encoder, "val") for task in self.tasks}


def run_taskloom(*arguments: str | Path) -> float:
    """``taskloom ARGUMENTS``, as in a shell; its wall seconds."""
    words = [os.path.relpath(word) if isinstance(word, Path) else word for word in arguments]
    print(f"  $ taskloom {' '.join(words)}", flush=True)
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "taskloom", *words, "--quiet"], check=True)
    return time.perf_counter() - begin


def write_recipe(run: Run, name: str, recipe: dict[str, Any]) -> Path:
    """A recipe as a YAML file. The paths in it are looked up from the file's folder."""
    path = run.out / "recipes" / f"{name}.yml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({"base_model": "../models/base"} | recipe, sort_keys=False), encoding="utf-8")
    return path


def finetune_all(run: Run) -> None:
    """1. A checkpoint for each task, in a folder that transformers reads; the heads stay as they are."""
    run.base.save(run.model("base"))
    run.evaluate("base", "base", run.model("base"))
    for task in run.tasks:
        encoder = SentenceEncoder(run.model("base"))
        begin = time.perf_counter()
        finetune(encoder, task, run.settings.steps, run.seed)
        seconds = time.perf_counter() - begin
        encoder.save(run.model(task.name))
        run.evaluate(f"tuned-{task.name}", "tuned", run.model(task.name), seconds=seconds)


def read_vectors(run: Run) -> dict[str, taskloom.TaskVector]:
    """2. Task vectors, tuned minus base, straight from the folders: a tensor is read when it is asked for."""
    return {task.name: taskloom.TaskVector.from_checkpoints(run.model("base"), run.model(task.name)) for task in run.tasks}


def pick_alpha(run: Run, method: str, tuned: dict[str, State], own: dict[str, float]) -> float:
    """The alpha whose merge is the most accurate on validation texts, relative to ``own``; the smallest of those that tie.

    ``merge_state_dicts`` merges in memory, to the same bits as the command in files.
    """
    scores = {}
    for alpha in run.settings.merge_alphas:
        merged = merge_state_dicts(run.base.weights, tuned, method, weight=1.0, lambda_=alpha, **METHODS[method])
        scores[alpha] = mean_ratio(run.validate(merged), own)
    return max(scores, key=lambda alpha: scores[alpha])


def merge_all(run: Run) -> None:
    """3. One model for all tasks, by four methods."""
    tuned = {task.name: SentenceEncoder(run.model(task.name)).weights for task in run.tasks}
    own = {name: run.validate(weights)[name] for name, weights in tuned.items()}
    for method, parameters in METHODS.items():
        alpha = pick_alpha(run, method, tuned, own)
        models = [{"model": f"../models/{task.name}", "parameters": {"weight": 1.0}} for task in run.tasks]
        recipe = write_recipe(run, method, {"merge_method": method, "models": models, "parameters": parameters | {"lambda": alpha}})
        seconds = run_taskloom("merge", recipe, run.out / "merged" / method)
        run.evaluate(method, "merged", run.out / "merged" / method, alpha=alpha, seconds=seconds)


def pick_negation(run: Run, target: str, vector: taskloom.TaskVector) -> float:
    """The alpha that forgets the target most, of those that keep the other tasks, the controls, above the bound."""
    before = run.validate(run.base.weights)
    allowed = {}
    for alpha in run.settings.negation_alphas:
        found = run.validate(vector.apply_to(run.base.weights, -alpha))
        if all(found[task] >= CONTROL_BOUND * before[task] for task in found if task != target):
            allowed[alpha] = found[target]
    return min(allowed, key=lambda alpha: allowed[alpha])


def negate_all(run: Run, vectors: dict[str, taskloom.TaskVector]) -> None:
    """4. Forget one task: base - alpha * its vector. In a recipe this is task arithmetic with a negative weight."""
    for target, vector in vectors.items():
        alpha = pick_negation(run, target, vector)
        models = [{"model": f"../models/{target}", "parameters": {"weight": -alpha}}]
        recipe = write_recipe(run, f"negated-{target}", {"merge_method": "task_arithmetic", "models": models})
        seconds = run_taskloom("merge", recipe, run.out / "negated" / target)
        run.evaluate(f"negated-{target}", "negated", run.out / "negated" / target, alpha=alpha, seconds=seconds)


def compress_and_restore(run: Run) -> dict[str, int]:
    """5. One archive instead of all tuned checkpoints: base, one vector, one bit per number and task; then each task out of it."""
    models = [{"model": f"../models/{task.name}"} for task in run.tasks]
    recipe = write_recipe(run, "archive", {"merge_method": "tall_masks", "models": models})
    archive = run.out / "archive"
    run_taskloom("compress", recipe, archive)
    sizes = json.loads((archive / "compress_report.json").read_text(encoding="utf-8"))["sizes"]
    for task in run.tasks:
        folder = run.out / "restored" / task.name
        seconds = run_taskloom("extract", archive, task.name, folder)
        run.evaluate(f"restored-{task.name}", "restored", folder, seconds=seconds, size=sizes["archive"])
    return {name: sizes[name] for name in ("archive", "separate", "separate_and_base")}


def run_example(out: Path, seed: int, settings: Settings) -> Results:
    """All parts, into an empty folder; returns what was found.

    Raises
    ------
    MissingPackageError
        If a package is missing.
    CalledProcessError
        If a command fails; it has said why.
    """
    begin = time.perf_counter()
    base = SentenceEncoder(packaged_model())
    run = Run(out, seed, settings, base, [make_task(texts, base, settings.sizes, seed) for texts in TASKS])
    with run.part("finetune", f"1. Fine-tuning the encoder, {settings.steps} steps for each task, heads frozen"):
        finetune_all(run)
    with run.part("vectors", "2. Task vectors"):
        vectors = read_vectors(run)
        norms = {name: vector.norm() for name, vector in vectors.items()}
        cosines = {f"{one} and {other}": vectors[one].cosine(vectors[other]) for one, other in itertools.combinations(vectors, 2)}
        print(*(f"  length of {name}: {norm:.3f}" for name, norm in norms.items()), sep="\n")
        print(*(f"  cosine of {pair}: {cosine:+.3f}" for pair, cosine in cosines.items()), sep="\n")
    with run.part("merge", "3. Merging"):
        merge_all(run)
    with run.part("negate", "4. Negating"):
        negate_all(run, vectors)
    with run.part("compress", "5. Compressing and restoring"):
        sizes = compress_and_restore(run)
    return Results(
        seed=seed,
        steps=settings.steps,
        threads=torch.get_num_threads(),
        texts={split: len(run.tasks[0].splits[split].texts) for split in settings.sizes},
        rows=run.rows,
        norms=norms,
        cosines=cosines,
        sizes=sizes,
        seconds=run.seconds | {"total": time.perf_counter() - begin},
        versions={"python": platform.python_version()} | {name: version(name) for name in ("taskloom", "torch", "transformers")},
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty; takes 1.2 GB")
    parser.add_argument("--seed", type=int, default=0, help="of the texts and of the order they are learnt in (default 0)")
    parser.add_argument("--steps", type=int, help=f"of each fine-tuning (default {FULL.steps}, with --quick {QUICK.steps})")
    parser.add_argument("--quick", action="store_true", help="fewer steps, texts and values of alpha")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps: expected 1 or more, got {arguments.steps}")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        parser.error(f"--out: {arguments.out} is not an empty folder; choose another or remove it")
    return arguments


def main() -> None:
    """The command line."""
    arguments = _arguments()
    settings = QUICK if arguments.quick else FULL
    if arguments.steps is not None:
        settings = replace(settings, steps=arguments.steps)
    try:
        results = run_example(arguments.out, arguments.seed, settings)
    except MissingPackageError as error:
        sys.exit(f"minilm_tasks.py: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"minilm_tasks.py: the command above failed with exit status {error.returncode}")
    path = arguments.out / "results.json"
    path.write_text(json.dumps(results.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print()
    print_table(results)
    print(*findings(results), sep="\n")
    print(f"{results.seconds['total']:.0f} s in all; {path}")


if __name__ == "__main__":
    main()
