"""One training step of a timm vision transformer with SNELLA's updates: ours beside LoRA at the same rank and the official eager form.

    python benchmarks/bench_vit_snella.py [--model vit_large_patch16_224] [--device cuda] --json benchmarks/results/vit-snella-NAME.json

A step is forward, backward and AdamW's step; weights are random and nothing is dropped. First our loss and every gradient must be those
of the official form. Then arms take steps in turn, on a GPU in bfloat16 autocast. Memory is that of a process of its own for each arm: the
rise of its peak resident size over what it held before its first step, the model included there; on a GPU the same by torch's own count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import environment
from optional import obstacle, optional_versions
from peaks import allocated_rise, resident_rise
from spread import spread, summary
from vit_arms import ARMS, CLASSES, SAME, Setting, Training, adapted, arm_obstacle, vision_transformer

# Of the loss, and of every parameter's gradient: relative. An entry within rounding of the threshold may fall on its other side.
TOLERANCES = (1e-5, 1e-2)
DEFAULT_ARMS = ("ours", "lora", "peft lora", "official")


def transformer(options: argparse.Namespace, depth: int | None) -> nn.Module:
    """The model that the options name."""
    return vision_transformer(options.model, options.pixels, depth)


def training(arm: str, model: nn.Module, options: argparse.Namespace) -> Training:
    """An arm's model on a batch that is the same for all arms."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(options.batch, 3, options.pixels, options.pixels, generator=generator).to(options.device)
    labels = torch.randint(CLASSES, (options.batch,), generator=generator).to(options.device)
    own = adapted(arm, model, Setting(options.rank, options.sparsity)).to(options.device)
    return Training(own, images, labels, torch.bfloat16 if options.device == "cuda" else None)


def gate(ours: Training, other: Training) -> dict[str, float]:
    """Raise unless two arms have the same loss and gradients; the largest relative errors."""
    (loss, mine), (expected, theirs) = ours.gradients(), other.gradients()
    assert mine.keys() == theirs.keys()
    worst = {"loss": float(((loss - expected) / expected).abs()), "gradient": 0.0}
    for path, gradient in theirs.items():
        size = torch.linalg.vector_norm(gradient.double())
        error = float(torch.linalg.vector_norm(mine[path].double() - gradient.double()) / size)
        if not error <= TOLERANCES[1]:
            raise AssertionError(f"{path}: relative error {error:.1e} of the gradient, expected at most {TOLERANCES[1]}")
        worst["gradient"] = max(worst["gradient"], error)
    if not worst["loss"] <= TOLERANCES[0]:
        raise AssertionError(f"loss: relative error {worst['loss']:.1e}, expected at most {TOLERANCES[0]}")
    return worst


def peak(arm: str, options: argparse.Namespace) -> dict[str, int]:
    """Bytes of parameters and buffers, and those that a first step holds at most beside what was there before it."""
    # What a first call loads is not the step's.
    training(arm, transformer(options, 1), argparse.Namespace(**vars(options) | {"batch": 1})).step()
    run = training(arm, transformer(options, options.depth), options)
    held = sum(one.nbytes for one in (*run.model.parameters(), *run.model.buffers()))
    return {"model_bytes": held, "rise_bytes": allocated_rise(run.step) if options.device == "cuda" else resident_rise(run.step)}


def measured_peak(arm: str, options: argparse.Namespace) -> dict[str, int]:
    names = ("model", "batch", "pixels", "rank", "sparsity", "device", "depth")
    given = [f"--{name}={getattr(options, name)}" for name in names if getattr(options, name) is not None]
    answer = subprocess.run([sys.executable, __file__, "--only", arm, *given], check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(answer.stdout.splitlines()[-1])
    return found


def measure(arms: list[str], options: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Errors, seconds and bytes of every arm."""
    runs = {arm: training(arm, model, options) for arm in arms}
    found: dict[str, Any] = {"errors": {arm: gate(runs["ours"], runs[arm]) for arm in arms if arm in SAME}, "arms": {}}
    taken: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    for place in range(options.rounds + 1):
        for arm, run in runs.items():
            # The gate was the first pass of these.
            if not place and found["errors"] and arm in ("ours", *SAME):
                continue
            begin, processor = time.perf_counter(), time.process_time()
            run.step()
            if place:
                taken[arm].append((time.perf_counter() - begin, time.process_time() - processor))
    for arm, errors in found["errors"].items():
        print(f"{arm}: relative errors of loss {errors['loss']:.1e}, of gradients at most {errors['gradient']:.1e}", flush=True)
    for arm in arms:
        walls, works = zip(*taken[arm], strict=True)
        over = [[theirs[which] / own[which] for theirs, own in zip(taken[arm], taken["ours"], strict=True)] for which in (0, 1)]
        found["arms"][arm] = {
            "trained_parameters": sum(one.numel() for one in runs[arm].trained.values()),
            "seconds": summary(walls),
            "over_ours": summary(over[0]),
            "processor_seconds": summary(works),
            "processor_over_ours": summary(over[1]),
            **measured_peak(arm, options),
        }
    return found


def report(found: dict[str, Any]) -> None:
    """Print a line for each arm."""
    lora = found["arms"].get("lora")
    columns = {"step, s": 22, "arm / ours": 20, "processor time": 20, "rise, MB": 11, "/ LoRA's": 10, "with model": 12, "/ LoRA's ": 10}
    print(f"{'arm':12}{''.join(name.rjust(width) for name, width in columns.items())}")
    for arm, one in found["arms"].items():
        times = f"{spread(one['seconds']):>22}{spread(one['over_ours'], 1):>20}{spread(one['processor_over_ours'], 1):>20}"
        total = one["rise_bytes"] + one["model_bytes"]
        shares = ("", "") if lora is None else (one["rise_bytes"] / lora["rise_bytes"], total / (lora["rise_bytes"] + lora["model_bytes"]))
        of_rise, of_total = (share if share == "" else f"{share:.3f}" for share in shares)
        print(f"{arm:12}{times}{one['rise_bytes'] / 1e6:11.0f}{of_rise:>10}{total / 1e6:12.0f}{of_total:>10}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="vit_base_patch16_224")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--pixels", type=int, default=224)
    made.add_argument("--depth", type=int, help="blocks; default: the model's")
    made.add_argument("--rank", type=int, default=32)
    made.add_argument("--sparsity", type=float, default=0.9)
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--arms", nargs="+", default=list(DEFAULT_ARMS), choices=tuple(ARMS))
    made.add_argument("--json", type=Path)
    made.add_argument("--only", choices=tuple(ARMS), help=argparse.SUPPRESS)
    return made


def main() -> int:
    """Measure, print and keep."""
    options = parser().parse_args()
    missing = obstacle("timm")
    if missing:
        print(f"{missing}: docs/lowrank.md has the command", file=sys.stderr)
        return 1
    if options.only:
        print(json.dumps(peak(options.only, options)))
        return 0
    arms = list(dict.fromkeys(("ours", *options.arms)))
    for arm in [arm for arm in arms if arm_obstacle(arm)]:
        print(f"{arm}: left out, {arm_obstacle(arm)}")
        arms.remove(arm)
    found = measure(arms, options, transformer(options, options.depth))
    report(found)
    if options.json:
        names = ("model", "batch", "pixels", "depth", "rank", "sparsity")
        surroundings = {
            "device": environment.device(),
            "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
            "versions": environment.versions() | optional_versions("timm", "peft"),
            "threads": torch.get_num_threads(),
            **environment.commit(),
            **{name: getattr(options, name) for name in names},
        }
        options.json.write_text(json.dumps(surroundings | found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
