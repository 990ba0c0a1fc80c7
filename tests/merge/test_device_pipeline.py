"""The pipeline of a merge on a device: what overlaps, what memory it takes, and how it stops."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import Allocations, recipe_of, save_models, tensors_in, use_host_as_device
from torch import Tensor

from taskloom.merge import merge_checkpoints
from taskloom.merge.device import account
from taskloom.merge.device.accelerator import HostAccelerator
from taskloom.merge.device.account import DeviceBudget, device_budget, needs_device, region_parts, scratch
from taskloom.merge.device.executor import DeviceExecutor
from taskloom.merge.device.files import InputFiles
from taskloom.merge.device.gate import Gate, Stopped
from taskloom.merge.device.ring import Region, Ring
from taskloom.merge.errors import CheckpointError, MergeError
from taskloom.merge.plan import MergePlan, Stages, TensorJob, TensorSource, TensorTarget
from taskloom.merge.planner import PlannedMerge
from taskloom.merge.run import prepare

WAIT = 60
OPTIONS: dict[str, Any] = {"weight": 1.0, "density": 0.5}


def _planned(folder: Path, method: str = "ties", shapes: dict[str, tuple[int, ...]] | None = None, **changes: Any) -> PlannedMerge:
    paths = save_models(folder, (torch.float32,) * 3, shapes)
    return prepare(recipe_of(paths, method, OPTIONS, **changes))[1]


def _executor(planned: PlannedMerge, folder: Path, budget: DeviceBudget | None = None, **options: Any) -> DeviceExecutor:
    folder.mkdir(exist_ok=True)
    outputs = [(str(folder / output.name), output.header, output.size) for output in planned.plan.outputs]
    budget = budget or device_budget(planned.plan)
    return DeviceExecutor(planned.plan, outputs, accelerator=HostAccelerator(), budget=budget, **options)


class _Watched:
    """Inputs whose reads are told of before and after."""

    def __init__(self, plan: MergePlan, before: Callable[[str], None] = lambda name: None) -> None:
        self._files = InputFiles(plan.inputs)
        self._before = before
        self._names = {
            (source.file, source.offset): job.name for job in plan.jobs for source in (job.base, *job.tuned) if source is not None
        }

    def read(self, file: int, offset: int, buffer: Tensor, count: int) -> None:
        self._before(self._names.get((file, offset), ""))
        self._files.read(file, offset, buffer, count)


class _Held:
    """An output file whose writes are told of before they are done."""

    def __init__(self, file: Any, before: Callable[[int], None]) -> None:
        self._file = file
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, offset: int, address: int, count: int) -> None:
        self._before(offset)
        self._file.write(offset, address, count)


def test_a_tensor_is_read_while_the_one_before_it_is_merged_and_the_one_before_that_is_written(tmp_path: Path) -> None:
    shapes = {f"t{number}": (1000,) for number in range(4)}
    planned = _planned(tmp_path, shapes=shapes)
    jobs = [job for job in planned.plan.jobs if job.name != "ids"]
    read = {job.name: threading.Event() for job in jobs}
    written = {job.name: threading.Event() for job in jobs}
    targets = {job.target.offset: job.name for job in jobs}
    executor = _executor(planned, tmp_path / "out", source=_Watched(planned.plan, lambda name: read[name].set() if name in read else None))
    order = [job.name for job in jobs]
    overlapped: dict[str, bool] = {}

    def hold(offset: int) -> None:
        # The first tensor is written only after the third has begun to be read: one after the other would wait for ever.
        name = targets.get(offset, "ids")
        if name == order[0]:
            overlapped["read"] = read[order[2]].wait(WAIT)
            overlapped["not yet written"] = not written[order[1]].is_set()
        if name in written:
            written[name].set()

    executor._outputs[0] = _Held(executor._outputs[0], hold)
    executor.reserve([0])
    executor.run(0)
    executor.close()
    assert overlapped == {"read": True, "not yet written": True}


def test_without_room_for_two_tensors_they_pass_one_by_one(tmp_path: Path) -> None:
    planned = _planned(tmp_path, shapes={f"t{number}": (1000,) for number in range(4)})
    jobs = [job for job in planned.plan.jobs if needs_device(job)]
    room = max(region_parts(job)[-1] for job in jobs)
    events: list[str] = []
    executor = _executor(
        planned, tmp_path / "out", DeviceBudget(room, 0, 0, None, 4096, 2, 1), source=_Watched(planned.plan, events.append), readers=1
    )
    targets = {job.target.offset: job.name for job in jobs}
    executor._outputs[0] = _Held(executor._outputs[0], lambda offset: events.append(f"write {targets.get(offset, 'ids')}"))
    executor.reserve([0])
    executor.run(0)
    executor.close()
    _check_output(tmp_path)
    reads = [name for name in dict.fromkeys(events) if name in targets.values()]
    assert reads == [job.name for job in jobs]


def _check_output(folder: Path) -> None:
    """The output in ``folder/out`` is that of the compiled executor."""
    recipe = recipe_of([str(folder / f"m{number}") for number in range(3)], "ties", OPTIONS)
    merge_checkpoints(recipe, folder / "expected")
    theirs = tensors_in(folder / "expected")
    assert all(value.equal(theirs[name]) for name, value in tensors_in(folder / "out").items())


@pytest.mark.parametrize("room", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 4])
def test_results_do_not_depend_on_room_and_threads(tmp_path: Path, room: int, readers: int) -> None:
    planned = _planned(tmp_path, shapes={f"t{number}": (97 * number + 5, 3) for number in range(12)})
    largest = max(region_parts(job)[-1] for job in planned.plan.jobs if needs_device(job))
    executor = _executor(planned, tmp_path / "out", DeviceBudget(room * largest, 0, 0, None, 4096, 3, 2), readers=readers)
    executor.reserve([0])
    done: list[int] = []
    executor.run(0, done.append)
    executor.close()
    _check_output(tmp_path)
    assert done[-1] == planned.progress_total
    assert done == sorted(done)


class _Fault:
    """Raises at the n-th call."""

    def __init__(self, error: BaseException, after: int) -> None:
        self.error = error
        self.left = after

    def __call__(self, *arguments: object, **named: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


def _alive() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("taskloom device")}


@pytest.mark.parametrize("after", [0, 5, 12])
@pytest.mark.parametrize("where", ["read", "write", "tick"])
def test_a_failure_anywhere_stops_every_thread(tmp_path: Path, where: str, after: int) -> None:
    planned = _planned(tmp_path, shapes={f"t{number}": (1000,) for number in range(12)})
    error: BaseException = KeyboardInterrupt() if where == "tick" else OSError(28, "No space left on device")
    fault = _Fault(error, after if where != "tick" else 0)
    source = _Watched(planned.plan, fault if where == "read" else lambda name: None)
    executor = _executor(planned, tmp_path / "out", DeviceBudget(32768, 0, 0, None, 4096, 2, 2), source=source)
    if where == "write":
        executor._outputs[0] = _Held(executor._outputs[0], fault)
    executor.reserve([0])
    with pytest.raises(type(error)) as caught:
        executor.run(0, fault if where == "tick" else None)
    assert caught.value is error
    for thread in _alive():
        thread.join(WAIT)
    assert not _alive()
    executor.close()
    with pytest.raises(ValueError, match="the executor is closed"):
        executor.run(0)


def test_an_input_that_is_cut_short_is_named(tmp_path: Path) -> None:
    planned = _planned(tmp_path)
    path = tmp_path / "m1" / "model.safetensors"
    size = path.stat().st_size
    executor = _executor(planned, tmp_path / "out")
    with open(path, "r+b") as file:
        file.truncate(size - 5000)
    executor.reserve([0])
    with pytest.raises(CheckpointError, match=f"model.safetensors was cut short while it was read: {size} bytes before, {size - 5000} now"):
        executor.run(0)
    executor.close()
    other = _executor(planned, tmp_path / "other")
    other.reserve([0])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is shorter than its header says: it changed after it was read"):
        other.run(0)


def test_a_disk_error_and_a_missing_input_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = _planned(tmp_path)
    files = InputFiles(planned.plan.inputs)
    monkeypatch.setattr("os.preadv", _Fault(OSError(5, "Input/output error"), 0))
    with pytest.raises(CheckpointError, match=r"could not be read: the disk or network under it reported an error: Input/output error"):
        files.read(0, 0, torch.empty(8, dtype=torch.uint8), 8)
    files.close()
    (tmp_path / "m2" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"m2/model\.safetensors: cannot be read: No such file"):
        _executor(planned, tmp_path / "out")


def test_memory_that_runs_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_host_as_device(monkeypatch)
    from taskloom.merge.device import executor

    paths = save_models(tmp_path, (torch.float32,) * 3)
    monkeypatch.setattr(executor, "merge_tensors", _Fault(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 0))
    with pytest.raises(MergeError, match=r"^device cpu: ran out of memory at tensor 'head': CUDA out of memory\. Tried$"):
        merge_checkpoints(recipe_of(paths, "ties", OPTIONS), tmp_path / "out", device="cuda")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("reason", ["CUDA error: an illegal memory access was encountered", "Triton Error [CUDA]: out of memory"])
def test_a_device_that_fails_is_named_and_its_second_failure_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    use_host_as_device(monkeypatch)
    from taskloom.merge.device import executor
    from taskloom.merge.device.accelerator import HostAccelerator

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: it is still broken")

    paths = save_models(tmp_path, (torch.float32,) * 3)
    monkeypatch.setattr(executor, "merge_tensors", _Fault(RuntimeError(f"{reason}\nmore"), 0))
    monkeypatch.setattr(HostAccelerator, "synchronize", fail)
    message = rf"^device cpu: failed at tensor 'head' or shortly before: {re.escape(reason)}$"
    with pytest.raises(MergeError, match=message):
        merge_checkpoints(recipe_of(paths, "ties", OPTIONS), tmp_path / "out", device="cuda")
    assert not list(tmp_path.glob("out*"))


def test_a_defect_of_ours_is_no_failure_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_host_as_device(monkeypatch)
    from taskloom.merge.device import executor

    paths = save_models(tmp_path, (torch.float32,) * 3)
    monkeypatch.setattr(executor, "merge_tensors", _Fault(RuntimeError("a shape does not fit"), 0))
    with pytest.raises(RuntimeError, match=r"^a shape does not fit$"):
        merge_checkpoints(recipe_of(paths, "ties", OPTIONS), tmp_path / "out", device="cuda")
    assert not list(tmp_path.glob("out*"))


# Memory.


def _job(shape: tuple[int, ...], dtypes: tuple[str, ...], stages: Stages, target: str = "BF16", name: str = "w") -> TensorJob:
    base, *tuned = (TensorSource(0, 0, dtype) for dtype in dtypes)
    return TensorJob(name, shape, TensorTarget(0, 0, target), base, tuple(tuned), stages)


def _plan(*jobs: TensorJob) -> MergePlan:
    return MergePlan((), (), jobs, ("a", "b"))


TIES = Stages(weight=(1.0, 1.0), select="magnitude", rank_begin=(0, 0), rank_end=(9, 9), elect="sign_sum")
DELLA = Stages(weight=(1.0, 1.0), select="rank_dropout", density=(0.5, 0.5), epsilon=(0.1, 0.1))
LARGE = (4096, 4096)


def test_regions_hold_every_tensor_at_aligned_offsets() -> None:
    job = _job((3, 5, 67), ("BF16", "F32", "F16"), TIES, "F64")
    offsets = region_parts(job)
    assert all(offset % account.ALIGNMENT == 0 for offset in offsets)
    sizes = [end - begin for begin, end in itertools.pairwise(offsets)]
    assert all(size >= 3 * 5 * 67 * width for size, width in zip(sizes, (2, 4, 2, 8), strict=True))


def test_scratch_grows_with_what_the_ops_take() -> None:
    plain = scratch(_job(LARGE, ("BF16",) * 3, Stages(weight=(1.0, 1.0))))
    numel = LARGE[0] * LARGE[1]
    assert 0 <= plain < 2 * numel // 4
    assert scratch(_job((2, numel), ("BF16",) * 3, DELLA)) > 128 * numel
    assert 128 * 2**22 < scratch(_job(LARGE, ("BF16",) * 3, DELLA)) - 4 * 2 * numel < 150 * 2**22
    mixed = scratch(_job(LARGE, ("BF16", "BF16", "F32"), TIES))
    assert mixed >= scratch(_job(LARGE, ("BF16",) * 3, TIES)) + 2 * 4 * numel
    assert scratch(TensorJob("w", LARGE, TensorTarget(0, 0, "BF16"), TensorSource(0, 0, "F32"))) == 0


def test_the_budget_names_what_is_least_and_why() -> None:
    plan = _plan(_job(LARGE, ("BF16",) * 3, TIES), _job((17,), ("BF16",) * 3, TIES, name="b"))
    budget = device_budget(plan)
    region = region_parts(plan.jobs[0])[-1]
    assert budget.block == 2 * region
    assert budget.least < budget.needed
    assert budget.largest == "w"
    tight = device_budget(plan, budget.least)
    assert region <= tight.block < 2 * region
    assert tight.needed <= budget.least
    with pytest.raises(
        MergeError, match=r"^max_vram: this merge needs at least \d+MB of device memory for its largest tensor, 'w', got 9MB$"
    ):
        device_budget(plan, 9 * 10**6)
    with pytest.raises(MergeError, match=r"^80% of the device's free memory: this merge needs at least \d+MB"):
        device_budget(plan, free=budget.least)
    with pytest.raises(MergeError, match=r"^max_vram: \d+MB are needed, and 100MB of the device's memory are free$"):
        device_budget(plan, 2 * budget.least, free=10**8)


@pytest.mark.parametrize("shape", [(3,), (700, 300), (1500, 1100), (2000, 2000), LARGE])
@pytest.mark.parametrize("share", [1.0, 1.3, 2.0, 10.0])
def test_what_is_needed_stays_within_the_ceiling(shape: tuple[int, ...], share: float) -> None:
    for stages in (TIES, DELLA, Stages(weight=(1.0, 1.0), rescale="l1", select="dropout", density=(0.5, 0.5))):
        plan = _plan(_job(shape, ("BF16",) * 3, stages), _job((10, 7), ("F32", "BF16", "F16"), stages, name="b"))
        ceiling = int(share * device_budget(plan).least)
        budget = device_budget(plan, ceiling)
        assert budget.needed <= ceiling
        assert budget.block >= max(region_parts(job)[-1] for job in plan.jobs)
        assert device_budget(plan, free=2 * ceiling).needed <= 2 * ceiling


def test_a_merge_that_computes_nothing_takes_no_device_memory() -> None:
    copy = TensorJob("ids", (10,), TensorTarget(0, 0, "I64"), TensorSource(0, 0, "I64"))
    budget = device_budget(_plan(copy), 1)
    assert (budget.block, budget.needed, budget.largest) == (0, 0, None)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "della", "slerp", "consensus_ties"])
def test_the_tensors_of_a_merge_stay_within_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(account, "_SMALL_TENSORS", 2**20)
    shapes = {"a": (700, 900), "b": (700, 900), "c": (700, 900)}
    paths = save_models(tmp_path, (torch.float32,) * 3, shapes)
    own = {} if method == "slerp" else {"weight": 1.0, "density": 0.5}
    own = {name: value for name, value in own.items() if method != "task_arithmetic" or name == "weight"}
    shared = {"t": 0.5} if method == "slerp" else {}
    planned = prepare(recipe_of(paths, method, own, parameters=shared))[1]
    budget = device_budget(planned.plan, device_budget(planned.plan).least)
    with Allocations() as seen:
        executor = _executor(planned, tmp_path / "out", budget)
        executor.reserve([0])
        executor.run(0)
        pinned = budget.pinned
        executor.close()
    assert budget.block + pinned <= seen.peak <= budget.needed + pinned


# The ring and the gate.


def _release(region: Region) -> None:
    region.released = True


def _begin(ring: Ring, count: int, taken: list[Region]) -> int | None:
    """Where a region begins that is taken, and noted; None where there is no room."""
    found = ring.take(count)
    if found is None:
        return None
    taken.append(found[0])
    return found[0].begin


def test_regions_go_round_the_block() -> None:
    ring, taken = Ring(100), []
    assert [_begin(ring, 40, taken) for _ in range(3)] == [0, 40, None]
    _release(taken[1])
    assert _begin(ring, 40, taken) is None, "regions are given back in order"
    _release(taken[0])
    assert _begin(ring, 90, taken) == 0
    assert _begin(ring, 10, taken) == 90
    _release(taken[2])
    assert _begin(ring, 50, taken) == 0
    assert _begin(ring, 50, taken) is None
    assert _begin(ring, 40, taken) == 50
    assert _begin(ring, 1, taken) is None
    for count in (0, 101):
        with pytest.raises(ValueError, match="count: expected 1 to 100 bytes"):
            ring.take(count)


def test_marks_of_released_regions_go_to_who_takes_next() -> None:
    class Mark:
        def wait(self) -> None:
            return None

    ring, mark = Ring(10), Mark()
    region, before = ring.take(10) or (Region(0, 0), [mark])
    assert before == []
    region.mark = mark
    _release(region)
    assert [(ring.take(5) or (None, None))[1] for _ in range(2)] == [[mark], []]


def test_regions_never_overlap() -> None:
    random = torch.Generator().manual_seed(3)
    ring, taken = Ring(1000), []
    for _ in range(3000):
        count = int(torch.randint(1, 400, (), generator=random))
        found = ring.take(count)
        if found is None:
            _release(taken.pop(0))
            continue
        region = found[0]
        assert 0 <= region.begin < region.end <= 1000
        assert all(region.end <= other.begin or other.end <= region.begin for other in taken)
        taken.append(region)


def test_a_gate_tells_the_others_of_a_failure() -> None:
    gate = Gate(1)
    gate.start(_Fault(OSError("broken"), 0))
    with pytest.raises(Stopped):
        gate.wait(lambda: False)
    gate.join()
    assert str(gate.error) == "broken"


def test_a_gate_looks_up_while_it_waits() -> None:
    ticks: Iterator[int] = iter(range(3))
    left = [3]

    def tick() -> None:
        next(ticks)
        left[0] -= 1

    Gate(1, tick).wait(lambda: left[0] == 0)
    assert left == [0]
