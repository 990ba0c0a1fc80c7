"""The table that a check ends with, as text: one line for each op, backend and dtype, then its peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("op", "backend", "entries", "dtype", "ours ms", "GB/s", "of copy", "peer", "peer ms", "peer/ours", "aim", "reached")
_LEFT = ("op", "backend", "dtype", "peer", "aim", "reached")


def _aim(row: Mapping[str, Any]) -> tuple[str, str]:
    """What was aimed at, and whether each part of it was reached."""
    parts, reached = [], []
    aim = row.get("aim") or {}
    if "share" in aim:
        parts.append(f">= {aim['share']:.0%} of copy")
        reached.append(row["share_of_copy"] >= aim["share"])
    if "over" in aim:
        name, least = aim["over"]
        parts.append(f">= {least:g}x {name}")
        peer = row["peers"].get(name, {})
        reached.append(None if "over_ours" not in peer else peer["over_ours"] >= least)
    if not parts:
        return "", ""
    words = {True: "yes", False: "no", None: "not measured"}
    return " and ".join(parts), ", ".join(words[one] for one in reached)


def lines_of(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The lines of one row. A row whose check failed, or that was not measured, shows its status and no speed."""
    head = (row["op"] + (f", {row['use']}" if row["use"] else ""), row["backend"], f"{row['entries']:,}", row["dtype"])
    if row["status"] != "measured":
        return [(*head, row["status"], "", "", "", "", "", "", "")]
    aim, reached = _aim(row)
    own = (f"{row['ours']['ms']:.3f}", f"{row['gigabytes_per_second']:.0f}", f"{row['share_of_copy']:.0%}")
    peers = [
        (name, f"{peer['ms']:.3f}", f"{peer['over_ours']:.2f}") if "ms" in peer else (name, peer["status"], "")
        for name, peer in row["peers"].items()
    ] or [("", "", "")]
    first = (*head, *own, *peers[0], aim, reached)
    return [first, *(("",) * 7 + peer + ("", "") for peer in peers[1:])]


def render(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """The whole table. Columns are as wide as what is in them."""
    lines = [line for row in rows for line in lines_of(row)]
    widths = [max([len(name), *(len(line[place]) for line in lines)]) for place, name in enumerate(COLUMNS)]

    def text(cells: Sequence[str]) -> str:
        shown = (
            cell.ljust(width) if name in _LEFT else cell.rjust(width) for name, cell, width in zip(COLUMNS, cells, widths, strict=True)
        )
        return "  ".join(shown).rstrip()

    failures = [f"FAILED {row['op']} ({row['backend']}, {row['dtype']}): {row['reason']}" for row in rows if row["status"] == "FAILED"]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title, "", text(COLUMNS), rule, *map(text, lines), *([""] if failures else []), *failures]) + "\n"
