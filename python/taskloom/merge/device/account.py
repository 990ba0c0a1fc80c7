"""How much device memory a planned merge takes, tensor by tensor, and what it is given. Needs no torch.

A merge holds one block of memory, in which each tensor has a region for its inputs and its output while it is in work, and beside it what
the ops take for the one tensor that is being merged: tables, partial sums, ranks. Both are known from the plan. What an op takes is
bounded from above by the buffers of its Triton launcher and of its CUDA kernels, whichever are larger; a tensor of torch's may take a
whole segment of its allocator, so it counts as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from taskloom.merge.ceiling import megabytes
from taskloom.merge.errors import MergeError
from taskloom.merge.header import tensor_bytes
from taskloom.merge.plan import MergePlan, Stages, TensorJob

# Regions begin at multiples of this, as torch's own tensors do: kernels load 16 bytes at a time.
ALIGNMENT = 512
# A share of what is free at the start: others may want some, and so does the context.
DEFAULT_SHARE = 0.8

# Segments of torch's allocator: of tensors up to 1 MiB (2 MiB), up to 10 MiB (20 MiB), and of larger ones (multiples of 2 MiB).
_MIB = 2**20
_SMALL, _MIDDLE = _MIB, 10 * _MIB
_SMALL_SEGMENT, _MIDDLE_SEGMENT = 2 * _MIB, 20 * _MIB
# Tables, scalars, thresholds and their histograms, all of them small, and the statistics of tensors on their way.
_SMALL_TENSORS = 32 * _MIB

# Entries of a program of the kernels that count, and of those that look for ties.
_BLOCK, _TIE_BLOCK = 1024, 2048
_DIGITS_BYTES = 8 * 2**16
# The same of the CUDA kernels (csrc/masked/magnitude_search_cuda.h): entries of a chunk and bytes that are kept of it for each rank, digits
# of a magnitude's bits, bytes of the histogram of one, and how much the searches of a round, or a range of rows, may take together. Blocks
# that a device runs at once, of 8 on each of its multiprocessors.
_CHUNK, _CHUNK_BYTES = 4096, 20
_DIGIT_PASSES, _DIGIT_COUNTS = 6, 8 * 2**11
_ROOM = 256 * _MIB
_RESIDENT_BLOCKS = 8 * 256
# A stable sort by rows with its keys, indices, and the copies and tables that it works with, per entry, in ten tensors; and how many
# entries are sorted at a time where rows are not longer.
_SORT_ENTRY, _SORT_TENSORS, _SORTED = 128, 10, 2**22
# Entries whose products slerp takes at a time, in float64: both ends and a product.
ARC_PIECE = 2**20

_PIECE = 16 * _MIB
_PIECES_IN, _PIECES_OUT = 8, 4
_PAGE = 4096


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _segments(count: int, tensors: int = 1) -> int:
    """What torch's allocator takes for ``count`` bytes in so many tensors of one size."""
    each = -(-count // tensors)
    if each <= _SMALL:
        return 0 if each * tensors <= _SMALL else tensors * _SMALL_SEGMENT
    if each <= _MIDDLE:
        return tensors * _MIDDLE_SEGMENT
    return tensors * -(-each // _SMALL_SEGMENT) * _SMALL_SEGMENT


def _block_segment(count: int) -> int:
    return _segments(count) or _SMALL_SEGMENT


def _largest_block(wished: int, room: int) -> int:
    """The largest block of at most ``wished`` bytes whose segment has so much room."""
    sizes = (wished, room // _SMALL_SEGMENT * _SMALL_SEGMENT, _MIDDLE, _SMALL)
    return max(size for size in sizes if size <= wished and _block_segment(size) <= room)


def needs_device(job: TensorJob) -> bool:
    """Whether a job is computed; plain copies of bytes, and tensors without entries, pass by the device."""
    return prod(job.shape) > 0 and (job.stages is not None or (job.base is not None and job.base.dtype != job.target.dtype))


def region_parts(job: TensorJob) -> list[int]:
    """Offsets in a job's region of its base (if any), its tuned tensors and its output, and the region's size."""
    sources = [source.dtype for source in (job.base, *job.tuned) if source is not None]
    offsets = [0]
    for dtype in (*sources, job.target.dtype):
        offsets.append(offsets[-1] + _aligned(tensor_bytes(dtype, job.shape)))
    return offsets


def _search_scratch(vectors: int, numel: int, wide: bool) -> int:
    """What the CUDA kernels take to find two ranks in each of so many vectors."""
    word, sample = (8, 2**14) if wide else (4, 2**15)
    # The bracket of a rank is at most 6 standard deviations of its place in the sample and 16 places wide on either side; there is room
    # for twice as many candidates as that makes likely.
    share = 4 * (6 * (sample / 4) ** 0.5 + 16) / sample
    one = word * (2 * min(numel, int(share * numel) + 1025) + sample) + 2 * _DIGIT_PASSES * _DIGIT_COUNTS
    chunks = vectors * -(-numel // _CHUNK)
    return _segments(max(one, min(vectors * one, _ROOM)), 3) + _segments(2 * chunks * _CHUNK_BYTES, 2)


def _native_selection_scratch(job: TensorJob, stages: Stages, numel: int) -> int:
    """What the CUDA kernels take to select in one tensor: ranks, or the bits of rows that are selected in ranges."""
    tasks = len(job.tuned)
    row = max(1, job.shape[-1] if job.shape else 1)
    wide = any(source.dtype == "F64" for source in (job.base, *job.tuned) if source is not None)
    if stages.select == "rank_dropout":
        # Keys, and two indices of the entries that are sorted; rows that share bytes of a mask stay together.
        sort = row * ((8 if wide else 4) + 8) + 16
        return _rows_scratch(row, 64 if wide else 32, tasks, numel) + _segments(max(sort, min(_ROOM, numel * tasks * 16)))
    if stages.select == "magnitude" and stages.scope == "row":
        ranges = _rows_scratch(row, 1 + 8 * 32 / row, tasks, numel)
        return ranges + _segments(32 * (numel // row) * tasks) + _search_scratch(tasks * (numel // row), row, wide)
    return _search_scratch(tasks, numel, wide) if stages.select == "magnitude" else 0


def _rows_scratch(row: int, bits: float, tasks: int, numel: int) -> int:
    """Selections of a range of rows, of so many bits an entry and task."""
    return _segments(int(max(8 * row * tasks * bits / 8, min(_ROOM, numel * tasks * bits / 8))) + 512 * tasks)


def _selection_scratch(job: TensorJob, stages: Stages, numel: int) -> int:
    tasks = len(job.tuned)
    row = job.shape[-1] if job.shape else 1
    if stages.select == "rank_dropout":
        return _segments(4 * numel * tasks) + _segments(_SORT_ENTRY * min(numel, max(_SORTED, row)), _SORT_TENSORS)
    if stages.select == "magnitude" and stages.scope == "row":
        cuts = 32 * (numel // row)
        return _segments(cuts * tasks, tasks) + _segments(cuts * tasks) + 3 * _segments(cuts)
    if stages.select == "magnitude":
        return 4 * _segments(2 * 8 * -(-numel // _TIE_BLOCK))
    return 0


def scratch(job: TensorJob, *, magnitude_histogram: bool = False) -> int:
    """Most bytes that the ops take beside a job's tensors while they work on it."""
    if job.stages is None or not needs_device(job):
        return 0
    numel, tasks = prod(job.shape), len(job.tuned)
    if job.stages.interpolation == "slerp":
        tasks += 1
    blocks = -(-numel // _BLOCK)
    counted = _segments(4 * blocks * (tasks + 2)) + _segments(8 * blocks * (tasks * (tasks + 1) // 2)) + _segments(8 * blocks)
    norms = _segments(16 * blocks * tasks)
    dtypes = {source.dtype for source in job.tuned}
    if job.stages.interpolation == "slerp" and job.base is not None:
        dtypes.add(job.base.dtype)
    of_one_dtype = _segments(tasks * numel * (8 if "F64" in dtypes else 4), tasks) if len(dtypes) > 1 else 0
    arc = _segments(3 * 8 * min(numel, ARC_PIECE), 3) if job.stages.interpolation == "slerp" else 0
    histograms = 2 * _segments(tasks * _DIGITS_BYTES, tasks) if magnitude_histogram else 0
    resident = _segments(16 * _RESIDENT_BLOCKS * tasks) + _segments(128 * (2 * _RESIDENT_BLOCKS + tasks**2))
    selection = max(_selection_scratch(job, job.stages, numel), _native_selection_scratch(job, job.stages, numel))
    return max(counted + norms, resident) + of_one_dtype + selection + arc + histograms


def _search_bytes(plan: MergePlan) -> int:
    """Histograms of the ranks that are looked for over the whole model: two of each task, and one that is added to them."""
    if not any(job.stages is not None and job.stages.scope == "model" for job in plan.jobs):
        return 0
    return _segments((2 * len(plan.models) + 1) * _DIGITS_BYTES, 2 * len(plan.models) + 1)


@dataclass(frozen=True)
class DeviceBudget:
    """Memory of a merge on a device, in bytes.

    Attributes
    ----------
    block
        Of the block that tensors are merged in.
    needed
        The most that torch takes of the device's memory with it; the context and the kernels, which CUDA loads, are not counted.
    least
        The lowest ceiling that would do.
    largest
        The tensor that ``least`` is for; None where nothing is merged.
    piece, pieces_in, pieces_out
        Size and number of the pinned buffers, in host memory, that tensors pass through.
    """

    block: int
    needed: int
    least: int
    largest: str | None
    piece: int
    pieces_in: int = _PIECES_IN
    pieces_out: int = _PIECES_OUT

    @property
    def pinned(self) -> int:
        """Bytes of pinned host memory."""
        return self.piece * (self.pieces_in + self.pieces_out)


def _largest_tensor(jobs: Iterable[TensorJob]) -> int:
    return max(
        (tensor_bytes(place.dtype, job.shape) for job in jobs for place in (job.base, *job.tuned, job.target) if place is not None),
        default=0,
    )


def device_budget(
    plan: MergePlan, max_vram: int | None = None, *, free: int | None = None, magnitude_histogram: bool = False
) -> DeviceBudget:
    """Choose the size of the block that a merge holds on the device.

    Parameters
    ----------
    plan
        The whole merge.
    max_vram
        Most bytes of device memory; None takes a share (0.8) of ``free``, or where that is unknown, the least that keeps copies and work
        overlapped.
    free
        Bytes that are free on the device now.
    magnitude_histogram
        Whether magnitudes are counted by exponent.

    Raises
    ------
    MergeError
        If the ceiling is too low, or more than is free; the message names the least that would do, and the tensor that needs it.
    """
    jobs: Sequence[TensorJob] = [job for job in plan.jobs if needs_device(job)]
    piece = min(_PIECE, max(_PAGE, -(-_largest_tensor(plan.jobs) // _PAGE) * _PAGE))
    if not jobs:
        return DeviceBudget(0, 0, 0, None, piece)
    regions = {job.name: region_parts(job)[-1] for job in jobs}
    beside = {job.name: scratch(job, magnitude_histogram=magnitude_histogram) for job in jobs}
    fixed = _SMALL_TENSORS + _search_bytes(plan) + max(beside.values())
    region = max(regions.values())
    largest = max(jobs, key=lambda job: regions[job.name] + beside[job.name]).name
    least = _block_segment(region) + fixed
    ceiling = max_vram if max_vram is not None else None if free is None else int(DEFAULT_SHARE * free)
    if ceiling is not None and ceiling < least:
        own = "max_vram" if max_vram is not None else f"{DEFAULT_SHARE:.0%} of the device's free memory"
        needs = f"this merge needs at least {megabytes(least)} of device memory for its largest tensor, {largest!r}"
        raise MergeError(f"{own}: {needs}, got {megabytes(ceiling)}")
    if free is not None and least > free:
        raise MergeError(f"max_vram: {megabytes(least)} are needed, and {megabytes(free)} of the device's memory are free")
    # Two of the largest tensors overlap in it; more would only wait there.
    wished = max(2 * region, min(sum(regions.values()), 2**30))
    limits = [limit for limit in (ceiling, free) if limit is not None]
    block = wished if not limits else _largest_block(wished, min(limits) - fixed)
    return DeviceBudget(block, _block_segment(block) + fixed, least, largest, piece)
