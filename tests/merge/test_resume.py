"""What a cut-off merge leaves, and what --resume and --overwrite make of it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash_points import content
from safetensors.numpy import save_file
from toy_checkpoints import recipe_of, toy_tensors

import taskloom.merge.report
import taskloom.merge.working
from taskloom.merge import MergeError, MergeReport, OutputError, merge_checkpoints
from taskloom.merge.run import prepare, run_plan
from taskloom.merge.working import WorkingFolder, working_folder

Models = dict[str, Path]
SIZE = "700"


def _recipe(models: Models, **changes: Any) -> dict[str, Any]:
    return recipe_of(models, "ties", parameters={"density": 0.5}, **changes)


def _cut_off(models: Models, out: Path, monkeypatch: pytest.MonkeyPatch, files: int = 3, **options: Any) -> list[str]:
    """Merge until so many files are finished; returns the notes of what was raised."""
    finish = WorkingFolder.finish
    count = 0

    def finish_some(self: WorkingFolder, file: Any) -> None:
        nonlocal count
        if count == files:
            raise OSError(5, "Input/output error")
        finish(self, file)
        count += 1

    with monkeypatch.context() as patch:
        patch.setattr(WorkingFolder, "finish", finish_some)
        with pytest.raises(OutputError, match="cannot be finished: Input/output error") as caught:
            merge_checkpoints(_recipe(models), out, shard_size=SIZE, **options)
    return getattr(caught.value, "__notes__", [])


def _siblings(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith(out.name))


def _timeless(report: MergeReport) -> MergeReport:
    tensors = [dataclasses.replace(tensor, seconds=0.0) for tensor in report.tensors]
    return dataclasses.replace(report, seconds=0.0, tensors=tensors, output="")


@pytest.fixture
def expected(models: Models, tmp_path: Path) -> dict[str, bytes | str]:
    merge_checkpoints(_recipe(models), tmp_path / "expected", shard_size=SIZE)
    return {name: value for name, value in content(tmp_path / "expected").items() if "safetensors" in name}


def _weights(out: Path) -> dict[str, bytes | str]:
    return {name: value for name, value in content(out).items() if "safetensors" in name}


def test_finished_files_are_kept_and_not_made_again(
    models: Models, tmp_path: Path, expected: dict[str, bytes | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    notes = _cut_off(models, out, monkeypatch)
    assert notes == [f"3 of 8 files are finished and kept in {out}.partial; --resume goes on from there"]
    assert _siblings(out) == ["out.partial", "out.partial.journal"]
    kept = {path.name: path.stat().st_ino for path in sorted((tmp_path / "out.partial").glob("*.safetensors"))[:3]}
    seen: list[int] = []
    recipe, planned = prepare(_recipe(models), shard_size=SIZE)
    report = run_plan(recipe, planned, out, resume=True, progress=seen.append)
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    assert _weights(out) == expected
    assert seen == sorted(seen)
    assert seen[-1] == planned.progress_total
    assert _siblings(out) == ["out"]
    assert _timeless(report) == _timeless(merge_checkpoints(_recipe(models), tmp_path / "again", shard_size=SIZE))


def test_nothing_to_resume_starts_afresh(models: Models, tmp_path: Path, expected: dict[str, bytes | str]) -> None:
    merge_checkpoints(_recipe(models), tmp_path / "out", shard_size=SIZE, resume=True)
    assert _weights(tmp_path / "out") == expected


def test_a_complete_output_of_the_same_merge_is_a_success(models: Models, tmp_path: Path) -> None:
    report = merge_checkpoints(_recipe(models), tmp_path / "out", shard_size=SIZE)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert merge_checkpoints(_recipe(models), tmp_path / "out", shard_size=SIZE, resume=True) == report
    assert merge_checkpoints(_recipe(models), tmp_path / "out", shard_size=SIZE, resume=True, overwrite=True) == report
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def _touch(models: Models) -> None:
    file = models["a"] / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def _grow(models: Models) -> None:
    tensors = toy_tensors(1)
    save_file(tensors | {"model.norm.weight": np.ones(8, np.float64)}, models["a"] / "model.safetensors")


_CHANGES: dict[str, tuple[Callable[[Models], None], dict[str, Any], str]] = {
    "recipe": (lambda models: None, {"parameters": {"density": 0.25}}, "it was made by another recipe or seed"),
    "seed": (lambda models: None, {"seed": 5}, "it was made by another recipe or seed"),
    "time of an input": (_touch, {}, "its input .*/a/model.safetensors has changed since"),
    "content of an input": (_grow, {}, "its input .*/a/model.safetensors has changed since"),
}


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("change", _CHANGES)
def test_another_recipe_or_changed_inputs_are_refused(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, complete: bool
) -> None:
    out = tmp_path / "out"
    if complete:
        merge_checkpoints(_recipe(models), out, shard_size=SIZE)
    else:
        _cut_off(models, out, monkeypatch)
    before = {name: content(tmp_path / name) for name in _siblings(out) if (tmp_path / name).is_dir()}
    alter, changes, message = _CHANGES[change]
    alter(models)
    with pytest.raises(OutputError, match=f"cannot (be resumed|resume).*{message}"):
        merge_checkpoints(_recipe(models) | changes, out, shard_size=SIZE, resume=True)
    assert {name: content(tmp_path / name) for name in _siblings(out) if (tmp_path / name).is_dir()} == before
    merge_checkpoints(_recipe(models) | changes, out, shard_size=SIZE, resume=True, overwrite=True)
    merge_checkpoints(_recipe(models) | changes, tmp_path / "other", shard_size=SIZE)
    assert _weights(out) == _weights(tmp_path / "other")
    assert _siblings(out) == ["out"]


def test_another_shard_size_or_version_is_refused(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _cut_off(models, tmp_path / "out", monkeypatch)
    with pytest.raises(OutputError, match=r"cannot resume: .*its output files were laid out differently \(shard size\)"):
        merge_checkpoints(_recipe(models), tmp_path / "out", shard_size="800", resume=True)
    monkeypatch.setattr("taskloom.merge.run.taskloom_version", lambda: "9.9")
    with pytest.raises(OutputError, match=r"cannot resume: .*it was made by taskloom .*, this is 9\.9"):
        merge_checkpoints(_recipe(models), tmp_path / "out", shard_size=SIZE, resume=True)


def test_without_a_flag_what_is_left_is_neither_used_nor_lost(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    _cut_off(models, out, monkeypatch)
    before = content(tmp_path / "out.partial")
    with pytest.raises(OutputError, match=r"cut off with 3 of its files finished; --resume goes on with it, --overwrite starts afresh"):
        merge_checkpoints(_recipe(models), out, shard_size=SIZE)
    with pytest.raises(OutputError, match="cut off with 3 of its files finished"), working_folder(out):
        pass
    assert content(tmp_path / "out.partial") == before
    merge_checkpoints(_recipe(models), out, shard_size=SIZE, overwrite=True)
    assert _siblings(out) == ["out"]


@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_a_damaged_finished_file_is_made_again(
    models: Models, tmp_path: Path, expected: dict[str, bytes | str], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    _cut_off(models, tmp_path / "out", monkeypatch)
    file = sorted((tmp_path / "out.partial").glob("*.safetensors"))[1]
    raw = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(raw[:-1] if damage == "cut" else raw[:-1] + bytes([raw[-1] ^ 1]))
    merge_checkpoints(_recipe(models), tmp_path / "out", shard_size=SIZE, resume=True)
    assert _weights(tmp_path / "out") == expected


@pytest.mark.parametrize("tail", [b"{", b'{"finished": {"name": "model-00', b"\xff\xfe\n", b'{"finished": {}}\n', b"[]\n", b"{}\n"])
def test_a_torn_journal_is_read_up_to_the_tear(
    models: Models, tmp_path: Path, expected: dict[str, bytes | str], monkeypatch: pytest.MonkeyPatch, tail: bytes
) -> None:
    _cut_off(models, tmp_path / "out", monkeypatch)
    journal = tmp_path / "out.partial.journal"
    journal.write_bytes(journal.read_bytes() + tail)
    _cut_off(models, tmp_path / "out", monkeypatch, files=2, resume=True)
    assert [list(json.loads(line)) for line in journal.read_text().splitlines()][1:] == [["finished"]] * 5
    merge_checkpoints(_recipe(models), tmp_path / "out", shard_size=SIZE, resume=True)
    assert _weights(tmp_path / "out") == expected


def test_a_journal_without_its_folder_is_nothing_left(
    models: Models, tmp_path: Path, expected: dict[str, bytes | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _cut_off(models, tmp_path / "out", monkeypatch)
    shutil.rmtree(tmp_path / "out.partial")
    merge_checkpoints(_recipe(models), tmp_path / "out", shard_size=SIZE)
    assert _weights(tmp_path / "out") == expected
    assert _siblings(tmp_path / "out") == ["out"]


def test_a_folder_that_no_merge_made_is_not_touched(models: Models, tmp_path: Path) -> None:
    for name in ("out.partial", "out.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keep.txt").write_text("x")
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match=rf"{name} is (not a working folder that a merge left|in the way); remove it"):
                merge_checkpoints(_recipe(models), tmp_path / "out", **flags)
        assert _siblings(tmp_path / "out") == [name]
        assert (tmp_path / name / "keep.txt").read_text() == "x"
        (tmp_path / name / "keep.txt").unlink()
        (tmp_path / name).rmdir()


def test_only_folders_that_a_merge_could_have_written_are_replaced(models: Models, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match=r"holds no model and no merge_report\.json; --overwrite replaces only what a merge could have"):
        merge_checkpoints(_recipe(models), tmp_path / "home", overwrite=True)
    assert content(tmp_path / "home") == {"thesis.txt": b"x"}
    with pytest.raises(OutputError, match="is the input model"):
        merge_checkpoints(_recipe(models), models["a"], overwrite=True)
    with pytest.raises(OutputError, match=r"is not empty; .* or replace it with --overwrite"):
        merge_checkpoints(_recipe(models), tmp_path / "home")


@pytest.mark.parametrize("exchange", [True, False])
def test_an_output_is_replaced_only_when_all_is_done(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    out = tmp_path / "out"
    merge_checkpoints(_recipe(models), out)
    (out / "evaluation.txt").write_text("x")
    before = content(out)
    _cut_off(models, out, monkeypatch, overwrite=True)
    assert content(out) == before
    if not exchange:
        monkeypatch.setattr("taskloom._native.exchange_names", lambda first, second: False)
    report = merge_checkpoints(_recipe(models, out_dtype="float16"), out, overwrite=True)
    assert {tensor.dtype for tensor in report.tensors} == {"F16", "I64"}
    assert not (out / "evaluation.txt").exists()
    assert _siblings(out) == ["out"]


def test_a_damaged_complete_output_is_not_taken_for_complete(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_checkpoints(_recipe(models), out)
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OutputError, match=r"model\.safetensors is not the file that its report names"):
        merge_checkpoints(_recipe(models), out, resume=True)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(OutputError, match=r"is damaged: model\.safetensors is not the file that its report names"):
        merge_checkpoints(_recipe(models), out, resume=True)
    for text in ("{", "{}", '{"version": 2}', "[]", "[" * 100_000):
        (out / "merge_report.json").write_text(text)
        with pytest.raises(OutputError, match=r"merge_report\.json cannot be read, so it cannot be told what made it"):
            merge_checkpoints(_recipe(models), out, resume=True)
    merge_checkpoints(_recipe(models), out, resume=True, overwrite=True)
    assert merge_checkpoints(_recipe(models), out, resume=True).version == taskloom.merge.report.VERSION


def test_values_that_are_not_finite_can_be_allowed_on_resuming(models: Models, tmp_path: Path) -> None:
    tensors = toy_tensors(1)
    tensors["model.norm.weight"][3] = np.inf
    save_file(tensors, models["a"] / "model.safetensors")
    with pytest.raises(MergeError, match="NaN or infinity") as caught:
        merge_checkpoints(_recipe(models), tmp_path / "out", shard_size=SIZE)
    finished = int(caught.value.__notes__[0].split()[0])
    merge_checkpoints(_recipe(models), tmp_path / "out", shard_size=SIZE, resume=True, allow_nonfinite=True)
    merge_checkpoints(_recipe(models), tmp_path / "whole", shard_size=SIZE, allow_nonfinite=True)
    assert _weights(tmp_path / "out") == _weights(tmp_path / "whole")
    assert 0 < finished < 8


def test_plots_need_what_a_resumed_merge_did_not_count(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for counted in (False, True):
        out = tmp_path / f"out{counted}"
        _cut_off(models, out, monkeypatch, plot=counted)
        merge_checkpoints(_recipe(models), out, shard_size=SIZE, resume=True, plot=True)
        assert {path.name for path in (out / "plots").iterdir()} == {"layers.png", "cosines.png", "magnitudes.png"}


@pytest.mark.parametrize("parameters", [{"density": 0.5, "scope": "model"}, {"density": 0.5, "zero_sign": "majority"}])
def test_what_concerns_the_whole_model_is_the_same_after_resuming(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any]
) -> None:
    recipe = recipe_of(models, "ties", parameters=parameters)
    monkeypatch.setattr(f"{__name__}._recipe", lambda models: recipe)
    _cut_off(models, tmp_path / "out", monkeypatch)
    merge_checkpoints(recipe, tmp_path / "out", shard_size=SIZE, resume=True)
    merge_checkpoints(recipe, tmp_path / "whole", shard_size=SIZE)
    assert _weights(tmp_path / "out") == _weights(tmp_path / "whole")


def test_a_working_folder_without_a_journal_of_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with working_folder(out) as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("x")
        (folder / "c.safetensors").write_text("y")
        with pytest.raises(OutputError, match="another merge is writing it now"), working_folder(out):
            pass
    before = content(out)
    assert before == {"a/b": b"x", "c.safetensors": b"y"}
    with pytest.raises(OutputError, match="cannot be written"), working_folder(out, overwrite=True) as folder:
        (folder / "missing" / "c").write_text("y")
    assert content(out) == before
    with working_folder(out, overwrite=True) as folder:
        (folder / "d").write_text("z")
    assert content(out) == {"d": b"z"}
    assert _siblings(out) == ["out"]


def test_a_complete_output_that_lacks_a_file_is_damaged(models: Models, tmp_path: Path) -> None:
    for name in ("model.safetensors.index.json", "config.json", "taskloom_recipe.yml"):
        out = tmp_path / name
        merge_checkpoints(_recipe(models), out, shard_size=SIZE)
        (out / name).unlink()
        with pytest.raises(OutputError, match=f"is damaged: {name} is"):
            merge_checkpoints(_recipe(models), out, shard_size=SIZE, resume=True)


def test_plots_are_not_left_out_of_a_complete_output_in_silence(models: Models, tmp_path: Path) -> None:
    merge_checkpoints(_recipe(models), tmp_path / "out")
    with pytest.raises(OutputError, match="was made without plots; --overwrite makes it again with them"):
        merge_checkpoints(_recipe(models), tmp_path / "out", resume=True, plot=True)
    merge_checkpoints(_recipe(models), tmp_path / "out", resume=True, report=True)
    assert (tmp_path / "out" / "merge_report.html").is_file()


def test_other_weights_of_the_same_size_and_time_are_noticed(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(models["b"] / "model.safetensors", ns=(0, 10**18))
    merge_checkpoints(_recipe(models), tmp_path / "complete", shard_size=SIZE)
    _cut_off(models, tmp_path / "out", monkeypatch)
    save_file(toy_tensors(7), models["b"] / "model.safetensors")
    os.utime(models["b"] / "model.safetensors", ns=(0, 10**18))
    for out in ("out", "complete"):
        with pytest.raises(OutputError, match=r"its input .*/b/model\.safetensors has changed since"):
            merge_checkpoints(_recipe(models), tmp_path / out, shard_size=SIZE, resume=True)


def test_values_that_were_allowed_do_not_slip_in(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = toy_tensors(1)
    tensors["lm_head.weight"][3, 2] = np.nan
    save_file(tensors, models["a"] / "model.safetensors")
    merge_checkpoints(_recipe(models), tmp_path / "complete", shard_size=SIZE, allow_nonfinite=True)
    _cut_off(models, tmp_path / "out", monkeypatch, allow_nonfinite=True)
    for out in ("out", "complete"):
        with pytest.raises(OutputError, match=r"it was made with allow_nonfinite \(--allow-nonfinite\)"):
            merge_checkpoints(_recipe(models), tmp_path / out, shard_size=SIZE, resume=True)
        merge_checkpoints(_recipe(models), tmp_path / out, shard_size=SIZE, resume=True, allow_nonfinite=True)


def test_paths_may_be_spelled_in_another_way(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = {name: Path(name) for name in models}
    _cut_off(relative, Path("out"), monkeypatch)
    monkeypatch.chdir("/")
    merge_checkpoints(_recipe(models), tmp_path / "out", shard_size=SIZE, resume=True)
    merge_checkpoints(tmp_path / "out" / "taskloom_recipe.yml", tmp_path / "out", shard_size=SIZE, resume=True)


def test_a_journal_that_is_not_ours_stays(models: Models, tmp_path: Path) -> None:
    journal = tmp_path / "out.partial.journal"
    (tmp_path / "precious").write_text("precious")
    for make in (
        lambda: journal.write_text("my notes"),
        lambda: journal.symlink_to(tmp_path / "precious"),
        lambda: os.mkfifo(journal),
        lambda: journal.mkdir(),
    ):
        make()
        with pytest.raises(OutputError, match=r"out\.partial\.journal"):
            merge_checkpoints(_recipe(models), tmp_path / "out", overwrite=True)
        assert os.path.lexists(journal)
        journal.rmdir() if journal.is_dir() else journal.unlink()
    assert (tmp_path / "precious").read_text() == "precious"
    assert not list(tmp_path.glob("out*"))


def test_a_partial_folder_that_is_none(models: Models, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    (tmp_path / "elsewhere").mkdir()
    for make in (lambda: partial.write_text("x"), lambda: partial.symlink_to(tmp_path / "elsewhere")):
        make()
        with pytest.raises(OutputError, match=r"out\.partial is not a folder that a merge left; remove it"):
            merge_checkpoints(_recipe(models), tmp_path / "out", overwrite=True)
        assert _siblings(tmp_path / "out") == ["out.partial"]
        partial.unlink()


def test_an_edited_journal_costs_only_work(
    models: Models, tmp_path: Path, expected: dict[str, bytes | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "out.partial.journal"
    whole = merge_checkpoints(_recipe(models), tmp_path / "whole", shard_size=SIZE)
    for edit in ({"tensors": []}, {"kept": "x"}, {"dots": [[1]]}):
        _cut_off(models, tmp_path / "out", monkeypatch)
        facts = [json.loads(line) for line in journal.read_text().splitlines()]
        for fact in facts[1:]:
            if "tensors" in edit:
                fact["finished"] |= edit
            else:
                for tensor in fact["finished"]["tensors"]:
                    tensor |= edit
        journal.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
        report = merge_checkpoints(_recipe(models), tmp_path / "out", shard_size=SIZE, resume=True)
        assert _weights(tmp_path / "out") == expected
        assert _timeless(report) == _timeless(whole)
        shutil.rmtree(tmp_path / "out")


def test_a_folder_that_comes_while_a_merge_runs_is_not_replaced(models: Models, tmp_path: Path) -> None:
    recipe, planned = prepare(_recipe(models), shard_size=SIZE)
    out = tmp_path / "out"

    def come(done: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("x")

    with pytest.raises(OutputError, match=r"holds no model and no merge_report\.json"):
        run_plan(recipe, planned, out, overwrite=True, progress=come)
    assert content(out) == {"thesis.txt": b"x"}


def test_weights_in_the_folders_of_modules_are_synced(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (models["base"] / "2_Dense").mkdir()
    (models["base"] / "2_Dense" / "model.safetensors").write_bytes((models["base"] / "model.safetensors").read_bytes())
    synced: list[str] = []
    sync = taskloom.merge.working.sync
    monkeypatch.setattr("taskloom.merge.working.sync", lambda path: (synced.append(str(path)), sync(path)))
    merge_checkpoints(_recipe(models), tmp_path / "out")
    assert str(tmp_path / "out.partial" / "2_Dense" / "model.safetensors") in synced
    assert str(tmp_path / "out.partial" / "model.safetensors") not in synced


@pytest.mark.skipif(shutil.which("unshare") is None, reason="mounting needs unshare")
def test_a_mount_point_is_refused_before_work(models: Models, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    script = "import sys; from taskloom.cli.main import main; sys.argv = ['taskloom', 'merge', 'recipe.yml', 'mounted']; main()"
    (tmp_path / "recipe.yml").write_text(json.dumps(_recipe(models)))
    command = ["unshare", "--mount", "bash", "-c", 'mount -t tmpfs none mounted && exec "$@"', "bash", sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    if "denied" in done.stderr or "not permitted" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 1
    assert "is a mount point, whose place no other folder can take; name a folder inside it, such as mounted/merged" in done.stderr
    assert not list(tmp_path.glob("mounted.*"))
