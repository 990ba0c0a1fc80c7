"""The page of TALL masks: its recipe, commands and code, run one after the other as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tall_states import Toy, same

from taskloom.cli.main import taskloom

PAGE = Path(__file__).parents[3] / "docs" / "methods" / "tall_masks.md"


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (recipe,), (commands,) = _blocks(text, "yaml"), _blocks(text, "sh")
    first, second = _blocks(text, "python")
    monkeypatch.chdir(tmp_path)
    states: dict[str, Any] = {}
    for seed, name in enumerate(("base", "math", "code", "chat")):
        model = Toy()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(seed))
        states[name] = {key: values.clone() for key, values in model.state_dict().items()}
        Path("models", name).mkdir(parents=True)
        save_file(states[name], Path("models", name, "model.safetensors"))
    Path("recipe.yml").write_text(recipe)
    for command in commands.splitlines():
        done = CliRunner().invoke(taskloom, [*shlex.split(command)[1:], "--quiet"])
        assert done.exit_code == 0, done.output

    names: dict[str, Any] = {"model": Toy(), "evaluate": lambda task, state: 0.0, **states}
    exec(compile(first, str(PAGE), "exec"), names)
    restored = load_file(Path("restored-code", "model.safetensors"))
    live = dict(names["model"].state_dict())
    assert same(live, {name: restored[name] for name in live})
    assert [task.tall_mask_lambda for task in names["archive"].info.tasks] == [0.4, 0.3, 0.4]
    assert list(names["weights"]) != []

    exec(compile(second, str(PAGE), "exec"), names)
    assert list(names["merged"]) == list(states["base"])
    assert names["archive"].tasks == ("math", "code", "chat")
    assert Path("archive-2", "tall_masks.safetensors").is_file()
