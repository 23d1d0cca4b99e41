"""Are a data set's tokens those that a cache is about? The vocabulary and the rendering, before any sample is compared."""

from __future__ import annotations

from typing import Any

from softcache.cache.plan import Plan
from softcache.data.rendering import Rendering, Vocabulary
from softcache.errors import RenderingError, first_offenders, warn_once

SHOWN = 5  # tokens of a message


def check_same_rendering(plan: Plan, tokenizer: bytes | None, dataset: Any) -> None:
    """Raise RenderingError where a data set of tokens has other ids than the cache, or was rendered otherwise.

    A tokenizer.json that only reads differently is told, once: versions of its library rewrite it.

    Args:
        tokenizer: the cache's tokenizer.json.
        dataset: one that says nothing of its rendering is not looked at.
    """
    found = getattr(dataset, "rendering", None)
    if not isinstance(found, Rendering) or plan.vocabulary is None or tokenizer is None:
        return
    check_same_vocabulary(found.vocabulary, Vocabulary(tokenizer, "the cache's tokenizer.json"))
    here, there = found.facts(), dict(plan.rendering or {})
    other = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
    if other:
        listed = ", ".join(f"{one}={here.get(one, 'none')} (the cache: {there.get(one, 'none')})" for one in other)
        raise RenderingError(
            f"the texts are made into tokens otherwise than for the cache: {listed}",
            tip="give the parameters of text: as they were for the dump, or dump again",
        )


def check_same_vocabulary(one: Vocabulary, other: Vocabulary) -> None:
    """Raise RenderingError where a token has another id in one than in the other, or is in one alone; both as tokenizer.json."""
    if one.sha256 == other.sha256:
        return
    differ = sorted(dict(one.ids.items() ^ other.ids.items()))
    if differ:

        def told(token: str) -> str:
            return f"{token!r} ({one.ids.get(token, 'none')}, there {other.ids.get(token, 'none')})"

        raise RenderingError(
            f"{one.where} has other tokens than {other.where}: {len(differ):,} differ: "
            + first_offenders(map(told, differ), len(differ), limit=SHOWN),
            tip="use one tokenizer for data, teacher and cache: an id would mean another token",
        )
    warn_once(
        f"{one.where} reads differently from {other.where}, and has the same tokens with the same ids: it may have been saved "
        "by another version; the ids of each sample are compared all the same"
    )
