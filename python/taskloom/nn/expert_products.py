"""Products of rows in expert order with their experts' matrices, and the gather that makes such rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taskloom.ops import expert_combine
from taskloom.ops._backends import active_transform, requested_backend

# torch's grouped product reads rows by vectors of 16 bytes.
_ROW_BYTES = 16
_LEAST_CAPABILITY = (8, 0)
_GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _GatheredRows(torch.autograd.Function):
    """Rows of x by index, each as often as a token has slots; backward adds up what comes back in the order of the slots."""

    @staticmethod
    def forward(x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(0, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return expert_combine(gradient, torch.ones(inverse.shape, device=gradient.device), inverse), None, None


class _RunProducts(torch.autograd.Function):
    """One product of torch's for each expert's run of rows, written where it belongs. On a GPU the host waits for the runs' ends."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[1])
        for expert, run in _runs(ends):
            torch.mm(x[run], weight[expert].t(), out=out[run])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            # The gradients may be differentiated again, which torch does not do for out=.
            runs = _runs(ends)
            dx = _plain_products(gradient, weight.transpose(1, 2), runs) if for_x else None
            return dx, _plain_outer_products(gradient, x, len(weight), runs) if for_weight else None, None
        dx = torch.empty_like(x) if for_x else None
        dweight = torch.zeros_like(weight) if for_weight else None
        for expert, run in _runs(ends):
            if dx is not None:
                torch.mm(gradient[run], weight[expert], out=dx[run])
            if dweight is not None:
                torch.mm(gradient[run].t(), x[run], out=dweight[expert])
        return dx, dweight, None


def _runs(ends: Tensor) -> list[tuple[int, slice]]:
    """The experts that have rows, and which."""
    # Tensors of torch.func's transforms have numbers, but no memory that tolist could read.
    stops = ends.tolist() if active_transform() is None else [int(end) for end in ends]
    return [(expert, slice(begin, end)) for expert, (begin, end) in enumerate(zip([0, *stops], stops, strict=False)) if end > begin]


def _plain_products(x: Tensor, weight: Tensor, runs: list[tuple[int, slice]]) -> Tensor:
    """The products of the runs one after another, which torch differentiates as often as one likes and in either mode."""
    return torch.cat([x.new_empty(0, weight.shape[1]), *(x[run] @ weight[expert].t() for expert, run in runs)])


def _plain_outer_products(gradient: Tensor, x: Tensor, experts: int, runs: list[tuple[int, slice]]) -> Tensor:
    """The gradient of the experts' matrices, likewise; zero for those without rows."""
    by_expert = dict(runs)
    return torch.stack([gradient[run].t() @ x[run] for run in (by_expert.get(expert, slice(0, 0)) for expert in range(experts))])


def takes_grouped_product(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product serves rows ``x`` and matrices ``weight``, by what they are."""
    if not hasattr(torch.nn.functional, "grouped_mm") or x.dtype not in _GROUPED_DTYPES or x.dtype != weight.dtype:
        return False
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return False
    if any(size * x.element_size() % _ROW_BYTES for size in weight.shape[1:]):
        return False
    if x.device.type == "cuda":
        return torch.cuda.get_device_capability(x.device) >= _LEAST_CAPABILITY
    return x.device.type == "cpu" and (torch.compiler.is_compiling() or (x.data_ptr() | weight.data_ptr()) % _ROW_BYTES == 0)


def gather_rows(x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """Rows ``rows`` of x ``[T, D]`` in expert order; ``inverse`` ``[T, k]`` says where each token's are."""
    if active_transform() is not None or requested_backend() == "reference":
        return x.index_select(0, rows)
    function: Any = _GatheredRows
    gathered: Tensor = function.apply(x, rows, inverse)
    return gathered


def expert_products(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``x[i] weight[e]^T`` for rows i of expert e: x ``[N, D]`` in expert order, weight ``[E, O, D]``, offsets ``[E + 1]`` int32."""
    ends = offsets[1:]
    if active_transform() is not None:
        # Tensors of a transform have no memory that one could look at, and the function below no rules for all of them.
        return _plain_products(x, weight, _runs(ends))
    if takes_grouped_product(x, weight):
        return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    function: Any = _RunProducts
    products: Tensor = function.apply(x, weight, ends)
    return products
