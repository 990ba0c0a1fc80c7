"""A whole merge: recipe, models, plan, streaming pass, and everything that is written beside the weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from taskloom.merge.card import model_card, rerun_recipe
from taskloom.merge.errors import MergeError, OutputError, ReportError
from taskloom.merge.journal import Fingerprint
from taskloom.merge.means import choose_means
from taskloom.merge.output import (
    INDEX,
    RECIPE,
    REPORT,
    check_output,
    check_side_files,
    copy_side_files,
    index_content,
    json_bytes,
    write_index,
)
from taskloom.merge.planner import PlannedMerge, open_models, plan_merge
from taskloom.merge.read_report import load_report
from taskloom.merge.recipe import Recipe, load_recipe
from taskloom.merge.report import MergeReport, build_report, taskloom_version
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
    cast = open_models(recipe)
    check_side_files(cast.reference)
    return recipe, plan_merge(recipe, cast, shard_size=limit, seed=chosen, allow_nonfinite=allow_nonfinite)


def fingerprint_of(recipe: Recipe, planned: PlannedMerge) -> Fingerprint:
    """What decides every byte of a merge's safetensors files."""
    import xxhash

    layout = xxhash.xxh3_128()
    for output in planned.plan.outputs:
        layout.update(f"{output.name} {output.size} ".encode())
        layout.update(output.header)
    pinned = rerun_recipe(recipe, planned.cast, planned.plan.seed)
    identities = {identity.file: identity for model in planned.cast.models for identity in model.files}
    digest = xxhash.xxh3_128(pinned.encode()).hexdigest()
    return Fingerprint(taskloom_version(), digest, layout.hexdigest(), tuple(identities.values()), planned.plan.allow_nonfinite)


def _damage(out: Path, report: MergeReport, recipe: Recipe, planned: PlannedMerge) -> str | None:
    """What is missing from a complete output, or not as it was written; None where nothing is."""
    from taskloom.merge.execute import FinishedFile

    for file in report.files:
        if not FinishedFile(file.name, file.bytes, file.digest, 0.0, ()).is_at(out / file.name):
            return f"{file.name} is not the file that its report names"
    pinned = rerun_recipe(recipe, planned.cast, planned.plan.seed).encode()
    index = index_content(planned.plan)
    wanted = {RECIPE: pinned} | ({} if index is None else {INDEX: json_bytes(index)})
    for name, content in wanted.items():
        if not (out / name).is_file() or (out / name).read_bytes() != content:
            return f"{name} is not what this merge writes"
    if planned.cast.reference.config is not None and not (out / "config.json").is_file():
        return "config.json is missing"
    return None


def finished_report(out: Path, merge: Fingerprint, recipe: Recipe, planned: PlannedMerge) -> MergeReport:
    """The report of an output that the same merge wrote; every file is read to see that it is whole.

    Raises
    ------
    OutputError
        If the output was made by another recipe, by another version or from other inputs, or is damaged; the message says which.
    """
    path = out / REPORT
    try:
        report = load_report(path)
    except ReportError as error:
        raise OutputError(f"output {out}: is there, but {path} cannot be read, so it cannot be told what made it: {error}") from error
    difference = merge.difference(report.merge)
    if difference is not None:
        raise OutputError(f"output {out}: is there, and cannot be resumed: {difference}; --overwrite replaces it")
    problem = _damage(out, report, recipe, planned)
    if problem is not None:
        raise OutputError(f"output {out}: is there, and is damaged: {problem}; --overwrite replaces it")
    return report


