"""HoME: two levels of experts, gates that may read the shared experts and those of their own category, and self gates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taskloom.methods.routing.home.experts import ExpertPool
from taskloom.methods.routing.home.tasks import Categories, Towers, check_tasks
from taskloom.nn import MultiGateMoE
from taskloom.nn.multi_gate import check_features, check_sizes
from taskloom.ops import gate_statistics

SHARED = "shared"
_TASK = "task "
PerLevel = int | tuple[int, int]


@dataclass(frozen=True)
class LevelReport:
    """What one level's gates and experts did on a batch.

    Attributes
    ----------
    gates, experts
        Their names.
    weight
        ``[G, E]``, mean weight of each expert in each gate, without the self gates.
    entropy
        ``[G]``, mean entropy of each gate's weights in nats.
    zero_fraction
        ``[E]``, the share of an expert's outputs that are exactly 0: near 1 for an expert that has died.
    std
        ``[E]``, the standard deviation of an expert's outputs.
    """

    gates: tuple[str, ...]
    experts: tuple[str, ...]
    weight: Tensor
    entropy: Tensor
    zero_fraction: Tensor
    std: Tensor


class GatedLevel(nn.Module):
    """A pool of experts and the gates that read it.

    Parameters
    ----------
    pool
        The experts.
    gates
        The groups that each gate reads, by the gate's name.
    gate_dim
        Features of the gates' input.
    own
        The group of each gate's self gate, by the gate's name; default None: no self gates.
    """

    def __init__(self, pool: ExpertPool, gates: dict[str, Sequence[str]], gate_dim: int, own: dict[str, str] | None = None) -> None:
        super().__init__()
        self.pool, self.gates = pool, tuple(gates)
        self_mask = None if own is None else pool.mask([[own[gate]] for gate in gates])
        self.gate = MultiGateMoE(gate_dim, pool.n_experts, len(gates), pool.mask(list(gates.values())), self_mask=self_mask)

    def forward(self, inputs: Sequence[Tensor], gate_input: Tensor) -> Tensor:
        """``[B, gates, out_dim]`` from an input ``[B, in_dim]`` for each group and ``[B, gate_dim]`` or ``[B, gates, gate_dim]``."""
        out: Tensor = self.gate(gate_input, self.pool(inputs))[0]
        return out

    def report(self, inputs: Sequence[Tensor], gate_input: Tensor) -> tuple[Tensor, LevelReport]:
        """The same, and what gates and experts did."""
        z = self.pool(inputs)
        out, probs = self.gate(gate_input, z)
        experts = tuple(f"{group} {place}" for group, size in self.pool.groups.items() for place in range(size))
        gates = gate_statistics(probs)
        flat = z.float().transpose(0, 1).flatten(1)
        return out, LevelReport(self.gates, experts, gates.mean, gates.entropy, (flat == 0).float().mean(1), flat.std(1))


def _two(name: str, value: PerLevel) -> tuple[int, int]:
    if isinstance(value, tuple) and len(value) != 2:
        raise ValueError(f"HoME: {name}: expected one number or one for each of 2 levels, got {value}")
    first, second = value if isinstance(value, tuple) else (value, value)
    check_sizes("HoME", **{f"{name} of level 1": first, f"{name} of level 2": second})
    return first, second


class HoME(nn.Module):
    """Hierarchy of multi-gate experts.

    Level 1 has experts that all share and experts of each category; a gate for each category, which reads the shared ones and its own, and
    a shared gate, which reads all. Level 2 has shared experts, experts of each category and experts of each task, on the outputs of
    level 1; a gate for each task reads the shared ones, those of its category and its own, from the outputs of its category's gate and of
    the shared gate.

    Parameters
    ----------
    in_dim
        Features of the input.
    tasks
        The tasks of each category, such as ``{"watch": ["long view", "finish"], "inter": ["like", "follow"]}``; one category or more.
    expert_dim
        Features of the experts' outputs. Default 256.
    n_shared, n_category
        Shared experts, and experts of a category: one number, or one for each level. Default (2, 1) for both.
    n_specific
        Experts of a task in level 2; 0, which goes without self gates only, leaves shared and category experts. Default 1.
    tower_dims
        Layers between a task's features and its logit. Default (128, 64).
    feature_gate, self_gate
        Whether groups have feature gates, and gates have self gates over their own experts. Default: both.
    n_lora, rank
        Of the feature gates, as in :class:`ExpertPool`. Default 2 and None.
    hidden
        Layers inside the experts. Default: none.
    norm, activation
        Of the experts: ``"batch"`` (default), ``"layer"`` or None; ``"silu"`` (default) or ``"relu"``.

    Raises
    ------
    ValueError
        If a task is in two categories or in none, a size is below 1, or norm or activation is unknown; in training with batch norms, if a
        batch has one row.

    Notes
    -----
    Source: "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou", arXiv 2408.05430. Inferred: the self gates read
    what their gate reads (the paper's re-implementations differ), experts per group, and the cap of a feature gate's rank.
    """

    def __init__(
        self,
        in_dim: int,
        tasks: Categories,
        expert_dim: int = 256,
        n_shared: PerLevel = (2, 1),
        n_category: PerLevel = (2, 1),
        n_specific: int = 1,
        tower_dims: Sequence[int] = (128, 64),
        feature_gate: bool = True,
        self_gate: bool = True,
        *,
        n_lora: int = 2,
        rank: int | None = None,
        hidden: Sequence[int] = (),
        norm: str | None = "batch",
        activation: str = "silu",
    ) -> None:
        super().__init__()
        category_of = check_tasks("HoME", tasks)
        shared, category = _two("n_shared", n_shared), _two("n_category", n_category)
        check_sizes("HoME", in_dim=in_dim, expert_dim=expert_dim)
        if n_specific < (1 if self_gate else 0):
            raise ValueError(f"HoME: n_specific: expected at least 1 (0 without self gates), got {n_specific}")
        names = [_category(name) for name in tasks]
        self.tasks, self._category_of = tuple(category_of), [list(tasks).index(one) for one in category_of.values()]
        self._specific = n_specific > 0

        def pool(groups: dict[str, int], width: int) -> ExpertPool:
            return ExpertPool(
                groups, width, expert_dim, hidden, norm=norm, activation=activation, feature_gate=feature_gate, n_lora=n_lora, rank=rank
            )

        first = {SHARED: shared[0], **dict.fromkeys(names, category[0])}
        meta: dict[str, Sequence[str]] = {**{name: (SHARED, name) for name in names}, SHARED: (SHARED, *names)}
        self.level1 = GatedLevel(pool(first, in_dim), meta, in_dim, {name: name for name in meta} if self_gate else None)
        own = {task: _task(task) for task in self.tasks} if self._specific else {}
        second = {SHARED: shared[1], **dict.fromkeys(names, category[1]), **dict.fromkeys(own.values(), n_specific)}
        reads: dict[str, Sequence[str]] = {
            task: (SHARED, _category(one), *([own[task]] if self._specific else [])) for task, one in category_of.items()
        }
        self.level2 = GatedLevel(pool(second, expert_dim), reads, 2 * expert_dim, own if self_gate else None)
        self.towers = Towers(self.tasks, expert_dim, tower_dims)

    def _second_inputs(self, meta: Tensor) -> tuple[list[Tensor], Tensor]:
        """What level 2's groups and gates read, from level 1's outputs ``[B, categories + 1, d]``, the shared one last."""
        *category, shared = meta.unbind(1)
        specific = [category[place] for place in self._category_of] if self._specific else []
        # Unbound again: what the gates' gradients add up to first is part of the claim's bits.
        read = meta.unbind(1)
        own = torch.stack([read[place] for place in self._category_of], 1)
        gates = torch.cat([own, shared[:, None].expand_as(own)], 2)
        return [shared, *category, *specific], gates

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The logit ``[B]`` of each task from ``[B, in_dim]``."""
        check_features("HoME", x, self.level1.gate.in_dim)
        inputs, gates = self._second_inputs(self.level1([x] * len(self.level1.pool.groups), x))
        logits: dict[str, Tensor] = self.towers(self.level2(inputs, gates).unbind(1))
        return logits

    @torch.no_grad()
    def gate_report(self, x: Tensor) -> dict[str, LevelReport]:
        """What gates and experts do on a batch, in the module's present mode; running statistics are left alone only in eval mode.

        Parameters
        ----------
        x
            ``[B, in_dim]``.

        Returns
        -------
        dict
            A :class:`LevelReport` for ``"level1"`` and ``"level2"``.
        """
        check_features("HoME", x, self.level1.gate.in_dim)
        meta, first = self.level1.report([x] * len(self.level1.pool.groups), x)
        _, second = self.level2.report(*self._second_inputs(meta))
        return {"level1": first, "level2": second}

    def get_share_params(self) -> Iterator[nn.Parameter]:
        """The parameters that several tasks share, as LibMTL's encoders have it: all but the towers and the groups of single tasks.

        The gates of a level are one matrix, which counts as shared.
        """
        yield from self.level1.parameters()
        yield from self.level2.gate.parameters()
        pool = self.level2.pool
        shared = [not name.startswith(_TASK) for name in pool.groups]
        for parts in (pool.experts, pool.gates or ()):
            for part, several in zip(parts, shared, strict=False):
                if several:
                    yield from part.parameters()


def _category(name: str) -> str:
    return f"category {name}"


def _task(name: str) -> str:
    return f"{_TASK}{name}"
