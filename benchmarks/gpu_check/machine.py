"""What of the tools a build needs is on this machine, asked without importing torch into this process."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_CUDA_HOME = Path("/usr/local/cuda/bin")

_TORCH = """
import json, sys, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None, "capability": None, "memory": None, "count": 0}
if torch.cuda.is_available():
    own = torch.cuda.get_device_properties(0)
    found |= {"gpu": own.name, "capability": f"{own.major}{own.minor}", "memory": own.total_memory, "count": torch.cuda.device_count()}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Tools:
    """Paths of tools, None where one is missing, and what torch says of itself and of the GPU."""

    cmake: str | None
    ninja: str | None
    compiler: str | None
    nvcc: str | None
    sanitizer: str | None
    pybind11: str | None
    torch: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def missing(self) -> list[str]:
        """What is not there, each with what that means."""
        means = {
            "cmake": "cmake is missing: built by commands of our own",
            "ninja": "ninja is missing: cmake builds with make",
            "compiler": "a C++ compiler (g++ or c++) is missing: nothing can be built",
            "nvcc": "nvcc is missing: no CUDA kernels, Triton's alone are checked",
            "sanitizer": "compute-sanitizer is missing: memory errors are not looked for",
            "pybind11": "pybind11 is missing: the ops are built, taskloom._native (checkpoint merges, doctor) is not",
        }
        packages = {
            "pytest": "no test is run",
            "hypothesis": "tests that use it are not run",
            **dict.fromkeys(
                ("click", "pydantic", "rich", "safetensors", "xxhash", "yaml"), "merges of checkpoints, and their tests, are not run"
            ),
        }
        lacking = [f"{name} is missing: {meaning}" for name, meaning in packages.items() if importlib.util.find_spec(name) is None]
        return [*(text for name, text in means.items() if getattr(self, name) is None), *lacking]


def _found(name: str, module: str | None = None, attribute: str = "") -> str | None:
    """A program on the PATH, beside this interpreter, in the usual place of CUDA, or inside a Python package."""
    places = [None, str(Path(sys.executable).parent), str(_CUDA_HOME)]
    found = next((path for path in (shutil.which(name, path=place) for place in places) if path), None)
    spec = importlib.util.find_spec(module) if module and not found else None
    if spec is not None and spec.submodule_search_locations:
        inside = Path(spec.submodule_search_locations[0]) / attribute / name
        return str(inside) if inside.is_file() else None
    return found


def _pybind11() -> str | None:
    spec = importlib.util.find_spec("pybind11")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    return str(root) if (root / "include" / "pybind11" / "pybind11.h").is_file() else None


def ask_torch(seconds: float) -> dict[str, Any]:
    """What torch says, from a process of its own; the key ``error`` where it cannot be imported or hangs."""
    try:
        done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch took more than {seconds:.0f} s"}
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or ["python ended without a word"])[-1]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def look(seconds: float = 60.0) -> Tools:
    """Look for every tool."""
    return Tools(
        cmake=_found("cmake", "cmake", "data/bin"),
        ninja=_found("ninja", "ninja", "data/bin"),
        compiler=_found("g++") or _found("c++"),
        nvcc=_found("nvcc"),
        sanitizer=_found("compute-sanitizer"),
        pybind11=_pybind11(),
        torch=ask_torch(seconds),
    )
