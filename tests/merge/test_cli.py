"""The command line: in this process, and as a real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file
from toy_checkpoints import recipe_of, toy_tensors

from taskloom.cli.main import taskloom
from taskloom.cli.mergekit_flags import REFUSED_FLAGS, REFUSED_OPTIONS
from taskloom.merge.recipe import load_recipe
from taskloom.merge.stages import METHODS

COMMAND = Path(sys.executable).with_name("taskloom")


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(taskloom, [str(argument) for argument in arguments], prog_name="taskloom")


def _command(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, cwd=cwd, check=False, timeout=60)


@pytest.fixture
def recipe(models: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe_of(models, "dare_ties", parameters={"density": 0.5})))
    return path


def test_help_lists_every_option() -> None:
    assert _run("--help").exit_code == 0
    shown = _run("merge", "--help")
    assert shown.exit_code == 0
    for option in ("--list-methods", "--init", "--dry-run", "--json", "--shard-size", "--threads", "--seed", "--plot", "--quiet"):
        assert option in shown.output
    assert "--cuda" not in shown.output


def test_version() -> None:
    assert _run("--version").output == "taskloom 0.1.0\n"


def test_unknown_commands_and_options_name_the_nearest() -> None:
    for arguments, message in {
        ("merg",): "unknown command 'merg'; did you mean 'merge'?",
        ("frobnicate",): "unknown command 'frobnicate'\n",
        ("merge", "--dry-rnu"): "--dry-run",
        ("merge",): "missing argument RECIPE",
        ("merge", "r.yml"): "missing argument OUT",
        ("merge", "r.yml", "out", "--threads", "-1"): "--threads",
        ("merge", "r.yml", "out", "--seed", str(2**64)): "--seed",
    }.items():
        result = _run(*arguments)
        assert result.exit_code == 2, arguments
        assert message in result.output, arguments


def test_list_methods() -> None:
    text = _run("merge", "--list-methods").output
    listed = json.loads(_run("merge", "--list-methods", "--json").output)
    assert [method["name"] for method in listed] == list(METHODS)
    for method in listed:
        assert f"\n{method['name']} " in "\n" + text
        assert [parameter["name"] for parameter in method["parameters"]] == [p.name for p in METHODS[method["name"]].parameters]
    ties = {parameter["name"]: parameter for parameter in listed[list(METHODS).index("ties")]["parameters"]}
    assert (ties["weight"]["required"], ties["weight"]["per_model"], ties["density"]["default"]) == (True, True, 1.0)
    assert ties["int8_mask"]["has_effect"] is False
    assert ties["scope"]["choices"] == ["tensor", "row", "model"]


@pytest.mark.parametrize("method", METHODS)
def test_init_prints_a_recipe(tmp_path: Path, method: str) -> None:
    result = _run("merge", "--init", method)
    assert result.exit_code == 0
    (tmp_path / "recipe.yml").write_text(result.output)
    assert load_recipe(tmp_path / "recipe.yml").method.name == method


def test_init_of_an_unknown_method() -> None:
    result = _run("merge", "--init", "tie")
    assert result.exit_code == 1
    assert "did you mean 'ties'" in result.output


def test_dry_run_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    text = _run("merge", recipe, tmp_path / "out", "--dry-run", "--shard-size", "1kB")
    shown = _run("merge", recipe, "--dry-run", "--json")
    assert (text.exit_code, shown.exit_code) == (0, 0)
    assert sorted(tmp_path.rglob("*")) == before
    content = json.loads(shown.output)
    assert (content["method"], content["tensors_merged"], content["tensors_copied"]) == ("dare_ties", 9, 1)
    assert list(content["files"]) == ["model.safetensors"]
    for part in ("dare_ties", "9 merged", "1 copied", "model-00001-of-", "note: copied from"):
        assert part in text.output
    refused = _run("merge", recipe, tmp_path / "base", "--dry-run")
    assert (refused.exit_code, "is the input model" in refused.output) == (1, True)


def test_a_merge_and_its_summary(recipe: Path, tmp_path: Path) -> None:
    result = _run("merge", recipe, tmp_path / "out", "--seed", "5")
    assert result.exit_code == 0
    assert "merged 9 of 10 tensors" in result.output
    assert "sign conflicts" in result.output
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["seed"] == 5
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(toy_tensors())


def test_json_prints_the_report(recipe: Path, tmp_path: Path) -> None:
    result = _run("merge", recipe, tmp_path / "out", "--json")
    assert json.loads(result.output) == json.loads((tmp_path / "out" / "merge_report.json").read_text())


def test_options_reach_the_merge(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    mergekits = ("--random-seed", "5", "--out-shard-size", "1kB", "-j", "1", "--no-copy-tokenizer", "--no-write-model-card", "--plot")
    assert _run("merge", recipe, tmp_path / "out", "--quiet", *mergekits).output == ""
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"plots", "model.safetensors.index.json"} <= names
    assert not {"README.md", "tokenizer.json"} & names
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["seed"] == 5


@pytest.mark.parametrize("flag", [*REFUSED_FLAGS, *REFUSED_OPTIONS])
def test_flags_of_mergekit_are_refused_with_a_reason(recipe: Path, tmp_path: Path, flag: str) -> None:
    value = ["x"] if flag in REFUSED_OPTIONS else []
    result = _run("merge", recipe, tmp_path / "out", f"--{flag}", *value)
    assert result.exit_code == 2
    reason = REFUSED_FLAGS.get(flag) or REFUSED_OPTIONS[flag]
    assert f"is an option of mergekit: {reason}." in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_flags_of_mergekit_that_ask_for_what_is_done_anyway(recipe: Path, tmp_path: Path) -> None:
    assert _run("merge", recipe, tmp_path / "out", "--safe-serialization", "--no-cuda", "-q").exit_code == 0
    refused = _run("merge", recipe, tmp_path / "other", "--no-safe-serialization")
    assert (refused.exit_code, "never pickled" in refused.output) == (2, True)


def _spoil_recipe(recipe: Path, change: dict[str, Any]) -> None:
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "dare_tie"}, "did you mean 'dare_ties'"),
        ({"parameters": {"densty": 1}}, "did you mean 'density'"),
        ({"base_model": "nowhere/../base"}, "no such file or folder"),
        ({"parameters": {"density": 2}}, "at most 1"),
    ],
)
def test_errors_exit_with_1_and_write_nothing(recipe: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _spoil_recipe(recipe, change)
    before = sorted(tmp_path.rglob("*"))
    result = _run("merge", recipe, tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert message in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_debug_shows_where_an_error_comes_from(recipe: Path, tmp_path: Path) -> None:
    _spoil_recipe(recipe, {"merge_method": "nothing"})
    result = _run("merge", recipe, tmp_path / "out", "--debug")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "RecipeError"


def test_the_installed_command(recipe: Path, tmp_path: Path) -> None:
    assert _command("--help").stdout.startswith("Usage: taskloom ")
    done = _command("merge", "recipe.yml", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "merged 9 of 10 tensors" in done.stdout
    again = _command("merge", "recipe.yml", "out", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("Error: output out: is not empty")
    quiet = _command("merge", "recipe.yml", "quiet", "--quiet", cwd=tmp_path)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert (tmp_path / "quiet" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_shows_progress_unless_quiet(recipe: Path, tmp_path: Path, quiet: bool) -> None:
    ours, theirs = os.openpty()
    arguments = [COMMAND, "merge", recipe, tmp_path / "out", *(["--quiet"] if quiet else [])]
    subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=theirs, env=os.environ | {"TERM": "xterm"}, check=True, timeout=60)
    os.close(theirs)
    os.set_blocking(ours, False)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except (BlockingIOError, OSError):
        pass
    os.close(ours)
    assert (b"merging" in shown) != quiet


_WATCHED = "import sys; from taskloom.cli.main import taskloom; taskloom(sys.argv[1:], standalone_mode=False); "
_HEAVY = "print(sorted({'torch', 'numpy', 'safetensors', 'matplotlib', 'huggingface_hub', 'transformers'} & set(sys.modules)))"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["merge", "--help"],
        ["merge", "recipe.yml", "--dry-run"],
        ["merge", "recipe.yml", "--dry-run", "--device", "cuda"],
        ["merge", "recipe.yml", "out"],
        ["merge", "recipe.yml", "out", "--report"],
    ],
)
def test_nothing_heavy_is_imported(recipe: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-c", _WATCHED + _HEAVY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_nonfinite_values(recipe: Path, tmp_path: Path) -> None:
    tensors = toy_tensors(1)
    tensors["model.norm.weight"][1] = float("inf")
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    refused = _run("merge", recipe, tmp_path / "out")
    assert (refused.exit_code, "--allow-nonfinite" in refused.output) == (1, True)
    assert _run("merge", recipe, tmp_path / "out", "--allow-nonfinite", "-q").exit_code == 0


def test_room_that_is_missing_is_found_before_anything_is_merged(recipe: Path, tmp_path: Path) -> None:
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); " + _WATCHED
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run([sys.executable, "-c", limited, "merge", recipe, tmp_path / "out"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "cannot set the size of" in done.stderr
    assert "File too large" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
