"""What reversible merging stores: per position a mean, a few directions, and every task's coefficients."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from taskloom.nn.adapter_files import PREFIX, write_adapter
from taskloom.ops import rmm_reconstruct

Factors = tuple[Tensor, Tensor]
Adapter = Mapping[str, Factors]

_FORMAT = "taskloom-rmm-1"


@dataclass(frozen=True)
class Positions:
    """The positions of one factor: ``mean`` [P, r], ``basis`` [P, p, r], ``coefficients`` [n, P, p]."""

    mean: Tensor
    basis: Tensor
    coefficients: Tensor

    def vectors(self, task: int) -> Tensor:
        """Task ``task``'s vectors [P, r]."""
        return rmm_reconstruct(self.mean, self.basis, self.coefficients[task].contiguous())

    def project(self, vectors: Tensor) -> Tensor:
        """Coefficients [P, p] of vectors [P, r]."""
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        centred = vectors.to(dtype) - self.mean.to(dtype)
        return torch.einsum("qr,qpr->qp", centred, self.basis.to(dtype)).to(self.coefficients.dtype)

    @property
    def numbers(self) -> int:
        """Stored numbers."""
        return self.mean.numel() + self.basis.numel() + self.coefficients.numel()


@dataclass(frozen=True)
class Layer:
    """One layer: the rows of every A [m, r], and the columns of every B [r, d]."""

    a: Positions
    b: Positions

    @property
    def rank(self) -> int:
        """Rank of its adapters."""
        return self.a.mean.shape[1]

    def factors(self, task: int) -> Factors:
        """A [m, r] and B [r, d] of a task."""
        return self.a.vectors(task), self.b.vectors(task).T.contiguous()


def check_factors(where: str, factors: Factors) -> None:
    """Raise unless both factors are floating point and finite."""
    for name, factor in zip(("A", "B"), factors, strict=True):
        if not factor.is_floating_point():
            raise TypeError(f"{where}: {name}: expected a floating-point tensor, got {factor.dtype}")
        if not torch.isfinite(factor).all():
            raise ValueError(f"{where}: {name} holds values that are not finite")


def product_error(factors: Factors, approximation: Factors) -> float:
    """Relative Frobenius error of a product A B, from Gram matrices of the factors: nothing weight-sized is made."""
    left = torch.cat([factors[0], -approximation[0]], 1).double()
    right = torch.cat([factors[1], approximation[1]], 0).double()
    rank = factors[0].shape[1]
    gram_left, gram_right = left.T @ left, right @ right.T
    error = float((gram_left * gram_right).sum().clamp(min=0))
    size = float((gram_left[:rank, :rank] * gram_right[:rank, :rank]).sum().clamp(min=0))
    return (error / size) ** 0.5 if size > 0 else (0.0 if error == 0 else float("inf"))


def _read_positions(file: Any, name: str) -> Positions:
    return Positions(*(file.get_tensor(f"{name}.{part}") for part in ("mean", "basis", "coefficients")))


