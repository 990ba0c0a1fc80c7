"""The command lines of taskloom compress and taskloom extract."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from toy_archives import archive_recipe, base_state, load_model, save_models, tuned_state

from taskloom.archive import compress_checkpoints
from taskloom.cli.main import taskloom


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(taskloom, [str(argument) for argument in arguments], prog_name="taskloom")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    base = base_state()
    models = save_models(tmp_path, base, [tuned_state(base, seed) for seed in range(2)])
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(archive_recipe(models)))
    return path


def test_compress_list_and_extract(recipe: Path, tmp_path: Path) -> None:
    done = _run("compress", recipe, tmp_path / "archive")
    assert done.exit_code == 0, done.output
    for part in ("compressed 2 tasks of", "(base ", "separate ", "task-1: ", "mask density ", "relative error ", "compress_report.json"):
        assert part in done.output
    listed = _run("extract", "--list", tmp_path / "archive")
    assert listed.exit_code == 0, listed.output
    assert "2 tasks of" in listed.output
    assert "task-1  tall_mask_lambda 0.4, from" in listed.output
    content = json.loads(_run("extract", "--list", "--json", tmp_path / "archive").output)
    assert [task["name"] for task in content["tasks"]] == ["task-0", "task-1"]
    done = _run("extract", tmp_path / "archive", "task-1", tmp_path / "restored")
    assert done.exit_code == 0, done.output
    assert "restored task task-1" in done.output
    assert load_model(tmp_path / "restored").keys() == base_state().keys()
    done = _run("extract", tmp_path / "archive", "task-0", "--json")
    assert json.loads(done.output)["output"].endswith("archive-task-0")
    assert (tmp_path / "archive-task-0" / "model.safetensors").is_file()


def test_json_and_quiet(recipe: Path, tmp_path: Path) -> None:
    shown = json.loads(_run("compress", recipe, tmp_path / "archive", "--json").output)
    assert shown == json.loads((tmp_path / "archive" / "compress_report.json").read_text())
    assert _run("compress", recipe, tmp_path / "quiet", "--quiet").output == ""
    assert _run("extract", tmp_path / "quiet", "task-0", tmp_path / "restored", "-q").output == ""


def test_dry_run_writes_nothing_and_tells_the_sizes(recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    planned = json.loads(_run("compress", recipe, "--dry-run", "--json").output)
    text = _run("compress", recipe, tmp_path / "archive", "--dry-run")
    assert "would compress 2 tasks" in text.output
    assert sorted(tmp_path.rglob("*")) == before
    made = compress_checkpoints(recipe, tmp_path / "archive").to_dict()
    assert planned["sizes"] == made["sizes"]
    assert planned["files"] == made["files"]
    assert planned["preview"] is True


def test_init_prints_a_recipe_that_works(recipe: Path, tmp_path: Path) -> None:
    template = _run("compress", "--init").output
    document = yaml.safe_load(template)
    assert [entry["task"] for entry in document["models"]] == ["model-1", "model-2"]
    paths = {"path/to/base": "base", "path/to/model-1": "task-0", "path/to/model-2": "task-1"}
    for written, folder in paths.items():
        template = template.replace(written, str(tmp_path / folder))
    recipe.write_text(template)
    assert _run("compress", recipe, tmp_path / "archive").exit_code == 0
    ties = template.replace("vector: sum", "vector: ties").replace("# density", "density")
    recipe.write_text(ties)
    assert _run("compress", recipe, tmp_path / "ties").exit_code == 0


def test_errors(recipe: Path, tmp_path: Path) -> None:
    compress_checkpoints(recipe, tmp_path / "archive")
    cases: list[tuple[tuple[str | Path, ...], int, str]] = [
        (("compress",), 2, "missing argument RECIPE"),
        (("compress", recipe), 2, "missing argument OUT"),
        (("compress", recipe, tmp_path / "archive"), 1, "is not empty"),
        (("compress", tmp_path / "none.yml", tmp_path / "x"), 1, "cannot be read"),
        (("extract",), 2, "ARCHIVE"),
        (("extract", tmp_path / "archive"), 2, "missing argument TASK; --list shows"),
        (("extract", tmp_path / "archive", "tsak-1", tmp_path / "x"), 1, "did you mean 'task-1'"),
        (("extract", tmp_path / "base", "--list"), 1, "is no TALL-mask archive"),
        (("merge", recipe, tmp_path / "x"), 1, "run taskloom compress"),
    ]
    for arguments, code, message in cases:
        result = _run(*arguments)
        assert (result.exit_code, message in result.output) == (code, True), (arguments, result.output)
    assert _run("compress", recipe, tmp_path / "archive", "--overwrite").exit_code == 0


def test_planning_and_listing_bring_no_torch(recipe: Path, tmp_path: Path) -> None:
    compress_checkpoints(recipe, tmp_path / "archive")
    for arguments in (["compress", str(recipe), "--dry-run"], ["extract", "--list", str(tmp_path / "archive")]):
        script = (
            "import sys\nfrom taskloom.cli.main import taskloom\n"
            f"taskloom({arguments!r}, standalone_mode=False)\nprint('torch' in sys.modules or 'numpy' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False"
