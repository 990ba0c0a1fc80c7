"""The sandwich rule: one step of training at the largest, the smallest and some random widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from taskloom.methods.channels.controllable_mtl.config import NetworkWidth, WidthConfig, check_ratio
from taskloom.methods.channels.controllable_mtl.distill import Distance, ci_kd_loss, default_gamma, find_distance, last_stage
from taskloom.methods.channels.controllable_mtl.model import Features, SlimMultiTask

WIDTHS = (0.25, 0.5, 0.75, 1.0)

Loss = Callable[[Tensor, Tensor], Tensor]


def _checked_widths(what: str, widths: Sequence[float]) -> tuple[float, ...]:
    if not widths:
        raise ValueError(f"sandwich_step: {what}: expected at least one ratio, got none")
    return tuple(check_ratio(f"sandwich_step: {what}", width) for width in widths)


def _checked_weights(model: SlimMultiTask, weights: Mapping[str, float] | None) -> dict[str, float]:
    found = dict.fromkeys(model.tasks, 1.0) if weights is None else dict(weights)
    for task, weight in found.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"sandwich_step: weights: expected finite numbers of at least 0, got {weight} for task {task!r}")
    return found


def _task_loss(loss: Loss, task: str, output: Tensor, target: Tensor) -> Tensor:
    found = loss(output, target)
    if found.dim():
        raise ValueError(f"sandwich_step: losses: expected a scalar for task {task!r}, got shape {tuple(found.shape)}")
    return found


def _drawn(widths: tuple[float, ...], parts: int, generator: torch.Generator | None) -> NetworkWidth:
    """One width (``parts`` 0), or one per part."""
    places = torch.randint(len(widths), (max(parts, 1),), generator=generator).tolist()
    return tuple(widths[place] for place in places) if parts else widths[places[0]]


def _random_config(
    model: SlimMultiTask, widths: tuple[float, ...], decoder_widths: tuple[float, ...], per_layer: bool, generator: torch.Generator | None
) -> WidthConfig:
    encoder = _drawn(widths, len(model.parts) if per_layer else 0, generator)
    return WidthConfig(encoder, {task: _drawn(decoder_widths, 0, generator) for task in model.tasks})


def sandwich_step(
    model: SlimMultiTask,
    x: Tensor,
    targets: Mapping[str, Tensor],
    losses: Mapping[str, Loss],
    samples: int = 2,
    gamma: float | None = None,
    generator: torch.Generator | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    kind: str | Distance = "prefix_cos",
    every_stage: bool = False,
    widths: Sequence[float] = WIDTHS,
    decoder_widths: Sequence[float] | None = None,
    per_layer: bool = False,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> dict[str, Tensor]:
    """Add the gradients of one training step at several configurations to the parameters.

    The whole network comes first; then the smallest and ``samples`` random configurations, whose encoder features are also drawn to those
    that the whole encoder had. Set the gradients to None before and call the optimizer after.

    Parameters
    ----------
    model
        In the training mode it is to have.
    x
        A batch.
    targets, losses
        By task: the target, and the loss as a function of output and target. Every task of the model.
    samples
        Random configurations: encoder and decoders each draw a width of their own. Default 2.
    gamma
        Weight of the distance between features; 0: none is computed. Default None: 1.0, or 0.3 for ``"prefix_mse"``.
    generator
        What widths are drawn from, on the CPU. Default None: torch's own.
    weights
        Weight of each task's loss. Default None: 1 each.
    kind
        The distance, as :func:`ci_kd_loss` takes it. Default ``"prefix_cos"``.
    every_stage
        Whether all features of an encoder that gives several are compared. Default False: the last.
    widths, decoder_widths
        What is drawn from, and whose least is the smallest configuration. Default 0.25, 0.5, 0.75, 1.0 for both; ``decoder_widths=(1.0,)``
        leaves decoders whole.
    per_layer
        Whether random configurations draw a width for each part of the encoder, as a search per layer needs. Default False.
    backward
        What is called with each configuration's loss, such as ``lambda loss: scaler.scale(loss).backward()`` for a gradient scaler, or
        an accelerator's own. Default: ``Tensor.backward``.

    Returns
    -------
    dict
        Detached scalars: ``"largest"``, ``"smallest"`` and ``"random"`` (a mean; if ``samples`` > 0), the sums of the tasks' losses, and
        ``"distillation"``, the mean distance, where gamma is not 0.

    Raises
    ------
    KeyError
        If targets, losses or weights lack a task or have an unknown one.
    ValueError
        If ``samples``, ``gamma`` or a weight is negative or not finite, a width is not in (0, 1], or a task's loss is not a scalar.
    TypeError
        If ``samples`` is no integer.

    Notes
    -----
    Source: sandwich rule, Yu and Huang, ICCV 2019, arXiv 1903.05134; distillation, arXiv 2308.11744. **Inferred**: that the latter trains
    by the sandwich rule, that widths are drawn independently, gamma, and the distance. The teacher is the network of the same step, before
    the update. Weights outside a narrow prefix get no gradient from it, but an optimizer's momentum and decay move them all the same.
    """
    for what, given in (("targets", targets), ("losses", losses), *((("weights", weights),) if weights is not None else ())):
        model.check_tasks(f"sandwich_step: {what}", given, every=True)
    strength = default_gamma(kind) if gamma is None else gamma
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise TypeError(f"sandwich_step: samples: expected an integer, got {type(samples).__name__}")
    if samples < 0 or not 0 <= strength < math.inf:
        raise ValueError(f"sandwich_step: expected samples and gamma of at least 0, got {samples} and {gamma}")
    shares = _checked_weights(model, weights)
    find_distance(kind)
    encoder_widths = _checked_widths("widths", widths)
    own_widths = encoder_widths if decoder_widths is None else _checked_widths("decoder_widths", decoder_widths)

    def task_loss(outputs: Mapping[str, Tensor]) -> Tensor:
        found = [shares[task] * _task_loss(losses[task], task, outputs[task], targets[task]) for task in model.tasks]
        return torch.stack(found).sum()

    def compared(z: Features) -> Features:
        return z if every_stage else last_stage(z)

    z, outputs = model.run(x, WidthConfig(1.0, dict.fromkeys(model.tasks, 1.0)))
    teacher = [one.detach() for one in ([z] if isinstance(z, Tensor) else z)]
    loss = task_loss(outputs)
    backward(loss)
    reported = {"largest": loss.detach()}
    del z, outputs, loss

    configs = [WidthConfig(min(encoder_widths), dict.fromkeys(model.tasks, min(own_widths)))]
    configs += [_random_config(model, encoder_widths, own_widths, per_layer, generator) for _ in range(samples)]
    narrow: list[Tensor] = []
    distances: list[Tensor] = []
    for config in configs:
        z, outputs = model.run(x, config)
        loss = task_loss(outputs)
        narrow.append(loss.detach())
        if strength > 0:
            stages = [z] if isinstance(z, Tensor) else z
            distance = ci_kd_loss(compared(stages), compared(teacher), kind)
            distances.append(distance.detach())
            loss = loss + strength * distance
        backward(loss)
    reported["smallest"] = narrow[0]
    if samples:
        reported["random"] = torch.stack(narrow[1:]).mean()
    if distances:
        reported["distillation"] = torch.stack(distances).mean()
    return reported
