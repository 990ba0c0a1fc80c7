"""What TALL masks promise: every task at nearly its own accuracy, in (64 + T) bits per parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_archives import archive_recipe

from taskloom.archive import compress_checkpoints, open_archive
from taskloom.methods.merging.projected_digits import ProjectedDigits, build


@pytest.fixture(scope="module", params=[0, 1])
def digits(request: pytest.FixtureRequest) -> ProjectedDigits:
    pytest.importorskip("sklearn")
    return build(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("vector", ["sum", "ties"])
def test_restored_accuracy_and_size(digits: ProjectedDigits, tmp_path: Path, vector: str) -> None:
    digits.save(tmp_path)
    tasks = [f"task-{number}" for number in range(len(digits.tasks))]
    models = {name: tmp_path / name for name in ("base", *tasks)}
    archives = {}
    for threshold in (0.2, 0.3, 0.4, 0.5, 0.6):
        out = tmp_path / f"archive-{threshold}"
        compress_checkpoints(archive_recipe(models, [threshold] * len(tasks), vector=vector), out)
        archives[threshold] = open_archive(out)
    chosen = []
    for number, task in enumerate(tasks):
        validated = {threshold: digits.accuracy(archive.state_dict(task), number, "val") for threshold, archive in archives.items()}
        chosen.append(max(validated, key=validated.__getitem__))
    report = compress_checkpoints(archive_recipe(models, chosen, vector=vector), tmp_path / "archive")
    archive = open_archive(tmp_path / "archive")
    restored = [digits.accuracy(archive.state_dict(task), number) for number, task in enumerate(tasks)]
    normalised = sum(own / single for own, single in zip(restored, digits.single_task, strict=True)) / len(tasks)
    assert normalised >= 0.985
    bits = 8 * (report.sizes.base + report.sizes.vector + report.sizes.masks)
    assert bits == (64 + len(tasks)) * report.parameters
    metadata = report.sizes.archive - bits // 8
    assert 0 < metadata < 32_000
    assert report.sizes.archive < 0.3 * report.sizes.separate
