"""Finds the local folder or file that a recipe's model name means: a path, or a hub id in the Hugging Face cache."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from taskloom.merge.errors import CheckpointError, shown
from taskloom.merge.input_files import check_name, is_plain_name, read_regular

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICENSE*"]


@dataclass(frozen=True)
class Located:
    """Where a model is: its name in the recipe, the path to open, and for a hub model the id with the commit that was found."""

    label: str
    path: Path
    hub_id: str | None = None
    revision: str | None = None

    @property
    def pinned(self) -> str:
        """A name that means this same model from any working directory."""
        return f"{self.hub_id}@{self.revision}" if self.hub_id else str(self.path.absolute())


def hub_cache() -> Path:
    """The Hugging Face cache folder, by the same variables as huggingface_hub."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


_LONGEST_REFERENCE = 4096


def _commit(reference: Path) -> str:
    """The commit that a branch or tag of the cache names."""
    commit = read_regular(reference, _LONGEST_REFERENCE).decode("utf-8", "replace").strip()
    if not is_plain_name(commit):
        raise CheckpointError(f"{reference}: expected a commit, got {shown(commit)}")
    return commit


def _cached_snapshot(repo: str, revision: str) -> tuple[Path, str] | None:
    """The snapshot folder of a branch, tag or commit, and its commit, where the cache holds it."""
    folder = hub_cache() / ("models--" + repo.replace("/", "--"))
    reference = folder / "refs" / revision
    commit = _commit(reference) if os.path.exists(reference) else revision
    snapshot = folder / "snapshots" / commit
    # Unlike pathlib, os.path takes a name that is too long for one of a file that is not there.
    if os.path.isdir(snapshot):
        return snapshot, commit
    if re.fullmatch(r"[0-9a-f]{7,39}", revision):
        matches = [path for path in (folder / "snapshots").glob(revision + "*") if path.is_dir()]
        if len(matches) == 1:
            return matches[0], matches[0].name
    return None


def _has_weights(snapshot: Path) -> bool:
    return any(snapshot.glob("*.safetensors"))


def _download(label: str, repo: str, revision: str) -> tuple[Path, str]:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"model {shown(label)}: neither a path here nor in the Hugging Face cache ({hub_cache()}); "
            "to download models, install the extra: pip install 'taskloom[hub]'"
        )
    import huggingface_hub

    try:
        snapshot = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model {shown(label)}: cannot be downloaded: {error}") from error
    return snapshot, snapshot.name


def locate(label: str, recipe_folder: Path | None = None) -> Located:
    """Resolve a model name: a path from the current directory, a path from the recipe's folder, then a hub id.

    Parameters
    ----------
    label
        As written in the recipe: a folder, a ``.safetensors`` file, or ``org/name`` with an optional ``@revision``.
    recipe_folder
        Where the recipe is; None for a recipe that is not a file.

    Raises
    ------
    CheckpointError
        If nothing is found. A hub model is downloaded only where huggingface_hub is installed.
    """
    try:
        written = Path(label).expanduser()
        candidates = [written] if written.is_absolute() or recipe_folder is None else [written, recipe_folder / written]
        for candidate in candidates:
            if candidate.exists():
                check_name(candidate.absolute())
                return Located(label, candidate)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"model {shown(label)}: cannot be looked up: {error}") from error
    match = _HUB_ID.fullmatch(label)
    if match is None or label.startswith((".", "~", "/")) or label.endswith(".safetensors"):
        hint = "; adapters (base+adapter) are not supported: merge the adapter into its base first" if "+" in label else ""
        searched = ", ".join(str(candidate) for candidate in candidates)
        raise CheckpointError(f"model {shown(label)}: no such file or folder (looked at {searched}){hint}")
    repo, revision = match["repo"], match["revision"] or "main"
    if not all(is_plain_name(part) for part in revision.split("/")):
        raise CheckpointError(f"model {shown(label)}: {revision!r} is not a branch, a tag or a commit")
    cached = _cached_snapshot(repo, revision)
    if cached is None or not _has_weights(cached[0]):
        cached = _download(label, repo, revision)
    return Located(label, cached[0], repo, cached[1])
