"""Damaged and hostile inputs in bulk: each is accepted, or refused by an error that names it, in bounded time and memory."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import corpus
import pytest
from agreement import compare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from taskloom.merge.checkpoint import open_checkpoint
from taskloom.merge.errors import CheckpointError, MergeError
from taskloom.merge.locate import Located
from taskloom.merge.run import merge_checkpoints

# Far above what a case takes, on a machine that has other work too.
_SECONDS = 20
# Address space beyond what the process has when the cases begin: room for the executor's buffers, not for what a hostile size asks for.
_BYTES = 1 << 30
_LONGEST_MESSAGE = 4000


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"a case took more than {_SECONDS} seconds")


@contextmanager
def _bounded() -> Iterator[None]:
    """Memory is refused beyond a limit while this is open."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _BYTES, hard))
    before = signal.signal(signal.SIGALRM, _too_slow)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _run(count: int, cases: st.SearchStrategy[Any], check: Callable[[Any], str]) -> Counter[str]:
    """Check so many cases; how many had which outcome. A case that fails is checked again and again while it is made smaller."""
    outcomes: Counter[str] = Counter()

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def each(case: Any) -> None:
        signal.alarm(_SECONDS)
        outcomes[check(case)] += 1
        signal.alarm(0)

    with _bounded():
        each()
    assert outcomes.total() >= count
    return outcomes


def _headers(folder: Path, count: int) -> Counter[str]:
    path = folder / "x.safetensors"
    return _run(count, corpus.files(), lambda raw: compare(path, raw))


class _Folders:
    """Writes each case into a fresh place below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.outside = corpus.write_outside(root / "outside")
        self.good = corpus.write_folder(root / "good", corpus.GOOD, self.outside)
        self.out = root / "out"

    @contextmanager
    def case(self, content: dict[str, corpus.Content]) -> Iterator[Path]:
        hostile = corpus.write_folder(self.root / "hostile", content, self.outside)
        try:
            yield hostile
        finally:
            shutil.rmtree(hostile)
            shutil.rmtree(self.out, ignore_errors=True)

    def check_refusal(self, error: MergeError, hostile: Path) -> None:
        message = str(error)
        assert str(hostile) in message
        assert len(message) < _LONGEST_MESSAGE
        assert "not enough memory" not in message
        left = sorted(os.listdir(self.root))
        assert left == ["good", "hostile", "outside"], f"the merge left {left}"

    def opens(self, content: dict[str, corpus.Content]) -> str:
        with self.case(content) as hostile:
            try:
                found = open_checkpoint(Located(str(hostile), hostile))
            except CheckpointError as error:
                self.check_refusal(error, hostile)
                return "refused"
            assert all(entry.file.parent == hostile for entry in found.tensors.values())
            return "accepted"

    def merges(self, content: dict[str, corpus.Content], *, as_base: bool, method: str, out_dtype: str | None) -> str:
        with self.case(content) as hostile:
            base, tuned = (hostile, self.good) if as_base else (self.good, hostile)
            recipe = {
                "merge_method": method,
                "base_model": str(base),
                "models": [{"model": str(tuned), "parameters": {"weight": 0.5}}],
                "out_dtype": out_dtype,
            }
            try:
                merge_checkpoints(recipe, self.out, threads=1)
            except MergeError as error:
                self.check_refusal(error, hostile)
                return "refused"
            self.check_output()
            return "accepted"

    def check_output(self) -> None:
        assert sorted(os.listdir(self.root)) == ["good", "hostile", "out", "outside"]
        for path in self.out.rglob("*"):
            assert not path.is_symlink()
            if path.is_dir():
                continue
            content = path.read_bytes()
            assert corpus.SECRET not in content
            if path.suffix == ".safetensors":
                assert deserialize(content)


def _opened(folder: Path, count: int) -> Counter[str]:
    return _run(count, corpus.folders(), _Folders(folder).opens)


def _merged(folder: Path, count: int) -> Counter[str]:
    place = _Folders(folder)
    options = st.fixed_dictionaries(
        {
            "as_base": st.booleans(),
            "method": st.sampled_from(("task_arithmetic", "ties", "consensus_ta")),
            "out_dtype": st.sampled_from((None, "bfloat16")),
        }
    )
    return _run(count, st.tuples(corpus.folders(), options), lambda case: place.merges(case[0], **case[1]))


def _check_all(folder: Path, headers: int, opened: int, merged: int) -> None:
    found = {}
    for name, run, count in (("headers", _headers, headers), ("opened", _opened, opened), ("merged", _merged, merged)):
        (folder / name).mkdir()
        start = time.monotonic()
        found[name] = run(folder / name, count)
        print(f"{name}: {dict(found[name])} in {time.monotonic() - start:.0f} s")
        # A corpus that falls on one side alone would show nothing.
        assert found[name]["accepted"] > count / 100, found
        assert found[name]["refused"] > count / 100, found
    assert sum(outcomes.total() for outcomes in found.values()) >= headers + opened + merged


def test_a_few_hundred_inputs(tmp_path: Path) -> None:
    _check_all(tmp_path, headers=400, opened=100, merged=60)


@pytest.mark.slow
def test_twenty_thousand_inputs(tmp_path: Path) -> None:
    _check_all(tmp_path, headers=15_000, opened=4_000, merged=2_000)
