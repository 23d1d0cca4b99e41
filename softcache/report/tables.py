"""What people read at the end: aligned tables, bars, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softcache.errors import printable


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, words: bool = False) -> str:
    """An aligned text table; the first column to the left, the others to the right, or to the left if they are words."""
    cells = [[cell(value) for value in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = [
            text.ljust(width) if i == 0 or words else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def cell(value: Any) -> str:
    """A number with the digits that matter; None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return one_line(str(value))


def one_line(text: str) -> str:
    """The text without what a terminal would obey, lines and tabs among it."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def size(nbytes: int) -> str:
    """Bytes in the unit that fits: 512 B, 1.2 MB, 34.5 GB."""
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def bar(share: float, width: int = 30) -> str:
    """A share of 1 as a bar of blocks, to an eighth of a character."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + ("" if rest == 0 else chr(0x258F - rest + 1))
