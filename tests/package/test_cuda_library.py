"""The CUDA library on a machine without a GPU: it is built and its symbols are right; nothing of it runs here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from binaries import ROOT, build_tree, needed, outside_stable_interface, symbols, undefined

import taskloom
from taskloom import _native
from taskloom.ops import _library

cpu_only_torch = pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")


@pytest.fixture
def library() -> Path:
    path = _library.find_library(_library.CUDA_LIBRARY)
    if path is None:
        assert _native.build_info()["cuda_compiler"] is None
        pytest.skip("built without nvcc")
    return path


def test_undefined_symbols_are_of_the_stable_interface(library: Path) -> None:
    names = undefined(library)
    assert outside_stable_interface(names) == []
    assert "aoti_torch_get_current_cuda_stream" in names


def test_cudart_is_static_and_python_is_not_needed(library: Path) -> None:
    assert needed(library) - {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"} == {
        "libtorch_cpu.so",
        "libtorch_cuda.so",
    }
    assert not [symbol for symbol in symbols(library, "-D", "--defined-only") if re.match(r"_*cuda[A-Z_]", symbol.name)]


def test_architectures_are_recorded(library: Path) -> None:
    info = _native.build_info()
    assert info["cuda_compiler"].startswith("nvcc ")
    assert info["cuda_architectures"]


@cpu_only_torch
@pytest.mark.usefixtures("library")
def test_a_cpu_only_torch_loads_no_cuda_library() -> None:
    assert taskloom.ops is not None
    assert not _library.CUDA.loaded
    assert "CPU-only" in _library.CUDA.reason
    assert "libtaskloom_cuda.so" not in Path("/proc/self/maps").read_text()
    assert "cuda" not in _library.native_devices("pack_mask")


def test_a_build_without_nvcc_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "find_library", lambda name: None)
    state = _library._load_cuda()
    assert not state.loaded
    assert "nvcc was not found" in state.reason


def test_a_library_of_a_later_cuda_than_torchs_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_library, "find_library", lambda name: tmp_path / name)
    monkeypatch.setattr(_library._native, "build_info", lambda: {"cuda_compiler": "nvcc 13.0.88"})
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    state = _library._load_cuda()
    assert not state.loaded
    assert state.reason == "it was built with CUDA 13, and torch is for CUDA 12.8"


def test_a_library_that_does_not_load_is_no_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / _library.CUDA_LIBRARY
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_library, "find_library", lambda name: broken)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    state = _library._load_cuda()
    assert not state.loaded
    assert "could not be loaded" in state.reason


@cpu_only_torch
def test_kernels_register_beside_the_stub_of_libtorch_cuda(library: Path) -> None:
    stub = build_tree() / "stub" / "libtorch_cuda.so"
    assert stub.is_file()
    script = (
        "import ctypes, sys, torch, taskloom.ops\n"
        "ctypes.CDLL(sys.argv[1])\n"
        "torch.ops.load_library(sys.argv[2])\n"
        "has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith('taskloom::')]\n"
        "print(*sorted(name[10:] for name in names if has_kernel(name, 'CUDA')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(stub), str(library)], capture_output=True, text=True, check=True, cwd="/")
    # tests/cuda_kernels runs those that its emulator has, and names those that have no kernel.
    assert done.stdout.split() == sorted(_registered_in_sources())


def _registered_in_sources() -> set[str]:
    sources = [path.read_text() for path in (ROOT / "csrc").glob("*/*_cuda.cu")]
    return {name for source in sources for name in re.findall(r'm\.impl\("(\w+)"', source)}


def test_kernels_use_no_stack_and_spill_nothing(library: Path) -> None:
    reports = sorted(build_tree().glob("**/*_cuda.cu.o.resources"))
    assert {report.name.removesuffix(".o.resources") for report in reports} == {path.name for path in (ROOT / "csrc").glob("*/*_cuda.cu")}
    for report in reports:
        text = report.read_text()
        kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", text)
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        assert kernels, f"{report.name}: ptxas reported nothing"
        assert {architecture for _, architecture in kernels} >= set(_native.build_info()["cuda_architectures"])
        assert set(frames) == {("0", "0", "0")}, f"{report.name}: {text}"


@pytest.mark.slow
def test_forcing_cuda_without_nvcc_is_an_error(tmp_path: Path) -> None:
    cmake, ninja, pybind11 = (pytest.importorskip(name) for name in ("cmake", "ninja", "pybind11"))
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("g++", "ar", "ranlib", "ld", "as", "bash"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA")} | {"PATH": str(tools)}
    configure = [
        f"{cmake.CMAKE_BIN_DIR}/cmake",
        *("-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja.BIN_DIR}/ninja",
        f"-DCMAKE_CXX_COMPILER={tools}/g++",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    forced = subprocess.run([*configure, "-DTASKLOOM_CUDA=ON"], capture_output=True, text=True, env=environment, check=False)
    assert forced.returncode != 0
    assert "TASKLOOM_CUDA=ON but nvcc was not found" in forced.stderr
    automatic = subprocess.run([*configure, "-DTASKLOOM_CUDA=AUTO"], capture_output=True, text=True, env=environment, check=False)
    assert automatic.returncode == 0, automatic.stderr
    assert "CUDA library not built (nvcc was not found)" in automatic.stdout
