"""``taskloom doctor``: what it tells, and that it works where something is missing or broken."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from taskloom import _native
from taskloom.cli import environment
from taskloom.cli.main import taskloom as command
from taskloom.ops import _library
from taskloom.ops._backends import OPS

DOCTOR = "from taskloom.cli.main import taskloom\ntaskloom(['doctor', '--json'])"


def _doctor(before: str = "", **variables: str) -> tuple[int, dict[str, Any]]:
    """Exit status and report of a doctor in a process of its own."""
    known = {name: value for name, value in os.environ.items() if name not in environment.VARIABLES} | variables
    done = subprocess.run([sys.executable, "-c", before + DOCTOR], capture_output=True, text=True, cwd="/", env=known, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, report


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    done = CliRunner().invoke(command, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    content: dict[str, Any] = json.loads(done.output)
    return content


def test_versions(report: dict[str, Any]) -> None:
    assert report["problems"] == []
    assert report["versions"]["taskloom"] == metadata.version("taskloom")
    assert report["versions"]["torch"] == metadata.version("torch")
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_build_level_and_threads(report: dict[str, Any]) -> None:
    assert report["build"] == _native.build_info()
    assert report["cpu_level"] == {"detected": _native.detected_cpu_level(), "merge": _native.cpu_level(), "ops": _library.cpu_level()}
    assert report["threads"]["torch"] == torch.get_num_threads()
    assert report["machine"]["cpu"]


def test_every_op_has_a_backend_and_reasons(report: dict[str, Any]) -> None:
    for device in ("cpu", "cuda"):
        assert set(report["backends"][device]) == set(OPS)
        for choice in report["backends"][device].values():
            assert choice["obstacles"][choice["chosen"]] is None
    assert report["backends"]["cpu"]["pack_mask"]["chosen"] == "native"
    assert report["cuda"]["library"] == {"loaded": _library.CUDA.loaded, "reason": _library.CUDA.reason}


def test_every_extra_says_what_it_is_for(report: dict[str, Any]) -> None:
    offered = set(metadata.metadata("taskloom").get_all("Provides-Extra") or []) - {"test"}
    assert set(report["extras"]) == offered
    for row in report["extras"].values():
        assert row["purpose"]
        assert row["present"] == (not row["missing"])


def test_model_cache_follows_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert environment.look_around().hub_cache == {"path": str(tmp_path), "exists": True}


def test_nothing_personal_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    for options in ([], ["--json"]):
        shown = CliRunner().invoke(command, ["doctor", *options]).output
        assert "somebody" not in shown
        assert "secret-host" not in shown
        assert "~/.cache/huggingface/hub" in shown


def test_text_holds_every_section() -> None:
    done = CliRunner().invoke(command, ["doctor"])
    assert done.exit_code == 0, done.output
    for expected in (
        "Versions",
        "Machine",
        "Build",
        "GPU",
        "Backends",
        "Extras",
        "CUDA library",
        "on cpu",
        "pack_mask",
        "No problem found.",
    ):
        assert expected in done.output
    assert done.output.isascii()


def test_a_missing_torch_is_said() -> None:
    status, report = _doctor("import sys\nsys.modules['torch'] = None\n")
    assert status == 1
    assert any("torch cannot be imported" in problem for problem in report["problems"])
    assert report["backends"] is None
    assert report["cpu_level"]["merge"] == _native.detected_cpu_level()
    assert not report["cuda"]["library"]["loaded"]


def test_an_op_library_that_does_not_load_is_said() -> None:
    broken = "import torch\ndef load(path): raise OSError('undefined symbol: aoti_torch_nothing')\ntorch.ops.load_library = load\n"
    status, report = _doctor(broken)
    assert status == 1
    assert any("undefined symbol: aoti_torch_nothing" in problem for problem in report["problems"])


def test_a_missing_op_library_is_said_with_the_places_searched() -> None:
    missing = "import importlib.resources, pathlib\nimportlib.resources.files = lambda package: pathlib.Path('/nowhere')\n"
    status, report = _doctor(missing)
    assert status == 1
    assert any("libtaskloom_cpu.so was not found (searched" in problem for problem in report["problems"])


def test_a_missing_host_module_is_said() -> None:
    status, report = _doctor("import sys\nsys.modules['taskloom._native'] = None\n")
    assert status == 1
    assert any("taskloom._native cannot be imported" in problem for problem in report["problems"])
    assert report["build"] is None


def test_wrong_variables_are_said() -> None:
    status, report = _doctor(TASKLOOM_CPU_LEVEL="v9")
    assert status == 1
    assert report["cpu_level"] == {"detected": _native.detected_cpu_level(), "merge": None, "ops": None}
    assert any("TASKLOOM_CPU_LEVEL: expected one of" in problem for problem in report["problems"])
    status, report = _doctor(TASKLOOM_BACKEND="fastest")
    assert status == 1
    assert any("TASKLOOM_BACKEND: expected one of" in problem for problem in report["problems"])
    assert report["variables"] == {"TASKLOOM_BACKEND": "fastest"}


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory = "NVIDIA Imaginary", 9, 0, 80_000_000_000

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    shown = CliRunner().invoke(command, ["doctor"]).output
    assert "NVIDIA Imaginary (capability 9.0, 80.0 GB)" in shown


def test_triton_says_why_it_is_not_used() -> None:
    gpus = [{"name": "a GPU"}]
    assert environment._triton(None, gpus, None) == {"usable": False, "reason": "triton is not installed"}
    assert environment._triton("3.6.0", [], None)["reason"] == "there is no GPU to run its kernels on"
    backends = {"cuda": {"pack_mask": {"obstacles": {"triton": "this GPU is old"}}}}
    assert environment._triton("3.6.0", gpus, backends) == {"usable": False, "reason": "this GPU is old"}
    backends["cuda"]["pack_mask"]["obstacles"]["triton"] = None
    assert environment._triton("3.6.0", gpus, backends) == {"usable": True, "reason": "its kernels can run on a GPU"}
