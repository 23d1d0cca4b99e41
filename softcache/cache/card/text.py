"""Text for a page of Markdown. What comes from outside shows as it is: it ends no table and brings no HTML along."""

from __future__ import annotations

import re
from collections.abc import Sequence

SHOWN_CHARACTERS = 200


def plain(text: str) -> str:
    """One line of what can be seen: no control characters, no marks that turn the direction of writing; long texts are cut."""
    seen = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return seen if len(seen) <= SHOWN_CHARACTERS else seen[: SHOWN_CHARACTERS - 1] + "…"


def escaped(text: str) -> str:
    """Text that shows as it is, in a sentence or in a cell of a table."""
    marked = re.sub(r"([\\`*\[\]~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", plain(text))
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;")):
        marked = marked.replace(character, entity)
    return marked or "(empty)"


def code(text: str) -> str:
    """The same in a fixed font, where nothing in it would end that."""
    shown = plain(text)
    return f"`{shown}`" if shown and not re.search(r"[`|]", shown) else escaped(text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def listed(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def without_folders(spec: str) -> str:
    """`file.py:factory?arg=1` without the maker's folders."""
    head, _, query = spec.partition("?")
    kept = [pair for pair in query.split("&") if pair and not re.search(r"[/\\]", pair)]
    return re.split(r"[/\\]", head)[-1] + ("?" + "&".join(kept) if kept else "")
