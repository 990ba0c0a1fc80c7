"""Every method on a device, against the compiled executor: the same bits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import check_same_figures, recipe_of, require_gpu, run_both, save_models, tensors_in, units_apart, use_host_as_device
from safetensors.torch import load_file, save_file
from torch import Tensor

from taskloom.merge import merge_checkpoints, merge_state_dicts, state_dicts
from taskloom.merge.device import account
from taskloom.merge.errors import CheckpointError, MergeError
from taskloom.merge.stages import METHODS


@dataclass(frozen=True)
class Merge:
    """A method with parameters of each model and of all."""

    method: str
    own: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


GRADIENT = {"weight": [0.2, 1.0], "density": [{"filter": "norm", "value": 1.0}, {"value": [0.1, 0.6]}]}
MERGES = {
    "linear": Merge("linear", {"weight": 0.7}),
    "linear sum": Merge("linear", {"weight": [0.3, 0.9]}, {"normalize": False}),
    "slerp": Merge("slerp", {}, {"t": [0, 0.3, 1]}),
    "task arithmetic": Merge("task_arithmetic", {"weight": 0.4}, {"lambda": 0.7}),
    "ties": Merge("ties", GRADIENT),
    "ties by row": Merge("ties", {"weight": 1.0, "density": 0.3}, {"scope": "row", "elect": "count", "normalize": False}),
    "ties of the model": Merge("ties", {"weight": [1.0, 0.5], "density": 0.31}, {"scope": "model", "zero_sign": "majority"}),
    "dare linear": Merge("dare_linear", GRADIENT),
    "dare as in the paper": Merge("dare_linear", {"weight": 0.5, "density": 0.4}, {"rescale": "density"}),
    "dare ties": Merge("dare_ties", {"weight": -0.6, "density": 0.5}, {"zero_sign": "majority"}),
    "della": Merge("della", {"weight": 1.0, "density": 0.5, "epsilon": 0.2}),
    "della linear": Merge("della_linear", {"weight": 0.5, "density": 0.4, "epsilon": 0.1}, {"rescale": "density"}),
    "breadcrumbs": Merge("breadcrumbs", {"weight": 0.5, "density": 0.6, "gamma": 0.1}),
    "breadcrumbs of rows": Merge("breadcrumbs", {"weight": 0.5, "density": 0.9, "gamma": 0.2}, {"scope": "row", "on_overflow": "drop"}),
    "breadcrumbs of the model": Merge("breadcrumbs", {"weight": 0.5, "density": 0.3, "gamma": 0.02}, {"scope": "model", "rescale": "l1"}),
    "breadcrumbs ties": Merge("breadcrumbs_ties", {"weight": 0.5, "density": 0.6, "gamma": 0.1}),
    "passthrough": Merge("passthrough"),
    "passthrough scaled": Merge("passthrough", {"scale": [{"filter": "norm", "value": 0.5}, {"value": None}]}),
    "magnitude": Merge("magnitude", {"weight": 0.5, "density": 0.2}, {"rescale": True}),
    "consensus ta": Merge("consensus_ta", {"tall_mask_lambda": [0.2, 0.5]}),
    "consensus ties": Merge("consensus_ties", {"density": 0.3}, {"lambda": 0.8}),
}
FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = {
    "bfloat16": (BFLOAT16,) * 4,
    "float32": (FLOAT32,) * 4,
    "float16": (FLOAT16,) * 4,
    "float64": (FLOAT64,) * 4,
    "mixed": (BFLOAT16, FLOAT32, FLOAT16, BFLOAT16),
}


def _merges() -> list[object]:
    return [
        pytest.param(merge, dtypes, id=f"{name}, {kind}", marks=[] if kind == "bfloat16" else [pytest.mark.slow])
        for name, merge in MERGES.items()
        for kind, dtypes in DTYPES.items()
    ]


def _check_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], within: int = 0) -> None:
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        if value.is_floating_point():
            assert units_apart(value, theirs[name]) <= within, name
        else:
            assert value.equal(theirs[name])


def test_every_method_is_merged() -> None:
    assert {merge.method for merge in MERGES.values()} == set(METHODS)


@pytest.mark.parametrize(("merge", "dtypes"), _merges())
def test_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: Merge, dtypes: tuple[torch.dtype, ...]) -> None:
    use_host_as_device(monkeypatch)
    paths = save_models(tmp_path, dtypes)
    cpu, device = run_both(tmp_path, recipe_of(paths, merge.method, merge.own, parameters=merge.shared), seed=2**63 + 5, shard_size="20kB")
    # Slerp's factors come from sums in another order.
    exact = merge.method != "slerp" or FLOAT64 not in dtypes
    ours, theirs = tensors_in(tmp_path / "device"), tensors_in(tmp_path / "cpu")
    if exact:
        _check_equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)
    check_same_figures(cpu, device)
    assert [file.name for file in device.files] == [file.name for file in cpu.files]
    assert len(device.files) > 1
    if exact:
        assert [file.digest for file in device.files] == [file.digest for file in cpu.files]
    assert "merged on cpu (the CPU), with at most" in " ".join(device.notes)


@pytest.mark.parametrize("out_dtype", ["float32", "float16", "float64"])
def test_other_output_dtypes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out_dtype: str) -> None:
    use_host_as_device(monkeypatch)
    paths = save_models(tmp_path, DTYPES["mixed"])
    for method, own in (("ties", {"weight": 1.0, "density": 0.5}), ("passthrough", {})):
        run_both(tmp_path / method, recipe_of(paths, method, own, out_dtype=out_dtype))
        _check_equal(tensors_in(tmp_path / method / "device"), tensors_in(tmp_path / method / "cpu"))


def test_histograms_of_magnitudes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    use_host_as_device(monkeypatch)
    from taskloom.merge import plots

    seen = []
    monkeypatch.setattr(plots, "write_plots", lambda report, tensors, folder: seen.append([one.magnitude_histogram for one in tensors]))
    for kind in ("bfloat16", "float64"):
        paths = save_models(tmp_path / kind, DTYPES[kind])
        for method, own, shared in (("ties", {"weight": 1.0, "density": 0.5}, {}), ("slerp", {}, {"t": 0.5})):
            run_both(tmp_path / kind / method, recipe_of(paths, method, own, parameters=shared), plot=True)
            cpu, device = seen[-2:]
            assert device == cpu
            assert all(counts is not None for counts in device)


def _with_value(folder: Path, value: float, model: int = 1) -> list[str]:
    paths = save_models(folder, (FLOAT32,) * 3)
    tensors = load_file(folder / f"m{model}" / "model.safetensors")
    tensors["layers.1.weight"].view(-1)[1500] = value
    save_file(tensors, folder / f"m{model}" / "model.safetensors")
    return paths


@pytest.mark.parametrize(
    ("value", "model", "changes", "message"),
    [
        (torch.nan, 2, {}, "tensor 'layers.1.weight' of model '{}' holds NaN or infinity, first at element 1500; allow_nonfinite"),
        (torch.inf, 0, {}, "tensor 'layers.1.weight' of the base model holds NaN or infinity, first at element 1500; allow_nonfinite"),
        (1e6, 1, {"out_dtype": "float16"}, "tensor 'layers.1.weight': a value is too large for float16; choose a wider out_dtype"),
    ],
)
def test_what_is_not_finite_is_refused_as_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, model: int, changes: dict[str, Any], message: str
) -> None:
    use_host_as_device(monkeypatch)
    paths = _with_value(tmp_path, value, model)
    recipe = recipe_of(paths, "ties", {"weight": 1.0, "density": 0.5}, **changes)
    with pytest.raises(MergeError) as on_cpu:
        run_both(tmp_path, recipe)
    with pytest.raises(MergeError) as direct:
        merge_checkpoints(recipe, tmp_path / "direct", device="cuda")
    assert message.format(paths[model]) in str(direct.value)
    assert str(direct.value) == str(on_cpu.value)
    assert not list(tmp_path.glob("direct*"))


def test_a_difference_that_overflows_and_a_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_host_as_device(monkeypatch)
    paths = save_models(tmp_path, (FLOAT32,) * 2, {"a": (300,), "b": (5,)})
    for path, value in zip(paths, (-3e38, 3e38), strict=True):
        save_file({"a": torch.full((300,), value), "b": torch.full((5,), 1e5)}, Path(path) / "model.safetensors")
    with pytest.raises(MergeError, match="tensor 'a': the difference of a model and the base overflows"):
        merge_checkpoints(recipe_of(paths, "task_arithmetic", {"weight": 1.0}), tmp_path / "out", device="cuda")
    with pytest.raises(MergeError, match="tensor 'b': a value is too large for float16"):
        merge_checkpoints(
            recipe_of(paths, "passthrough", {"scale": [{"filter": "a", "value": 0.0}, {"value": None}]}, out_dtype="float16"),
            tmp_path / "out",
            device="cuda",
        )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["ties of the model", "dare ties", "della", "slerp", "passthrough", "consensus ties"])
def test_what_is_not_finite_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, name: str) -> None:
    use_host_as_device(monkeypatch)
    merge = MERGES[name]
    paths = _with_value(tmp_path, value)
    run_both(tmp_path, recipe_of(paths, merge.method, merge.own, parameters=merge.shared), allow_nonfinite=True)
    ours, theirs = tensors_in(tmp_path / "device"), tensors_in(tmp_path / "cpu")
    for key, one in ours.items():
        torch.testing.assert_close(one, theirs[key], rtol=0, atol=0, equal_nan=True)


def test_float64_is_not_ranked_with_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_host_as_device(monkeypatch)
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        save_file({"x": torch.randn(5), "y": torch.randn(5).double()}, tmp_path / name / "model.safetensors")
    recipe = recipe_of(
        [str(tmp_path / "base"), str(tmp_path / "a")], "ties", {"weight": 1.0, "density": 0.5}, parameters={"scope": "model"}
    )
    for device in ("cpu", "cuda"):
        with pytest.raises(MergeError, match="scope: model cannot rank float64 tensors together with others: 'x' and 'y'"):
            merge_checkpoints(recipe, tmp_path / "out", device=device)


def _state_dicts(dtypes: tuple[torch.dtype, ...], device: str = "cpu") -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(5)
    shapes = {"model.layers.0.w": (61, 70), "model.layers.1.w": (64, 33), "norm": (17,), "scalar": (), "empty": (0, 3)}
    base = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    models = [base, *({name: value + 0.1 * torch.randn(value.shape, generator=random) for name, value in base.items()} for _ in dtypes[1:])]
    return [
        {**{name: value.to(device, dtype) for name, value in model.items()}, "ids": torch.arange(5, device=device)}
        for model, dtype in zip(models, dtypes, strict=True)
    ]


@pytest.mark.parametrize("kind", ["bfloat16", "mixed", "float64"])
@pytest.mark.parametrize("name", ["ties of the model", "dare ties", "della", "slerp", "passthrough", "linear", "consensus ties"])
def test_state_dicts_on_a_device(monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    merge = MERGES[name]
    base, *tuned = _state_dicts(DTYPES[kind])
    tuned = tuned[:1] if merge.method in ("slerp", "passthrough") else tuned
    settings = {**merge.own, **merge.shared}
    settings["weight"] = [0.5] * len(tuned) if "weight" in settings else None
    settings = {key: value for key, value in settings.items() if value is not None}
    given = None if merge.method in ("passthrough", "linear") else base
    expected = merge_state_dicts(given, tuned, merge.method, seed=9, out_dtype="float32", **settings)
    use_host_as_device(monkeypatch)
    monkeypatch.setattr(state_dicts, "_one_device", lambda models: "cuda:0")
    got = merge_state_dicts(given, tuned, merge.method, seed=9, out_dtype="float32", **settings)
    _check_equal(got, expected)
    if merge.method == "passthrough":
        return
    tuned[0]["norm"][3] = torch.nan
    with pytest.raises(MergeError, match=r"tensor 'norm' of .* holds NaN or infinity, first at element 3"):
        merge_state_dicts(given, tuned, merge.method, out_dtype="float32", **settings)


def test_state_dicts_lie_on_one_device() -> None:
    base, tuned = _state_dicts((FLOAT32, FLOAT32))
    described = {label: state_dicts._described(label, tensors) for label, tensors in (("base", base), ("tuned[0]", tuned))}
    described["tuned[0]"]["norm"] = replace(described["tuned[0]"]["norm"], device="cuda:1")
    with pytest.raises(
        CheckpointError, match=r"^tuned\[0\]: tensor 'norm': is on cuda:1, expected cpu as base: tensor 'model\.layers\.0\.w'$"
    ):
        state_dicts._one_device(described)


@pytest.mark.gpu
def test_state_dicts_on_a_gpu() -> None:
    require_gpu()
    for device in ("cpu", "cuda"):
        base, *tuned = _state_dicts(DTYPES["bfloat16"], device)
        merged = merge_state_dicts(base, tuned, "ties", weight=1.0, density=0.4)
        assert {value.device.type for value in merged.values()} == {device}
        if device == "cpu":
            expected = merged
    _check_equal({name: value.cpu() for name, value in merged.items()}, expected, within=1)


@pytest.mark.gpu
@pytest.mark.parametrize(("merge", "dtypes"), _merges())
def test_methods_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: Merge, dtypes: tuple[torch.dtype, ...]) -> None:
    require_gpu()
    monkeypatch.setattr(account, "_PIECE", 4096)
    paths = save_models(tmp_path, dtypes)
    cpu, device = run_both(tmp_path, recipe_of(paths, merge.method, merge.own, parameters=merge.shared), seed=2**63 + 5, shard_size="20kB")
    _check_equal(tensors_in(tmp_path / "device"), tensors_in(tmp_path / "cpu"), within=1)
    check_same_figures(cpu, device)
