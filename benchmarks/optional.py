"""Packages that only some comparisons need: imported where they are, and said to be missing where they are not."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch

# Kept: a library that nothing refers to takes its declarations with it.
_declared: list[torch.library.Library] = []
_TORCHVISION = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _make_torchvision_importable() -> None:
    """Declare the two operators without which torchvision ends its import, where its library of operators cannot be loaded.

    PyPI's wheel of torchvision is built for PyPI's torch, whose CUDA libraries a torch for CPUs lacks. Vision transformers use none of
    torchvision's operators, but timm, and transformers where torchvision is there, import it.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or _declared:
        return
    try:
        for library in Path(found.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _TORCHVISION:
            declared.define(schema)
        _declared.append(declared)


def optional(name: str) -> ModuleType | None:
    """The module ``timm`` or ``peft``; None where it is not installed."""
    if importlib.util.find_spec(name) is None:
        return None
    _make_torchvision_importable()
    return importlib.import_module(name)


def obstacle(name: str) -> str | None:
    """Why a package cannot be used: it is not installed. None where it can."""
    return None if importlib.util.find_spec(name) else f"{name} is not installed"


def optional_versions(*names: str) -> dict[str, str]:
    """The versions of those that are installed, for a benchmark's JSON."""
    return {name: version(name) for name in names if obstacle(name) is None}
