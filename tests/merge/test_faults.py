"""Disks that are full, inputs that change or shrink under a running merge, two merges into one output."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from crash_points import content
from toy_checkpoints import recipe_of, save_model

_SHARDS = 6
_ENTRIES = 1 << 20


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe that makes several files of 2 MiB, and the expected output."""
    folder = tmp_path_factory.mktemp("faults")
    random = np.random.default_rng(0)
    folders = {}
    for name in ("base", "a", "b"):
        tensors = {f"layers.{layer}.w": random.normal(size=(1024, _ENTRIES // 1024)).astype(np.float16) for layer in range(_SHARDS)}
        folders[name] = save_model(folder / name, tensors, {})
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe_of(folders, "ties", parameters={"density": 0.5})))
    done = _command(folder, "expected")
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def _arguments(out: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "taskloom", "merge", "recipe.yml", out, "--shard-size", str(2 * _ENTRIES), "-j", "2", "-q", *options]


def _command(folder: Path, out: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_arguments(out, *options), cwd=folder, capture_output=True, text=True, timeout=120)


def _weights(folder: Path) -> dict[str, bytes | str]:
    return {name: value for name, value in content(folder).items() if name.endswith((".safetensors", ".index.json"))}


def _check_resumed(folder: Path, out: str, *options: str) -> None:
    done = _command(folder, out, "--resume", *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert _weights(folder / out) == _weights(folder / "expected")
    assert not list(folder.glob(f"{out}.*"))


# Calls ``fault(folder)`` in a merge's process once ``files`` files are finished, and merges on. {fault} is its body.
_FAULTY = """
import os, resource, shutil, sys
from pathlib import Path
from taskloom.cli.main import main
from taskloom.merge import execute, run

folder = Path.cwd()
execute_plan = execute.execute_plan

def fault():
    {fault}

def faulty(plan, where, *, on_finished, **options):
    count = 0
    def after(file):
        nonlocal count
        on_finished(file)
        count += 1
        if count == {files}:
            fault()
    return execute_plan(plan, where, on_finished=after, **options)

execute.execute_plan = faulty
sys.argv = ["taskloom", *sys.argv[1:]]
main()
"""


def _with_fault(folder: Path, out: str, fault: str, files: int = 2, *options: str) -> str:
    """Merge with a fault; returns the message, having checked that the merge stopped and left OUT alone."""
    before = content(folder / out) if (folder / out).exists() else None
    script = _FAULTY.format(fault=fault, files=files)
    command = [sys.executable, "-c", script, *_arguments(out, *options)[3:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert (content(folder / out) if (folder / out).exists() else None) == before
    assert done.stderr.startswith("Error: ")
    return done.stderr


def test_a_file_size_limit_in_the_middle(job: Path) -> None:
    # Room was reserved when the merge began, so this is what a quota does that sets in later.
    message = _with_fault(job, "limited", "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))")
    assert "cannot write" in message
    assert ".safetensors: File too large" in message
    assert f"of {_SHARDS} files are finished and kept in" in message
    _check_resumed(job, "limited")


def test_a_file_size_limit_from_the_start_leaves_nothing(job: Path) -> None:
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); from taskloom.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script, *_arguments("refused")[3:]], cwd=job, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "cannot set the size of" in done.stderr
    assert not list(job.glob("refused*"))


def _in_small_file_system(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs unshare and the right to use it")
    return subprocess.run(["unshare", "--mount", "bash", "-euc", script], cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_full_disk(job: Path) -> None:
    small = job / "small"
    small.mkdir()
    merge = " ".join(f"'{part}'" for part in _arguments("small/out"))
    script = f"""
        mount -t tmpfs -o size=8m tmpfs small
        mkdir small/out; echo precious > small/out/model.safetensors
        status=0; {merge} --overwrite || status=$?; echo status $status
        cat small/out/model.safetensors; ls small
        mount -o remount,size=64m small
        {merge} --overwrite --resume
        ls small; cat small/out/*.safetensors | xxhsum 2>/dev/null || cat small/out/*.safetensors | md5sum
        cat expected/*.safetensors | xxhsum 2>/dev/null || cat expected/*.safetensors | md5sum
    """
    done = _in_small_file_system(job, script)
    assert "No space left on device" in done.stderr
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == ["status 1", "precious", "out", "out"]
    assert lines[4] == lines[5]


def test_a_disk_that_fills_up_in_the_middle(job: Path) -> None:
    """Something else takes the room of the files that come beside the weights."""
    (job / "filling").mkdir()
    (job / "base" / "tokenizer.json").write_bytes(b" " * (3 << 20))
    merge = " ".join(f"'{part}'" for part in _arguments("filling/out"))
    script = f"""
        mount -t tmpfs -o size=14m tmpfs filling
        status=0; {merge} || status=$?; echo status $status
        ls filling
        mount -o remount,size=64m filling
        {merge} --resume
        ls filling; ls filling/out | wc -l
    """
    done = _in_small_file_system(job, script)
    (job / "base" / "tokenizer.json").unlink()
    assert done.returncode == 0, done.stderr
    assert "cannot be written: [Errno 28] No space left on device" in done.stderr
    assert f"{_SHARDS} of {_SHARDS} files are finished and kept in" in done.stderr
    assert done.stdout.split() == ["status", "1", "out.partial", "out.partial.journal", "out", str(_SHARDS + 6)]


def _with_input(job: Path, name: str, fault: str) -> str:
    """The message of a merge whose input ``b`` meets with a fault; the input is as before afterwards, also in its time."""
    path = job / "b" / "model.safetensors"
    status, before = path.stat(), path.read_bytes()
    try:
        return _with_fault(job, name, fault, 1)
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_input_that_is_cut_short(job: Path) -> None:
    message = _with_input(job, "cut", "os.truncate(folder / 'b' / 'model.safetensors', 4096)")
    assert "b/model.safetensors was cut short while it was read: 12583" in message or "changed while it was read: 12583" in message
    assert "4096 now" in message
    assert "finished and kept in" in message
    _check_resumed(job, "cut")


def test_an_input_that_is_written_to(job: Path) -> None:
    message = _with_input(
        job, "written", "with open(folder / 'b' / 'model.safetensors', 'r+b') as file: file.seek(-2, 2), file.write(b'xx')"
    )
    assert "b/model.safetensors: changed while it was read: it was written to" in message
    _check_resumed(job, "written")


def test_an_input_that_is_replaced(job: Path) -> None:
    (job / "spare").write_bytes((job / "a" / "model.safetensors").read_bytes())
    status = (job / "b" / "model.safetensors").stat()
    os.utime(job / "spare", ns=(status.st_atime_ns, status.st_mtime_ns))
    message = _with_input(job, "replaced", "os.replace(folder / 'spare', folder / 'b' / 'model.safetensors')")
    assert "b/model.safetensors: changed while it was read: another file has taken its place" in message
    _check_resumed(job, "replaced")


def test_an_input_that_is_removed(job: Path) -> None:
    message = _with_input(job, "removed", "os.unlink(folder / 'b' / 'model.safetensors')")
    assert "b/model.safetensors: cannot be read any more: No such file or directory" in message
    _check_resumed(job, "removed")


def test_two_merges_into_one_output(job: Path) -> None:
    run = f"subprocess.run({_arguments('both')!r}, capture_output=True, text=True)"
    fault = f"import subprocess; done = {run}; print(done.returncode, done.stderr)"
    script = _FAULTY.format(fault=fault, files=1)
    done = subprocess.run([sys.executable, "-c", script, *_arguments("both")[3:]], cwd=job, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 Error: output ")
    assert "both: another merge is writing it now (" in done.stdout
    assert _weights(job / "both") == _weights(job / "expected")
    assert not list(job.glob("both.*"))


# Cuts an input once it is mapped, so that every read beyond its end raises SIGBUS.
_CUT_WHEN_MAPPED = """
import json, os, signal, sys
from pathlib import Path
from taskloom.merge import MergeError
from taskloom.merge.execute import Executor
from taskloom.merge.run import prepare

_, planned = prepare(json.loads(sys.argv[1]))
plan, out = planned.plan, Path(sys.argv[3])
executor = Executor(plan, [str(path) for path in plan.inputs], [(str(out), plan.outputs[0].header, plan.outputs[0].size)],
                    threads=2, magnitude_histogram=False)
executor.reserve([0])
os.truncate(sys.argv[2], 1 << 20)
try:
    executor.run(0)
except MergeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.3}),
        ("ties", {"density": 0.3, "scope": "model"}),
        ("ties", {"density": 0.3, "zero_sign": "majority"}),
        ("breadcrumbs", {"density": 0.3, "scope": "row"}),
        ("dare_ties", {"density": 0.3}),
        ("slerp", {"t": 0.3}),
        ("linear", {"weight": 0.5}),
        ("passthrough", {}),
    ],
)
def test_every_pass_notices_an_input_that_is_cut_short(tmp_path: Path, method: str, parameters: dict[str, object]) -> None:
    tensors = {f"w.{layer}": np.full((1024, 1536), layer, np.float32) for layer in range(2)}
    folders = {name: save_model(tmp_path / name, tensors, {}) for name in ("base", "a", "b")}
    recipe = recipe_of(folders, method, None, parameters=parameters)
    if method in ("slerp", "passthrough"):
        recipe["models"] = recipe["models"][:1]
    if method == "passthrough":
        del recipe["base_model"]
    if "density" in parameters:
        recipe["parameters"]["weight"] = 0.5
    file = folders["a"] / "model.safetensors"
    command = [sys.executable, "-c", _CUT_WHEN_MAPPED, json.dumps(recipe), str(file), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    size = 2 * 1024 * 1536 * 4
    assert done.stdout.startswith(f"{file} was cut short while it was read: {size}"[:-4])
    assert done.stdout.endswith("1048576 now\n")


# A fault in a mapping of somebody else's, while an executor is there and after it.
_FOREIGN_FAULT = """
import mmap, os, signal, sys
from taskloom.merge.execute import Executor
from taskloom.merge.plan import MergePlan

kept = Executor(MergePlan((), (), (), ()), [sys.argv[1]], [], threads=1, magnitude_histogram=False)
if sys.argv[3] == "after":
    del kept
with open(sys.argv[2], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
    os.truncate(sys.argv[2], 0)
    print(mapped[0])
"""


@pytest.mark.parametrize("moment", ["during", "after"])
def test_faults_elsewhere_end_the_process_as_ever(tmp_path: Path, moment: str) -> None:
    model = save_model(tmp_path / "a") / "model.safetensors"
    (tmp_path / "other").write_bytes(bytes(8192))
    command = [sys.executable, "-c", _FOREIGN_FAULT, str(model), str(tmp_path / "other"), moment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGBUS
    (tmp_path / "other").write_bytes(bytes(8192))
    faulthandler = subprocess.run([command[0], "-X", "faulthandler", *command[1:]], capture_output=True, text=True, timeout=60)
    assert faulthandler.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in faulthandler.stderr
