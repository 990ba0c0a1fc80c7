"""Whether an op for the linear layers of a linearised model would gain on what torch.func.jvp does with them.

    python benchmarks/bench_tangent_linear.py [--device cuda] [--dtype bfloat16] [--json NAME.json]

A training step of a stack of linear layers in the tangent space: y and dy forward, then the gradients of dW and db. Two ways of writing the
op were tried, both in torch's own products so that nothing but the way differs: sums formed inside the products (``accumulated``), and x
above dx in one buffer, so that both meet W0 in one product (``stacked``). A ratio above 1 says that the way is faster than jvp. The step of
the ordinary model is there for scale.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import jvp
from torch.nn.functional import linear

import environment
from spread import spread, summary

WAYS = ("accumulated", "stacked")
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 1e-2}
SIZES = ((128, 256, 4), (512, 768, 4), (16, 1024, 4), (1024, 1024, 2))
LARGE = ((4096, 1024, 4), (16384, 1024, 4), (16384, 4096, 2))


class Accumulated(torch.autograd.Function):
    """y = x W^T + b and dy = dx W^T + x dW^T + db, every sum inside a product; dx may be None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dx: Tensor | None, weight: Tensor, dweight: Tensor, bias: Tensor, dbias: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        dy = torch.addmm(dbias, x, dweight.T)
        if dx is not None:
            dy.addmm_(dx, weight.T)
        return torch.addmm(bias, x, weight.T), dy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = grads[1] @ weight if ctx.needs_input_grad[1] else None
        return None, dx, None, grads[1].T @ x, None, grads[1].sum(0)


class Stacked(torch.autograd.Function):
    """The same of x above dx in one tensor [2 n, in], which meets W in one product."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, weight: Tensor, dweight: Tensor, bias: Tensor, dbias: Tensor) -> Tensor:
        ctx.save_for_backward(both, weight)
        count = len(both) // 2
        out = both @ weight.T
        out[:count] += bias
        out[count:] += dbias
        out[count:].addmm_(both[:count], dweight.T)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        both, weight = ctx.saved_tensors
        count, dboth = len(both) // 2, None
        grad = grads[0][count:]
        if ctx.needs_input_grad[0]:
            dboth = torch.empty_like(both)
            dboth[:count] = 0
            torch.mm(grad, weight, out=dboth[count:])
        return dboth, None, grad.T @ both[:count], None, grad.sum(0)


@dataclass(frozen=True)
class Stack:
    """Layers, their differences, inputs, and the gradient of the last dy."""

    weights: list[Tensor]
    biases: list[Tensor]
    dweights: list[Tensor]
    dbiases: list[Tensor]
    x: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, rows: int, width: int, layers: int, dtype: torch.dtype, device: str) -> Stack:
        """Random ones."""
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

        return cls(
            [drawn(width, width, scale=width**-0.5) for _ in range(layers)],
            [drawn(width) for _ in range(layers)],
            [drawn(width, width, scale=0.1 * width**-0.5).requires_grad_() for _ in range(layers)],
            [drawn(width, scale=0.1).requires_grad_() for _ in range(layers)],
            drawn(rows, width),
            drawn(rows, width),
        )

    def _gradients(self, dy: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(dy, [*self.dweights, *self.dbiases], self.gradient))

    def jvp(self) -> list[Tensor]:
        """A step as LinearizedModel does it."""

        def outputs(weights: list[Tensor], biases: list[Tensor]) -> Tensor:
            y = self.x
            for weight, bias in zip(weights, biases, strict=True):
                y = linear(y, weight, bias)
            return y

        return self._gradients(jvp(outputs, (self.weights, self.biases), (self.dweights, self.dbiases))[1])

    def accumulated(self) -> list[Tensor]:
        """A step by :class:`Accumulated`."""
        y, dy = self.x, None
        for layer in zip(self.weights, self.dweights, self.biases, self.dbiases, strict=True):
            y, dy = Accumulated.apply(y, dy, *layer)
        assert dy is not None
        return self._gradients(dy)

    def stacked(self) -> list[Tensor]:
        """A step by :class:`Stacked`."""
        both = torch.cat([self.x, torch.zeros_like(self.x)])
        for layer in zip(self.weights, self.dweights, self.biases, self.dbiases, strict=True):
            both = Stacked.apply(both, *layer)
        return self._gradients(both[len(self.x) :])

    def ordinary(self) -> list[Tensor]:
        """A step of the ordinary layers."""
        leaves = [one.detach().requires_grad_() for one in (*self.weights, *self.biases)]
        y, layers = self.x, len(self.weights)
        for weight, bias in zip(leaves[:layers], leaves[layers:], strict=True):
            y = linear(y, weight, bias)
        return list(torch.autograd.grad(y, leaves, self.gradient))


def gate(stack: Stack, way: str, bound: float) -> None:
    """Raise unless a way's gradients are jvp's."""
    for got, expected in zip(getattr(stack, way)(), stack.jvp(), strict=True):
        error = float((got.double() - expected.double()).norm() / expected.double().norm())
        if not error <= bound:
            raise AssertionError(f"{way}: relative error {error:.1e} against jvp, expected at most {bound:.0e}")


def _seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - begin
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


def measure(stack: Stack, rounds: int, device: str) -> dict[str, Any]:
    """Seconds of a step each way, and jvp's over the others' round by round."""
    taken: dict[str, list[float]] = {way: [] for way in ("jvp", *WAYS, "ordinary")}
    for _ in range(rounds + 1):
        for way, times in taken.items():
            times.append(_seconds(getattr(stack, way), device))
    found: dict[str, Any] = {way: summary(times[1:]) for way, times in taken.items()}
    for way in (*WAYS, "ordinary"):
        found[f"jvp_over_{way}"] = summary([one / other for one, other in zip(taken["jvp"][1:], taken[way][1:], strict=True)])
    return found


def run(sizes: Sequence[tuple[int, int, int]], dtype: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """A row per size; no speed of a way that is wrong."""
    rows = []
    for count, width, layers in sizes:
        stack = Stack.of(count, width, layers, getattr(torch, dtype), device)
        for way in WAYS:
            gate(stack, way, BOUNDS[dtype])
        rows.append({"rows": count, "width": width, "layers": layers, "dtype": dtype, **measure(stack, rounds, device)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps of linear layers in the tangent space.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(BOUNDS), default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file to keep the figures in, under benchmarks/results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = run(SIZES if given.device == "cpu" else LARGE, given.dtype, given.device, given.rounds)
    shown = Table("rows x width, layers", "jvp, ms", *(f"jvp / {way}" for way in (*WAYS, "ordinary")))
    for row in rows:
        ratios = [spread(row[f"jvp_over_{way}"]) for way in (*WAYS, "ordinary")]
        shown.add_row(f"{row['rows']} x {row['width']}, {row['layers']}", f"{1e3 * row['jvp']['median']:.2f}", *ratios)
    Console(width=140).print(shown)
    if given.json:
        gpu = {"gpu": torch.cuda.get_device_name()} if given.device == "cuda" else {}
        facts = {"device": {**environment.device(), **gpu}, "versions": environment.versions(), "threads": 1, **environment.commit()}
        (Path(__file__).parent / "results" / given.json.name).write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
