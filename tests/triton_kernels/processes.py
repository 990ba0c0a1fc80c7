"""Runs checks of Triton kernels in a process of their own: Triton reads whether to interpret when a kernel is decorated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_checks(path: str, *options: str, **variables: str) -> None:
    """Run a folder or file of checks under pytest; its output is the failure's."""
    known = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TASKLOOM_BACKEND")}
    # NumPy warns where the interpreter's arithmetic overflows, as that of the kernels may.
    command = [sys.executable, "-m", "pytest", str(HERE / path), "-p", "no:cacheprovider", "-q", "-W", "ignore::RuntimeWarning"]
    command += ["-o", "python_files=check_*.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], env=known | variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
