"""The whole check: what is here, build, smoke set, tests, sanitizer, benchmarks; see docs/gpu.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import from_source
import sanitizer
import table
from machine import Tools, look
from outputs import SANITIZER, TABLE, TESTS, Outputs
from sections import Clock, Outcome, Section, run, run_sections

HERE = Path(__file__).resolve().parent
ROOT = from_source.ROOT
SECONDS = 540.0
# Seconds that are kept for the last writing of files.
_RESERVE = 10.0
_WORKERS = 8


class Check:
    """The parts of the check and what they have found; every part leaves its findings in the files before the next begins."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.outputs = Outputs(given.outdir)
        self.given = given
        self.rehearsal: bool = given.dry_run
        self.device = "cpu" if self.rehearsal else "cuda"
        self.results: dict[str, Any] = {"rehearsal": self.rehearsal, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.results |= {"sections": [], "tests": [], "sanitizer": [], "rows": []}
        self.tools: Tools | None = None
        self.site: Path | None = None
        self.work = Path(tempfile.mkdtemp(prefix="taskloom-gpu-check-"))

    def environment(self, **more: str) -> dict[str, str]:
        """For processes that use what was built; a rehearsal uses the package that is installed."""
        known = {name: value for name, value in os.environ.items() if name not in ("TASKLOOM_BACKEND", "TRITON_INTERPRET")}
        path = [*([str(self.site)] if self.site else []), str(HERE.parent), *filter(None, [known.get("PYTHONPATH")])]
        known["PYTHONPATH"] = os.pathsep.join(path)
        return known | {"PYTHONUNBUFFERED": "1"} | more

    def facts(self, seconds: float) -> str:
        """What the machine has: versions, tools, GPU."""
        self.tools = look(seconds)
        found = self.tools.torch
        self.results["device"] = {**found, "machine": platform.machine(), "python": platform.python_version()}
        self.results["tools"] = {name: value is not None for name, value in self.tools.as_dict().items() if name != "torch"}
        revision = run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], 5.0)
        self.results["commit"] = revision.output.strip() if revision.status == 0 else None
        self.outputs.note("\n".join(self.tools.missing()))
        if "error" in found:
            self.outputs.note(f"torch: {found['error']}")
            return "failed"
        if self.rehearsal or found["gpu"] is not None:
            return "passed"
        self.outputs.note("torch sees no CUDA device: nothing can be checked here (--dry-run rehearses on the CPU)")
        return "failed"

    def make(self, seconds: float) -> str:
        """Build for this GPU's architecture alone."""
        if self.tools is None or (not self.rehearsal and self.tools.torch.get("capability") is None):
            return "failed"
        if self.rehearsal:
            self.outputs.note("rehearsal: the installed package is used, nothing is built")
            return "passed"
        folder = ROOT / "build" / f"gpu-check-{self.tools.torch['capability']}"
        status, self.site, said = from_source.build(self.tools, folder, seconds)
        self.outputs.note(said)
        return status

    def _program(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, str(HERE / name), *arguments]

    def smoke(self, seconds: float) -> str:
        ended = run(self._program("smoke.py", "--device", self.device), seconds, self.environment(), ROOT)
        self.outputs.note(ended.output)
        return _status(ended.status)

    def tests(self, seconds: float) -> str:
        """The tests marked gpu, of the files that have any; in a rehearsal all of them are skipped, with a reason."""
        files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
        if not files:
            self.outputs.note("no file under tests has a test that is marked gpu")
            return "failed"
        large = [path for path in files if path.endswith("_large.py")]
        # What lacks a package to be imported must not take the others with it.
        merges = [path for path in files if "/merge/" in path]
        # Compiling Triton's kernels takes most of the time, and cores can share it; large tensors need the memory for themselves.
        spread = ["-n", str(_WORKERS)] if importlib.util.find_spec("xdist") and not self.rehearsal else []
        clock, output, statuses = Clock(seconds), "", []
        first = [path for path in files if path not in large and path not in merges]
        for given, share in (([*spread, *first], 0.7), (merges, 0.6), (large, 1.0)):
            if len(given) == len(spread) * (given[:1] == ["-n"]):
                continue
            options = ["-m", "gpu", "-q", "-rfEs", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-p", "no:benchmark"]
            # Products of torch's are deterministic with a fixed workspace alone, and a test may ask for that.
            environment = self.environment(CUBLAS_WORKSPACE_CONFIG=":4096:8")
            ended = run([sys.executable, "-m", "pytest", *options, *given], share * clock.left(), environment, ROOT)
            output += ended.output
            statuses.append(_status(ended.status))
            self.outputs.write(TESTS, output)
            self.results["tests"].append((ended.output.strip().splitlines() or ["nothing was printed"])[-1])
        return next(status for status in ("failed", "cut off", "passed") if status in statuses)

    def sanitize(self, seconds: float) -> str:
        found = self.given.sanitizer or (self.tools.sanitizer if self.tools else None)
        if found is None:
            self.outputs.write(SANITIZER, "compute-sanitizer is not here: nothing was looked at\n")
            return "refused"
        every, few = (self._program("smoke.py", "--device", self.device, *more) for more in ((), ("--few",)))
        programs = {"memcheck": every, "racecheck": few, "initcheck": few}
        environment = self.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        told = sanitizer.check(found, programs, seconds, environment, ROOT)
        self.results["sanitizer"] = [one.as_dict() for one, _ in told]
        heads = [f"{one.tool}: {one.status.upper()}: {one.reason}" for one, _ in told]
        self.outputs.write(SANITIZER, "\n".join([*heads, *(f"\n== {one.tool} ==\n{output}" for one, output in told)]))
        return sanitizer.overall([one for one, _ in told])

    def benchmark(self, seconds: float) -> str:
        lines = self.work / "lines.jsonl"
        command = self._program("measure.py", str(lines), "--device", self.device, "--seconds", str(max(1.0, seconds - 5.0)))
        command += [*(["--rehearsal"] if self.rehearsal else []), *(["--break", self.given.breaks] if self.given.breaks else [])]
        ended = run(command, seconds, self.environment(), ROOT)
        self.outputs.note(ended.output)
        self.results["rows"] = latest(lines)
        self.outputs.write(TABLE, self.table())
        failed = any(row["status"] == "FAILED" for row in self.results["rows"])
        return "failed" if failed else _status(ended.status)

    def sleep(self, seconds: float) -> str:
        """A part that never ends: for tests of the budgets."""
        return _status(run([sys.executable, "-c", "import time; time.sleep(600)"], seconds).status)

    def table(self) -> str:
        device = self.results.get("device", {})
        name = "CPU rehearsal: these figures mean nothing" if self.rehearsal else str(device.get("gpu"))
        title = f"{name}, torch {device.get('torch')}, CUDA {device.get('cuda')}, commit {self.results.get('commit')}"
        rows = table.render(self.results["rows"], title)
        sections = [f"{one['section']}: {one['status']} ({one['seconds']:.0f} s)" for one in self.results["sections"]]
        tests = [f"pytest -m gpu: {line.strip(' =')}" for line in self.results["tests"]]
        tools = [f"compute-sanitizer {one['tool']}: {one['status']} ({one['reason']})" for one in self.results["sanitizer"]]
        return "\n".join([rows, *sections, *tests, *tools, ""])

    def ended(self, outcome: Outcome) -> None:
        self.results["sections"].append({"section": outcome.section, "status": outcome.status, "seconds": outcome.seconds})
        self.outputs.note(f"== {outcome.section}: {outcome.status} after {outcome.seconds:.1f} s")
        self.outputs.write_results(self.results)


def _status(ended: int | None) -> str:
    return "cut off" if ended is None else "passed" if ended == 0 else "failed"


def latest(lines: Path) -> list[dict[str, Any]]:
    """The last state of every line, in the order in which they were first named; a line that was cut off in writing does not count."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for text in lines.read_text().splitlines() if lines.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[tuple(str(line[key]) for key in ("op", "use", "backend", "dtype"))] = line
    return list(found.values())


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description="Build, test and measure on the GPU that is here.",
        epilog="docs/gpu.md says how to read what it leaves.",
    )
    parser.add_argument("outdir", type=Path, help="folder for results.json, table.txt, sanitizer.txt, tests.txt and log.txt")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU with the installed package and small sizes")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="most seconds that all of it may take (default %(default)g)")
    parser.add_argument("--sections", default="", help="only these, by name, separated by commas; facts and build always run")
    parser.add_argument("--sanitizer", help="path of compute-sanitizer, where it is not on the PATH")
    parser.add_argument("--break", dest="breaks", metavar="OP", help=argparse.SUPPRESS)
    parser.add_argument("--sleep", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    given = parsed()
    check = Check(given)
    clock = Clock(max(1.0, given.seconds - min(_RESERVE, given.seconds / 10)))
    # The cheapest first: what was cut off is then the dearest.
    first = [Section("facts", 60, check.facts), Section("build", 150, check.make)]
    others = [Section("smoke", 90, check.smoke), Section("tests", 120, check.tests), Section("sanitizer", 110, check.sanitize)]
    others += [Section("benchmarks", 200, check.benchmark)]
    if given.sleep is not None:
        others.insert(0, Section("sleep", given.sleep, check.sleep))
    wanted = [name for name in given.sections.split(",") if name]
    unknown = sorted(set(wanted) - {section.name for section in others})
    if unknown:
        raise SystemExit(f"gpu_check: --sections: expected some of {', '.join(section.name for section in others)}, got {unknown[0]!r}")
    run_sections(first, clock, check.ended)
    if all(one["status"] == "passed" for one in check.results["sections"]):
        run_sections([section for section in others if not wanted or section.name in wanted], clock, check.ended)
    text = check.table()
    check.outputs.write(TABLE, text)
    print(text)
    return 0 if all(one["status"] in ("passed", "refused") for one in check.results["sections"]) else 1


if __name__ == "__main__":
    sys.exit(main())
