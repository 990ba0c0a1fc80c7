"""The variations of an experiment: what a run measures, and that none is repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import controllable_variations as variations

TINY = {"steps": 1, "pairs": 100, "validation pairs": 40}


def test_a_run_has_both_networks_at_all_budgets() -> None:
    found = variations.run("1200 steps", 0, **TINY)
    assert found == variations.run("1200 steps", 0, **TINY)
    own, even = found["own budgets"], found["even budgets"]
    assert len(own["shares"]) == len(own["controllable"]) == len(own["fixed decoders"]) == 3
    assert even["shares"] == pytest.approx(variations.EVEN, abs=1e-4)
    assert 0 < own["shares"][0] < own["shares"][1] < own["shares"][2] < 1
    assert all(0 <= value < 0.81 for kind in (own, even) for arm in ("controllable", "fixed decoders") for value in kind[arm])


def test_runs_that_are_in_the_file_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(variation: str, seed: int) -> dict[str, Any]:
        done.append((variation, seed))
        return {"variation": variation, "seed": seed, **dict.fromkeys(("own budgets", "even budgets"), volumes)}

    done: list[tuple[str, int]] = []
    volumes = {"controllable": [0.5, 0.25], "fixed decoders": [0.25, 0.25]}
    monkeypatch.setattr(variations, "run", run)
    for seeds in (["0"], ["0", "1"]):
        arguments = ["variations", "--only", "as shipped", "--seeds", *seeds, "--json", str(tmp_path / "found.json")]
        monkeypatch.setattr("sys.argv", arguments)
        variations.main()
    assert done == [("as shipped", 0), ("as shipped", 1)]
    runs = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert variations.gains(runs, "as shipped", "even budgets") == [0.125, 0.125]
