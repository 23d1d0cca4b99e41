"""The reading pass: every sample is read once before a teacher is asked, and those that do not fit the others are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.data.identity import DIGEST_BYTES, sample_id
from softcache.data.images import describe
from softcache.data.loading import Pair, ViewedSet, load_batches
from softcache.data.views import Policy
from softcache.errors import DataError, SoftcacheError, first_offenders, place_of
from softcache.tokens import Tokens
from softcache.words import Words

PIECE = 1024  # samples of one batch
HOPELESS = 1024  # so many that cannot be read, and most of all read so far: the rest is not waited for
LEAVE_OUT = "or leave them out: --without FILE, their keys one a line; --misfits FILE writes them all into a file"
Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Read:
    """Samples as they were read.

    Attributes:
        index: (B,) int64 positions in the transfer set.
        digests: (B, 16) uint8 of what they hold.
        forms: type, dtype and shape of each item; "" where that tells nothing, or it was not read.
        faults: why each could not be read; None where it was.
    """

    index: np.ndarray
    digests: np.ndarray
    forms: tuple[str, ...]
    faults: tuple[SoftcacheError | None, ...]


@dataclass(frozen=True)
class Contents:
    """What a reading pass found.

    Attributes:
        digests: (N, 16) uint8.
        misfits: position -> why that sample cannot be used.
    """

    digests: np.ndarray
    misfits: dict[int, SoftcacheError]


class ReadingSet(ViewedSet):
    """A transfer set that is read as it is; what cannot be read is an answer too, and so are words that a collate refuses."""

    def __init__(self, transfer_set: Any, collates: Sequence[Collate] = ()) -> None:
        super().__init__(transfer_set, Policy(), collates)

    def __getitems__(self, pairs: list[Pair]) -> Read:  # type: ignore[override]
        digests, forms, faults = np.zeros((len(pairs), DIGEST_BYTES), np.uint8), [], []
        for place, (index, _) in enumerate(pairs):
            fault: SoftcacheError | None = None
            item, form = None, ""
            try:
                item, digest = self.transfer_set.load(index)
                digests[place] = np.frombuffer(digest, np.uint8)
                form = _form(item)
                for collate in self.collates if isinstance(item, Words | Tokens) else ():
                    collate([item])  # a network may take fewer words or tokens than a sample has
            except Exception as exc:  # of somebody's own code too
                fault = _fault(exc, self.transfer_set.keys[index])
                fault = _named(fault, self.transfer_set.keys[index]) if isinstance(item, Words | Tokens) else fault
            forms.append(form)
            faults.append(fault)
        return Read(np.array([index for index, _ in pairs], np.int64), digests, tuple(forms), tuple(faults))


def read_contents(
    transfer_set: Any, policy: Policy, collates: Sequence[Collate], *, workers: int, meter: Any
) -> Contents:
    """Every sample read once: the digests of their contents, and those that are no good.

    Args:
        policy: how views are rendered; of each form of item one is rendered, since most sets have few.
        collates: of the teachers: what they put into one batch fits. Without any, only what cannot be read is a misfit.
        meter: counts samples.
    """
    count = len(transfer_set)
    digests = np.empty((count, DIGEST_BYTES), np.uint8)
    misfits: dict[int, SoftcacheError] = {}
    numbers: dict[str, int] = {}  # of the forms
    form_of = np.full(count, -1, np.int32)
    pairs = ([(i, 0) for i in range(start, min(start + PIECE, count))] for start in range(0, count, PIECE))
    loaded: Iterator[Any] = load_batches(ReadingSet(transfer_set, collates), pairs, workers=workers)
    seen = 0
    for one in loaded:
        digests[one.index] = one.digests
        misfits |= {int(i): fault for i, fault in zip(one.index, one.faults, strict=True) if fault is not None}
        form_of[one.index] = [numbers.setdefault(form, len(numbers)) if form else -1 for form in one.forms]
        seen += len(one.index)
        if len(misfits) >= min(HOPELESS, count) and 2 * len(misfits) > seen:
            break
        meter.add(len(one.index))
    else:
        if len(collates):
            misfits |= _of_other_forms(transfer_set, policy, collates, form_of)
    return Contents(digests, misfits)


def refuse_misfits(misfits: dict[int, SoftcacheError], keys: Sequence[str]) -> None:
    """Raise DataError, naming them, where some samples cannot be used."""
    if not misfits:
        return
    kinds = {misfits[i].tip: misfits[i].message for i in sorted(misfits, reverse=True)}  # the first of each kind
    told = "; ".join(list(kinds.values())[::-1][:3])
    if len(misfits) > 1:
        named = first_offenders((keys[i] for i in sorted(misfits)), len(misfits))
        told = f"{len(misfits):,} of {len(keys):,} samples cannot be used: {named}. For example: {told}"
    tips = [tip.partition(", or leave it out")[0] for tip in list(kinds)[::-1][:3]]
    raise DataError(told, tip="; ".join(filter(None, [*tips, LEAVE_OUT])))


def _form(item: Any) -> str:
    """Type, dtype and shape of an item; "" of a text, of words and of tokens."""
    if isinstance(item, str | Words | Tokens):
        return ""
    return describe(item) + (f" {item.mode} {item.size}" if hasattr(item, "getbands") else "")


def _fault(exc: Exception, key: str) -> SoftcacheError:
    if isinstance(exc, SoftcacheError):
        return exc
    return DataError(f"sample {key}: {type(exc).__name__}: {exc} ({place_of(exc)})", tip="repair the sample")


def _of_other_forms(
    transfer_set: Any, policy: Policy, collates: Sequence[Collate], form_of: np.ndarray
) -> dict[int, SoftcacheError]:
    """The samples whose views no batch takes beside those of most samples."""
    found, first, counts = np.unique(form_of, return_index=True, return_counts=True)
    if len(found[found >= 0]) < 2:  # all alike, or none that has a form: the first batch tells
        return {}
    rendered: dict[int, Any] = {}
    faults: dict[int, SoftcacheError] = {}
    sizes: Counter[str] = Counter()
    for form, index, size in zip(found.tolist(), first.tolist(), counts.tolist(), strict=True):
        if form < 0:
            continue
        key = transfer_set.keys[index]
        try:
            rendered[form] = policy.render(transfer_set.read(index)[0], sample_id(key), 0)
            sizes[_form(rendered[form])] += size
        except Exception as exc:
            faults[form] = _fault(exc, key)
    if not sizes:
        return {}
    usual = max(sizes, key=lambda one: sizes[one])
    example = next(item for item in rendered.values() if _form(item) == usual)
    refused: dict[str, SoftcacheError | None] = {usual: None}
    for form, item in rendered.items():
        seen = _form(item)
        if seen not in refused:
            refused[seen] = _beside(example, item, collates, f"{seen}, where most are {usual}")
        if (fault := refused[seen]) is not None:
            faults[form] = fault
    return {
        int(i): _named(faults[form], transfer_set.keys[int(i)])
        for form in faults
        for i in np.flatnonzero(form_of == form)
    }


def _beside(example: Any, item: Any, collates: Sequence[Collate], what: str) -> SoftcacheError | None:
    """Why two items cannot be in one batch; None where they can."""
    for collate in collates:
        try:
            collate([example, item])
        except Exception:
            grey = {getattr(example, "ndim", 0), getattr(item, "ndim", 0)} == {2, 3}
            return DataError(what, tip=f"make them alike: {'--policy to_rgb' if grey else '--policy resize:size=N'}")
    return None


def _named(fault: SoftcacheError, key: str) -> SoftcacheError:
    return fault if key in fault.message else type(fault)(f"sample {key}: {fault.message}", tip=fault.tip)
