"""The benchmark of the routed layers' memory: forms give the same results, and no masked copy is among what ours take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench_routed_memory import LAYERS, MASKED, OURS, Layer, gate, peaks_here

SMALL: dict[str, dict[str, Any]] = {
    "window_linear": {"channels": 96, "rows": 32},
    "window_conv2d": {"channels": 24, "side": 9},
    "window_layer_norm": {"channels": 96, "rows": 32},
    "routed_dit_block": {"tokens": 4},
    "prefix_conv2d": {"channels": 24, "side": 9},
}


def small(name: str) -> Layer:
    return LAYERS[name](0.5, torch.float32, **SMALL[name])


@pytest.mark.parametrize("name", LAYERS)
def test_forms_agree(name: str) -> None:
    gate(small(name), torch.float32)


def test_a_wrong_form_is_not_measured() -> None:
    layer = small("window_layer_norm")
    wrong = replace(layer, forms={**layer.forms, OURS: lambda: 1.001 * layer.forms[MASKED]()})
    with pytest.raises(AssertionError, match="relative error"):
        gate(wrong, torch.float32)


@pytest.mark.parametrize("name", ["window_linear", "window_layer_norm"])
def test_only_the_result_is_allocated(name: str) -> None:
    layer = small(name)
    result, x = layer.run(OURS, "forward"), layer.leaves[0]
    # A norm has two numbers a row beside it; a mask or a masked copy would be more.
    assert result.nbytes <= peaks_here(layer, OURS, "forward")["allocated"] < 1.05 * result.nbytes
    assert peaks_here(layer, layer.official, "forward")["allocated"] >= x.nbytes
