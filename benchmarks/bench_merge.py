"""Measures ``taskloom merge`` as a whole process, beside mergekit and beside the bytes that a merge has to move.

docs/benchmarks.md says how the comparison is made and what every column means.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

import environment
import merge_reference
import process
from checkpoints import LlamaSize, from_bf16, llama_of, llama_shapes, read_tensors, to_bf16, write_checkpoints
from merge_reference import Setting
from spread import spread, summary
from taskloom.merge.device.choice import device_obstacle
from taskloom.merge.shards import parse_size

METHODS = ("ties", "dare_ties", "breadcrumbs", "task_arithmetic")
_GATE_SIZE = LlamaSize(hidden=64, intermediate=176, layers=2, vocabulary=1000)
_PARAMETERS = {
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "breadcrumbs": ("weight", "density", "gamma"),
    "task_arithmetic": ("weight",),
}
_STREAM_SHARDS = 8
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

console = Console(width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Job:
    """One recipe with the programs that it is given to; ``peer`` is the peer's virtual environment, ``device`` where both merge."""

    recipe: Path
    workdir: Path
    seed: int
    peer: Path | None
    device: str = "cpu"

    @property
    def out(self) -> Path:
        return self.workdir / "out"

    def ours(self) -> list[str | Path]:
        program = Path(sys.executable).with_name("taskloom")
        return [program, "merge", self.recipe, self.out, "--quiet", "--seed", str(self.seed), "--device", self.device]

    def theirs(self) -> list[str | Path]:
        assert self.peer is not None
        options = ["--quiet", "--no-copy-tokenizer", "--random-seed", str(self.seed)]
        if self.device != "cpu":
            options += ["--cuda", "--read-to-gpu"]
        return [self.peer / "bin" / "mergekit-yaml", self.recipe, self.out, *options]


def gpu_name(device: str) -> str:
    """The GPU that both programs merge on."""
    import torch

    return torch.cuda.get_device_name(device)


def write_recipe(path: Path, method: str, models: Sequence[Path], setting: Setting, dtype: str) -> None:
    """One recipe for both programs; ``dtype`` is mergekit's dtype of arithmetic, and of the output on both sides."""
    base, *tuned = models
    own = {name: getattr(setting, name) for name in _PARAMETERS[method]}
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(model), "parameters": own} for model in tuned],
        "dtype": dtype,
    }
    if dtype != "bfloat16":
        recipe["out_dtype"] = "bfloat16"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))


def _off_by_more_than_a_rounding(got: np.ndarray, expected: np.ndarray) -> int:
    stored = from_bf16(to_bf16(expected))
    return int(np.count_nonzero(np.abs(got - stored) > np.maximum(np.abs(stored) * np.float32(2**-7), np.float32(1e-6))))


def wrong_entries(method: str, setting: Setting, workdir: Path, device: str) -> tuple[int, int]:
    """Merge a small checkpoint; the entries that differ from the reference by more than one bfloat16 rounding, and all entries."""
    models = write_checkpoints(workdir / "models", _GATE_SIZE, seed=setting.seed)
    job = Job(workdir / "recipe.yml", workdir, setting.seed, None, device)
    write_recipe(job.recipe, method, models, setting, "bfloat16")
    process.measure(job.ours(), workdir / "log")
    got, base, *tuned = (read_tensors(folder) for folder in (job.out, *models))
    wrong = sum(
        _off_by_more_than_a_rounding(
            got[name], merge_reference.merge_tensor(method, name, values, [model[name] for model in tuned], setting)
        )
        for name, values in base.items()
    )
    return wrong, sum(values.size for values in base.values())


def measure_ours(job: Job) -> dict[str, Any]:
    """One run of ``taskloom merge``."""
    usage = process.measure(job.ours(), job.workdir / "ours.log")
    report = json.loads((job.out / "merge_report.json").read_text())
    shutil.rmtree(job.out)
    return {**asdict(usage), "executor_seconds": report["seconds"]}


def measure_peer(job: Job) -> dict[str, Any]:
    """One run of mergekit's command."""
    usage = process.measure(job.theirs(), job.workdir / "peer.log", _OFFLINE)
    shutil.rmtree(job.out)
    return asdict(usage)


def measure_floor(files: Sequence[Path], out_bytes: int, workdir: Path, threads: int) -> dict[str, float]:
    """Seconds to read every input once and to write one output."""
    read = process.seconds_to_read(files, threads)
    return {"read_seconds": read, "write_seconds": process.seconds_to_write(workdir / "floor", out_bytes, threads)}


