"""A merge that is killed at any of its steps loses nothing, and can be resumed to the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).with_name("crash_points.py")
_KINDS = ("fresh", "overwrite", "overwrite-by-two-renames")


def _crash(folder: Path, kind: str, stride: int) -> dict[str, int]:
    command = [sys.executable, str(_SCRIPT), str(folder), kind, str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


@pytest.mark.parametrize("kind", _KINDS)
def test_some_steps(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    counts = _crash(tmp_path, kind, 11)
    assert counts["crashes"] >= 5
    assert counts["resumable"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", _KINDS)
def test_every_step(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    counts = _crash(tmp_path, kind, 1)
    assert counts["crashes"] >= 40
    assert counts["resumable"] >= 20
    assert counts["absent"] + counts["as_it_was"] + counts["complete"] == counts["crashes"]
    assert counts["complete"] >= 1
    if kind == "overwrite":
        assert counts["absent"] == 0
    if kind == "overwrite-by-two-renames":
        assert counts["absent"] == 1
