"""Builds the CUDA kernels for the CPU, and gives them as ops of ``torch.ops.taskloom_emulated``."""

from __future__ import annotations

import ctypes
import fcntl
import subprocess
import sys
from functools import cache
from pathlib import Path

import cmake
import ninja
import torch

import taskloom

NAMESPACE = "taskloom_emulated"
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
_HERE = Path(__file__).parent
_definitions = torch.library.Library(NAMESPACE, "DEF")
_BUILD = _HERE.parents[1] / "build" / "cuda-emulated"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the emulated kernels do not build:\n{done.stdout}{done.stderr}")


def _built() -> Path:
    tool = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    _BUILD.mkdir(parents=True, exist_ok=True)
    with (_BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run(
            tool,
            *("-G", "Ninja", "-S", str(_HERE), "-B", str(_BUILD)),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DTASKLOOM_TORCH_DIR={Path(torch.__file__).parent}",
        )
        _run(tool, "--build", str(_BUILD))
    return _BUILD / "libtaskloom_cuda_emulated.so"


@cache
def library() -> ctypes.CDLL:
    """The emulated kernels' library, built and loaded, its ops defined with the schemas of the real ones."""
    path = _built()
    assert taskloom.ops is not None
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if name.startswith("taskloom::"):
            schema = getattr(torch.ops.taskloom, name.removeprefix("taskloom::")).default._schema
            _definitions.define(str(schema).removeprefix("taskloom::"))
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def has_kernel(op: str) -> bool:
    """Whether the emulated library has a kernel of an op."""
    library()
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CPU"))


def set_order(name: str) -> None:
    """Run blocks and their threads in an order of :data:`ORDERS`."""
    library().taskloom_emulator_order(ORDERS[name])


if __name__ == "__main__":
    sys.stdout.write(f"{_built()}\n")
