"""The code of aTLAS's page, run as it stands there, and its table against the shipped result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from atlas_samples import encoder, tuned
from torch import Tensor, nn

from taskloom.methods.catalogue import find_method
from taskloom.methods.merging.atlas import AtlasModel, LowRankTaskVector
from taskloom.methods.result import read_result
from taskloom.methods.threads import one_thread

PAGE = Path(__file__).parents[3] / "docs" / "methods" / "atlas.md"
TASKS = ("cars", "dtd", "svhn")
CLASSES = 3


def _names() -> dict[str, Any]:
    """What the page takes for granted."""
    base = encoder()
    generator = torch.Generator().manual_seed(0)
    heads = {task: nn.Linear(5, CLASSES).requires_grad_(False) for task in TASKS}
    inputs = torch.randn(90, 7, generator=generator)
    labels = torch.arange(90) % CLASSES

    def accuracies(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {task: float((head(model(inputs)).argmax(1) == labels).double().mean()) for task, head in heads.items()}

    def strong_view(view: Tensor) -> Tensor:
        return view + 0.1 * torch.randn(view.shape, generator=generator)

    def adapter() -> LowRankTaskVector:
        factors = torch.randn(2, 7, generator=generator), torch.randn(13, 2, generator=generator), 0.5
        return LowRankTaskVector({"0.weight": factors})

    parts = [rows.split(10) for rows in torch.arange(90).split(30)]
    return {
        "encoder": base,
        "tuned": {task: tuned(base, seed) for seed, task in enumerate(TASKS, 1)},
        "heads": heads,
        "inputs": inputs,
        "labels": labels,
        "accuracies": accuracies,
        "own_accuracies": dict.fromkeys(TASKS, 0.9),
        "loader": [{task: (inputs[rows], labels[rows]) for task, rows in zip(TASKS, part, strict=True)} for part in parts],
        "strong_view": strong_view,
        "adapters": {task: adapter() for task in TASKS},
    }


@one_thread()
def test_the_code_of_the_page() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    composition, negation, shots, adaptation, mixing, low_rank = blocks
    names = _names()
    base = {name: value.clone() for name, value in names["encoder"].state_dict().items()}

    exec(compile(composition, str(PAGE), "exec"), names)
    assert names["best"].improved == bool(names["atlas"].coef.any())
    assert names["state"].keys() == base.keys()
    assert names["atlas"].coef.shape == (3, 6)
    exec(compile(negation, str(PAGE), "exec"), names)
    assert names["atlas"].coef.shape == (1, 6)
    assert names["negation"].target <= names["before"]["cars"]
    exec(compile(shots, str(PAGE), "exec"), names)
    assert names["atlas"].coef.shape == (2, 6, 10)
    assert names["atlas"].coef.abs().max() > 0
    assert len(names["shots"]) >= 1280
    exec(compile(adaptation, str(PAGE), "exec"), names)
    assert int(names["trusted"].sum()) in range(1, 10)
    exec(compile(mixing, str(PAGE), "exec"), names)
    assert names["atlas"].coef.shape == (2, 6)
    exec(compile(low_rank, str(PAGE), "exec"), names)
    assert names["atlas"].coef.grad.shape == (3, 1)

    assert not any(isinstance(module, AtlasModel) for module in names["encoder"].modules())
    assert all(torch.equal(value, base[name]) for name, value in names["encoder"].state_dict().items())


def _tables() -> dict[str, list[list[str]]]:
    """The rows of the page's tables of results, by the claim's name in the corner."""
    found: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells[1:2] == ["mean"]:
            rows = found.setdefault(cells[0], [])
        elif cells and not set(cells[0]) <= {"-"}:
            rows.append(cells)
        elif not cells:
            rows = []
    return found


def test_the_tables_are_the_shipped_results() -> None:
    result = read_result(find_method("atlas").shipped_result())
    expected = {
        claim.name: [[arm, *(f"{number:.3f}" for number in (claim.means[arm], *claim.values[arm]))] for arm in claim.values]
        for claim in result.claims
    }
    assert _tables() == expected