def summarize(ours: list[dict[str, Any]], peer: list[dict[str, Any]], floor: list[dict[str, float]]) -> dict[str, Any]:
    """Medians and spreads; ratios are taken run by run, of what was measured next to each other."""
    floors = [sample["read_seconds"] + sample["write_seconds"] for sample in floor]
    found = {
        "ours": {key: summary([sample[key] for sample in ours]) for key in ours[0]},
        "floor_seconds": summary(floors),
        "executor_over_floor": summary([sample["executor_seconds"] / least for sample, least in zip(ours, floors, strict=True)]),
    }
    if peer:
        found["peer"] = {key: summary([sample[key] for sample in peer]) for key in peer[0]}
        for key in ("wall_seconds", "peak_anonymous"):
            found[f"peer_over_ours_{key}"] = summary([theirs[key] / own[key] for theirs, own in zip(peer, ours, strict=True)])
    return found


def _progress(run: int, runs: int, method: str, who: str, seconds: float) -> None:
    console.print(f"run {run + 1}/{runs}  {method:<16} {who:<8} {seconds:8.2f} s", highlight=False)


def measure_methods(
    methods: Sequence[str], models: Sequence[Path], setting: Setting, options: argparse.Namespace, peer: Path | None, workdir: Path
) -> dict[str, Any]:
    """Every method in turn, ours and the peer's next to each other, which of them goes first alternating from run to run."""
    files = [model / "model.safetensors" for model in models]
    threads = environment.device()["cores"]
    samples: dict[str, dict[str, list[Any]]] = {method: {"ours": [], "peer": [], "floor": []} for method in methods}
    # The models were just written: neither their way to the disk nor a cold read belongs into a run.
    os.sync()
    process.seconds_to_read(files, threads)
    for run in range(options.runs):
        for method in methods:
            job = Job(workdir / f"{method}.yml", workdir, setting.seed, peer, options.device)
            write_recipe(job.recipe, method, models, setting, options.dtype)
            pair = [("ours", measure_ours), ("peer", measure_peer)][: 2 if peer else 1]
            for who, measure in pair if run % 2 == 0 else reversed(pair):
                found = measure(job)
                samples[method][who].append(found)
                _progress(run, options.runs, method, who, found["wall_seconds"])
            samples[method]["floor"].append(measure_floor(files, files[0].stat().st_size, workdir, threads))
    return {
        method: {"samples": taken, "summary": summarize(taken["ours"], taken["peer"], taken["floor"])} for method, taken in samples.items()
    }


def _megabytes(figures: dict[str, float]) -> str:
    return f"{figures['median'] / 1e6:.0f}"


