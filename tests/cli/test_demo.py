"""``taskloom demo``: what it writes, what it refuses, and at full size what its figures must be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from taskloom.cli.main import taskloom
from taskloom.methods.merging.demo.errors import DemoError
from taskloom.methods.merging.demo.folder import MARKER, prepare_folder

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

MERGES = ["linear", "task_arithmetic", "ties", "dare_ties", "breadcrumbs", "consensus_ta"]
ROWS = ["pre-trained", "single-task", *MERGES, "tall_restored"]


def _demo(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(taskloom, ["demo", "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("small") / "out"
    return out, _demo(out, "--tasks", "2", "--json")


def test_everything_is_written(small: tuple[Path, Result]) -> None:
    out, result = small
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {MARKER, "models", "recipes", "merged", "tall", "results.json", "report.html"}
    assert {path.name for path in (out / "models").iterdir()} == {
        "base",
        "task-0",
        "task-1",
        "heads.safetensors",
        "projected_digits.json",
    }
    for method in MERGES:
        assert yaml.safe_load((out / "recipes" / f"{method}.yml").read_text())["merge_method"] == method
        assert (out / "merged" / method / "model.safetensors").is_file()
        assert (out / "merged" / method / "merge_report.json").is_file()


def test_json_is_complete_and_is_what_was_written(small: tuple[Path, Result]) -> None:
    out, result = small
    shown = json.loads(result.stdout)
    assert shown == json.loads((out / "results.json").read_text())
    assert [row["name"] for row in shown["rows"]] == ROWS
    for row in shown["rows"]:
        assert len(row["accuracy"]) == 2
        assert row["mean"] == pytest.approx(sum(row["accuracy"]) / 2)
        assert row["bytes_written"] > 0
        assert (row["seconds"] is not None) == (row["name"] in MERGES)
        assert (row["alpha"] in shown["alphas"]) == (row["name"] in MERGES[1:])
    assert {"build", "tune", "merge", "compress", "total"} == set(shown["seconds"])
    compression = shown["compression"]
    assert compression["stored_bytes"] == sum(compression[f"{part}_bytes"] for part in ("base", "vector", "mask", "header"))
    assert len(shown["cosines"]) == 2


def test_recipe_has_the_picked_alpha_and_runs_from_anywhere(small: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = small
    alpha = next(row["alpha"] for row in json.loads((out / "results.json").read_text())["rows"] if row["name"] == "ties")
    assert yaml.safe_load((out / "recipes" / "ties.yml").read_text())["parameters"] == {"density": 0.2, "lambda": alpha}
    result = CliRunner().invoke(taskloom, ["merge", str(out / "recipes" / "ties.yml"), str(tmp_path / "again"), "--quiet"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "merged" / "ties" / "model.safetensors").read_bytes()


def test_report_holds_every_method_and_nothing_from_outside(small: tuple[Path, Result]) -> None:
    out, _ = small
    page = (out / "report.html").read_text(encoding="utf-8")
    for method in MERGES:
        assert f"<code>{method}</code>" in page
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page
    assert ">nan<" not in page


def test_table_has_every_row_and_a_rerun_replaces_the_folder(small: tuple[Path, Result], tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_folder(out)
    (out / "tuning").mkdir()
    (out / "tuning" / "left from a demo that was cut off").touch()
    result = _demo(out, "--tasks", "2", "--seed", "0")
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines() if line.split() and line.split()[0] in ROWS] == ROWS
    assert "TALL masks: 2 checkpoints" in result.stdout
    assert not (out / "tuning").exists()
    ties = Path("merged", "ties", "model.safetensors")
    assert (out / ties).read_bytes() == (small[0] / ties).read_bytes()


def test_a_narrow_table_leaves_the_tasks_to_the_report(
    small: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from taskloom.cli import demo
    from taskloom.methods.merging.demo.results import DemoResults, Row
    from taskloom.methods.merging.demo.tall import TallCompression

    plain = json.loads((small[0] / "results.json").read_text())
    stored = {name: value for name, value in plain["compression"].items() if name not in ("stored_bytes", "ratio")}
    results = DemoResults(**plain | {"rows": [Row(**row) for row in plain["rows"]], "compression": TallCompression(**stored)})
    demo._print_table(results)
    assert " t1 " in capsys.readouterr().out
    monkeypatch.setattr(demo, "_WIDTH_WITHOUT_TERMINAL", 60)
    demo._print_table(results)
    narrow = capsys.readouterr().out
    assert " t1 " not in narrow
    assert "consensus_ta" in narrow
    assert "in the report" in narrow


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    result = _demo(tmp_path)
    assert result.exit_code == 1
    assert "was not written by the demo" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_with_something_beside_the_demo_is_refused(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path)
    folder.results.write_text("{}")
    (tmp_path / "notes.md").write_text("precious")
    with pytest.raises(DemoError, match=r"notes\.md"):
        prepare_folder(tmp_path)
    assert folder.results.exists()


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(DemoError, match="is a file"):
        prepare_folder(tmp_path / "out")


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").touch()
    folder = prepare_folder(tmp_path / "out")
    folder.models.symlink_to(kept)
    prepare_folder(tmp_path / "out")
    assert not folder.models.is_symlink()
    assert (kept / "precious").exists()


def test_a_missing_package_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *others: None if name == "matplotlib" else find(name, *others))
    result = _demo(tmp_path / "out")
    assert result.exit_code == 1
    assert "needs matplotlib, which is not installed: pip install 'taskloom[demo]'" in result.output
    assert not (tmp_path / "out").exists()


def test_help_imports_no_torch() -> None:
    command = "import sys; from taskloom.cli.main import taskloom; taskloom(['demo', '--help'], standalone_mode=False)"
    code = f"{command}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert "--tasks" in done.stdout


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "taskloom", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout


@pytest.mark.slow
def test_figures_at_full_size(tmp_path: Path) -> None:
    result = _demo(tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    shown: dict[str, Any] = json.loads(result.stdout)
    rows = {row["name"]: row for row in shown["rows"]}
    assert 0.95 <= rows["single-task"]["mean"] <= 0.98
    assert all(rows[method]["mean"] > rows["pre-trained"]["mean"] + 0.1 for method in MERGES)
    assert all(rows[method]["mean"] < rows["single-task"]["mean"] for method in MERGES)
    assert rows["tall_restored"]["normalised"] >= 0.985
    assert rows["tall_restored"]["mean"] >= rows["task_arithmetic"]["mean"] + 0.06
    assert shown["compression"]["ratio"] == pytest.approx((64 + 8) / (32 * 8), abs=0.005)
