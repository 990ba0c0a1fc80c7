"""The few files that a check leaves: each is rewritten whole as a section ends, and none grows beyond a limit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MOST_BYTES = 15 << 20
RESULTS, TABLE, SANITIZER, TESTS, LOG = FILES = ("results.json", "table.txt", "sanitizer.txt", "tests.txt", "log.txt")


def trimmed(text: str, most: int = MOST_BYTES) -> str:
    """The text, or its beginning and its end around a note of how much is left out."""
    data = text.encode()
    if len(data) <= most:
        return text
    half = most // 2 - 64
    left = len(data) - 2 * half
    return f"{data[:half].decode(errors='ignore')}\n... {left} bytes left out ...\n{data[-half:].decode(errors='ignore')}"


class Outputs:
    """Writes the files of a folder; a reader sees each of them whole, whenever the check is cut off."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
        if foreign:
            raise SystemExit(f"gpu_check: OUTDIR {folder}: expected an empty folder, found {', '.join(foreign[:4])}")
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        self.folder = folder
        self.log = ""

    def write(self, name: str, text: str) -> None:
        if name not in FILES:
            raise ValueError(f"name: expected one of {', '.join(FILES)}, got {name!r}")
        beside = self.folder / f"{name}.part"
        beside.write_text(trimmed(text))
        os.replace(beside, self.folder / name)

    def write_results(self, results: dict[str, Any]) -> None:
        self.write(RESULTS, json.dumps(results, indent=1) + "\n")

    def note(self, text: str) -> None:
        """Append to the log."""
        self.log = trimmed(self.log + text.rstrip("\n") + "\n")
        self.write(LOG, self.log)
