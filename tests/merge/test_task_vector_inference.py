"""Task vectors whose values stay in files, in inference mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from taskloom import TaskVector
from taskloom.merge.task_vector import combination


@pytest.mark.usefixtures("poisoned_memory")
def test_pieces_are_put_together_in_inference_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combination, "PIECE", 100)
    states = [{"weight": torch.randn(37, 41, generator=torch.Generator().manual_seed(seed))} for seed in range(2)]
    paths = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    vector, expected = TaskVector.from_checkpoints(*paths), TaskVector(*states)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode():
            assert torch.equal(vector["weight"], expected["weight"])
            assert torch.equal(vector.apply_to(states[0])["weight"], expected.apply_to(states[0])["weight"])
            assert vector.norm() == expected.norm()
            kept = (2 * vector).materialize()
    finally:
        torch.set_num_threads(before)
    assert torch.equal((kept - 2 * vector)["weight"], torch.zeros(37, 41))
