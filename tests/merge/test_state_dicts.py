"""merge_state_dicts against merge_checkpoints of the same tensors, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_checkpoints import toy_tensors

from taskloom.merge import MergeError, RecipeError, merge_checkpoints, merge_state_dicts
from taskloom.merge.errors import CheckpointError
from taskloom.merge.stages import METHODS

StateDict = dict[str, torch.Tensor]

# Per-model values differ between the three models; what a method lacks is left out.
PER_MODEL = {"weight": [0.5, 1.0, -0.3], "density": [0.3, 0.6, 0.45], "epsilon": 0.1, "gamma": [0.05, 0.1, 0.02], "tall_mask_lambda": 0.5}
SHARED: dict[str, dict[str, Any]] = {
    "linear": {},
    "slerp": {"t": [0.2, 0.9]},
    "task_arithmetic": {"lambda": 0.7, "normalize": True},
    "ties": {"scope": "model", "zero_sign": "majority"},
    "dare_linear": {"lambda": [{"filter": "mlp", "value": 0.2}, {"value": 0.9}]},
    "dare_ties": {"rescale": "density", "elect": "count"},
    "della": {},
    "della_linear": {"rescale": "density"},
    "breadcrumbs": {"scope": "row", "on_overflow": "drop"},
    "breadcrumbs_ties": {"rescale": True, "outliers_first": False},
    "passthrough": {"scale": 0.5},
    "magnitude": {"scope": "model"},
    "consensus_ta": {"lambda": 0.4},
    "consensus_ties": {"consensus_k": 1},
}


def _models(dtype: torch.dtype = torch.float32, count: int = 4) -> list[StateDict]:
    """A base and its tunings. Values are multiples of 1/8, so that magnitudes tie."""
    models = []
    for seed in range(count):
        tensors = toy_tensors(seed)
        models.append(
            {
                name: torch.from_numpy(value) if value.dtype == np.int64 else torch.from_numpy(np.round(value * 8) / 8).to(dtype)
                for name, value in tensors.items()
            }
        )
    return models


def _parameters(method: str) -> dict[str, Any]:
    row = METHODS[method]
    own = {name: value for name, value in PER_MODEL.items() if (found := row.parameter(name)) and not found.inert}
    if row.max_models == 1:
        own = {name: value[:1] if isinstance(value, list) else value for name, value in own.items()}
    return own | SHARED[method]


def _on_disk(
    folder: Path,
    method: str,
    base: StateDict | None,
    tuned: Sequence[StateDict],
    parameters: Mapping[str, Any],
    threads: int = 1,
    **keys: Any,
) -> StateDict:
    shared = {name: value for name, value in parameters.items() if not (name in PER_MODEL and isinstance(value, list))}
    recipe: dict[str, Any] = {"merge_method": method, "models": [], "parameters": shared, **keys}
    for number, tensors in enumerate(tuned):
        (folder / str(number)).mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / str(number) / "model.safetensors")
        own = {name: value[number] for name, value in parameters.items() if name not in shared}
        recipe["models"].append({"model": str(folder / str(number)), "parameters": own})
    if base is not None:
        save_file({name: tensor.contiguous() for name, tensor in base.items()}, folder / "base.safetensors")
        recipe["base_model"] = str(folder / "base.safetensors")
    merge_checkpoints(recipe, folder / "out", threads=threads, seed=5, shard_size=700)
    merged: StateDict = {}
    for file in (folder / "out").glob("*.safetensors"):
        merged |= load_file(file)
    return merged


def _assert_same(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_bits_of_a_checkpoint_merge(tmp_path: Path, method: str) -> None:
    base, *tuned = _models()
    row = METHODS[method]
    first = base if row.base == "required" else None
    tuned = tuned[: row.max_models]
    parameters = _parameters(method)
    in_memory = merge_state_dicts(first, tuned, method, seed=5, threads=2, **parameters)
    assert list(in_memory) == list(base)
    _assert_same(in_memory, _on_disk(tmp_path, method, first, tuned, parameters))
    assert not torch.equal(in_memory["model.norm.weight"], tuned[0]["model.norm.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "consensus_ties", "slerp"])
def test_dtypes(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    base, *tuned = _models(dtype)
    tuned = tuned[: METHODS[method].max_models]
    parameters = _parameters(method)
    in_memory = merge_state_dicts(base, tuned, method, seed=5, **parameters)
    assert in_memory["lm_head.weight"].dtype == dtype
    _assert_same(in_memory, _on_disk(tmp_path, method, base, tuned, parameters))


@pytest.mark.parametrize("out_dtype", ["bfloat16", torch.float16])
def test_mixed_dtypes_and_out_dtype(tmp_path: Path, out_dtype: Any) -> None:
    base, tuned = _models()[0], [_models(torch.bfloat16)[1], _models(torch.float16)[2], _models()[3]]
    in_memory = merge_state_dicts(base, tuned, seed=5, out_dtype=out_dtype, weight=1, density=0.5)
    expected = _on_disk(tmp_path, "ties", base, tuned, {"weight": 1, "density": 0.5}, out_dtype=str(out_dtype).removeprefix("torch."))
    _assert_same(in_memory, expected)
    assert in_memory["model.position_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("method", "settings"), [("ties", {"scope": "model"}), ("dare_ties", {}), ("della_linear", {}), ("slerp", {"t": 0.3})]
)
def test_tensors_that_are_spread_over_threads(tmp_path: Path, method: str, settings: dict[str, Any]) -> None:
    """Tensors of 2**20 entries and more go another way through the executor than small ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (1025, 1031), "b": (7,), "c": (1100, 1000)}
    base, *tuned = (
        {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}
        for _ in range(2 if method == "slerp" else 3)
    )
    parameters = settings if method == "slerp" else {"weight": 0.5, "density": 0.3, **settings}
    one, two = (merge_state_dicts(base, tuned, method, seed=5, threads=threads, **parameters) for threads in (1, 2))
    _assert_same(two, one)
    _assert_same(_on_disk(tmp_path, method, base, tuned, parameters, threads=2), one)


