"""What a sub-command tried, and the promises that did not hold."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class Broken(Exception):
    """A promise that did not hold."""


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


@dataclass
class Report:
    """What one sub-command tried and found."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def trial(self, where: str) -> Iterator[None]:
        """One trial; whatever it raises is a failure."""
        self.counts["trials"] += 1
        try:
            yield
        except Exception as exc:
            told = str(exc) if isinstance(exc, Broken) else "".join(traceback.format_exception(exc))
            self.failures.append(f"{where}: {told}")
        else:
            self.counts["as promised"] += 1
