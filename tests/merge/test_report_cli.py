"""``merge --report`` and ``taskloom report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from toy_checkpoints import recipe_of, toy_tensors

from taskloom.cli.main import taskloom
from taskloom.cli.report import report as report_command
from taskloom.merge import merge_checkpoints

DOCS = Path(__file__).parents[2] / "docs"


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(taskloom, [str(argument) for argument in arguments], prog_name="taskloom")


@pytest.fixture
def recipe(models: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe_of(models, "ties", parameters={"density": 0.5})))
    return path


def test_a_merge_writes_its_page(recipe: Path, tmp_path: Path) -> None:
    done = _run("merge", recipe, tmp_path / "out", "--report")
    assert done.exit_code == 0
    page = tmp_path / "out" / "merge_report.html"
    assert done.output.endswith(f"page: {page}\n")
    text = page.read_text(encoding="utf-8")
    for part in ("<h1>out</h1>", "self_attn.", "merge_method: ties", "it gives the same bytes again"):
        assert part in text
    assert _run("merge", recipe, tmp_path / "plain").exit_code == 0
    assert not (tmp_path / "plain" / "merge_report.html").exists()


def test_the_page_can_be_made_later(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_checkpoints(recipe, out, report=True)
    page = out / "merge_report.html"
    written = page.read_bytes()
    page.unlink()
    done = _run("report", out)
    assert (done.exit_code, done.output) == (0, f"page: {page}\n")
    assert page.read_bytes() == written
    assert _run("report", out / "merge_report.json", "--out", tmp_path / "other.html", "--quiet").output == ""
    assert (tmp_path / "other.html").read_bytes() == written


def test_a_report_away_from_its_folder_has_no_recipe(recipe: Path, tmp_path: Path) -> None:
    merge_checkpoints(recipe, tmp_path / "out")
    away = tmp_path / "away"
    away.mkdir()
    (tmp_path / "out" / "merge_report.json").rename(away / "ties.json")
    assert _run("report", away / "ties.json").exit_code == 0
    assert "is not in the folder of the report" in (away / "merge_report.html").read_text(encoding="utf-8")


def test_a_complete_merge_that_is_resumed_gets_its_page(recipe: Path, tmp_path: Path) -> None:
    assert _run("merge", recipe, tmp_path / "out", "-q").exit_code == 0
    assert _run("merge", recipe, tmp_path / "out", "-q", "--resume", "--report").exit_code == 0
    assert (tmp_path / "out" / "merge_report.html").is_file()


@pytest.mark.parametrize("method", ["slerp", "passthrough"])
def test_pages_of_merges_of_one_model(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    content: dict[str, Any] = {"merge_method": method, "models": [{"model": str(models["a"])}]}
    if method == "slerp":
        content |= {"base_model": str(models["base"]), "parameters": {"t": 0.5}}
    merge_checkpoints(content, tmp_path / "out", report=True)
    text = (tmp_path / "out" / "merge_report.html").read_text(encoding="utf-8")
    assert all(name in text.replace("<wbr>", "").replace("</wbr>", "") for name in toy_tensors())


def test_reports_that_cannot_be_read(tmp_path: Path) -> None:
    for content, message in {
        "{": "is not valid JSON",
        json.dumps({"version": 9}): "version 9 is unknown; this taskloom reads version 1",
    }.items():
        (tmp_path / "merge_report.json").write_text(content)
        done = _run("report", tmp_path)
        assert done.exit_code == 1
        assert done.output.startswith(f"Error: report {tmp_path / 'merge_report.json'}: {message}")
        assert not (tmp_path / "merge_report.html").exists()
    assert _run("report", tmp_path / "nowhere").exit_code == 1
    assert _run("report").exit_code == 2
    assert type(_run("report", tmp_path, "--debug").exception).__name__ == "ReportError"


def test_a_damaged_recipe_beside_the_report(recipe: Path, tmp_path: Path) -> None:
    merge_checkpoints(recipe, tmp_path / "out")
    (tmp_path / "out" / "taskloom_recipe.yml").write_bytes(b"\xff\xfe")
    done = _run("report", tmp_path / "out")
    assert (done.exit_code, "taskloom_recipe.yml: is not UTF-8 text" in done.output) == (1, True)


def test_every_option_is_documented() -> None:
    text = (DOCS / "report.md").read_text(encoding="utf-8")
    for parameter in report_command.params:
        for spelling in parameter.opts:
            if spelling.startswith("-"):
                assert f"`{spelling}" in text, spelling


def test_python_in_the_docs_runs(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    merge_checkpoints(recipe, tmp_path / "merged")
    monkeypatch.chdir(tmp_path)
    code = (DOCS / "report.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(compile(code, "docs/report.md", "exec"), {})
    assert capsys.readouterr().out.split()[0] in toy_tensors()
