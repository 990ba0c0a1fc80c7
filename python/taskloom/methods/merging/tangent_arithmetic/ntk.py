"""The neural tangent kernel at a model's weights, and how far its eigenvectors keep to one task."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from taskloom.methods.merging.places import call_with

Reduce = Literal["trace", "none"] | int


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _blocks(parameters: Mapping[str, Tensor]) -> list[list[str]]:
    """Groups of names: small parameters together, as long as no group is larger than the largest parameter."""
    limit = max(parameter.numel() for parameter in parameters.values())
    blocks: list[list[str]] = [[]]
    held = 0
    for name, parameter in parameters.items():
        if blocks[-1] and held + parameter.numel() > limit:
            blocks.append([])
            held = 0
        blocks[-1].append(name)
        held += parameter.numel()
    return blocks


def _jacobian(
    model: nn.Module, block: Mapping[str, Tensor], inputs: Tensor, output: int | None, batch_size: int
) -> tuple[Tensor, set[str]]:
    """Derivatives [n, outputs, size of the block] of every point's outputs by the parameters of a block, and which are not all zero."""

    def one(parameters: Mapping[str, Tensor], point: Tensor) -> Tensor:
        outputs: Tensor = call_with(model, parameters, (point[None],))[0]
        return outputs if output is None else outputs[output : output + 1]

    rows = vmap(jacrev(one), in_dims=(None, 0))
    parts, used = [], set[str]()
    for points in inputs.split(batch_size):
        derivatives = rows(dict(block), points)
        used |= {name for name, derivative in derivatives.items() if bool(derivative.any())}
        parts.append(torch.cat([derivative.flatten(2) for derivative in derivatives.values()], 2))
    return torch.cat(parts), used


def _outputs(model: nn.Module, inputs: Tensor, argument: str) -> int:
    """Number of outputs of a point."""
    if not isinstance(inputs, Tensor) or inputs.ndim < 1 or not len(inputs):
        got = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"ntk_matrix: {argument}: expected a tensor of one or more points, got {got}")
    outputs = model(inputs[:1])
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"ntk_matrix: model: expected floating-point outputs, got {kind}")
    if outputs.ndim != 2:
        raise ValueError(f"ntk_matrix: model: expected outputs [n, C], got {tuple(outputs.shape)}")
    return outputs.shape[1]


def ntk_matrix(model: nn.Module, x1: Tensor, x2: Tensor | None = None, reduce: Reduce = "trace", *, batch_size: int = 32) -> Tensor:
    """``K(x, x') = J(x) J(x')^T`` with J [C, P] the Jacobian of the outputs by the trainable parameters.

    Parameters
    ----------
    model
        Its outputs are [n, C]. It is evaluated in eval mode, and left in its own. Every point is a batch of its own.
    x1, x2
        Points [n1, ...] and [n2, ...]. Default of ``x2``: ``x1``.
    reduce
        ``"trace"`` (default): the trace over outputs, divided by C, [n1, n2]. ``"none"``: [n1, n2, C, C]. A number: of that output alone,
        [n1, n2].
    batch_size
        Points whose derivatives are computed at once. Default 32.

    Returns
    -------
    Tensor
        In the parameters' dtype, the blocks' products summed in float64; exactly symmetric where ``x2`` is None.

    Raises
    ------
    TypeError
        If the outputs are not floating point.
    ValueError
        If the outputs are not [n, C], there is no point or no trainable parameter, or ``reduce`` or ``batch_size`` is out of range.

    Warns
    -----
    UserWarning
        If the outputs at all points have no derivative by a trainable parameter: it is unused, or used past its name (from a list of the
        module's own, or by ``.data``).

    Notes
    -----
    The Jacobian of all points is never formed: it is computed for a block of parameters at a time, no larger than the largest parameter,
    in memory of (n1 + n2) * C * block.

    Source: Ortiz-Jimenez et al., NeurIPS 2023, arXiv 2305.12827, section 6; the division of the trace by C is this library's.
    """
    if batch_size < 1:
        raise ValueError(f"ntk_matrix: batch_size: expected 1 or more, got {batch_size}")
    if reduce not in ("trace", "none") and (not isinstance(reduce, int) or isinstance(reduce, bool)):
        raise ValueError(f"ntk_matrix: reduce: expected 'trace', 'none' or the number of an output, got {reduce!r}")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError("ntk_matrix: model: expected at least one parameter that requires a gradient, got none")
    with torch.no_grad(), _eval_mode(model):
        count = _outputs(model, x1, "x1")
        if x2 is not None:
            _outputs(model, x2, "x2")
        output = reduce if isinstance(reduce, int) else None
        if output is not None and not 0 <= output < count:
            raise ValueError(f"ntk_matrix: reduce: expected an output from 0 to {count - 1}, got {output}")
        form = "icp,jdp->ijcd" if reduce == "none" else "icp,jcp->ij"
        total: Tensor | None = None
        unused: list[str] = []
        for names in _blocks(parameters):
            block = {name: parameters[name] for name in names}
            first, used = _jacobian(model, block, x1, output, batch_size)
            second, others = (first, used) if x2 is None else _jacobian(model, block, x2, output, batch_size)
            unused += [name for name in names if name not in used | others]
            product = torch.einsum(form, first, second).double()
            total = product if total is None else total.add_(product)
    assert total is not None
    if unused:
        some = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
        warnings.warn(
            f"ntk_matrix: no output depends on {some}; a tensor that the model uses past its parameter's name counts as constant",
            stacklevel=2,
        )
    if x2 is None:
        total = (total + (total.transpose(0, 1) if reduce != "none" else total.permute(1, 0, 3, 2))) / 2
    return (total / count if reduce == "trace" else total).to(next(iter(parameters.values())).dtype)


