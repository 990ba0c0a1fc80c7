"""Whole merges on a device, by the function and by the command: errors before work, interruption, resuming, what is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from crash_points import content
from device_runs import recipe_of, require_gpu, save_models, use_host_as_device

from taskloom.cli.main import taskloom
from taskloom.merge import MergeError, OutputError, merge_checkpoints
from taskloom.merge.device import choice
from taskloom.merge.run import prepare, run_plan
from taskloom.merge.verify.run import verify_merge
from taskloom.merge.working import WorkingFolder

SHARDS = 24
OWN = {"weight": 1.0, "density": 0.5}

# The command with the CPU in the place of a GPU, and {fault} before it.
_COMMAND = """
import os, resource, sys
from taskloom.cli.main import main
from taskloom.merge.device import choice
from taskloom.merge.device.accelerator import HostAccelerator

choice.open_device = lambda name: HostAccelerator()
{fault}
main()
"""
# A quota that sets in while the third file is written: room was reserved when the merge began.
_LIMITED = """
from taskloom.merge import execute
execute_plan = execute.execute_plan

def limited(plan, where, *, on_finished, **options):
    count = 0
    def after(file):
        nonlocal count
        on_finished(file)
        count += 1
        if count == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))
    return execute_plan(plan, where, on_finished=after, **options)

execute.execute_plan = limited
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of many output files, and its output from the compiled executor."""
    folder = tmp_path_factory.mktemp("device")
    paths = save_models(folder, (torch.float32,) * 3, {f"layers.{layer}.w": (40, 80) for layer in range(SHARDS)})
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe_of(paths, "della", OWN)))
    merge_checkpoints(folder / "recipe.yml", folder / "expected", shard_size="12900")
    return folder


def _start(folder: Path, out: str, *options: str, fault: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _COMMAND.format(fault=fault), "merge", "recipe.yml", out]
    command += ["--device", "cuda", "--shard-size", "12900", "-j", "2", "-q", *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _weights(folder: Path) -> dict[str, bytes | str]:
    return {name: value for name, value in content(folder).items() if name.endswith((".safetensors", ".index.json"))}


def _finished(journal: Path) -> int:
    return journal.read_bytes().count(b'"finished"') if journal.exists() else 0


def _check_resumed(folder: Path, out: str) -> None:
    """Resumed, on the CPU, what is left becomes the expected output."""
    merge_checkpoints(folder / "recipe.yml", folder / out, shard_size="12900", resume=True)
    assert _weights(folder / out) == _weights(folder / "expected")
    assert not list(folder.glob(f"{out}.*"))


def test_an_interrupted_merge_is_resumed(job: Path) -> None:
    process = _start(job, "stopped")
    journal = job / "stopped.partial.journal"
    deadline = time.monotonic() + 60
    while not _finished(journal) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("Error: stopped by SIGINT\n")
    assert f"of {SHARDS + 1} files are finished and kept in" in errors
    assert not (job / "stopped").exists()
    _check_resumed(job, "stopped")


@pytest.mark.slow
def test_a_killed_merge_is_resumed_on_the_device(job: Path) -> None:
    process = _start(job, "killed")
    while _finished(job / "killed.partial.journal") < 3 and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=60)
    again = _start(job, "killed", "--resume")
    assert again.communicate(timeout=60)[1] == ""
    assert _weights(job / "killed") == _weights(job / "expected")


@pytest.mark.slow
def test_a_disk_that_takes_no_more_leaves_out_alone(job: Path) -> None:
    (job / "limited").mkdir()
    (job / "limited" / "model.safetensors").write_bytes(b"what was there")
    process = _start(job, "limited", "--overwrite", fault=_LIMITED)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot write" in errors
    assert ".safetensors: File too large" in errors
    assert content(job / "limited") == {"model.safetensors": b"what was there"}


@pytest.mark.slow
def test_an_input_that_changes_while_it_is_read(tmp_path: Path) -> None:
    paths = save_models(tmp_path, (torch.float32,) * 3, {f"layers.{layer}.w": (40, 80) for layer in range(4)})
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe_of(paths, "ties", OWN)))
    fault = """
from taskloom.merge.device import executor
merge_tensors = executor.merge_tensors

def touching(*arguments, **options):
    os.utime("m1/model.safetensors")
    return merge_tensors(*arguments, **options)

