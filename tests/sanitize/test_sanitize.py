"""The torch-free C++ under the sanitizers: clean, and with each seeded defect reported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

# What each build must report, in which words.
DEFECTS = {
    "address": {
        "read_beyond": r"AddressSanitizer: heap-buffer-overflow[\s\S]* in pack ",
        "read_beyond_page": r"AddressSanitizer: SEGV on unknown address[\s\S]*sparse_merge",
        "misaligned": r"mask_count_loops\.cpp:\d+:\d+: runtime error: load of misaligned address",
        "leak": r"LeakSanitizer: detected memory leaks[\s\S]* in leak",
    },
    "thread": {"race": r"ThreadSanitizer: data race[\s\S]* pack "},
}


def _environment() -> dict[str, str]:
    # The options are the driver's own; a level forced from outside would leave the others out.
    left_out = {"ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS", "LSAN_OPTIONS", "TASKLOOM_CPU_LEVEL"}
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    return inherited | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))}


def _run(*command: str | Path, timeout: int = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, env=_environment(), cwd=ROOT)


def _require_sanitizer(kind: str, folder: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    flags = "address,undefined" if kind == "address" else "thread"
    built = _run(compiler, f"-fsanitize={flags}", source, "-o", folder / "empty")
    if built.returncode != 0:
        pytest.skip(f"{compiler} does not build with -fsanitize={flags}: {built.stderr.strip()[-200:]}")
    started = _run(folder / "empty")
    if started.returncode != 0:
        pytest.skip(f"programs built with -fsanitize={flags} do not run here: {started.stderr.strip()[-200:]}")


@pytest.fixture(scope="module", params=["address", "thread"])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    kind = str(request.param)
    _require_sanitizer(kind, tmp_path_factory.mktemp(kind))
    # The folder of `make sanitize`, so that what is built there need not be built again.
    folder = ROOT / "build" / f"sanitize-{kind}"
    configured = _run("cmake", "-G", "Ninja", "-S", ROOT / "tests" / "sanitize", "-B", folder, f"-DTASKLOOM_SANITIZE={kind}")
    assert configured.returncode == 0, configured.stderr
    built = _run("cmake", "--build", folder)
    assert built.returncode == 0, built.stdout
    return kind, folder / "taskloom_sanitize"


def test_no_case_is_reported(build: tuple[str, Path]) -> None:
    kind, driver = build
    done = _run(driver)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    cases = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+) cases", done.stdout, re.MULTILINE)}
    assert cases["all"] == sum(cases.values()) - cases["all"]
    assert min(cases.values()) > 0
    assert {"magnitude_threshold", "sparse_merge_chunks", "thread_pool", "merge"} <= cases.keys()
    assert kind == "thread" or cases["all"] > 20000


@pytest.mark.parametrize(
    ("build", "defect"), [(kind, defect) for kind, defects in DEFECTS.items() for defect in sorted(defects)], indirect=["build"]
)
def test_a_seeded_defect_is_reported(build: tuple[str, Path], defect: str) -> None:
    kind, driver = build
    done = _run(driver, "--defect", defect)
    assert done.returncode != 0
    assert re.search(DEFECTS[kind][defect], done.stderr), done.stderr
    assert f"in case: defect {defect}" in done.stderr


def test_an_unknown_group_is_refused(build: tuple[str, Path]) -> None:
    done = _run(build[1], "no_such_group")
    assert done.returncode == 2
    assert done.stderr == "unknown group 'no_such_group'\n"
