"""Refuses links in a model's folder that lead out of it."""

from __future__ import annotations

from pathlib import Path

from taskloom.merge.errors import CheckpointError
from taskloom.merge.locate import hub_cache


def _is_cached_blob(target: Path, folder: Path) -> bool:
    """Whether a resolved path is a file that the Hugging Face cache stores for the snapshot ``folder``, or for any model of the user's."""
    if folder.parent.name == "snapshots" and target.is_relative_to(folder.parents[1] / "blobs"):
        return True
    repository = target.parent.parent
    return target.parent.name == "blobs" and repository.name.startswith("models--") and repository.parent == hub_cache().resolve()


def check_link(path: Path, folder: Path) -> None:
    """Refuse a file or folder of a model that is a link out of the model's folder.

    A link may lead to a place inside the folder; to ``blobs`` beside ``snapshots`` where the folder is a snapshot of a hub cache; or to
    ``blobs`` of any model in the user's Hugging Face cache (huggingface_hub before 0.23 made such links in other folders). The folder
    itself may be reached by links.

    Raises
    ------
    CheckpointError
        Naming the link and where it leads.
    """
    if not path.is_symlink():
        return
    try:
        target, home = path.resolve(), folder.resolve()
        if target.is_relative_to(home) or _is_cached_blob(target, home):
            return
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: is a link that cannot be followed: {error}") from error
    raise CheckpointError(
        f"{path}: is a link to {target}, outside the model's folder; to use it all the same, name {target} or its folder in the recipe, "
        "or copy the model with its links followed (cp -rL)"
    )
