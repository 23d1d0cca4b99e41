"""How far a piece of work is, on stderr: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, Self, TypeVar

from softcache.report.tables import one_line, size

SHOWN_AFTER_S = 2.0  # what takes no longer shows nothing
LINE_EVERY_S = 10.0

Item = TypeVar("Item")


class Meter:
    """Counts work and shows it. A context manager: at its end the bar goes.

    Args:
        what: is being done.
        total: how much there is to do.
        unit: what is counted, such as "views"; "B" for bytes.
        done: how much of it was there already.
        quiet: show nothing.
        after_s: seconds until something is shown; None: SHOWN_AFTER_S.
        every_s: least seconds between two lines where stderr is no terminal; None: LINE_EVERY_S.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        unit: str,
        done: int = 0,
        quiet: bool = False,
        after_s: float | None = None,
        every_s: float | None = None,
    ) -> None:
        self.done, self.total, self.shown = done, total, not quiet
        self._what, self._unit = one_line(what), unit
        self._note, self._before = "", done
        self._after = SHOWN_AFTER_S if after_s is None else after_s
        self._every = LINE_EVERY_S if every_s is None else every_s
        self._started = time.monotonic()
        self._next_line = self._started + self._after
        self._bar: Any = None
        if self.shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                desc=self._what,
                unit=unit if unit == "B" else f" {unit}",
                unit_scale=True,
                delay=self._after,
                leave=False,
                file=sys.stderr,
            )

    def add(self, count: int = 1) -> None:
        """So much more is done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self.shown and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self._every
            print(self.line(), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Something to say at the end of the line, from now on."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def line(self) -> str:
        """`dump caches/a: 3,100 of 12,000 views, 410/s, ETA 0:00:22`."""
        rate = (self.done - self._before) / max(1e-9, time.monotonic() - self._started)
        left = timedelta(seconds=round((self.total - self.done) / rate)) if rate > 0 else "unknown"
        if self._unit == "B":
            parts = [f"{size(self.done)} of {size(self.total)}", f"{size(round(rate))}/s", f"ETA {left}"]
        else:
            amount = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
            parts = [f"{self.done:,} of {self.total:,} {self._unit}", f"{amount}/s", f"ETA {left}"]
        return f"{self._what}: {', '.join([*parts, *filter(None, [self._note])])}"

    def close(self) -> None:
        """The bar goes; what was counted stays."""
        if self._bar is not None:
            self._bar.close()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each counted when the next one is asked for."""
        for item in items:
            yield item
            self.add()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def track(items: Iterable[Item], what: str, total: int, *, unit: str, quiet: bool = False) -> Iterator[Item]:
    """The items of one piece of work, counted and shown."""
    with Meter(what, total, unit=unit, quiet=quiet) as meter:
        yield from meter.over(items)
