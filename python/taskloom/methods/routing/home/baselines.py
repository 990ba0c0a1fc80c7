"""What HoME is compared with: one gate, a gate for each task, and shared experts beside each task's own, in one level or several.

They are masks of the same multi-gate over the same experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from taskloom.methods.routing.home.experts import ExpertPool
from taskloom.methods.routing.home.model import SHARED, GatedLevel, LevelReport
from taskloom.methods.routing.home.tasks import Towers
from taskloom.nn.multi_gate import check_features, check_sizes


def _check_names(model: str, tasks: Sequence[str]) -> tuple[str, ...]:
    if isinstance(tasks, str) or not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"{model}: tasks: expected a list of one or more different names, got {tasks!r}")
    return tuple(tasks)


class MMoE(nn.Module):
    """Multi-gate mixture of experts: all experts are shared, and each task has a gate.

    Parameters
    ----------
    in_dim
        Features of the input.
    tasks
        Their names.
    expert_dim, n_experts
        Features of the experts' outputs, and their number. Default 256 and 8.
    tower_dims
        Layers between a task's features and its logit. Default (128, 64).
    hidden
        Layers inside the experts. Default: none.
    norm, activation
        Of the experts, as in HoME; default None and ``"relu"``, the baselines' expert.
    one_gate
        Whether all tasks read one gate: a mixture of experts (MoE). Default: False.

    Notes
    -----
    Source: Ma et al., KDD 2018; the mixture of one gate is Jacobs et al., 1991.
    """

    def __init__(
        self,
        in_dim: int,
        tasks: Sequence[str],
        expert_dim: int = 256,
        n_experts: int = 8,
        tower_dims: Sequence[int] = (128, 64),
        *,
        hidden: Sequence[int] = (),
        norm: str | None = None,
        activation: str = "relu",
        one_gate: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = _check_names("MMoE", tasks)
        check_sizes("MMoE", n_experts=n_experts)
        pool = ExpertPool({SHARED: n_experts}, in_dim, expert_dim, hidden, norm=norm, activation=activation)
        gates: dict[str, Sequence[str]] = {"all": (SHARED,)} if one_gate else dict.fromkeys(self.tasks, (SHARED,))
        self.level = GatedLevel(pool, gates, in_dim)
        self.towers = Towers(self.tasks, expert_dim, tower_dims)

    @torch.no_grad()
    def gate_report(self, x: Tensor) -> dict[str, LevelReport]:
        """What gates and experts do on a batch ``[B, in_dim]``; see :meth:`HoME.gate_report`."""
        check_features("MMoE", x, self.level.gate.in_dim)
        return {"level1": self.level.report([x], x)[1]}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The logit ``[B]`` of each task from ``[B, in_dim]``."""
        check_features("MMoE", x, self.level.gate.in_dim)
        mixed = self.level([x], x).expand(-1, len(self.tasks), -1)
        logits: dict[str, Tensor] = self.towers(mixed.unbind(1))
        return logits


class PLE(nn.Module):
    """Progressive layered extraction: levels of shared experts and experts of each task; with one level it is CGC.

    A task's gate reads the shared experts and the task's own. In all levels but the last a shared gate reads all experts. A level's groups
    and gates read what the gates of their name made in the level before.

    Parameters
    ----------
    in_dim, tasks, expert_dim, tower_dims, hidden, norm, activation
        As in :class:`MMoE`.
    n_shared, n_specific
        Shared experts, and experts of each task, in each level. Default 1 and 1.
    levels
        Default 2; 1 is customised gate control (CGC).

    Notes
    -----
    Source: Tang et al., RecSys 2020.
    """

    def __init__(
        self,
        in_dim: int,
        tasks: Sequence[str],
        expert_dim: int = 256,
        n_shared: int = 1,
        n_specific: int = 1,
        tower_dims: Sequence[int] = (128, 64),
        *,
        levels: int = 2,
        hidden: Sequence[int] = (),
        norm: str | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.tasks, self.in_dim = _check_names(type(self).__name__, tasks), in_dim
        check_sizes(type(self).__name__, in_dim=in_dim, n_shared=n_shared, n_specific=n_specific, levels=levels)
        if SHARED in self.tasks:
            raise ValueError(f"{type(self).__name__}: tasks: {SHARED!r} is the name of the shared experts")
        reads: dict[str, Sequence[str]] = {task: (SHARED, task) for task in self.tasks}
        self.levels = nn.ModuleList()
        for level in range(levels):
            width = in_dim if level == 0 else expert_dim
            groups = {**dict.fromkeys(self.tasks, n_specific), SHARED: n_shared}
            pool = ExpertPool(groups, width, expert_dim, hidden, norm=norm, activation=activation)
            gates = reads if level == levels - 1 else {**reads, SHARED: (*self.tasks, SHARED)}
            self.levels.append(GatedLevel(pool, gates, width))
        self.towers = Towers(self.tasks, expert_dim, tower_dims)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The logit ``[B]`` of each task from ``[B, in_dim]``."""
        logits: dict[str, Tensor] = self.towers(self._run(x, False)[0].unbind(1))
        return logits

    @torch.no_grad()
    def gate_report(self, x: Tensor) -> dict[str, LevelReport]:
        """What gates and experts do on a batch ``[B, in_dim]``; see :meth:`HoME.gate_report`."""
        return self._run(x, True)[1]

    def _run(self, x: Tensor, reporting: bool) -> tuple[Tensor, dict[str, LevelReport]]:
        check_features(type(self).__name__, x, self.in_dim)
        reports: dict[str, LevelReport] = {}
        inputs, said, out = [x] * (len(self.tasks) + 1), x, x
        for place, level in enumerate(one for one in self.levels if isinstance(one, GatedLevel)):
            if place:
                inputs, said = list(out.unbind(1)), out[:, : len(level.gates)]
            if reporting:
                out, reports[f"level{place + 1}"] = level.report(inputs, said)
            else:
                out = level(inputs, said)
        return out, reports


class CGC(PLE):
    """Customised gate control: :class:`PLE` of one level; see there for the parameters."""

    def __init__(
        self,
        in_dim: int,
        tasks: Sequence[str],
        expert_dim: int = 256,
        n_shared: int = 1,
        n_specific: int = 1,
        tower_dims: Sequence[int] = (128, 64),
        *,
        hidden: Sequence[int] = (),
        norm: str | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__(
            in_dim, tasks, expert_dim, n_shared, n_specific, tower_dims, levels=1, hidden=hidden, norm=norm, activation=activation
        )
