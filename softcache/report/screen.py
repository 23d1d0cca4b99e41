"""The one place where a verb's text reaches the screen: what a terminal would obey is shown as escapes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from softcache.errors import printable

_UPWARDS = re.compile(r"(\x1b\[A)+")


class Screen:
    """A text stream around another one. Whatever is written into it may come from a cache, a run folder or a data set.

    Args:
        bars: lines that end or begin with a carriage return are progress bars, whose return is kept.
    """

    def __init__(self, stream: Any, *, bars: bool = False) -> None:
        self._stream, self._bars = stream, bars

    def write(self, text: str) -> int:
        if self._bars and _UPWARDS.fullmatch(text):  # between two bars
            return int(self._stream.write(text))
        inner = text.strip("\r") if self._bars else text
        before, _, after = text.partition(inner) if inner else (text, "", "")
        self._stream.write(before + self._encodable(printable(inner)) + after)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def _encodable(self, text: str) -> str:
        """Without letters that the stream cannot write, as under a locale of ASCII."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def on_screen() -> Iterator[None]:
    """While it is entered, everything printed goes through a `Screen`."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # for one that was closed before Python began
        sys.stdout = Screen(before[0] or nowhere)
        sys.stderr = Screen(before[1] or nowhere, bars=True)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
