"""Merges of checkpoints that are given as task vectors, in one streaming pass of the merge's executor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

from taskloom.merge.errors import CheckpointError
from taskloom.merge.identity import FileIdentity
from taskloom.merge.locate import locate
from taskloom.merge.recipe import find_method
from taskloom.merge.report import MergeReport
from taskloom.merge.run import prepare, run_plan
from taskloom.merge.stages import Method
from taskloom.merge.task_vector.algebra import Combination
from taskloom.merge.task_vector.checks import check_number
from taskloom.merge.task_vector.reading import CheckpointSource, FileSource

Vector = TypeVar("Vector", bound=Combination)


class MergeOptions(TypedDict, total=False):
    """Options of :func:`taskloom.merge.merge_checkpoints` that mean the same here."""

    threads: int
    max_ram: str | int | None
    device: str | None
    max_vram: str | int | None
    plot: bool
    report: bool
    copy_tokenizer: bool
    write_card: bool
    overwrite: bool
    resume: bool
    progress: Callable[[int], None] | None


_MERGE = "merge_task_vectors"
_SAVE = "vector.save(path) and TaskVector.load(path) make a vector of one file of it"


def _run(
    recipe: Mapping[str, Any],
    known: Sequence[FileIdentity],
    out: str | PathLike[str],
    seed: int | None,
    shard_size: str | int,
    options: MergeOptions,
) -> MergeReport:
    """Carry a recipe out on the files that the vectors were opened on."""
    for identity in known:
        identity.check_unchanged()
    loaded, planned = prepare(recipe, seed=seed, shard_size=shard_size)
    opened = {identity.file: identity for model in planned.cast.models for identity in model.files}
    for identity in known:
        if opened.get(identity.file, identity) != identity:
            raise CheckpointError(f"{identity.file}: changed since the task vector was opened")
    return run_plan(loaded, planned, Path(out), **options)


def _checkpoint_terms(vector: Combination, doing: str) -> dict[CheckpointSource, float]:
    """A vector's terms, all of them exact differences of checkpoints."""
    terms: dict[CheckpointSource, float] = {}
    for source, factor in vector._terms.items():
        if not isinstance(source, CheckpointSource):
            kind = "a saved vector" if isinstance(source, FileSource) else "in memory"
            raise ValueError(
                f"TaskVector: {doing}: expected differences of checkpoints (from_checkpoints), got a term that is {kind}; {_SAVE}"
            )
        if source.dtype is not None:
            raise ValueError(
                f"TaskVector: {doing}: the differences from {source.tuned.label!r} are rounded to {source.dtype}, a merge's are not; "
                f"open them without a dtype, or: {_SAVE}"
            )
        terms[source] = factor
    return terms


