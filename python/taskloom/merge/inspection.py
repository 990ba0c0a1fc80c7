"""What a checkpoint holds: tensors, types, sizes, metadata; where asked for, statistics and hashes of the weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from taskloom.merge.checkpoint import open_checkpoint
from taskloom.merge.errors import CheckpointError, RecipeError, ReportError
from taskloom.merge.header import TensorEntry
from taskloom.merge.locate import locate
from taskloom.merge.output import RECIPE, REPORT
from taskloom.merge.parameters import layer_positions
from taskloom.merge.patterns import matching_names
from taskloom.merge.read_report import load_report

_CONFIG_KEYS = (
    *("architectures", "model_type", "torch_dtype", "dtype", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size", "max_position_embeddings", "tie_word_embeddings"),
)
_HASH_PIECE = 1 << 22

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TensorStatistics:
    """Figures of one tensor's values, in float64; over the finite ones, except for ``nonfinite``.

    Attributes
    ----------
    norm, mean, minimum, maximum
        Euclidean norm, mean and range; None for an empty tensor, and for complex numbers (which have no order) the last three.
    zero_share
        Share of entries that are 0 or -0.
    nonfinite
        Entries that are NaN or infinite.
    """

    norm: float | None
    mean: float | None
    minimum: float | None
    maximum: float | None
    zero_share: float
    nonfinite: int


@dataclass(frozen=True)
class TensorSummary:
    """One tensor. ``layer`` is the first whole number between dots in its name; ``sha256`` is of its bytes.

    ``statistics`` is None where not asked for, and for floating point of 8 bits and less.
    """

    name: str
    dtype: str
    shape: list[int]
    parameters: int
    bytes: int
    file: str
    layer: int | None
    statistics: TensorStatistics | None
    sha256: str | None


@dataclass(frozen=True)
class FileSummary:
    """One safetensors file: size, number of tensors, the header's ``__metadata__``, and, where asked for, the file's sha256."""

    name: str
    bytes: int
    tensors: int
    metadata: dict[str, str]
    sha256: str | None


@dataclass(frozen=True)
class GroupTotals:
    """Tensors of one dtype or layer: how many, with how many parameters and bytes."""

    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """A checkpoint. ``by_layer`` has the key ``none`` for tensors outside the layers; ``merge`` says what made a merge's output.

    ``parameters`` counts the entries of all tensors.
    """

    path: str
    parameters: int
    bytes: int
    by_dtype: dict[str, GroupTotals]
    by_layer: dict[str, GroupTotals]
    config: dict[str, Any] | None
    merge: dict[str, Any] | None
    files: list[FileSummary]
    tensors: list[TensorSummary]

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain types."""
        return asdict(self)


def _metadata(path: Path) -> dict[str, str]:
    """The ``__metadata__`` of a file whose header has been checked."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found: dict[str, str] = json.loads(file.read(length)).get("__metadata__") or {}
    return found


def _sha256(path: Path, offset: int, count: int, add: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while count:
            piece = file.read(min(_HASH_PIECE, count))
            if not piece:
                raise CheckpointError(f"{path}: ends {count} bytes before what its header says; it was cut short")
            digest.update(piece)
            count -= len(piece)
            add(len(piece))
    return digest.hexdigest()


def _statistics(entry: TensorEntry, add: Callable[[int], None]) -> TensorStatistics | None:
    import numpy as np

    from taskloom.merge.arrays import Mappings, blocks, has_values, squared_norm, values

    if not has_values(entry.dtype):
        return None
    bits = Mappings().bits(entry)
    squared = total = 0.0
    zeros = nonfinite = 0
    lowest, highest = math.inf, -math.inf
    ordered = entry.dtype != "C64"
    for block in blocks(0, len(bits)):
        one = values(bits[block], entry.dtype)
        finite = np.isfinite(one)
        lost = int(finite.size - np.count_nonzero(finite))
        nonfinite += lost
        kept = one[finite] if lost else one
        zeros += int(kept.size - np.count_nonzero(kept))
        squared += squared_norm(kept)
        if ordered and kept.size:
            total += float(kept.sum(dtype=np.float64))
            lowest, highest = min(lowest, float(kept.min())), max(highest, float(kept.max()))
        add(one.size * bits.itemsize)
    count = len(bits) - nonfinite
    known = ordered and count > 0
    return TensorStatistics(
        norm=math.sqrt(squared) if count else None,
        mean=total / count if known else None,
        minimum=lowest if known else None,
        maximum=highest if known else None,
        zero_share=zeros / len(bits) if len(bits) else 0.0,
        nonfinite=nonfinite,
    )


def _groups(tensors: Sequence[TensorSummary], keys: Iterable[str]) -> dict[str, GroupTotals]:
    count: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for tensor, key in zip(tensors, keys, strict=True):
        count[key] += 1
        parameters[key] += tensor.parameters
        size[key] += tensor.bytes
    return {key: GroupTotals(count[key], parameters[key], size[key]) for key in count}


def _made_by(folder: Path | None) -> dict[str, Any] | None:
    """Method, models and seed of a merge's output, as its report (or its recipe alone) has them."""
    if folder is None:
        return None
    report, recipe = folder / REPORT, folder / RECIPE
    try:
        if report.is_file():
            found = load_report(report)
            return {"method": found.method, "base_model": found.base_model, "models": found.models, "seed": found.seed}
        if recipe.is_file():
            from taskloom.merge.recipe import load_recipe

            loaded = load_recipe(recipe)
            models = [model.label for model in loaded.models]
            return {"method": loaded.method.name, "base_model": loaded.base_model, "models": models, "seed": loaded.seed}
    except (ReportError, RecipeError):
        # What made it is a side remark: an archive's recipe, or another program's file, is no reason not to show the tensors.
        return None
    return None


