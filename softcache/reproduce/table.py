"""The rows of a recipe, and its table: a line for each of them, or one for all that share a label, with what the model costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from softcache.report.tables import size, table


@dataclass(frozen=True)
class Row:
    """What one labelled step gave.

    Attributes:
        label: of the step.
        metric: "errors", "top1" in percent, or the errors on one class.
        paper: the published number, or None.
        values, best: ours, one for each seed: of the last epoch, and of the best; no best where an epoch does not tell it.
        verdict: "reached" or "not reached"; empty where nothing can be said.
        seconds: of all seeds together.
        column: of the step; rows of one label that have columns are one line.
        cost: "before" and "after", what the model costs that the step began with, and what its own does: means over the seeds.
    """

    label: str
    metric: str
    paper: float | None
    values: Sequence[float]
    best: Sequence[float]
    verdict: str
    seconds: float
    column: str = ""
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def written(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """The table of all rows; two where some of them have columns and others do not."""
    alone = [row for row in rows if not row.column]
    joined = [row for row in rows if row.column]
    parts = [_lines(alone, seeds)] if alone else []
    parts += [_grid(joined)] if joined else []
    return "\n\n".join(parts) or "none of its rows"


def _lines(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    columns: dict[str, list[str]] = {
        "": [row.label for row in rows],
        "metric": [row.metric for row in rows],
        "paper": [number(row.paper) for row in rows],
        "ours": [number(mean(row.values)) for row in rows],
        "s.d.": [number(stdev(row.values)) if len(row.values) > 1 else "" for row in rows],
        "best epoch": [number(mean(row.best) if row.best else None) for row in rows],
    }
    for place, seed in enumerate(seeds if len(seeds) > 1 else ()):
        of_seed = [row.values[place] if len(row.values) > 1 else None for row in rows]
        columns[f"seed {seed}"] = [number(value) for value in of_seed]
    columns["verdict"] = [row.verdict for row in rows]
    columns["minutes"] = [f"{row.seconds / 60:.1f}" for row in rows]
    return _shown(columns)


def _grid(rows: Sequence[Row]) -> str:
    """A line for each label, which begins with what its first model costs that tells it."""
    labels = list(dict.fromkeys(row.label for row in rows))
    costs = {label: next((row.cost for row in rows if row.label == label and row.cost), None) for label in labels}
    columns: dict[str, list[str]] = {"": labels}
    for head, cost_cell in COSTS.items():
        columns[head] = ["" if (cost := costs[label]) is None else cost_cell(cost) for label in labels]
    for head in dict.fromkeys(f"{row.column}, {row.metric}" for row in rows):
        found = {row.label: row for row in rows if f"{row.column}, {row.metric}" == head}
        columns[head] = [_spread(found[label].values) if label in found else "" for label in labels]
    columns["minutes"] = [f"{sum(row.seconds for row in rows if row.label == label) / 60:.1f}" for label in labels]
    return _shown(columns)


def _shown(columns: Mapping[str, Sequence[str]]) -> str:
    """Those in which something stands."""
    shown = {head: cells for head, cells in columns.items() if any(cells)}
    return table(list(shown), list(zip(*shown.values(), strict=True)))


def _of(key: str, how: Callable[[float], str], *, ratio: bool = False) -> Callable[[Mapping[str, Any]], str]:
    def cost_cell(cost: Mapping[str, Any]) -> str:
        before, after = (cost[when][key] for when in ("before", "after"))
        return how(after) + (f" ({after / before:.2f})" if ratio and before else "")

    return cost_cell


def _not_zero(cost: Mapping[str, Any]) -> str:
    return f"{cost['after']['parameters'] - cost['after']['zeros']:,.0f}"


COSTS: dict[str, Callable[[Mapping[str, Any]], str]] = {  # in brackets the share of what the model before it takes
    "parameters": _of("parameters", lambda count: f"{count:,.0f}"),
    "not zero": _not_zero,
    "on disk": _of("nbytes", lambda nbytes: size(round(nbytes))),
    "compressed": _of("compressed", lambda nbytes: size(round(nbytes))),
    "one sample": _of("seconds_one", lambda seconds: f"{1000 * seconds:.2f} ms", ratio=True),
    "a batch": _of("seconds_batch", lambda seconds: f"{1000 * seconds:.1f} ms", ratio=True),
}


def mean_cost(costs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each seed's; empty where one of them has none."""
    if not costs or not all(costs):
        return {}
    return {when: {key: mean(cost[when][key] for cost in costs) for key in costs[0][when]} for when in costs[0]}


def _spread(values: Sequence[float]) -> str:
    return number(mean(values)) + (f" ± {number(stdev(values))}" if len(values) > 1 else "")


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value == round(value) else f"{value:.2f}"