class LocalEnergy(NamedTuple):
    """How a kernel's eigenvectors spread over groups of points.

    Attributes
    ----------
    energy
        [n]: each point's share in the chosen eigenvectors, ``sum_r v_ir^2``.
    shares
        [n, groups]: each eigenvector's energy on each group; a row sums to 1.
    eigenvalues
        [n], largest first; eigenvectors are numbered so.
    chosen
        The chosen eigenvectors, most important first.
    """

    energy: Tensor
    shares: Tensor
    eigenvalues: Tensor
    chosen: Tensor


def local_energy(K: Tensor, groups: Sequence[int] | Tensor, f: Tensor | None = None, energy: float = 0.95) -> LocalEnergy:
    """Energy of a kernel's eigenvectors on points and on groups of them (tasks).

    Parameters
    ----------
    K
        Symmetric kernel [n, n].
    groups
        Group of each point, from 0.
    f
        [n]: the function that one task learned, at the points. The chosen eigenvectors are those that carry it: the largest ``|v^T f|``
        until ``energy`` of ``||f||^2``. Default None: the largest eigenvalues until ``energy`` of their sum.
    energy
        Share to reach, above 0 and at most 1. Default 0.95.

    Raises
    ------
    TypeError
        If ``groups`` are no integers.
    ValueError
        If shapes do not fit, K is not symmetric or not finite, f is zero, or ``energy`` is out of range.

    Warns
    -----
    UserWarning
        If some are chosen of eigenvectors whose eigenvalues are equal up to rounding, and others are not.

    Notes
    -----
    Eigenvectors of equal eigenvalues are any basis of their space: their ``shares`` are one choice of many. ``energy`` does not depend on
    it as long as all of them are chosen, or none.

    Source: Ortiz-Jimenez et al., NeurIPS 2023, arXiv 2305.12827, section 6; that eigenvectors are chosen by the function they carry is
    inferred.
    """
    if K.ndim != 2 or K.shape[0] != K.shape[1] or not len(K):
        raise ValueError(f"local_energy: K: expected shape [n, n], got {tuple(K.shape)}")
    count, member = len(K), torch.as_tensor(groups).cpu()
    if member.is_floating_point() or member.is_complex():
        raise TypeError(f"local_energy: groups: expected integers, got {member.dtype}")
    member = member.long()
    if tuple(member.shape) != (count,) or int(member.min()) < 0:
        raise ValueError(f"local_energy: groups: expected {count} numbers from 0, got {tuple(member.shape)}")
    if not 0 < energy <= 1:
        raise ValueError(f"local_energy: energy: expected above 0 and at most 1, got {energy}")
    kernel = K.detach().double().cpu()
    if not torch.isfinite(kernel).all() or not torch.allclose(kernel, kernel.T, rtol=1e-4, atol=1e-6 * float(kernel.abs().max())):
        raise ValueError("local_energy: K: expected a finite symmetric matrix")
    ascending, vectors = torch.linalg.eigh(kernel)
    eigenvalues, vectors = ascending.flip(0), vectors.flip(1)
    squares = vectors.square()
    shares = torch.zeros(count, int(member.max()) + 1, dtype=torch.float64).index_add_(1, member, squares.T.contiguous())
    chosen = _chosen(eigenvalues.clamp(min=0) if f is None else _carried(vectors, f), energy)
    _warn_of_equals(eigenvalues, chosen, count * torch.finfo(K.dtype).eps)
    return LocalEnergy(squares[:, chosen].sum(1), shares, eigenvalues, chosen)


def _carried(vectors: Tensor, f: Tensor) -> Tensor:
    if tuple(f.shape) != (len(vectors),):
        raise ValueError(f"local_energy: f: expected shape {(len(vectors),)}, got {tuple(f.shape)}")
    return (vectors.T @ f.detach().double().cpu()).square()


def _warn_of_equals(eigenvalues: Tensor, chosen: Tensor, rounding: float) -> None:
    """Warn if the choice goes through a run of eigenvalues that are as good as equal."""
    steps = eigenvalues[:-1] - eigenvalues[1:] > rounding * float(eigenvalues.abs().max())
    run = torch.cat([torch.zeros(1, dtype=torch.int64), steps.cumsum(0)])
    sizes, taken = run.bincount(), run[chosen].bincount(minlength=int(run[-1]) + 1)
    parted = ((taken > 0) & (taken < sizes)).nonzero()
    if len(parted):
        value = float(eigenvalues[run == parted[0]][0])
        warnings.warn(
            f"local_energy: {int(taken[parted[0]])} of {int(sizes[parted[0]])} eigenvectors of the eigenvalue {value:.6g} were chosen: "
            "they are any basis of their space, and the energy depends on which",
            stacklevel=3,
        )


def _chosen(weights: Tensor, energy: float) -> Tensor:
    total = float(weights.sum())
    if not total > 0:
        raise ValueError("local_energy: expected something to choose eigenvectors by, got a function or a kernel that is zero")
    ordered, order = weights.sort(descending=True, stable=True)
    # Rounding may leave the sum of all just below the share asked for.
    needed = int((ordered.cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1
    return order[:needed]
