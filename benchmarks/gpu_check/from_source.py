"""Builds the package into a folder that PYTHONPATH finds: with cmake, or without it by commands of our own. No network, no pip."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from machine import Tools
from sections import Clock, run

ROOT = Path(__file__).resolve().parents[2]
_JOBS = os.cpu_count() or 1

Command = list[str]


@dataclass(frozen=True)
class Plan:
    """Commands to be run in order, those of one step side by side, and the libraries that come of them."""

    how: str
    steps: list[list[Command]]
    libraries: list[Path]


def version() -> str:
    """The package's version, from pyproject.toml."""
    found = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit("gpu_check: pyproject.toml: expected a line version = ...")
    return found[1]


def torch_folder() -> Path:
    """Where torch is installed; it is not imported for that."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("gpu_check: torch is not installed for this Python; nothing can be built or checked")
    return Path(spec.submodule_search_locations[0])


def cmake_plan(tools: Tools, folder: Path, architecture: str | None) -> Plan:
    """The project's own build, for one GPU architecture (None: without CUDA)."""
    cuda = tools.nvcc is not None and architecture is not None
    configure = [str(tools.cmake), "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DSKBUILD_PROJECT_VERSION={version()}"]
    configure += [f"-Dpybind11_DIR={tools.pybind11}/share/cmake/pybind11", f"-DCMAKE_CXX_COMPILER={tools.compiler}"]
    configure += [f"-DTASKLOOM_CUDA={'ON' if cuda else 'OFF'}"]
    if cuda:
        configure += [f"-DTASKLOOM_CUDA_ARCHITECTURES={architecture}-real", f"-DCMAKE_CUDA_COMPILER={tools.nvcc}"]
    if tools.ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools.ninja}"]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    libraries = [folder / "libtaskloom_cpu.so", folder / f"_native{suffix}", *([folder / "libtaskloom_cuda.so"] if cuda else [])]
    return Plan("cmake", [[configure], [[str(tools.cmake), "--build", str(folder), "--parallel", str(_JOBS)]]], libraries)


def levels() -> dict[str, list[str]]:
    """The CPU levels and their options, from the file that cmake reads them from."""
    text = (ROOT / "cmake" / "levels.cmake").read_text()
    machine = os.uname().machine
    if machine not in ("x86_64", "AMD64"):
        return {"baseline": []}
    return {name: options.split() for name, options in re.findall(r"set\(TASKLOOM_LEVEL_FLAGS_(v\d) ([^)]+)\)", text)}


