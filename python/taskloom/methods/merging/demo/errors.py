"""What stops the demo."""

from __future__ import annotations

import importlib.util


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


def require_extra() -> None:
    """Raise DemoError where a package of the extra ``demo`` is missing."""
    needed = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise DemoError(f"the demo needs {' and '.join(missing)}, which {verb} not installed: pip install 'taskloom[demo]'")
