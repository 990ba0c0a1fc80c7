"""The claims of the channel-routed methods: the same seed gives the same bits, for any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from taskloom.methods.catalogue import find_method
from taskloom.methods.claim import Trial

TINY: dict[tuple[str, int], dict[str, Any]] = {
    ("dtr", 0): {"steps": 2, "channels": 16, "blocks": 1, "evaluated": 16, "sampling_steps": 2, "sampled": 16},
    ("controllable_mtl", 1): {"steps": 1, "channels": 16, "pairs": 100, "kinds": ["prefix_cos"]},
    ("controllable_mtl", 2): {
        "steps": 1,
        "channels": 8,
        "pairs": 300,
        "validation pairs": 40,
        "budgets": [0.9],
        "preferences": [[0.9, 0.1]],
    },
}


@pytest.mark.parametrize(("name", "place"), list(TINY))
def test_measurements_repeat(name: str, place: int) -> None:
    claim = find_method(name).claims()[place]

    def measured(seed: int, threads: int) -> dict[str, float]:
        torch.set_num_threads(threads)
        trial = Trial(seed, {**claim.config, **claim.quick, **TINY[name, place]}, torch.device("cpu"), lambda share: None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return dict(claim.measure(trial))

    before = torch.get_num_threads()
    try:
        first = measured(0, 1)
        assert measured(0, 2) == first
        assert measured(1, 1) != first
    finally:
        torch.set_num_threads(before)
