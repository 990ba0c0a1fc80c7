"""The pages of the channel-routed methods say what their results say, and their code runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from pages import code_blocks, table_rows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import taskloom.methods.channels as wing
from taskloom.methods.channels.controllable_mtl import WidthConfig, count_flops
from taskloom.methods.channels.controllable_mtl.claim import CLAIMS
from taskloom.methods.channels.controllable_mtl.digit_pairs import build

PAGES = Path(__file__).parents[3] / "docs" / "methods"
RESULTS = Path(next(iter(wing.__path__)))


def _values(method: str, claim: int = 0) -> dict[str, list[float]]:
    values: dict[str, list[float]] = json.loads((RESULTS / method / "result.json").read_text())["claims"][claim]["values"]
    return values


def _row(rows: list[list[str]], label: str) -> list[str]:
    (found,) = [row[1:] for row in rows if row[0] == label]
    return found


def _assert_row(rows: list[list[str]], label: str, *columns: list[float]) -> None:
    """The numbers of each of the row's cells, as rounded as they are."""
    cells = [[cell.strip() for cell in column.split(",")] for column in _row(rows, label)]
    assert [len(cell) for cell in cells] == [len(column) for column in columns]
    for text, value in zip(itertools.chain(*cells), itertools.chain(*columns), strict=True):
        decimals = len(text.partition(".")[2])
        assert abs(float(text) - value) <= 0.5001 * 10**-decimals, f"{label}: {text} for {value}"


def test_figures_of_dtr() -> None:
    rows, values = table_rows(PAGES / "dtr.md"), _values("dtr")
    for arm, label in (("DTR", "DTR"), ("R-TR", "R-TR, random channels"), ("dense", "dense")):
        losses, distances = values[f"loss, {arm}"], values[f"Frechet distance, {arm}"]
        _assert_row(rows, label, *([value] for value in (*losses, fmean(losses), *distances, fmean(distances))))


def test_figures_of_preferences() -> None:
    rows, values = table_rows(PAGES / "controllable_mtl.md"), _values("controllable_mtl", 0)
    for ending, labels in (
        ("", ("accuracy of A", "accuracy of B")),
        (", trained alone", ("A, two networks trained alone at these widths", "B, the same two")),
    ):
        for task, other, label in (("A", "B", labels[0]), ("B", "A", labels[1])):
            arms = {preferred: values[f"{task}, {preferred} preferred{ending}"] for preferred in "AB"}
            gains = [own - less for own, less in zip(arms[task], arms[other], strict=True)]
            _assert_row(rows, label, [fmean(arms["A"])], [fmean(arms["B"])], gains)


def test_figures_of_distillation() -> None:
    rows, values = table_rows(PAGES / "controllable_mtl.md"), _values("controllable_mtl", 1)
    for arm, label in (
        ("no distillation", "none"),
        ("prefix_cos", "`prefix_cos`, gamma 1"),
        ("prefix_mse", "`prefix_mse`, gamma 0.3"),
        ("attention", "`attention`, gamma 1"),
    ):
        _assert_row(rows, label, values[f"cosine, {arm}"], values[f"accuracy, {arm}"])


def test_figures_of_the_hypervolume() -> None:
    rows, values = table_rows(PAGES / "controllable_mtl.md"), _values("controllable_mtl", 2)
    budgets = json.loads((RESULTS / "controllable_mtl" / "result.json").read_text())["claims"][2]["config"]["budgets"]
    for arm in ("controllable", "fixed decoders", "trained alone"):
        _assert_row(rows, arm, *([fmean(values[f"hypervolume{at}, {arm}"])] for at in (*(f" at {budget}" for budget in budgets), "")))


def test_figures_of_the_variations() -> None:
    rows = table_rows(PAGES / "controllable_mtl.md")
    runs = json.loads((PAGES.parents[1] / "benchmarks" / "results" / "controllable-variations.json").read_text())["runs"]
    for variation in {one["variation"] for one in runs}:
        found = sorted((one for one in runs if one["variation"] == variation), key=lambda one: int(one["seed"]))
        columns = [
            [fmean(one[budgets]["controllable"]) - fmean(one[budgets]["fixed decoders"]) for one in found]
            for budgets in ("own budgets", "even budgets")
        ]
        _assert_row(rows, variation, *columns)
    text = " ".join((PAGES / "controllable_mtl.md").read_text().split())
    ahead = sorted((one for one in runs if one["variation"] == "1200 steps"), key=lambda one: int(one["seed"]))
    arms = [", ".join(f"{one['even budgets'][arm][2]:.3f}" for one in ahead) for arm in ("controllable", "fixed decoders")]
    assert " against ".join(arms) in text


def test_narrow_decoders_buy_no_wider_encoder_at_the_budgets_of_the_experiment() -> None:
    config = CLAIMS[2].config
    model = build(config["channels"], 0)
    whole = count_flops(model, WidthConfig(1.0, {"A": 1.0, "B": 1.0}), (1, 1, 8, 8))
    for budget, width, wider in zip(config["budgets"], (0.25, 0.5, 0.75), (0.5, 0.75, 1.0), strict=True):
        assert count_flops(model, WidthConfig(width, {"A": 1.0, "B": 1.0}), (1, 1, 8, 8)) <= budget * whole
        assert count_flops(model, WidthConfig(wider, {"A": 0.25, "B": 0.25}), (1, 1, 8, 8)) > budget * whole
    grid = (0.25, 0.5, 0.75, 1.0)
    costs = {
        decoder: [count_flops(model, WidthConfig(width, {"A": 1.0, "B": decoder}), (1, 1, 8, 8)) for width in grid] for decoder in grid
    }

    def encoders(decoder: float, budget: float) -> int:
        return sum(cost <= budget * whole for cost in costs[decoder])

    assert [budget for budget in (0.2, 0.4, 0.6, 0.8) if encoders(0.25, budget) > encoders(1.0, budget)] == [0.6]


@pytest.mark.filterwarnings("ignore:Online softmax is disabled")
def test_lines_of_the_page_of_controllable_networks_run() -> None:
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.randn(2, 3, 19, 19, generator=generator)
        return x, {"segments": torch.randint(21, (2, 4, 4), generator=generator), "depth": torch.rand(2, 1, 4, 4, generator=generator)}

    scope: dict[str, Any] = {
        "batches": [batch() for _ in range(2)],
        "validation": [batch()],
        "losses": {"segments": cross_entropy, "depth": mse_loss},
        "accuracy": lambda output, target: (output.argmax(1) == target).float().mean() + 0.01,
        "error": lambda output, target: (output - target).abs().mean(),
    }
    (block,) = code_blocks(PAGES / "controllable_mtl.md")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(block, "docs/methods/controllable_mtl.md", "exec"), scope)
    assert scope["info"].flops <= 0.4 * scope["search"].full_flops
    assert scope["outputs"]["segments"].shape == (2, 21, 4, 4)
    plain: nn.Module = scope["plain"]
    for task, output in plain(scope["x"]).items():
        torch.testing.assert_close(output, scope["outputs"][task], rtol=1e-5, atol=1e-5)
