"""The executor's CPU level and its override; that of the ops is tested in tests/ops/test_backends.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from taskloom import _native
from taskloom.ops import _library

LEVELS = tuple(_native.build_info()["levels"])
REACHED = tuple(level for level in LEVELS if level <= _native.detected_cpu_level())


@pytest.fixture(autouse=True)
def restored_levels() -> Iterator[None]:
    yield
    _native.force_cpu_level("")
    _library.force_cpu_level("")


def test_detected_level_is_one_of_the_build() -> None:
    assert _native.detected_cpu_level() in LEVELS


def test_forced_level_holds_until_detection_is_asked_for() -> None:
    for level in REACHED:
        _native.force_cpu_level(level)
        assert _native.cpu_level() == level
    _native.force_cpu_level("")
    assert _native.cpu_level() == _native.detected_cpu_level()


@pytest.mark.parametrize("name", ["v9", "V2", "x86-64-v2", " v2"])
def test_wrong_level_is_refused_and_changes_nothing(name: str) -> None:
    _native.force_cpu_level(LEVELS[0])
    with pytest.raises(RuntimeError, match=f"TASKLOOM_CPU_LEVEL: expected one of {', '.join(LEVELS)}, got '{name}'"):
        _native.force_cpu_level(name)
    assert _native.cpu_level() == LEVELS[0]


@pytest.mark.skipif(REACHED == LEVELS, reason="this CPU reaches every level of the build")
def test_a_level_that_this_cpu_lacks_is_refused() -> None:
    with pytest.raises(RuntimeError, match=f"{LEVELS[-1]} was asked for, but this CPU reaches only {_native.detected_cpu_level()}"):
        _native.force_cpu_level(LEVELS[-1])


def test_ops_and_executor_have_levels_of_their_own() -> None:
    _native.force_cpu_level(LEVELS[0])
    assert _library.cpu_level() == _native.detected_cpu_level()
    _library.force_cpu_level(LEVELS[0])
    _native.force_cpu_level("")
    assert _library.cpu_level() == LEVELS[0]
