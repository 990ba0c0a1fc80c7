"""Parameter values that depend on the tensor: scalars, gradients over the layers, and lists of filters.

The rules are mergekit 0.1.5's (config.py, plan.py, architecture/auto.py): the first filter that is a substring of the tensor's name
wins, a gradient is interpolated linearly over the layers, and tensors outside the layers take its first value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from taskloom.merge.errors import RecipeError, near_miss, shown
from taskloom.merge.stages import REQUIRED, Parameter, Value

# More digits are no layer of a model, and int() would take long, or refuse.
_LAYER = re.compile(r"\.(\d{1,9})\.")
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Rule:
    """Values for the tensors whose name contains ``filter`` (None or ``*``: all); more than one value is a gradient.

    ``where`` is the place in the recipe, for error messages.
    """

    filter: str | None
    values: tuple[Value, ...]
    where: str = field(default="", compare=False)


Setting = tuple[Rule, ...]


@dataclass(frozen=True)
class Position:
    """Where a tensor is in its model: its layer (None outside the layers) and the gradient's argument in [0, 1]."""

    layer: int | None
    t: float


def layer_positions(names: Iterable[str]) -> dict[str, Position]:
    """The position of every tensor of a model.

    A layer is the first whole number between dots in a name; tensors that share what stands before it form one stack, and the
    gradient runs from 0 at its first layer to 1 at its last (1 where there is only one). Everything else is at 0.
    """
    found = {name: _LAYER.search(name) for name in names}
    last: dict[str, int] = {}
    for name, match in found.items():
        if match:
            stack = name[: match.start()]
            last[stack] = max(last.get(stack, 0), int(match[1]))
    positions = {}
    for name, match in found.items():
        if match is None:
            positions[name] = Position(None, 0.0)
            continue
        layer, end = int(match[1]), last[name[: match.start()]]
        positions[name] = Position(layer, layer / end if end else 1.0)
    return positions


def _number(parameter: Parameter, value: object, where: str) -> float:
    if isinstance(value, str):
        # YAML 1.1 reads 1e-3 (no dot) as text.
        try:
            value = float(value)
        except ValueError:
            raise RecipeError(f"{where}: expected a number, got {shown(value)}") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{where}: expected a number, got {shown(value)}")
    if not math.isfinite(value):
        raise RecipeError(f"{where}: expected a finite number, got {shown(value)}")
    if parameter.low is not None and value < parameter.low:
        raise RecipeError(f"{where}: expected at least {parameter.low:g}, got {shown(value)}")
    if parameter.high is not None and value > parameter.high:
        raise RecipeError(f"{where}: expected at most {parameter.high:g}, got {shown(value)}")
    if parameter.above is not None and value <= parameter.above:
        raise RecipeError(f"{where}: expected more than {parameter.above:g}, got {shown(value)}")
    return float(value)


