"""Variations of the third experiment of controllable_mtl: does a controllable network cover more than one with fixed decoders?

    python benchmarks/controllable_variations.py [--only NAME] [--seeds 0 1 2] --json benchmarks/results/controllable-variations.json

Accuracies, no times: the machine does not matter. A run trains both networks as `taskloom run controllable_mtl` does, but for what the
variation changes, and takes the hypervolume of test accuracies over three preferences, at the budgets that the fixed decoders cost at
three widths of the encoder and at budgets that are evenly spaced. Runs that are in the file are not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import environment
from taskloom.methods.channels.controllable_mtl import SlimMultiTask, WidthConfig, WidthSearch, hypervolume
from taskloom.methods.channels.controllable_mtl.claim import CLAIMS, best_encoder
from taskloom.methods.channels.controllable_mtl.digit_pairs import (
    CLASSES,
    TASKS,
    Batch,
    DigitPairs,
    accuracies,
    accuracy,
    build,
    train_sandwich,
)
from taskloom.methods.claim import Trial
from taskloom.methods.threads import one_thread

SHIPPED = {**CLAIMS[2].config, "hidden": 64, "samples": 1, "falling": False}
LONGER = {"steps": 1200, "falling": True}
VARIATIONS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "1200 steps": LONGER,
    "2400 steps": {**LONGER, "steps": 2400},
    "1200 steps, decoders of 256 units": {**LONGER, "hidden": 256},
    "1200 steps, two random configurations": {**LONGER, "samples": 2},
}
EVEN = (0.2, 0.4, 0.6, 0.8)
CHANCE = [1 / CLASSES] * len(TASKS)


def trained(config: dict[str, Any], trial: Trial, decoder_widths: tuple[float, ...] | None) -> SlimMultiTask:
    """A network from the same weights and batches for the same seed."""
    return train_sandwich(
        build(config["channels"], trial.seed, config["hidden"]),
        DigitPairs(*config["train"]),
        config["steps"],
        trial.generator(1),
        lambda share: None,
        gamma=None,
        decoder_widths=decoder_widths,
        samples=config["samples"],
        falling=config["falling"],
    )


def volumes(controllable: WidthSearch, fixed: WidthSearch, models: list[SlimMultiTask], test: Batch, limits: list[int]) -> dict[str, Any]:
    """Hypervolumes of both networks at each budget, in operations."""
    found: dict[str, list[float]] = {"controllable": [], "fixed decoders": []}
    for limit in limits:
        chosen = [controllable.find(preference, limit)[0] for preference in SHIPPED["preferences"]]
        points = [[*accuracies(models[0], test, one).values()] for one in chosen]
        found["controllable"].append(hypervolume(points, CHANCE))
        found["fixed decoders"].append(hypervolume([[*accuracies(models[1], test, best_encoder(fixed, limit)).values()]], CHANCE))
    return {"shares": [limit / fixed.full_flops for limit in limits], **found}


@one_thread()
def run(variation: str, seed: int, **smaller: Any) -> dict[str, Any]:
    """One variation on one seed."""
    config = {**SHIPPED, **VARIATIONS[variation], **smaller}
    trial = Trial(seed, config, torch.device("cpu"), lambda share: None)
    test = DigitPairs(*config["test"]).draw(config["pairs"], trial.generator(2))
    held = DigitPairs(*config["validation"]).draw(config["validation pairs"], trial.generator(3))
    models = [trained(config, trial, widths) for widths in (None, (1.0,))]
    controllable, fixed = (WidthSearch(model, [held], accuracy) for model in models)
    own = [fixed.flops(WidthConfig(width, dict.fromkeys(TASKS, 1.0))) for width in controllable.grid[:-1]]
    even = [int(share * fixed.full_flops) for share in EVEN]
    return {
        "variation": variation,
        "seed": seed,
        "own budgets": volumes(controllable, fixed, models, test, own),
        "even budgets": volumes(controllable, fixed, models, test, even),
    }


def gains(runs: list[dict[str, Any]], variation: str, budgets: str) -> list[float]:
    """By how much the controllable network's mean hypervolume is larger, by seed."""
    chosen = sorted((one for one in runs if one["variation"] == variation), key=lambda one: one["seed"])
    return [fmean(one[budgets]["controllable"]) - fmean(one[budgets]["fixed decoders"]) for one in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=VARIATIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = json.loads(options.json.read_text())["runs"] if options.json and options.json.exists() else []
    for variation in [options.only] if options.only else VARIATIONS:
        for seed in options.seeds:
            if any((one["variation"], one["seed"]) == (variation, seed) for one in runs):
                continue
            runs.append(run(variation, seed))
            for budgets in ("own budgets", "even budgets"):
                print(f"{variation}, seed {seed}, {budgets}: {gains(runs[-1:], variation, budgets)[0]:+.4f}", flush=True)
            if options.json:
                found = {"settings": VARIATIONS, "versions": environment.versions(), **environment.commit(), "runs": runs}
                options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
