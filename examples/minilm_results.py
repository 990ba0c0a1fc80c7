"""What the example found: the rows of its table, the table, and in plain words what it shows and what it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One checkpoint of the table.

    Attributes
    ----------
    name, kind
        ``kind`` is base, tuned, merged, negated or restored.
    accuracy
        Test accuracy on each task, with its frozen head.
    similarity
        Mean cosine between this checkpoint's and the base's embeddings of sentences that belong to no task.
    alpha
        Factor of the task vectors, picked on validation texts; None where there is none.
    bytes
        Size of its safetensors file; for a restored one of the archive that it came from.
    seconds
        Wall time of the fine-tuning or of the ``taskloom`` command; None for the base.
    """

    name: str
    kind: str
    accuracy: dict[str, float]
    similarity: float
    alpha: float | None
    bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Results:
    """Everything that a run found.

    ``threads`` is torch's number, ``texts`` that of one task's texts in each split. ``norms`` are the lengths of the task vectors, and
    ``cosines`` those of each pair of them. ``sizes`` are bytes: of the archive, of the fine-tuned checkpoints that it replaces, and of
    these and the base. ``seconds`` are wall times of the parts.
    """

    seed: int
    steps: int
    threads: int
    texts: dict[str, int]
    rows: list[Row]
    norms: dict[str, float]
    cosines: dict[str, float]
    sizes: dict[str, int]
    seconds: dict[str, float]
    versions: dict[str, str]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.rows[0].accuracy)

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def of_kind(self, kind: str) -> list[Row]:
        """The rows of one kind."""
        return [row for row in self.rows if row.kind == kind]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, with the findings."""
        return asdict(self) | {"findings": findings(self)}


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        *(f"{value:.3f}" for value in row.accuracy.values()),
        f"{row.similarity:.3f}",
        "" if row.alpha is None else f"{row.alpha:g}",
        f"{row.bytes / 1e6:.1f}",
        "" if row.seconds is None else f"{row.seconds:.1f}",
    ]


def print_table(results: Results) -> None:
    """The rows as a table, with a line between their kinds."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("checkpoint", no_wrap=True)
    for name in (*results.tasks, "similarity", "alpha", "MB", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    kinds = list(dict.fromkeys(row.kind for row in results.rows))
    for kind in kinds:
        for row in results.of_kind(kind):
            table.add_row(*_cells(row))
        if kind != kinds[-1]:
            table.add_section()
    Console(width=100).print(table)


def _merge_findings(results: Results) -> list[str]:
    base, arithmetic = results.row("base"), results.row("task_arithmetic")
    found = []
    for row in results.of_kind("merged"):
        behind = [task for task in results.tasks if row.accuracy[task] <= base.accuracy[task]]
        said = f"not above the base on {' and '.join(behind)}" if behind else "above the base on every task"
        gain = sum(row.accuracy[task] - arithmetic.accuracy[task] for task in results.tasks) / len(results.tasks)
        if row is not arithmetic:
            said += f"; mean accuracy {gain:+.3f} against task_arithmetic"
        found.append(f"{row.name}: {said}")
    return found


def _negation_findings(results: Results) -> list[str]:
    base = results.row("base")
    found = []
    for target in results.tasks:
        row = results.row(f"negated-{target}")
        others = ", ".join(f"{task} {row.accuracy[task] - base.accuracy[task]:+.3f}" for task in results.tasks if task != target)
        unchanged = "; no larger alpha lowered it and kept the control" if row.alpha == 0 else ""
        found.append(f"{row.name}: {target} {row.accuracy[target] - base.accuracy[target]:+.3f}, control {others}{unchanged}")
    return found


def _compression_findings(results: Results) -> list[str]:
    restored = ", ".join(
        f"{task} {results.row(f'restored-{task}').accuracy[task] - results.row(f'tuned-{task}').accuracy[task]:+.3f}"
        for task in results.tasks
    )
    archive, separate, with_base = (results.sizes[name] / 1e6 for name in ("archive", "separate", "separate_and_base"))
    than = "smaller" if archive < separate else "not smaller"
    return [
        f"restored against tuned: {restored}",
        f"archive {archive:.1f} MB: {than} than the {len(results.tasks)} tuned checkpoints ({separate:.1f} MB), "
        f"{archive / with_base:.0%} of them and the base ({with_base:.1f} MB)",
    ]


def findings(results: Results) -> list[str]:
    """What the run shows, whether it is what one hopes for or not."""
    return [
        *(f"cosine of the task vectors of {pair}: {cosine:+.3f}" for pair, cosine in results.cosines.items()),
        *_merge_findings(results),
        *_negation_findings(results),
        *_compression_findings(results),
    ]


def mean_ratio(found: dict[str, float], reference: dict[str, float]) -> float:
    """Mean over the tasks of accuracy divided by a reference's, the papers' normalised accuracy."""
    ratios: Sequence[float] = [found[task] / reference[task] for task in reference]
    return sum(ratios) / len(ratios)