class RMMSpace:
    """Adapters of several tasks in the shared bases of their positions.

    Parameters
    ----------
    tasks
        Names, in the order of the coefficients.
    layers
        Each layer's positions.
    errors
        ``errors[layer][place]``: relative Frobenius error of the task's A B.

    Notes
    -----
    Source: Alipour and Amiri, "Towards Reversible Model Merging For Low-rank Weights", 2025, arXiv 2510.14163.
    """

    def __init__(self, tasks: Sequence[str], layers: Mapping[str, Layer], errors: Mapping[str, Sequence[float]]) -> None:
        self.tasks = list(tasks)
        self.layers = dict(layers)
        self._errors = {layer: list(values) for layer, values in errors.items()}

    @property
    def p(self) -> int:
        """Directions a position keeps."""
        return next(iter(self.layers.values())).a.basis.shape[1]

    @property
    def rank(self) -> int:
        """The largest rank of the adapters."""
        return max(layer.rank for layer in self.layers.values())

    @property
    def storage_ratio(self) -> float:
        """Stored numbers over those of the adapters themselves."""
        stored = sum(layer.a.numbers + layer.b.numbers for layer in self.layers.values())
        own = sum(len(self.tasks) * (layer.a.mean.numel() + layer.b.mean.numel()) for layer in self.layers.values())
        return stored / own

    def place(self, task: str) -> int:
        """Place of a task among the coefficients.

        Raises
        ------
        KeyError
            If there is no task of that name.
        """
        if task not in self.tasks:
            raise KeyError(f"task: {task!r} is unknown, the tasks are {', '.join(self.tasks)}")
        return self.tasks.index(task)

    def _layer(self, name: str) -> Layer:
        if name not in self.layers:
            raise KeyError(f"layer: {name!r} is unknown, the layers are {', '.join(self.layers)}")
        return self.layers[name]

    def factors(self, task: str, layer: str) -> Factors:
        """A task's reconstructed A [m, r] and B [r, d] of a layer."""
        return self._layer(layer).factors(self.place(task))

    def delta(self, task: str, layer: str) -> Tensor:
        """A task's reconstructed change of a layer's weight, A B [m, d]."""
        a, b = self.factors(task, layer)
        return a @ b

    def adapter(self, task: str) -> dict[str, Tensor]:
        """A task's adapter as a PEFT state dict; its scaling is 1, so its config has ``lora_alpha`` equal to the rank."""
        place = self.place(task)
        state = {}
        for name, layer in self.layers.items():
            a, b = layer.factors(place)
            state[f"{PREFIX}{name}.lora_A.weight"] = b
            state[f"{PREFIX}{name}.lora_B.weight"] = a.contiguous()
        return state

    def save_adapter(self, task: str, folder: str | PathLike[str]) -> None:
        """Write a task's adapter as PEFT reads it: ``adapter_model.safetensors`` and ``adapter_config.json``."""
        other_ranks = {re.escape(name): layer.rank for name, layer in self.layers.items() if layer.rank != self.rank}
        config = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.rank,
            "rank_pattern": other_ranks,
            "alpha_pattern": other_ranks,
            "target_modules": sorted(self.layers),
            "bias": "none",
        }
        write_adapter(self.adapter(task), config, folder)

    def reconstruction_error(self, task: str | None = None) -> dict[str, float]:
        """Relative Frobenius error of A B by layer: a task's, or the root mean square over the tasks.

        It is large even where the task's accuracy is good.
        """
        if task is not None:
            place = self.place(task)
            return {layer: values[place] for layer, values in self._errors.items()}
        return {layer: (sum(value**2 for value in values) / len(values)) ** 0.5 for layer, values in self._errors.items()}

    def add_task(self, task: str, adapter: Adapter) -> dict[str, float]:
        """Add a task by projection onto the bases that are there; they do not change.

        Returns
        -------
        dict[str, float]
            Relative Frobenius error of its A B, by layer.

        Raises
        ------
        TypeError
            If a factor is not floating point.
        ValueError
            If the task is there already, its layers or shapes are others, or a factor is not finite.
        """
        if task in self.tasks:
            raise ValueError(f"task: {task!r} is there already")
        if set(adapter) != set(self.layers):
            raise ValueError(f"adapter: expected the layers {', '.join(self.layers)}, got {', '.join(adapter)}")
        fresh, errors = {}, {}
        for name, layer in self.layers.items():
            a, b = adapter[name]
            expected = ((layer.a.mean.shape[0], layer.rank), (layer.rank, layer.b.mean.shape[0]))
            if (tuple(a.shape), tuple(b.shape)) != expected:
                raise ValueError(f"adapter: layer {name!r}: expected shapes {expected}, got {(tuple(a.shape), tuple(b.shape))}")
            check_factors(f"adapter: layer {name!r}", (a, b))
            grown = [
                Positions(held.mean, held.basis, torch.cat([held.coefficients, held.project(vectors)[None]]))
                for held, vectors in ((layer.a, a), (layer.b, b.T))
            ]
            fresh[name] = Layer(*grown)
            errors[name] = product_error((a, b), fresh[name].factors(len(self.tasks)))
        self.layers = fresh
        self.tasks.append(task)
        for name, error in errors.items():
            self._errors[name].append(error)
        return errors

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything into one safetensors file, which takes its name only when it is whole."""
        tensors = {}
        for name, layer in self.layers.items():
            for factor, positions in (("a", layer.a), ("b", layer.b)):
                for part in ("mean", "basis", "coefficients"):
                    tensors[f"{name}.{factor}.{part}"] = getattr(positions, part).contiguous()
        facts = {"format": _FORMAT, "tasks": json.dumps(self.tasks), "errors": json.dumps(self._errors)}
        unfinished = Path(path).with_name(f".{Path(path).name}.part")
        try:
            save_file(tensors, unfinished, metadata=facts)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RMMSpace:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the file is something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                if facts.get("format") != _FORMAT:
                    raise ValueError(f"expected a file of format {_FORMAT!r}, got {facts.get('format')!r}")
                errors = json.loads(facts["errors"])
                layers = {name: Layer(_read_positions(file, f"{name}.a"), _read_positions(file, f"{name}.b")) for name in errors}
            return cls(json.loads(facts["tasks"]), layers, errors)
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: not a space that was saved: {error}") from error
