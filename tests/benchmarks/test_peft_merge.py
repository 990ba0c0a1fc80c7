"""The benchmark of merges beside PEFT's own: its arms give the same weight."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bench_peft_merge
from bench_peft_merge import ARMS, Case, gate
from optional import obstacle


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only cost time at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", bench_peft_merge.DTYPES)
def test_arms_agree(dtype: str) -> None:
    case = Case(37, 4, 3, getattr(torch, dtype))
    for arm in case.arms():
        gate(case, arm)
        assert torch.equal(case.target, case.base)


def test_arms_leave_out_what_cannot_run() -> None:
    assert Case(8, 2, 1, torch.float32).arms() == [arm for arm in Case(8, 2, 1, torch.bfloat16).arms() if arm != "addmm_"]


@pytest.mark.skipif(obstacle("peft") is not None, reason=str(obstacle("peft")))
def test_peft_merges_where_it_is_installed() -> None:
    assert Case(8, 2, 1, torch.bfloat16).arms() == list(ARMS)


def test_a_wrong_merge_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(16, 2, 2, torch.bfloat16)
    monkeypatch.setattr(case, "run", lambda arm: case.target.mul_(1.05))
    with pytest.raises(AssertionError, match="ours: relative error"):
        gate(case, "ours")


def test_the_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_peft_merge, "obstacle", lambda name: "peft is not installed")
    monkeypatch.setattr(bench_peft_merge, "optional", lambda name: None)
    monkeypatch.setattr(bench_peft_merge, "measured_peak", lambda arm, dtype, options: 4096)
    kept = tmp_path / "found.json"
    given = ["--size=32", "--rank=4", "--adapters=2", "--rounds=1", "--dtypes=bfloat16", "--json", str(kept)]
    monkeypatch.setattr("sys.argv", ["bench_peft_merge.py", *given])
    bench_peft_merge.main()
    (row,) = json.loads(kept.read_text())["rows"]
    assert (set(row["arms"]), row["adapters_dtype"]) == ({"ours", "addmm_"}, "bfloat16")
    assert row["arms"]["ours"]["peak_weights"] == 2
    assert "peft is not installed: its merge is left out" in capsys.readouterr().out
