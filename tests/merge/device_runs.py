"""Merges on a device beside those on the CPU; without a GPU the device is the CPU, driven through the same pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from taskloom.merge import merge_checkpoints
from taskloom.merge.device import account, choice
from taskloom.merge.device.accelerator import HostAccelerator
from taskloom.merge.report import MergeReport

# One that threads share and none that is a multiple of anything; rows of one, a scalar, an empty tensor.
SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.weight": (61, 70),
    "layers.0.norm": (17,),
    "layers.1.weight": (64, 33),
    "layers.1.column": (9, 1),
    "layers.2.weight": (33, 130),
    "head": (3, 5, 7),
    "scalar": (),
    "empty": (0, 3),
}


def save_models(folder: Path, dtypes: Sequence[torch.dtype], shapes: dict[str, tuple[int, ...]] | None = None) -> list[str]:
    """A base and tunings of it, one per dtype, with ties among the magnitudes of their differences and a buffer of integers."""
    random = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=random) for name, shape in (shapes or SHAPES).items()}
    paths = []
    for number, dtype in enumerate(dtypes):
        tensors: dict[str, Tensor] = {}
        for name, origin in base.items():
            change = 0.05 * torch.randn(origin.shape, generator=random)
            rounded = torch.where(torch.rand(origin.shape, generator=random) < 0.5, (change * 16).round() / 16, change)
            tensors[name] = (origin if number == 0 else origin + rounded).to(dtype)
        tensors["ids"] = torch.arange(16)
        (folder / f"m{number}").mkdir(parents=True)
        save_file(tensors, folder / f"m{number}" / "model.safetensors")
        paths.append(str(folder / f"m{number}"))
    return paths


def recipe_of(paths: Sequence[str], method: str, own: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A recipe of the models at ``paths``, the first of which is the base where the method takes one."""
    base: dict[str, str] = {"base_model": paths[0]}
    tuned = list(paths[1:])
    if method == "slerp":
        tuned = tuned[:1]
    elif method == "passthrough":
        base, tuned = {}, tuned[:1]
    elif method == "linear":
        base, tuned = {}, list(paths)
    return {"merge_method": method, **base, "models": [{"model": path, "parameters": dict(own or {})} for path in tuned], **changes}


def use_host_as_device(patch: pytest.MonkeyPatch, piece: int = 4096) -> None:
    """Let ``device="cuda"`` be the CPU, and tensors pass in many pieces."""
    patch.setattr(choice, "open_device", lambda name: HostAccelerator())
    patch.setattr(account, "_PIECE", piece)


def run_both(folder: Path, recipe: dict[str, Any], **options: Any) -> tuple[MergeReport, MergeReport]:
    """The reports of one merge on the CPU and on the device, in ``folder/cpu`` and ``folder/device``."""
    cpu = merge_checkpoints(recipe, folder / "cpu", threads=1, **options)
    return cpu, merge_checkpoints(recipe, folder / "device", device="cuda", **options)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an output."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def units_apart(one: Tensor, other: Tensor) -> int:
    """The largest distance of two floating-point tensors in units in the last place, signed zeros being one apart."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[one.element_size()]
    lowest = torch.iinfo(integer).min
    places = [values.contiguous().view(integer).long() for values in (one, other)]
    ordered = [torch.where(place < 0, lowest - place, place) for place in places]
    return int((ordered[0] - ordered[1]).abs().max()) if one.numel() else 0


def check_same_figures(cpu: MergeReport, device: MergeReport) -> None:
    """Counts are equal; norms and cosines agree as far as sums in another order do."""
    pairs = [(ours.figures, theirs.figures) for ours, theirs in zip(device.tensors, cpu.tensors, strict=True)]
    assert [tensor.name for tensor in device.tensors] == [tensor.name for tensor in cpu.tensors]
    for ours, theirs in [*pairs, (device.total, cpu.total)]:
        if ours is None or theirs is None:
            assert ours is theirs
            continue
        assert (ours.kept_density, ours.conflict_rate) == (theirs.kept_density, theirs.conflict_rate)
        assert ours.norms == pytest.approx(theirs.norms, rel=1e-5, nan_ok=True)
        for one, other in zip(ours.cosines, theirs.cosines, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


class Allocations(TorchDispatchMode):
    """The most bytes of tensors' memory that were alive at once, of what is allocated under it: storages, whoever holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def now(self) -> int:
        """Bytes that are alive."""
        self.alive = {place: (one, size) for place, (one, size) in self.alive.items() if not one.expired()}
        return sum(size for _, size in self.alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.now()
        given = {leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given - self.alive.keys():
                storage = leaf.untyped_storage()
                self.alive.setdefault(storage.data_ptr(), (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.now())
        return result


def require_gpu() -> None:
    """Skip where no GPU can merge, with the reason that the command would give."""
    obstacle = choice.device_obstacle("cuda")
    if obstacle is not None:
        pytest.skip(obstacle)
