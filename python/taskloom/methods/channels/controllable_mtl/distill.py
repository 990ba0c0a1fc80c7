"""Configuration-invariant knowledge distillation: features of narrow encoders are drawn to those of the whole one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from taskloom.methods.channels.controllable_mtl.model import Features

Distance = Callable[[Tensor, Tensor], Tensor]


def _prefix(z_student: Tensor, z_teacher: Tensor) -> Tensor:
    """The teacher's first channels, as many as the student has."""
    return z_teacher[:, : z_student.shape[1]]


def _unit(z: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1 (those of zeros stay), and which rows are zeros."""
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    dead = length == 0
    return z / torch.where(dead, 1.0, length), dead


def _prefix_cos(z_student: Tensor, z_teacher: Tensor) -> Tensor:
    student, student_dead = _unit(z_student.flatten(1))
    teacher, teacher_dead = _unit(_prefix(z_student, z_teacher).flatten(1))
    # 1 - cos of unit vectors, without the cancellation; next to a vector of zeros the cosine counts as 0.
    distances = 0.5 * (student - teacher).square().sum(1, keepdim=True) + 0.5 * (student_dead ^ teacher_dead)
    return distances.mean()


def _prefix_mse(z_student: Tensor, z_teacher: Tensor) -> Tensor:
    return (z_student - _prefix(z_student, z_teacher)).square().mean()


def _attention(z_student: Tensor, z_teacher: Tensor) -> Tensor:
    if z_student.dim() < 3:
        raise ValueError(f"ci_kd_loss: z_student: expected positions behind (N, C) for kind 'attention', got {tuple(z_student.shape)}")
    student, teacher = (_unit(z.square().mean(1).flatten(1))[0] for z in (z_student, z_teacher))
    return (student - teacher).square().sum(1).mean()


DISTANCES: dict[str, Distance] = {"prefix_cos": _prefix_cos, "prefix_mse": _prefix_mse, "attention": _attention}
GAMMAS = {"prefix_cos": 1.0, "prefix_mse": 0.3, "attention": 1.0}


def find_distance(kind: str | Distance) -> Distance:
    """The distance of a name, or the one that is given."""
    if not isinstance(kind, str):
        return kind
    if kind not in DISTANCES:
        raise ValueError(f"ci_kd_loss: kind: expected one of {', '.join(DISTANCES)} or a function, got {kind!r}")
    return DISTANCES[kind]


def default_gamma(kind: str | Distance) -> float:
    """The weight of a distance in the loss where none is given; 1.0 for a function."""
    return GAMMAS.get(kind, 1.0) if isinstance(kind, str) else 1.0


def _as_list(z: Features) -> list[Tensor]:
    return [z] if isinstance(z, Tensor) else list(z)


def _check(z_student: Tensor, z_teacher: Tensor) -> None:
    student, teacher = tuple(z_student.shape), tuple(z_teacher.shape)
    if len(student) < 2 or len(student) != len(teacher) or (student[0], *student[2:]) != (teacher[0], *teacher[2:]):
        raise ValueError(f"ci_kd_loss: expected features (N, C, ...) that differ in C only, got {student} and {teacher}")
    if student[1] > teacher[1]:
        raise ValueError(f"ci_kd_loss: z_student: expected at most the teacher's {teacher[1]} channels, got {student[1]}")


def ci_kd_loss(z_student: Features, z_teacher: Features, kind: str | Distance = "prefix_cos") -> Tensor:
    """The distance of a narrow encoder's features from those of the whole encoder.

    Parameters
    ----------
    z_student, z_teacher
        ``[N, C_s, ...]`` and ``[N, C, ...]``, ``C_s <= C``; or a sequence of stages each, whose distances are averaged. No gradient
        reaches the teacher. float16 and bfloat16 are compared in float32.
    kind
        ``"prefix_cos"`` (default): 1 minus the cosine between a sample's features and the teacher's first ``C_s`` channels, mean over
        samples; it does not depend on the student's scale. ``"prefix_mse"``: mean square of the difference to the same.
        ``"attention"``: squared distance of the maps ``mean_c z^2``, each scaled to length 1, mean over samples; it compares any two
        widths. Or a function of both tensors that gives a scalar.

    Returns
    -------
    Tensor
        A scalar; zero where both features are the same.

    Raises
    ------
    ValueError
        If shapes or numbers of stages do not fit, or the kind is unknown.

    Notes
    -----
    Source: arXiv 2308.11744, whose abstract and figure 2 say that the encoder of the largest capacity is distilled into the others. **The
    distance is inferred**: none of the three is known to be the paper's.
    """
    distance = find_distance(kind)
    students, teachers = _as_list(z_student), _as_list(z_teacher)
    if len(students) != len(teachers) or not students:
        raise ValueError(f"ci_kd_loss: expected features of as many stages, got {len(students)} and {len(teachers)}")
    found = []
    for student, teacher in zip(students, teachers, strict=True):
        _check(student, teacher)
        wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        found.append(distance(student.to(wide), teacher.detach().to(wide)))
    return torch.stack(found).mean()


def last_stage(z: Features) -> Tensor:
    """The deepest features."""
    return z if isinstance(z, Tensor) else z[-1]
