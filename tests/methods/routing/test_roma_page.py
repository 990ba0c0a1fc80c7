"""The code of RoMA's page, run as it stands there."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_models import tiny_model, tiny_tokens

PAGE = Path(__file__).parents[3] / "docs" / "methods" / "roma.md"
COUNT = 8


# Answers of several tokens, with padding behind some.
STARTS = torch.tensor([2, 4, 3, 2, 3, 4, 2, 3])
LENGTHS = torch.tensor([6, 6, 5, 6, 6, 6, 4, 6])


def _is_correct(batch: dict[str, Tensor], output: Any) -> Tensor:
    return output.logits[:, -2].argsort(1, descending=True)[:, :30].eq(batch["input_ids"][:, -1:]).any(1)


def _names() -> dict[str, Any]:
    """What the page takes for granted."""
    tokens = tiny_tokens(COUNT, 6)
    mask = torch.arange(6) < LENGTHS[:, None]
    labels = torch.where(mask & (torch.arange(6) >= STARTS[:, None]), tokens, -100)
    loader = [
        {"input_ids": tokens[rows], "attention_mask": mask[rows].long(), "labels": labels[rows]} for rows in torch.arange(COUNT).split(4)
    ]
    generator = torch.Generator().manual_seed(0)
    embeddings, others = (torch.nn.functional.normalize(torch.rand(rows, 5, generator=generator), dim=1) for rows in (COUNT, 3))
    model = tiny_model("olmoe", num_hidden_layers=6)
    batches = list(zip(torch.arange(COUNT).split(4), loader, strict=True)) * 3
    return {
        "model": model,
        "loader": loader,
        "embeddings": embeddings,
        "is_correct": _is_correct,
        "batches": batches,
        "test_batch": {"input_ids": tiny_tokens(3, 4, seed=2)},
        "test_embeddings": others,
    }


def test_the_code_of_the_page() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    names = _names()
    untuned = copy.deepcopy(names["model"])
    before = {name: one.clone() for name, one in names["model"].state_dict().items()}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    changed = {name for name, one in names["model"].state_dict().items() if not torch.equal(one, before[name])}
    assert changed == {f"model.layers.{place}.mlp.gate.weight" for place in range(1, 6)}
    assert torch.isfinite(names["loss"])
    assert torch.equal(torch.cat([names["prompt_ends"](batch) for batch in names["loader"]]), STARTS - 1)
    recorded = []
    with torch.no_grad(), names["config"].recorder(untuned) as recorder:
        for place, batch in enumerate(names["loader"]):
            recorder.positions = STARTS[4 * place : 4 * place + 4] - 1
            untuned(**batch)
            recorded.append(recorder.r)
    reference = names["reference"]
    torch.testing.assert_close(reference.r, torch.cat(recorded)[reference.keys], rtol=1e-5, atol=1e-6)
