"""The weight disentanglement error of two tasks of projected digits as a picture.

python -m taskloom.methods.merging.tangent_arithmetic.heat_map OUT.png [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from taskloom.methods.merging.tangent_arithmetic.disentanglement import disentanglement_error
from taskloom.methods.merging.tangent_arithmetic.experiment import LINEAR, ORDINARY, build_models
from taskloom.methods.threads import one_thread

PAIR = (0, 1)


def grid(steps: int) -> list[float]:
    """Coefficients from -3 to 3."""
    return [-3 + 6 * step / (steps - 1) for step in range(steps)]


@one_thread()
def errors(seed: int, alphas: list[float], finetune_steps: int = 150) -> dict[str, Tensor]:
    """The error [alpha1, alpha2] of both kinds of task vectors, a mean over the two tasks."""
    models = build_models(seed, 8, 4, finetune_steps)
    inputs = [[models.digits.tasks[task].splits["test"].inputs] for task in PAIR]
    found = {}
    for arm in (ORDINARY, LINEAR):
        vectors = [models.arms[arm].vectors[task] for task in PAIR]
        found[arm] = disentanglement_error(models.edited(arm, PAIR), vectors, inputs, alphas) / 2
    return found


def picture(found: dict[str, Tensor], path: Path) -> None:
    """Write one panel per arm; needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True)
    drawn: Any = None
    for axes, (arm, error) in zip(panels, found.items(), strict=True):
        drawn = axes.imshow(error.T.numpy(), origin="lower", extent=(-3, 3, -3, 3), vmin=0, vmax=0.5, cmap="Blues")
        axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor="#c0392b"))
        axes.set_title(f"{arm} task vectors", fontsize=9)
        axes.set_xlabel("alpha 1", fontsize=9)
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("alpha 2", fontsize=9)
    figure.colorbar(drawn, ax=panels, label="share of changed predictions")
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Heat map of the weight disentanglement error of two tasks of projected digits.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=25, help="points of the grid in each direction")
    given = parser.parse_args()
    if given.steps < 2:
        parser.error(f"--steps: expected 2 or more, got {given.steps}")
    found = errors(given.seed, grid(given.steps))
    for arm, error in found.items():
        print(f"{arm}: mean {float(error.mean()):.3f}, largest {float(error.max()):.3f}")
    picture(found, given.out)


if __name__ == "__main__":
    main()
