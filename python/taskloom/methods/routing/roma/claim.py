"""The claim at a small size: routers aligned with those of successful neighbours generalise better than tuned ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from taskloom.methods.claim import Claim, Inequality, Progress, Trial, Values
from taskloom.methods.routing.roma.c3po import RoutingOverride, c3po_reweight
from taskloom.methods.routing.roma.claim_model import Instructions, Prediction, Rows, SparseMLP
from taskloom.methods.routing.roma.config import RoMAConfig
from taskloom.methods.routing.roma.neighbors import Neighbors, neighbor_weights, random_neighbors
from taskloom.methods.routing.roma.reference import ReferenceSet, build_reference
from taskloom.methods.routing.roma.routers import Layers, chosen_routers, train_only_routers
from taskloom.methods.routing.roma.tune import tune_routers
from taskloom.methods.threads import one_thread


@dataclass(frozen=True)
class _Arm:
    """What is tuned how."""

    name: str
    lam: float
    k: int = 3
    layers: Layers = -2
    random: bool = False


ARMS = (
    _Arm("router tuning", 0.0),
    _Arm("RoMA", 5.0),
    _Arm("RoMA, random neighbours", 5.0, random=True),
    _Arm("RoMA, k=1", 5.0, k=1),
    _Arm("RoMA, k=5", 5.0, k=5),
    _Arm("RoMA, all layers", 5.0, layers="all"),
)


def _pretrained(data: Rows, trial: Trial, progress: Progress) -> SparseMLP:
    config = trial.config
    model = SparseMLP(config).to(data.x.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["pretrain_lr"])
    generator = trial.generator(1)
    for epoch in range(config["epochs"]):
        for rows in torch.randperm(len(data.x), generator=generator).split(config["batch"]):
            rows = rows.to(data.x.device)
            found = model(**data.batch(rows))
            loss = found.loss + config["balance"] * found.balance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        progress((epoch + 1) / config["epochs"])
    return model


@torch.no_grad()
def _perturb(model: nn.Module, layers: Layers, factor: float, generator: torch.Generator) -> None:
    """Make the routers worse, and leave the experts as they are."""
    for router in chosen_routers(model, layers):
        weight = router.get_parameter("weight")
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        weight.add_(factor * weight.std() * noise)


@torch.no_grad()
def _accuracy(model: nn.Module, data: Rows) -> float:
    batch = data.batch()
    return float(_is_correct(batch, model(**batch)).float().mean())


def _is_correct(batch: dict[str, Tensor], found: Prediction) -> Tensor:
    return found.logits.argmax(1) == batch["y"]


def _settings(arm: _Arm, config: Mapping[str, Any]) -> RoMAConfig:
    return RoMAConfig(layers=arm.layers, k=arm.k, sigma=config["sigma"], lam=arm.lam)


def _reference(model: nn.Module, data: Rows, settings: RoMAConfig) -> ReferenceSet:
    return build_reference(model, [data.batch()], data.emb, _is_correct, settings)


def _neighbors(arm: _Arm, data: Rows, reference: ReferenceSet, settings: RoMAConfig, generator: torch.Generator) -> Neighbors:
    keys = torch.arange(len(data.x), device=data.x.device)
    if arm.random:
        return random_neighbors(len(keys), reference, settings, keys, generator)
    return neighbor_weights(data.emb, reference, settings, keys)


def _tuned(base: nn.Module, arm: _Arm, data: Rows, trial: Trial) -> nn.Module:
    """A copy of the model, its routers tuned; every arm sees the same batches."""
    config, settings = trial.config, _settings(arm, trial.config)
    model = copy.deepcopy(base)
    reference = _reference(base, data, settings)
    neighbors = _neighbors(arm, data, reference, settings, trial.generator(3))
    generator = trial.generator(4)

    drawn = (torch.randint(len(data.x), (config["batch"],), generator=generator).to(data.x.device) for _ in range(config["steps"]))
    optimizer = torch.optim.AdamW(train_only_routers(model, settings.layers), lr=config["lr"])
    tune_routers(
        model,
        ((rows, data.batch(rows)) for rows in drawn),
        lambda batch, found: found.loss,
        optimizer,
        settings,
        reference=reference,
        neighbors=neighbors,
    )
    return model


def _c3po(model: nn.Module, data: Rows, test: Rows, config: Mapping[str, Any]) -> float:
    """Accuracy with routing weights of neighbours in the place of the routers' own."""
    settings = _settings(ARMS[1], config)
    reference = _reference(model, data, settings)
    near = neighbor_weights(test.emb, reference, replace(settings, exclude_self=False))
    cosine = (reference.emb[near.ids] @ test.emb.unsqueeze(2)).squeeze(2)
    r = c3po_reweight(reference.r[near.ids], cosine, reference.experts)
    with RoutingOverride(model, r, settings.layers):
        return _accuracy(model, test)


