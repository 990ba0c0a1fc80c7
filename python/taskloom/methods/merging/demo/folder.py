"""The demo's output folder: it belongs to the demo, and a folder that holds anything else is refused."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from taskloom.methods.merging.demo.errors import DemoError

MARKER = ".taskloom_demo"
_MARKER_TEXT = "Written by `taskloom demo`, which replaces everything in this folder when it runs again.\n"


@dataclass(frozen=True)
class DemoFolder:
    """Paths inside the output folder."""

    root: Path

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def recipes(self) -> Path:
        return self.root / "recipes"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def tuning(self) -> Path:
        return self.root / "tuning"

    @property
    def tall(self) -> Path:
        return self.root / "tall"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def page(self) -> Path:
        return self.root / "report.html"

    @property
    def own(self) -> tuple[Path, ...]:
        """Everything that the demo writes into the folder, its marker last."""
        parts = (self.models, self.recipes, self.merged, self.tuning, self.tall, self.results, self.page)
        return (*parts, self.root / MARKER)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prepare_folder(out: str | Path) -> DemoFolder:
    """Create the output folder, or empty one that an earlier demo wrote.

    Raises
    ------
    DemoError
        If ``out`` is a file, a folder with something in it and no marker of the demo, or one with something beside the demo's own
        files; nothing is removed then.
    """
    folder = DemoFolder(Path(out).expanduser().resolve())
    if folder.root.exists() and not folder.root.is_dir():
        raise DemoError(f"output {out}: is a file, expected a folder that does not exist yet, is empty, or holds an earlier demo")
    found = sorted(folder.root.iterdir()) if folder.root.is_dir() else []
    if found and folder.root / MARKER not in found:
        raise DemoError(f"output {out}: is not empty and was not written by the demo; choose another folder")
    foreign = [path.name for path in found if path not in folder.own]
    if foreign:
        raise DemoError(
            f"output {out}: holds {', '.join(foreign[:4])} beside the demo's own files; move that away or choose another folder"
        )
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        # First, so that a demo that is cut off leaves a folder that the next one accepts.
        (folder.root / MARKER).write_text(_MARKER_TEXT, encoding="utf-8")
        for path in folder.own[:-1]:
            _remove(path)
    except OSError as error:
        raise DemoError(f"output {out}: cannot be written: {error}") from error
    return folder
