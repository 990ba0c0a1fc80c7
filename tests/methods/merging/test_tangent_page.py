"""The page's code, run as it stands there, and the page's heat map."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import nn

from taskloom.methods.catalogue import find_method
from taskloom.methods.merging.tangent_arithmetic import heat_map
from taskloom.methods.result import read_result

PAGE = Path(__file__).parents[3] / "docs" / "methods" / "tangent_arithmetic.md"
TASKS = 2
ARMS = ("ordinary", "post-hoc", "linear")


def _names() -> dict[str, Any]:
    """What the page takes for granted: an encoder, frozen heads, loaders and validation sets."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)

    def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, 6, generator=generator)
        return x, x[:, :3].argmax(1)

    val_sets = [drawn(20) for _ in range(TASKS)]
    return {
        "torch": torch,
        "encoder": nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU()),
        "heads": [nn.Linear(8, 3).requires_grad_(False) for _ in range(TASKS)],
        "train_loaders": [[drawn(10) for _ in range(3)] for _ in range(TASKS)],
        "val_sets": val_sets,
        "val_loaders": [[batch] for batch in val_sets],
    }


@pytest.mark.filterwarnings("ignore:search_alpha. alpha 0 won")
def test_the_code_of_the_page() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names = _names()
    before = {name: value.clone() for name, value in names["encoder"].state_dict().items()}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert all(torch.equal(value, before[name]) for name, value in names["encoder"].state_dict().items())
    assert all(vector.regime == "linear" and vector.norm() > 0 for vector in names["vectors"])
    assert 0 <= float(names["xi"]) <= TASKS
    assert len(names["table"]) == 21
    # The edited model is what the search saw.
    chosen = next(row for row in names["table"] if row.alpha == names["alpha"])
    edited, pairs = names["edited"], zip(names["heads"], names["val_sets"], strict=True)
    accuracies = [float((head(edited(x)).argmax(1) == y).float().mean()) for head, (x, y) in pairs]
    assert fmean(accuracies) == pytest.approx(chosen.score, abs=0.06)


def test_heat_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert heat_map.grid(3) == [-3, 0, 3]
    found = heat_map.errors(0, heat_map.grid(3), finetune_steps=2)
    for error in found.values():
        assert tuple(error.shape) == (3, 3)
        assert error[1, 1] == 0
        assert 0 < error.max() <= 1
    heat_map.picture(found, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def _cells(row: str) -> list[str]:
    """The entries of a row of the page's table of results."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {row}")]
    assert len(lines) == 1, row
    return [cell.strip() for cell in lines[0].strip("|").split("|")][1:]


def test_the_table_is_the_shipped_result() -> None:
    addition, interference, negation, kernel = read_result(find_method("tangent_arithmetic").shipped_result()).claims
    rows = {
        "one task, its own vector": "single task",
        "sum of 8, alpha chosen": "sum",
        "the same divided by": "sum, normalised",
        "sum of 8 at alpha 1": "sum at alpha 1",
    }
    for row, value in rows.items():
        assert _cells(row) == [f"{addition.means[f'{value}, {arm}']:.3f}" for arm in ARMS]
    assert _cells("alpha chosen") == [f"{addition.means[f'chosen alpha, {arm}']:.2f}" for arm in ARMS]
    errors = {"all tasks' error / 8": [f"all tasks at alpha {alpha}" for alpha in ("0.3", "0.5", "1")]}
    errors["pairs' error"] = ["pairs at (1, 1)", "pairs at (2, 2)"]
    for row, values in errors.items():
        ordinary, post_hoc, linear = _cells(row)
        assert not post_hoc
        for arm, got in (("ordinary", ordinary), ("linear", linear)):
            assert got == ", ".join(f"{interference.means[f'{value}, {arm}']:.3f}" for value in values)
    text, means = " ".join(PAGE.read_text(encoding="utf-8").split()), negation.means
    assert _cells("negation") == [f"{means[f'target, {arm}']:.3f}, {means[f'control, {arm}']:.3f}" for arm in ARMS]
    assert f"(base {means['target, base']:.3f})" in text
    coarse = {arm: f"{means[f'target, coarse, {arm}']:.3f}" for arm in ARMS}
    first = {arm: f"{negation.values[f'target, coarse, {arm}'][0]:.3f}" for arm in ARMS}
    assert f"seed 0 ({first['linear']} against {first['ordinary']})" in text
    assert f"mean of the seeds ({coarse['linear']} against {coarse['ordinary']})" in text
    assert f"({kernel.means['pre-trained']:.3f} in the mean of |2s - 1|) as at random weights ({kernel.means['random']:.3f})" in text
    assert [claim.held for claim in (addition, interference, negation, kernel)] == [True, True, True, False]


def test_a_heat_map_of_one_point_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["heat_map", "out.png", "--steps", "1"])
    with pytest.raises(SystemExit):
        heat_map.main()
    assert "--steps: expected 2 or more, got 1" in capsys.readouterr().err
