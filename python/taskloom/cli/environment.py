"""What a bug report needs to know: versions, machine, build, and what would run. Nothing here fails where a part is missing or broken."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from taskloom.merge.execute import available_threads

PACKAGES = (
    *("torch", "numpy", "triton", "safetensors", "PyYAML", "pydantic", "click", "rich"),
    *("matplotlib", "huggingface_hub", "scikit-learn", "transformers"),
)
VARIABLES = ("TASKLOOM_BACKEND", "TASKLOOM_CPU_LEVEL", "TRITON_INTERPRET", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
EXTRAS = {
    "plot": "figures of a merge (taskloom merge --plot)",
    "hub": "models named by a Hugging Face id that are not in the cache yet",
    "demo": "taskloom demo",
    "peft": "adapters compared with PEFT's own, in the tests",
    "vit": "adapters in timm's vision transformers",
    "triton": "Triton kernels on GPUs",
    "transformer": "merges of a small real transformer",
}
DEVICES = ("cpu", "cuda")


@dataclass
class Environment:
    """Everything that ``taskloom doctor`` shows; ``problems`` are what keeps a part of taskloom from working."""

    versions: dict[str, str | None] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    build: dict[str, Any] | None = None
    cpu_level: dict[str, str | None] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)
    cuda: dict[str, Any] = field(default_factory=dict)
    triton: dict[str, Any] = field(default_factory=dict)
    backends: dict[str, Any] | None = None
    extras: dict[str, dict[str, Any]] = field(default_factory=dict)
    hub_cache: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _without_home(path: str | Path) -> str:
    text, home = str(path), str(Path.home())
    return "~" + text[len(home) :] if text == home or text.startswith(home + os.sep) else text


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {"platform": platform.platform(), "cpu": _cpu_model(), "cores": available_threads(), "memory_bytes": memory}


def _extras() -> dict[str, dict[str, Any]]:
    extras: dict[str, dict[str, Any]] = {}
    try:
        requirements = metadata.requires("taskloom") or []
    except metadata.PackageNotFoundError:
        return extras
    for requirement in requirements:
        package, extra = re.match(r"[\w.-]+", requirement), re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if package is None or extra is None or extra[1] not in EXTRAS:
            continue
        row = extras.setdefault(extra[1], {"present": True, "missing": [], "purpose": EXTRAS[extra[1]]})
        if _version(package[0]) is None:
            row["missing"].append(package[0])
            row["present"] = False
    return extras


def _look_at_native(environment: Environment) -> None:
    try:
        from taskloom import _native
    except ImportError as error:
        environment.problems.append(f"taskloom._native cannot be imported, so nothing can be merged: {error}")
        return
    environment.build = dict(_native.build_info())
    environment.cpu_level["detected"] = _native.detected_cpu_level()
    environment.threads["merge"] = available_threads()
    try:
        environment.cpu_level["merge"] = _native.cpu_level()
    except RuntimeError as error:
        environment.cpu_level["merge"] = None
        environment.problems.append(str(error))


def _look_at_gpus(environment: Environment) -> None:
    import torch

    environment.threads["torch"] = torch.get_num_threads()
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            gpus.append({"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory})
    environment.cuda["torch_cuda"] = torch.version.cuda
    environment.cuda["driver"] = Path("/proc/driver/nvidia/version").exists()
    environment.cuda["gpus"] = gpus


def _look_at_ops(environment: Environment) -> None:
    # A broken library shows as OSError, a missing one or a missing torch as ImportError, a wrong TASKLOOM_BACKEND as ValueError.
    try:
        import taskloom.ops as ops
        from taskloom.ops._backends import OPS, requested_backend
        from taskloom.ops._library import CUDA, cpu_level
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        environment.problems.append(f"the ops cannot be used: {error}")
        environment.cuda.setdefault("library", {"loaded": False, "reason": "the ops cannot be used"})
        return
    environment.cpu_level["ops"] = cpu_level()
    environment.cuda["library"] = {"loaded": CUDA.loaded, "reason": CUDA.reason}
    environment.backends = {"requested": requested_backend()}
    for device in DEVICES:
        explained = {name: ops.explain(name, device=device) for name in sorted(OPS)}
        environment.backends[device] = {
            name: {"chosen": explanation.chosen, "obstacles": dict(explanation.obstacles)} for name, explanation in explained.items()
        }


def _triton(version: str | None, gpus: list[Any], backends: dict[str, Any] | None) -> dict[str, Any]:
    obstacle = None
    if version is None:
        obstacle = "triton is not installed"
    elif not gpus:
        obstacle = "there is no GPU to run its kernels on"
    elif backends is not None:
        obstacle = next(iter(backends["cuda"].values()))["obstacles"]["triton"]
    return {"usable": obstacle is None, "reason": obstacle or f"its kernels can run on {gpus[0]['name']}"}


def look_around() -> Environment:
    """Find out everything that can be found out here."""
    from taskloom.merge.locate import hub_cache

    environment = Environment()
    environment.versions = {"taskloom": _version("taskloom"), "python": platform.python_version()}
    environment.versions |= {package: _version(package) for package in PACKAGES}
    environment.machine = _machine()
    environment.variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    environment.extras = _extras()
    environment.hub_cache = {"path": _without_home(hub_cache()), "exists": hub_cache().is_dir()}
    _look_at_native(environment)
    try:
        _look_at_gpus(environment)
    except (ImportError, OSError) as error:
        environment.problems.append(f"torch cannot be imported, so there are no ops (merges on the CPU need none): {error}")
        environment.cuda["library"] = {"loaded": False, "reason": "torch cannot be imported"}
    else:
        _look_at_ops(environment)
    environment.triton = _triton(environment.versions["triton"], environment.cuda.get("gpus", []), environment.backends)
    return environment
