"""The claim at a small size: sliding windows of channels cost a diffusion model nothing, random channels do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from taskloom.methods.channels.dtr.diffusion import Diffusion
from taskloom.methods.channels.dtr.dit import RoutedDiT, Routing
from taskloom.methods.channels.dtr.ema import Ema
from taskloom.methods.channels.dtr.frechet import frechet_distance
from taskloom.methods.channels.dtr.routing import RandomRouting, dtr_window
from taskloom.methods.claim import Claim, Inequality, Progress, Trial, Values
from taskloom.methods.threads import one_thread

Arm = Literal["DTR", "R-TR", "dense"]
ARMS: tuple[Arm, ...] = ("DTR", "R-TR", "dense")
CLASSES = 10


@dataclass(frozen=True)
class _Digits:
    """The digits of scikit-learn: images [N, 1, 8, 8] from -1 to 1, and labels [N]."""

    images: Tensor
    labels: Tensor

    @classmethod
    def load(cls, device: torch.device) -> _Digits:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        return cls(images.to(device), torch.as_tensor(bunch.target, dtype=torch.int64).to(device))


def _routings(arm: Arm, config: Mapping[str, Any], generator: torch.Generator) -> list[Routing]:
    tasks, channels, beta = config["timesteps"], config["channels"], config["beta"]
    if arm == "R-TR":
        return [RandomRouting(tasks, channels, beta, generator) for _ in range(config["blocks"])]
    return [dtr_window(tasks, channels, beta if arm == "DTR" else 1.0, config["alpha"])] * config["blocks"]


def _model(arm: Arm, trial: Trial) -> RoutedDiT:
    config = trial.config
    routings = _routings(arm, config, trial.generator(1))
    # Every arm starts from the same weights.
    torch.manual_seed(trial.seed)
    model = RoutedDiT(
        routings,
        input_size=8,
        patch_size=config["patch"],
        in_channels=1,
        hidden_size=config["channels"],
        num_heads=config["heads"],
        num_classes=CLASSES,
        class_dropout_prob=0.0,
    )
    return model.to(trial.device)


def _trained(model: RoutedDiT, digits: _Digits, diffusion: Diffusion, trial: Trial, progress: Progress) -> RoutedDiT:
    """The running mean of the weights; every arm sees the same images, timesteps and noise."""
    config = trial.config
    ema = Ema(model, config["ema"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=0.0)
    generator = trial.generator(2)
    for step in range(config["steps"]):
        chosen, t, noise = _triples(config["batch"], digits, diffusion, generator)
        labels = digits.labels[chosen]
        optimizer.zero_grad()
        losses = diffusion.losses(partial(_predicted, model, labels), digits.images[chosen], t, noise)
        losses.mean().backward()
        optimizer.step()
        ema.update(model)
        progress((step + 1) / config["steps"])
    return ema.model


def _predicted(model: RoutedDiT, labels: Tensor, x: Tensor, t: Tensor) -> Tensor:
    predicted: Tensor = model(x, t, labels)
    return predicted


def _triples(count: int, digits: _Digits, diffusion: Diffusion, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Places of images, timesteps and noise, drawn on the CPU."""
    images = digits.images
    chosen = torch.randint(len(images), (count,), generator=generator)
    t = torch.randint(diffusion.num_timesteps, (count,), generator=generator)
    noise = torch.randn(count, *images.shape[1:], generator=generator)
    return chosen.to(images.device), t.to(images.device), noise.to(images.device)


@torch.no_grad()
def _loss(model: RoutedDiT, digits: _Digits, diffusion: Diffusion, trial: Trial) -> float:
    """Mean loss on triples that are the same for all arms."""
    chosen, t, noise = _triples(trial.config["evaluated"], digits, diffusion, trial.generator(3))
    labels = digits.labels[chosen]
    return float(diffusion.losses(lambda x, at: model(x, at, labels), digits.images[chosen], t, noise).mean())


def _distance(model: RoutedDiT, digits: _Digits, diffusion: Diffusion, trial: Trial) -> float:
    """Frechet distance of as many samples as there are images, with their labels, from the images."""
    count = trial.config["sampled"] or len(digits.images)
    labels = digits.labels[:count]
    noise = torch.randn(count, *digits.images.shape[1:], generator=trial.generator(4)).to(digits.images.device)
    samples = diffusion.sample(lambda x, t: model(x, t, labels), noise, trial.config["sampling_steps"])
    return frechet_distance(samples, digits.images)


@one_thread()
def _measure(trial: Trial) -> Values:
    digits, diffusion = _Digits.load(trial.device), Diffusion("cosine", trial.config["timesteps"], trial.device)
    values: dict[str, float] = {}
    for place, arm in enumerate(ARMS):
        model = _trained(_model(arm, trial), digits, diffusion, trial, trial.part(place, len(ARMS)))
        values[f"loss, {arm}"] = _loss(model, digits, diffusion, trial)
        values[f"Frechet distance, {arm}"] = _distance(model, digits, diffusion, trial)
    return values


CLAIMS = (
    Claim(
        name="C1",
        statement="Timesteps that see sliding windows of channels do better than with random channels, and as well as with all",
        metric="mean squared error of the predicted noise, and Frechet distance of samples on raw pixels, both lower is better",
        measure=_measure,
        baselines=("loss, R-TR", "Frechet distance, R-TR", "loss, dense", "Frechet distance, dense"),
        inequalities=(
            Inequality("loss: DTR < R-TR - 0.01", lambda values: values["loss, DTR"] < values["loss, R-TR"] - 0.01),
            Inequality("Frechet distance: DTR < R-TR", lambda values: values["Frechet distance, DTR"] < values["Frechet distance, R-TR"]),
            Inequality("loss: |DTR - dense| < 0.01", lambda values: abs(values["loss, DTR"] - values["loss, dense"]) < 0.01),
        ),
        config={
            "timesteps": 1000,
            "beta": 0.8,
            "alpha": 4.0,
            "patch": 2,
            "channels": 48,
            "blocks": 3,
            "heads": 4,
            "lr": 1e-3,
            "batch": 64,
            "steps": 800,
            "ema": 0.995,
            "evaluated": 4096,
            "sampling_steps": 50,
            "sampled": None,
        },
        quick={"steps": 6, "ema": 0.5, "evaluated": 128, "sampling_steps": 3, "sampled": 80},
        note="A pixel DiT on the 8 x 8 digits of scikit-learn. The paper also has DTR ahead of the dense model, after 400,000 steps of far "
        "larger models; the values tell how the two compare at this size, and the gate asks only that their losses are within 0.01.",
    ),
)
