"""CONTRIBUTING.md, CHANGELOG.md and docs/development.md speak of files, targets and options that exist."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata

import pytest
from binaries import ROOT

GUIDES = ("CONTRIBUTING.md", "docs/development.md", "docs/doctor.md", "CHANGELOG.md")
_PATH = re.compile(r"`((?:csrc|python|tests|docs|cmake|benchmarks|\.ci)/[\w./-]+|[A-Z]\w+\.(?:md|txt)|\.[\w-]+)`")


def _text(guide: str) -> str:
    return (ROOT / guide).read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _in_the_source_tree() -> None:
    if not (ROOT / "Makefile").is_file():
        pytest.skip("not in the source tree")


@pytest.mark.parametrize("guide", GUIDES)
def test_paths_exist(guide: str) -> None:
    paths = set(_PATH.findall(_text(guide))) - {".venv"}
    made = {path for path in paths if "NAME" in path or path.startswith("benchmarks/results")}
    missing = [path for path in paths - made if not (ROOT / path).exists()]
    # .ci/run is left out of an sdist.
    assert [path for path in missing if not path.startswith(".ci")] == []


@pytest.mark.parametrize("guide", GUIDES)
def test_make_targets_exist(guide: str) -> None:
    makefile = _text("Makefile")
    for target in re.findall(r"make ([a-z][a-z-]*)`|^ {4}make ([a-z-]+)", _text(guide), re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


def test_cmake_options_exist_with_their_defaults() -> None:
    rows = re.findall(r"^\| `(TASKLOOM_\w+)` \| `([^`]+)`", _text("docs/development.md"), re.MULTILINE)
    lists = _text("CMakeLists.txt")
    assert {name for name, _ in rows} == set(re.findall(r"(?:option\(|set\()(TASKLOOM_\w+) [^\n]*(?:CACHE|OFF\))", lists))
    for name, default in rows:
        assert re.search(rf"{name} (\"{re.escape(default)}\" CACHE|.* {re.escape(default)}\))", lists), name


def test_changelog_covers_this_version() -> None:
    sections = re.findall(r"^## \[([^\]]+)\]", _text("CHANGELOG.md"), re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert metadata.version("taskloom") in sections or sections == ["Unreleased"]


def test_release_wheels_are_for_every_supported_python() -> None:
    project = tomllib.loads(_text("pyproject.toml"))
    oldest = int(project["project"]["requires-python"].removeprefix(">=3."))
    wheels = project["tool"]["cibuildwheel"]
    assert [tag.removesuffix("-*") for tag in wheels["build"].split()] == [f"cp3{minor}" for minor in range(oldest, oldest + 4)]
    assert "--exclude 'libtorch*'" in wheels["linux"]["repair-wheel-command"]


def test_requirements_are_pinned() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            assert re.fullmatch(r"[\w.\[\]-]+==[\w.]+", line), f"{path.name}: {line}"
