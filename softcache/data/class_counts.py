"""How many samples each class has, and what is odd about labels or about who is right on them: told once, refused never."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from softcache.data.classes import are_numbers
from softcache.data.label_kind import is_known, is_yes
from softcache.data.transfer_set import TransferSet
from softcache.errors import warn

SHOWN = 20  # classes that are listed one by one
STANDARD_ERRORS = 3.0
FAIR = 0.25  # a teacher that is this far from chance to perfection is fair


def counted_labels(transfer_set: TransferSet) -> np.ndarray:
    """(N,) or (N, C) labels of the samples; (P,) of their words, where these have labels."""
    return transfer_set.labels if transfer_set.positions is None else transfer_set.positions.labels


def class_counts(transfer_set: TransferSet) -> np.ndarray:
    """(C,) samples of each class; of several labels per sample, those that have it; of words, how many words."""
    labels = counted_labels(transfer_set)
    if transfer_set.multi_label:
        return np.asarray(is_yes(labels).sum(axis=0))
    return np.bincount(labels[labels >= 0], minlength=transfer_set.num_classes)


def described(transfer_set: TransferSet) -> str:
    """The class list with its counts, in one line; of many classes the fewest, the most and the empty ones."""
    counts, names = class_counts(transfer_set), transfer_set.class_names
    positions = transfer_set.positions
    missing = int((~is_known(counted_labels(transfer_set))).sum())
    what = (
        "words without a tag"
        if positions is not None
        else (
            f"of {transfer_set.labels.size:,} answers not known"
            if transfer_set.multi_label
            else "samples without a label"
        )
    )
    rest = f"; {missing:,} {what}" if missing else ""
    if transfer_set.rendering is not None and positions is not None:
        cut = 0 if positions.cut is None else int(positions.cut.sum())
        kept, every = len(positions.labels), int(positions.lengths.sum())
        return (
            f"{len(transfer_set):,} samples of tokens, {transfer_set.num_classes:,} ids: {kept:,} tokens kept, "
            f"{every - kept:,} masked, {cut:,} cut off"
        )
    if not names:
        return f"no classes; {len(transfer_set):,} samples"
    if positions is not None:
        rest += f"; {len(positions.labels):,} words in {len(transfer_set):,} samples"
    if len(names) <= SHOWN:
        listed = ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))
        return f"{len(names)} classes: {listed}{rest}"
    order = np.argsort(counts, kind="stable")
    few, many = (", ".join(f"{names[i]} {counts[i]:,}" for i in these) for these in (order[:3], order[:-4:-1]))
    empty = int((counts == 0).sum())
    none = f"; {empty:,} classes have none" if empty else ""
    return f"{len(names):,} classes, from {few} to {many} {'samples' if positions is None else 'words'}{none}{rest}"


def offset_warning(transfer_set: TransferSet) -> str | None:
    """Labels that leave class 0 empty and fill all others: they may count from 1; None where they do not."""
    whole = transfer_set.whole
    if whole.multi_label or whole.num_classes < 3 or not are_numbers(whole.class_names):
        return None
    counts = class_counts(whole)
    if counts[0] or not counts[1:].all():
        return None
    return (
        f"no sample has label 0, and all of 1 to {whole.num_classes - 1} have samples: labels that count from 1 make a class "
        "that nothing belongs to; count from 0, or give the data set class_names"
    )


def unknown_warning(transfer_set: TransferSet) -> str | None:
    """Of several labels some are unknown, and a cache's table of samples has room for yes and no alone; None where none are."""
    unknown = int((~is_known(transfer_set.labels)).sum()) if transfer_set.multi_label else 0
    if not unknown:
        return None
    return (
        f"{unknown:,} of {transfer_set.labels.size:,} labels are not known; a cache holds yes or no, and has them as no: eval "
        "and train take the data set's own labels, where they stay unknown"
    )


def chance_warning(what: str, correct: float, labelled: float, classes: int, unit: str = "samples") -> str | None:
    """Where the largest class is the label's no oftener than chance would have it; None where it is, or too few rows tell.

    Not above 1/C by three standard errors, while a fair teacher would have been right so seldom in less than 1 of 100 cases.

    Args:
        what: who is right, for the message.
        correct: of `labelled` rows.
        unit: what they are, in the plural.
    """
    if classes < 2 or labelled < 1:
        return None
    chance, share = 1 / classes, correct / labelled
    fair = chance + FAIR * (1 - chance)
    error = math.sqrt(chance * (1 - chance) / labelled)
    if share > chance + STANDARD_ERRORS * error or share >= fair:
        return None
    bits = share * math.log(share / fair) if share else 0.0
    bits += (1 - share) * math.log((1 - share) / (1 - fair))
    if math.exp(-labelled * bits) > 0.01:  # Chernoff's bound on so few right answers of a fair teacher
        return None
    return (
        f"{what} is right on {share:.2%} of {labelled:,.0f} labelled {unit}, and chance is {chance:.2%}: its "
        "columns may be other classes than the data's, or its weights or its input other than it was trained with"
    )


def listed_warnings(found: Sequence[str | None]) -> list[str]:
    """Those that are there, each told."""
    told = [text for text in found if text is not None]
    for text in told:
        warn(text)
    return told
