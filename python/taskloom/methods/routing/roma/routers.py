"""The routers of a model: finding them, and training nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taskloom.nn import TopKRouter
from taskloom.nn.router_patch import FAMILIES, ROUTER_PATHS, routers_of
from taskloom.nn.router_presets import GateOptions
from taskloom.ops import gate_probabilities

Layers = int | Literal["all"] | Sequence[int]


def check_layers(op: str, layers: Any) -> None:
    """Raise ValueError where ``layers`` is none of what :class:`RoMAConfig` takes."""
    if layers == "all" if isinstance(layers, str) else type(layers) is int and layers < 0:
        return
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise ValueError(f"{op}: layers: expected a negative number for so many last routers, 'all', or a list of places, got {layers!r}")
    if not layers or any(type(place) is not int or place < 0 for place in layers) or len(set(layers)) != len(layers):
        raise ValueError(f"{op}: layers: expected one or more places, each once, integers of at least 0, got {layers!r}")


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a model's sparse layers, in the model's order.

    A router is a :class:`taskloom.nn.TopKRouter`, a router of transformers 5 (OLMoE, Qwen2-MoE, Qwen3-MoE, Mixtral, GPT-OSS, DeepSeek-V2,
    DeepSeek-V3), or a module named ``gate`` or ``router`` that stands beside ``experts`` and has a weight ``[E, D]``, such as the linear
    gates of transformers 4 and the gates of DeepSeekMoE's own code.

    Raises
    ------
    ValueError
        If there is none; the message tells the names that were searched.
    """
    found = list(routers_of(model).values())
    if not found:
        raise ValueError(
            f"find_routers: model: {type(model).__name__} has no router; searched for modules named {' or '.join(ROUTER_PATHS)} beside "
            f"'experts', and for {', '.join(('TopKRouter', *FAMILIES))}"
        )
    return found


def chosen_routers(model: nn.Module, layers: Layers) -> list[nn.Module]:
    """The routers that ``layers``, which :func:`check_layers` has seen, means; see :class:`RoMAConfig`.

    Raises
    ------
    ValueError
        If there are not so many.
    """
    routers = find_routers(model)
    if layers == "all":
        return routers
    if isinstance(layers, int):
        if -layers > len(routers):
            raise ValueError(f"layers: expected at most {len(routers)} last routers, which is all of them, got {layers}")
        return routers[layers:]
    for place in layers:
        if not 0 <= place < len(routers):
            raise ValueError(f"layers: expected places from 0 to {len(routers) - 1}, got {place}")
    return [routers[place] for place in layers]


def score_of(router: Any) -> Literal["softmax", "sigmoid"]:
    """How a router makes its scores of logits; a linear gate's is a softmax.

    Raises
    ------
    ValueError
        If that is not known: the class is no known one, and the router has no attribute ``scoring_func`` that says it.
    """
    options = gate_options(router)
    if options is not None:
        return options.score
    name = type(router).__name__
    if name in FAMILIES:
        return "sigmoid" if hasattr(router, "e_score_correction_bias") else "softmax"
    said = getattr(router, "scoring_func", "softmax" if isinstance(router, nn.Linear) else None)
    if said == "softmax":
        return "softmax"
    if said == "sigmoid":
        return "sigmoid"
    raise ValueError(
        f"model: expected routers that score by a softmax or a sigmoid: TopKRouter, torch.nn.Linear, {', '.join(FAMILIES)}, or one whose "
        f"attribute scoring_func is 'softmax' or 'sigmoid'; got {name}" + ("" if said is None else f" with scoring_func {said!r}")
    )


def makes_float32_logits(router: Any) -> bool:
    """Whether a router's product is made in float32 whatever its dtypes."""
    if isinstance(router, TopKRouter):
        return router.float32_logits
    family = FAMILIES.get(type(router).__name__)
    return family is not None and family.float32_logits


def gate_options(router: Any) -> GateOptions | None:
    """The options of a router's gate; None where they are not known."""
    if isinstance(router, TopKRouter):
        return router.options
    family = FAMILIES.get(type(router).__name__)
    try:
        return None if family is None else family.options(router)
    except AttributeError:
        # A router of that name in another version of transformers, which leaves the choice to the block around it.
        return None


def selection_bias(router: Any) -> Tensor | None:
    """What a router adds to the scores for the choice alone, in float32."""
    bias = getattr(router, "e_score_correction_bias", None)
    return bias.float() if isinstance(bias, Tensor) else None


def probabilities(router: nn.Module, logits: Tensor) -> Tensor:
    """The probabilities of all experts ``[B, E]``, in float32: the softmax of the logits, or each sigmoid's share of their sum."""
    options = gate_options(router)
    temperature = 1.0 if options is None else options.temperature
    return gate_probabilities(logits.float(), score=score_of(router), temperature=temperature)


def topk_weights(router: nn.Module, logits: Tensor) -> Tensor:
    """The weights that the router's gate gives to experts ``[B, E]``, 0 for those that it does not choose.

    Raises
    ------
    ValueError
        If the gate's options are not known.
    """
    options = gate_options(router)
    if options is None:
        raise ValueError(f"weights: 'topk' needs to know the gate; expected TopKRouter, {', '.join(FAMILIES)}, got {type(router).__name__}")
    gate = options.gate(logits.float(), selection_bias(router), ids_dtype=torch.int64)
    return torch.zeros_like(logits, dtype=gate.weight.dtype).scatter(1, gate.ids, gate.weight)


def train_only_routers(model: nn.Module, layers: Layers = -5) -> list[nn.Parameter]:
    """Let the chosen routers' parameters require grad, and no others; buffers such as a selection bias are not trained.

    Parameters
    ----------
    model
        A model with routers.
    layers
        As of :class:`RoMAConfig`.

    Returns
    -------
    list of nn.Parameter
        What to give to an optimizer. Nothing else of the model gets a gradient, and layers before the first chosen router keep no graph.

    Raises
    ------
    ValueError
        As :func:`find_routers`; if ``layers`` is out of range, or there are fewer routers than it says. If a router's parameter is used
        elsewhere in the model too.
    """
    check_layers("train_only_routers", layers)
    routers = chosen_routers(model, layers)
    parameters = [parameter for router in routers for parameter in router.parameters()]
    inside = {id(module) for router in routers for module in router.modules()}
    elsewhere = {id(parameter) for module in model.modules() if id(module) not in inside for parameter in module.parameters(recurse=False)}
    if any(id(parameter) in elsewhere for parameter in parameters):
        raise ValueError("train_only_routers: model: a router's parameter is that of another module too, which would be tuned with it")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters
