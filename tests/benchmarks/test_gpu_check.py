"""scripts/gpu_check.sh as far as a CPU can rehearse it: parts, budgets, files, the gate, refusals, the build's plan."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import from_source
import pytest
import sanitizer
import sections as section_module
import table
import torch
from machine import Tools, look
from outputs import FILES, Outputs, trimmed
from sections import Clock, Ended, Outcome, Section, run, run_sections

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"

REFUSES = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "========= Error: Device not supported. Please refer to the supported devices section"
exit 1
"""


def _check(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run([SCRIPT, out, "--dry-run", *options], capture_output=True, text=True, env=environment, check=False)


def _results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def _program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def _row(**changes: Any) -> dict[str, Any]:
    row = {"op": "pack_mask", "use": "", "backend": "native", "dtype": "bool", "entries": 4096, "status": "measured", "reason": ""}
    row |= {"ours": {"ms": 2.0}, "gigabytes_per_second": 800.0, "share_of_copy": 0.82, "aim": {"share": 0.8}, "peers": {}}
    return row | changes


def test_a_rehearsal_with_an_op_that_is_wrong_and_a_sanitizer_that_refuses(tmp_path: Path) -> None:
    out, tool = tmp_path / "out", _program(tmp_path / "compute-sanitizer", REFUSES)
    done = _check(out, "--sections", "sanitizer,benchmarks", "--sanitizer", str(tool), "--break", "pack_mask")
    assert done.returncode == 1, done.stderr
    found = _results(out)
    assert found["rehearsal"]
    assert {one["section"]: one["status"] for one in found["sections"]} == {
        "facts": "passed",
        "build": "passed",
        "sanitizer": "refused",
        "benchmarks": "failed",
    }
    assert {one["tool"]: one["status"] for one in found["sanitizer"]} == dict.fromkeys(sanitizer.TOOLS, "refused")
    assert (out / "sanitizer.txt").read_text().startswith("memcheck: REFUSED: ")
    rows = {(row["op"], row["use"], row["backend"], row["dtype"]): row for row in found["rows"]}
    wrong = rows["pack_mask", "", "native", "bool"]
    assert (wrong["status"], "ours" in wrong, "gigabytes_per_second" in wrong) == ("FAILED", False, False)
    assert rows["unpack_mask", "", "native", "bool"]["status"] == "measured"
    assert rows["unpack_mask", "", "triton", "bool"]["status"] == "not served"
    measured = [row for row in rows.values() if row["status"] == "measured"]
    assert len(measured) > 20
    assert all(row["ours"]["ms"] > 0 and row["peers"] and row["share_of_copy"] > 0 for row in measured)
    assert set(rows["magnitude_threshold", "", "native", "bfloat16"]["peers"]) == {"kthvalue", "topk", "quantile"}
    assert "torch.compile" in rows["masked_update_", "1 in 2 set", "native", "bfloat16"]["peers"]
    shown = (out / "table.txt").read_text()
    assert shown.strip() == done.stdout.strip()
    assert "CPU rehearsal: these figures mean nothing" in shown
    assert "FAILED pack_mask (native, bool): 1 of 512 values differ, expected none" in shown
    assert {path.name for path in out.iterdir()} <= set(FILES)


@pytest.mark.slow
def test_a_whole_rehearsal(tmp_path: Path) -> None:
    done = _check(tmp_path / "out", "--sections", "smoke,tests,sanitizer")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ["skipped" in line for line in _results(tmp_path / "out")["tests"]] == [True, True]
    assert "0 FAILED" in (tmp_path / "out" / "log.txt").read_text()


def test_without_a_gpu_nothing_is_checked(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([SCRIPT, tmp_path / "out"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "torch sees no CUDA device: nothing can be checked here" in (tmp_path / "out" / "log.txt").read_text()
    assert [one["status"] for one in _results(tmp_path / "out")["sections"]] == ["failed", "failed"]


def test_a_part_that_sleeps_is_cut_off_and_what_was_done_is_there(tmp_path: Path) -> None:
    done = _check(tmp_path / "out", "--sections", "sleep", "--sleep", "0.5")
    assert done.returncode == 1
    assert [(one["section"], one["status"]) for one in _results(tmp_path / "out")["sections"]] == [
        ("facts", "passed"),
        ("build", "passed"),
        ("sleep", "cut off"),
    ]
    assert "sleep: cut off" in (tmp_path / "out" / "table.txt").read_text()


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    done = _check(tmp_path / "out", "--sections", "smoke,speed")
    assert done.returncode == 1
    assert "--sections: expected some of smoke, tests, sanitizer, benchmarks, got 'speed'" in done.stderr


def test_budgets_and_the_deadline(tmp_path: Path) -> None:
    ended: list[Outcome] = []
    given: list[float] = []

    def works(status: str, takes: float = 0.0) -> Any:
        def work(seconds: float) -> str:
            given.append(seconds)
            time.sleep(takes)
            return status

        return work

    sections = [Section("a", 0.2, works("passed", 0.1)), Section("b", 100, works("failed", 0.5)), Section("c", 7, works("passed"))]
    run_sections(sections, Clock(5.5), ended.append)
    assert [(one.section, one.status) for one in ended] == [("a", "passed"), ("b", "failed"), ("c", "not started")]
    assert given[0] == 0.2
    assert 5 < given[1] <= 5.5
    with pytest.raises(ValueError, match=r"section d: expected one of passed, failed, refused, cut off, got 'fine'"):
        run_sections([Section("d", 0.1, works("fine"))], Clock(1), ended.append)


def test_a_command_is_stopped_with_its_children_and_keeps_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(section_module, "_GRACE_SECONDS", 0.2)
    mark = tmp_path / "mark"
    script = f"echo begun; (sleep 2; touch {mark}) & sleep 60"
    found = run(["/bin/sh", "-c", script], 0.3)
    assert (found.status, found.output) == (None, "begun\n")
    time.sleep(2)
    assert not mark.exists()
    assert run([str(tmp_path / "absent")], 1).status == 127


def test_a_command_that_is_stopped_may_still_sum_up(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import time\ntry:\n    print('begun', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('2 passed')"
    found = run([sys.executable, "-c", script], 2)
    assert (found.status, found.output) == (None, "begun\n2 passed\n")
    monkeypatch.setattr(section_module, "_GRACE_SECONDS", 0.2)
    deaf = run(["/bin/sh", "-c", "trap '' INT TERM; echo begun; sleep 60; sleep 60"], 0.3)
    assert (deaf.status, deaf.output) == (None, "begun\n")
    assert deaf.seconds < 20


def test_files_are_few_small_and_whole(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "out")
    for name in FILES:
        outputs.write(name, "x" * (17 << 20))
    found = list((tmp_path / "out").iterdir())
    assert len(found) <= 6
    assert all(path.stat().st_size < 16 << 20 for path in found)
    assert "bytes left out" in trimmed("a" * 1000, 500)
    assert trimmed("kept") == "kept"
    with pytest.raises(ValueError, match="name: expected one of"):
        outputs.write("more.txt", "")
    (tmp_path / "out" / "foreign").touch()
    with pytest.raises(SystemExit, match="expected an empty folder, found foreign"):
        Outputs(tmp_path / "out")


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "========= ERROR SUMMARY: 0 errors\n", "passed"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "passed"),
        (1, "========= Invalid __global__ write of size 4\n========= ERROR SUMMARY: 3 errors\n", "failed"),
        (1, "========= RACECHECK SUMMARY: 2 hazards displayed\n", "failed"),
        (3, "FAILED: pack_mask\n========= ERROR SUMMARY: 0 errors\n", "failed"),
        (1, "========= Error: Device not supported\n", "refused"),
        (255, "Error: Unable to find injection library\n========= ERROR SUMMARY: 0 errors\n", "refused"),
        (0, "22 right, 0 FAILED\n", "refused"),
        (127, "compute-sanitizer: No such file or directory\n", "refused"),
        (None, "========= ERROR SUMMARY: 0 errors\n", "cut off"),
    ],
)
def test_what_a_sanitizer_says(status: int | None, output: str, expected: str) -> None:
    assert sanitizer.verdict("memcheck", Ended(status, output, 1.0)).status == expected


def test_the_worst_of_the_tools_counts() -> None:
    verdicts = {status: sanitizer.Verdict("memcheck", status, "", 0) for status in ("passed", "refused", "failed", "cut off")}
    assert sanitizer.overall([verdicts["passed"], verdicts["refused"]]) == "refused"
    assert sanitizer.overall([verdicts["refused"], verdicts["failed"]]) == "failed"
    assert sanitizer.overall([verdicts["passed"]]) == "passed"


def test_the_table_says_what_was_reached() -> None:
    peers = {"kthvalue": {"ms": 30.0, "over_ours": 15.0}, "quantile": {"status": "input tensor is too large"}}
    both = {"share": 0.8, "over": ("kthvalue", 10)}
    text = table.render([_row(peers=peers, aim=both), _row(op="unpack_mask", share_of_copy=0.5)], "a title")
    lines = text.splitlines()
    assert lines[0] == "a title"
    first, second, third = lines[4:7]
    assert first.split()[:7] == ["pack_mask", "native", "4,096", "bool", "2.000", "800", "82%"]
    assert first.endswith("yes, yes")
    assert "30.000      15.00" in first
    assert "input tensor is too large" in second
    assert third.endswith("no")
    missing = table.render([_row(aim=both)], "a title")
    assert missing.splitlines()[4].endswith("yes, not measured")


def test_a_row_without_a_check_shows_no_speed() -> None:
    text = table.render([_row(status="FAILED", reason="3 values differ"), _row(status="not served", reason="no GPU")], "a title")
    assert "2.000" not in text
    assert "FAILED pack_mask (native, bool): 3 values differ" in text


def _tools(**missing: None) -> Tools:
    found = {"cmake": "/usr/bin/cmake", "ninja": "/usr/bin/ninja", "compiler": shutil.which("g++"), "nvcc": "/opt/nvcc", "sanitizer": None}
    return Tools(**{**found, "pybind11": "/opt/pybind11", "torch": {"capability": "90"}, **missing})


def test_the_build_is_for_this_gpu_alone(tmp_path: Path) -> None:
    plan = from_source.plan(_tools(), tmp_path)
    assert plan.how == "cmake"
    assert "-DTASKLOOM_CUDA_ARCHITECTURES=90-real" in plan.steps[0][0]
    assert {path.name.partition(".")[0] for path in plan.libraries} == {"libtaskloom_cpu", "libtaskloom_cuda", "_native"}
    without = from_source.plan(_tools(nvcc=None), tmp_path)
    assert "-DTASKLOOM_CUDA=OFF" in without.steps[0][0]


@pytest.mark.parametrize("missing", ["cmake", "pybind11"])
def test_without_cmake_commands_of_our_own_build_every_source(tmp_path: Path, missing: str) -> None:
    plan = from_source.plan(_tools(**{missing: None}), tmp_path)
    assert plan.how == "commands of our own"
    compiled = {word for command in plan.steps[0] for word in command}
    sources = {str(path) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")}
    if missing == "pybind11":
        sources -= {str(path) for path in [ROOT / "csrc" / "native.cpp", *(ROOT / "csrc" / "merge").glob("*.cpp")]}
    assert sources <= compiled
    assert "-gencode=arch=compute_90,code=sm_90" in compiled
    assert any("is missing" in line for line in _tools(**{missing: None}).missing())


def test_without_a_compiler_the_build_fails_in_a_line(tmp_path: Path) -> None:
    assert from_source.build(_tools(compiler=None), tmp_path, 10) == ("failed", None, "no C++ compiler was found\n")


@pytest.mark.slow
@pytest.mark.parametrize("with_cmake", [True, False])
def test_what_was_built_is_found_and_runs(tmp_path: Path, with_cmake: bool) -> None:
    tools = look()
    # What the tests themselves are built and installed with.
    assert None not in (tools.compiler, tools.cmake, tools.pybind11)
    chosen = Tools(**{**tools.as_dict(), "nvcc": None, **({} if with_cmake else {"cmake": None})})
    status, site, said = from_source.build(chosen, tmp_path / "build", 600)
    assert status == "passed", said
    # Without site, so that an editable install of this interpreter does not come first.
    places = os.pathsep.join([str(site), str(Path(torch.__file__).parents[1])])
    script = "import torch, taskloom; print(taskloom.pack_mask(torch.tensor([True, False, True])).tolist(), *taskloom.__path__)"
    environment = os.environ | {"PYTHONPATH": places}
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.stdout.split() == ["[5]", str(site / "taskloom")], done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_content() -> None:
    subprocess.run(["shellcheck", SCRIPT], check=True)