def _flag(value: object, where: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    raise RecipeError(f"{where}: expected true or false, got {shown(value)}")


def _choice(parameter: Parameter, value: object, where: str) -> str:
    if isinstance(value, str) and value in parameter.choices:
        return value
    hint = near_miss(value, parameter.choices) if isinstance(value, str) else ""
    raise RecipeError(f"{where}: expected one of {', '.join(parameter.choices)}, got {shown(value)}{hint}")


def _rescale(parameter: Parameter, value: object, where: str) -> str:
    """``none``, ``density`` or ``l1``; mergekit's true means l1."""
    if isinstance(value, str) and value.lower() not in _WORDS:
        return _choice(parameter, value, where)
    return "l1" if _flag(value, where) else "none"


def _scalar(parameter: Parameter, value: object, where: str) -> Value:
    if value is None and parameter.default is None:
        return None
    match parameter.kind:
        case "number":
            return _number(parameter, value, where)
        case "whole":
            number = _number(parameter, value, where)
            if number != int(number):
                raise RecipeError(f"{where}: expected a whole number, got {shown(value)}")
            return int(number)
        case "flag":
            return _flag(value, where)
        case "choice":
            return _choice(parameter, value, where)
        case "rescale":
            return _rescale(parameter, value, where)


def _gradient(parameter: Parameter, raw: object, where: str) -> tuple[Value, ...]:
    if not isinstance(raw, list | tuple):
        return (_scalar(parameter, raw, where),)
    if not raw:
        raise RecipeError(f"{where}: an empty list is no gradient")
    if parameter.constant:
        raise RecipeError(f"{where}: takes one value for the whole merge, not a gradient")
    return tuple(_scalar(parameter, value, f"{where}[{number}]") for number, value in enumerate(raw))


def _conditional(parameter: Parameter, raw: object, where: str) -> Rule:
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{where}: expected a mapping with filter and value, got {shown(raw)}; do not mix plain values with filters")
    for key in raw:
        if key not in ("filter", "value"):
            raise RecipeError(f"{where}: unknown key {shown(key)}, expected filter and value{near_miss(str(key), ('filter', 'value'))}")
    if "value" not in raw:
        raise RecipeError(f"{where}: a filter needs a value")
    pattern = raw.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        hint = "; write it in quotes" if isinstance(pattern, bool) else ""
        raise RecipeError(f"{where}.filter: expected text, got {shown(pattern)}{hint}")
    return Rule(None if pattern == "*" else pattern, _gradient(parameter, raw["value"], f"{where}.value"), f"{where}.value")


def compile_setting(parameter: Parameter, raw: Any, where: str) -> Setting:
    """Check one setting of a recipe and turn it into rules.

    Parameters
    ----------
    parameter
        What the setting is for; gives type, limits and choices.
    raw
        From the recipe: a scalar, a gradient (list of scalars), ``{filter, value}``, or a list of those.
    where
        Names the setting in error messages.

    Raises
    ------
    RecipeError
        If a value has the wrong type, is out of range, or may not vary.
    """
    filtered = isinstance(raw, list | tuple) and any(isinstance(item, Mapping) for item in raw)
    if parameter.constant and (filtered or isinstance(raw, Mapping)):
        raise RecipeError(f"{where}: takes one value for the whole merge, not filters")
    if isinstance(raw, Mapping):
        return (_conditional(parameter, raw, where),)
    if filtered:
        return tuple(_conditional(parameter, item, f"{where}[{number}]") for number, item in enumerate(raw))
    return (Rule(None, _gradient(parameter, raw, where), where),)


def _interpolate(values: tuple[Value, ...], t: float) -> Value:
    if len(values) == 1:
        return values[0]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) != len(values):
        return values[int(t * (len(values) - 1))]
    scaled = t * (len(numbers) - 1)
    first = int(scaled)
    second = min(len(numbers) - 1, first + 1)
    share = scaled - first
    return (1 - share) * numbers[first] + share * numbers[second]


def matching_rule(parameter: Parameter, sources: Iterable[Mapping[str, Setting]], name: str) -> Rule | None:
    """The first rule for a tensor in the first source that has one; None where the parameter's default holds."""
    for settings in sources:
        for rule in settings.get(parameter.name, ()):
            if rule.filter is None or rule.filter in name:
                return rule
    return None


def resolve(parameter: Parameter, sources: Iterable[Mapping[str, Setting]], name: str, t: float, model: str | None = None) -> Value:
    """The value of a parameter for one tensor: the first matching rule of the first source that has one, else the default.

    Raises
    ------
    RecipeError
        If nothing matches and the parameter has no default.
    """
    rule = matching_rule(parameter, sources, name)
    if rule is not None:
        value = _interpolate(rule.values, t)
        # Rounding of an interpolation may leave the interval that both of its ends respect.
        if isinstance(value, float) and parameter.high is not None:
            value = min(value, parameter.high)
        return value
    if parameter.default is REQUIRED:
        of_model = f" of model {model!r}" if model else ""
        raise RecipeError(f"parameter {parameter.name!r}{of_model} has no value for tensor {shown(name)} and no default")
    default: Value = parameter.default
    return default