def test_any_whole_number_of_threads_and_of_votes_will_do() -> None:
    base, *tuned = _models(count=3)
    merged = merge_state_dicts(base, tuned, "consensus_ta", threads=2**40, consensus_k=2**40)
    assert all(torch.equal(merged[name], value) for name, value in base.items())


def test_linear_averages_the_base_too() -> None:
    base, *tuned = _models(count=3)
    merged = merge_state_dicts(base, tuned, "linear", weight=1.0)
    expected = sum(model["lm_head.weight"].double() for model in (base, *tuned)) / 3
    torch.testing.assert_close(merged["lm_head.weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_numpy_arrays_give_numpy_arrays() -> None:
    models = _models(count=3)
    arrays = [{name: tensor.numpy() for name, tensor in model.items()} for model in models]
    expected = merge_state_dicts(models[0], models[1:], weight=np.array([0.5, 1.0]), density=np.float32(0.5))
    merged = merge_state_dicts(arrays[0], arrays[1:], weight=[0.5, 1.0], density=0.5)
    for name, array in merged.items():
        assert isinstance(array, np.ndarray)
        assert array.dtype == arrays[0][name].dtype
        assert array.tobytes() == expected[name].numpy().tobytes()
    wide = merge_state_dicts(arrays[0], arrays[1:], weight=1.0, dtype=np.float64)
    assert wide["lm_head.weight"].dtype == np.float64


def test_strides_byte_orders_and_parameters_do_not_matter() -> None:
    base, tuned, _ = _models(count=3)
    expected = merge_state_dicts(base, [tuned], weight=1.0, density=0.5)
    transposed = {name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in base.items()}
    strided = {name: torch.stack([tensor, tensor], -1)[..., 0] if tensor.is_floating_point() else tensor for name, tensor in tuned.items()}
    learned = {
        name: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) if tensor.is_floating_point() else tensor
        for name, tensor in transposed.items()
    }
    merged = merge_state_dicts(learned, [strided], weight=1.0, density=0.5)
    _assert_same(merged, expected)
    assert not any(tensor.requires_grad for tensor in merged.values())
    swapped = {name: tensor.numpy().astype(tensor.numpy().dtype.newbyteorder(">")) for name, tensor in tuned.items()}
    _assert_same(merge_state_dicts(base, [swapped], weight=1.0, density=0.5), expected)


def test_scalars_and_empty_tensors() -> None:
    base = {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 3), "one": torch.ones(1)}
    tuned = {name: tensor + 1 for name, tensor in base.items()}
    for method in ("task_arithmetic", "ties", "della", "breadcrumbs"):
        merged = merge_state_dicts(base, [tuned], method, weight=2.0, normalize=False)
        assert {name: tensor.tolist() for name, tensor in merged.items()} == {"scalar": 3.0, "empty": [], "one": [3.0]}


