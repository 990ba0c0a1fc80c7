"""An evolutionary search over tuples of small integers, within a constraint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Gene = tuple[int, ...]

# Children that break the constraint are thrown away; after so many tries per place a generation stays smaller.
_TRIES = 20


@dataclass(frozen=True)
class Evolution:
    """How to search for widths per part of an encoder.

    Attributes
    ----------
    population
        Candidates of a generation. Default 50.
    generations
        Default 20.
    mutation
        Probability that an entry of a child is drawn anew. Default 0.1.
    seed
        Of all random numbers. Default 0.

    Raises
    ------
    TypeError
        If a count or the seed is no integer.
    ValueError
        If a number is out of range.

    Notes
    -----
    All of it is inferred; arXiv 2308.11744's own search was not available.
    """

    population: int = 50
    generations: int = 20
    mutation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("population", "generations", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Evolution: {name}: expected an integer, got {value!r}")
        if self.population < 2 or self.generations < 0:
            raise ValueError(f"Evolution: expected a population of at least 2 and no negative generations, got {self}")
        if not 0 < self.mutation <= 1:
            raise ValueError(f"Evolution: mutation: expected a probability in (0, 1], got {self.mutation}")


class _Children:
    """Draws children of pairs of parents: each entry of one or the other, some of them anew."""

    def __init__(self, sizes: tuple[int, ...], settings: Evolution) -> None:
        self._sizes = torch.tensor(sizes)
        self._mutation = settings.mutation
        self._generator = torch.Generator().manual_seed(settings.seed)

    def draw(self, parents: list[Gene]) -> Gene:
        mother, father = (parents[int(torch.randint(len(parents), (), generator=self._generator))] for _ in range(2))
        shares = torch.rand(3, len(self._sizes), generator=self._generator)
        child = torch.where(shares[0] < 0.5, torch.tensor(mother), torch.tensor(father))
        # rand is below 1, and float32 may round a product up to the size itself.
        fresh = torch.minimum((shares[2] * self._sizes).long(), self._sizes - 1)
        return tuple(torch.where(shares[1] < self._mutation, fresh, child).tolist())


def evolve(
    first: list[Gene],
    fits: Callable[[Gene], bool],
    rank: Callable[[Gene], tuple[float, ...]],
    sizes: tuple[int, ...],
    settings: Evolution,
) -> list[Gene]:
    """All that were compared, ``first`` among them.

    Parameters
    ----------
    first
        Candidates to start from, at least one; all of them fit.
    fits, rank
        Whether a candidate may be taken, and its place: lower is better.
    sizes
        How many values each entry has.
    settings
        See :class:`Evolution`.
    """
    children = _Children(sizes, settings)
    seen = dict.fromkeys(first)
    population = sorted(seen, key=rank)
    for _ in range(settings.generations):
        parents = population[: max(1, settings.population // 2)]
        fresh: list[Gene] = []
        for _ in range(_TRIES * settings.population):
            if len(parents) + len(fresh) >= settings.population:
                break
            child = children.draw(parents)
            if child not in seen and fits(child):
                seen[child] = None
                fresh.append(child)
        population = sorted(parents + fresh, key=rank)
    return list(seen)
