"""Matches the tensors of several checkpoints by name, and refuses models that do not fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taskloom.merge.checkpoint import Checkpoint
from taskloom.merge.errors import CheckpointError, shown
from taskloom.merge.header import FLOATING, TensorEntry
from taskloom.merge.tied import is_tied_copy, tied_embedding

_SHOWN = 3
_MOST_DIMENSIONS = 64

# Buffers that a model computes when it is built; old checkpoints store them, newer ones do not.
_COMPUTED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class AlignedTensor:
    """One tensor of the output: its entry in the reference model, and in every member (None: copied from the reference).

    ``setting_name`` is the name that filters, gradients and random masks go by: that of the embedding for a tied head.
    """

    name: str
    reference: TensorEntry
    members: tuple[TensorEntry, ...] | None
    setting_name: str


@dataclass(frozen=True)
class Alignment:
    """The tensors of the output in the reference's file order, and what was noticed on the way."""

    tensors: tuple[AlignedTensor, ...]
    notes: tuple[str, ...]


def is_recomputed(name: str) -> bool:
    """Whether a tensor is a buffer that models compute when they are built: it is copied, never merged or masked."""
    return name.endswith(_COMPUTED)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    first = ", ".join(shown(name) for name in names[:_SHOWN])
    return first + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _raise_unmatched(reference: Checkpoint, member: Checkpoint, missing: Sequence[str], extra: Sequence[str]) -> None:
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} of its tensors: {some(missing)}")
    if extra:
        parts.append(f"has {len(extra)} tensors more: {some(extra)}")
    if parts:
        no_config = any(name.endswith("weight") and ("head" in name or "embed" in name) for name in (*missing, *extra))
        hint = "; no config.json says whether heads and embeddings are tied" if no_config and member.config is None else ""
        raise CheckpointError(f"model {member.label!r} does not fit {reference.label!r}: it {' and '.join(parts)}{hint}")


def _raise_unlike(reference: Checkpoint, member: Checkpoint, unlike: Sequence[tuple[str, str, str]]) -> None:
    if unlike:
        first = "; ".join(f"{shown(name)} is {expected} there and {got} here" for name, expected, got in unlike[:_SHOWN])
        more = f" and {len(unlike) - _SHOWN} more" if len(unlike) > _SHOWN else ""
        raise CheckpointError(f"model {member.label!r} does not fit {reference.label!r}: {len(unlike)} tensors differ: {first}{more}")


def _refuse_huge(reference: Checkpoint) -> None:
    """The format takes any number of sizes, up to 2**64 - 1 where the tensor is empty; numpy takes 64, torch 64 signed bits."""
    for name, entry in reference.tensors.items():
        if len(entry.shape) > _MOST_DIMENSIONS:
            raise CheckpointError(
                f"model {reference.label!r}: tensor {shown(name)} has {len(entry.shape)} dimensions, more than {_MOST_DIMENSIONS}"
            )
        if any(size >= 2**63 for size in entry.shape):
            raise CheckpointError(
                f"model {reference.label!r}: tensor {shown(name)} has a size of 2**63 or more: {shown(list(entry.shape))}"
            )


def _match(reference: Checkpoint, member: Checkpoint, notes: list[str]) -> dict[str, TensorEntry]:
    """The member's entry for every merged tensor of the reference."""
    matched: dict[str, TensorEntry] = {}
    missing: list[str] = []
    unlike: list[tuple[str, str, str]] = []
    for name, expected in reference.tensors.items():
        if expected.dtype not in FLOATING or is_recomputed(name):
            continue
        found = member.tensors.get(name)
        if found is None:
            embedding = tied_embedding(member, name, expected.shape)
            if embedding is None:
                missing.append(name)
                continue
            notes.append(f"{member.label}: {name} is tied, its {embedding} stands for it")
            found = member.tensors[embedding]
        if found.shape != expected.shape:
            unlike.append((name, shown(list(expected.shape)), shown(list(found.shape))))
        elif found.dtype not in FLOATING:
            unlike.append((name, expected.dtype, found.dtype))
        matched[name] = found
    extra = []
    for name, entry in member.tensors.items():
        if name in reference.tensors or entry.dtype not in FLOATING or is_recomputed(name):
            continue
        if tied_embedding(reference, name, entry.shape) is not None and is_tied_copy(member, name):
            notes.append(f"{member.label}: {name} is tied and not in {reference.label}, so it is left out")
            continue
        extra.append(name)
    _raise_unmatched(reference, member, missing, extra)
    _raise_unlike(reference, member, unlike)
    return matched


def align(reference: Checkpoint, members: Sequence[Checkpoint]) -> Alignment:
    """Match every member's tensors with the reference's.

    Parameters
    ----------
    reference
        The model that decides which tensors the output has, in which order: the base, or the first model where there is no base.
    members
        The models whose values are merged; the reference may be one of them.

    Returns
    -------
    Alignment
        Floating-point tensors (F32, BF16, F16, F64) with an entry per member; all others, and buffers that models recompute, are
        copied from the reference.

    Raises
    ------
    CheckpointError
        If a member lacks a tensor, has one too many, or has another shape or kind of dtype; names tensors, model and both shapes.
    """
    _refuse_huge(reference)
    notes: list[str] = []
    matches = [_match(reference, member, notes) for member in members]
    tensors = []
    copied = []
    for name, entry in reference.tensors.items():
        if entry.dtype not in FLOATING or is_recomputed(name):
            copied.append(name)
            tensors.append(AlignedTensor(name, entry, None, name))
            continue
        tied = tied_embedding(reference, name, entry.shape)
        tensors.append(AlignedTensor(name, entry, tuple(match[name] for match in matches), tied or name))
    if len(copied) == len(tensors):
        raise CheckpointError(f"model {reference.label!r} has no floating-point tensor (F32, BF16, F16, F64) to merge")
    if copied:
        notes.append(f"copied from {reference.label} without merging (not floating point, or recomputed by the model): {some(copied)}")
    return Alignment(tuple(tensors), tuple(notes))
