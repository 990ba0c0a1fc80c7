"""What the example says of its figures, good or bad, and what it refuses; without a model."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import minilm_tasks
from minilm_results import Results, Row, findings, mean_ratio, print_table


def _row(name: str, kind: str, intent: float, tense: float, alpha: float | None = None) -> Row:
    return Row(name, kind, {"intent": intent, "tense": tense}, 0.99, alpha, 90_900_000, None if kind == "base" else 1.25)


ROWS = [
    _row("base", "base", 0.5, 0.5),
    _row("tuned-intent", "tuned", 0.9, 0.6),
    _row("tuned-tense", "tuned", 0.5, 0.8),
    _row("task_arithmetic", "merged", 0.85, 0.75, 0.6),
    _row("ties", "merged", 0.9, 0.5, 1.0),
    _row("negated-intent", "negated", 0.5, 0.5, 0.0),
    _row("negated-tense", "negated", 0.48, 0.2, 0.7),
    _row("restored-intent", "restored", 0.89, 0.6),
    _row("restored-tense", "restored", 0.5, 0.82),
]
RESULTS = Results(
    seed=0,
    steps=60,
    threads=1,
    texts={"train": 240},
    rows=ROWS,
    norms={"intent": 0.6, "tense": 0.5},
    cosines={"intent and tense": 0.0125},
    sizes={"archive": 187_400_000, "separate": 181_700_000, "separate_and_base": 272_600_000},
    seconds={"total": 100.0},
    versions={"python": "3.11"},
)


def test_findings_say_what_failed_as_well() -> None:
    assert findings(RESULTS) == [
        "cosine of the task vectors of intent and tense: +0.013",
        "task_arithmetic: above the base on every task",
        "ties: not above the base on tense; mean accuracy -0.100 against task_arithmetic",
        "negated-intent: intent +0.000, control tense +0.000; no larger alpha lowered it and kept the control",
        "negated-tense: tense -0.300, control intent -0.020",
        "restored against tuned: intent -0.010, tense +0.020",
        "archive 187.4 MB: not smaller than the 2 tuned checkpoints (181.7 MB), 69% of them and the base (272.6 MB)",
    ]
    smaller = replace(RESULTS, sizes=RESULTS.sizes | {"archive": 100_000_000})
    assert "100.0 MB: smaller than" in findings(smaller)[-1]


def test_results_are_plain_json() -> None:
    plain = json.loads(json.dumps(RESULTS.to_dict(), allow_nan=False))
    assert plain["findings"] == findings(RESULTS)
    assert [row["name"] for row in plain["rows"]] == [row.name for row in ROWS]


def test_the_table_has_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(RESULTS)
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["checkpoint"] == ["intent", "tense", "similarity", "alpha", "MB", "s"]
    assert lines["base"] == ["0.500", "0.500", "0.990", "90.9"]
    assert lines["ties"] == ["0.900", "0.500", "0.990", "1", "90.9", "1.2"]
    assert {row.name for row in ROWS} <= set(lines)


def test_mean_ratio_is_the_normalised_accuracy() -> None:
    assert mean_ratio({"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.9}) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{full}"], "is not an empty folder"),
        (["--out", "{full}/file"], "is not an empty folder"),
        (["--out", "{new}", "--steps", "0"], "--steps: expected 1 or more, got 0"),
        ([], "--out"),
    ],
)
def test_wrong_command_lines_are_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    places = {"full": tmp_path / "full", "new": tmp_path / "new"}
    monkeypatch.setattr(sys, "argv", ["minilm_tasks.py", *(argument.format(**places) for argument in arguments)])
    with pytest.raises(SystemExit) as stopped:
        minilm_tasks.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["minilm_tasks.py", "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as stopped:
        minilm_tasks.main()
    assert "transformers is not installed: pip install 'taskloom[transformer]'" in str(stopped.value.code)
    assert not (tmp_path / "new").exists()
