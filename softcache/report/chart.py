"""A picture of a reproduced table: every seed of ours, their mean, and the paper's number, row by row."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import mean
from typing import Any, Protocol

from softcache.errors import printable

ROW_INCHES = 0.32
WIDE = 20  # of the largest to the smallest number, from which an axis is logarithmic


class Row(Protocol):
    """What a row of the picture shows."""

    @property
    def label(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def paper(self) -> float | None: ...
    @property
    def values(self) -> Sequence[float]: ...


def drawn_rows(title: str, rows: Sequence[Row]) -> bytes:
    """A PNG; needs matplotlib."""
    made = io.BytesIO()
    figure_of(title, rows).savefig(made)
    return made.getvalue()


def figure_of(title: str, rows: Sequence[Row]) -> Any:
    """A matplotlib figure with one panel for each metric, the first row on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(row.metric, []).append(row)
    heights = [len(group) + 1.5 for group in panels.values()]
    figure = Figure(figsize=(9, ROW_INCHES * sum(heights) + 0.8), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    figure.suptitle(_plain(title), fontsize=10)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (metric, group) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, metric, group)
    axes[0].legend(fontsize=7, loc="best")
    return figure


def _plain(text: str) -> str:
    """A text of the recipe's as text: matplotlib would take what stands between dollars for a formula."""
    return printable(text).replace("$", r"\$")


def _draw_panel(axis: Any, metric: str, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    ours = [(value, place) for place, row in zip(places, rows, strict=True) for value in row.values]
    papers = [(row.paper, place) for place, row in zip(places, rows, strict=True) if row.paper is not None]
    axis.scatter(*zip(*ours, strict=True), s=16, color="C0", alpha=0.6, label="ours, each seed")
    axis.scatter([mean(row.values) for row in rows], places, s=90, marker="|", color="C0", label="ours, mean")
    if papers:
        axis.scatter(*zip(*papers, strict=True), s=36, marker="x", color="C1", label="paper")
    numbers = [value for value, _ in [*ours, *papers]]
    if min(numbers) > 0 and max(numbers) > WIDE * min(numbers):
        axis.set_xscale("log")
    axis.set_yticks(places, [_plain(row.label.strip()) for row in rows], fontsize=7)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(_plain(f"{metric} in %" if metric == "top1" else metric), fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", alpha=0.3)
