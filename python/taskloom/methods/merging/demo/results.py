"""What the demo measured, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from taskloom.methods.merging.demo.tall import TallCompression


@dataclass(frozen=True)
class Row:
    """One model of the table, or one model per task.

    Attributes
    ----------
    name
        A merge method of the recipes, or ``pre-trained``, ``single-task``, ``tall_restored``.
    accuracy
        Test accuracy on each task.
    mean, normalised
        Mean accuracy; mean of the accuracy divided by the single-task model's on the same task.
    alpha
        The recipe's ``lambda``, picked by validation accuracy; None where there is none.
    settings
        The recipe's other parameters.
    seconds, merge_seconds
        Wall time of the whole command, start of the interpreter included, and of the streaming pass in it; None where no command ran.
    bytes_written
        Size of the model's files; for single-task models of all of them.
    kept_density
        Share of each task vector's entries that the merge kept; None where no command ran.
    """

    name: str
    accuracy: list[float]
    mean: float
    normalised: float
    alpha: float | None = None
    settings: dict[str, Any] | None = None
    seconds: float | None = None
    merge_seconds: float | None = None
    bytes_written: int | None = None
    kept_density: list[float] | None = None


def make_row(name: str, accuracy: Sequence[float], single_task: Sequence[float], **others: Any) -> Row:
    """A row from its accuracies and the single-task models' ones."""
    normalised = [got / ceiling for got, ceiling in zip(accuracy, single_task, strict=True)]
    return Row(name, list(accuracy), sum(accuracy) / len(accuracy), sum(normalised) / len(normalised), **others)


@dataclass(frozen=True)
class DemoResults:
    """Everything that the table and the report show.

    ``cosines`` are those of the task vectors, ``seconds`` the wall time of each part of the demo and of the whole.
    """

    seed: int
    tasks: int
    width: int
    parameters: int
    alphas: list[float]
    rows: list[Row]
    cosines: list[list[float | None]]
    compression: TallCompression
    seconds: dict[str, float]
    versions: dict[str, str]

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def merges(self) -> list[Row]:
        """The rows that the command made."""
        return [row for row in self.rows if row.seconds is not None]

    def to_dict(self) -> dict[str, Any]:
        """The results as plain types, sums of the compression included."""
        plain = asdict(self)
        plain["compression"] |= {"stored_bytes": self.compression.stored_bytes, "ratio": self.compression.ratio}
        return plain
