"""What a method's page says, for the tests that hold it to that."""

from __future__ import annotations

import re
from pathlib import Path


def code_blocks(page: Path) -> list[str]:
    """The Python code on a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def table_rows(page: Path) -> list[list[str]]:
    """The cells of every row of the page's tables."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
