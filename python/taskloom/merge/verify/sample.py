"""Chooses the tensors that a verification computes again."""

from __future__ import annotations

import random
from collections.abc import Sequence

from taskloom.merge.header import tensor_bytes
from taskloom.merge.plan import TensorJob

_AT_LEAST = 4


def output_bytes(job: TensorJob) -> int:
    """Bytes of a job's tensor in the output."""
    return tensor_bytes(job.target.dtype, job.shape)


def choose(jobs: Sequence[TensorJob], share: float, seed: int) -> list[TensorJob]:
    """Jobs drawn at random until their tensors have ``share`` of all bytes; at least four, of merged and copied ones where there are both.

    Every tensor is as likely to be first as any other, so that a large one is drawn as often as a small one.
    """
    generator = random.Random(seed)
    shuffled = generator.sample(list(jobs), len(jobs))
    kinds = {job.stages is None: job for job in reversed(shuffled)}
    order = [*kinds.values(), *(job for job in shuffled if job not in kinds.values())]
    wanted = share * sum(map(output_bytes, jobs))
    chosen: set[str] = set()
    done = 0
    for job in order:
        if done >= wanted and len(chosen) >= _AT_LEAST:
            break
        chosen.add(job.name)
        done += output_bytes(job)
    return [job for job in jobs if job.name in chosen]
