"""The frame that every method's experiments run in: seeds, inequalities, results on disk, and the commands around them."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner, Result

from taskloom.cli.main import taskloom
from taskloom.methods import catalogue
from taskloom.methods.catalogue import METHODS, Method, MethodError, find_method
from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.result import NOT_REPRODUCED, QUICK, REPRODUCED, last_result, read_result
from taskloom.methods.run import run_method

TOY = Method("toy", "merging", "Toy method", "A paper, 2024, arXiv 0000.00000", "masked", "Ours is smaller.")
OURS_IS_SMALLER = Inequality("ours <= 0.5 * theirs", lambda values: values["ours"] <= 0.5 * values["theirs"])
MEAN_IS_SMALLER = Inequality("ours <= theirs", lambda values: values["ours"] <= values["theirs"], "the mean")


def _measure(trial: Trial) -> Values:
    drawn = torch.rand((), generator=trial.generator()).item()
    trial.progress(0.5)
    assert torch.rand(()).item() == torch.rand((), generator=torch.Generator().manual_seed(trial.seed)).item()
    return {"ours": trial.config["scale"] * drawn, "theirs": 1.0 + drawn, "drawn": drawn}


def _claim(*inequalities: Inequality, scale: float = 0.1) -> Claim:
    return Claim("C1", "ours beats theirs", "error, lower is better", _measure, inequalities, ("theirs",), {"scale": scale}, {"scale": 0.2})


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> list[Claim]:
    """The toy method's claims, which a test may change."""
    found: list[Claim] = [_claim(OURS_IS_SMALLER, MEAN_IS_SMALLER)]
    module = ModuleType(f"{TOY.package}.claim")
    module.CLAIMS = found
    monkeypatch.setitem(sys.modules, TOY.package, ModuleType(TOY.package))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(METHODS, TOY.name, TOY)
    return found


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(taskloom, list(arguments))


