"""What a benchmark ran on and with, for its JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from taskloom import _native

ROOT = Path(__file__).resolve().parent.parent

_VERSIONS = (
    "import json, platform; from importlib.metadata import version; "
    "print(json.dumps({'python': platform.python_version(), **{name: version(name) for name in ('mergekit', 'torch', 'transformers')}}))"
)


def _field(path: str, name: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def device() -> dict[str, Any]:
    """Processor, cores that may be used, level that the CPU loops run at, memory and kernel."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_level": _native.cpu_level(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release().partition("-")[0],
        "load_average": os.getloadavg()[0],
    }


def versions(peer: Path | None = None) -> dict[str, Any]:
    """Versions on our side, and on the peer's where there is one."""
    found: dict[str, Any] = {name: version(name) for name in ("taskloom", "torch", "numpy")}
    found["python"] = platform.python_version()
    if peer is not None:
        answer = subprocess.run([peer / "bin" / "python", "-c", _VERSIONS], check=True, capture_output=True, text=True)
        found["peer"] = json.loads(answer.stdout)
    return found


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether the tree had other changes."""
    return {"commit": _git("rev-parse", "HEAD") or None, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
