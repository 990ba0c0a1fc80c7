"""Finds and loads the op libraries, so that ``torch.ops.taskloom`` holds every op with the kernels that this torch can use."""

from __future__ import annotations

import ctypes
import importlib
import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from taskloom.ops._compile import constant_under_compile

_native: Any = importlib.import_module("taskloom._native")

CPU_LIBRARY = "libtaskloom_cpu.so"
CUDA_LIBRARY = "libtaskloom_cuda.so"

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


@dataclass(frozen=True)
class CudaState:
    """Whether the CUDA library is loaded, and in a sentence why."""

    loaded: bool
    reason: str


def find_library(name: str) -> Path | None:
    """The path of a library that was installed with the package; None where this build has none of that name."""
    found = importlib.resources.files("taskloom").joinpath(name)
    return Path(str(found)) if found.is_file() else None


def _load_cpu() -> None:
    path = find_library(CPU_LIBRARY)
    if path is None:
        import taskloom

        searched = ", ".join(str(place) for place in taskloom.__path__)
        raise ImportError(f"{CPU_LIBRARY} was not found (searched {searched}); install taskloom from a wheel or build it: pip install .")
    torch.ops.load_library(path)


def _load_cuda() -> CudaState:
    path = find_library(CUDA_LIBRARY)
    if path is None:
        return CudaState(False, "this build has no CUDA library: nvcc was not found when it was built")
    if torch.version.cuda is None:
        return CudaState(False, "torch is a CPU-only build")
    built = re.search(r"\d+", str(_native.build_info()["cuda_compiler"]))
    # Our CUDA runtime is linked in; one of a later major version asks for a later driver than this torch does.
    if built is not None and int(built.group()) > int(torch.version.cuda.partition(".")[0]):
        return CudaState(False, f"it was built with CUDA {built.group()}, and torch is for CUDA {torch.version.cuda}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return CudaState(False, f"it could not be loaded beside torch's CUDA {torch.version.cuda}: {error}")
    return CudaState(True, f"built into this package, loaded beside torch's CUDA {torch.version.cuda}")


_load_cpu()
CUDA = _load_cuda()


def architecture_obstacle(capability: tuple[int, int], architectures: Sequence[str]) -> str | None:
    """Why a library built for ``architectures`` (as ``"80"``, ``"90-real"``, ``"90a"``) has no code for a GPU; None where it has.

    Code for a capability runs on later ones of the same major version; where PTX was kept too, on every later one.
    """
    major, minor = capability
    for name in architectures:
        parts = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", name)
        if parts is None:
            continue
        own = divmod(int(parts[1]), 10)
        binary, portable = parts[3] != "-virtual", parts[3] != "-real" and not parts[2]
        if binary and own[0] == major and (own == capability if parts[2] else own[1] <= minor):
            return None
        if portable and own <= capability:
            return None
    return f"it was built for compute capability {', '.join(architectures)}, and this GPU has {major}.{minor}"


@constant_under_compile
def cuda_obstacle(device: str) -> str | None:
    """Why the loaded CUDA library cannot serve a device such as ``"cuda:1"``; None where it can."""
    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        return None
    return architecture_obstacle(torch.cuda.get_device_capability(index), _native.build_info()["cuda_architectures"])


def native_devices(op: str) -> frozenset[str]:
    """Device types for which the loaded libraries have a kernel of ``op``."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(device for device, key in _DISPATCH_KEYS.items() if has_kernel(f"taskloom::{op}", key))


@cache
def _level_functions() -> ctypes.CDLL:
    library = ctypes.CDLL(str(find_library(CPU_LIBRARY)))
    library.taskloom_ops_cpu_level.restype = ctypes.c_char_p
    library.taskloom_ops_force_cpu_level.argtypes = [ctypes.c_char_p]
    return library


def cpu_level() -> str | None:
    """Name of the CPU level that the ops' loops run at; None where TASKLOOM_CPU_LEVEL names one that cannot be had here."""
    name = _level_functions().taskloom_ops_cpu_level()
    return name.decode() if name is not None else None


def force_cpu_level(name: str) -> None:
    """Run the ops' loops at another CPU level; an empty name goes back to detection.

    Raises
    ------
    ValueError
        If this build or this machine has no such level.
    """
    if _level_functions().taskloom_ops_force_cpu_level(name.encode()) != 0:
        raise ValueError(f"cpu level: {name!r} is not a level that this build and this machine have")
