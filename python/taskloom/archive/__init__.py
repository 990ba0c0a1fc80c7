"""TALL-mask archives: many fine-tunings of one base in one base, one shared vector, and one bit per entry and task.

Source: "Localizing Task Information for Improved Model Merging and Compression", Wang et al., ICML 2024, arXiv 2405.07813.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskloom.archive.compress import compress_checkpoints
    from taskloom.archive.extract import ExtractReport, extract_task
    from taskloom.archive.memory import TallArchive
    from taskloom.archive.opened import OpenedArchive, open_archive
    from taskloom.archive.packed import PackedMask
    from taskloom.archive.report import CompressReport

_MODULES = {
    "CompressReport": "report",
    "ExtractReport": "extract",
    "OpenedArchive": "opened",
    "PackedMask": "packed",
    "TallArchive": "memory",
    "compress_checkpoints": "compress",
    "extract_task": "extract",
    "open_archive": "opened",
}

__all__ = [
    "CompressReport",
    "ExtractReport",
    "OpenedArchive",
    "PackedMask",
    "TallArchive",
    "compress_checkpoints",
    "extract_task",
    "open_archive",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
