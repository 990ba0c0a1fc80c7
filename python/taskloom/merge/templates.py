"""Commented recipes, one per method, written from the method table so that they cannot fall behind it."""

from __future__ import annotations

from typing import Any

from taskloom.merge.stages import REQUIRED, Method, Parameter

# Starting values where a default is missing or only keeps everything.
_START: dict[str, Any] = {"weight": 0.5, "t": 0.5, "density": 0.5}
_START_OF: dict[tuple[str, str], Any] = {
    ("breadcrumbs", "density"): 0.9,
    ("breadcrumbs_ties", "density"): 0.9,
    ("consensus_ta", "weight"): 1.0,
    ("consensus_ties", "weight"): 1.0,
    ("consensus_ties", "density"): 0.2,
    ("tall_masks", "density"): 0.2,
    ("consensus_ta", "lambda"): 0.3,
    ("consensus_ties", "lambda"): 0.3,
}


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _start(method: Method, parameter: Parameter) -> str:
    fallback = _START.get(parameter.name, parameter.default)
    value = _START_OF.get((method.name, parameter.name), fallback)
    return _yaml(1.0 if value is REQUIRED else value)


def _line(method: Method, parameter: Parameter, indent: str) -> str:
    return f"{indent}{parameter.name}: {_start(method, parameter)}  # {parameter.help}"


def _model(method: Method, path: str, per_model: list[Parameter]) -> list[str]:
    lines = [f"  - model: {path}"]
    if per_model:
        lines += ["    parameters:", *(_line(method, parameter, " " * 6) for parameter in per_model)]
    return lines


def recipe_template(method: Method) -> str:
    """A ready-to-edit recipe for ``method``."""
    per_model = [parameter for parameter in method.parameters if parameter.per_model and not parameter.inert]
    shared = [parameter for parameter in method.parameters if not parameter.per_model and not parameter.inert]
    lines = [
        f"# {method.title}; source: {method.source}",
        f"# Stages: {method.stages}.",
        "# A model is a folder with safetensors files, one such file, or a Hugging Face id (org/name or org/name@revision).",
        f"merge_method: {method.name}",
    ]
    if method.base == "required":
        lines.append("base_model: path/to/base")
    lines.append("models:")
    count = method.max_models or 2
    for number in range(count):
        lines += _model(method, f"path/to/model-{number + 1}", per_model)
    if shared:
        lines += ["parameters:", *(_line(method, parameter, "  ") for parameter in shared)]
    lines += [
        "# Numbers such as weight may be a list over the layers ([0.2, 0.8]) or a list of {filter: self_attn, value: 0.3}.",
        "# out_dtype: bfloat16  # of the merged tensors; without it they keep the base's (float32, float16, bfloat16, float64)",
    ]
    return "\n".join(lines) + "\n"