def run_plan(
    recipe: Recipe,
    planned: PlannedMerge,
    out: str | Path,
    *,
    threads: int = 0,
    max_ram: str | int | None = None,
    device: str | None = None,
    max_vram: str | int | None = None,
    plot: bool = False,
    report: bool = False,
    copy_tokenizer: bool = True,
    write_card: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[int], None] | None = None,
) -> MergeReport:
    """Carry out a planned merge; the arguments are those of :func:`merge_checkpoints`."""
    from taskloom.merge.execute import execute_plan, jobs_by_file
    from taskloom.merge.working import WorkingFolder, journal_file, sync_tree

    if threads < 0:
        raise MergeError(f"threads: expected 0 (all cores) or more, got {threads}")
    if plot:
        from taskloom.merge.plots import require_matplotlib, write_plots

        require_matplotlib()
    if report:
        from taskloom.merge.page import PAGE, recipe_beside, write_page
    means = choose_means(planned.plan, threads=threads, max_ram=max_ram, device=device, max_vram=max_vram, plot=plot)
    target = check_output(Path(out), planned.cast.models, overwrite=overwrite, resume=resume)
    merge = fingerprint_of(recipe, planned)

    def complete() -> MergeReport | None:
        """The report of a complete output of this merge, with what was asked for besides."""
        if not (resume and target.is_dir() and any(target.iterdir())):
            return None
        try:
            found = finished_report(target, merge, recipe, planned)
            if plot and found.total.cosines and not (target / "plots").is_dir():
                raise OutputError(f"output {target}: is complete, but was made without plots; --overwrite makes it again with them")
        except OutputError:
            if not overwrite:
                raise
            return None
        if report and not (target / PAGE).is_file():
            write_page(found, recipe_beside(target), target / PAGE)
        return found

    # Without a journal there is nothing to put in order, and a complete output may lie where nothing can be written.
    if not os.path.exists(journal_file(target)) and (found := complete()) is not None:
        return found
    with WorkingFolder(target, overwrite=overwrite) as place:
        if (found := complete()) is not None:
            return found
        place.begin(merge, files=len(planned.plan.outputs), resume=resume)
        folder = place.folder
        jobs = jobs_by_file(planned.plan)
        reusable = {
            name: file
            for name, file in place.finished.items()
            if name in jobs and file.fits(jobs[name]) and (not plot or file.has_histograms)
        }
        for name in place.finished.keys() - reusable.keys():
            (folder / name).unlink()
        place.finished = dict(reusable)
        try:
            result = execute_plan(
                planned.plan,
                folder,
                threads=means.threads,
                room=means.room,
                make_executor=means.make_executor,
                magnitude_histogram=plot,
                progress=progress,
                finished=reusable,
                on_finished=place.finish,
                check_inputs=planned.check_inputs,
            )
            notes = copy_side_files(planned.cast.reference, folder, dtype=recipe.output_dtype, copy_tokenizer=copy_tokenizer)
            made = build_report(
                planned,
                result,
                merge,
                output=target,
                method=recipe.method.name,
                base_model=recipe.base_model,
                notes=[*planned.notes, *means.notes, *notes],
            )
            made.write(folder / REPORT)
            (folder / RECIPE).write_text(rerun_recipe(recipe, planned.cast, planned.plan.seed), encoding="utf-8")
            if report:
                write_page(made, recipe_beside(folder), folder / PAGE)
            if write_card:
                (folder / "README.md").write_text(model_card(recipe, planned.cast, target.name), encoding="utf-8")
            if plot:
                write_plots(made, result.tensors, folder / "plots")
            sync_tree(folder, without=place.finished)
            # Whoever finds an index finds everything that it names.
            write_index(planned.plan, folder)
            sync_tree(folder, without=place.finished)
        except OSError as error:
            raise OutputError(f"output {target}: cannot be written: {error}") from error
        place.put_in_place()
    return made


def merge_checkpoints(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    threads: int = 0,
    max_ram: str | int | None = None,
    device: str | None = None,
    max_vram: str | int | None = None,
    seed: int | None = None,
    shard_size: str | int = "5GB",
    plot: bool = False,
    report: bool = False,
    copy_tokenizer: bool = True,
    write_card: bool = True,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[int], None] | None = None,
) -> MergeReport:
    """Merge safetensors checkpoints by a recipe, in one streaming pass.

    Parameters
    ----------
    recipe
        Path of a YAML recipe, or the same content as a mapping (docs/recipes.md).
    out
        Folder to write; must not exist or be empty. It appears only when the merge is complete and on the disk.
    threads
        Threads of the streaming pass; 0 means all cores.
    max_ram
        Ceiling of the process's anonymous memory, such as ``"256MB"``; what the process holds already counts. Less memory means more
        passes or fewer threads, never another result. None sets no ceiling. Not with a ``device``.
    device
        ``"cuda"`` or ``"cuda:N"`` merges on that GPU; None or ``"cpu"`` on the CPU. Which entries are kept, and random masks, are the
        same on both.
    max_vram
        With a ``device``: ceiling of what torch takes of its memory, such as ``"8GB"``. None takes at most 80% of what is free.
    seed
        Of random masks; None means the recipe's ``seed``, else 0.
    shard_size
        Most bytes of tensors in one output file, such as ``"5GB"``, ``"500M"`` or ``"1GiB"``.
    plot
        Write figures into ``out/plots``; needs matplotlib.
    report
        Write the report as a page for a browser as well, ``out/merge_report.html``.
    copy_tokenizer
        Copy the base's tokenizer files.
    write_card
        Write README.md.
    allow_nonfinite
        Let NaN and infinities in the inputs pass instead of raising.
    overwrite
        Replace an existing ``out`` when the merge is complete; until then it stays as it is.
    resume
        Go on with what a merge of the same recipe and inputs left when it was cut off: output files that it finished are not made
        again. Where nothing is left it starts from the beginning; where ``out`` is complete it returns its report.
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
        loaded,
        planned,
        out,
        threads=threads,
        max_ram=max_ram,
        device=device,
        max_vram=max_vram,
        plot=plot,
        report=report,
        copy_tokenizer=copy_tokenizer,
        write_card=write_card,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
    )
