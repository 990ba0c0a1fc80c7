"""A wheel and an sdist, built from the source tree and used outside of it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from binaries import ROOT
from safetensors.numpy import load_file, save_file
from submodules import public_submodules

from taskloom import _native

pytestmark = pytest.mark.slow

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("TASKLOOM_", "PYTHON"))}
ENVIRONMENT["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def _run(command: Sequence[str | Path], folder: Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _build_wheel(source: Path, target: Path, *options: str) -> Path:
    isolation = () if "--build-isolation" in options else ("--no-build-isolation", "--no-deps")
    settings = [option for option in options if option != "--build-isolation"]
    _run([sys.executable, "-m", "pip", "wheel", "--quiet", *isolation, *settings, "--wheel-dir", target, source], source)
    (wheel,) = target.glob("taskloom-*.whl")
    return wheel


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel in it, and a folder outside the source tree to work in."""

    python: Path
    command: Path
    folder: Path

    def run(self, *arguments: str | Path) -> str:
        return _run([self.python, *arguments], self.folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("sdist")
    hook = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    _run([sys.executable, "-c", hook, target], ROOT)
    (archive,) = target.glob("taskloom-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    _run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # The dependencies come from here; a .pth file in a folder that a .pth file names is not read, so the editable taskloom stays away.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    _run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel], folder)
    return Installed(python, folder / "venv" / "bin" / "taskloom", folder)


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = _names(wheel)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"taskloom"}
    sources = {f"taskloom/{path.relative_to(ROOT / 'python' / 'taskloom')}" for path in (ROOT / "python" / "taskloom").rglob("*.py")}
    sources |= {f"taskloom/{path.relative_to(ROOT)}" for path in (ROOT / "triton_kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    libraries = {Path(name).name.partition(".")[0] for name in names if name.endswith(".so")}
    built = {"libtaskloom_cuda"} if _native.build_info()["cuda_compiler"] else set()
    assert libraries == {"libtaskloom_cpu", "_native"} | built
    assert not [name for name in names if "__pycache__" in name or name.endswith((".cpp", ".cu", ".h"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_wheel_is_for_this_python(wheel: Path) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"taskloom-{importlib.metadata.version('taskloom')}-{tag}-{tag}-linux_")


def test_installed_package_is_the_wheel_s(installed: Installed) -> None:
    shown = installed.run("-c", "import taskloom, taskloom._native as n; print(taskloom.__file__); print(n.__file__)").splitlines()
    assert all(path.startswith(str(installed.folder)) for path in shown)


def test_installed_ops(installed: Installed) -> None:
    script = (
        "import torch, taskloom\n"
        "from taskloom.ops import _library\n"
        "mask = torch.arange(1001) % 3 == 0\n"
        "with taskloom.backend('native'):\n"
        "    assert taskloom.unpack_mask(taskloom.pack_mask(mask), mask.shape).equal(mask)\n"
        "print(_library.find_library(_library.CPU_LIBRARY))"
    )
    assert installed.run("-c", script).startswith(str(installed.folder))


def test_wheel_and_editable_install_offer_the_same_modules(installed: Installed) -> None:
    script = Path(__file__).with_name("submodules.py")
    assert installed.run(script).split() == public_submodules()


def test_installed_doctor(installed: Installed) -> None:
    report = json.loads(_run([installed.command, "doctor", "--json"], installed.folder))
    assert report["problems"] == []
    assert report["versions"]["taskloom"] == report["build"]["version"]
    assert report["backends"]["cpu"]["pack_mask"]["chosen"] == "native"


def test_installed_merge(installed: Installed) -> None:
    models = {"base": 0.0, "a": 2.0, "b": 4.0}
    for name, value in models.items():
        (installed.folder / name).mkdir()
        save_file({"layer.weight": np.full((3, 5), value, np.float32)}, installed.folder / name / "model.safetensors")
    (installed.folder / "recipe.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
        "  - {model: a, parameters: {weight: 0.5}}\n  - {model: b, parameters: {weight: 0.25}}\ndtype: float32\n"
    )
    _run([installed.command, "merge", "recipe.yml", "merged"], installed.folder)
    merged = load_file(installed.folder / "merged" / "model.safetensors")
    assert np.array_equal(merged["layer.weight"], np.full((3, 5), 2.0, np.float32))


def test_sdist_holds_the_sources_and_no_leftovers(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, pattern in (("csrc", "*.*"), ("cmake", "*"), ("python", "*.py"), ("triton_kernels", "*.py"), ("tests", "*.py")):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if path.is_file()}
        assert files, folder
        assert files <= names, sorted(files - names)
    assert {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names
    unwanted = ("build/", "dist/", "wheelhouse/", ".venv", ".git/", ".ci", "benchmarks/results")
    assert not [name for name in names if name.startswith(unwanted) or name.endswith((".so", ".o", ".pyc", ".whl"))]


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    # What is tested is that the sources are complete: without optimisation that takes a fraction of the time.
    built = _build_wheel(source, tmp_path / "wheel", "-Ccmake.build-type=Debug", "-Ccmake.define.TASKLOOM_CUDA_ARCHITECTURES=90")
    assert _names(built) == _names(wheel)


@pytest.mark.skipif("TASKLOOM_TEST_ISOLATED_BUILD" not in os.environ, reason="downloads torch; set TASKLOOM_TEST_ISOLATED_BUILD to run it")
def test_isolated_build(tmp_path: Path, wheel: Path) -> None:
    built = _build_wheel(ROOT, tmp_path, "--build-isolation", "--no-deps", f"-Cbuild-dir={tmp_path / 'build'}")
    assert _names(built) == _names(wheel)
