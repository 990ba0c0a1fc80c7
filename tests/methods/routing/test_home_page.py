"""The code on HoME's page runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from taskloom.methods.routing.home.model import LevelReport

PAGE = Path(__file__).parents[3] / "docs" / "methods" / "home.md"


def test_code_on_the_page_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    torch.manual_seed(0)
    labels = {task: (torch.rand(64) < 0.5).float() for task in ("long view", "finish", "like", "follow")}
    names = {"x": torch.randn(64, 20), "labels": labels}
    exec(code, names)
    assert {task: score.shape for task, score in names["scores"].items()} == dict.fromkeys(labels, (64,))
    assert isinstance(names["report"], LevelReport)
