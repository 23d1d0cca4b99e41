"""The columns of the table of samples that a hub shows: what they are called and what they hold, known from the plan alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from softcache.cache.card.phrases import POSITIONS as KINDS
from softcache.cache.plan import CLASS_OUTPUTS, MemberInfo, Plan

ROWS = 100  # samples
CLASSES, POSITIONS, VALUES = 5, 10, 20  # of one sample: the largest classes, the first words, the first numbers


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: `label`, or MEMBER_WHAT.
        kind: of its values; none of them is missing but labels, and numbers that a codec does not keep.
        many: each cell is a list.
        about: what it holds, in words.
    """

    name: str
    kind: Literal["text", "number", "whole"]
    many: bool
    about: str


def preview_columns(plan: Plan) -> list[Column]:
    """Of one view of some samples: who they are, and what each member answered."""
    columns = [Column("sample", "text", False, "the sample's name, or its id where names were not stored")]
    if (plan.class_names or plan.vocabulary is not None) and not any(index.labels for index in plan.indexes):
        several = plan.samples.multi_label
        columns.append(Column("label", "text", several, "the sample's classes" if several else "the sample's class"))
    for index in plan.indexes:
        columns.append(Column(f"{index.name}_count", "whole", False, f"how many {KINDS[index.kind][1]} it has"))
        if index.labels:
            about = f"the class of each of its first {POSITIONS} {KINDS[index.kind][1]}"
            columns.append(Column(f"{index.name}_labels", "text", True, about))
    for member in plan.members:
        columns += _of_member(plan, member)
    return columns


def _of_member(plan: Plan, member: MemberInfo) -> Iterator[Column]:
    name = member.name
    if member.index is not None:
        each = f"of each of the first {POSITIONS} {KINDS[plan.index(member.index).kind][1]}"
        if member.output in CLASS_OUTPUTS:
            yield Column(f"{name}_classes", "text", True, f"the likeliest class {each}")
            yield Column(f"{name}_probabilities", "number", True, f"its probability {each}")
        elif member.output is not None:
            yield Column(f"{name}_norms", "number", True, f"length of the vector {each}")
    elif member.output in CLASS_OUTPUTS:
        yield Column(f"{name}_classes", "text", True, f"the {CLASSES} likeliest classes")
        yield Column(f"{name}_probabilities", "number", True, "their probabilities at temperature 1")
        if not plan.samples.multi_label:
            yield Column(f"{name}_entropy", "number", False, "entropy of the probabilities of all classes, in nats")
    elif member.output == "values":
        shown = ", ".join(member.value_names[:VALUES])
        yield Column(f"{name}_values", "number", True, f"the numbers {shown}")
    elif member.output == "embedding":
        yield Column(f"{name}_norm", "number", False, "length of the vector")
