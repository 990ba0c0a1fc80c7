"""Importing taskloom is cheap, and the ops need torch and NumPy alone."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from submodules import public_submodules

import taskloom

SUBPACKAGES = ("archive", "merge", "methods", "nn", "ops", "reference", "triton_kernels")
OTHER_PACKAGES = (
    *("click", "huggingface_hub", "matplotlib", "pandas", "pydantic", "pydantic_core", "rich", "safetensors", "scipy", "sklearn"),
    *("transformers", "triton", "yaml"),
)
# None in sys.modules makes an import fail as if the package were not installed.
BLOCKER = f"import sys\nsys.modules.update(dict.fromkeys({OTHER_PACKAGES!r}))\n"


def _run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_neither_torch_nor_numpy() -> None:
    heavy = (*OTHER_PACKAGES, "torch", "numpy")
    loaded = _run(f"import sys, taskloom\nprint(sorted(set({heavy!r}) & set(sys.modules)))")
    assert loaded.strip() == "[]"


def test_listing_and_failing_attributes_bring_no_torch() -> None:
    script = "import sys, taskloom\ndir(taskloom)\nhasattr(taskloom, 'nothing')\ntaskloom.__version__\nprint('torch' in sys.modules)"
    assert _run(script).strip() == "False"


def test_ops_bring_no_compiler() -> None:
    script = "import sys, torch\nbefore = set(sys.modules)\nimport taskloom.ops\n"
    script += "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}), 'torch._dynamo' in sys.modules)"
    assert _run(script).strip() == "['taskloom'] False"


def test_help_brings_no_torch() -> None:
    script = (
        "import sys\nfrom taskloom.cli.main import taskloom\n"
        "taskloom(['--help'], standalone_mode=False)\nprint('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert _run(script).splitlines()[-1] == "False"


def test_ops_need_only_torch_and_numpy() -> None:
    script = BLOCKER + (
        "import torch, taskloom\n"
        "mask = torch.arange(11) % 3 == 0\n"
        "assert taskloom.unpack_mask(taskloom.pack_mask(mask), mask.shape).equal(mask)\n"
        "with taskloom.backend('reference'):\n"
        "    assert taskloom.unpack_mask(taskloom.pack_mask(mask), mask.shape).equal(mask)\n"
        "taskloom.nn, taskloom.reference\n"
        "tau = taskloom.TaskVector({'w': torch.zeros(2)}, {'w': torch.ones(2)})\n"
        "assert (tau + tau).norm() == 8**0.5\n"
    )
    _run(script)


def test_the_blocker_blocks() -> None:
    script = BLOCKER + "try:\n    import safetensors.numpy\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert "safetensors" in _run(script)


def test_every_public_name_resolves() -> None:
    for name in taskloom.__all__:
        assert getattr(taskloom, name) is getattr(taskloom.ops, name)
    assert list(taskloom.__all__) == sorted(taskloom.__all__)
    assert sorted(taskloom.ops.__all__) == sorted(taskloom.__all__)


def test_star_import() -> None:
    namespace: dict[str, object] = {}
    exec("from taskloom import *", namespace)
    assert set(taskloom.__all__) <= set(namespace)


def test_the_task_vector_is_offered_at_the_top() -> None:
    assert taskloom.TaskVector is taskloom.merge.TaskVector
    assert "TaskVector" in dir(taskloom)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(str(taskloom.__file__)).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    shown = {
        alias.asname or alias.name
        for node in guarded.body
        if isinstance(node, ast.ImportFrom) and node.module == "taskloom.ops"
        for alias in node.names
    }
    assert shown == set(taskloom.__all__)


def test_dir_lists_names_and_subpackages() -> None:
    assert set(dir(taskloom)) >= {*taskloom.__all__, *SUBPACKAGES, "__version__"}


@pytest.mark.parametrize("name", SUBPACKAGES)
def test_subpackages_are_attributes(name: str) -> None:
    assert getattr(taskloom, name) is importlib.import_module(f"taskloom.{name}")


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'taskloom' has no attribute 'pack_masks'"):
        _ = taskloom.pack_masks
    with pytest.raises(ImportError, match="pack_masks"):
        exec("from taskloom import pack_masks", {})


def test_version_is_the_build_s() -> None:
    from taskloom import _native

    assert taskloom.__version__ == _native.build_info()["version"]


@pytest.mark.parametrize("name", public_submodules())
def test_every_public_module_imports_by_itself(name: str) -> None:
    importlib.import_module(name)
