"""The command, killed at random moments and stopped by signals: OUT stays as it was, and --resume completes it to the same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from crash_points import content
from toy_checkpoints import recipe_of, save_model

SHARDS = 24
_WIDTH = 160


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose merge takes a while and writes many files, and the expected output."""
    folder = tmp_path_factory.mktemp("kill")
    random = np.random.default_rng(0)
    folders = {}
    for name in ("base", "a", "b"):
        tensors = {f"layers.{layer}.w": random.normal(size=(2 * _WIDTH, _WIDTH)).astype(np.float32) for layer in range(SHARDS)}
        folders[name] = save_model(folder / name, tensors, {})
    recipe = recipe_of(folders, "della", parameters={"density": 0.5})
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    done = _start(folder, "expected").communicate(timeout=120)
    assert done[1] == b""
    return folder


def _start(folder: Path, out: str, *options: str) -> subprocess.Popen[bytes]:
    size = str(2 * _WIDTH * _WIDTH * 4)
    command = [sys.executable, "-m", "taskloom", "merge", "recipe.yml", out, "--shard-size", size, "-j", "2", "-q", *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _weights(folder: Path) -> dict[str, bytes | str]:
    return {name: value for name, value in content(folder).items() if name.endswith((".safetensors", ".index.json"))}


def _finish(folder: Path, out: str, *options: str) -> str:
    """Resume, check that the output is the expected one, and return what stood in the journal."""
    journal = folder / f"{out}.partial.journal"
    before = journal.read_text() if journal.exists() else ""
    process = _start(folder, out, "--resume", *options)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, b"")
    assert _weights(folder / out) == _weights(folder / "expected")
    assert not list(folder.glob(f"{out}.*"))
    return before


def _finished(journal: Path) -> int:
    return journal.read_bytes().count(b'"finished"') if journal.exists() else 0


def _kill(folder: Path, kills: int, overwrite: bool) -> int:
    """Kill merges at random moments; returns how many of them were resumed in the middle.

    Every other moment is a time since the start, the rest are a number of finished files and a little more: on a machine whose speed
    varies the former miss the merge often.
    """
    generator = random.Random(overwrite)
    options = ["--overwrite"] if overwrite else []
    start = time.perf_counter()
    _start(folder, f"timed-{overwrite}", *options).communicate(timeout=120)
    whole = time.perf_counter() - start
    resumed = 0
    for number in range(kills):
        out = f"out{number}-{overwrite}"
        if overwrite:
            (folder / out).mkdir()
            (folder / out / "model.safetensors").write_bytes(b"what was there")
        wanted = generator.randrange(SHARDS) if number % 2 else 0
        process = _start(folder, out, *options)
        while _finished(folder / f"{out}.partial.journal") < wanted and process.poll() is None:
            time.sleep(0.001)
        time.sleep(generator.random() * (0.005 if number % 2 else whole))
        process.kill()
        process.communicate(timeout=60)
        if overwrite and not (folder / out / "merge_report.json").exists():
            assert content(folder / out) == {"model.safetensors": b"what was there"}
        elif (folder / out).exists():
            assert _weights(folder / out) == _weights(folder / "expected")
        resumed += 0 < _finish(folder, out, *options).count('"finished"') < SHARDS
    return resumed


def test_killed_a_few_times(job: Path) -> None:
    assert _kill(job, 4, overwrite=False) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_twenty_times(job: Path, overwrite: bool) -> None:
    assert _kill(job, 20, overwrite) >= 5


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_stopped_by_a_signal(job: Path, number: signal.Signals, status: int) -> None:
    out = f"stopped{number}"
    process = _start(job, out)
    journal = job / f"{out}.partial.journal"
    while not _finished(journal) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    message = errors.decode()
    assert message.startswith(f"Error: stopped by {number.name}\n")
    assert f"of {SHARDS} files are finished and kept in" in message
    assert "--resume goes on from there" in message
    assert not (job / out).exists()
    facts = [json.loads(line) for line in _finish(job, out).splitlines()]
    assert facts[0]["journal"] == 1
    assert 1 <= sum("finished" in fact for fact in facts) < SHARDS