def _task_arithmetic(base: str, terms: Mapping[CheckpointSource, float], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of the base plus a sum of differences; a copy of the base where nothing is left of the sum."""
    weights: dict[str, float] = {}
    for source, factor in terms.items():
        if source.tuned.located.path.resolve() != source.base.located.path.resolve():
            label = source.tuned.located.pinned
            weights[label] = weights.get(label, 0.0) + factor
    if not any(weights.values()):
        return {"merge_method": "passthrough", "models": [{"model": base}]}
    models = [{"model": label, "parameters": {"weight": weight}} for label, weight in weights.items() if weight]
    return {"merge_method": "task_arithmetic", "base_model": base, "models": models, "parameters": dict(parameters)}


def _identities(sources: Sequence[CheckpointSource]) -> list[FileIdentity]:
    return [identity for source in sources for model in (source.base, source.tuned) for identity in model.files]


def _check_base(sources: Sequence[CheckpointSource], base: Path, label: str, doing: str) -> None:
    for source in sources:
        if source.base.located.path.resolve() != base.resolve():
            raise ValueError(
                f"TaskVector: {doing}: the difference of {source.tuned.label!r} is from {source.base.label!r}, expected {label!r}; "
                f"for another base, {_SAVE}"
            )


def apply_to_checkpoint(
    vector: Combination,
    base: str | PathLike[str],
    out: str | PathLike[str],
    alpha: float = 1.0,
    *,
    out_dtype: str | None = None,
    shard_size: str | int = "5GB",
    **options: Unpack[MergeOptions],
) -> MergeReport:
    """Write the checkpoint ``base + alpha * vector``; see :meth:`taskloom.TaskVector.apply_to_checkpoint`."""
    doing, factor = "apply_to_checkpoint", check_number(alpha, "alpha")
    located = locate(fspath(base))
    pinned = located.pinned
    recipe: dict[str, Any]
    sources = list(vector._terms)
    if len(sources) == 1 and isinstance(sources[0], FileSource):
        file = sources[0].identity
        weights = {pinned: 1.0, str(file.file): factor * vector._terms[sources[0]]}
        models = [{"model": label, "parameters": {"weight": weight}} for label, weight in weights.items()]
        recipe = {"merge_method": "linear", "base_model": pinned, "models": models, "parameters": {"normalize": False}}
        known = [file]
    else:
        terms = _checkpoint_terms(vector, doing)
        _check_base(list(terms), located.path, located.label, doing)
        recipe = _task_arithmetic(pinned, {source: factor * own for source, own in terms.items()}, {})
        known = _identities(list(terms))
    return _run({**recipe, "out_dtype": out_dtype}, known, out, None, shard_size, options)


def _check_factors(method: Method, parameters: Mapping[str, Any], members: Sequence[Mapping[CheckpointSource, float]]) -> None:
    """Refuse multiples and sums where a weight cannot stand for them."""
    if any(len(terms) != 1 for terms in members):
        raise ValueError(
            f"TaskVector: {_MERGE}: {method.name} selects from each model's differences, so that every vector must be one model's; "
            "only task_arithmetic takes sums"
        )
    if all(factor == 1 for terms in members for factor in terms.values()):
        return
    normalize = method.parameter("normalize")
    divides = normalize is not None and parameters.get("normalize", normalize.default) is not False
    counts = method.elected and parameters.get("elect", "sum") != "sum"
    if divides or counts or method.vote != "none":
        reason = "divides by the weights" if divides else "counts signs" if counts else "compares differences with their sum"
        hint = "; set normalize: False" if divides and not counts and method.vote == "none" else ""
        raise ValueError(f"TaskVector: {_MERGE}: {method.name} {reason}, so it takes no multiples (and no negations) of vectors{hint}")


def _weighted(vectors: object) -> dict[Combination, float]:
    """The vectors by their weights, checked for what can be seen without looking at their terms."""
    found: dict[Combination, float] = {}
    if isinstance(vectors, Mapping) and not isinstance(vectors, Combination):
        pairs = list(vectors.items())
    elif isinstance(vectors, Sequence):
        pairs = [(vector, 1.0) for vector in vectors]
    else:
        raise TypeError(f"TaskVector: {_MERGE}: expected a mapping from vectors to weights, or a list, got {type(vectors).__name__}")
    for vector, weight in pairs:
        if not isinstance(vector, Combination):
            raise TypeError(f"TaskVector: {_MERGE}: expected TaskVectors, got {type(vector).__name__}")
        if vector in found:
            raise ValueError(f"TaskVector: {_MERGE}: a vector is listed twice")
        found[vector] = check_number(weight, "weight")
    if not found:
        raise ValueError(f"TaskVector: {_MERGE}: expected at least one vector, got none")
    if len({vector.regime for vector in found}) > 1:
        raise ValueError(f"TaskVector: {_MERGE}: vectors of both regimes; convert some with as_regime()")
    return found


def _summed(members: Sequence[tuple[Mapping[CheckpointSource, float], float]]) -> dict[CheckpointSource, float]:
    total: dict[CheckpointSource, float] = {}
    for terms, weight in members:
        for source, factor in terms.items():
            total[source] = total.get(source, 0.0) + weight * factor
    return total


def merge_task_vectors(
    vectors: Mapping[Vector, float] | Sequence[Vector],
    out: str | PathLike[str],
    method: str = "task_arithmetic",
    *,
    parameters: Mapping[str, Any] | None = None,
    seed: int | None = None,
    out_dtype: str | None = None,
    shard_size: str | int = "5GB",
    **options: Unpack[MergeOptions],
) -> MergeReport:
    """Merge checkpoints that are given as task vectors of one base, negated ones included, by any method that takes differences.

    Parameters
    ----------
    vectors
        Vectors of :meth:`taskloom.TaskVector.from_checkpoints` with one base checkpoint, or multiples of them, by their weights, or in
        a sequence with weight 1 each. With ``task_arithmetic`` sums as well. A multiple stands for its factor times the weight; methods
        that divide by the weights, count signs or vote with TALL masks therefore take none.
    out
        Folder to write, as :func:`taskloom.merge.merge_checkpoints`.
    method
        A merge method's name. Not ``linear``, ``slerp`` and ``passthrough``, which merge values and not differences.
    parameters
        The method's parameters other than ``weight``, by their names in a recipe; for all vectors alike.
    seed, out_dtype, shard_size, **options
        As :func:`taskloom.merge.merge_checkpoints`; ``out_dtype`` as a recipe's.

    Returns
    -------
    MergeReport
        As :func:`taskloom.merge.merge_checkpoints`; the recipe that is written beside the weights gives the same merge.

    Raises
    ------
    ValueError
        If there is no vector, bases or regimes differ, a vector is not of checkpoints, or the method cannot take it.
    MergeError
        As :func:`taskloom.merge.merge_checkpoints`; CheckpointError also where a file changed since a vector was opened.
    """
    weighted, row, given = _weighted(vectors), find_method(method), dict(parameters or {})
    if row.base != "required" or row.interpolation != "none":
        raise ValueError(f"TaskVector: {_MERGE}: {method} merges values, not differences; merge the checkpoints themselves")
    if "weight" in given:
        raise ValueError(f"TaskVector: {_MERGE}: parameters: weights are given as vectors={{vector: weight}}")
    members = [(_checkpoint_terms(vector, _MERGE), weight) for vector, weight in weighted.items()]
    sources = [source for terms, _ in members for source in terms]
    if not sources:
        raise ValueError(f"TaskVector: {_MERGE}: expected a vector other than zero, got none")
    base = sources[0].base.located
    _check_base(sources, base.path, base.label, _MERGE)
    if method == "task_arithmetic":
        recipe = _task_arithmetic(base.pinned, _summed(members), given)
    else:
        _check_factors(row, given, [terms for terms, _ in members])
        pairs = [(source, weight * factor) for terms, weight in members for source, factor in terms.items()]
        models = [{"model": source.tuned.located.pinned, "parameters": {"weight": weight}} for source, weight in pairs]
        recipe = {"merge_method": method, "base_model": base.pinned, "models": models, "parameters": given}
    return _run({**recipe, "out_dtype": out_dtype}, _identities(sources), out, seed, shard_size, options)
