"""The model card and the recipe that are written beside the merged weights."""

from __future__ import annotations

import re

from taskloom.merge.locate import Located
from taskloom.merge.planner import Cast
from taskloom.merge.recipe import Recipe
from taskloom.merge.recipe_source import parse_recipe_text, recipe_yaml


def _shown(located: Located) -> str:
    if located.hub_id:
        return f"[{located.label}](https://huggingface.co/{located.hub_id})"
    return f"`{located.label}`"


def model_card(recipe: Recipe, cast: Cast, name: str) -> str:
    """README.md for the Hugging Face hub: front matter, method, models, and the recipe as it was given.

    Only hub models are listed in the front matter's ``base_model``: a local path means nothing to a reader elsewhere.
    """
    hub_ids = [model.located.hub_id for model in cast.models if model.located.hub_id]
    front: dict[str, object] = {"base_model": hub_ids} if hub_ids else {}
    front |= {"library_name": "transformers", "tags": ["merge", "taskloom"]}
    method = recipe.method
    title = f"[{method.title}]({method.source})" if method.source.startswith("http") else method.title
    based = f" with {_shown(cast.reference.located)} as the base" if cast.deltas else ""
    models = "\n".join(f"- {_shown(task.located)}" for task in cast.tasks)
    # A fence that no line of the recipe can close.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", recipe.text)), default=0))
    return f"""---
{recipe_yaml(front).rstrip()}
---

# {name}

A merge of pretrained models, made with taskloom by the method {title}{based}.

## Models

{models}

## Recipe

{fence}yaml
{recipe.text.strip()}
{fence}

`taskloom_recipe.yml` is the same recipe with every model pinned; `merge_report.json` has the figures of every tensor.
"""


def rerun_recipe(recipe: Recipe, cast: Cast, seed: int) -> str:
    """The recipe as YAML that gives the same merge from any working directory: models pinned, the seed written down."""
    document = parse_recipe_text(recipe.text, "recipe")
    if recipe.base_model is not None:
        document["base_model"] = cast.reference.located.pinned
    pinned = {task.label: checkpoint.located.pinned for task, checkpoint in zip(cast.settings, cast.tasks, strict=True)}
    for entry in document["models"]:
        entry["model"] = pinned.get(entry["model"], cast.reference.located.pinned)
    document["seed"] = seed
    return recipe_yaml(document)
