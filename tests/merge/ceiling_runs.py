"""Merges in processes of their own, whose anonymous memory is watched and limited by the kernel."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

_LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from taskloom.cli.main import main
main()
"""


@dataclass(frozen=True)
class Run:
    """A finished ``taskloom`` command and the most anonymous memory that was seen of it."""

    code: int
    output: str
    peak: int


def taskloom(*arguments: str | Path, limit: int = 0) -> Run:
    """Run ``taskloom``, with so many bytes of private writable memory (0: any number) to be had from the kernel."""
    command = [sys.executable, "-c", _LIMITED, str(limit), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        fields = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        peak = max([peak, *(1024 * int(line.split()[1]) for line in fields)])
        time.sleep(0.001)
    assert process.stdout is not None
    with process.stdout as stream:
        return Run(process.returncode, stream.read(), peak)


def bf16_models(folder: Path, values: Sequence[np.ndarray[Any, Any]], name: str = "layers.0.weight") -> list[Path]:
    """One model per array of float32 values, a single bfloat16 tensor each, written without a copy of the whole."""
    paths = []
    for number, value in enumerate(values):
        path = folder / f"m{number}"
        path.mkdir(parents=True)
        # safetensors.numpy has no bfloat16: the bits go in as such, and the header says what they are.
        bits = (np.ascontiguousarray(value, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        save_file({name: bits}, path / "model.safetensors")
        raw = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(raw[:200].replace(b'"U16"', b'"BF16"', 1).replace(b" ", b"", 1) + raw[200:])
        paths.append(path)
    return paths


def write_recipe(path: Path, method: str, models: Sequence[Path], parameters: Mapping[str, Any]) -> Path:
    """A recipe of the first model as base and the others as tasks; ``parameters`` stand in the recipe."""
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": str(model)} for model in models[1:]]}
    if method not in ("linear", "passthrough"):
        recipe["base_model"] = str(models[0])
    path.write_text(yaml.safe_dump(recipe | {"parameters": dict(parameters)}))
    return path
