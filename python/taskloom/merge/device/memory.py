"""Merges tensors that lie on a device already, where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from taskloom.merge.device.accelerator import Accelerator
from taskloom.merge.device.account import needs_device
from taskloom.merge.device.findings import Findings
from taskloom.merge.device.search import Look, find_facts
from taskloom.merge.device.tensors import merge_tensors
from taskloom.merge.errors import MergeError
from taskloom.merge.plan import MergePlan, TensorJob, TensorSource
from taskloom.merge.torch_dtypes import TORCH_DTYPES

_PIECE = 2**24


class DeviceTensors:
    """Contiguous tensors by their addresses, which are the offsets of a plan's sources."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Of tensors that begin at one address the largest stands for all.
        filled = sorted((tensor for tensor in tensors if tensor.numel() > 0), key=lambda tensor: tensor.nbytes)
        self._bytes = {tensor.data_ptr(): tensor.reshape(-1).view(torch.uint8) for tensor in filled}

    def at(self, source: TensorSource, shape: tuple[int, ...]) -> Tensor:
        """The tensor of a source."""
        dtype = TORCH_DTYPES[source.dtype]
        return self._bytes[source.offset][: prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def read(self, file: int, offset: int, buffer: Tensor, count: int) -> None:
        """Copy bytes from an address into the beginning of a buffer in host memory."""
        for begin, content in self._bytes.items():
            if begin <= offset and offset + count <= begin + content.numel():
                buffer[:count].copy_(content[offset - begin : offset - begin + count])
                return
        raise ValueError(f"address {offset}: no tensor holds {count} bytes there")


def merge_in_memory(plan: MergePlan, inputs: Sequence[Tensor], outputs: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """Carry a plan out into fresh tensors, by the names of its jobs, all on one device.

    Raises
    ------
    MergeError
        If values are not finite and the plan does not allow them, or memory runs out.
    """
    tensors = DeviceTensors(inputs)
    findings = Findings(plan, tensors, _PIECE)
    jobs = [job for job in plan.jobs if needs_device(job)]

    def visit(some: Sequence[TensorJob], look: Look) -> None:
        for job in some:
            base = None if job.base is None else tensors.at(job.base, job.shape)
            try:
                look(job, base, [tensors.at(source, job.shape) for source in job.tuned], outputs[job.name])
            except torch.OutOfMemoryError as error:
                raise MergeError(f"device {accelerator.device}: ran out of memory at tensor {job.name!r}") from error

    with torch.no_grad():
        facts = find_facts(plan, visit, accelerator.device)

        def merge(job: TensorJob, base: Tensor | None, tuned: Sequence[Tensor], out: Tensor) -> None:
            findings.take(job, merge_tensors(job, plan.seed, base, tuned, out, facts, magnitude_histogram=False), accelerator)

        visit(jobs, merge)
        for job in plan.jobs:
            if job.stages is None and job.base is not None and not needs_device(job) and prod(job.shape) > 0:
                outputs[job.name].copy_(tensors.at(job.base, job.shape))
        accelerator.synchronize()
        for job in jobs:
            findings.check(job)
