"""Two claims at a small size: a kernel fits matrices that no product of such factors can; layers do better when they compete."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, mse_loss

from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.sparsity.snella.allocator import SparsityAllocator
from taskloom.methods.sparsity.snella.config import KernelLoraConfig
from taskloom.methods.sparsity.snella.model import inject_kernel_lora, kernel_layers
from taskloom.methods.threads import one_thread
from taskloom.ops import kernel_merge

Target = tuple[str, int, float]


def _svd_bound(target: Tensor, rank: int) -> float:
    """Mean squared error of the best matrix of a rank."""
    return float(torch.linalg.svdvals(target.double())[rank:].square().sum()) / target.numel()


def _fit(target: Tensor, kernel: str, config: Mapping[str, Any], generator: torch.Generator) -> float:
    """Mean squared error of the kernel's matrix after training the factors and the chunks' weights on the matrix alone."""
    m, n = target.shape
    chunks = config["chunks"]
    drawn = [config["init"] * torch.randn(chunks, rows, config["rank"] // chunks, generator=generator) for rows in (n, m)]
    A, B = (one.to(target.device).requires_grad_() for one in drawn)
    coef = torch.tensor([(-1.0) ** place for place in range(chunks)], device=target.device, requires_grad=True)
    scalars = {"alpha": 1.0, "gamma": 1.0, "beta": 0.0} if kernel == "mixk" else {}
    trained = {name: torch.tensor(value, device=target.device, requires_grad=True) for name, value in scalars.items()}
    alpha, gamma, beta = (trained.get(name) for name in ("alpha", "gamma", "beta"))

    def error() -> Tensor:
        return mse_loss(kernel_merge(A, B, coef, kernel=kernel, alpha=alpha, gamma=gamma, beta=beta, gate=None), target)

    optimizer = torch.optim.Adam([A, B, coef, *trained.values()], lr=config["lr"])
    for _ in range(config["steps"]):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    with torch.no_grad():
        return float(error())


@one_thread()
def _measure_fit(trial: Trial) -> Values:
    config = trial.config
    targets: Sequence[Target] = [(f"{name} {size}", size, share) for name, size, share in config["targets"]]
    values: dict[str, float] = {}
    for place, (name, size, share) in enumerate(targets):
        generator = trial.generator(place)
        target = torch.randn(size, size, generator=generator) * (torch.rand(size, size, generator=generator) < share)
        values[f"best rank {config['rank']}, {name}"] = _svd_bound(target, config["rank"])
        for turn, kernel in enumerate(config["kernels"]):
            values[f"{kernel}, {name}"] = _fit(target.to(trial.device), kernel, config, trial.generator(100 + place))
            trial.progress((place + (turn + 1) / len(config["kernels"])) / len(targets))
    return values


class _Regressor(nn.Module):
    """Three square layers with 2 GELU between them."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for weight in weights:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight.clone())
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = 2 * gelu(layer(x))
        y: Tensor = self.layers[-1](x)
        return y


class _Task:
    """A teacher whose layers were shifted in some entries, and data that it labels."""

    def __init__(self, config: Mapping[str, Any], generator: torch.Generator, device: torch.device) -> None:
        width = config["width"]
        shares = config["shifted"]
        # As torch.nn.Linear draws its weights.
        self.base = [(2 * torch.rand(width, width, generator=generator) - 1) / math.sqrt(width) for _ in shares]
        shifts = [
            config["shift"] * torch.randn(width, width, generator=generator) * (torch.rand(width, width, generator=generator) < share)
            for share in shares
        ]
        x = torch.randn(config["train"] + config["test"], width, generator=generator)
        with torch.no_grad():
            y = _Regressor([weight + shift for weight, shift in zip(self.base, shifts, strict=True)])(x)
        self.x, self.y = x.to(device), y.to(device)
        self.train = config["train"]
        self.device = device

    def student(self) -> _Regressor:
        """The model that is adapted."""
        return _Regressor(self.base).to(self.device)

    def error(self, model: nn.Module) -> float:
        """Mean squared error on test data."""
        with torch.no_grad():
            return float(mse_loss(model(self.x[self.train :]), self.y[self.train :]))


def _adapter(config: Mapping[str, Any], **options: Any) -> KernelLoraConfig:
    fixed: dict[str, Any] = {"target_modules": "all-linear", "r": config["rank"], "dropout": 0.0, "drop_path": 0.0}
    return KernelLoraConfig(**{**fixed, **options})


