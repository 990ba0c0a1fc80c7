"""What the compiled files may ask of the system: only torch's stable interface and the C and C++ runtimes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from binaries import build_tree, needed, outside_stable_interface, symbols, undefined

from taskloom import _native
from taskloom.ops import _library

LEVELS = tuple(_native.build_info()["levels"])


@pytest.fixture
def op_library() -> Path:
    path = _library.find_library(_library.CPU_LIBRARY)
    assert path is not None
    return path


@pytest.fixture
def native_module() -> Path:
    return Path(str(_native.__file__))


def _level_objects(level: str) -> list[Path]:
    objects = sorted((build_tree() / "CMakeFiles" / f"taskloom_loops_{level}.dir").rglob("*.o"))
    assert objects
    return objects


def _exported(level: str) -> set[str]:
    return {
        symbol.name for path in _level_objects(level) for symbol in symbols(path, "--defined-only", "--extern-only") if symbol.kind != "w"
    }


def test_op_library_uses_the_stable_interface_only(op_library: Path) -> None:
    names = undefined(op_library)
    assert outside_stable_interface(names) == []
    assert "aoti_torch_library_init_impl" in names


def test_op_library_needs_neither_python_nor_c10(op_library: Path) -> None:
    assert {soname for soname in needed(op_library) if "torch" in soname or "python" in soname or "c10" in soname} == {"libtorch_cpu.so"}


def test_op_library_exports_no_name_of_a_level(op_library: Path) -> None:
    exported = [symbol.name for symbol in symbols(op_library, "-D", "--defined-only") if symbol.kind == "T"]
    assert sorted(exported) == ["taskloom_ops_cpu_level", "taskloom_ops_force_cpu_level"]


def test_native_module_sees_no_torch(native_module: Path) -> None:
    assert not [soname for soname in needed(native_module) if "torch" in soname or "c10" in soname or "python" in soname]
    assert not [name for name in undefined(native_module) if "torch" in name or "c10" in name]


def test_native_module_exports_its_entry_point_only(native_module: Path) -> None:
    exported = [symbol.name for symbol in symbols(native_module, "-D", "--defined-only") if symbol.kind == "T"]
    assert exported == ["PyInit__native"]


@pytest.mark.parametrize("level", LEVELS)
def test_level_objects_hold_no_weak_symbol(level: str) -> None:
    # Of weak symbols the linker keeps one copy for everybody, maybe the one with instructions that this machine lacks.
    weak = [
        f"{path.name}: {symbol.name}"
        for path in _level_objects(level)
        for symbol in symbols(path)
        if symbol.kind in {"w", "W", "v", "V", "u"}
    ]
    assert weak == []


@pytest.mark.parametrize("level", LEVELS)
def test_level_objects_export_tables_of_their_level(level: str) -> None:
    names = _exported(level)
    assert names
    assert [name for name in names if not re.fullmatch(rf"taskloom_\w+_loops_{level}", name)] == []


def test_levels_share_no_symbol_and_have_the_same_tables() -> None:
    tables = {level: {name.removesuffix(f"_{level}") for name in _exported(level)} for level in LEVELS}
    assert all(names == tables[LEVELS[0]] for names in tables.values())
    assert len(set.union(*(_exported(level) for level in LEVELS))) == len(LEVELS) * len(tables[LEVELS[0]])


@pytest.mark.parametrize("level", LEVELS)
def test_level_objects_use_no_torch_and_no_containers(level: str) -> None:
    allowed = re.compile(r"taskloom_\w+_loops_" + level + r"|mem(cpy|move|set|cmp)|_GLOBAL_OFFSET_TABLE_|__stack_chk_fail|[a-z0-9]+f?")
    unexpected = [
        f"{path.name}: {symbol.name}"
        for path in _level_objects(level)
        for symbol in symbols(path, "--undefined-only")
        if not allowed.fullmatch(symbol.name)
    ]
    assert unexpected == []


def test_runtime_versions_are_recorded(op_library: Path, native_module: Path, record_property: Callable[[str, object], None]) -> None:
    for path in (op_library, native_module):
        versions = [match for name in undefined(path) for match in re.findall(r"@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)$", name)]
        newest: dict[str, tuple[int, ...]] = {}
        for runtime, text in versions:
            newest[runtime] = max(newest.get(runtime, ()), tuple(map(int, text.split("."))))
        assert "GLIBC" in newest
        for runtime, version in newest.items():
            record_property(f"{path.name}: {runtime}", ".".join(map(str, version)))
