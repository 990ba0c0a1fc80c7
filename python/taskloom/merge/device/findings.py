"""What was counted on the device, once it has come to the host: the figures of the report, and values that are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from taskloom.merge.device.accelerator import Accelerator
from taskloom.merge.device.pipeline import Source
from taskloom.merge.device.tensors import Figures
from taskloom.merge.errors import MergeError
from taskloom.merge.execute import TensorStats
from taskloom.merge.header import BITS
from taskloom.merge.plan import MergePlan, TensorJob, TensorSource
from taskloom.merge.torch_dtypes import TORCH_DTYPES


class Findings:
    """The figures of jobs on their way, by name; the inputs are read again where a message must name an entry.

    Parameters
    ----------
    plan, source
        The plan and its inputs.
    piece
        Bytes that are read at a time.
    """

    def __init__(self, plan: MergePlan, source: Source, piece: int) -> None:
        self._plan = plan
        self._source = source
        self._piece = piece
        self._found: dict[str, Figures] = {}

    def take(self, job: TensorJob, figures: Figures, accelerator: Accelerator) -> None:
        """Start the figures' way to the host; they are there when a mark that is set afterwards is reached."""

        def host(values: Tensor | None) -> Tensor | None:
            return None if values is None else accelerator.to_host(values)

        overflow = accelerator.to_host(figures.overflow)
        self._found[job.name] = Figures(host(figures.counts), host(figures.dots), overflow, host(figures.histogram))

    def check(self, job: TensorJob) -> None:
        """Refuse values that are not finite, unless the plan allows them.

        Raises
        ------
        MergeError
            If an input holds NaN or infinity, a difference overflows, or a value does not fit the output's dtype.
        """
        found = self._found.get(job.name)
        if found is None or self._plan.allow_nonfinite:
            return
        if found.counts is not None and bool(found.counts[-2]):
            self._refuse_input(job)
        # What is not finite before a conversion stays what it is.
        if bool(found.overflow) and (job.stages is not None or self._overflows(job)):
            name = str(TORCH_DTYPES[job.target.dtype]).removeprefix("torch.")
            raise MergeError(
                f"tensor {job.name!r}: a value is too large for {name}; "
                "choose a wider out_dtype (bfloat16 has float32's range), or allow_nonfinite (--allow-nonfinite)"
            )

    def stats(self, job: TensorJob, seconds: float) -> TensorStats:
        """The figures of a merged tensor, which are forgotten here."""
        found = self._found.pop(job.name)
        if found.counts is None or found.dots is None:
            raise ValueError(f"tensor {job.name!r}: nothing was counted")
        *kept, conflicts, _, _ = found.counts.tolist()
        return TensorStats(
            name=job.name,
            numel=prod(job.shape),
            kept=kept,
            conflicts=conflicts,
            dots=found.dots.tolist(),
            seconds=seconds,
            magnitude_histogram=None if found.histogram is None else found.histogram.tolist(),
        )

    def forget(self, job: TensorJob) -> None:
        """Drop what is known of a copy."""
        self._found.pop(job.name, None)

    def _values(self, job: TensorJob, source: TensorSource) -> Iterator[tuple[int, Tensor]]:
        """The entries of an input, a piece at a time, with the index of the first."""
        size, numel = BITS[source.dtype] // 8, prod(job.shape)
        length = max(1, self._piece // size)
        buffer = torch.empty(min(length, numel) * size, dtype=torch.uint8)
        for begin in range(0, numel, length):
            count = min(length, numel - begin)
            self._source.read(source.file, source.offset + begin * size, buffer, count * size)
            yield begin, buffer[: count * size].view(TORCH_DTYPES[source.dtype])

    def _refuse_input(self, job: TensorJob) -> None:
        models = [(f"model {model!r}", source) for model, source in zip(self._plan.models, job.tuned, strict=True)]
        for owner, source in [*([("the base model", job.base)] if job.base is not None else []), *models]:
            for begin, values in self._values(job, source):
                odd = (~values.isfinite()).nonzero()
                if len(odd):
                    raise MergeError(
                        f"tensor {job.name!r} of {owner} holds NaN or infinity, first at element {begin + int(odd[0])}; "
                        "allow_nonfinite (--allow-nonfinite) merges it all the same"
                    )
        raise MergeError(f"tensor {job.name!r}: the difference of a model and the base overflows")

    def _overflows(self, job: TensorJob) -> bool:
        """Whether a finite entry of a tensor that is only converted becomes infinite."""
        if job.base is None:
            return False
        to = TORCH_DTYPES[job.target.dtype]
        return any(bool((values.isfinite() & ~values.to(to).isfinite()).any()) for _, values in self._values(job, job.base))
