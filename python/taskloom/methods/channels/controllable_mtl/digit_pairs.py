"""Two tasks that compete: images of two digits over each other, one of them mirrored, and a small network that names both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from taskloom.methods.channels.controllable_mtl.config import WidthConfig
from taskloom.methods.channels.controllable_mtl.model import SlimMultiTask
from taskloom.methods.channels.controllable_mtl.train import sandwich_step
from taskloom.nn import SlimConv2d, SlimLinear

TASKS = ("A", "B")
CLASSES = 10
_BRIGHTEST = 1.5
_NOISE = 0.25
_BATCH = 64
_LEARNING_RATE = 2e-3

Batch = tuple[Tensor, dict[str, Tensor]]


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """1797 images [8, 8] from 0 to 1, and their classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.as_tensor(bunch.images, dtype=torch.float32) / 16, torch.as_tensor(bunch.target, dtype=torch.int64)


class DigitPairs:
    """Images of two digits out of a range of scikit-learn's.

    Parameters
    ----------
    first, last
        The range; ``last`` is not in it.
    """

    def __init__(self, first: int, last: int) -> None:
        images, labels = _digits()
        self._images, self._labels = images[first:last], labels[first:last]

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Images ``[N, 1, 8, 8]`` of random pairs with fresh noise; the class of the one as it is ("A") and of the mirrored one ("B")."""
        a, b = torch.randint(len(self._labels), (2, count), generator=generator)
        both = (self._images[a] + self._images[b].flip(-1)).clamp(max=_BRIGHTEST)
        x = both + _NOISE * torch.randn(both.shape, generator=generator)
        return x.unsqueeze(1), {"A": self._labels[a], "B": self._labels[b]}


def build(channels: int, seed: int, hidden: int = 64) -> SlimMultiTask:
    """Two convolutions to ``2 channels`` channels at 4 x 4, and two linear layers for each task, freshly initialised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(
            SlimConv2d(1, channels, 3, padding=1), nn.ReLU(), SlimConv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.ReLU()
        )
        decoders = {
            task: nn.Sequential(nn.Flatten(), SlimLinear(32 * channels, hidden), nn.ReLU(), SlimLinear(hidden, CLASSES, slim_output=False))
            for task in TASKS
        }
        return SlimMultiTask(encoder, decoders)


def _moved(batch: Batch, device: torch.device) -> Batch:
    x, targets = batch
    return x.to(device), {task: target.to(device) for task, target in targets.items()}


def _train(
    model: nn.Module,
    digits: DigitPairs,
    steps: int,
    generator: torch.Generator,
    backward: Callable[[Batch], object],
    done: Callable[[float], None],
    falling: bool = False,
) -> None:
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    for step in range(steps):
        if falling:
            optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 - step / steps)
        optimizer.zero_grad()
        backward(_moved(digits.draw(_BATCH, generator), device))
        optimizer.step()
        done((step + 1) / steps)


def train_sandwich(
    model: SlimMultiTask,
    digits: DigitPairs,
    steps: int,
    generator: torch.Generator,
    done: Callable[[float], None],
    *,
    gamma: float | None,
    kind: str = "prefix_cos",
    decoder_widths: tuple[float, ...] | None = None,
    samples: int = 1,
    falling: bool = False,
) -> SlimMultiTask:
    """Train at the largest, the smallest and ``samples`` random configurations per step; ``falling``: the learning rate goes to zero."""
    losses = dict.fromkeys(TASKS, cross_entropy)

    def backward(batch: Batch) -> None:
        x, targets = batch
        sandwich_step(model, x, targets, losses, samples, gamma, generator, kind=kind, decoder_widths=decoder_widths)

    _train(model, digits, steps, generator, backward, done, falling)
    return model.eval()


def train_alone(
    plain: nn.Module, digits: DigitPairs, steps: int, generator: torch.Generator, done: Callable[[float], None], seed: int
) -> nn.Module:
    """Train an exported network of one configuration from fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in plain.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()

    def backward(batch: Batch) -> None:
        x, targets = batch
        outputs = plain(x)
        torch.stack([cross_entropy(outputs[task], targets[task]) for task in TASKS]).sum().backward()

    _train(plain.train(), digits, steps, generator, backward, done)
    return plain.eval()


def accuracy(output: Tensor, target: Tensor) -> float:
    """The share of samples whose class is found."""
    return float((output.argmax(1) == target).float().mean())


@torch.no_grad()
def accuracies(model: nn.Module, batch: Batch, config: WidthConfig | None = None) -> dict[str, float]:
    """Each task's accuracy, of a slimmable network at a configuration or of a plain one."""
    x, targets = _moved(batch, next(model.parameters()).device)
    outputs: Mapping[str, Tensor] = model(x) if config is None else model(x, config)
    return {task: accuracy(outputs[task], targets[task]) for task in TASKS}
