"""A whole merge: recipe, models, plan, streaming pass, and everything that is written beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from taskloom.merge.card import model_card, rerun_recipe
from taskloom.merge.errors import MergeError
from taskloom.merge.output import check_output, copy_side_files, working_folder, write_index
from taskloom.merge.planner import PlannedMerge, open_models, plan_merge
from taskloom.merge.recipe import Recipe, load_recipe
from taskloom.merge.report import MergeReport, build_report
from taskloom.merge.shards import parse_size


def prepare(
    source: str | Path | Mapping[str, Any], *, seed: int | None = None, shard_size: str | int = "5GB", allow_nonfinite: bool = False
) -> tuple[Recipe, PlannedMerge]:
    """Read a recipe and its models' headers and plan the merge, writing nothing.

    Raises
    ------
    MergeError
        If the recipe, the models or the shard size are not what they should be.
    """
    limit = parse_size(shard_size)
    recipe = load_recipe(source)
    chosen = seed if seed is not None else recipe.seed or 0
    if not 0 <= chosen < 2**64:
        raise MergeError(f"seed: expected 0 <= seed < 2**64, got {chosen}")
    return recipe, plan_merge(recipe, open_models(recipe), shard_size=limit, seed=chosen, allow_nonfinite=allow_nonfinite)


def run_plan(
    recipe: Recipe,
    planned: PlannedMerge,
    out: str | Path,
    *,
    threads: int = 0,
    plot: bool = False,
    copy_tokenizer: bool = True,
    write_card: bool = True,
    progress: Callable[[int], None] | None = None,
) -> MergeReport:
    """Carry out a planned merge; the arguments are those of :func:`merge_checkpoints`."""
    from taskloom.merge.execute import execute_plan

    if threads < 0:
        raise MergeError(f"threads: expected 0 (all cores) or more, got {threads}")
    if plot:
        from taskloom.merge.plots import require_matplotlib, write_plots

        require_matplotlib()
    target = check_output(Path(out), planned.cast.models)
    with working_folder(target) as folder:
        result = execute_plan(planned.plan, folder, threads=threads, magnitude_histogram=plot, progress=progress)
        write_index(planned.plan, folder)
        notes = copy_side_files(planned.cast.reference, folder, dtype=recipe.output_dtype, copy_tokenizer=copy_tokenizer)
        report = build_report(
            planned,
            result,
            output=target,
            method=recipe.method.name,
            base_model=recipe.base_model,
            notes=[*planned.notes, *notes],
        )
        report.write(folder / "merge_report.json")
        (folder / "taskloom_recipe.yml").write_text(rerun_recipe(recipe, planned.cast, planned.plan.seed), encoding="utf-8")
        if write_card:
            (folder / "README.md").write_text(model_card(recipe, planned.cast, target.name), encoding="utf-8")
        if plot:
            write_plots(report, result.tensors, folder / "plots")
    return report


def merge_checkpoints(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    threads: int = 0,
    seed: int | None = None,
    shard_size: str | int = "5GB",
    plot: bool = False,
    copy_tokenizer: bool = True,
    write_card: bool = True,
    allow_nonfinite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> MergeReport:
    """Merge safetensors checkpoints by a recipe, in one streaming pass.

    Parameters
    ----------
    recipe
        Path of a YAML recipe, or the same content as a mapping (docs/recipes.md).
    out
        Folder to write; must not exist or be empty. It appears only when the merge is complete.
    threads
        Threads of the streaming pass; 0 means all cores.
    seed
        Of random masks; None means the recipe's ``seed``, else 0.
    shard_size
        Most bytes of tensors in one output file, such as ``"5GB"``, ``"500M"`` or ``"1GiB"``.
    plot
        Write figures into ``out/plots``; needs matplotlib.
    copy_tokenizer
        Copy the base's tokenizer files.
    write_card
        Write README.md.
    allow_nonfinite
        Let NaN and infinities in the inputs pass instead of raising.
    progress
        Called now and then, and at the end, with the number of tensor bytes done so far, read and written together.

    Returns
    -------
    MergeReport
        Also written as ``out/merge_report.json``.

    Raises
    ------
    MergeError
        Its sub-classes say where: RecipeError, CheckpointError, OutputError.
    """
    loaded, planned = prepare(recipe, seed=seed, shard_size=shard_size, allow_nonfinite=allow_nonfinite)
    return run_plan(
        loaded, planned, out, threads=threads, plot=plot, copy_tokenizer=copy_tokenizer, write_card=write_card, progress=progress
    )