executor.merge_tensors = touching
"""
    process = _start(tmp_path, "out", fault=fault)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "m1/model.safetensors: changed while it was read: it was written to" in errors
    assert not (tmp_path / "out").exists()


def test_finished_files_are_kept_and_progress_goes_on(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_host_as_device(monkeypatch)
    finish, count = WorkingFolder.finish, 0

    def finish_some(self: WorkingFolder, file: Any) -> None:
        nonlocal count
        count += 1
        if count > 5:
            raise OSError(5, "Input/output error")
        finish(self, file)

    recipe, planned = prepare(job / "recipe.yml", shard_size="12900")
    with monkeypatch.context() as patch:
        patch.setattr(WorkingFolder, "finish", finish_some)
        with pytest.raises(OutputError, match="cannot be finished: Input/output error"):
            run_plan(recipe, planned, tmp_path / "out", device="cuda")
    seen: list[int] = []
    kept = {path.name: path.stat().st_ino for path in sorted((tmp_path / "out.partial").glob("*.safetensors"))[:5]}
    report = run_plan(recipe, planned, tmp_path / "out", device="cuda", resume=True, progress=seen.append)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == kept
    assert _weights(tmp_path / "out") == _weights(job / "expected")
    assert seen == sorted(seen)
    assert seen[-1] == planned.progress_total == report.bytes_read + report.bytes_written
    assert run_plan(recipe, planned, tmp_path / "out", device="cuda", resume=True).files == report.files


def test_a_device_merge_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_host_as_device(monkeypatch)
    paths = save_models(tmp_path, (torch.bfloat16,) * 3)
    recipe = recipe_of(paths, "ties", OWN, parameters={"scope": "model"})
    merge_checkpoints(recipe, tmp_path / "out", device="cuda", report=True)
    assert (tmp_path / "out" / "merge_report.html").is_file()
    assert verify_merge(tmp_path / "out").ok


# What is refused before anything is read or written.


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(taskloom, [str(argument) for argument in arguments], prog_name="taskloom")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "gpu"), "device: expected cpu, cuda or cuda:N, got 'gpu'"),
        (("--device", "cuda:x"), "device: expected cpu, cuda or cuda:N, got 'cuda:x'"),
        (("--device", "cuda:01"), "device: expected cpu, cuda or cuda:N, got 'cuda:01'"),
        (("--max-vram", "1GB"), "max_vram: has no meaning without a device"),
        (("--device", "cpu", "--max-vram", "1GB"), "max_vram: has no meaning without a device"),
        (("--device", "cuda", "--max-ram", "1GB"), "max_ram: cannot be kept to on device cuda"),
        (("--device", "cuda", "--max-vram", "much"), "max_vram: expected"),
        (("--device", "cuda", "--max-vram", "1MB"), "max_vram: this merge needs at least"),
    ],
)
def test_options_that_make_no_sense(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    use_host_as_device(monkeypatch)
    shown = _run("merge", job / "recipe.yml", tmp_path / "out", *options)
    assert shown.exit_code == 1
    assert f"Error: {message}" in shown.output
    assert not list(tmp_path.iterdir())


def test_a_torch_without_cuda_is_named(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    shown = _run("merge", job / "recipe.yml", tmp_path / "out", "--device", "cuda")
    assert shown.exit_code == 1
    assert shown.output == f"Error: device cuda: torch {torch.__version__} is a CPU-only build\n"
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nMore of it.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    expected = f"torch {torch.__version__} (CUDA 13.0) sees no GPU: Found no NVIDIA driver on your system."
    assert choice.device_obstacle("cuda") == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for beyond in ("cuda:2", "cuda:256", "cuda:9999"):
        assert choice.device_obstacle(beyond) == "torch sees 2 GPUs, cuda:0 to cuda:1"
    with pytest.raises(MergeError, match=r"^device cuda:2: torch sees 2 GPUs, cuda:0 to cuda:1$"):
        choice.open_device("cuda:2")


def test_a_gpu_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import taskloom as package

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    found = choice.device_obstacle("cuda")
    assert found is not None
    assert found.startswith("there is no kernel of sparse_merge_statistics_out for it (native: ")
    assert "triton: Triton kernels need compute capability 8.0, this GPU has 7.5" in found
    with package.backend("reference"):
        assert choice.device_obstacle("cuda") is not None


def test_the_dry_run_shows_the_device_s_memory(job: Path, tmp_path: Path) -> None:
    shown = _run("merge", job / "recipe.yml", "--dry-run", "--device", "cuda:1")
    assert shown.exit_code == 0, shown.output
    assert "device   cuda:1: at most " in shown.output
    assert "--max-vram can be " in shown.output
    facts = json.loads(_run("merge", job / "recipe.yml", "--dry-run", "--device", "cuda", "--json").output)
    assert facts["device"] == "cuda"
    assert facts["largest_tensor"].startswith("layers.")
    assert 0 < facts["least_max_vram"] <= facts["device_memory"]
    limited = _run("merge", job / "recipe.yml", "--dry-run", "--device", "cuda", "--max-vram", str(facts["least_max_vram"]), "--json")
    assert json.loads(limited.output)["device_memory"] <= facts["least_max_vram"]
    without = json.loads(_run("merge", job / "recipe.yml", "--dry-run", "--json").output)
    assert (without["device"], without["device_memory"]) == (None, None)


@pytest.mark.gpu
def test_memory_on_a_gpu_stays_within_the_ceiling(tmp_path: Path) -> None:
    require_gpu()
    from taskloom.merge.device.account import device_budget

    paths = save_models(tmp_path, (torch.bfloat16,) * 4, {f"layers.{layer}.w": (4096, 1024) for layer in range(6)})
    for method in ("ties", "dare_ties", "della", "consensus_ties"):
        recipe = recipe_of(paths, method, OWN)
        least = device_budget(prepare(recipe)[1].plan).least
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_reserved()
        merge_checkpoints(recipe, tmp_path / method, device="cuda", max_vram=least)
        assert torch.cuda.max_memory_reserved() - held <= least