def test_inputs_are_not_modified_and_not_shared() -> None:
    models = _models(count=3)
    before = [{name: tensor.clone() for name, tensor in model.items()} for model in models]
    merged = merge_state_dicts(models[0], models[1:], "dare_linear", weight=0.5, density=0.5)
    addresses = {tensor.data_ptr() for model in models for tensor in model.values()}
    assert addresses.isdisjoint(tensor.data_ptr() for tensor in merged.values())
    for model, kept in zip(models, before, strict=True):
        _assert_same(model, kept)


def test_tied_weights_are_merged_once() -> None:
    base, *tuned = _models(count=3)
    for model in (base, *tuned):
        model["lm_head.weight"] = model["model.embed_tokens.weight"]
    merged = merge_state_dicts(base, tuned, "dare_linear", weight=0.5, density=0.5)
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]
    del tuned[0]["lm_head.weight"]
    again = merge_state_dicts(base, tuned, "dare_linear", weight=0.5, density=0.5)
    _assert_same(again, merged)
    del base["lm_head.weight"]
    untied = merge_state_dicts(base, tuned, "dare_linear", weight=0.5, density=0.5)
    assert "lm_head.weight" not in untied
    assert torch.equal(untied["model.embed_tokens.weight"], merged["model.embed_tokens.weight"])


def test_weights_that_only_the_base_ties_are_merged_apart() -> None:
    base, tuned = _models(count=2)
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    merged = merge_state_dicts(base, [tuned], "task_arithmetic", weight=1.0)
    torch.testing.assert_close(merged["lm_head.weight"], tuned["lm_head.weight"])
    torch.testing.assert_close(merged["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"])


