"""What aTLAS minimises: several tasks at once, one task against a control, and confident predictions without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from taskloom.methods.merging.places import call_with

Batch = tuple[Tensor, Tensor]
Head = Callable[[Tensor], Tensor]
Encoder = Callable[[Tensor], Tensor]


def _apply_frozen(head: Head, features: Tensor) -> Tensor:
    """A head's logits; its parameters get no gradient, whatever their ``requires_grad``."""
    if not isinstance(head, nn.Module):
        return head(features)
    logits = call_with(head, {name: value.detach() for name, value in head.named_parameters()}, (features,))
    if not isinstance(logits, Tensor):
        raise TypeError(f"multi_task_loss: heads: expected a head that returns a tensor, got {type(logits).__name__}")
    return logits


def multi_task_loss(heads: Mapping[str, Head] | nn.ModuleDict) -> Callable[[Encoder, Mapping[str, Batch]], Tensor]:
    """The loss of task addition: the sum over the tasks of the cross-entropy of each task's own head on its own batch.

    Parameters
    ----------
    heads
        A frozen head per task, from features to logits: a module, whose parameters get no gradient, or a function. A mapping or an
        ``nn.ModuleDict``.

    Returns
    -------
    callable
        ``loss(encoder, batches)`` with ``batches[task] = (inputs, labels)`` for every task of ``heads``; the encoder is an
        :class:`AtlasModel`, say. The inputs of all tasks go through it as one batch, so the weights are composed once a step. A scalar.

    Raises
    ------
    TypeError
        If ``heads`` is no mapping, or a head returns something else than a tensor.
    ValueError
        If there is no head, the batches' tasks are not the heads', a batch is empty, or its labels are not one per input.

    Notes
    -----
    Source: Zhang et al. 2024, arXiv 2407.02880, task addition.
    """
    if not isinstance(heads, (Mapping, nn.ModuleDict)):
        raise TypeError(f"multi_task_loss: heads: expected a mapping from a task to its head, got {type(heads).__name__}")
    own: dict[str, Head] = dict(heads.items())
    if not own:
        raise ValueError("multi_task_loss: heads: expected at least one, got none")

    def loss(encoder: Encoder, batches: Mapping[str, Batch]) -> Tensor:
        if set(batches) != set(own):
            raise ValueError(f"multi_task_loss: batches: expected the tasks {', '.join(own)}, got {', '.join(batches) or 'none'}")
        for task, (inputs, labels) in batches.items():
            if len(inputs) == 0 or labels.shape != inputs.shape[:1]:
                shapes = f"inputs {list(inputs.shape)} and labels {list(labels.shape)}"
                raise ValueError(f"multi_task_loss: batches: task {task!r}: expected a label for each of 1 or more inputs, got {shapes}")
        features = encoder(torch.cat([batches[task][0] for task in own])).split([len(batches[task][0]) for task in own])
        losses = [
            functional.cross_entropy(_apply_frozen(head, part), batches[task][1])
            for (task, head), part in zip(own.items(), features, strict=True)
        ]
        return torch.stack(losses).sum()

    return loss


def _check_logits(function: str, name: str, logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point() or labels.shape != logits.shape[:1] or len(labels) == 0:
        expected = "floating-point logits [N, classes] and labels [N] with N >= 1"
        raise ValueError(f"{function}: {name}: expected {expected}, got {logits.dtype} {list(logits.shape)} and {list(labels.shape)}")


def negation_loss(target: Batch, control: Batch | None) -> Tensor:
    """The loss of task negation, ``-CE(target) + CE(control)``: unlearn the target and keep the control.

    Parameters
    ----------
    target, control
        ``(logits, labels)`` of the two halves of a batch: [N, classes] floating point and [N] int64 each, with classes of their own.

    Returns
    -------
    Tensor
        Scalar. It has no lower bound; :class:`Negation` says when to stop.

    Raises
    ------
    ValueError
        If the control is missing, or shapes do not fit.

    Notes
    -----
    Source: Zhang et al. 2024, arXiv 2407.02880, task negation.
    """
    if control is None:
        raise ValueError("negation_loss: control: expected (logits, labels) of a control task, got None: nothing else bounds the negation")
    for name, (logits, labels) in {"target": target, "control": control}.items():
        _check_logits("negation_loss", name, logits, labels)
    return functional.cross_entropy(*control) - functional.cross_entropy(*target)


def ufm_loss(weak: Tensor, strong: Tensor, pseudo: Tensor, trusted: Tensor, threshold: float = 0.99) -> Tensor:
    """Unsupervised FixMatch: cross-entropy of the strong view to a target that needs no label, over confident samples.

    A trusted sample's target is its pseudo-label; another's is the softmax of its weak view, without gradient. The mean is over the samples
    whose target's largest entry exceeds the threshold.

    Parameters
    ----------
    weak, strong
        Logits [N, classes] of the two views under the current model, floating point; half precision is summed in float32.
    pseudo
        Labels [N] int64 that the base model predicts; read for trusted samples alone.
    trusted
        Bool [N], as :func:`select_trusted` gives it.
    threshold
        In [0, 1). Default 0.99.

    Returns
    -------
    Tensor
        Scalar; 0 with a zero gradient if no sample exceeds the threshold.

    Raises
    ------
    TypeError
        If a dtype is another.
    ValueError
        If shapes do not fit, the threshold is out of range, or a trusted sample's label is no class.

    Notes
    -----
    Source: Zhang et al. 2024, arXiv 2407.02880, test-time adaptation. The authors' code divides by zero where no sample is confident.
    """
    _check_views(weak, strong, pseudo, trusted)
    if not 0 <= threshold < 1:
        raise ValueError(f"ufm_loss: threshold: expected a number in [0, 1), got {threshold}")
    classes = strong.shape[1]
    labels = torch.where(trusted, pseudo, 0)
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"ufm_loss: pseudo: expected labels of trusted samples from 0 to {classes - 1}, got others")
    strong = strong.to(torch.promote_types(strong.dtype, torch.float32))
    guessed = weak.detach().to(strong.dtype).softmax(1)
    targets = torch.where(trusted[:, None], functional.one_hot(labels, classes).to(strong.dtype), guessed)
    # Written so that NaN counts and shows in the loss.
    confident = ~(targets.amax(1) <= threshold)
    losses = functional.cross_entropy(strong, targets, reduction="none")
    return torch.where(confident, losses, 0).sum() / confident.sum().clamp(min=1)


def _check_views(weak: Tensor, strong: Tensor, pseudo: Tensor, trusted: Tensor) -> None:
    if weak.shape != strong.shape or weak.dim() != 2 or len(weak) == 0:
        shapes = f"{list(weak.shape)} and {list(strong.shape)}"
        raise ValueError(f"ufm_loss: weak, strong: expected logits of one shape [N, classes] with N >= 1, got {shapes}")
    for name, logits in {"weak": weak, "strong": strong}.items():
        if not logits.is_floating_point():
            raise TypeError(f"ufm_loss: {name}: expected floating-point logits, got {logits.dtype}")
    for name, value, dtype in (("pseudo", pseudo, torch.int64), ("trusted", trusted, torch.bool)):
        if value.dtype != dtype:
            raise TypeError(f"ufm_loss: {name}: expected {dtype}, got {value.dtype}")
        if value.shape != weak.shape[:1]:
            raise ValueError(f"ufm_loss: {name}: expected shape {list(weak.shape[:1])}, got {list(value.shape)}")
