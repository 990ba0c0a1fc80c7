"""The demo's TALL-mask archive: written, read back, and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from taskloom.archive import open_archive
from taskloom.methods.merging.projected_digits import State
from taskloom.methods.merging.tall_masks import TallArchive


@dataclass(frozen=True)
class TallCompression:
    """What was stored, and in how many bytes.

    Attributes
    ----------
    thresholds
        lambda of each task, picked by validation accuracy.
    kept
        Share of ones in each task's mask.
    base_bytes, vector_bytes, mask_bytes, header_bytes
        Parts of the archive: the base, the multi-task vector, the packed masks of all tasks, and the files' headers.
    separate_bytes
        Size of the fine-tuned checkpoints that the archive replaces.
    """

    thresholds: list[float]
    kept: list[float]
    base_bytes: int
    vector_bytes: int
    mask_bytes: int
    header_bytes: int
    separate_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Bytes of the archive's files."""
        return self.base_bytes + self.vector_bytes + self.mask_bytes + self.header_bytes

    @property
    def ratio(self) -> float:
        """Stored bytes as a share of the separate checkpoints'."""
        return self.stored_bytes / self.separate_bytes


def compress(models: Path, names: Sequence[str], out: Path, validate: Callable[[str, State], float]) -> TallCompression:
    """Write the archive of checkpoints on disk.

    Parameters
    ----------
    models
        Folder with ``base/model.safetensors`` and the same under each of ``names``.
    names
        The tasks, and their folders.
    out
        Folder to create, as ``taskloom compress`` would.
    validate
        Validation accuracy of a state dict on a task.
    """
    files = {name: models / name / "model.safetensors" for name in ("base", *names)}
    archive = TallArchive.build(load_file(files["base"]), {name: load_file(files[name]) for name in names}, evaluate=validate)
    archive.save(out)
    masks = sum(mask.nbytes for mask in archive.masks.values())
    vector = sum(values.nbytes for values in archive.vector.values())
    return TallCompression(
        thresholds=[task.tall_mask_lambda for task in archive.info.tasks],
        kept=[mask.density() for mask in archive.masks.values()],
        base_bytes=archive.nbytes - vector - masks,
        vector_bytes=vector,
        mask_bytes=masks,
        header_bytes=open_archive(out).nbytes - archive.nbytes,
        separate_bytes=sum(files[name].stat().st_size for name in names),
    )
