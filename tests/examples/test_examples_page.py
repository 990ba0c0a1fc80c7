"""docs/examples.md: its table is that of the shipped results, its task works, and its options exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minilm_tasks import FULL
from minilm_texts import TextTask, make_split

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    folder = ROOT / "benchmarks" / "results"
    if not folder.is_dir():
        pytest.skip("an sdist has no results")
    return [json.loads((folder / f"minilm-tasks-seed-{seed}.json").read_text()) for seed in SEEDS]


def _joined(values: list[float | None], form: str) -> str:
    return ", ".join(format(value, form) for value in values if value is not None)


def test_the_table_is_that_of_the_results(page: str, results: list[dict[str, Any]]) -> None:
    rows = {cells[0]: cells[1:] for cells in re.findall(r"^\| `([\w-]+)` \| (.*) \| (.*) \| (.*) \| (.*) \| (.*) \|$", page, re.MULTILINE)}
    assert set(rows) == {row["name"] for row in results[0]["rows"]}
    for place, row in enumerate(results[0]["rows"]):
        seeds = [result["rows"][place] for result in results]
        assert [found["name"] for found in seeds] == [row["name"]] * len(SEEDS)
        assert rows[row["name"]] == (
            _joined([found["accuracy"]["intent"] for found in seeds], ".3f"),
            _joined([found["accuracy"]["tense"] for found in seeds], ".3f"),
            _joined([found["similarity"] for found in seeds], ".3f"),
            _joined([found["alpha"] for found in seeds], "g"),
            f"{row['bytes'] / 1e6:.1f}",
        )


def test_the_results_are_of_the_full_settings(page: str, results: list[dict[str, Any]]) -> None:
    assert [result["seed"] for result in results] == list(SEEDS)
    for result in results:
        assert (result["steps"], result["texts"]) == (FULL.steps, FULL.sizes)
        assert result["versions"] == results[0]["versions"]
        for name in ("python", "torch", "transformers"):
            assert result["versions"][name] in page


def test_the_task_of_the_page_works(page: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"TextTask": TextTask}
    exec(code, names)
    task = names["TOPIC"]
    assert set(make_split(task, "train", 6, seed=0).labels) == {0, 1}
    with pytest.raises(ValueError, match="task topic"):
        make_split(task, "test", FULL.sizes["test"] // 2, seed=0)


def test_the_options_are_those_of_the_script(page: str) -> None:
    script = (ROOT / "examples" / "minilm_tasks.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(--\w+)", page, re.MULTILINE)) == set(re.findall(r'add_argument\("(--\w+)"', script))
