"""Projected digits: one small encoder, pre-trained for a few steps, and one fine-tuning of it per task.

Every task sees the same 1797 handwritten digits through a rotation of its own, with 16 of the 64 rotated coordinates cut off, some noise,
and the ten labels permuted. The tasks so share what a digit is and nothing of how it looks, which makes their task vectors interfere
when they are merged. It is small enough to be built in seconds on a CPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from taskloom.methods.threads import one_thread

SplitName = Literal["train", "val", "test"]
State = dict[str, Tensor]

SPLIT_SIZES: dict[SplitName, int] = {"train": 1000, "val": 297, "test": 500}
PIXELS = 64
INPUTS = 48
CLASSES = 10
_NOISE = 0.1


@dataclass(frozen=True)
class Split:
    """Examples: ``inputs`` [N, 48] float32 (or [N, 64] before a task's projection) and ``labels`` [N] int64."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """One task: its splits, the rotation [64, 64] applied to the pixels, and ``label_order`` [10], the new label of each digit."""

    splits: dict[SplitName, Split]
    rotation: Tensor
    label_order: Tensor


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.gelu(self.norm(self.linear(inputs)))


class Encoder(nn.Module):
    """Linear(48, width), LayerNorm, GELU, Linear(width, width), LayerNorm, GELU."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Block(INPUTS, width), _Block(width, width)])

    def forward(self, inputs: Tensor) -> Tensor:
        """Features [N, width] of inputs [N, 48]."""
        for layer in self.layers:
            inputs = layer(inputs)
        return inputs


def task_name(task: int) -> str:
    """What a task's model, vector or folder is called where it goes by a name."""
    return f"task-{task}"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("projected digits need scikit-learn, which is not installed: pip install 'taskloom[demo]'") from error
    bunch = load_digits()
    pixels = torch.as_tensor(bunch.data, dtype=torch.float32) / 16
    pixels = pixels - pixels.mean(0)
    return pixels / pixels.std(), torch.as_tensor(bunch.target, dtype=torch.int64)


def load_splits(seed: int = 0) -> dict[SplitName, Split]:
    """The normalised 8x8 digits in a seeded order, cut into train, val and test of 1000, 297 and 500 examples.

    Returns
    -------
    dict[str, Split]
        ``inputs`` [N, 64] float32: pixels / 16, minus their mean image, divided by the standard deviation over all pixels.

    Raises
    ------
    ImportError
        If scikit-learn is missing; it is part of the extra ``demo``.
    """
    pixels, labels = _digits()
    order = torch.randperm(len(labels), generator=_generator(seed))
    parts = order.split_with_sizes(list(SPLIT_SIZES.values()))
    return {name: Split(pixels[part], labels[part]) for name, part in zip(SPLIT_SIZES, parts, strict=True)}


def make_tasks(splits: Mapping[SplitName, Split], tasks: int = 8, seed: int = 0) -> tuple[Task, ...]:
    """Tasks made of the digits: inputs times a random orthogonal matrix, plus 0.1 x normal noise, first 48 coordinates; labels permuted.

    Parameters
    ----------
    splits
        From :func:`load_splits`.
    tasks
        Number of tasks. The first ones do not depend on it.
    seed
        Of rotations, noise and label orders.
    """
    generator = _generator(seed)
    made = []
    for _ in range(tasks):
        rotation, _ = torch.linalg.qr(torch.randn(PIXELS, PIXELS, generator=generator))
        label_order = torch.randperm(CLASSES, generator=generator)
        own: dict[SplitName, Split] = {}
        for name, split in splits.items():
            rotated = split.inputs @ rotation
            noisy = rotated + _NOISE * torch.randn(rotated.shape, generator=generator)
            own[name] = Split(noisy[:, :INPUTS].contiguous(), label_order[split.labels])
        made.append(Task(own, rotation, label_order))
    return tuple(made)


def build_network(tasks: int = 8, width: int = 256, seed: int = 0) -> tuple[Encoder, list[nn.Linear]]:
    """A freshly initialised encoder and a head Linear(width, 10) per task; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(width), [nn.Linear(width, CLASSES) for _ in range(tasks)]


def draw_batch(split: Split, size: int, generator: torch.Generator) -> Split:
    """So many random examples of a split, some of them perhaps twice."""
    chosen = torch.randint(len(split.labels), (size,), generator=generator)
    return Split(split.inputs[chosen], split.labels[chosen])


def pretrain(encoder: Encoder, heads: list[nn.Linear], tasks: tuple[Task, ...], *, steps: int = 4, seed: int = 0) -> None:
    """Train encoder and heads in place on all tasks together: AdamW, learning rate 1e-3, 32 examples per task and step."""
    generator = _generator(seed)
    parameters = [*encoder.parameters(), *(parameter for head in heads for parameter in head.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        losses = []
        for head, task in zip(heads, tasks, strict=True):
            batch = draw_batch(task.splits["train"], 32, generator)
            losses.append(functional.cross_entropy(head(encoder(batch.inputs)), batch.labels))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()


def load_encoder(state: State) -> Encoder:
    """An encoder with a copy of these weights, made without drawing initial ones from the global generator."""
    with torch.device("meta"):
        encoder = Encoder(width=len(state["layers.0.linear.bias"]))
    encoder.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return encoder


def train_on_task(encoder: nn.Module, head: State, task: Task, *, steps: int = 150, seed: int = 0) -> None:
    """Train a module in place on one task with its head frozen: AdamW, batch 128, learning rate 5e-4 with a cosine to zero.

    Parameters
    ----------
    encoder
        An :class:`Encoder`, or another module from its inputs to its outputs.
    head
        State dict of the task's head; left as it is.
    task
        Its ``train`` split is used.
    steps
        Number of updates.
    seed
        Of the batches.
    """
    generator = _generator(seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=5e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for _ in range(steps):
        batch = draw_batch(task.splits["train"], 128, generator)
        logits = functional.linear(encoder(batch.inputs), head["weight"], head["bias"])
        optimizer.zero_grad()
        functional.cross_entropy(logits, batch.labels).backward()
        optimizer.step()
        schedule.step()


def finetune(base: State, head: State, task: Task, *, steps: int = 150, seed: int = 0) -> State:
    """A copy of an encoder, trained by :func:`train_on_task`.

    Parameters
    ----------
    base, head
        State dicts of the encoder and of the task's head; left as they are.
    task, steps, seed
        As there.

    Returns
    -------
    dict[str, Tensor]
        The encoder's new state dict.
    """
    encoder = load_encoder(base)
    train_on_task(encoder, head, task, steps=steps, seed=seed)
    return _state(encoder)


def evaluate(encoder: State, head: State, split: Split) -> float:
    """Share of a split's examples that an encoder with a head classifies correctly."""
    with torch.no_grad():
        logits = functional.linear(load_encoder(encoder)(split.inputs), head["weight"], head["bias"])
    return float((logits.argmax(1) == split.labels).double().mean())


def _state(module: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@dataclass(frozen=True)
class ProjectedDigits:
    """The built set-up.

    Attributes
    ----------
    seed, width
        What it was built with.
    tasks
        Data of each task.
    base
        State dict of the pre-trained encoder.
    tuned
        State dict of the encoder fine-tuned on each task; same keys and shapes as ``base``.
    heads
        Frozen head of each task: ``weight`` [10, width] and ``bias`` [10].
    """

    seed: int
    width: int
    tasks: tuple[Task, ...]
    base: State
    tuned: tuple[State, ...]
    heads: tuple[State, ...]

    def accuracy(self, encoder: State, task: int, split: SplitName = "test") -> float:
        """Accuracy of an encoder with the head of a task, on one of that task's splits."""
        with one_thread():
            return evaluate(encoder, self.heads[task], self.tasks[task].splits[split])

    def head(self, task: int) -> nn.Linear:
        """The frozen head of a task as a module."""
        with torch.device("meta"):
            head = nn.Linear(self.width, CLASSES)
        head.load_state_dict(self.heads[task], assign=True)
        return head.requires_grad_(False)

    def accuracies(self, encoder: State, split: SplitName = "test") -> list[float]:
        """Accuracy of one encoder on every task."""
        return [self.accuracy(encoder, task, split) for task in range(len(self.tasks))]

    def mean_accuracy(self, encoder: State, split: SplitName = "test", tasks: Iterable[int] | None = None) -> float:
        """Mean accuracy of one encoder on some tasks, or on all of them."""
        return fmean(self.accuracy(encoder, task, split) for task in (range(len(self.tasks)) if tasks is None else tasks))

    @property
    def tuned_by_task(self) -> dict[str, State]:
        """The fine-tuned encoders by :func:`task_name`."""
        return {task_name(task): tuned for task, tuned in enumerate(self.tuned)}

    @cached_property
    def single_task(self) -> list[float]:
        """Test accuracy of each fine-tuned encoder on its own task: the ceiling of a merge, and the unit of normalised accuracy."""
        return [self.accuracy(tuned, task) for task, tuned in enumerate(self.tuned)]

    def save(self, folder: Path) -> None:
        """Write ``base/`` and ``task-0/`` ... with a model.safetensors each, ``heads.safetensors`` and ``projected_digits.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, state in {"base": self.base, **self.tuned_by_task}.items():
            (folder / name).mkdir(exist_ok=True)
            save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
        heads = {f"{task_name(task)}.{name}": value for task, head in enumerate(self.heads) for name, value in head.items()}
        save_file(heads, folder / "heads.safetensors", metadata={"format": "pt"})
        settings = {"seed": self.seed, "tasks": len(self.tasks), "width": self.width}
        (folder / "projected_digits.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


def load(folder: Path) -> ProjectedDigits:
    """Read what :meth:`ProjectedDigits.save` wrote; the tasks' data are made again from the seed.

    Raises
    ------
    FileNotFoundError
        If the folder lacks one of the files.
    """
    settings = json.loads((folder / "projected_digits.json").read_text(encoding="utf-8"))
    names = [task_name(task) for task in range(settings["tasks"])]
    heads = load_file(folder / "heads.safetensors")
    return ProjectedDigits(
        seed=settings["seed"],
        width=settings["width"],
        tasks=make_tasks(load_splits(settings["seed"]), len(names), settings["seed"]),
        base=load_file(folder / "base" / "model.safetensors"),
        tuned=tuple(load_file(folder / name / "model.safetensors") for name in names),
        heads=tuple({key: heads[f"{name}.{key}"] for key in ("weight", "bias")} for name in names),
    )


def build(seed: int = 0, tasks: int = 8, width: int = 256, *, pretrain_steps: int = 4, finetune_steps: int = 150) -> ProjectedDigits:
    """Build the set-up from a seed: the same bits every time on one machine.

    Parameters
    ----------
    seed
        Of everything random: splits, tasks, initial weights, batches.
    tasks
        Number of tasks and so of fine-tuned encoders.
    width
        Of the encoder's layers.
    pretrain_steps, finetune_steps
        Number of updates of the joint pre-training and of each fine-tuning.

    Raises
    ------
    ImportError
        If scikit-learn is missing.
    ValueError
        If a count is below 1.

    Notes
    -----
    The set-up is this library's.
    """
    for name, value in {"tasks": tasks, "width": width, "pretrain_steps": pretrain_steps, "finetune_steps": finetune_steps}.items():
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    with one_thread():
        made = make_tasks(load_splits(seed), tasks, seed)
        encoder, head_modules = build_network(tasks, width, seed)
        pretrain(encoder, head_modules, made, steps=pretrain_steps, seed=seed)
        base, heads = _state(encoder), tuple(_state(head) for head in head_modules)
        tuned = tuple(
            finetune(base, head, task, steps=finetune_steps, seed=seed + 1 + number)
            for number, (head, task) in enumerate(zip(heads, made, strict=True))
        )
    return ProjectedDigits(seed=seed, width=width, tasks=made, base=base, tuned=tuned, heads=heads)
