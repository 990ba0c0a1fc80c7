from __future__ import annotations

from pathlib import Path

import pytest
from agreement import compare, file_of
from header_corners import CORNERS


@pytest.mark.parametrize("corner", CORNERS)
def test_corners_agree_with_safetensors(tmp_path: Path, corner: str) -> None:
    header, body = CORNERS[corner]
    verdict = compare(tmp_path / "x.safetensors", file_of(header, body))
    assert (verdict == "name twice") == corner.startswith("name twice")


def test_corners_fall_on_both_sides(tmp_path: Path) -> None:
    verdicts = [compare(tmp_path / "x.safetensors", file_of(header, body)) for header, body in CORNERS.values()]
    assert verdicts.count("accepted") > 30
    assert verdicts.count("refused") > 50
