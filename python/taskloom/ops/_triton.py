"""The Triton side of every op: where it can serve, and the ops of ``torch.ops.taskloom_triton`` that launch it.

Each op has a twin of the same schema in a second namespace, with the same fake kernel and autograd, whose implementation is the Python
launcher in ``taskloom.triton_kernels``. To autograd, ``torch.compile`` and ``torch.export`` a twin is one opaque op, as the native one is:
there is no graph break, and a graph shows which of the two it calls. The twins' backwards call twins.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from taskloom.ops._compile import constant_under_compile

NAMESPACE = "taskloom_triton"
LEAST_VERSION = (3, 5)
LEAST_CAPABILITY = (8, 0)
GPUS = ("cuda", "xpu")

_KERNELS = "taskloom.triton_kernels"
_KEYS = ("CPU", "CUDA", "XPU")
_library = torch.library.Library(NAMESPACE, "DEF")


@cache
def _installed_obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install taskloom[triton])"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_VERSION:
        return f"triton {version} is older than {'.'.join(map(str, LEAST_VERSION))}"
    return None


def _capability_obstacle(device: str) -> str | None:
    index = torch.device(device).index or 0
    capability = torch.cuda.get_device_capability(index) if index < torch.cuda.device_count() else LEAST_CAPABILITY
    if capability < LEAST_CAPABILITY:
        least, got = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        return f"Triton kernels need compute capability {least}, this GPU has {got}"
    return _installed_obstacle()


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for, which runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@constant_under_compile
def triton_obstacle(device: str) -> str | None:
    """Why Triton kernels cannot run on a device such as ``"cuda"`` or ``"cuda:1"``; None where they can."""
    kind = device.partition(":")[0]
    if kind == "cpu" and not interpreted():
        return "Triton kernels run on GPUs (on the CPU only in Triton's interpreter, TRITON_INTERPRET=1)"
    if kind not in ("cpu", *GPUS):
        return f"there are no Triton kernels for {kind} tensors"
    if kind in GPUS and interpreted():
        return "Triton's interpreter is on (TRITON_INTERPRET=1), and it runs kernels on the CPU"
    if kind in GPUS and not torch.get_device_module(kind).is_available():
        return f"torch sees no {kind} device"
    return _capability_obstacle(device) if kind == "cuda" else _installed_obstacle()


def _launcher(name: str, family: str) -> Callable[..., Any]:
    """The launcher of an op, which imports Triton when it is first called."""

    def launch(*arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module(f"{_KERNELS}.{family}"), name)(*arguments, **named)

    return launch


def define_twin(name: str, family: str) -> str:
    """Define the twin of an op of a family and return its qualified name."""
    schema = str(getattr(torch.ops.taskloom, name).default._schema)
    _library.define(schema.removeprefix("taskloom::"))
    launch = _launcher(name, family)
    for key in _KEYS:
        _library.impl(name, launch, key)
    return f"{NAMESPACE}::{name}"
