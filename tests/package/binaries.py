"""What the tests of the compiled libraries read out of them with nm and readelf."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Symbols that any C++ library takes from the C and C++ runtimes: they carry the version of the runtime that first had them.
_RUNTIME = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")
_TOOLCHAIN = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
_STABLE = re.compile(r"(aoti_torch|torch)_\w+")


@dataclass(frozen=True)
class Symbol:
    kind: str
    name: str


def require(tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")


def symbols(path: Path, *options: str) -> list[Symbol]:
    require("nm")
    listing = subprocess.run(["nm", *options, str(path)], capture_output=True, text=True, check=True).stdout
    found = (line.split(maxsplit=2 if line[0] != " " else 1) for line in listing.splitlines())
    return [Symbol(fields[-2], fields[-1]) for fields in found]


def undefined(path: Path) -> list[str]:
    return [symbol.name for symbol in symbols(path, "-D", "--undefined-only")]


def outside_stable_interface(names: Iterable[str]) -> list[str]:
    """The symbols that come neither from torch's stable C interface nor from the C and C++ runtimes."""
    return [name for name in names if not (_STABLE.fullmatch(name) or _RUNTIME.search(name) or name in _TOOLCHAIN)]


def needed(path: Path) -> set[str]:
    """The sonames that a library names as needed."""
    require("readelf")
    dynamic = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))


def build_tree() -> Path:
    """The build tree of this interpreter's editable install."""
    found = sorted((ROOT / "build").glob(f"cp{sys.version_info.major}{sys.version_info.minor}-*/build.ninja"))
    if not found:
        pytest.skip("no build tree here: taskloom was installed from a wheel")
    return found[0].parent
