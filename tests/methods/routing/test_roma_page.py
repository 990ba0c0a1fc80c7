"""The code of RoMA's page, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_models import tiny_model, tiny_tokens

PAGE = Path(__file__).parents[3] / "docs" / "methods" / "roma.md"
COUNT = 8


def _is_correct(batch: dict[str, Tensor], output: Any) -> Tensor:
    return output.logits[:, -2].argsort(1, descending=True)[:, :30].eq(batch["labels"][:, -1:]).any(1)


def _names() -> dict[str, Any]:
    """What the page takes for granted."""
    tokens = tiny_tokens(COUNT, 6)
    labels = torch.where(torch.arange(6) == 5, tokens, -100)
    loader = [
        {"input_ids": tokens[rows], "attention_mask": torch.ones_like(tokens[rows]), "labels": labels[rows]}
        for rows in torch.arange(COUNT).split(4)
    ]
    embeddings = torch.nn.functional.normalize(torch.rand(COUNT, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    model = tiny_model("olmoe", num_hidden_layers=6)
    batches = list(zip(torch.arange(COUNT).split(4), loader, strict=True)) * 3
    return {"model": model, "loader": loader, "embeddings": embeddings, "is_correct": _is_correct, "batches": batches, "batch": loader[0]}


def test_the_code_of_the_page() -> None:
    if not PAGE.is_file():
        pytest.skip("the documentation is not beside the tests")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    names = _names()
    before = {name: one.clone() for name, one in names["model"].state_dict().items()}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    changed = {name for name, one in names["model"].state_dict().items() if not torch.equal(one, before[name])}
    assert changed == {f"model.layers.{place}.mlp.gate.weight" for place in range(1, 6)}
    assert torch.isfinite(names["loss"])