def _wrong() -> dict[str, tuple[type[MergeError], str, Any, Any, dict[str, Any]]]:
    base, *tuned = _models(count=3)
    spoiled = dict(tuned[1], **{"model.norm.weight": torch.full((8,), float("nan"))})
    short = {name: tensor for name, tensor in tuned[1].items() if name != "lm_head.weight"}
    other = dict(tuned[1], **{"lm_head.weight": torch.ones(16, 9)})
    whole = dict(tuned[1], **{"lm_head.weight": torch.ones(16, 8, dtype=torch.int32)})
    meta = {name: tensor.to("meta") for name, tensor in base.items()}
    sparse = dict(base, **{"lm_head.weight": base["lm_head.weight"].to_sparse()})
    good = {"weight": 1.0}
    return {
        "no base": (RecipeError, "base: ties takes differences.*got None", None, tuned, good),
        "base is a list": (CheckpointError, "base: expected a mapping.*got list", [base], tuned, good),
        "one state dict": (CheckpointError, "tuned: expected a list of state dicts.*got one state dict", base, tuned[0], good),
        "tuned is a number": (CheckpointError, "tuned: expected a list.*got int", base, 3, good),
        "nothing tuned": (RecipeError, "tuned: expected at least one", base, [], good),
        "not a tensor": (CheckpointError, r"tuned\[0\]: tensor 'w': expected a torch tensor.*got list", base, [{"w": [1.0]}], good),
        "name is a number": (CheckpointError, "base: expected names that are text, got 0", {0: torch.ones(1)}, tuned, good),
        "label of the base": (RecipeError, "tuned: expected labels.*'base'", base, {"base": tuned[0]}, good),
        "missing tensor": (CheckpointError, r"model 'tuned\[1\]' does not fit 'base'.*lm_head", base, [tuned[0], short], good),
        "extra tensor": (
            CheckpointError,
            r"model 'b' does not fit 'base'.*'x'",
            base,
            {"a": base, "b": {**base, "x": torch.ones(1)}},
            good,
        ),
        "shape": (CheckpointError, r"'b'.*'lm_head.weight' is \[16, 8\] there and \[16, 9\] here", base, {"b": other}, good),
        "kind": (CheckpointError, "'lm_head.weight' is F32 there and int32 here", base, [whole], good),
        "nan": (MergeError, r"'model.norm.weight' of model 'bad' holds NaN.*element 0", base, {"a": tuned[0], "bad": spoiled}, good),
        "device": (
            CheckpointError,
            "base: tensor '.*': expected a tensor in CPU memory or on a CUDA .*, got one on meta",
            meta,
            tuned,
            good,
        ),
        "layout": (CheckpointError, "expected a dense tensor", sparse, tuned, good),
        "long double": (CheckpointError, "longdouble|float128", {"w": np.ones(2, np.longdouble)}, tuned, good),
        "numpy bfloat16": (
            CheckpointError,
            "'w': numpy has no bfloat16",
            {"w": np.ones(2, np.float32)},
            [{"w": np.ones(2, np.float32)}],
            good | {"out_dtype": "bfloat16"},
        ),
        "method": (RecipeError, "did you mean 'ties'", base, tuned, {"method": "tie"}),
        "parameter": (RecipeError, "no parameter 'densty'.*did you mean 'density'", base, tuned, good | {"densty": 1}),
        "no weight": (RecipeError, r"'weight' of model 'tuned\[0\]' has no value", base, tuned, {}),
        "length": (RecipeError, r"weight: expected one value or one per model \(2\), got 3", base, tuned, {"weight": [1, 2, 3]}),
        "range": (RecipeError, r"models\[1\].parameters.density: expected at most 1", base, tuned, good | {"density": [0.5, 2]}),
        "lambda twice": (RecipeError, "lambda: given as lambda_", base, tuned, good | {"lambda": 1, "lambda_": 1}),
        "dtype": (RecipeError, "dtype: expected one of", base, tuned, good | {"dtype": torch.int64}),
        "seed": (RecipeError, "seed", base, tuned, good | {"seed": -1}),
        "threads": (MergeError, "threads: expected 0", base, tuned, good | {"threads": -1}),
        "ranking of two widths": (
            MergeError,
            "scope: model cannot rank float64 tensors together with others: 'model.norm.weight' and 'x'|'lm_head.weight' and",
            base | {"lm_head.weight": base["lm_head.weight"].double()},
            tuned,
            good | {"density": 0.5, "scope": "model"},
        ),
        "too many": (RecipeError, "slerp takes 1 model besides base_model, got 2", base, tuned, {"method": "slerp", "t": 0.5}),
    }


WRONG = _wrong()


@pytest.mark.parametrize("case", WRONG)
def test_refuses(case: str) -> None:
    kind, message, base, tuned, arguments = WRONG[case]
    with pytest.raises(kind, match=message):
        merge_state_dicts(base, tuned, **arguments)


def test_nonfinite_values_pass_where_allowed() -> None:
    base, tuned = _models(count=2)
    tuned["model.norm.weight"][2] = float("inf")
    merged = merge_state_dicts(base, [tuned], "task_arithmetic", weight=1.0, allow_nonfinite=True)
    assert merged["model.norm.weight"].isinf().tolist() == [False, False, True] + [False] * 5


def test_lambda_may_be_written_with_an_underscore() -> None:
    base, *tuned = _models(count=3)
    merged = merge_state_dicts(base, tuned, "task_arithmetic", weight=1.0, lambda_=0.5)
    _assert_same(merged, merge_state_dicts(base, tuned, "task_arithmetic", weight=1.0, **{"lambda": 0.5}))
    plain = merge_state_dicts(base, tuned, "task_arithmetic", weight=0.5)
    torch.testing.assert_close(merged["lm_head.weight"], plain["lm_head.weight"])