@one_thread()
def _measure(trial: Trial) -> Values:
    config = trial.config
    tasks = Instructions(config, trial.generator())
    drawn = trial.generator(2)
    pretraining, tuning, test = (tasks.draw(config[name], drawn).to(trial.device) for name in ("pretraining", "tuning", "test"))
    perturbations = config["perturbations"]
    parts = 3 + perturbations * len(ARMS)
    trained = _pretrained(pretraining, trial, lambda share: trial.progress(3 * share / parts))
    values = {"unperturbed": _accuracy(trained, test)}
    found: dict[str, list[float]] = {name: [] for name in ("base", *(arm.name for arm in ARMS), "C3PO")}
    for turn in range(perturbations):
        model = copy.deepcopy(trained)
        _perturb(model, ARMS[0].layers, config["perturbation"], trial.generator(100 + turn))
        found["base"].append(_accuracy(model, test))
        for place, arm in enumerate(ARMS):
            found[arm.name].append(_accuracy(_tuned(model, arm, tuning, trial), test))
            trial.progress((3 + turn * len(ARMS) + place + 1) / parts)
        found["C3PO"].append(_c3po(model, tuning, test, config))
    return {**values, **{name: fmean(accuracies) for name, accuracies in found.items()}}


CLAIMS = (
    Claim(
        name="C1",
        statement="Routers aligned with those of correctly answered neighbours generalise better than the base's and than tuned ones",
        metric="test accuracy, mean over 3 perturbations of the routers, higher is better",
        measure=_measure,
        baselines=("base", "router tuning", "RoMA, random neighbours", "C3PO"),
        inequalities=(
            Inequality("RoMA >= base + 0.015", lambda values: values["RoMA"] >= values["base"] + 0.015, "the mean"),
            Inequality("RoMA >= router tuning + 0.015", lambda values: values["RoMA"] >= values["router tuning"] + 0.015, "the mean"),
            Inequality(
                "random neighbours <= RoMA - 0.05", lambda values: values["RoMA, random neighbours"] <= values["RoMA"] - 0.05, "the mean"
            ),
        ),
        config={
            "instructions": 12,
            "classes": 4,
            "features": 16,
            "seen": 8,
            "seen_noise": 0.3,
            "rule_noise": 1.0,
            "embedding": 16,
            "embedding_noise": 0.1,
            "layers": 3,
            "width": 48,
            "experts": 8,
            "k": 2,
            "hidden": 32,
            "pretraining": 12000,
            "epochs": 8,
            "pretrain_lr": 2e-3,
            "balance": 0.01,
            "perturbation": 1.0,
            "perturbations": 3,
            "tuning": 512,
            "steps": 300,
            "batch": 128,
            "lr": 2e-3,
            "sigma": 0.5,
            "test": 6000,
        },
        quick={"perturbations": 1, "pretraining": 600, "epochs": 2, "tuning": 128, "steps": 8, "batch": 64, "test": 300},
        note="A residual MLP of three sparse layers on generated data; the noise in its routers stands for the routing of a pretrained "
        "model that is not the best for a new task.",
    ),
)
