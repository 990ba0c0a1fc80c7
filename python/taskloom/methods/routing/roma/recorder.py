"""Keeps the routing weights of one token per sequence, and nothing of the others."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from taskloom.methods.routing.roma.routers import (
    Layers,
    check_layers,
    chosen_routers,
    gate_options,
    makes_float32_logits,
    probabilities,
    score_of,
    topk_weights,
)
from taskloom.methods.routing.roma.tokens import AskedTokens, Token
from taskloom.nn.router_patch import router_logits

Weights = Literal["full", "topk"]


def check_recorded(op: str, layers: Layers, token: str, weights: str) -> None:
    """Raise ValueError where a setting is unknown."""
    check_layers(op, layers)
    if token not in get_args(Token):
        raise ValueError(f"{op}: token: expected 'last' or 'first', got {token!r}")
    if weights not in get_args(Weights):
        raise ValueError(f"{op}: weights: expected 'full' or 'topk', got {weights!r}")


def logits_of_rows(router: nn.Module, hidden: Tensor, output: Any, rows: Tensor) -> Tensor:
    """A router's logits ``[B, E]`` of some rows: its output where that is one tensor, else by its weight.

    A tuple's first is no logits for certain: some versions of transformers return probabilities by that name.
    """
    experts = router.get_parameter("weight").shape[0]
    if isinstance(output, Tensor) and output.shape[-1] == experts:
        return output.reshape(-1, experts)[rows]
    return router_logits(router, hidden.reshape(-1, hidden.shape[-1])[rows], makes_float32_logits(router))


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a router was called with."""
    hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
    return hidden


class RoutingRecorder:
    """Records the routing weights of a model's calls inside a ``with`` block.

    Parameters
    ----------
    model
        What is called: a model of transformers or any module with routers that :func:`find_routers` finds. An argument of the call named
        ``attention_mask``, ``[B, S]``, tells what is padding; without one nothing is.
    layers, token, weights
        As of :class:`RoMAConfig`. Defaults -5, ``"last"`` and ``"full"``.

    Raises
    ------
    ValueError
        If a setting is unknown, the model has no router or fewer than ``layers`` says, or it is not known of a router
        whether it scores by a softmax or a sigmoid. If ``weights="topk"`` and a gate is not known.

    Attributes
    ----------
    positions
        int64 ``[B]`` or None, the default: set it before a call to ask for these positions, such as the last of each prompt where
        sequences hold answers too.
    experts
        The number of experts of each recorded router.

    Notes
    -----
    Kept are B rows per router, with their graph where grad is enabled, so that a loss of them trains the routers. Where a layer runs under
    activation checkpointing it has to be the non-reentrant kind, and the block has to enclose the backward pass. Inside
    ``torch.compile``d models nothing is recorded reliably; record eagerly.
    """

    def __init__(self, model: nn.Module, layers: Layers = -5, *, token: Token = "last", weights: Weights = "full") -> None:
        check_recorded("RoutingRecorder", layers, token, weights)
        self._model, self._token, self._weights = model, token, weights
        self.routers = chosen_routers(model, layers)
        for router in self.routers:
            score_of(router)
        if weights == "topk":
            for router in self.routers:
                if gate_options(router) is None:
                    topk_weights(router, torch.empty(0, router.get_parameter("weight").shape[0]))
        self.experts = [len(router.get_parameter("weight")) for router in self.routers]
        self.positions: Tensor | None = None
        self._asked: AskedTokens | None = None
        self._with_grad = False
        self._found: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        """Begin to record.

        Raises
        ------
        RuntimeError
            If it records already.
        """
        if self._handles:
            raise RuntimeError("RoutingRecorder: it records already")
        self._handles = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for place, router in enumerate(self.routers):
            self._handles.append(router.register_forward_hook(partial(self._keep, place), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave no hook behind; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._asked = [], None

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._asked = AskedTokens(model, args, kwargs, self._token, self.positions)
        self._found, self._with_grad = {}, torch.is_grad_enabled()

    def _keep(self, place: int, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._asked is None:
            raise RuntimeError("RoutingRecorder: a router was called outside its model's forward, so that its sequences are not known")
        if self._with_grad and not torch.is_grad_enabled() and router.get_parameter("weight").requires_grad:
            raise RuntimeError(
                "RoutingRecorder: a trained router ran without grad inside a call with it, as under reentrant activation checkpointing, so "
                "that a loss of its routing weights would not train it; use checkpoint(..., use_reentrant=False)"
            )
        hidden = first_input(args, kwargs)
        rows = self._asked.rows(hidden.numel() // hidden.shape[-1], hidden.device)
        logits = logits_of_rows(router, hidden, output, rows)
        self._found[place] = (probabilities if self._weights == "full" else topk_weights)(router, logits)

    @property
    def r(self) -> Tensor:
        """The routing weights of the last call: float32 ``[B, R]``, the experts of one router after those of another.

        Raises
        ------
        RuntimeError
            If there was no call, or a router was not reached.
        """
        if len(self._found) != len(self.routers):
            raise RuntimeError(f"RoutingRecorder: expected {len(self.routers)} routers in the model's last call, got {len(self._found)}")
        found = [self._found[place] for place in range(len(self.routers))]
        # Layers may be on several devices.
        return torch.cat([one.to(found[-1].device) for one in found], dim=1)