def _tuned(task: _Task, adapter: KernelLoraConfig, trial: Trial, done: Callable[[float], None], allocated: bool = False) -> _Regressor:
    config = trial.config
    model = task.student()
    # Every arm starts from the same factors and sees the same batches.
    torch.manual_seed(trial.seed)
    inject_kernel_lora(model, adapter)
    if adapter.kernel == "linear":
        for layer in kernel_layers(model).values():
            nn.init.zeros_(layer.B)
    epochs, batch = config["epochs"], config["batch"]
    allocator = SparsityAllocator(model, config["sparsity"], config["init_sparsity"], epochs) if allocated else None
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=config["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(task.train / batch))
    generator = trial.generator(1)
    for epoch in range(epochs):
        if allocator is not None:
            allocator.step(epoch)
        for places in torch.randperm(task.train, generator=generator).split(batch):
            places = places.to(task.device)
            optimizer.zero_grad()
            mse_loss(model(task.x[places]), task.y[places]).backward()
            optimizer.step()
            schedule.step()
            if allocator is not None:
                allocator.update_importance()
        done((epoch + 1) / epochs)
    return model


@one_thread()
def _measure_allocation(trial: Trial) -> Values:
    config = trial.config
    task = _Task(config, trial.generator(), trial.device)
    sparse = {"kernel": "mixk", "gate": "magnitude"}
    arms: list[tuple[str, KernelLoraConfig, bool]] = [
        ("allocated", _adapter(config, sparsity=config["init_sparsity"], **sparse), True),
        ("uniform", _adapter(config, sparsity=config["sparsity"], **sparse), False),
        ("mixk without a gate", _adapter(config, kernel="mixk", gate=None), False),
        ("LoRA", _adapter(config, kernel="linear", gate=None, chunks=1, scale=1.0), False),
    ]
    values = {"not adapted": task.error(task.student())}
    for place, (name, adapter, allocated) in enumerate(arms):
        model = _tuned(task, adapter, trial, trial.part(place, len(arms)), allocated)
        values[name] = task.error(model)
    return values


CLAIMS = (
    Claim(
        name="C1",
        statement="A kernel of two factors fits dense and sparse matrices more closely than any product of factors of that rank",
        metric="mean squared error of a fitted matrix, lower is better",
        measure=_measure_fit,
        baselines=("best rank 8, dense 32", "best rank 8, sparse 32", "best rank 8, sparse 64"),
        inequalities=(
            Inequality(
                "pwl <= 0.85 * best rank 8, dense 32",
                lambda values: values["pwl, dense 32"] <= 0.85 * values["best rank 8, dense 32"],
            ),
            Inequality(
                "pwl <= 0.7 * best rank 8, sparse 64",
                lambda values: values["pwl, sparse 64"] <= 0.7 * values["best rank 8, sparse 64"],
            ),
        ),
        config={
            "targets": [["dense", 32, 1.0], ["sparse", 32, 0.1], ["sparse", 64, 0.1]],
            "kernels": ["pwl", "mixk", "linear"],
            "rank": 8,
            "chunks": 2,
            "init": 0.5,
            "lr": 0.02,
            "steps": 1500,
        },
        quick={"steps": 60},
        note="The best rank-8 error is that of the truncated SVD, which no LoRA of rank 8 can go below.",
    ),
    Claim(
        name="C2",
        statement="With the same number of non-zero entries, layers that compete for them do better than layers that have equal shares",
        metric="test mean squared error of a regression, lower is better",
        measure=_measure_allocation,
        baselines=("uniform", "LoRA"),
        inequalities=(Inequality("allocated <= 0.85 * uniform", lambda values: values["allocated"] <= 0.85 * values["uniform"]),),
        config={
            "width": 48,
            "shifted": [0.02, 0.2, 0.02],
            "shift": 0.4,
            "train": 2000,
            "test": 1000,
            "rank": 8,
            "sparsity": 0.9,
            "init_sparsity": 0.01,
            "lr": 0.01,
            "epochs": 60,
            "batch": 100,
        },
        quick={"epochs": 3},
        note="One layer of three needs most of the change. Without a gate all entries may change; that is not the same budget.",
    ),
)
