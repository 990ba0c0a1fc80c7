"""Ends merges at every step they take in the file system, as a kill would, and checks what is left; run as a script.

    python crash_points.py FOLDER {fresh,overwrite,overwrite-by-two-renames} STRIDE

Each merge runs in a forked child that ends itself, without any clean-up, at its n-th call that opens, creates, renames or removes a
file. Then the output must be as it was, or complete; a resumed merge must complete it, with the bytes of an undisturbed one and nothing
beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import taskloom._native
from taskloom.merge import merge_checkpoints

_STEPS = ("open", "os.mkdir", "os.rename")
# shutil.rmtree and ftruncate name what they change by descriptors.
_ANYWHERE = ("os.remove", "os.rmdir", "os.truncate")
_SHARD = "700"


def _recipe(folder: Path, density: float) -> dict[str, Any]:
    models = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in ("a", "b")]
    return {"merge_method": "ties", "base_model": str(folder / "base"), "models": models, "parameters": {"density": density}}


def content(folder: Path) -> dict[str, bytes | str]:
    """Every file's bytes; of the report all that does not depend on time."""
    found: dict[str, bytes | str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found[str(path.relative_to(folder))] = path.read_bytes()
    if "merge_report.json" in found:
        report = json.loads(found["merge_report.json"])
        del report["seconds"]
        for tensor in report["tensors"]:
            del tensor["seconds"]
        found["merge_report.json"] = json.dumps(report)
    return found


def _merge_in_child(folder: Path, crash_at: int, **options: Any) -> bool:
    """Whether the merge came to its end before its ``crash_at``-th step (0: no crash)."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    count = 0

    def end_at_step(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _ANYWHERE or (event in _STEPS and str(folder) in str(arguments[0])):
            count += 1
            if count == crash_at:
                os._exit(9)

    sys.addaudithook(end_at_step)
    status = 1
    try:
        merge_checkpoints(_recipe(folder, 0.5), folder / "out", threads=1, shard_size=_SHARD, **options)
        status = 0
    finally:
        # The child must not go on with the parent's loop, whatever happened.
        os._exit(status)


def _siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))


def main(folder: Path, kind: str, stride: int) -> None:
    """Print a line of JSON: crashes tried, and how many left finished files, an untouched output, a complete output."""
    overwrite = kind != "fresh"
    if kind == "overwrite-by-two-renames":
        taskloom._native.exchange_names = lambda first, second: False
    merge_checkpoints(_recipe(folder, 0.5), folder / "expected", shard_size=_SHARD)
    expected = content(folder / "expected")
    expected["merge_report.json"] = str(expected["merge_report.json"]).replace("expected", "out")
    expected["README.md"] = expected["README.md"].replace(b"# expected", b"# out")
    merge_checkpoints(_recipe(folder, 0.25), folder / "old")
    old = content(folder / "old")
    counts = {"crashes": 0, "resumable": 0, "as_it_was": 0, "complete": 0, "absent": 0}
    for crash_at in range(1, 10_000, stride):
        for name in _siblings(folder):
            (shutil.rmtree if (folder / name).is_dir() else os.remove)(folder / name)
        if overwrite:
            shutil.copytree(folder / "old", folder / "out")
        if _merge_in_child(folder, crash_at, overwrite=overwrite):
            assert content(folder / "out") == expected, crash_at
            break
        counts["crashes"] += 1
        journal = folder / "out.partial.journal"
        counts["resumable"] += journal.exists() and b'"finished"' in journal.read_bytes()
        if not (folder / "out").exists():
            # With two renames there is a moment without an output; the old one waits beside it then.
            assert not overwrite or (kind == "overwrite-by-two-renames" and content(folder / "out.replaced") == old), crash_at
            counts["absent"] += 1
        elif overwrite and content(folder / "out") == old:
            counts["as_it_was"] += 1
        else:
            assert content(folder / "out") == expected, crash_at
            counts["complete"] += 1
        assert _merge_in_child(folder, 0, resume=True, overwrite=overwrite), crash_at
        assert content(folder / "out") == expected, crash_at
        assert _siblings(folder) == ["out"], crash_at
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
