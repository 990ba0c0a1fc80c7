"""The merges that the demo makes: each method's fixed settings, and the recipe they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ALPHAS = tuple(round(0.1 * step, 1) for step in range(1, 21))


@dataclass(frozen=True)
class DemoMethod:
    """A merge method of the demo.

    Attributes
    ----------
    name
        The recipe's ``merge_method``.
    settings
        Parameters of the whole merge, without the factor of the merged delta.
    scaled
        Whether that factor, the recipe's ``lambda``, is picked by validation accuracy.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    scaled: bool = True

    def recipe(self, base: str, models: Sequence[str], alpha: float | None, seed: int) -> dict[str, Any]:
        """The recipe that merges ``models`` with every weight 1 and ``lambda`` = ``alpha``."""
        recipe: dict[str, Any] = {"merge_method": self.name}
        if self.name != "linear":
            recipe["base_model"] = base
        recipe["models"] = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
        parameters = dict(self.settings)
        if alpha is not None:
            parameters["lambda"] = alpha
        if parameters:
            recipe["parameters"] = parameters
        recipe["seed"] = seed
        return recipe


# ties, breadcrumbs and consensus_ta as in their papers' code. DARE's paper drops 90 % of a large model's delta, which one of this size
# does not survive; 0.5 is what mergekit's examples take. Only the factor of the merged delta is tuned.
METHODS = (
    DemoMethod("linear", scaled=False),
    DemoMethod("task_arithmetic"),
    DemoMethod("ties", {"density": 0.2}),
    DemoMethod("dare_ties", {"density": 0.5}),
    DemoMethod("breadcrumbs", {"density": 0.15, "gamma": 0.01}),
    DemoMethod("consensus_ta", {"tall_mask_lambda": 0.4, "consensus_k": 2}),
)