def test_result_is_written_and_read_back(claims: list[Claim], tmp_path: Path) -> None:
    result = run_method(TOY, seeds=2, out=tmp_path / "new" / "toy", plot=False)
    assert read_result(tmp_path / "new" / "toy" / "result.json") == result
    content = json.loads((tmp_path / "new" / "toy" / "result.json").read_text())
    (claim,) = content["claims"]
    assert content["verdict"] == REPRODUCED
    assert claim["config"] == {"scale": 0.1}
    assert claim["values"]["ours"] == pytest.approx([0.1 * drawn for drawn in claim["values"]["drawn"]])
    assert [one["holds"] for one in claim["inequalities"]] == [[True, True], [True]]
    assert content["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in (tmp_path / "new" / "toy").iterdir()) == ["result.json"]


def test_seeds_repeat_and_leave_the_generator_alone(claims: list[Claim]) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = run_method(TOY, seeds=3), run_method(TOY, seeds=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.claims[0].values == second.claims[0].values
    assert len(set(first.claims[0].values["drawn"])) == 3


def test_a_claim_that_does_not_hold_is_said_so(claims: list[Claim]) -> None:
    claims[:] = [_claim(OURS_IS_SMALLER, MEAN_IS_SMALLER, scale=2.0)]
    result = run_method(TOY, seeds=3)
    assert result.verdict == NOT_REPRODUCED
    assert not result.held
    assert [one.held for one in result.claims[0].inequalities] == [False, True]


def test_a_verdict_names_the_claims_where_some_hold(claims: list[Claim]) -> None:
    claims[:] = [
        _claim(OURS_IS_SMALLER),
        replace(_claim(OURS_IS_SMALLER, scale=2.0), name="C2"),
        replace(_claim(MEAN_IS_SMALLER), name="C3"),
    ]
    assert run_method(TOY, seeds=1).verdict == "C1, C3 reproduced; C2 not reproduced at this size"


def test_a_quick_run_has_its_own_settings_and_claims_nothing(claims: list[Claim]) -> None:
    result = run_method(TOY, seeds=1, quick=True)
    assert result.claims[0].config == {"scale": 0.2}
    assert result.verdict == QUICK


def test_plot_has_a_picture(claims: list[Claim], tmp_path: Path) -> None:
    run_method(TOY, seeds=1, out=tmp_path)
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_leaves_the_earlier_result(claims: list[Claim], tmp_path: Path) -> None:
    run_method(TOY, seeds=1, out=tmp_path, plot=False)
    before = (tmp_path / "result.json").read_bytes()
    claims[:] = [_claim(scale=float("inf"))]
    with pytest.raises(MethodError, match=r"toy C1, seed 0: ours is inf"):
        run_method(TOY, seeds=1, out=tmp_path, plot=False)
    assert (tmp_path / "result.json").read_bytes() == before


@pytest.mark.parametrize("folder", ["a-file", "a-file/below", "new/a-file/below"])
def test_a_folder_that_cannot_be_had_is_an_error_before_anything_runs(claims: list[Claim], folder: str, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("kept")
    (tmp_path / "new").symlink_to(tmp_path)
    seen: list[str] = []
    with pytest.raises(OSError, match="a-file"):
        run_method(TOY, seeds=1, out=tmp_path / folder, plot=False, show=lambda stage, share: seen.append(stage))
    assert not seen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-file", "new"]


def test_a_run_that_is_stopped_leaves_nothing(claims: list[Claim], tmp_path: Path) -> None:
    def stop(stage: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_method(TOY, seeds=1, out=tmp_path / "new" / "toy", show=stop)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_earlier_result(claims: list[Claim], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_method(TOY, seeds=1, out=tmp_path, plot=False)
    before = (tmp_path / "result.json").read_bytes()
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        write(path, content[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        run_method(TOY, seeds=2, out=tmp_path, plot=False)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_bytes() == before


def test_progress_rises_over_the_seeds(claims: list[Claim]) -> None:
    seen: list[tuple[str, float]] = []
    run_method(TOY, seeds=2, show=lambda stage, share: seen.append((stage, share)))
    assert seen == [("toy C1, seed 0", 0.0), ("toy C1, seed 0", 0.25), ("toy C1, seed 1", 0.5), ("toy C1, seed 1", 0.75)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, r"seeds: expected at least 1, got 0"),
        ({"device": "abacus"}, r"device: expected a torch device such as 'cpu' or 'cuda', got 'abacus'"),
        ({"device": "meta"}, r"device: expected 'cpu' or 'cuda', got 'meta'"),
        pytest.param(
            {"device": "cuda"},
            r"device: 'cuda' was asked for, and torch .* sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_arguments(claims: list[Claim], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        run_method(TOY, **arguments)


def test_a_missing_package_is_named_before_anything_runs(claims: list[Claim], monkeypatch: pytest.MonkeyPatch) -> None:
    needy = Method("toy", "merging", "Toy", "A paper", "masked", "A claim.", needs=(("no_such_module", "no-such-package"),))
    with pytest.raises(MethodError, match="toy needs no-such-package: pip install no-such-package"):
        run_method(needy)


def test_unknown_methods_are_compared_with_known_ones(claims: list[Claim]) -> None:
    with pytest.raises(MethodError, match="there is no method 'toi'; did you mean 'toy'"):
        find_method("toi")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"version": 2}', '{"version": 1, "method": 3}'])
def test_a_damaged_result_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(MethodError, match=r"result\.json: "):
        read_result(tmp_path / "result.json")


def test_own_results_come_before_shipped_ones(claims: list[Claim], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, runs = tmp_path / "shipped", tmp_path / "runs"
    monkeypatch.setattr(catalogue.Method, "shipped_result", lambda method: shipped / "result.json")
    assert last_result(TOY, runs) is None
    run_method(TOY, seeds=1, out=shipped, plot=False)
    found = last_result(TOY, runs)
    assert found is not None
    assert found[1] == "shipped"
    run_method(TOY, seeds=2, out=runs / "toy", plot=False)
    found = last_result(TOY, runs)
    assert found is not None
    assert (found[1], len(found[0].seeds)) == ("here", 2)


def test_commands(claims: list[Claim], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = _run("run", "toy", "--seeds", "2", "--no-plot")
    assert done.exit_code == 0, done.output
    assert "theirs (baseline)" in done.output
    assert "holds, every seed: ours <= 0.5 * theirs" in done.output
    assert f"Toy method: {REPRODUCED}" in done.output
    assert (tmp_path / "runs" / "toy" / "result.json").is_file()
    listed = {row["name"]: row for row in json.loads(_run("methods", "--json").output)}
    assert set(listed) == set(METHODS)
    assert listed["toy"]["last_result"]["verdict"] == REPRODUCED
    assert f"{REPRODUCED} (here)" in _run("methods").output


def test_check_tells_by_the_exit_status(claims: list[Claim], tmp_path: Path) -> None:
    arguments = ("run", "toy", "--seeds", "1", "--no-plot", "--out", str(tmp_path))
    assert _run(*arguments, "--check").exit_code == 0
    claims[:] = [_claim(OURS_IS_SMALLER, scale=2.0)]
    assert _run(*arguments).exit_code == 0
    done = _run(*arguments, "--check")
    assert done.exit_code == 1
    assert "DOES NOT HOLD, every seed: ours <= 0.5 * theirs" in done.output


def test_command_errors_are_one_line(claims: list[Claim], tmp_path: Path) -> None:
    done = _run("run", "toi")
    assert done.exit_code == 1
    assert done.output.strip() == "Error: there is no method 'toi'; did you mean 'toy'?"


def test_listing_needs_no_torch() -> None:
    script = (
        "import sys; from taskloom.cli.main import taskloom; taskloom(['methods'], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_quick_runs_come_to_an_end(name: str, tmp_path: Path) -> None:
    result = run_method(find_method(name), seeds=1, quick=True, out=tmp_path)
    assert result.verdict == QUICK
    assert all(claim.inequalities for claim in result.claims)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_claims_hold(name: str) -> None:
    """All that the shipped result says to hold; what it says is not reproduced at this size may stay so."""
    method = find_method(name)
    shipped = read_result(method.shipped_result())
    expected = {(claim.name, one.text, one.over): one.held for claim in shipped.claims for one in claim.inequalities}
    for claim in run_method(method, seeds=3).claims:
        for inequality in claim.inequalities:
            held = inequality.held or not expected[claim.name, inequality.text, inequality.over]
            assert held, f"{claim.name}, {inequality.text}: {claim.values}"
