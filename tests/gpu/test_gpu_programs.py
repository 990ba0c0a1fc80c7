"""How ops behave in programs on a GPU: streams, graphs that are captured, compiled functions, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import assert_same_bits
from on_gpu import require, tensors_of
from samples import checkpoints, random_packed, weights
from torch import Tensor

import taskloom
from taskloom.optim import MaskedAdamW, MaskedSGD

pytestmark = pytest.mark.gpu

NUMEL = (1 << 16) + 31

# Ops whose results have a size that does not depend on data, with two tensors to work on.
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "pack_mask": lambda a, b, packed: taskloom.pack_mask(a > b),
    "unpack_mask": lambda a, b, packed: taskloom.unpack_mask(packed, a.shape),
    "masked_update": lambda a, b, packed: taskloom.masked_update(a, packed, b, 0.5),
    "masked_update_": lambda a, b, packed: taskloom.masked_update_(a.clone(), packed, b, 0.5),
    "masked_switch_": lambda a, b, packed: taskloom.masked_switch_(a.clone(), a, b, packed, ~packed),
    "task_mask": lambda a, b, packed: taskloom.task_mask(a, b, a + b),
    "mask_count": lambda a, b, packed: taskloom.mask_count([packed, ~packed], a.numel(), 1),
    "multi_task_vector": lambda a, b, packed: taskloom.multi_task_vector(a, [b, a * 2], [0.3, 0.7]),
    "magnitude_threshold": lambda a, b, packed: taskloom.magnitude_threshold(a, b, rank=77),
    "magnitude_mask": lambda a, b, packed: taskloom.magnitude_mask(a, b, rank=77),
    "magnitude_histogram": lambda a, b, packed: taskloom.magnitude_histogram(a, b, shift=16),
    "sparse_merge": lambda a, b, packed: taskloom.sparse_merge(a, [b, a * 2], 0.5, select="dropout", density=0.5, seed=3),
    "block_scale_merge": lambda a, b, packed: taskloom.block_scale_merge(a, [b, b], torch.ones(2, device=a.device)),
}
# Triton's launchers of these send a table of addresses to the device.
TABLES = {"mask_count", "multi_task_vector", "magnitude_threshold", "sparse_merge", "block_scale_merge"}
calls = pytest.mark.parametrize("name", CALLS)


def _inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    a, b = (weights(NUMEL, seed=seed + place).cuda() for place in range(2))
    return a, b, random_packed(NUMEL, seed=seed).cuda()


@calls
def test_an_op_waits_for_its_own_stream_alone(name: str, gpu_backend: str) -> None:
    require(name, gpu_backend)
    a, b, packed = _inputs()
    expected = tensors_of(CALLS[name](a, b, packed))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.full_like(a, torch.nan)
        torch.cuda._sleep(200_000_000)
        late.copy_(a)
        got = tensors_of(CALLS[name](late, b, packed))
    stream.synchronize()
    for ours, theirs in zip(got, expected, strict=True):
        assert_same_bits(ours.cpu(), theirs.cpu())


@calls
def test_a_captured_graph_follows_its_inputs(name: str, gpu_backend: str) -> None:
    require(name, gpu_backend)
    if gpu_backend == "triton" and name in TABLES:
        pytest.skip("it sends a table to the device at every call, which a graph would not follow (docs/masked.md)")
    a, b, packed = _inputs()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        CALLS[name](a, b, packed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = tensors_of(CALLS[name](a, b, packed))
    for target, source in zip((a, b, packed), _inputs(seed=50), strict=True):
        target.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [one.clone() for one in got]
    for ours, theirs in zip(replayed, tensors_of(CALLS[name](a, b, packed)), strict=True):
        assert_same_bits(ours.cpu(), theirs.cpu())


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_function_gives_the_same(gpu_backend: str, dynamic: bool) -> None:
    require("masked_update", gpu_backend)
    torch.compiler.reset()
    a, b, packed = _inputs()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return taskloom.masked_update(a * 2, packed, b.sin(), 0.5).square().sum()

    leaves = [a.requires_grad_(), b.requires_grad_()]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, dynamic=dynamic)(*leaves), leaves)
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_merge_is_compiled_without_a_break(gpu_backend: str) -> None:
    require("sparse_merge", gpu_backend)
    torch.compiler.reset()
    base, tuned = (checkpoint for checkpoint in checkpoints(301, dtype=torch.bfloat16))
    base, tuned = base.cuda(), [one.cuda() for one in tuned]

    def merge(base: Tensor, *tuned: Tensor) -> Tensor:
        return taskloom.sparse_merge(base, list(tuned), 0.5, elect="sign_sum", combine="disjoint_mean")

    assert_same_bits(torch.compile(merge, fullgraph=True)(base, *tuned).cpu(), merge(base, *tuned).cpu())


@pytest.mark.parametrize("kind", [MaskedAdamW, MaskedSGD])
def test_an_optimiser_steps_as_on_the_cpu(kind: Any) -> None:
    results = []
    for device in ("cpu", "cuda"):
        params = [torch.nn.Parameter(weights(13, 79, seed=place).to(device)) for place in range(3)]
        optimizer = kind(params, 0.3, lr=0.01, **({"momentum": 0.9} if kind is MaskedSGD else {}))
        for step in range(3):
            for place, param in enumerate(params):
                param.grad = weights(13, 79, seed=10 * step + place).to(device)
            optimizer.step()
        results.append([param.detach().cpu() for param in params])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_another_device_than_the_current_one(gpu_backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    require("masked_update", gpu_backend)
    a, b, packed = (one.to("cuda:1") for one in _inputs())
    assert taskloom.masked_update(a, packed, b).device == a.device