def _config(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if config is None else {key: config[key] for key in _CONFIG_KEYS if key in config}


class _Done:
    """Bytes done by several threads, passed on to a progress function."""

    def __init__(self, stage: str, total: int, progress: Callable[[str, int, int], None] | None) -> None:
        self._stage, self._total, self._progress = stage, total, progress
        self._done = 0
        self._lock = Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._stage, self._done, self._total)


def _over_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    from taskloom.merge.arrays import over_threads

    return list(over_threads(function, items, 0))


def inspect_checkpoint(
    path: str | Path,
    *,
    stats: bool = False,
    hashes: bool = False,
    tensor: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Inspection:
    """Look into a checkpoint. Without ``stats`` and ``hashes`` only headers and small files are read, and numpy is not needed.

    Parameters
    ----------
    path
        A folder, a ``.safetensors`` file or a hub id, as in a recipe.
    stats
        Read the weights for norms, ranges, zeros and non-finite entries.
    hashes
        Read the weights for the sha256 of every tensor's bytes and of every file.
    tensor
        Glob; only tensors whose whole name matches it. Totals are over those; files are listed and hashed whole.
    progress
        Called with ``statistics`` or ``hashes``, the bytes read so far, and all of them.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be found or read.
    MergeError
        If nothing matches ``tensor``.
    """
    checkpoint = open_checkpoint(locate(str(path)))
    names = matching_names(checkpoint.tensors, tensor)
    positions = layer_positions(checkpoint.tensors)
    entries = [checkpoint.tensors[name] for name in names]
    identities = sorted(checkpoint.files, key=lambda identity: identity.file.name)
    size = sum(entry.nbytes for entry in entries)
    statistics: list[TensorStatistics | None] = [None] * len(names)
    sha256: list[str | None] = [None] * len(names)
    of_files: list[str | None] = [None] * len(identities)
    if stats:
        measured = _Done("statistics", size, progress)
        statistics = _over_threads(lambda entry: _statistics(entry, measured.add), entries)
    if hashes:
        hashed = _Done("hashes", size + sum(identity.size for identity in identities), progress)
        sha256 = [*_over_threads(lambda entry: _sha256(entry.file, entry.offset, entry.nbytes, hashed.add), entries)]
        of_files = [*_over_threads(lambda identity: _sha256(identity.file, 0, identity.size, hashed.add), identities)]
    tensors = [
        TensorSummary(
            name=name,
            dtype=entry.dtype,
            shape=list(entry.shape),
            parameters=entry.numel,
            bytes=entry.nbytes,
            file=entry.file.name,
            layer=positions[name].layer,
            statistics=figures,
            sha256=digest,
        )
        for name, entry, figures, digest in zip(names, entries, statistics, sha256, strict=True)
    ]
    files = Counter(entry.file for entry in checkpoint.tensors.values())
    return Inspection(
        path=str(path),
        parameters=sum(tensor.parameters for tensor in tensors),
        bytes=size,
        by_dtype=_groups(tensors, (tensor.dtype for tensor in tensors)),
        by_layer=_groups(tensors, ("none" if tensor.layer is None else str(tensor.layer) for tensor in tensors)),
        config=_config(checkpoint.config),
        merge=_made_by(checkpoint.folder),
        files=[
            FileSummary(identity.file.name, identity.size, files[identity.file], _metadata(identity.file), digest)
            for identity, digest in zip(identities, of_files, strict=True)
        ],
        tensors=tensors,
    )
