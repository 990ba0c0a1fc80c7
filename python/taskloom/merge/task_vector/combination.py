"""Linear combinations of sources, computed a tensor or a piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from taskloom.merge.pieces import share_out
from taskloom.merge.task_vector.checks import check_overflow, some
from taskloom.merge.task_vector.sources import MemorySource, Slot, Source, cut
from taskloom.ops import block_scale_merge

# Coefficients by source, in the order of the sum.
Terms = Mapping[Source, float]

_LARGEST = torch.finfo(torch.float32).max

# Entries of a piece where something is read from a file; its tensors stay in a core's cache.
PIECE = 1 << 17


def check_alike(left: Mapping[str, Slot], right: Mapping[str, Slot], doing: str) -> None:
    """Refuse vectors that are not over the same tensors.

    Raises
    ------
    KeyError
        If the names differ.
    ValueError
        If shapes or devices do.
    """
    missing, extra = left.keys() - right.keys(), right.keys() - left.keys()
    if missing or extra:
        parts = ([f"the second lacks {some(missing)}"] if missing else []) + ([f"the first lacks {some(extra)}"] if extra else [])
        raise KeyError(f"TaskVector: {doing}: the vectors' names differ: {'; '.join(parts)}")
    for name, one in left.items():
        other = right[name]
        if other.shape != one.shape:
            raise ValueError(f"TaskVector: {doing}: {name!r} has shape {other.shape} in the second vector, expected {one.shape}")
        if None not in (one.device, other.device) and other.device != one.device:
            raise ValueError(f"TaskVector: {doing}: {name!r} is on {other.device} in the second vector, expected {one.device}")


def joined(left: Slot, right: Slot) -> Slot:
    """The slot of a sum: the wider dtype, and the device of whichever has one."""
    return Slot(left.shape, torch.promote_types(left.dtype, right.dtype), left.device or right.device)


def add_terms(left: Terms, right: Terms, factor: float = 1.0) -> dict[Source, float]:
    """``left + factor * right``; a source whose coefficients cancel is gone, so that tau1 + tau2 - tau2 is tau1 to the bit."""
    total = dict(left)
    for source, coefficient in right.items():
        total[source] = total.get(source, 0.0) + factor * coefficient
    return {source: coefficient for source, coefficient in total.items() if coefficient != 0}


def coefficients(factors: Sequence[float], parts: Sequence[Tensor], base: Tensor, where: str) -> Tensor:
    """The coefficients of a sum as its op takes them: float64 where any tensor is, else float32."""
    wide = base.dtype == torch.float64 or any(part.dtype == torch.float64 for part in parts)
    if not wide and any(abs(factor) > _LARGEST for factor in factors):
        raise ValueError(f"{where}: the coefficients {list(factors)} overflow float32")
    return torch.tensor(factors, dtype=torch.float64 if wide else torch.float32, device=base.device)


def each_piece(terms: Terms, name: str, numel: int, work: Callable[[int, int, list[Tensor]], None], length: int | None = None) -> None:
    """Call ``work(begin, count, values)`` on every piece of one tensor, with the values of every source, from several threads.

    A piece is the whole tensor where every source is in memory and no ``length`` is asked for.
    """
    if not numel:
        return
    whole = [source.flat[name] for source in terms if isinstance(source, MemorySource)]
    if len(whole) == len(terms) and (length is None or numel <= length):
        work(0, numel, whole)
        return

    @contextmanager
    def opened() -> Iterator[Callable[[tuple[int, int]], None]]:
        with ExitStack() as stack:
            values = [stack.enter_context(source.opened(name)) for source in terms]
            yield lambda piece: work(*piece, [one.piece(*piece) for one in values])

    size = length or PIECE
    share_out(cut(numel, size), opened, min(torch.get_num_threads(), -(-numel // size)))


def is_plain(terms: Terms, name: str, slot: Slot) -> bool:
    """Whether a combination's tensor is that of its one source."""
    return len(terms) == 1 and all(factor == 1 and source.slots[name].dtype == slot.dtype for source, factor in terms.items())


def combined_piece(terms: Terms, name: str, slot: Slot, parts: list[Tensor]) -> Tensor:
    """The combination's values of one piece, flat and in the slot's dtype, from those of its sources.

    Raises
    ------
    ValueError
        If the result overflows the dtype.
    """
    where = f"TaskVector: {name!r}"
    if is_plain(terms, name, slot):
        return parts[0]
    # What comes from a file goes to where the others are.
    here = parts if slot.device is None else [part.to(slot.device) for part in parts]
    base = torch.zeros_like(here[0], dtype=slot.dtype)
    summed = block_scale_merge(base, here, coefficients(list(terms.values()), here, base, where))
    assert isinstance(summed, Tensor)
    check_overflow(summed, where, "the combination")
    return summed


def compute(terms: Terms, name: str, slot: Slot) -> Tensor:
    """One tensor of a combination; the source's own memory where there is nothing to compute."""
    place = slot.device or torch.device("cpu")
    if not terms or not slot.numel:
        return torch.zeros(slot.shape, dtype=slot.dtype, device=place)
    in_memory = not any(source.streams for source in terms)
    found: list[Tensor] = [] if in_memory else [torch.empty(slot.numel, dtype=slot.dtype, device=place)]

    def put(begin: int, count: int, parts: list[Tensor]) -> None:
        values = combined_piece(terms, name, slot, parts)
        if in_memory:
            found.append(values)
        else:
            found[0][begin : begin + count] = values

    with torch.no_grad():
        each_piece(terms, name, slot.numel, put)
    return found[0].view(slot.shape)
