"""Whatever stops a command is one line on standard error, not a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A folder with models, a recipe and its output ``out``."""
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        save_file({"w": np.ones(4, np.float32)}, tmp_path / name / "model.safetensors")
    recipe = {"merge_method": "linear", "models": [{"model": "base"}, {"model": "a"}], "parameters": {"weight": 1}}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert _run(tmp_path, "merge", "recipe.yml", "out", "-q").returncode == 0
    return tmp_path


def _run(folder: Path, *arguments: str, stdout: int | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "taskloom", *arguments]
    target = subprocess.PIPE if stdout is None else stdout
    return subprocess.run(command, cwd=folder, stdout=target, stderr=subprocess.PIPE, text=True, timeout=60)


def _check(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_full_disk_under_standard_output(merged: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        for arguments in (("merge", "--list-methods"), ("inspect", "out", "--json"), ("verify", "out", "--json", "--no-digests")):
            assert "No space left on device" in _check(_run(merged, *arguments, stdout=full))
        assert "No space left" in _check(_run(merged, "diff", "base", "a", "--json", stdout=full), code=2)
    finally:
        os.close(full)


@pytest.mark.parametrize("out", ["x" * 300, "a/../" + "y" * 260 + "/z", "~no-such-user/x", "recipe.yml/out", "bad\tname/" + "z" * 256])
def test_outputs_that_cannot_be(merged: Path, out: str) -> None:
    _check(_run(merged, "merge", "recipe.yml", out))


def test_a_report_nested_beyond_reason(merged: Path) -> None:
    (merged / "out" / "merge_report.json").write_text("[" * 100_000)
    _check(_run(merged, "merge", "recipe.yml", "out", "--resume"))
    _check(_run(merged, "report", "out"))
    assert _run(merged, "inspect", "out").returncode == 0
    assert _run(merged, "verify", "out", "-q").returncode == 1


def test_a_working_directory_that_is_gone(merged: Path) -> None:
    gone = merged / "gone"
    gone.mkdir()
    script = "import os, sys; os.rmdir(os.getcwd()); from taskloom.cli.main import main; sys.argv = ['taskloom', *sys.argv[1:]]; main()"
    command = [sys.executable, "-c", script, "merge", str(merged / "recipe.yml"), "out2"]
    done = subprocess.run(command, cwd=gone, capture_output=True, text=True, timeout=60)
    _check(done)


def test_inspect_shows_what_it_can(merged: Path) -> None:
    (merged / "out" / "merge_report.json").write_text('{"version": 1, "files": [3]}')
    done = _run(merged, "inspect", "out")
    assert done.returncode == 0
    assert "merge None" not in done.stdout
    (merged / "out" / "merge_report.json").unlink()
    (merged / "out" / "taskloom_recipe.yml").write_text("merge_method: tall_masks\n")
    assert _run(merged, "inspect", "out").returncode == 0
