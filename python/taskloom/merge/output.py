"""The output folder: which ones are refused, and the files that are copied from the base."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from taskloom.merge.checkpoint import Checkpoint
from taskloom.merge.errors import CheckpointError, OutputError, shown
from taskloom.merge.input_files import check_name, check_regular
from taskloom.merge.links import check_link
from taskloom.merge.plan import MergePlan
from taskloom.merge.strict_json import is_unicode

REPORT = "merge_report.json"
RECIPE = "taskloom_recipe.yml"
INDEX = "model.safetensors.index.json"

_LARGEST_COPIED = 256 * 2**20

_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.bpe", "*.py", "LICENSE*", "NOTICE*")
_NOT_COPIED = (
    "*.index.json",
    "adapter_config.json",
    "trainer_state.json",
    "*_results.json",
    REPORT,
    "compress_report.json",
    "requirements.txt",
    "optimizer*",
)
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "spiece.model",
    "sentencepiece*",
    "*.tiktoken",
    "*.bpe",
    "chat_template*",
    "*.jinja",
)
_CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def check_output(out: Path, models: Iterable[Checkpoint], *, overwrite: bool = False, resume: bool = False) -> Path:
    """Refuse an output folder that would lose something; returns its absolute path.

    Parameters
    ----------
    out
        The folder to write.
    models
        The input models.
    overwrite
        Let a folder with something in it pass, if a model or a merge's report is in it.
    resume
        Let a folder with something in it pass: it may be the same merge, complete.

    Raises
    ------
    OutputError
        If OUT is a file or a folder with something in it, or is, holds, or lies inside an input model.
    """
    try:
        resolved = out.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"output {shown(str(out))}: is no path: {error}") from error
    if not is_unicode(str(resolved)):
        raise OutputError(f"output {shown(str(out))}: is not valid Unicode, which the report and the recipe beside the weights need")
    for model in models:
        path = model.located.path.resolve()
        if resolved == path or path in resolved.parents or resolved in path.parents:
            relation = "is" if resolved == path else ("lies inside" if path in resolved.parents else "holds")
            raise OutputError(f"output {out}: {relation} the input model {model.label!r} ({path}); choose another folder")
    if os.path.exists(resolved) and not os.path.isdir(resolved):
        raise OutputError(f"output {out}: is a file, expected a folder that does not exist yet or is empty")
    if os.path.isdir(resolved) and any(resolved.iterdir()):
        if not overwrite and not resume:
            raise OutputError(f"output {out}: is not empty; choose another folder, empty this one, or replace it with --overwrite")
        check_replaceable(resolved)
    if os.path.ismount(resolved):
        raise OutputError(
            f"output {out}: is a mount point, whose place no other folder can take; name a folder inside it, such as {out}/merged"
        )
    return resolved


def check_replaceable(out: Path) -> None:
    """Refuse to replace a folder that no merge could have written: one without a safetensors file and without a merge's report.

    Raises
    ------
    OutputError
        If ``out`` is such a folder.
    """
    if not any(out.glob("*.safetensors")) and not (out / REPORT).is_file():
        raise OutputError(f"output {out}: holds no model and no {REPORT}; --overwrite replaces only what a merge could have written")


def _matches(path: Path, patterns: Iterable[str]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config whose dtype keys, also those of nested ``*_config`` parts, say ``dtype``."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("torch_dtype", "dtype") and (value is None or isinstance(value, str)):
            changed[key] = dtype
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            changed[key] = _with_dtype(value, dtype)
        else:
            changed[key] = value
    return changed


def _write_config(model: Checkpoint, destination: Path, dtype: str | None) -> None:
    config = model.config
    if config is None:
        return
    if dtype is not None:
        name = _CONFIG_DTYPES[dtype]
        config = _with_dtype(config, name)
        if "torch_dtype" not in config and "dtype" not in config:
            config["torch_dtype"] = name
    # Infinity stands in configs of the wild (Mamba's time_step_limit), so it is passed on.
    write_json(destination / "config.json", config, constants=True)


def json_bytes(content: Any) -> bytes:
    """What :func:`write_json` writes."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, content: Any, *, constants: bool = False) -> None:
    """Write JSON as the Hugging Face tools do: two spaces, UTF-8, a final newline; NaN and infinities only with ``constants``."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=constants)
        file.write("\n")


def _module_folders(folder: Path) -> list[Path]:
    """The sub-folders of a sentence-transformers model (``1_Pooling`` and the like)."""
    return sorted(path for path in folder.iterdir() if os.path.isdir(path) and re.fullmatch(r"\d+_\w+", path.name))


def _side_files(folder: Path) -> list[Path]:
    """What lies beside the weights of a model and comes along, config.json excepted."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.name != "config.json" and not os.path.isdir(path) and _matches(path, _COPIED) and not _matches(path, _NOT_COPIED)
    )


def check_side_files(model: Checkpoint) -> None:
    """Refuse a model whose side files cannot or must not be copied, before any work is done.

    Raises
    ------
    CheckpointError
        If one is no regular file, cannot be read, or is a link out of the model's folder, which would copy a file that is none of the
        model's into the output.
    """
    folder = model.folder
    if folder is None:
        return
    try:
        side_files, modules = _side_files(folder), _module_folders(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}") from error
    for path in side_files:
        check_name(path)
        check_link(path, folder)
        check_regular(path)
    for module in modules:
        check_link(module, folder)
        for path in module.rglob("*"):
            check_name(path)
            check_link(path, folder)
            if path.is_symlink() or not os.path.isdir(path):
                check_regular(path)


def copy_side_files(model: Checkpoint, destination: Path, *, dtype: str | None, copy_tokenizer: bool = True) -> list[str]:
    """Copy configuration, tokenizer and other small files of a model that are not weights.

    Parameters
    ----------
    model
        The reference model; a single file has nothing to copy.
    destination
        The working folder.
    dtype
        safetensors code that config.json is to name; None leaves it as it is.
    copy_tokenizer
        Whether tokenizer files come along.

    Returns
    -------
    list[str]
        Notes about what was left out or copied without merging.
    """
    folder = model.folder
    notes: list[str] = []
    if folder is None:
        return notes
    for path in _side_files(folder):
        if not copy_tokenizer and _matches(path, _TOKENIZER):
            continue
        if path.stat().st_size > _LARGEST_COPIED:
            notes.append(f"{path.name} of {model.label} is above {_LARGEST_COPIED >> 20} MiB and was not copied")
            continue
        shutil.copyfile(path, destination / path.name)
    _write_config(model, destination, dtype)
    for module in _module_folders(folder):
        shutil.copytree(module, destination / module.name)
        if any(_matches(path, ("*.safetensors", "*.bin")) for path in module.iterdir()):
            notes.append(f"weights in {module.name} were copied from {model.label}, not merged")
    return notes


def index_content(plan: MergePlan) -> dict[str, Any] | None:
    """The content of ``model.safetensors.index.json``; None where the output is one file."""
    if not plan.weight_map:
        return None
    return {"metadata": {"total_size": plan.total_size}, "weight_map": dict(sorted(plan.weight_map.items()))}


def write_index(plan: MergePlan, folder: Path) -> None:
    """Write ``model.safetensors.index.json`` where the output has more than one file."""
    content = index_content(plan)
    if content is not None:
        write_json(folder / INDEX, content)