def direct_plan(tools: Tools, folder: Path, architecture: str | None) -> Plan:
    """The same libraries by commands of our own, for a machine without cmake."""
    torch, csrc = torch_folder(), ROOT / "csrc"
    flags = [
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-Wall",
        "-Wextra",
        "-ffp-contract=off",
        "-DNDEBUG",
    ]
    flags += [f"-I{csrc}", *(f"-DTASKLOOM_HAS_LEVEL_{level}=1" for level in levels())]
    with_torch = ["-isystem", str(torch / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    compiler = str(tools.compiler)
    objects: dict[str, list[Path]] = {"core": [], "ops": [], "native": [], "cuda": []}
    compiles: list[Command] = []

    def compile_to(kind: str, source: Path, options: Sequence[str], tag: str = "") -> None:
        made = folder / f"{source.parent.name}-{source.stem}{tag}.o"
        compiles.append([compiler, *flags, *options, "-c", str(source), "-o", str(made)])
        objects[kind].append(made)

    loops = sorted(csrc.glob("*/*_loops.cpp"))
    for level, options in levels().items():
        own = ["-O3", *options, "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math"]
        own += ["-fno-tree-loop-distribute-patterns", "-Wno-maybe-uninitialized", "-Wno-uninitialized", f"-DTASKLOOM_LEVEL={level}"]
        for source in loops:
            compile_to("core", source, own, f"-{level}")
    for source in sorted(csrc.glob("*/*.cpp")):
        if source.parent.name != "merge" and not re.search(r"_(loops|ops|export)$", source.stem):
            compile_to("core", source, ["-O2"])
    for source in [csrc / "ops.cpp", csrc / "common" / "level_export.cpp", *sorted(csrc.glob("*/*_ops.cpp"))]:
        compile_to("ops", source, ["-O3", *with_torch])
    core = [str(path) for path in objects["core"]]
    cpu = folder / "libtaskloom_cpu.so"
    libraries, links = (
        [cpu],
        [[compiler, "-shared", "-o", str(cpu), *map(str, objects["ops"]), *core, str(torch / "lib" / "libtorch_cpu.so")]],
    )
    if tools.pybind11 is not None:
        native = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        python = ["-isystem", sysconfig.get_paths()["include"], "-isystem", f"{tools.pybind11}/include"]
        for source in [csrc / "native.cpp", *sorted(csrc.glob("merge/*.cpp"))]:
            compile_to("native", source, ["-O2", *python, *_build_facts(architecture if tools.nvcc else None)])
        links.append([compiler, "-shared", "-o", str(native), *map(str, objects["native"]), *core, "-lpthread"])
        libraries.append(native)
    if tools.nvcc is not None and architecture is not None:
        cuda, stub = folder / "libtaskloom_cuda.so", folder / "stub" / "libtorch_cuda.so"
        stub.parent.mkdir(parents=True, exist_ok=True)
        compiles.append(
            [compiler, "-shared", "-fPIC", "-o", str(stub), str(ROOT / "cmake" / "torch_cuda_stub.cpp"), "-Wl,-soname,libtorch_cuda.so"]
        )
        host = "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-ffp-contract=off"
        options = ["-std=c++20", "-O3", "-fmad=false", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", f"-Xcompiler={host}"]
        options += ["-DUSE_CUDA", "-DNDEBUG", f"-I{csrc}", *with_torch, "-cudart=static", f"-ccbin={compiler}"]
        options += [f"-DTASKLOOM_HAS_LEVEL_{level}=1" for level in levels()]
        for source in sorted(csrc.glob("*/*_cuda.cu")):
            made = folder / f"{source.stem}.o"
            compiles.append([tools.nvcc, *options, "-c", str(source), "-o", str(made)])
            objects["cuda"].append(made)
        linked = [str(torch / "lib" / "libtorch_cpu.so"), str(stub)]
        links.append([tools.nvcc, "-shared", "-cudart=static", f"-ccbin={compiler}", "-o", str(cuda), *map(str, objects["cuda"]), *linked])
        libraries.append(cuda)
    return Plan("commands of our own", [compiles, links], libraries)


def _build_facts(architecture: str | None) -> list[str]:
    facts = {
        "VERSION": version(),
        "TORCH_HEADERS": "as installed",
        "COMPILER": "as found",
        "LEVEL_NAMES": ",".join(levels()),
        "CUDA_BUILT": "nvcc" if architecture else "",
        "CUDA_ARCHITECTURES": architecture or "",
    }
    return [f'-DTASKLOOM_{name}="{value}"' for name, value in facts.items()]


def plan(tools: Tools, folder: Path) -> Plan:
    """How to build here: with cmake where it and pybind11 are there, else by commands of our own."""
    architecture = tools.torch.get("capability")
    if tools.cmake is not None and tools.pybind11 is not None:
        return cmake_plan(tools, folder, architecture)
    return direct_plan(tools, folder, architecture)


def site_of(folder: Path, libraries: Sequence[Path]) -> Path:
    """A folder for PYTHONPATH: the package's Python beside what was built."""
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    package = site / "taskloom"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "python" / "taskloom", package, ignore=ignored)
    shutil.copytree(ROOT / "triton_kernels", package / "triton_kernels", ignore=ignored)
    for library in libraries:
        shutil.copy2(library, package / library.name)
    facts = site / f"taskloom-{version()}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: taskloom\nVersion: {version()}\n")
    return site


def build(tools: Tools, folder: Path, seconds: float) -> tuple[str, Path | None, str]:
    """Build, and return how it ended, the folder for PYTHONPATH (None where it failed), and what was printed."""
    if tools.compiler is None:
        return "failed", None, "no C++ compiler was found\n"
    folder.mkdir(parents=True, exist_ok=True)
    clock, planned = Clock(seconds), plan(tools, folder)
    said = [f"building with {planned.how}"]
    for step in planned.steps:
        with ThreadPoolExecutor(max_workers=_JOBS) as pool:
            every = list(pool.map(lambda command: run(command, clock.left()), step))
        for command, ended in zip(step, every, strict=True):
            if ended.output.strip() or ended.status != 0:
                said.append(f"$ {' '.join(command)}\n{ended.output}")
        if any(ended.status is None for ended in every):
            return "cut off", None, "\n".join(said)
        if any(ended.status != 0 for ended in every):
            return "failed", None, "\n".join(said)
    return "passed", site_of(folder, planned.libraries), "\n".join(said)
