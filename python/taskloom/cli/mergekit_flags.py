"""mergekit's command-line flags that mean nothing here: each is refused with a sentence that says why, or what to use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_ON_GPU = "use --device cuda, which reads, copies, merges and writes at once, in as much of the GPU's memory as --max-vram says"

REFUSED_FLAGS = {
    "cuda": _ON_GPU,
    "read-to-gpu": _ON_GPU,
    "multi-gpu": "one GPU merges, which --device cuda:N picks: files and the bus set the pace, not the GPU",
    "gpu-rich": _ON_GPU,
    "low-cpu-memory": "memory use is small whatever the models' size; --max-ram sets a ceiling",
    "lazy-unpickle": "no pickle is ever opened; models must be safetensors files",
    "async-write": "output is always written while the inputs are read; use --threads",
    "clone-tensors": "tensors are written one by one, so nothing is shared between them",
    "trust-remote-code": "no code of a model is ever run, so there is nothing to trust",
    "allow-crimes": "models of different shapes or tensor names cannot be merged",
    "unsafe-truncate-embeddings": "vocabularies are not changed; bring the models to one vocabulary first",
    "verbose": "the report has every figure; --debug shows a traceback",
}

REFUSED_OPTIONS = {
    "write-threads": "one pool of threads reads, merges and writes; use --threads",
    "transformers-cache": "the cache is found through HF_HUB_CACHE or HF_HOME; set one of them",
    "lora-merge-cache": "adapters are not merged here; merge them into their base first",
    "lora-merge-dtype": "adapters are not merged here; merge them into their base first",
}

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _refuse(reason: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value:
            raise click.UsageError(f"{parameter.opts[0]} is an option of mergekit: {reason}.", ctx)

    return callback


def refuse_mergekit_flags(command: _Command) -> _Command:
    """Add mergekit's other flags to a command as hidden options that are refused when given."""
    for name, reason in REFUSED_FLAGS.items():
        spelling = ("-v", "--verbose") if name == "verbose" else (f"--{name}/--no-{name}",)
        command = click.option(
            *spelling, f"refused_{name.replace('-', '_')}", is_flag=True, hidden=True, expose_value=False, callback=_refuse(reason)
        )(command)
    for name, reason in REFUSED_OPTIONS.items():
        command = click.option(f"--{name}", f"refused_{name.replace('-', '_')}", hidden=True, expose_value=False, callback=_refuse(reason))(
            command
        )
    unsafe = _refuse("output is always safetensors, never pickled")
    return click.option("--no-safe-serialization", "refused_pickles", is_flag=True, hidden=True, expose_value=False, callback=unsafe)(
        click.option("--safe-serialization", "safe", is_flag=True, hidden=True, expose_value=False)(command)
    )
