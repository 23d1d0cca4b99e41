"""The soft targets of one sample that has an answer for each word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.cache.plan import CLASS_OUTPUTS
from softcache.errors import ConfigError
from softcache.report.tables import table
from softcache.targets.cache import Cache

SHOWN = 3  # classes of a word


@dataclass(frozen=True)
class WordTargets:
    """The words of one sample in one view.

    Attributes:
        labels: (n,) name of each word's label; "none" where it has none.
        numbers: (n,) which word each record is of: only some may have one.
        probabilities: member -> (n, C) at T=1.
    """

    key: str
    id: str
    row: int
    view: int
    class_names: tuple[str, ...]
    labels: tuple[str, ...]
    numbers: tuple[int, ...]
    probabilities: dict[str, np.ndarray]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        about = {"key": self.key, "id": self.id, "row": self.row, "view": self.view, "classes": list(self.class_names)}
        found = {name: rows.tolist() for name, rows in self.probabilities.items()}
        return {**about, "words": list(self.numbers), "labels": list(self.labels), "probabilities": found}

    def text(self) -> str:
        """For people: a line a word, with its likeliest classes."""
        lines = [f"{self.key}: row {self.row}, view {self.view}, id {self.id}, {len(self.numbers)} words"]
        for name, rows in self.probabilities.items():
            cells = [
                [str(number), label, *self._likeliest(row)]
                for number, label, row in zip(self.numbers, self.labels, rows, strict=True)
            ]
            likely = ["likeliest at T=1", *("" for _ in range(min(SHOWN, len(self.class_names)) - 1))]
            lines += ["", name, table(["word", "label", *likely], cells)]
        return "\n".join(lines)

    def _likeliest(self, row: np.ndarray) -> list[str]:
        order = np.argsort(-row, kind="stable")[:SHOWN]
        return [f"{self.class_names[i]} {100 * row[i]:.2f} %" for i in order]


def word_targets(cache: Cache, row: int, view: int) -> WordTargets | None:
    """Of each member that has an answer for each word and keeps every class; None where there is no index of words.

    Raises:
        ConfigError: there are members over words, and none of them keeps every class.
    """
    index = next((one for one in cache.manifest.plan.indexes if one.kind == "words"), None)
    if index is None:
        return None
    members = [m.name for m in cache.manifest.plan.members if m.index == index.name and m.output in CLASS_OUTPUTS]
    whole = [name for name in members if cache.codecs[name].complete]
    if not whole:
        raise ConfigError("no member keeps every class of a word", tip="softcache.open(...).gather reads them")
    targets = cache.gather(np.array([row]), np.array([view]), members=whole)
    at, names = targets.at(whole[0]), tuple(cache.class_names)
    known = np.full(len(at.numbers), -1) if at.labels is None else at.labels
    labels = tuple(names[i] if i >= 0 else "none" for i in known)
    found = {name: targets.flat(name).double().softmax(1).numpy() for name in whole}
    samples = cache.samples
    return WordTargets(
        samples.key(row), f"{int(samples.ids[row]):016x}", row, view, names, labels, tuple(at.numbers.tolist()), found
    )