def _cpu(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    return summary([sample["user_seconds"] + sample["system_seconds"] for sample in samples])


def _column(result: dict[str, Any]) -> dict[str, str]:
    """One method's figures by their names in the table."""
    found, samples = result["summary"], result["samples"]
    ours, peer = found["ours"], found.get("peer")
    figures = {"ours, s": spread(ours["wall_seconds"])}
    if peer:
        figures["peer, s"] = spread(peer["wall_seconds"])
        figures["peer / ours"] = spread(found["peer_over_ours_wall_seconds"], 1)
    figures["ours, CPU s"] = spread(_cpu(samples["ours"]))
    if peer:
        figures["peer, CPU s"] = spread(_cpu(samples["peer"]))
    figures["ours, anonymous MB"] = _megabytes(ours["peak_anonymous"])
    if peer:
        figures["peer, anonymous MB"] = _megabytes(peer["peak_anonymous"])
    figures["executor, s"] = spread(ours["executor_seconds"])
    figures["floor, s"] = spread(found["floor_seconds"])
    figures["executor / floor"] = spread(found["executor_over_floor"])
    return figures


def show(results: dict[str, Any]) -> None:
    """A table with a column per method."""
    columns = [_column(result) for result in results.values()]
    table = Table("", *results, title="taskloom merge, whole processes: median (lowest-highest)")
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    console.print(table)


def passing_methods(methods: Sequence[str], setting: Setting, workdir: Path, device: str) -> tuple[list[str], dict[str, Any]]:
    """The methods whose results agree with the reference, and how every one did."""
    gates: dict[str, Any] = {}
    for method in methods:
        with tempfile.TemporaryDirectory(dir=workdir) as folder:
            wrong, entries = wrong_entries(method, setting, Path(folder), device)
        gates[method] = {"wrong_entries": wrong, "entries": entries}
        verdict = "agrees with the reference" if not wrong else f"FAILS: {wrong} of {entries} entries are wrong; its speed is not measured"
        console.print(f"{method:<16} {verdict}", highlight=False)
    return [method for method in methods if not gates[method]["wrong_entries"]], gates


def compare(options: argparse.Namespace, setting: Setting, workdir: Path) -> dict[str, Any]:
    """The comparison on one checkpoint of ``--size`` parameters."""
    peer = options.peer if (options.peer / "bin" / "mergekit-yaml").is_file() else None
    if peer is None:
        console.print(f"[bold]no mergekit in {options.peer} (make peers): only ours is measured[/bold]")
    methods, gates = passing_methods(options.methods, setting, workdir, options.device)
    size = llama_of(parse_size(options.size))
    console.print(f"making a base and three tunings of {size.parameters:,} parameters")
    models = write_checkpoints(workdir / "models", size, seed=setting.seed)
    results = measure_methods(methods, models, setting, options, peer, workdir)
    if results:
        show(results)
    one = (models[0] / "model.safetensors").stat().st_size
    return {
        "versions": environment.versions(peer),
        "checkpoint": {
            "size": asdict(size),
            "parameters": size.parameters,
            "tensors": len(llama_shapes(size)),
            "models": len(models),
            "dtype": "bfloat16",
            "bytes_in": one * len(models),
            "bytes_out": one,
        },
        "inputs": "warm: every input file was read once before the first run",
        "gates": gates,
        "methods": results,
    }


def stream(options: argparse.Namespace, setting: Setting, workdir: Path) -> dict[str, Any]:
    """Peak memory of ours where the inputs, in several files each, sum to ``--stream`` bytes."""
    methods, gates = passing_methods(options.methods, setting, workdir, options.device)
    total = parse_size(options.stream)
    size = llama_of(total // (4 * 2))
    console.print(f"making a base and three tunings of {size.parameters:,} parameters")
    models = write_checkpoints(workdir / "models", size, seed=setting.seed, shard_bytes=total // 4 // _STREAM_SHARDS)
    bytes_in = sum(path.stat().st_size for model in models for path in model.glob("*.safetensors"))
    results: dict[str, Any] = {}
    for method in methods:
        job = Job(workdir / f"{method}.yml", workdir, setting.seed, None, options.device)
        write_recipe(job.recipe, method, models, setting, options.dtype)
        results[method] = found = measure_ours(job)
        console.print(
            f"{method:<16} {bytes_in / 1e9:.1f} GB read, peak anonymous memory {found['peak_anonymous'] / 1e6:.0f} MB, "
            f"{found['wall_seconds']:.1f} s",
            highlight=False,
        )
    return {
        "versions": environment.versions(),
        "checkpoint": {"size": asdict(size), "parameters": size.parameters, "models": len(models), "bytes_in": bytes_in},
        "inputs": "as the page cache held them after they were written",
        "gates": gates,
        "methods": results,
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", default="325M", help="parameters of each of the four models")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--runs", type=int, default=3, help="times that each program runs each method")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--gamma", type=float, default=0.01)
    parser.add_argument("--weight", type=float, default=0.3)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="the recipe's dtype: mergekit's arithmetic")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", type=Path, default=environment.ROOT / ".venv-peers", help="virtual environment with mergekit")
    parser.add_argument("--device", default="cpu", help="where both programs merge: cpu, cuda or cuda:N (mergekit: --cuda --read-to-gpu)")
    parser.add_argument("--stream", metavar="SIZE", help="instead: peak memory of ours on inputs of so many bytes, such as 8GB")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every sample to this file")
    parser.add_argument("--workdir", type=Path, help="where models and outputs are made; a temporary folder by default")
    parser.add_argument("--keep", action="store_true", help="leave the models in the working folder")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error("--runs: expected at least 1")
    if options.device != "cpu" and (obstacle := device_obstacle(options.device)) is not None:
        parser.error(f"--device {options.device}: {obstacle}")
    return options


def main() -> None:
    options = parse_arguments()
    setting = Setting(options.weight, options.density, options.gamma, options.seed)
    if options.workdir is not None:
        options.workdir.mkdir(parents=True, exist_ok=True)
    workdir = Path(tempfile.mkdtemp(prefix="bench-merge-", dir=options.workdir))
    gpu = {} if options.device == "cpu" else {"gpu": gpu_name(options.device)}
    started = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "device": environment.device() | gpu, **environment.commit()}
    try:
        found = stream(options, setting, workdir) if options.stream else compare(options, setting, workdir)
    finally:
        if options.keep:
            console.print(f"models and recipes are in {workdir}")
        else:
            shutil.rmtree(workdir, ignore_errors=True)
    settings = {**asdict(setting), "runs": options.runs, "recipe_dtype": options.dtype, "device": options.device}
    if options.json is not None:
        content = {"benchmark": "merge-stream" if options.stream else "merge", **started, "settings": settings, **found}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if any(gate["wrong_entries"] for gate in found["gates"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
