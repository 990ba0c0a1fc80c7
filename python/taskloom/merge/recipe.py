"""Reads a merge recipe: a YAML file as mergekit users have, or the same as a mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic_core import SchemaValidator, ValidationError

from taskloom.merge.errors import RecipeError, near_miss, shown
from taskloom.merge.parameters import Setting, compile_setting
from taskloom.merge.recipe_source import parse_recipe_text, place, plain_values, read_recipe_text, recipe_yaml
from taskloom.merge.stages import MERGEKIT_ONLY, METHODS, TALL_MASKS, Method

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}

_REFUSED = {
    "slices": "layer-wise slices are not supported; list whole models under 'models'",
    "modules": "per-module merges are not supported; list whole models under 'models'",
    "tokenizer_source": "vocabularies are not changed: all models must share one, and the base's tokenizer is copied; remove the key",
    "tokenizer": "vocabularies are not changed: all models must share one, and the base's tokenizer is copied; remove the key",
    "chat_template": "the base's chat template is copied with its tokenizer; remove the key",
}


def _mapping(fields: Mapping[str, Mapping[str, Any]], required: Sequence[str]) -> dict[str, Any]:
    described = {name: {"type": "typed-dict-field", "schema": schema, "required": name in required} for name, schema in fields.items()}
    return {"type": "typed-dict", "fields": described, "extra_behavior": "forbid"}


def _nullable(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "nullable", "schema": schema}


_TEXT = {"type": "str", "strict": True}
_NAME = {**_TEXT, "min_length": 1}
_PARAMETERS = _nullable({"type": "dict", "keys_schema": _TEXT})
_MODEL_FIELDS = {"model": _NAME, "parameters": _PARAMETERS, "task": _nullable(_NAME)}
_FIELDS = {
    "merge_method": _TEXT,
    "models": {"type": "list", "items_schema": _mapping(_MODEL_FIELDS, ["model"]), "min_length": 1},
    "base_model": _nullable(_NAME),
    "parameters": _PARAMETERS,
    "dtype": _nullable(_TEXT),
    "out_dtype": _nullable(_TEXT),
    "seed": _nullable({"type": "int", "strict": True, "ge": 0, "lt": 2**64}),
}
# pydantic's engine without its models, which take a tenth of a second to import and build: longer than many a merge.
_DOCUMENT = SchemaValidator(_mapping(_FIELDS, ["merge_method", "models"]))


@dataclass(frozen=True)
class ModelInput:
    """One entry of ``models``: its name as written, the settings that are its own, and for an archive the task's name where given."""

    label: str
    settings: dict[str, Setting]
    task: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. ``dtype`` and ``out_dtype`` are safetensors codes; ``text`` is the YAML it came from.

    ``notes`` are the settings that were accepted and change nothing; ``folder`` is where the file is (None for a mapping).
    """

    method: Method
    models: tuple[ModelInput, ...]
    base_model: str | None
    settings: dict[str, Setting]
    dtype: str | None
    out_dtype: str | None
    seed: int | None
    text: str
    folder: Path | None
    notes: tuple[str, ...]

    @property
    def output_dtype(self) -> str | None:
        """The dtype of merged tensors; None means that of each base tensor."""
        return self.out_dtype or self.dtype


def _check_keys(mapping: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in mapping:
        if key in known:
            continue
        if key in _REFUSED and where == "recipe":
            raise RecipeError(f"recipe: key {shown(key)} is not supported: {_REFUSED[key]}")
        raise RecipeError(f"{where}: unknown key {shown(key)}, expected {', '.join(known)}{near_miss(str(key), known)}")


def _refuse_type(error: ValidationError) -> NoReturn:
    first = error.errors()[0]
    where = place(first["loc"])
    if first["type"] == "missing":
        raise RecipeError(f"recipe: key {where!r} is missing") from None
    got = first["input"]
    if first["loc"][-1] == "[key]":
        raise RecipeError(f"recipe: {place(first['loc'][:-2])}: a key must be text, got {shown(got)}") from None
    hint = "; YAML takes on, off, yes and no for true and false: write it in quotes" if isinstance(got, bool) else ""
    raise RecipeError(f"recipe: {where}: {first['msg'].lower()}, got {shown(got)}{hint}") from None


def _parse_document(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise RecipeError(f"recipe: expected a mapping with merge_method and models, got {type(raw).__name__}")
    _check_keys(raw, tuple(_FIELDS), "recipe")
    if isinstance(raw.get("models"), list):
        for number, entry in enumerate(raw["models"]):
            if isinstance(entry, Mapping):
                _check_keys(entry, tuple(_MODEL_FIELDS), f"models[{number}]")
    try:
        document: dict[str, Any] = _DOCUMENT.validate_python(raw)
    except ValidationError as error:
        _refuse_type(error)
    return document


def find_method(name: str) -> Method:
    """The row of the method table that ``name`` names; raises RecipeError with the nearest name otherwise."""
    if name in METHODS:
        return METHODS[name]
    if name == TALL_MASKS.name:
        raise RecipeError(f"merge_method {name!r} makes an archive and not a merged model; run taskloom compress RECIPE OUT")
    if name in MERGEKIT_ONLY:
        raise RecipeError(f"merge_method {shown(name)} of mergekit is not offered here; the methods are {', '.join(METHODS)}")
    raise RecipeError(f"merge_method {shown(name)} is unknown; the methods are {', '.join(METHODS)}{near_miss(name, METHODS)}")


def _dtype(name: str | None, key: str) -> str | None:
    if name is None:
        return None
    plain = name.removeprefix("torch.")
    if plain not in DTYPES:
        raise RecipeError(f"recipe: {key}: expected one of {', '.join(DTYPES)}, got {shown(name)}{near_miss(plain, DTYPES)}")
    return DTYPES[plain]


def _unknown_parameter(method: Method, name: str, where: str) -> RecipeError:
    names = [parameter.name for parameter in method.parameters]
    hint = near_miss(name, names)
    others = [other.name for other in METHODS.values() if other.parameter(name)]
    if not hint and others:
        hint = f" ({name!r} belongs to {', '.join(others)})"
    return RecipeError(f"{where}: {method.name} has no parameter {shown(name)}, its parameters are {', '.join(names)}{hint}")


def _compile(method: Method, raw: Mapping[str, Any] | None, where: str, of_model: bool, notes: list[str]) -> dict[str, Setting]:
    settings = {}
    for name, value in (raw or {}).items():
        parameter = method.parameter(name)
        if parameter is None:
            raise _unknown_parameter(method, name, where)
        if of_model and not parameter.per_model:
            raise RecipeError(f"{where}: {name!r} holds for the whole merge; put it under the recipe's own 'parameters'")
        if parameter.name in settings:
            raise RecipeError(f"{where}: {parameter.name} and {parameter.alias} are two names of one parameter; give one of them")
        settings[parameter.name] = compile_setting(parameter, value, f"{where}.{name}")
        note = f"{name} has no effect in {method.name}"
        if parameter.inert and note not in notes:
            notes.append(note)
    return settings


def load_recipe(source: str | Path | Mapping[str, Any], find: Callable[[str], Method] = find_method) -> Recipe:
    """Read and check a recipe.

    Parameters
    ----------
    source
        Path of a YAML file, or the same content as a mapping.
    find
        Gives a method's row by its name; default: the merge methods.

    Raises
    ------
    RecipeError
        If it cannot be read, or a key, method, parameter or value is unknown, missing or out of range.
    """
    text: str | None = None
    folder: Path | None = None
    if isinstance(source, Mapping):
        raw = plain_values(source)
    else:
        text = read_recipe_text(Path(source))
        raw = parse_recipe_text(text, f"recipe {source}")
        folder = Path(source).resolve().parent
    document = _parse_document(raw)
    method = find(document["merge_method"])
    notes: list[str] = []
    settings = _compile(method, document.get("parameters"), "parameters", False, notes)
    models = tuple(
        ModelInput(
            entry["model"], _compile(method, entry.get("parameters"), f"models[{number}].parameters", True, notes), entry.get("task")
        )
        for number, entry in enumerate(document["models"])
    )
    for number, entry in enumerate(models):
        if entry.task is not None and method is not TALL_MASKS:
            raise RecipeError(f"models[{number}]: key 'task' names a task of an archive (merge_method: tall_masks); {method.name} has none")
    if method.base == "required" and document.get("base_model") is None:
        raise RecipeError(f"recipe: key 'base_model' is missing; {method.name} takes differences from it")
    return Recipe(
        method=method,
        models=models,
        base_model=document.get("base_model"),
        settings=settings,
        dtype=_dtype(document.get("dtype"), "dtype"),
        out_dtype=_dtype(document.get("out_dtype"), "out_dtype"),
        seed=document.get("seed"),
        text=recipe_yaml(raw) if text is None else text,
        folder=folder,
        notes=tuple(notes),
    )
