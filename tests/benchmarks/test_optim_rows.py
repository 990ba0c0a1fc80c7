"""The rows of bench_optim: what is compared gives the same, from the same state."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._pytree import tree_leaves

import bench_optim
from harness import Contest, outcome
from rewrite_contests import CONTESTS, chunk_contest

SHAPE = (64, 16)


def _small(name: str) -> Contest:
    return chunk_contest(SHAPE, chunk=32) if name == "chunk_update_" else CONTESTS[name](SHAPE)


@pytest.mark.parametrize("name", CONTESTS)
def test_plain_torch_gives_the_same(name: str) -> None:
    bench_optim.gate_rewrite(_small(name))


@pytest.mark.parametrize("name", CONTESTS)
def test_a_measurement_starts_from_the_same_state_each_time(name: str) -> None:
    contest = _small(name)
    changed = [*([] if contest.changes is None else [contest.changes]), *contest.state]
    before = [tensor.clone() for tensor in changed]
    first, second = (outcome(contest, contest.ours) for _ in range(2))
    assert all(tensor.equal(old) for tensor, old in zip(changed, before, strict=True))
    assert all(one.equal(other) for one, other in zip(tree_leaves(first), tree_leaves(second), strict=True))
    found = bench_optim.measure_rewrite(name, contest, 1)
    assert set(found["over_ours"]) == set(contest.peers)


def test_a_wrong_rewrite_is_not_measured() -> None:
    contest = _small("chunk_update_")
    wrong = Contest(**{**vars(contest), "ours": lambda: contest.changes.add_(1)})
    with pytest.raises(AssertionError, match="values differ"):
        bench_optim.gate_rewrite(wrong)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_steps_are_gated_and_measured(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_optim, "SHAPES", ((23, 5), (23,)))
    bench_optim.gate_steps(kind, 0.5)
    found: dict[str, Any] = bench_optim.measure_steps(kind, 0.5, 1)
    assert (found["optimizer"], set(found["over_ours"])) == (kind, {"foreach", "fused"})
    assert 0.3 < found["moments_share"] < 0.7
