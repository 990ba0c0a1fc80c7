"""What RoMA tunes, and towards which neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from taskloom.methods.routing.roma.recorder import RoutingRecorder, Weights, check_recorded
from taskloom.methods.routing.roma.routers import Layers
from taskloom.methods.routing.roma.tokens import Token


@dataclass(frozen=True, kw_only=True)
class RoMAConfig:
    """Settings of routing manifold alignment.

    Attributes
    ----------
    layers
        Whose routers are tuned and compared, of those that :func:`find_routers` lists: a negative number for so many last ones,
        ``"all"``, or their places. Default -5.
    token
        Whose routing weights are compared: the ``"last"``, the default, or the ``"first"`` of a sequence that is not padding.
    k
        Neighbours of a sample. Default 3.
    eps
        Instead of k neighbours all whose similarity is at least this, from 0 to 1. Default None; the paper's best is 0.5.
    sigma
        Width of the Gaussian similarity ``exp(-||a - b||^2 / (2 sigma^2))``. Default 0.5, for embeddings of unit norm; inferred.
    lam
        Factor of the manifold loss. Default 5; inferred, to be tried among 1, 5 and 20. At 0 it is router tuning.
    exclude_self
        Whether a sample is left out of its own neighbours. Default True; inferred.
    weights
        What routing weights are: ``"full"``, the default, the probabilities of all experts; ``"topk"``, the weights that the model's
        gate gives to the chosen experts, and 0. Full is inferred.
    refresh_every
        After how many steps :func:`tune_routers` computes the reference's routing weights again with the routers as they are then.
        Default 0: never; inferred.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    layers: Layers = -5
    token: Token = "last"
    k: int = 3
    eps: float | None = None
    sigma: float = 0.5
    lam: float = 5.0
    exclude_self: bool = True
    weights: Weights = "full"
    refresh_every: int = 0

    def __post_init__(self) -> None:
        check_recorded("RoMAConfig", self.layers, self.token, self.weights)
        if type(self.k) is not int or self.k < 1:
            raise ValueError(f"RoMAConfig: k: expected at least 1, an integer, got {self.k}")
        if self.eps is not None and not 0 <= self.eps <= 1:
            raise ValueError(f"RoMAConfig: eps: expected None or a similarity from 0 to 1, got {self.eps}")
        # The similarity divides by the square.
        if not 0 < self.sigma * self.sigma < math.inf or self.sigma < 0:
            raise ValueError(f"RoMAConfig: sigma: expected a finite number above 0, with such a square, got {self.sigma}")
        if not 0 <= self.lam < math.inf:
            raise ValueError(f"RoMAConfig: lam: expected a finite number of at least 0, got {self.lam}")
        if type(self.refresh_every) is not int or self.refresh_every < 0:
            raise ValueError(f"RoMAConfig: refresh_every: expected at least 0, an integer, got {self.refresh_every}")

    def recorder(self, model: nn.Module) -> RoutingRecorder:
        """A recorder of the routing weights that are compared."""
        return RoutingRecorder(model, self.layers, token=self.token, weights=self.weights)
