"""``taskloom doctor``: what was built, what this machine offers, and what would run; for a bug report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from taskloom.cli.environment import DEVICES, Environment, look_around

Row = tuple[str, str]


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"


def _versions(found: Environment) -> Iterator[Row]:
    for package, version in found.versions.items():
        yield package, version or "absent"


def _machine(found: Environment) -> Iterator[Row]:
    machine = found.machine
    yield "platform", machine["platform"]
    yield "CPU", f"{machine['cpu']}, {machine['cores']} cores usable"
    yield "memory", _gigabytes(machine["memory_bytes"])
    yield "CPU level", ", ".join(f"{what} {level or 'cannot be had'}" for what, level in found.cpu_level.items()) or "unknown"
    yield "threads", ", ".join(f"{what} {count}" for what, count in found.threads.items()) or "unknown"
    yield from found.variables.items()


def _build(found: Environment) -> Iterator[Row]:
    if found.build is None:
        yield "host module", "cannot be imported"
        return
    yield "compiler", found.build["compiler"]
    yield "torch headers", found.build["torch_headers"]
    yield "CPU levels", ", ".join(found.build["levels"])
    architectures = ", ".join(found.build["cuda_architectures"])
    yield "CUDA compiler", f"{found.build['cuda_compiler']} for {architectures}" if found.build["cuda_compiler"] else "none"


def _gpu(found: Environment) -> Iterator[Row]:
    library = found.cuda["library"]
    yield "CUDA library", f"{'loaded' if library['loaded'] else 'not loaded'}: {library['reason']}"
    gpus = [f"{gpu['name']} (capability {gpu['capability']}, {_gigabytes(gpu['memory_bytes'])})" for gpu in found.cuda.get("gpus", [])]
    seen = ", ".join(gpus) or "none seen by torch"
    if not gpus and found.cuda.get("driver"):
        seen += ", though an NVIDIA driver is installed"
    yield "GPUs", seen
    yield "Triton", f"{'usable' if found.triton['usable'] else 'not used'}: {found.triton['reason']}"


def _why(choice: dict[str, Any]) -> str:
    """Which backend an op takes, and what keeps the ones before it in the order of preference from serving."""
    passed_over = []
    for backend, obstacle in choice["obstacles"].items():
        if backend == choice["chosen"]:
            break
        passed_over.append(f"{backend}: {obstacle or 'not asked for'}")
    return (choice["chosen"] or "none, it raises") + (f" ({'; '.join(passed_over)})" if passed_over else "")


def _backends(found: Environment) -> Iterator[Row]:
    if found.backends is None:
        yield "ops", "cannot be used"
        return
    yield "asked for", found.backends["requested"]
    for device in DEVICES:
        grouped: dict[str, list[str]] = {}
        for op, choice in found.backends[device].items():
            grouped.setdefault(_why(choice), []).append(op)
        for why, ops in grouped.items():
            yield f"on {device}", f"{why}: {', '.join(ops)}"


def _extras(found: Environment) -> Iterator[Row]:
    for extra, row in found.extras.items():
        state = "present" if row["present"] else f"missing {', '.join(row['missing'])}"
        yield extra, f"{state}; for {row['purpose']}"
    cache = found.hub_cache
    yield "model cache", cache["path"] + ("" if cache["exists"] else " (does not exist)")


SECTIONS = {
    "Versions": _versions,
    "Machine": _machine,
    "Build": _build,
    "GPU": _gpu,
    "Backends": _backends,
    "Extras": _extras,
}


def _print_text(found: Environment) -> None:
    for title, rows in SECTIONS.items():
        click.secho(title, bold=True)
        for label, text in rows(found):
            click.echo(f"  {label:<19}{text}")
    for problem in found.problems:
        click.secho(f"problem: {problem}", fg="red")
    if not found.problems:
        click.echo("No problem found.")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(as_json: bool) -> None:
    """Show what was built, what this machine offers, and which backend each op would take.

    This is what a bug report should hold. The exit status is 1 where a part of taskloom cannot work here.
    """
    found = look_around()
    if as_json:
        import json

        click.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        _print_text(found)
    if found.problems:
        sys.exit(1)
